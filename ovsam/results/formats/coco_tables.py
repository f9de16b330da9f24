"""The tables of COCO and LVIS: images, categories and annotations of a JSON file, for training and evaluation."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ovsam.errors import InputError
from ovsam.ops.schema import read_json
from ovsam.results.formats.coco import CocoAnnotation, CocoCategory, CocoImage, Id

QUICK = 20 << 20  # bytes; a JSON file of this size is read within half a second


class PartialImage(CocoImage, total=False):
    """An image with the keys of LVIS, which restrict its annotation to some categories."""

    coco_url: str | None
    neg_category_ids: list[Id]
    not_exhaustive_category_ids: list[Id]


class CocoFile(TypedDict):
    images: list[PartialImage]
    categories: list[CocoCategory]
    annotations: list[CocoAnnotation]


def read_tables(path: Path, schema: Any, formats: Sequence[str], title: str) -> Any:
    """Return the content of a JSON file with the tables of COCO and LVIS as `schema`.

    Raises:
        InputError: the file is missing, not JSON, has another format, which the message names, or an invalid value.
    """
    content = None
    try:
        content = read_json(path, schema, "JSON file of annotations")
    except InputError:
        with contextlib.suppress(InputError):
            if guess_format(other := read_json(path)) not in formats:
                content = other
        if content is None:
            raise
    if guess_format(content) not in formats:
        raise other_format(path, content, title)
    return content


def other_format(path: Path, content: Any, title: str) -> InputError:
    """The error for a file that is not the wanted one of COCO and LVIS; it states the format that it looks like."""
    found = guess_format(content)
    looks = f"looks like {found}" if found else "has an unknown format"
    remedy = '; read it with format = "lvis"' if found == "LVIS" else ""
    remedy = '; read it with format = "coco"' if found == "COCO" else remedy
    return InputError(f"{path} must be a JSON file of {title} (images, annotations, categories); it {looks}{remedy}.")


def guess_format(content: Any) -> str:
    """Return the name of a format of annotations, "" for an unknown one."""
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if {"image_id", "score"} <= first.keys():
            return "COCO's results, which have no images and no category names"
        if {"data", "annotations"} <= first.keys():
            return "an export of Label Studio (which can also export COCO)"
        if {"image", "annotations"} <= first.keys():
            return "Create ML's format"
        return ""
    if not isinstance(content, dict):
        return ""
    if all(isinstance(content.get(table), list) for table in ("images", "annotations", "categories")):
        annotations, images = content["annotations"], content["images"]
        if annotations and isinstance(annotations[0], dict) and "segments_info" in annotations[0]:
            return "COCO's panoptic format"
        if images and isinstance(images[0], dict) and "neg_category_ids" in images[0]:
            return "LVIS"
        return "COCO"
    for keys, name in (
        (
            ("shapes", "imagePath"),
            "LabelMe's format, one file for each image (`ovsam convert-labels` converts it to COCO)",
        ),
        (("_via_img_metadata",), "a project of the VGG Image Annotator (which can export COCO)"),
        (("image", "annotations"), 'an image of SA-1B; read its folder with format = "sa1b"'),
        (("features",), "GeoJSON"),
        (("images", "annotations"), "COCO's captions, or COCO without its categories"),
    ):
        if all(key in content for key in keys):
            return name
    return ""


def check_tables(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> None:
    """Find mistakes of a data set within a second and without torch: the tables of a small file, and whether any of its
    images is in the folder `images`, by default that of the file.

    Raises:
        InputError: as `read_tables`, no annotations or categories, or none of the images exists.
    """
    path = Path(path)
    if os.path.isfile(path) and os.path.getsize(path) > QUICK:
        return
    content = read_tables(path, CocoFile, ("COCO", "LVIS"), "COCO's instances")
    if not content["annotations"] or not content["categories"]:
        raise InputError(f"{path} has no annotations or no categories; it must have both.")
    folder = str(path.parent if images is None else images)
    if not any(os.path.isfile(file) for image in content["images"] for file in _places(folder, image)):
        count = len(content["images"])
        raise InputError(f"None of the {count:,} images of {path} is in {folder}; --images must be their folder.")


def _places(folder: str, image: PartialImage) -> Iterator[str]:
    """The paths at which the readers of COCO and LVIS, for training or evaluation, look for an image."""
    for address in (image.get("file_name"), image.get("coco_url")):
        if address:
            parts = address.replace("\\", "/").split("/")
            yield "/".join(parts)
            yield os.path.join(folder, *parts)
            yield os.path.join(folder, "images", *parts)
            yield os.path.join(folder, *parts[-2:])
            yield os.path.join(folder, parts[-1])
