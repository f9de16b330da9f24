"""What a data set is to a training stage, whatever its format.

A sample is a dict of tensors whose shapes are the same for every sample, so that the default collate stacks them:

- `image` uint8 [3, S, S]: the picture squashed to the square, as the model's processor does it;
- `masks` bool [O, S, S]: what was outlined, padded with False to O = max_objects; masks may overlap;
- `word_ids` int64 [O]: each mask's place in the data set's `words`; -1 for padding and for a mask without a name;
- `known` bool [W]: the words of which every instance in this picture is among `masks`. What is not one of a word's
  masks may be trained as not being that word only where the word is known.

A mask of an image-classification set covers its whole picture: it has a name and no outline. `outlined` tells those
from the others, and losses of masks and boxes leave them out.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ovsam.data.words import Word
from ovsam.errors import InputError

Sample = dict[str, Tensor]
LISTED = 10  # left-out pictures that `describe` names


class SegmentationData(Dataset):
    """Pictures with named masks. `data[i]` depends on nothing but the arguments it was made with and i.

    Attributes:
        format: its reader's name, as recipes call it.
        words: the vocabulary; `word_ids` and `known` count in it.
        pictures, instances: how many there are; instances is None where that is known only when they are drawn.
        skipped: a sentence for each picture that is left out.
        notes: sentences about annotations that are left out or read in a way worth knowing.
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
        """Lines for a person: how much there is, and what is left out and why."""
        instances = "instances as they are drawn" if self.instances is None else f"{self.instances:,} instances"
        novel = sum(word.split == "novel" for word in self.words)
        words = f" of {len(self.words):,} words" if self.words else " without names"
        held_out = f" ({novel:,} held out)" if novel else ""
        lines = [f"{self.format}: {self.pictures:,} pictures, {instances}{words}{held_out}", *self.notes]
        if self.skipped:
            lines.append(f"Pictures left out: {len(self.skipped):,}")
            lines += [f"  {sentence}" for sentence in self.skipped[:LISTED]]
        if len(self.skipped) > LISTED:
            lines.append(f"  and {len(self.skipped) - LISTED:,} more")
        return "\n  ".join(lines)


def outlined(masks: Tensor) -> Tensor:
    """masks [..., S, S] -> [...] bool: those that outline something, neither empty nor the whole picture."""
    return masks.flatten(-2).any(-1) & ~masks.flatten(-2).all(-1)


def make_words(
    names: Sequence[str], keywords: Sequence[Sequence[str]] | None = None, novel: Collection[str] = ()
) -> tuple[list[Word], list[int]]:
    """The words of a list of names, and each name's place among them: names that are equal are one word.

    Raises InputError if a word held out as `novel` is not among the names.
    """
    merged: dict[str, dict[str, None]] = {}  # name -> its keywords, in order
    for name, extra in zip(names, keywords or [()] * len(names), strict=True):
        merged.setdefault(name, {}).update((word, None) for word in extra if word != name)
    if missing := [name for name in novel if name not in merged]:
        raise InputError(f"novel names {missing[0]!r}, which is no word of this data set.")
    words = [
        Word(char="", name=name, keywords=tuple(extra), split="novel" if name in novel else "base")
        for name, extra in merged.items()
    ]
    place = {name: i for i, name in enumerate(merged)}
    return words, [place[name] for name in names]


def pad_objects(masks: Tensor, word_ids: Tensor, objects: int) -> tuple[Tensor, Tensor]:
    """masks [n, S, S] and word_ids [n] with room for `objects`, n at most that."""
    missing = objects - len(masks)
    return (
        torch.cat([masks, masks.new_zeros(missing, *masks.shape[1:])]),
        torch.cat([word_ids, word_ids.new_full((missing,), -1)]),
    )
