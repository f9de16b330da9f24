"""The words of EmojiScenes: names, keywords, the base / novel split, and synonyms that are in no training text."""

import functools
import json
from pathlib import Path

from ovsam.data.words import Word


@functools.cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("emoji_words.json").read_text(encoding="utf-8"))


@functools.cache
def all_words() -> tuple[Word, ...]:
    """Return every word with its CLDR short name and keywords, in code-point order; word ids are indices into this
    tuple."""
    return tuple(Word(w["char"], w["name"], tuple(w["keywords"]), w["split"]) for w in _table()["words"])


def synonyms() -> dict[str, str]:
    """Return {synonym that is not in the training data: name of its pictogram}; all are base words."""
    return dict(_table()["synonyms"])
