"""Masks as image files: a map of instance numbers as 16-bit PNG with a JSON file of their labels, and cut-outs."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_text, write_whole
from ovsam.ops.schema import Share, checked, read_json
from ovsam.processing.images import Picture, open_file, open_image
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, Stems, files_below, visible


class Listed(TypedDict):
    id: int
    label: str
    score: NotRequired[Share | None]


class MapFile(TypedDict):
    instances: list[Listed]
    file_name: NotRequired[str | None]


def id_map(result: Labelled) -> np.ndarray:
    """Return the instance of each pixel, [H, W] int32: its index counted from 1, 0 for none. If masks overlap, the
    pixel belongs to the higher score."""
    instances = list(result)
    owners = np.zeros(result.size, dtype=np.int32)
    scores = np.array([instance.score for instance in instances], dtype=np.float32)
    for place in np.argsort(-scores, kind="stable")[::-1]:
        owners[instances[int(place)].mask] = place + 1
    return owners


def write_id_map(result: Labelled, path: str | os.PathLike[str]) -> None:
    """Write `id_map` as a PNG with 16 bits a pixel: 0 is background, 1 the first instance."""
    image = Image.fromarray(id_map(result).astype(np.uint16))
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))


def write_masks(results: Iterable[Labelled], folder: str | os.PathLike[str]) -> None:
    """Write <image>.png, the map of instance numbers, and <image>.json, with labels and scores, for every image."""
    stems = Stems()
    for result in results:
        path = Path(folder) / f"{stems.of(result)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_id_map(result, path)
        instances = [
            {"id": place, "label": one.label, "label_id": one.label_id, "score": one.score}
            for place, one in enumerate(result, start=1)
        ]
        record = {"file_name": result.file_name, "instances": instances}
        write_text(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False))


def read_masks(source: str | os.PathLike[str]) -> list[LabelledImage]:
    """Return the images of the maps of `write_masks` in a folder, or of one file. Overlaps have been assigned to the
    higher score; instances without any remaining pixel are left out.

    Raises:
        InputError: a file is missing, or a map has no JSON file.
    """
    found, numbers = [], Numbers()
    for path in files_below(source, (".png",)):
        listing = path.with_suffix(".json")
        record = read_json(listing)
        try:
            with open_file(path) as picture:
                owners = np.asarray(picture)
        except Exception as error:  # each decoder raises errors of its own
            raise InputError(f"{path} cannot be read as an image: {error}.") from error
        if owners.ndim != 2 or not isinstance(record, dict) or "instances" not in record:
            raise InputError(f"{path} is not a map of instance numbers, or its JSON file does not list them.")
        record = checked(record, MapFile, str(listing))
        image = LabelledImage(owners.shape, record.get("file_name"))
        for one in record["instances"]:
            mask = owners == one["id"]
            if mask.any():
                score = 1.0 if one.get("score") is None else one["score"]
                image.add(one["label"], numbers.of(one["label"]), rle.encode(mask), score=score)
        found.append(image)
    return found


def cutouts(result: Labelled, image: Picture) -> list[Image.Image]:
    """Cut each instance out of its image along its mask: RGBA, as large as its box, transparent outside the mask."""
    picture = open_for(result, image)
    cut = []
    for instance in visible(result):
        box = tuple(int(value) for value in instance.box)
        part = picture.crop(box)
        part.putalpha(Image.fromarray(np.uint8(instance.mask[box[1] : box[3], box[0] : box[2]]) * 255))
        cut.append(part)
    return cut


def open_for(result: Labelled, image: Picture) -> Image.Image:
    """Open the image of these results; raises InputError if it has another size."""
    picture = open_image(image)
    if (picture.height, picture.width) != tuple(result.size):
        height, width = result.size
        raise InputError(
            f"The image is {picture.width}x{picture.height} pixels and these results are for {width}x{height}; "
            "draw them over their own image."
        )
    return picture
