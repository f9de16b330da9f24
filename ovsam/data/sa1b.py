"""A folder of SA-1B: sa_1.jpg beside sa_1.json, whose masks have no names (Kirillov et al. 2023)."""

import os
from pathlib import Path
from typing import Any, TypedDict

from tqdm.auto import tqdm

from ovsam.data.pictures import PackedList, PictureData, Record, check_pictures
from ovsam.errors import InputError
from ovsam.ops.schema import Pixels, checked, place, read_json


class SizedImage(TypedDict):
    width: Pixels
    height: Pixels


class SizedRunLengths(TypedDict):
    size: list[int]
    counts: str | list[int]


class NamelessMask(TypedDict):
    segmentation: SizedRunLengths


class Sa1bFile(TypedDict):
    image: SizedImage
    annotations: list[NamelessMask]


class Sa1b(PictureData):
    """Images of an extracted SA-1B archive, or of several in folders of one folder. There are no class names.

    Every JSON file is read once when training starts, to count masks and find damaged files, and again with its image.

    Args:
        folder: folder of the files.
        check: whether to read the header of every image beforehand.
        options: options of PictureData.

    Raises:
        InputError: the folder is missing or has no files of SA-1B or no masks, or a JSON file has another format or
            masks of another size than its image.
    """

    format = "sa1b"

    def __init__(self, folder: str | Path, check: bool = True, **options):
        super().__init__([], **options)
        if not os.path.isdir(folder):
            raise InputError(f"There is no folder {folder}; it must have sa_*.jpg and sa_*.json.")
        paths = sorted(Path(folder).rglob("sa_*.json"))
        if not paths:
            raise InputError(f"There is no sa_*.json in {folder}; extract an archive of SA-1B there.")
        masks: dict[Path, int] = {}
        sizes: dict[Path, tuple[int, int]] = {}
        for path in tqdm(paths, desc="reading SA-1B", unit="", disable=len(paths) < 1000):
            try:
                content = read_json(path, title="JSON file of SA-1B")
            except InputError as error:  # an archive that was not extracted completely
                self.skipped.append(str(error))
                continue
            sizes[path], outlines = _parse(path, content)
            masks[path] = len(outlines)
        if not any(masks.values()):
            raise InputError(
                f"The {len(paths):,} JSON files of {folder} have no masks; extract an archive of SA-1B there."
            )
        readable = [path for path in masks if masks[path]]
        if check:
            found = check_pictures((str(_picture(path)) for path in readable), len(readable))
            pairs = zip(readable, found, strict=True)
            readable = [path for path, header in pairs if self._accept(str(_picture(path)), header, sizes[path])]
        if not readable:
            raise InputError(f"None of the {len(paths):,} images of {folder} can be read; the first: {self.skipped[0]}")
        self.records = PackedList(map(str, readable))
        self.pictures, self.instances = len(readable), sum(masks[path] for path in readable)

    def record(self, number: int) -> Record:
        path = Path(self.records[number])
        size, outlines = _parse(path, read_json(path))
        return Record(str(_picture(path)), outlines, [-1] * len(outlines), size)


def _picture(path: Path) -> Path:
    return path.with_suffix(".jpg")


def _parse(path: Path, content: Any) -> tuple[tuple[int, int], list[Any]]:
    """Return the width and height of the image, and its outlines. Raises InputError for another format or size."""
    if not isinstance(content, dict) or not content.keys() >= {"image", "annotations"}:
        raise InputError(f"{path} is not a JSON file of SA-1B: it must have image and annotations.")
    content = checked(content, Sa1bFile, str(path))
    width, height = content["image"]["width"], content["image"]["height"]
    outlines = [annotation["segmentation"] for annotation in content["annotations"]]
    for number, outline in enumerate(outlines):
        if outline["size"] != [height, width]:
            where = place(f"annotations[{number}].segmentation.size", path)
            raise InputError(f"{where} is {outline['size']}; it must be that of the image, {[height, width]}.")
    return (width, height), outlines
