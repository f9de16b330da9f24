"""Records of an evaluation -> its figures, `{name: value}`; NaN without data.

Masks are compared at the resolution of the image.

- `box`, `click`, `three clicks`: IoU and boundary IoU, averaged over instances (IoU_b and IoU_n of Open-Vocabulary SAM
  for `base` and `novel`) and over classes. The first click is the pixel of the object farthest from its boundary; all
  three clicks are given at once, with the mask of the click before.
- `name`: share of right class names at rank 1 (top-1) or up to 5, among all of the set or the 1,203 class names of
  LVIS; averaged over instances, and over classes.
- `words -> masks`: mask AP over the class names that are present in some image; each image is queried for its present
  and for absent class names, so that instances of absent ones are false positives.
- `absent words that return anything`: at the model's own score threshold.
- `everything`: share of objects with an IoU above one half to one of the hundred masks of highest objectness; AP of
  those masks by their class names, among all of the set.
- `everything, named: PQ`, `SQ`, `RQ` and `mIoU`: of the masks above the model's own objectness threshold, the pixels
  of overlaps given to the higher score; pixels without an annotated object are void.
- Calibration error of `name`: the score of the best class name of a box prompt against whether it is right. Calibration
  error of `words -> masks`: the score of the instances returned at the model's threshold, absent class names included,
  against whether they overlap an object of their class name, not matched by a higher score, by an IoU above one half.
- A synonym finds its object if the instance of highest score at the threshold overlaps one by an IoU above one half.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ovsam.evaluation import metrics_ap as ap
from ovsam.evaluation.datasets import EvalSet
from ovsam.evaluation.metrics import are_right, calibration_error, concept_f1
from ovsam.evaluation.metrics_panoptic import VOID, Panoptic, mean_iou, panoptic_quality
from ovsam.evaluation.tasks import SIZES
from ovsam.ops import rle

KINDS = ("box", "click", "three clicks")
SPLITS = ("base", "novel")
NO_CLASS = -1

Figures = dict[str, float]


def summarise(records: Sequence[dict], data: EvalSet, threshold: float) -> Figures:
    """Return the figures of the tasks in the records; threshold: the model's score threshold."""
    figures: Figures = {}
    rows = [row for record in records for row in record.get("prompts", {}).get("objects", ())]
    if rows:
        figures |= of_prompts(rows)
    if any("words" in record for record in records):
        figures |= of_words(records, data, threshold)
    if any("everything" in record for record in records):
        figures |= of_everything(records, data)
    for task, title in (("encode", "encoding"), ("prompts", "boxes"), ("words", "words"), ("everything", "everything")):
        if seconds := [record[task]["seconds"] for record in records if task in record]:
            figures[f"seconds: {title}"] = float(np.median(seconds))
    return figures


def of_prompts(rows: Sequence[dict]) -> Figures:
    figures: Figures = {}
    for kind in KINDS:
        figures |= _averages(f"{kind}: mean IoU", rows, [row["iou"][kind] for row in rows])
        figures |= _averages(f"{kind}: boundary IoU", rows, [row["boundary"][kind] for row in rows])
    for kind in ("box", "click", "feature-crop", "image-crop", "box, large"):
        title = "name (box), 1,203 words" if kind == "box, large" else f"name ({kind})"
        named = [row for row in rows if kind in row["rank"]]
        for top in (1, 5):
            if named or kind in ("box", "click"):
                hits = [float(row["rank"][kind] < top) for row in named]
                figures |= _averages(f"{title}: top-{top}", named, hits)
    scores, right = [row["score"] for row in rows], [row["rank"]["box"] < 1 for row in rows]
    return figures | {"name (box): calibration error": calibration_error(scores, right)}


def of_words(records: Sequence[dict], data: EvalSet, threshold: float) -> Figures:
    records = [record for record in records if "words" in record]
    found = [one for record in records for one in record["words"]["found"]]
    title = "words -> masks"
    figures = _precision(records, data, found, title, boundaries=True)
    if plain := [record["words"]["clip-dense"] for record in records if "clip-dense" in record["words"]]:
        figures |= _precision(records, data, [one for some in plain for one in some], f"{title} (clip-dense)")
    scores, right, fired, queries = judge_words(records, data, threshold)
    figures[f"{title}: calibration error"] = calibration_error(scores, right) if scores else 0.0
    figures |= {f"{title}: {name}": value for name, value in concept_f1(queries).items()}
    figures["absent words that return anything"] = _mean(fired)
    if data.synonyms:
        hits = defaultdict(list)
        for record in records:
            for synonym, hit in record["words"].get("synonyms", {}).items():
                hits[synonym].append(float(hit))
        figures["synonyms that find their object"] = _mean([_mean(each) for each in hits.values()])
    return figures


def judge_words(
    records: Sequence[dict], data: EvalSet, threshold: float
) -> tuple[list[float], list[bool], list[bool], list[np.ndarray]]:
    """Judge the instances of text queries at the threshold: scores, and whether they are right; whether each absent
    class name returned instances; and the overlaps [instances, objects] of each query, an image and a class name."""
    scores: list[float] = []
    right: list[bool] = []
    fired: list[bool] = []
    queries: list[np.ndarray] = []
    for record in records:
        objects, _ = data.objects(record["image_id"])
        codes = [data.coco.annToRLE(one) for one in objects]
        named = [one["category_id"] for one in objects]
        kept = [one for one in record["words"]["found"] if one["score"] >= threshold]
        labels = [one["category_id"] for one in kept]
        masks = [one["segmentation"] for one in kept]
        scores += [one["score"] for one in kept]
        right += are_right(masks, labels, codes, named)
        absent = record["words"]["absent"]
        fired += [word in labels for word in absent]
        overlap = rle.iou(masks, codes)
        for word in record["words"]["present"] + absent:
            queries.append(overlap[np.ix_([one == word for one in labels], [one == word for one in named])])
    return scores, right, fired, queries


