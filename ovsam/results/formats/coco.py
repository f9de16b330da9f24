"""COCO instances: one JSON file; masks as compressed run lengths, boxes as x, y, width, height, iscrowd always 0."""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovsam.errors import InputError
from ovsam.ops import outlines
from ovsam.ops.files import write_whole
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, load_json, upright_size
from ovsam.results.instance import Instance

logger = logging.getLogger(__name__)

EXTRAS = ("score", "mask_score", "prompt", "source", "topk", "objectness")  # keys of an annotation beyond COCO's own


def to_coco(results: Iterable[Labelled], first_image_id: int = 1, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return images as one COCO data set: boxes are x, y, width, height, masks compressed RLE, iscrowd always 0.

    Each annotation also has `label`, `score`, `mask_score`, `prompt`, `source`, `topk` and `objectness`. Categories are
    numbered from 1: first `labels` in order (pass the vocabulary to have the same numbers in every file), then other
    labels in order of appearance.
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
    name = "The data set" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else load_json(source)
    if not isinstance(content, Mapping) or not all(
        isinstance(content.get(table), list) for table in ("images", "annotations", "categories")
    ):
        raise InputError(f"{name} is not a COCO JSON file: it must have the lists images, annotations and categories.")
    places = {category["id"]: place for place, category in enumerate(content["categories"])}
    names = [str(category["name"]) for category in content["categories"]]
    model = str(content.get("info", {}).get("model", "")) if isinstance(content.get("info"), Mapping) else ""
    found = {}
    for image in content["images"]:
        size = int(image.get("height") or 0), int(image.get("width") or 0)
        if not all(size):
            if images is None:
                raise InputError(f"The image {image['id']!r} of {name} has no size; pass the folder of the images.")
            size = upright_size(Path(images) / image["file_name"])
        found[image["id"]] = LabelledImage(size, image.get("file_name") or None, model=model)
    skipped = {"crowds (iscrowd)": 0, "boxes without an outline": 0}
    for annotation in content["annotations"]:
        image, place = found.get(annotation.get("image_id")), places.get(annotation.get("category_id"))
        if image is None or place is None:
            kind = "image" if image is None else "category"
            raise InputError(
                f"The annotation {annotation.get('id')} of {name} has the {kind} {annotation.get(kind + '_id')!r}, "
                "which is missing in the file."
            )
        if annotation.get("iscrowd") or not outlines.is_outline(annotation.get("segmentation")):
            skipped["crowds (iscrowd)" if annotation.get("iscrowd") else "boxes without an outline"] += 1
            continue
        try:
            counts = outlines.to_rle(annotation["segmentation"], *image.size)["counts"]
        except InputError as error:
            raise InputError(f"The annotation {annotation.get('id')} of {name} {error}.") from error
        known = {key: annotation[key] for key in EXTRAS if key in annotation}
        image.add(names[place], place, {"size": list(image.size), "counts": counts.decode("ascii")}, **known)
    for kind, count in skipped.items():
        if count:
            logger.warning("%s: %d %s left out.", name, count, kind)
    return list(found.values())


def _image(result: Labelled, image_id: int) -> dict[str, Any]:
    height, width = result.size
    return {"id": image_id, "file_name": result.file_name or "", "height": height, "width": width}


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
