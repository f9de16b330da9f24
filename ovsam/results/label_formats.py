"""Results -> the files of labelling and training tools; pure functions of the records. COCO is in results.py."""

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops.files import write_whole
from ovsam.processing.images import Picture
from ovsam.results.results import Results


def to_yolo(result: Results, labels: Sequence[str] = (), tolerance: float = 0.0) -> str:
    """YOLO-seg's lines, one an instance: its label's number, then x and y of its polygon's corners in [0, 1].

    Labels are numbered from 0: their place in `labels`, or `label_id` without. See `to_polygon` for parts and holes.

    Raises:
        InputError: a label that is not among `labels`.
    """
    height, width = result.size
    number = {label: i for i, label in enumerate(labels)}
    lines = []
    for instance in result:
        if labels and instance.label not in number:
            raise InputError(f"{instance.label!r} is not among the {len(labels)} labels that were to be numbered.")
        corners = (to_polygon(instance.mask, tolerance) / [width, height]).ravel()
        label_id = number.get(instance.label, instance.label_id)
        lines.append(" ".join([str(label_id), *(f"{value:.6g}" for value in corners)]))
    return "".join(line + "\n" for line in lines if " " in line)


def write_yolo(
    results: Iterable[Results], folder: str | os.PathLike[str], labels: Sequence[str], tolerance: float = 0.0
) -> None:
    """Write a YOLO-seg data set: labels/<picture>.txt for every picture, also for those where nothing was found,
    scores/<picture>.txt with a score a line, and data.yaml with the names."""
    results, folder = list(results), Path(folder)
    names = _stems(results)
    for part in ("labels", "scores"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for result, name in zip(results, names, strict=True):
        whole = result.filter(min_area=1)
        _write_text(folder / "labels" / f"{name}.txt", to_yolo(whole, labels, tolerance))
        _write_text(folder / "scores" / f"{name}.txt", "".join(f"{one.score:.4f}\n" for one in whole))
    lines = ["path: .", "train: images", "val: images", "names:"]
    lines += [f"  {i}: {json.dumps(label, ensure_ascii=False)}" for i, label in enumerate(labels)]
    _write_text(folder / "data.yaml", "\n".join(lines) + "\n")


def to_labelme(result: Results, shape: str = "polygon", tolerance: float = 0.0) -> dict[str, Any]:
    """LabelMe's record of one picture.

    shape: "polygon", which every tool reads (see `to_polygon` for parts and holes), or "mask", exact in any case.
    """
    if shape not in ("polygon", "mask"):
        raise InputError(f"LabelMe's shape is 'polygon' or 'mask', not {shape!r}.")
    height, width = result.size
    shapes = []
    for instance in result.filter(min_area=1):
        drawn: dict[str, Any] = {"label": instance.label, "group_id": None, "flags": {}, "shape_type": shape}
        if shape == "polygon":
            drawn |= {"points": to_polygon(instance.mask, tolerance).tolist()}
        else:
            x1, y1, x2, y2 = (int(value) for value in instance.box)
            drawn |= {"points": [[x1, y1], [x2 - 1, y2 - 1]], "mask": _png(instance.mask[y1:y2, x1:x2])}
        shapes.append(drawn | {"description": f"score {instance.score:.4f}"})
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": result.file_name or "",
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def write_labelme(results: Iterable[Results], folder: str | os.PathLike[str], shape: str = "polygon") -> None:
    """Write LabelMe's <picture>.json for every picture."""
    results = list(results)
    for result, name in zip(results, _stems(results), strict=True):
        record = json.dumps(to_labelme(result, shape), ensure_ascii=False)
        _write_text(Path(folder) / f"{name}.json", record)


def write_id_map(result: Results, path: str | os.PathLike[str]) -> None:
    """Write `Results.id_map` as a PNG of 16 bits a pixel: 0 is nothing, 1 the first instance."""
    image = Image.fromarray(result.id_map().astype(np.uint16))
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))


