"""The words of EmojiScenes: names, keywords, the base / novel split, and synonyms no training text contains."""

import functools
import json
from pathlib import Path

from ovsam.data.words import Word


@functools.cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("emoji_words.json").read_text(encoding="utf-8"))


@functools.cache
def all_words() -> tuple[Word, ...]:
    """Every word, its CLDR short name and keywords, in code-point order; an index into this tuple is a word's id
    everywhere in EmojiScenes."""
    return tuple(Word(w["char"], w["name"], tuple(w["keywords"]), w["split"]) for w in _table()["words"])


def synonyms() -> dict[str, str]:
    """{word never trained: name of the pictogram it should find}; all of them name base words."""
    return dict(_table()["synonyms"])
