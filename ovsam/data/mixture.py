"""Several data sets as one: images of each in given shares, with the words of all."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ovsam.data.base import Sample, SegmentationData, pad_objects
from ovsam.data.words import Word
from ovsam.errors import InputError


class SharedWords(Dataset):
    """A data set whose word ids refer to a larger table, padded to `objects` objects. Words of other sets are not
    `known` in its images."""

    def __init__(self, data, words: Sequence[Word], objects: int):
        place = {word.name: i for i, word in enumerate(words)}
        self.data, self.objects = data, objects
        # [own words + 1] -> ids in the table; the last entry is for -1, no name
        self.place = torch.tensor([*(place[word.name] for word in data.words), -1])
        self.nothing = torch.zeros(len(words), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        sample = self.data[index]
        masks, word_ids = pad_objects(sample["masks"], self.place[sample["word_ids"]], self.objects)
        known = self.nothing.scatter(0, self.place[:-1], sample["known"])
        return {"image": sample["image"], "masks": masks, "word_ids": word_ids, "known": known}


def merge_words(*tables: Sequence[Word]) -> list[Word]:
    """Return the words of all tables in order of first occurrence. A word of several tables has the keywords of all,
    and is held out only if all of them hold it out."""
    merged: dict[str, Word] = {}
    for word in (word for table in tables for word in table):
        twin = merged.get(word.name, word)
        keywords = tuple(dict.fromkeys((*twin.keywords, *word.keywords)))
        split = "novel" if twin.split == word.split == "novel" else "base"
        merged[word.name] = Word(twin.char, word.name, keywords, split)
    return list(merged.values())


class Mixture(SegmentationData):
    """Samples of several data sets. The set and the index of sample i depend only on the seed and i; each set is
    traversed in a random order, which repeats when it is exhausted.

    Args:
        sets: data sets with the same `size`.
        shares: shares of the samples; they need not add up to 1.
        seed: seed of the order.
        length: number of samples; by default the sum over the sets.

    Raises:
        InputError: there are no sets, sizes differ, or a share is not positive.
    """

    format = "mixture"

    def __init__(
        self, sets: Sequence[SegmentationData], shares: Sequence[float], seed: int = 0, length: int | None = None
    ):
        if not sets or len(sets) != len(shares):
            raise InputError(f"A mixture needs data sets and a share for each; it got {len(sets)} and {len(shares)}.")
        if not min(shares) > 0:
            raise InputError(f"A data set has the share {min(shares)} of a mixture; shares must be greater than 0.")
        if len({data.size for data in sets}) > 1:
            sizes = ", ".join(f"{data.format} {data.size}" for data in sets)
            raise InputError(f"The data sets of a mixture must have one size; these have {sizes}.")
        self.words = merge_words(*(data.words for data in sets))
        self.size, self.max_objects = sets[0].size, max(data.max_objects for data in sets)
        self.sets = [SharedWords(data, self.words, self.max_objects) for data in sets]
        self.pictures = sum(data.pictures for data in sets)
        counts = [data.instances for data in sets]
        self.instances = None if None in counts else sum(counts)
        self.skipped = [sentence for data in sets for sentence in data.skipped]
        parts = np.asarray(shares) / np.sum(shares)
        self.notes = [f"{part:.0%} of the samples: {data.describe()}" for part, data in zip(parts, sets, strict=True)]

        rng = np.random.default_rng(seed)
        self.orders = [rng.permutation(len(data)) for data in sets]
        length = sum(map(len, sets)) if length is None else length
        self.which = np.random.default_rng((seed, 1)).choice(len(sets), length, p=parts).astype(np.int16)
        self.rank = np.zeros(length, dtype=np.int64)  # number of earlier samples of the same set
        for number in range(len(sets)):
            mine = self.which == number
            self.rank[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> Sample:
        number, rank = self.which[index], self.rank[index]
        order = self.orders[number]
        return self.sets[number][int(order[rank % len(order)])]

    def describe(self) -> str:
        instances = "" if self.instances is None else f", {self.instances:,} instances"
        words = f"{self.pictures:,} images{instances} of {len(self.words):,} words"
        return "\n  ".join([f"a mixture: {words}", *(note.replace("\n", "\n  ") for note in self.notes)])
