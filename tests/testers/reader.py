"""Tests of every reader of a data set: samples of the described shapes, the same ones again, also through workers, and
errors about missing options."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from ovsam.data import open_data, reader_keys
from ovsam.errors import InputError

SIZE, OBJECTS = 64, 4


class ReaderTester:
    config: dict  # the table [data] of a recipe, but for size and max_objects
    needs: tuple[str, ...] = ()  # the options without a default
    pictures: int
    instances: int | None  # None where they are not counted before they are drawn
    words: list[str] | None = None  # None: not compared

    @classmethod
    def open(cls, **more):
        return open_data(cls.config | {"size": SIZE, "max_objects": OBJECTS} | more)

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls):
        return cls.open()

    def test_counts_and_words(self, data):
        assert (data.pictures, data.instances, data.skipped) == (self.pictures, self.instances, [])
        assert self.words is None or [word.name for word in data.words] == self.words
        counted = "instances as" if self.instances is None else f"{self.instances} instances"
        assert f"{self.pictures} images, {counted}" in data.describe()

    def test_samples(self, data):
        shapes = {
            "image": (torch.uint8, (3, SIZE, SIZE)),
            "masks": (torch.bool, (OBJECTS, SIZE, SIZE)),
            "word_ids": (torch.int64, (OBJECTS,)),
            "known": (torch.bool, (len(data.words),)),
        }
        for index in range(min(len(data), 3)):
            sample = data[index]
            assert {name: (value.dtype, tuple(value.shape)) for name, value in sample.items()} == shapes
            assert sample["word_ids"].min() >= -1 and sample["word_ids"].max() < max(len(data.words), 1)
            assert sample["masks"].any()

    def test_samples_are_the_same_again_and_in_workers(self, data):
        """A worker of a data loader gets a pickled copy."""
        again, copied = self.open(), pickle.loads(pickle.dumps(data))
        batch = next(iter(DataLoader(data, batch_size=2)))
        for name, value in data[1].items():
            for other in (again[1][name], copied[1][name], batch[name][1]):
                assert torch.equal(value, other), name

    def test_options(self):
        kind = self.config.get("format", "emojiscenes")
        assert [key for key, needed in reader_keys(kind).items() if needed] == list(self.needs)
        with pytest.raises(InputError, match=f"has 'sizes', which {kind} does not take; it takes"):
            self.open(sizes=3)
        for needed in self.needs:
            some = {key: value for key, value in self.config.items() if key != needed}
            with pytest.raises(InputError, match=f"lacks {needed}, which the format {kind} needs"):
                open_data(some)
