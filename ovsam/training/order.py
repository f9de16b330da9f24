"""Order of the training samples: a function of the seed, so that runs can be resumed, with an optional share of earlier
scenes (rehearsal), so that earlier class names are not forgotten."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ovsam.data import READERS, Sample, SegmentationData, SharedWords, merge_words, open_data, reader_keys
from ovsam.data.words import Word


def read_data(section: dict[str, Any], seed: int, length: int, size: int | None = None) -> SegmentationData:
    """Open the data set of a recipe's [data] table, with defaults for the keys that all formats have.

    Args:
        section: `format` and the keys of its reader; see ovsam.data.
        seed, length: seed and number of drawn scenes.
        size: side of the images in pixels.
    """
    kind = section.get("format", "emojiscenes")
    common = {"seed": seed, "length": length, "size": None if "canvas" in section else size}
    known = reader_keys(kind) if isinstance(kind, str) and kind in READERS else {}
    return open_data({k: v for k, v in common.items() if k in known and v is not None} | section)


def collate(samples: list[Sample]) -> Sample:
    """Stack samples and remove padding that none of them needs, since masks are most of the data of a step."""
    batch = default_collate(samples)
    used = (batch["masks"].flatten(2).any(-1) | (batch["word_ids"] >= 0)).any(0).nonzero()  # padding comes last
    most = int(used.max()) + 1 if len(used) else 1
    return batch | {"masks": batch["masks"][:, :most], "word_ids": batch["word_ids"][:, :most]}


class TrainingOrder(Dataset):
    """`length` samples: passes over the images, each in a new random order; every `1 / share`-th sample is taken from
    `rehearsal` instead. Sample i depends only on i and the seed.

    A pass has `pictures` samples if the data have several samples of each image, cropped differently: sample j shows
    image j modulo `pictures`, and every pass takes the next ones.
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
    """Return both data sets with the words of both.

    The words of the scenes are unknown in the images of `data`. In a scene all pictogram words are known.
    """
    words = merge_words(data.words, scenes.words)
    objects = max(data.max_objects, scenes.max_objects)
    return SharedWords(data, words, objects), SharedWords(scenes, words, objects), words