def cutouts(result: Results, image: Picture) -> list[Image.Image]:
    """Each instance cut out of its picture along its mask: RGBA of the size of its box, transparent around it."""
    picture = result.check_picture(image)
    cut = []
    for instance in result.filter(min_area=1):
        box = tuple(int(value) for value in instance.box)
        part = picture.crop(box)
        part.putalpha(Image.fromarray(np.uint8(instance.mask[box[1] : box[3], box[0] : box[2]]) * 255))
        cut.append(part)
    return cut


def to_polygon(mask: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """One polygon [m, 2] of x, y in pixels for a whole mask [H, W], along the edges of its pixels; [0, 2] if empty.

    Further parts and holes are joined to it by bridges without width, so that it fills to the very same mask, by either
    rule. With `tolerance` corners that stray no further than that many pixels are left out (Douglas and Peucker 1973).
    """
    rings = [_simplify(ring, tolerance) if tolerance else ring for ring in outlines(mask)]
    if not rings:
        return np.zeros((0, 2))
    polygon = rings[0]
    for ring in rings[1:]:
        apart = np.abs(polygon[:, None] - ring).sum(-1)  # [m, k]
        here, there = np.unravel_index(apart.argmin(), apart.shape)
        ring = np.roll(ring, -there, axis=0)
        polygon = np.concatenate([polygon[: here + 1], ring, ring[:1], polygon[here:]])
    return polygon.astype(float)


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask [H, W] along the edges of its pixels: closed polygons [m, 2] of x, y, exact.

    Outer borders run clockwise on the screen and holes the other way, so that both ways of filling a polygon agree.
    Pixels that touch by a corner only are parts of their own.
    """
    grid = np.pad(mask.astype(bool), 1)
    quads = np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]])  # around each corner: ul, ur, ll, lr
    diagonal = (quads[0] == quads[3]) & (quads[1] == quads[2]) & (quads[0] != quads[1])
    corner = (quads.sum(0) % 2 == 1) | diagonal
    y, x = np.nonzero(corner)
    # A corner where two pixels touch is two corners, the left one and the right one.
    place = np.arange(len(x)).repeat(diagonal[y, x].astype(int) + 1)
    right = np.diff(place, prepend=-1) == 0
    x, y = x[place], y[place]
    falling = quads[0][y, x]  # the pixels that touch are upper left and lower right
    # Sides are between corners that follow each other in a row, and in a column: two and two.
    lower = np.where(falling, right, ~right)
    across, down = _pair(np.lexsort([right, x, y])), _pair(np.lexsort([lower, y, x]))
    polygons, seen = [], [False] * len(x)
    for start in range(len(x)):  # np.nonzero goes row by row: the first of a ring is its upper left corner
        ring, at = [], start
        while not seen[at]:
            ring += [at, across[at]]
            seen[at] = seen[across[at]] = True
            at = down[across[at]]
        if not ring:
            continue
        polygon = np.stack([x[ring], y[ring]], 1)
        polygons.append(polygon if grid[y[start] + 1, x[start] + 1] else polygon[::-1])
    return polygons


def _pair(order: np.ndarray) -> list[int]:
    """The partner of each element when they are taken two and two in this order."""
    partner = np.empty(len(order), int)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner.tolist()


def _simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A closed polygon [m, 2] without the corners that are no further than this from the line between their neighbours;
    three at least stay."""
    far = int(np.abs(ring - ring[0]).sum(1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep, spans = {0, far}, [(0, far), (far, len(ring))]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        (dx, dy), (ax, ay) = closed[last] - closed[first], (closed[first + 1 : last] - closed[first]).T
        length = np.hypot(dx, dy)
        away = np.abs(dx * ay - dy * ax) / length if length else np.hypot(ax, ay)
        if away.max() > tolerance or len(keep) < 3:
            middle = first + 1 + int(away.argmax())
            keep.add(middle)
            spans += [(first, middle), (middle, last)]
    return ring[sorted(keep)]


def _png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _stems(results: Sequence[Results]) -> list[str]:
    """The pictures' names without folder and ending; raises InputError if two are the same, or one has none."""
    names = [Path(result.file_name or "").stem for result in results]
    if "" in names:
        raise InputError("A picture without a file_name cannot have a label file; set `results.file_name`.")
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise InputError(f"{count} pictures are called {name!r}, and their label files would overwrite each other.")
    return names


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
