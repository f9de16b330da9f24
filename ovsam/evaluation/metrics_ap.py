"""Average precision of masks, by one matching: COCO's, LVIS', boundary AP, AP-fixed and AP-pool.

    cells = compare(truth, strongest(detections, 100, by_image_and_class))
    precision = precision_curve(match(cells)[class_id])

Definitions:

- AP (Lin et al. 2014, as in pycocotools): detections of a class, highest score first, are each matched to the free
  object of their image with the highest overlap, if the IoU reaches the threshold; precision is made monotone and read
  at 101 recalls; AP is the mean over ten thresholds, 0.50 to 0.95, and over classes that have an object.
- Boundary AP (Cheng et al. 2021, §5): the same with min(mask IoU, boundary IoU), and mask IoU for crowds.
- LVIS AP (Gupta et al. 2019, §3): detections of classes that are not annotated in an image are left out, unmatched ones
  of a class that is not annotated exhaustively there are ignored; 300 detections an image.
- AP-fixed (Dave et al. 2021): 10,000 detections a class over the whole set, as many an image as there are.
- AP-pool (Dave et al. 2021): detections of all classes, matched within their class, in one precision-recall curve: it
  rewards scores that are comparable between classes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovsam.evaluation.metrics import boundary
from ovsam.ops import rle

Detection = Mapping[str, Any]  # image_id, category_id, score, segmentation in run lengths
Overlap = Callable[[list[rle.RLE], list[rle.RLE], np.ndarray], np.ndarray]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
COCO_CAP, LVIS_CAP, FIXED_CAP = 100, 300, 10_000
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


@dataclass
class Truth:
    """The objects of a data set, and the rules of its annotation.

    objects: COCO annotations with masks as run lengths, with image_id, category_id, area and iscrowd. searched:
    annotated classes of each image; None if every image is annotated for all classes. lenient: classes that are not
    annotated exhaustively in an image.
    """

    objects: list[dict]
    searched: dict[int, set[int]] | None = None
    lenient: dict[int, set[int]] = field(default_factory=dict)


@dataclass
class Cell:
    """D detections, highest score first, and G objects of one class in one image; overlap [D, G]."""

    image: int
    class_id: int
    scores: np.ndarray
    areas: np.ndarray
    overlap: np.ndarray
    object_areas: np.ndarray
    crowd: np.ndarray
    lenient: bool


@dataclass
class Matched:
    """Detections of a class over all images, highest score first: scores [D]; right and ignored [T, D] at each IoU
    threshold; and the number of objects."""

    scores: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    objects: int


def by_image(detection: Detection) -> Any:
    return detection["image_id"]


def by_class(detection: Detection) -> Any:
    return detection["category_id"]


def by_image_and_class(detection: Detection) -> Any:
    return detection["image_id"], detection["category_id"]


def strongest(detections: Iterable[Detection], count: int, group: Callable[[Detection], Any]) -> list[Detection]:
    """Return the `count` detections of highest score in each group, highest score first."""
    groups = defaultdict(list)
    for detection in detections:
        groups[group(detection)].append(detection)
    return [one for some in groups.values() for one in sorted(some, key=lambda one: -one["score"])[:count]]


def mask_iou(found: list[rle.RLE], objects: list[rle.RLE], crowd: np.ndarray) -> np.ndarray:
    """Mask IoU [D, G]; for a crowd, the fraction of the detection inside it."""
    overlap = rle.iou(found, objects)
    return np.where(crowd[None], rle.covered(found, objects), overlap) if crowd.any() else overlap


def boundary_mask_iou(found: list[rle.RLE], objects: list[rle.RLE], crowd: np.ndarray) -> np.ndarray:
    """Minimum of mask IoU and boundary IoU, [D, G]."""
    overlap = mask_iou(found, objects, crowd)
    if not overlap.size:
        return overlap
    edges, object_edges = ([rle.encode(boundary(rle.decode(one))) for one in some] for some in (found, objects))
    return np.where(crowd[None], overlap, np.minimum(overlap, rle.iou(edges, object_edges)))


def compare(truth: Truth, detections: Iterable[Detection], overlap: Overlap = mask_iou) -> list[Cell]:
    """Return the detections and objects of each class in each image, in the order of the image ids."""
    objects, found = defaultdict(list), defaultdict(list)
    for one in truth.objects:
        objects[by_image_and_class(one)].append(one)
    for detection in detections:
        if truth.searched is None or detection["category_id"] in truth.searched[detection["image_id"]]:
            found[by_image_and_class(detection)].append(detection)
    cells = []
    for image, class_id in sorted(objects.keys() | found.keys()):
        some = sorted(found[image, class_id], key=lambda one: -one["score"])
        there = objects[image, class_id]
        crowd = np.array([bool(one.get("iscrowd")) for one in there], bool)
        codes, object_codes = [one["segmentation"] for one in some], [one["segmentation"] for one in there]
        cells.append(
            Cell(
                image=image,
                class_id=class_id,
                scores=np.array([one["score"] for one in some], float),
                areas=np.array([rle.area(code) for code in codes], float),
                overlap=overlap(codes, object_codes, crowd),
                object_areas=np.array([one["area"] for one in there], float),
                crowd=crowd,
                lenient=class_id in truth.lenient.get(image, ()),
            )
        )
    return cells


def match(cells: Iterable[Cell], area: str = "all") -> dict[int, Matched]:
    """Match the detections of each class with objects of one size, a key of AREAS; classes without objects are left
    out."""
    per_class = defaultdict(list)
    for cell in cells:
        per_class[cell.class_id].append((cell.scores, *_match_cell(cell, *AREAS[area])))
    found = {}
    for class_id, parts in per_class.items():
        scores, right, ignored, objects = zip(*parts, strict=True)
        if sum(objects):
            order = np.argsort(-np.concatenate(scores), kind="stable")
            right, ignored = (np.concatenate(part, 1)[:, order] for part in (right, ignored))
            found[class_id] = Matched(np.concatenate(scores)[order], right, ignored, sum(objects))
    return found


def _match_cell(cell: Cell, least: float, most: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return right and ignored [T, D], and the number of objects that count."""
    outside = (cell.object_areas < least) | (cell.object_areas > most)
    passed = cell.crowd | outside  # ignored objects, whose detections are ignored too
    count = len(cell.object_areas)
    free = np.ones((len(THRESHOLDS), count), bool)
    right, ignored = (np.zeros((len(THRESHOLDS), len(cell.scores)), bool) for _ in range(2))
    rows = np.arange(len(THRESHOLDS))
    needed = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    for place, overlap in enumerate(cell.overlap if count else ()):
        fits = free & (overlap >= needed)  # [T, G]
        counting = fits & ~passed
        fits = np.where(counting.any(1, keepdims=True), counting, fits)  # objects that count take precedence
        # The last of equal overlaps, as in pycocotools.
        best = count - 1 - np.where(fits, overlap, -1.0)[:, ::-1].argmax(1)  # [T]
        taken = fits.any(1)
        right[:, place] = taken & ~passed[best]
        ignored[:, place] = taken & passed[best]
        free[rows[taken], best[taken]] = cell.crowd[best[taken]]
    unmatched = ~(right | ignored)
    ignored |= unmatched & (cell.lenient | (cell.areas < least) | (cell.areas > most))
    return right, ignored, int((~passed).sum())


