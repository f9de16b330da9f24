"""Conversion of instances to objects of supervision and FiftyOne, which are imported only here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, visible

if TYPE_CHECKING:
    import fiftyone
    import supervision


def to_supervision(result: Labelled) -> "supervision.Detections":
    """Return `supervision.Detections` with dense masks; needs `pip install supervision`."""
    import supervision

    instances = list(result)
    return supervision.Detections(
        xyxy=np.array([one.box for one in instances], dtype=np.float32).reshape(-1, 4),
        mask=np.array([one.mask for one in instances], dtype=bool).reshape(len(instances), *result.size),
        confidence=np.array([one.score for one in instances], dtype=np.float32),
        class_id=np.array([one.label_id for one in instances], dtype=int),
        data={
            "class_name": np.array([one.label for one in instances], dtype=str),
            "mask_score": np.array([one.mask_score for one in instances], dtype=np.float32),
        },
    )


def from_supervision(
    detections: "supervision.Detections", labels: Sequence[str] = (), file_name: str | None = None
) -> LabelledImage:
    """Return the instances of `supervision.Detections`, which must have masks.

    labels: class names by class id, for detections without `data["class_name"]`.
    """
    if detections.mask is None:
        raise InputError("These detections have boxes only; instances need masks.")
    names = detections.data.get("class_name")
    image, numbers = LabelledImage(tuple(detections.mask.shape[1:]), file_name), Numbers(labels)
    for place, mask in enumerate(detections.mask):
        number = None if detections.class_id is None else int(detections.class_id[place])
        if names is None and (number is None or not number < len(labels)):
            raise InputError(f"The class id {number} has no name; pass `labels`.")
        label = str(names[place] if names is not None else labels[number])
        known = {} if detections.confidence is None else {"score": float(detections.confidence[place])}
        image.add(label, numbers.of(label) if number is None else number, rle.encode(np.asarray(mask, bool)), **known)
    return image


def to_fiftyone(result: Labelled) -> "fiftyone.Detections":
    """Return `fiftyone.Detections`: relative boxes, masks cropped to their box; needs `pip install fiftyone`."""
    import fiftyone

    height, width = result.size
    found = []
    for instance in visible(result):
        x1, y1, x2, y2 = (int(value) for value in instance.box)
        box = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        mask = instance.mask[y1:y2, x1:x2]
        found.append(fiftyone.Detection(label=instance.label, bounding_box=box, mask=mask, confidence=instance.score))
    return fiftyone.Detections(detections=found)


def from_fiftyone(detections: Any, size: tuple[int, int], file_name: str | None = None) -> LabelledImage:
    """Return the instances of `fiftyone.Detections` in an image of this size (height, width); boxes without a mask are
    skipped."""
    height, width = size
    image, numbers = LabelledImage(size, file_name), Numbers()
    for one in detections.detections:
        if one.mask is None:
            continue
        mask = np.asarray(one.mask, bool)
        x, y = round(one.bounding_box[0] * width), round(one.bounding_box[1] * height)
        known = {} if one.confidence is None else {"score": float(one.confidence)}
        image.add(one.label, numbers.of(one.label), rle.encode(mask, x, y, size), **known)
    return image
