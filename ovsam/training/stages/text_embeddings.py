"""Words embedded by the locked text tower."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovsam.checkpoints.text_tower import embed_texts
from ovsam.data.scenes.words import all_words
from ovsam.data.words import Word


@dataclass
class WordTable:
    """`names` [W, D] of all words, `keywords` [Kw, D], `has_keyword` [W, Kw] bool, `is_base` [W] bool."""

    names: Tensor
    keywords: Tensor
    has_keyword: Tensor
    is_base: Tensor


def word_table(
    words: Sequence[Word] | None = None,
    encode: Callable[[list[str]], Tensor] = embed_texts,
    max_words_per_keyword: int = 40,
) -> WordTable:
    """Embed names and keywords of a data set's words (default: EmojiScenes) by `encode`: texts -> [K, D].

    Keywords of too many words are left out, and so are those that only novel words have, which must not be part of
    training.
    """
    words = all_words() if words is None else words
    names = {word.name for word in words}
    counts: dict[str, int] = {}
    for word in words:
        if word.split == "base":
            for keyword in word.keywords:
                counts[keyword] = counts.get(keyword, 0) + 1
    keywords = sorted(k for k, count in counts.items() if count <= max_words_per_keyword and k not in names)
    position = {keyword: i for i, keyword in enumerate(keywords)}
    has_keyword = torch.zeros(len(words), len(keywords), dtype=torch.bool)
    for row, word in enumerate(words):
        for keyword in word.keywords:
            if keyword in position:
                has_keyword[row, position[keyword]] = True
    embeddings = encode([word.name for word in words] + keywords)
    is_base = torch.tensor([word.split == "base" for word in words])
    return WordTable(embeddings[: len(words)], embeddings[len(words) :], has_keyword, is_base)
