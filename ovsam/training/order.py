"""What a run trains on: the recipe's data in an order that is a function of the seed alone, so that a resumed run draws
nothing twice; with old scenes mixed in, so that what was known is not forgotten."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ovsam.data import READERS, Sample, SegmentationData, SharedWords, merge_words, open_data, reader_keys
from ovsam.data.words import Word


def read_data(section: dict[str, Any], seed: int, length: int, size: int | None = None) -> SegmentationData:
    """The data set of a recipe's [data] table, which need not say what is the same for all formats.

    Args:
        section: `format` and its reader's own keys; see ovsam.data.
        seed, length: of what is drawn.
        size: side of the pictures in pixels.
    """
    kind = section.get("format", "emojiscenes")
    common = {"seed": seed, "length": length, "size": None if "canvas" in section else size}
    known = reader_keys(kind) if kind in READERS else {}
    return open_data({k: v for k, v in common.items() if k in known and v is not None} | section)


def collate(samples: list[Sample]) -> Sample:
    """Samples stacked, without the padding that none of them needs: masks are most of what a step looks at."""
    batch = default_collate(samples)
    used = (batch["masks"].flatten(2).any(-1) | (batch["word_ids"] >= 0)).any(0).nonzero()  # padding comes last
    most = int(used.max()) + 1 if len(used) else 1
    return batch | {"masks": batch["masks"][:, :most], "word_ids": batch["word_ids"][:, :most]}


class TrainingOrder(Dataset):
    """`length` samples: pass after pass over the pictures, each in a new random order, every `1 / share`-th sample
    taken from `rehearsal` instead. Sample i depends on i and the seed alone.

    `pictures` of the data make a pass, where it has several samples of each, differently cropped: sample j shows
    picture j modulo `pictures`, and every pass takes the next ones.
    """

    def __init__(
        self, data: Dataset, length: int, seed: int, pictures: int | None = None, rehearsal=None, share: float = 0.0
    ):
        self.data, self.length, self.seed = data, length, seed
        self.pictures = pictures if pictures and len(data) % pictures == 0 else len(data)
        self.rehearsal, self.share = rehearsal, share if rehearsal is not None else 0.0
        self.pass_order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rehearsed = int(index * self.share)
        if int((index + 1) * self.share) > rehearsed:
            return self.rehearsal[rehearsed]
        number, place = divmod(index - rehearsed, self.pictures)
        if self.pass_order[0] != number:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * number)
            self.pass_order = number, torch.randperm(self.pictures, generator=generator)
        draw = number % (len(self.data) // self.pictures)
        return self.data[draw * self.pictures + int(self.pass_order[1][place])]


def mix_rehearsal(data: SegmentationData, scenes: SegmentationData) -> tuple[SharedWords, SharedWords, list[Word]]:
    """Both data sets over the words of both.

    A picture of `data` says nothing about words that only the scenes have. A scene is known to show none of the
    pictogram words that it is not annotated with.
    """
    words = merge_words(data.words, scenes.words)
    objects = max(data.max_objects, scenes.max_objects)
    return SharedWords(data, words, objects), SharedWords(scenes, words, objects), words