def of_everything(records: Sequence[dict], data: EvalSet) -> Figures:
    records = [record for record in records if "everything" in record]
    each = [record["everything"] for record in records]
    hits = [iou > 0.5 for one in each for iou in one["iou"]]
    sizes = [size for one in each for size in one["size"]]
    figures = {"everything: recall": _mean(hits)}
    for size in SIZES:
        figures[f"everything: recall, {size}"] = _mean([h for h, s in zip(hits, sizes, strict=True) if s == size])
    figures |= _precision(records, data, [one for some in each for one in some["found"]], "everything, named")
    figures |= {f"everything, named: {name}": value for name, value in _of_maps(records, data).items()}
    return figures | {"everything: masks": _mean([len(one["found"]) for one in each])}


def _of_maps(records: Sequence[dict], data: EvalSet) -> Figures:
    """PQ, SQ, RQ and mIoU of maps with one object at every pixel."""
    pairs = []
    for record in records:
        objects, masks = data.objects(record["image_id"])
        largest_first = sorted(range(len(objects)), key=lambda i: -int(masks[i].sum()))  # small objects stay in sight
        truth = _painted([(masks[i], objects[i]["category_id"]) for i in largest_first], masks.shape[1:])
        kept = [one for one in record["everything"]["found"] if one.get("kept", True)]
        kept = sorted(kept, key=lambda one: one["score"])
        found = _painted([(rle.decode(one["segmentation"]), one["category_id"]) for one in kept], masks.shape[1:])
        pairs.append((found, truth))
    place = {class_id: number for number, class_id in enumerate(data.words)}
    classes = [(_classes(found, place), _classes(truth, place)) for found, truth in pairs]
    return panoptic_quality(pairs) | {"mIoU": mean_iou(classes, len(place), ignored=NO_CLASS)}


def _painted(objects: Sequence[tuple[np.ndarray, int]], size: tuple[int, ...]) -> Panoptic:
    """Masks [H, W] with their classes, later ones over earlier ones."""
    ids = np.full(size, VOID)
    for number, (mask, _) in enumerate(objects, VOID + 1):
        ids[mask] = number
    return Panoptic(ids, {number: class_id for number, (_, class_id) in enumerate(objects, VOID + 1)})


def _classes(panoptic: Panoptic, place: Mapping[int, int]) -> np.ndarray:
    """The place of the class of each pixel, [H, W]; NO_CLASS in void."""
    class_at = np.array([NO_CLASS, *(place[class_id] for class_id in panoptic.class_of.values())])
    return class_at[panoptic.ids]


def _precision(
    records: Sequence[dict], data: EvalSet, found: list[dict], title: str, boundaries: bool = False
) -> Figures:
    """Mask AP over the class names that are present in some image, and over the base and the novel ones."""
    image_ids = [record["image_id"] for record in records]
    shown = {one["category_id"] for one in data.coco.loadAnns(data.coco.getAnnIds(image_ids))}
    truth = data.truth(image_ids)
    cap = (ap.LVIS_CAP, ap.by_image) if data.lvis else (ap.COCO_CAP, ap.by_image_and_class)
    kept = [one for one in ap.strongest(found, *cap) if one["category_id"] in shown]
    cells = ap.compare(truth, kept)
    matched = ap.match(cells)
    value, at50, at75 = ap.mean_precision(matched.values())
    figures = {f"{title}: AP50": at50, f"{title}: AP": value, f"{title}: AP75": at75}
    for split in SPLITS:
        chosen = [one for class_id, one in matched.items() if data.split[class_id] == split]
        value, at50, _ = ap.mean_precision(chosen)
        figures |= {f"{title}: AP50, {split}": at50, f"{title}: AP, {split}": value}
    for size in SIZES:
        figures[f"{title}: AP, {size}"] = ap.mean_precision(ap.match(cells, size).values())[0]
    if not boundaries:
        return figures
    edges = ap.average_precision(truth, kept, ap.boundary_mask_iou)
    figures[f"{title}: boundary AP"] = edges["AP"]
    figures[f"{title}: AP-pool"] = ap.mean_precision([ap.pool(matched.values())])[0] if matched else math.nan
    if data.lvis:
        fixed = ap.strongest(found, ap.FIXED_CAP, ap.by_class)
        figures[f"{title}: AP-fixed"] = ap.average_precision(truth, fixed)["AP"]
    if data.frequency:
        some = ap.frequency_precision(truth, kept, data.frequency)
        figures |= {f"{title}: {name}": value for name, value in some.items() if "," in name}
    return figures


def _averages(title: str, rows: Sequence[dict], values: Sequence[float]) -> Figures:
    """Averages over instances, over classes, over the instances of each split and of each size."""
    groups: dict[tuple, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        for key in ("class", "split", "size"):
            groups[key, row[key]].append(value)
    figures = {title: _mean(values)}
    figures[f"{title}, class average"] = _mean([_mean(some) for (key, _), some in groups.items() if key == "class"])
    for key, names in (("split", SPLITS), ("size", tuple(SIZES))):
        for name in names:
            figures[f"{title}, {name}"] = _mean(groups[key, name])
    return figures


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan
