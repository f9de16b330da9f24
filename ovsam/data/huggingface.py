"""Data sets of Hugging Face `datasets`, from the Hub or from disk, by their usual columns.

Rows are read in their stored form (arrow), and images are decoded here, as in the other readers.
"""

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ovsam.data.base import make_words
from ovsam.data.pictures import Header, PictureData, PictureSource, Record, check_pictures, read_header
from ovsam.errors import InputError
from ovsam.ops.outlines import check_outline, from_mask, is_outline
from ovsam.processing.images import open_file

IMAGES = ("image", "pixel_values", "img")
CATEGORIES = (
    "category",
    "categories",
    "category_id",
    "label",
    "labels",
)  # columns of `objects`, one value for each object
OUTLINES = ("segmentation", "segmentations", "mask", "masks")  # likewise: as in COCO, or an image of the mask
MAPS = ("annotation", "label", "mask", "segmentation_mask")  # an image whose pixel values are classes
LABELS = ("label", "labels", "fine_label")  # a class of the whole image


class HuggingFace(PictureData):
    """A data set with an `image` column, and one of

    - `objects`: for each object a `category` (a class, or its name) and a `segmentation` (COCO's polygons or run
      lengths) or `mask` (an image, not 0 where the object is). Boxes alone are not supported.
    - `annotation` or `label`, an image whose pixel values are classes: each class in it is one object. `names` is
      required; values with an empty name or without one are background.
    - `label`, a class: one class name for the whole image, and no outline (see `outlined`).

    The columns `width` and `height`, if they exist, are the image size that outlines refer to.

    Args:
        dataset: name on the Hub, folder (of parquet files, or of `save_to_disk`), or an opened `datasets.Dataset`.
        split: name of the split, such as "train".
        name: name of the configuration, if there are several.
        revision: revision of the Hub's repository.
        names: class names, in order, if the data set has none of its own.
        novel: held-out class names: their objects are skipped, and they are never `known`.
        keep_empty: whether to use images without objects.
        check: whether to check every image and outline beforehand.
        cache_dir: cache folder of `datasets`.
        options: options of PictureData.

    Raises:
        InputError: the data set is missing, has other columns or classes without names, an outline does not fit its
            image, or there is no instance or no readable image.
    """

    format = "huggingface"

    def __init__(
        self,
        dataset: Any,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        names: Sequence[str] | None = None,
        novel: Collection[str] = (),
        keep_empty: bool = False,
        check: bool = True,
        cache_dir: str | None = None,
        **options,
    ):
        loaded = _load(dataset, split, name, revision, cache_dir) if isinstance(dataset, str | Path) else dataset
        self.rows = loaded.with_format("arrow")
        self._find_columns(loaded.features)
        class_names = self._class_names(loaded.features, names)
        classes = [key for key, value in class_names.items() if value or self.kind != "map"]
        for key in classes:
            if not isinstance(class_names[key], str) or not class_names[key].strip():
                raise InputError(f"The class {key!r} of {dataset} has no name; every class needs one.")
        words, places = make_words([class_names[key].strip() for key in classes], novel=novel)
        super().__init__(words, **options)
        self.word_ids = dict(zip(classes, places, strict=True))
        self.novel = [i for i, word in enumerate(words) if word.split == "novel"]

        headers: list[Header | str | None] = [None] * len(self.rows)
        if check:
            pictures = (_source(row[self.image]) for row in self._raw(self.image))
            headers = check_pictures(pictures, len(self.rows))
        counts = self._count(headers, keep_empty)
        if not any(counts.values()):
            first = f" The first skipped image: {self.skipped[0]}" if self.skipped else ""
            raise InputError(
                f"{dataset} has no instance with an outline to train on. {' '.join(self.notes)}{first}".rstrip()
            )
        self.numbers = np.array(list(counts))
        self.pictures = len(counts)
        self.instances = None if self.kind == "map" else sum(counts.values())

    def record(self, number: int) -> Record:
        row = self.rows[int(self.numbers[number])].to_pylist()[0]
        outlines, word_ids, unknown = self._objects(row)
        picture = _source(row[self.image])
        return Record(picture, [_decode(o) for o in outlines], word_ids, _size(row), unknown=unknown)

    def _find_columns(self, features: Any) -> None:
        """Find the columns of the data set, which determine its `kind`."""
        import datasets

        def first(names: Sequence[str], kind: Any) -> str:
            return next((n for n in names if isinstance(features.get(n), kind)), "")

        self.image, self.category, self.outline = first(IMAGES, datasets.Image), "", ""
        found = f"it has {', '.join(features)}"
        if not self.image:
            raise InputError(f"The data set has no column of images called {' or '.join(IMAGES)}; {found}.")
        if "objects" in features:
            self.kind, self.column = "objects", "objects"
            fields = _fields(features["objects"])
            self.category = next((n for n in CATEGORIES if n in fields), "")
            self.outline = next((n for n in OUTLINES if n in fields), "")
            if not self.category or not self.outline:
                what = "outlines (segmentation or mask)" if self.category else "category"
                raise InputError(f"The objects of the data set have no {what}; they have {', '.join(fields)}.")
        elif column := first(MAPS, datasets.Image):
            self.kind, self.column = "map", column
        elif column := first(LABELS, datasets.ClassLabel):
            self.kind, self.column = "label", column
        else:
            raise InputError(f"The data set must have objects, an image of classes, or a class; {found}.")

    def _class_names(self, features: Any, names: Sequence[str] | None) -> dict[Any, str]:
        """Return {class as in the rows: class name}."""
        if names is not None:
            return dict(enumerate(names))
        feature = features[self.column]
        if self.kind == "objects":
            feature = _inner(_fields(feature)[self.category])
        if hasattr(feature, "names"):
            return dict(enumerate(feature.names))
        if self.kind == "objects" and feature.dtype in ("string", "large_string"):
            found = (o[self.category] for row in self._raw("objects") for o in _listed(row["objects"]))
            return {value: value for value in dict.fromkeys(found)}
        raise InputError("The classes of the data set are numbers without names; list the names, in order, as `names`.")

    def _count(self, headers: Sequence[Header | str | None], keep_empty: bool) -> dict[int, int]:
        """Return {row: number of objects} of the rows to use; `skipped` and `notes` describe the others."""
        counts: dict[int, int] = {}
        unusable, empty = 0, 0
        columns = [self.column, *(c for c in ("width", "height") if c in self.rows.features)]
        for number, row in enumerate(self._raw(*columns)):
            header = headers[number]
            outlines, _, unknown = ([None], [], []) if self.kind == "map" else self._objects(row)
            unusable += len(set(unknown) - set(self.novel))
            if header is not None and not self._accept(f"row {number}", header, _size(row)):
                continue
            if not outlines and not keep_empty:
                empty += 1
                continue
            if isinstance(header, Header) and self.kind == "objects":
                width, height = _size(row) or header.upright
                for outline in outlines:
                    _check(outline, height, width, number)
            counts[number] = len(outlines)
        if unusable:
            self.notes.append(
                f"Class names of images with objects that are crowds or lack an outline, skipped: {unusable:,}."
            )
        if empty:
            self.notes.append(f"Images without objects, skipped (keep_empty = true keeps them): {empty:,}.")
        return counts

    def _objects(self, row: dict) -> tuple[list[Any], list[int], list[int]]:
        """Return the outlines, the word of each, and the words that are not annotated exhaustively."""
        if self.kind == "map":
            classes = np.asarray(_image(row[self.column]))  # [H, W]
            if classes.ndim != 2:
                raise InputError(f"The column {self.column} has colours; its images must have one channel, the class.")
            pairs = [
                (classes == key, self.word_ids[key]) for key in np.unique(classes).tolist() if key in self.word_ids
            ]
        elif self.kind == "label":
            pairs = [(None, self._word(row[self.column]))]
        else:
            objects = [(o, self._word(o[self.category])) for o in _listed(row["objects"])]
            usable = [not o.get("iscrowd") and _has_outline(o[self.outline]) for o, _ in objects]
            pairs = [(o[self.outline], word) for (o, word), use in zip(objects, usable, strict=True) if use]
            lacking = {word for (_, word), use in zip(objects, usable, strict=True) if not use}
            pairs = [(outline, word) for outline, word in pairs if word not in self.novel]
            return [o for o, _ in pairs], [w for _, w in pairs], sorted(lacking | set(self.novel))
        pairs = [(outline, word) for outline, word in pairs if word not in self.novel]
        return [o for o, _ in pairs], [w for _, w in pairs], self.novel

    def _word(self, value: Any) -> int:
        if value not in self.word_ids:
            raise InputError(f"The data set has an object of the class {value!r}, which has no name.")
        return self.word_ids[value]

    def _raw(self, *columns: str) -> Iterator[dict]:
        """Yield the rows in their stored form, with these columns only."""
        rows = self.rows.select_columns(list(columns))
        quick = len(rows) < 1000
        for table in tqdm(rows.iter(batch_size=100), desc=f"reading {columns[0]}", unit="00 rows", disable=quick):
            yield from table.to_pylist()


def _load(dataset: str | Path, split: str, name: str | None, revision: str | None, cache_dir: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError('format = "huggingface" needs the package datasets: run `pip install datasets`.') from error
    folder = Path(dataset)
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))[split]
        return datasets.load_dataset(str(dataset), name, split=split, revision=revision, cache_dir=cache_dir)
    except (OSError, ValueError, KeyError) as error:  # includes the errors of `datasets`
        raise InputError(f"The data set {dataset} (split {split}) cannot be opened: {error}") from error


def _inner(feature: Any) -> Any:
    """Return the feature of the elements of a list."""
    return _inner(feature.feature) if hasattr(feature, "feature") else feature


def _fields(feature: Any) -> dict[str, Any]:
    """Return the fields of `objects`, a list of objects or a list for each field."""
    inner = _inner(feature)
    return inner if isinstance(inner, dict) else {}


def _listed(objects: Any) -> list[dict]:
    """Return `objects` as a list of objects."""
    if isinstance(objects, dict):
        return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    return objects or []


def _source(image: dict | None) -> PictureSource:
    if not image or not (image["bytes"] or image["path"]):
        return b""
    return image["bytes"] or image["path"]


def _image(stored: dict) -> Image.Image:
    source = _source(stored)
    try:
        image = open_file(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
        return image
    except Exception as error:  # each decoder raises errors of its own
        raise InputError(f"A mask of the data set cannot be read ({error}).") from error


def _is_picture(outline: Any) -> bool:
    return isinstance(outline, dict) and "bytes" in outline


def _has_outline(outline: Any) -> bool:
    return bool(_source(outline)) if _is_picture(outline) else is_outline(outline)


def _decode(outline: Any) -> Any:
    """Convert masks to run lengths; other outlines are unchanged."""
    if _is_picture(outline):
        outline = np.asarray(_image(outline).convert("L")) > 0
    return from_mask(outline) if isinstance(outline, np.ndarray) else outline


def _size(row: dict) -> tuple[int, int] | None:
    size = row.get("width"), row.get("height")
    return None if None in size else size


def _check(outline: Any, height: int, width: int, number: int) -> None:
    try:
        if _is_picture(outline):
            found = read_header(_source(outline))
            outline = {"size": [found.height, found.width], "counts": [height * width]}
        check_outline(outline, height, width)
    except InputError as error:
        raise InputError(f"An object of row {number} {error}.") from error
