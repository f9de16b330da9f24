"""The interface between data sets and training stages.

A sample is a dict of tensors whose shapes are the same for every sample, so that the default collate stacks them:

- `image` uint8 [3, S, S]: the image resized to the square, as the model's processor does;
- `masks` bool [O, S, S]: the annotated masks, padded with False to O = max_objects; masks may overlap;
- `word_ids` int64 [O]: index of the class name of each mask in the data set's `words`; -1 for padding and for a mask
  without a name;
- `known` bool [W]: the class names whose instances in this image are all among `masks`. Other regions are negatives of
  a class name only if it is known.

A mask of an image-classification set covers the whole image: it has a class name but no outline. `outlined` excludes
such masks, and losses of masks and boxes leave them out.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ovsam.data.words import Word
from ovsam.errors import InputError

Sample = dict[str, Tensor]
LISTED = 10  # number of skipped images that `describe` lists


class SegmentationData(Dataset):
    """Images with named masks. `data[i]` depends only on the constructor arguments and i.

    Attributes:
        format: name of its reader, as in recipes.
        words: the vocabulary; `word_ids` and `known` are indices into it.
        images, instances: number of images and of instances; instances is None if images are drawn.
        skipped: a sentence for each skipped image.
        notes: sentences about annotations that are skipped or converted.
        size, max_objects: S and O of the samples.
    """

    format: str
    words: list[Word]
    pictures: int
    instances: int | None
    skipped: list[str]
    notes: list[str]
    size: int
    max_objects: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def describe(self) -> str:
        """Return lines of text: the size of the data set, and the skipped images with reasons."""
        instances = "instances as they are drawn" if self.instances is None else f"{self.instances:,} instances"
        novel = sum(word.split == "novel" for word in self.words)
        words = f" of {len(self.words):,} words" if self.words else " without names"
        held_out = f" ({novel:,} held out)" if novel else ""
        lines = [f"{self.format}: {self.pictures:,} images, {instances}{words}{held_out}", *self.notes]
        if self.skipped:
            lines.append(f"Images skipped: {len(self.skipped):,}")
            lines += [f"  {sentence}" for sentence in self.skipped[:LISTED]]
        if len(self.skipped) > LISTED:
            lines.append(f"  and {len(self.skipped) - LISTED:,} more")
        return "\n  ".join(lines)


def outlined(masks: Tensor) -> Tensor:
    """masks [..., S, S] -> [...] bool: whether each is an outline, neither empty nor the whole image."""
    return masks.flatten(-2).any(-1) & ~masks.flatten(-2).all(-1)


def make_words(
    names: Sequence[str], keywords: Sequence[Sequence[str]] | None = None, novel: Collection[str] = ()
) -> tuple[list[Word], list[int]]:
    """Return the words of a list of names, and the index of each name among them: equal names are one word.

    Raises InputError if a `novel` word, which is held out, is not among the names.
    """
    merged: dict[str, dict[str, None]] = {}  # name -> its keywords, in order
    for name, extra in zip(names, keywords or [()] * len(names), strict=True):
        merged.setdefault(name, {}).update((word, None) for word in extra if word != name)
    if missing := [name for name in novel if name not in merged]:
        raise InputError(f"novel has {missing[0]!r}, which is not a class name of this data set.")
    words = [
        Word(char="", name=name, keywords=tuple(extra), split="novel" if name in novel else "base")
        for name, extra in merged.items()
    ]
    place = {name: i for i, name in enumerate(merged)}
    return words, [place[name] for name in names]


def pad_objects(masks: Tensor, word_ids: Tensor, objects: int) -> tuple[Tensor, Tensor]:
    """Pad masks [n, S, S] and word_ids [n] to `objects`, which is at least n."""
    missing = objects - len(masks)
    return (
        torch.cat([masks, masks.new_zeros(missing, *masks.shape[1:])]),
        torch.cat([word_ids, word_ids.new_full((missing,), -1)]),
    )
