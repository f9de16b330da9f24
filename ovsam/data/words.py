"""A class name of a data set, and whether two class names can refer to the same object."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A class name with its keywords; `split` is "base" or "novel" (held out); `char` is the character of a
    pictogram."""

    char: str
    name: str
    keywords: tuple[str, ...]
    split: str


def related(word: Word, other: Word) -> bool:
    """Whether two words share a name or keyword; then neither is used as a negative beside the other."""
    own = set(re.findall(r"[a-z']+", " ".join([word.name, *word.keywords])))
    return bool(own & set(re.findall(r"[a-z']+", other.name)))
