"""Copy-paste augmentation: objects cut out of one image and pasted onto another.

Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation (CVPR 2021). As there,
edges are not blended; the mask of a pasted object is exactly the set of pixels that it covers.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from ovsam.ops.outlines import Rle, from_mask

MIN_AREA = 100  # pixels; a smaller object is not cut out
SCALES = (0.5, 2.0)  # scales of a cut-out, log-uniform
LARGEST = 0.9  # maximum share of either side of the target image

CutOut = tuple[Image.Image, np.ndarray]  # RGB of size (w, h), bool [h, w]


def cut_out(image: Image.Image, rle: Rle) -> CutOut | None:
    """Cut out the bounding box of an object with its mask; None if the object has fewer than MIN_AREA pixels."""
    if coco.area(rle) < MIN_AREA:
        return None
    mask = coco.decode(rle).astype(bool)  # [H, W]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return image.crop((left, top, right, bottom)), mask[top:bottom, left:right]


def transform(piece: CutOut, scale: float, mirrored: bool, room: tuple[int, int]) -> CutOut:
    """Scale a cut-out, at most to `room` (width, height), and mirror it if `mirrored`."""
    image, mask = piece
    scale = min(scale, room[0] / image.width, room[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    covered = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR))
    image, mask = image.resize(size, Image.Resampling.BILINEAR), covered >= 128
    if mirrored:
        image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
    return image, mask


def paste_at(image: Image.Image, rles: Sequence[Rle], piece: CutOut, x: int, y: int) -> tuple[Image.Image, list[Rle]]:
    """Paste one cut-out with its upper left corner at (x, y).

    Returns:
        a new image, and the outlines `rles` followed by that of the pasted object: earlier objects lose the covered
        pixels (their outlines may become empty).
    """
    pasted, mask = piece
    whole = np.zeros((image.height, image.width), dtype=bool)
    whole[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    result = image.copy()
    result.paste(pasted, (x, y), Image.fromarray(mask.astype(np.uint8) * 255))
    added = from_mask(whole)
    # Only outlines that overlap the new one change.
    rest = [rle if not coco.area(coco.merge([rle, added], True)) else _without(rle, whole) for rle in rles]
    return result, [*rest, added]


def _without(rle: Rle, covered: np.ndarray) -> Rle:
    return from_mask(coco.decode(rle).astype(bool) & ~covered)


def paste_objects(
    image: Image.Image, rles: Sequence[Rle], pieces: Sequence[CutOut], rng: np.random.Generator
) -> tuple[Image.Image, list[Rle]]:
    """Paste cut-outs one after another, each at a random scale and position, half of them mirrored.

    Args:
        image: RGB image.
        rles: outlines of its objects.
        pieces: cut-outs to paste; each lies completely inside the image, and later ones cover earlier ones.
        rng: random number generator.

    Returns:
        the new image, and the outlines of `rles` followed by those of `pieces`; covered ones may be empty.
    """
    rles = list(rles)
    room = max(1, int(image.width * LARGEST)), max(1, int(image.height * LARGEST))
    for piece in pieces:
        scale, mirrored = float(np.exp(rng.uniform(*np.log(SCALES)))), bool(rng.random() < 0.5)
        piece = transform(piece, scale, mirrored, room)
        height, width = piece[1].shape
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        image, rles = paste_at(image, rles, piece, x, y)
    return image, rles
