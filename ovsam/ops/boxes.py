"""Boxes of masks, and their overlap, for numpy arrays and tensors alike."""

from ovsam.ops.arrays import Array, count, floats, namespace


def masks_to_boxes(masks: Array) -> Array:
    """masks [..., H, W] bool -> boxes [..., 4] float xyxy in pixels, x2 and y2 exclusive; zeros for empty masks."""
    xp = namespace(masks)
    h, w = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)  # [..., H], [..., W]
    y, x = count(masks, 0, h), count(masks, 0, w)
    x0 = xp.amin(xp.where(columns, x, w), -1)
    y0 = xp.amin(xp.where(rows, y, h), -1)
    x1 = xp.amax(xp.where(columns, x + 1, 0), -1)
    y1 = xp.amax(xp.where(rows, y + 1, 0), -1)
    boxes = floats(xp.stack([x0, y0, x1, y1], -1))
    return xp.where(columns.any(-1)[..., None], boxes, xp.zeros_like(boxes))


def box_iou(boxes: Array, others: Array) -> Array:
    """IoU of each box [n, 4] with each of the others [m, 4], xyxy -> [n, m]; NaN for two boxes without area."""
    xp = namespace(boxes)
    low, high = xp.maximum(boxes[:, None, :2], others[:, :2]), xp.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clip(min=0).prod(-1)  # [n, m]
    return shared / (box_areas(boxes)[:, None] + box_areas(others) - shared)


def box_areas(boxes: Array) -> Array:
    """boxes [..., 4] xyxy -> [...]"""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def paired_iou(boxes: Array, others: Array) -> Array:
    """IoU of each box with the other at the same place, both [..., 4] xyxy -> [...]."""
    xp = namespace(boxes)
    shared = xp.minimum(boxes[..., 2:], others[..., 2:]) - xp.maximum(boxes[..., :2], others[..., :2])
    shared = shared.clip(min=0).prod(-1)
    return shared / (box_areas(boxes) + box_areas(others) - shared).clip(min=1e-6)
