"""The input of the processor, brought into one form: images, sizes, prompts and text queries."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovsam.errors import InputError
from ovsam.processing import arguments
from ovsam.processing.images import open_image, unit_to_uint8
from ovsam.processing.vocabulary import Vocabulary, split_words


def open_pictures(images: Any) -> Any:
    """Images in the forms that the image processor takes; all others are opened and converted to RGB."""
    if images is None:
        return None
    if not isinstance(images, list | tuple):
        return _open_picture(images)
    if not images:
        raise InputError("The list of images is empty; pass at least one.")
    return [_open_picture(one) for one in images]


def _open_picture(image: Any) -> Any:
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else open_image(image)
    if isinstance(image, Tensor | np.ndarray) and image.ndim in (3, 4) and image.dtype in (torch.uint8, np.uint8):
        if 4 in (image.shape[-1], image.shape[0]) and image.ndim == 3 and isinstance(image, np.ndarray):
            return open_image(image)
        return image
    if isinstance(image, Tensor | np.ndarray) and image.ndim in (3, 4):
        array = arguments.to_numpy(image)
        if array.dtype.kind not in "iuf" or not array.size or not np.isfinite(array).all():
            raise InputError("An image contains values that are not finite; pass uint8, or floats in [0, 1].")
        if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
            array = unit_to_uint8(array, "The image")
        return torch.from_numpy(array) if isinstance(image, Tensor) else array
    return open_image(image)


def check_sizes(original_sizes: Any) -> list[list[int]] | None:
    """(height, width) of each image, whole and positive."""
    if original_sizes is None:
        return None
    found = arguments.rows("original_sizes", original_sizes, 2, "(height, width) in pixels, one for each image")
    if not all(side >= 1 and side == int(side) for row in found for side in row):
        raise InputError(f"The original_sizes are {arguments.short(original_sizes)}; they must be whole and positive.")
    return [[int(side) for side in row] for row in found]


def check_prompts(images, sizes, points, labels, boxes, padding: int) -> None:
    """Raise InputError unless prompts have one entry for each image, and labels one for each point."""
    if images is None and sizes is None and any(given is not None for given in (points, labels, boxes)):
        raise InputError("Prompts are in pixels of an image; pass images, or their original_sizes.")
    count = len(images) if isinstance(images, list) else len(sizes) if images is None and sizes is not None else None
    for name, given in (("input_points", points), ("input_labels", labels), ("input_boxes", boxes)):
        if given is not None and count is not None and len(given) != count:
            raise InputError(f"There are {count} images and {len(given)} entries of {name}; each image takes one.")
    if labels is None:
        return
    if points is None:
        raise InputError("There are input_labels without input_points; each point takes one.")
    for row, several in zip(points, labels, strict=False):
        if [len(one) for one in row] != [len(one) for one in several]:
            raise InputError("The input_labels do not fit the input_points; each point takes one.")
    for one in (label for several in labels for row in several for label in row):
        if one not in (1, 0, 2, 3, -1, padding):
            raise InputError(
                f"The input_labels hold {one}; each must be 1 (on the object), 0 (beside it), 2 or 3 (the corners of a "
                "box) or -1 (padding)."
            )


def split_queries(text: Any) -> Any:
    """Text queries as a list or a mapping, or one of these for each image; a string is split at its commas."""
    if isinstance(text, str):
        return split_words(text) or [text]
    if isinstance(text, Vocabulary):
        return text.as_mapping()
    if isinstance(text, Mapping):
        if not all(isinstance(one, str) for pair in text.items() for one in pair):
            raise InputError(f"The text is {arguments.short(text)}; it must map phrases to class names, both strings.")
        return dict(text)
    text = arguments.plain(text)
    if not isinstance(text, Iterable) or isinstance(text, bytes):
        raise InputError(
            f"The text is {arguments.short(text)}; it must be a list of text queries, or one for each image."
        )
    words = list(text)
    if any(isinstance(one, str) for one in words):
        return [one for one in words if not isinstance(one, str) or one.strip()] or words
    rows = [list(one) if isinstance(one, tuple) else one for one in words]
    for one in rows:
        if not isinstance(one, list | Mapping) or not all(isinstance(word, str) for word in one):
            raise InputError(
                f"The text contains {arguments.short(one)}; each entry must be a text query, or a list of them."
            )
    return rows


def pad_boxes(boxes) -> tuple[Any, list[int] | None]:
    """Pad the boxes of each image to one length with empty boxes; also returns the number of each image."""
    if boxes is None:
        return None, None
    if isinstance(boxes, Tensor):
        return boxes, [boxes.shape[1]] * boxes.shape[0]
    counts = [len(row) for row in boxes]
    return [[*row, *[[0.0, 0.0, 1.0, 1.0]] * (max(counts) - len(row))] for row in boxes], counts


def fits(text_labels, images: int) -> bool:
    return len(text_labels) == images and not any(isinstance(row, str) for row in text_labels)