def pool(matched: Iterable[Matched]) -> Matched:
    """Join the detections of several classes as one (AP-pool)."""
    parts = list(matched)
    scores = np.concatenate([one.scores for one in parts])
    order = np.argsort(-scores, kind="stable")
    right, ignored = (
        np.concatenate([getattr(one, name) for one in parts], 1)[:, order] for name in ("right", "ignored")
    )
    return Matched(scores[order], right, ignored, sum(one.objects for one in parts))


def precision_curve(matched: Matched) -> np.ndarray:
    """Return the highest precision at or above each recall of RECALLS, [T, R]."""
    hits = np.cumsum(matched.right, 1, dtype=float)
    false = np.cumsum(~matched.right & ~matched.ignored, 1, dtype=float)
    recall = hits / matched.objects
    precision = hits / (hits + false + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    padded = np.pad(precision, ((0, 0), (0, 1)))  # beyond the last detection there is none
    return np.stack([row[np.searchsorted(r, RECALLS, "left")] for r, row in zip(recall, padded, strict=True)])


def recall(matched: Matched) -> np.ndarray:
    """Return the share of the objects that are found, [T]."""
    return matched.right.sum(1) / matched.objects


def mean_precision(matched: Iterable[Matched]) -> tuple[float, float, float]:
    """AP, AP50 and AP75, averaged over classes; NaN without one."""
    curves = [precision_curve(one).mean(1) for one in matched]  # [T] each
    if not curves:
        return (float("nan"),) * 3
    per_threshold = np.mean(curves, 0)
    return float(per_threshold.mean()), float(per_threshold[0]), float(per_threshold[5])


def average_precision(truth: Truth, detections: Iterable[Detection], overlap: Overlap = mask_iou) -> dict[str, float]:
    """AP, AP50, AP75 and AP of small, medium and large objects of the detections that `strongest` selects."""
    cells = compare(truth, detections, overlap)
    ap, ap50, ap75 = mean_precision(match(cells).values())
    sizes = {f"AP, {size}": mean_precision(match(cells, size).values())[0] for size in list(AREAS)[1:]}
    return {"AP": ap, "AP50": ap50, "AP75": ap75} | sizes


def frequency_precision(
    truth: Truth, detections: Iterable[Detection], frequency: Mapping[int, str]
) -> dict[str, float]:
    """AP and AP-pool of LVIS, of all classes and of those of each frequency (`r`, `c`, `f` by class id)."""
    matched = match(compare(truth, detections))
    figures = {}
    for key, name in {"": "", **FREQUENCIES}.items():
        chosen = [one for class_id, one in matched.items() if not key or frequency[class_id] == key]
        suffix = f", {name}" if name else ""
        figures[f"AP{suffix}"] = mean_precision(chosen)[0]
        figures[f"AP-pool{suffix}"] = mean_precision([pool(chosen)])[0] if chosen else float("nan")
    return figures
