"""A word of a data set, and which words could stand for each other."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A class name with its keywords, `base` or held out of training (`novel`); `char` is a pictogram's character."""

    char: str
    name: str
    keywords: tuple[str, ...]
    split: str


def related(word: Word, other: Word) -> bool:
    """Whether a person could call one by the other's name: then neither is a fair absent word beside the other."""
    own = set(re.findall(r"[a-z']+", " ".join([word.name, *word.keywords])))
    return bool(own & set(re.findall(r"[a-z']+", other.name)))
