"""COCO instances: one JSON file; masks as compressed run lengths, boxes as x, y, width, height, iscrowd always 0."""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ovsam.errors import InputError, one_line
from ovsam.ops import outlines
from ovsam.ops.files import write_whole
from ovsam.ops.schema import Pixels, Share, checked, place, read_json
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, upright_size
from ovsam.results.instance import Instance

logger = logging.getLogger(__name__)

Id = int | str | float  # some tools write 1.0


class _Identified(TypedDict):
    id: Id


class CocoImage(_Identified, total=False):
    file_name: str | None
    width: Pixels | None
    height: Pixels | None


class CocoCategory(_Identified):
    name: str


class _OfImage(TypedDict):
    image_id: Id
    category_id: Id


class CocoAnnotation(_OfImage, total=False):
    """An instance; an outline is checked against the size of its image, by `ovsam.ops.outlines`."""

    id: Id | None
    segmentation: outlines.Segmentation | None
    iscrowd: bool | int | None


class LabelAnnotation(CocoAnnotation, total=False):
    """An instance with what `to_coco` adds."""

    score: Share | None
    mask_score: Share | None
    prompt: Any
    source: str | None
    topk: list[tuple[str, float]] | None
    objectness: Share | None


class LabelFile(TypedDict):
    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[LabelAnnotation]
    info: NotRequired[Any]


EXTRAS = ("score", "mask_score", "prompt", "source", "topk", "objectness")  # keys of an annotation beyond COCO's own


def to_coco(results: Iterable[Labelled], first_image_id: int = 1, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return images as one COCO data set: boxes are x, y, width, height, masks compressed RLE, iscrowd always 0.

    Each annotation also has `label`, `score`, `mask_score`, `prompt`, `source`, `topk` and `objectness`. Categories are
    numbered from 1: first `labels` in order (pass the vocabulary to have the same numbers in every file), then other
    labels in order of appearance. Images without a file name are called image_000001.jpg and on.
    """
    results = list(results)
    numbers, images, annotations = Numbers(labels), [], []
    for image_id, result in enumerate(results, start=first_image_id):
        images.append(_image(result, image_id))
        for instance in result:
            annotations.append(_annotation(instance, len(annotations) + 1, image_id, numbers.of(instance.label) + 1))
    return {
        "info": {"model": ", ".join(sorted({result.model for result in results}))},
        "images": images,
        "categories": _categories(numbers),
        "annotations": annotations,
    }


def write_coco(results: Iterable[Labelled], path: str | os.PathLike[str], labels: Sequence[str] = ()) -> None:
    """Write images to one COCO JSON file with the content of `to_coco`, in the memory of one image.

    Raises InputError if its folder does not exist.
    """

    def write(temporary: Path) -> None:
        numbers, models, count = Numbers(labels), set(), 0
        with (
            open(temporary, "w", encoding="utf-8", errors="replace") as file,
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as images,
        ):
            file.write('{"annotations": [')
            for image_id, result in enumerate(results, start=1):
                models.add(result.model)
                images.write((",\n" if image_id > 1 else "\n") + _dump(_image(result, image_id)))
                for instance in result:
                    count += 1
                    line = _dump(_annotation(instance, count, image_id, numbers.of(instance.label) + 1))
                    file.write((",\n" if count > 1 else "\n") + line)
            file.write('\n],\n"images": [')
            images.seek(0)
            while chunk := images.read(1 << 20):
                file.write(chunk)
            file.write(f'\n],\n"categories": {_dump(_categories(numbers))},\n')
            file.write(f'"info": {_dump({"model": ", ".join(sorted(models))})}}}\n')

    write_whole(path, write)


def read_coco(
    source: str | os.PathLike[str] | Mapping[str, Any], images: str | os.PathLike[str] | None = None
) -> list[LabelledImage]:
    """Return the images of a COCO JSON file, in its order; `label_id` is the index of the category in the file.

    Crowds and annotations without an outline are skipped with a warning: neither is the mask of one object.

    Args:
        source: path of a JSON file, or its content.
        images: folder of the image files, read only for sizes that the JSON file lacks.

    Raises:
        InputError: the file is missing or has another format, has unknown ids, or an outline does not fit its image.
    """
    if isinstance(source, Mapping):
        name, content = "the data set", checked(dict(source), LabelFile, "the data set")
    else:
        name, content = str(source), read_json(source, LabelFile)
    info = content.get("info")
    model = str(info.get("model", "")) if isinstance(info, dict) else ""
    places = {category["id"]: number for number, category in enumerate(content["categories"])}
    names = [category["name"] for category in content["categories"]]
    found = {}
    for number, picture in enumerate(content["images"]):
        size = picture.get("height") or 0, picture.get("width") or 0
        if not all(size):
            if images is None or not picture.get("file_name"):
                where = place(f"images[{number}]", name)
                raise InputError(f"{where} has no width and height; pass the folder of the images.")
            size = upright_size(Path(images) / picture["file_name"])
        found[picture["id"]] = LabelledImage(size, picture.get("file_name") or None, model=model)
    skipped = {"crowds (iscrowd)": 0, "boxes without an outline": 0}
    for number, annotation in enumerate(content["annotations"]):
        for kind, there in (("image", found), ("category", places)):
            if annotation[f"{kind}_id"] not in there:
                where = place(f"annotations[{number}].{kind}_id", name)
                raise InputError(f"{where} is {annotation[f'{kind}_id']!r}, which is missing in the {kind} ids.")
        if annotation.get("iscrowd") or not outlines.is_outline(annotation.get("segmentation")):
            skipped["crowds (iscrowd)" if annotation.get("iscrowd") else "boxes without an outline"] += 1
            continue
        image, category = found[annotation["image_id"]], places[annotation["category_id"]]
        try:
            counts = outlines.to_rle(annotation["segmentation"], *image.size)["counts"]
        except InputError as error:
            raise InputError(f"{place(f'annotations[{number}].segmentation', name)} {error}.") from error
        known = {key: annotation[key] for key in EXTRAS if annotation.get(key) is not None}
        image.add(names[category], category, {"size": list(image.size), "counts": counts.decode("ascii")}, **known)
    for kind, count in skipped.items():
        if count:
            logger.warning("%s: %d %s left out.", one_line(name), count, kind)
    return list(found.values())


def _image(result: Labelled, image_id: int) -> dict[str, Any]:
    height, width = result.size
    name = result.file_name or f"image_{image_id:06}.jpg"  # tools tell images apart by their names
    return {"id": image_id, "file_name": name, "height": height, "width": width}


def _annotation(instance: Instance, number: int, image_id: int, category_id: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(instance.bbox),
        "area": instance.area,
        "segmentation": instance.segmentation,
        "iscrowd": 0,
        "label": instance.label,
        "score": instance.score,
        "mask_score": instance.mask_score,
        "prompt": instance.prompt,
        "source": instance.source,
        "topk": instance.topk,
        "objectness": instance.objectness,
    }


def _categories(numbers: Numbers) -> list[dict[str, Any]]:
    return [{"id": number + 1, "name": label} for label, number in numbers.items()]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
