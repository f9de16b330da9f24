"""One folder for each class, the layout of ImageNet: images have a class name and no outlines."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from ovsam.data.base import make_words
from ovsam.data.pictures import PackedList, PictureData, Record, check_pictures
from ovsam.errors import InputError
from ovsam.ops.files import only_files
from ovsam.processing.vocabulary import Vocabulary

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
WORDNET_ID = re.compile(r"n\d{8}")


class Folders(PictureData):
    """Image-classification data: folder/CLASS/image.jpg. The only mask of a sample is the whole image (see `outlined`).

    A folder with a WordNet id (n01440764) is named as in the vocabulary "imagenet21k", with the other lemmas as
    keywords; other folder names are the class names, with underscores read as spaces.

    Args:
        folder: parent of one folder for each class, such as imagenet/train.
        names: {folder name: class name}, for folders with other class names.
        exhaustive: whether an image shows its class and none of the others, as in classification; if False, only its
            own class is `known`, and there are no negatives.
        check: whether to read the header of every image beforehand.
        options: options of PictureData.

    Raises:
        InputError: the folder is missing or has no folders with images, a WordNet id or a folder of `names` is unknown.
    """

    format = "folders"

    def __init__(
        self,
        folder: str | Path,
        names: Mapping[str, str] | None = None,
        exhaustive: bool = True,
        check: bool = True,
        **options,
    ):
        names, folder = names or {}, Path(folder)
        if not os.path.isdir(folder):
            raise InputError(f"There is no folder {folder}; it must have one folder for each class.")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if missing := names.keys() - set(classes):
            raise InputError(f"`names` has a folder {min(missing)!r} that is missing in {folder}.")
        files = {name: _pictures(Path(folder, name)) for name in classes}
        if not any(files.values()):
            inner = next((path for path in sorted(Path(folder).glob("*/*")) if path.is_dir()), None)
            hint = f" Did you mean {inner.parent}?" if inner else ""
            raise InputError(f"No folder of {folder} has images in it; it must have one folder for each class.{hint}")
        classes = [name for name in classes if files[name]]
        named = [(names[name], ()) if name in names else _word(name) for name in classes]
        words, places = make_words([name for name, _ in named], [keywords for _, keywords in named])
        super().__init__(words, **options)
        if empty := len(files) - len(classes):
            self.notes.append(f"Folders without images, skipped: {empty:,}.")
        paths = [str(Path(folder, name, file)) for name in classes for file in files[name]]
        word_ids = np.repeat(places, [len(files[name]) for name in classes])
        if check:
            found = check_pictures(paths, len(paths))
            self.skipped += [header for header in found if isinstance(header, str)]
            readable = [i for i, header in enumerate(found) if not isinstance(header, str)]
            if not readable:
                raise InputError(
                    f"None of the {len(paths):,} images of {folder} can be read; the first: {self.skipped[0]}"
                )
            paths, word_ids = [paths[i] for i in readable], word_ids[readable]
        self.paths, self.word_ids, self.exhaustive = PackedList(paths), word_ids, exhaustive
        self.pictures = self.instances = len(paths)

    def record(self, number: int) -> Record:
        word = int(self.word_ids[number])
        return Record(self.paths[number], [None], [word], known=None if self.exhaustive else [word])


def _pictures(folder: Path) -> list[str]:
    named = sorted(Path(entry) for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
    return [path.name for path in only_files(named, folder)]


def _word(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the class name of a folder, and its keywords."""
    if not WORDNET_ID.fullmatch(name):
        return name.replace("_", " ").strip(), ()
    if name not in wordnet():
        raise InputError(
            f"The folder {name} looks like a WordNet id, but is not a class of ImageNet; give it a name in `names`."
        )
    return wordnet()[name]


@cache
def wordnet() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return {WordNet id: (class name, other lemmas)} of the 21,841 classes of ImageNet-21k, and of those that only
    other releases have (n04399382, teddy)."""
    from timm.data import ImageNetInfo

    found = {}
    for release in (
        "imagenet1k",
        "imagenet21k",
        "imagenet22k",
    ):  # "22k" is the complete list of ImageNet-21k, and takes precedence
        info = ImageNetInfo(release)
        lemmas = [description.split(", ") for description in info.label_descriptions()]
        called = Vocabulary("imagenet21k").labels if release == "imagenet22k" else [first for first, *_ in lemmas]
        for key, name, own in zip(info.label_names(), called, lemmas, strict=True):
            found[key] = name, tuple(lemma for lemma in own if lemma != name)
    return found
