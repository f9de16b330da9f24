"""`ovsam eval` and `ovsam compare`: the figures of models on a COCO-style set.

The frozen sets (scenes/freeze.py) come with clicks, absent words and synonyms. For any other COCO json the click is the
pixel deepest inside the mask, absent words are drawn from its categories, and there are no synonyms.

Definitions: IoU is per instance, at the picture's resolution, averaged over instances (Open-Vocabulary SAM's IoU_b and
IoU_n). A name counts if the right word is the best (top-1) or among the best five of *all* words of the set. Words ->
masks: each picture is asked for the words it holds and for its absent words; AP is pycocotools' mask AP, a category per
word, over all words that some picture holds, so that an absent word that fires there is a false positive. An absent
word fires if it returns anything at the default threshold. A synonym finds its object in a picture if the best instance
returned at the default threshold overlaps an object of the target word by an IoU above one half.
"""

import contextlib
import io
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm

from ovsam.errors import InputError
from ovsam.frames import maps_to_clip
from ovsam.results import write_whole
from ovsam.scenes.freeze import deepest_point
from ovsam.segmenter import Segmenter, load
from ovsam.vocabulary import Vocabulary

PROMPTS = ("input_points", "input_labels", "input_boxes")
AP_FLOOR = 0.02  # detections below this score cannot move AP
COMPARED = (
    "box: mean IoU",
    "click: mean IoU",
    "name (box): top-1",
    "name (box): top-5",
    "words -> masks: AP50",
    "words -> masks: AP",
    "absent words that return anything",
)
DECISIVE = ("name (box): top-1", "words -> masks: AP50")
MARGIN = 0.01  # less is no difference
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # COCO's, in pixels of area


def run_eval(model="ovsam-tiny", data="tests/data/emojiscenes-val", json_path=None, limit=None) -> dict[str, float]:
    """Measure, print the table, write the figures as json if asked; returns {figure: value}."""
    annotations = Path(data) / "annotations.json"
    if not annotations.is_file():
        raise InputError(f"{data} is no test set: it has no annotations.json (tests/data/emojiscenes-val has).")
    segmenter, coco = load(model), open_coco(annotations)
    figures = measure(segmenter, coco, Path(data), limit)
    figures |= measure_time(segmenter, coco, Path(data))
    print(f"\n{segmenter.name} on {data}, {min(limit or 10**9, len(coco.imgs))} pictures\n")
    for name, value in figures.items():
        print(f"{name:<58}{value:>9.3f}")
    if json_path:
        _write_json(json_path, {name: round(value, 4) for name, value in figures.items()})
    return figures


def run_compare(base, tuned, data, images=None, json_path=None, limit=None, device=None) -> bool:
    """Measure two models on a COCO json and print their figures side by side.

    Returns:
        whether the second beats the first: it names masks better or finds words better, and does neither worse.

    Raises:
        InputError: no such model, json or folder.
    """
    coco = open_coco(Path(data))
    folder = Path(images) if images is not None else Path(data).parent
    figures = []
    for name in (base, tuned):
        segmenter = load(name, device=device)
        figures.append(measure(segmenter, coco, folder, limit))
    before, after = figures
    print(f"\n{min(limit or 10**9, len(coco.imgs))} pictures of {data}\nbase: {base}\ntuned: {tuned}\n")
    print(f"{'':<40}{'base':>9}{'tuned':>9}{'change':>9}")
    for name in COMPARED:
        print(f"{name:<40}{before[name]:>9.3f}{after[name]:>9.3f}{after[name] - before[name]:>+9.3f}")
    changes = {name: after[name] - before[name] for name in DECISIVE}
    gained = [name for name, change in changes.items() if change >= MARGIN]
    lost = [name for name, change in changes.items() if change <= -MARGIN]
    better = bool(gained) and not lost
    print(f"\nThe tuned model {'beats' if better else 'does not beat'} the base: of {' and '.join(DECISIVE)},")
    print(f"better is {', '.join(gained) or 'neither'}, worse is {', '.join(lost) or 'neither'} (by {MARGIN} or more).")
    if json_path:
        _write_json(json_path, {str(base): before, str(tuned): after})
    return better


def open_coco(annotations: Path) -> COCO:
    """Raises InputError for what is missing or no COCO json."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(annotations))
    except FileNotFoundError as error:
        raise InputError(f"There is no file {annotations}; name a COCO json.") from error
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise InputError(f"{annotations} is no COCO json of instances: {error}.") from error
    if not coco.anns or not coco.cats:
        raise InputError(f"{annotations} has no annotation or no category, so there is nothing to measure.")
    for annotation in coco.anns.values():  # hand-made files often lack what pycocotools needs
        annotation.setdefault("iscrowd", 0)
        if annotation.get("segmentation") and not {"area", "bbox"} <= annotation.keys():
            code = coco.annToRLE(annotation)
            annotation.setdefault("area", float(rle.area(code)))
            annotation.setdefault("bbox", rle.toBbox(code).tolist())
    return coco


def _write_json(path, content) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_whole(Path(path), lambda temporary: temporary.write_text(text))


@torch.no_grad()
def measure(segmenter: Segmenter, coco: COCO, folder: Path, limit: int | None = None) -> dict[str, float]:
    """Accuracy figures of one model on one set."""
    words_of = {i: coco.cats[i]["name"].strip() for i in sorted(coco.cats)}  # category -> word
    category = {word: i for i, word in words_of.items()}
    names = list(category)
    column = {i: names.index(word) for i, word in words_of.items()}
    _, all_words = segmenter.embed(Vocabulary(names))
    synonyms = coco.dataset.get("synonyms", {})
    synonym_embeds = segmenter.embed(Vocabulary(list(synonyms)))[1] if synonyms else None
    rows: list[dict] = []  # one per object
    detections: list[dict] = []
    absent_fired, absent_asked = 0, 0
    synonym_hits: dict[str, list[float]] = defaultdict(list)
    threshold = segmenter.model.config.score_threshold
    image_ids = sorted(coco.imgs)[:limit]
    for image_id in tqdm(image_ids, desc="evaluating"):
        info = coco.imgs[image_id]
        objects, truth = true_objects(coco, image_id)
        if not objects:
            continue
        picture = segmenter.encode(folder / info["file_name"])
        if picture[0].size != (info["width"], info["height"]):
            raise InputError(f"{folder / info['file_name']} has not the size that its annotations are for.")
        rows += prompt_figures(segmenter, picture, objects, truth, all_words, coco, column)

        present = list(dict.fromkeys(words_of[a["category_id"]] for a in objects))
        absent = info.get("absent_words")
        if absent is None:
            here = {words_of[i] for i in coco.getCatIds() if coco.getAnnIds(image_id, i)}
            absent = draw_absent([name for name in names if name not in here], image_id)
        words = present + absent
        index = torch.tensor([names.index(word) for word in words])
        found = ask(segmenter, picture, all_words[index], words, AP_FLOOR)
        for score, label, mask in zip(found["scores"].tolist(), found["text_labels"], found["masks"], strict=True):
            code = rle.encode(np.asfortranarray(mask.cpu().numpy()))
            where = {"image_id": image_id, "category_id": category[label]}
            detections.append({**where, "score": score, "segmentation": code})
        fired = {w for w, s in zip(found["text_labels"], found["scores"].tolist(), strict=True) if s >= threshold}
        absent_fired += len(fired & set(absent))
        absent_asked += len(absent)

        for i, (synonym, target) in enumerate(synonyms.items()):
            if target in present:
                found = ask(segmenter, picture, synonym_embeds[i : i + 1], [synonym], threshold)
                own = truth[[words_of[a["category_id"]] == target for a in objects]]
                hit = len(found["masks"]) and iou(found["masks"][:1].cpu().numpy(), own).max() > 0.5
                synonym_hits[synonym].append(float(hit))

    figures = summarise(rows)
    figures |= average_precision(coco, detections, image_ids)
    figures["absent words that return anything"] = absent_fired / max(absent_asked, 1)
    found_share = [float(np.mean(hits)) for hits in synonym_hits.values()]
    figures["synonyms that find their object"] = float(np.mean(found_share or [0.0]))
    return figures


def true_objects(coco: COCO, image_id: int) -> tuple[list[dict], np.ndarray]:
    """Annotations of single things with pixels, and their masks [n, H, W] bool."""
    annotations = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
    objects, masks = [], []
    for annotation in annotations:
        mask = coco.annToMask(annotation).astype(bool) if annotation.get("segmentation") else np.zeros((1, 1), bool)
        if mask.any():
            objects.append(annotation)
            masks.append(mask)
    return objects, np.stack(masks) if masks else np.zeros((0, 1, 1), bool)


def draw_absent(words: list[str], seed: int, count: int = 20) -> list[str]:
    """Some of the words that a picture does not show, always the same ones for a picture."""
    rng = np.random.default_rng(seed)
    return [words[i] for i in rng.permutation(len(words))[:count]]


def prompt_figures(
    segmenter, picture, objects, truth: np.ndarray, all_words: Tensor, coco: COCO, column: dict[int, int]
) -> list[dict]:
    """One row per object: IoU of its box's and of its click's mask, the rank of its name, and the baseline's. `column`
    is the place of each category among all words."""
    image, features = picture
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]
    points = [[list(a.get("point") or deepest_point(mask))] for a, mask in zip(objects, truth, strict=True)]
    size = [(image.height, image.width)]
    by_kind = {}
    clicks = {"input_points": [points], "input_labels": [[[1]] * len(points)]}
    for kind, prompt in (("box", {"input_boxes": [boxes]}), ("click", clicks)):
        inputs = segmenter.processor(images=image, **prompt)
        given = {k: inputs[k].to(all_words.device) for k in PROMPTS if k in inputs}
        by_kind[kind] = segmenter.model(features=features, text_embeds=all_words, **given)
    overlap = {}
    for kind, outputs in by_kind.items():
        found = segmenter.processor.post_process_instance_segmentation(outputs, target_sizes=size)[0]
        masks = found["masks"].cpu().numpy()
        overlap[kind] = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))

    target = torch.tensor([column[a["category_id"]] for a in objects], device=all_words.device)
    ranks = {kind: rank(outputs.logits[0], target) for kind, outputs in by_kind.items()}
    if features.clip is not None:
        # The training-free baseline: the frozen CLIP's own features, averaged under the same masks (feature-crop).
        masks = by_kind["box"].pred_masks[:, :, 0].sigmoid()
        masks = maps_to_clip(masks, features.clip_frame, segmenter.model.sam.image_size, features.clip_size)
        ranks["feature-crop"] = rank(segmenter.model.clip.pool(features.clip, masks=masks)[0] @ all_words.T, target)
    return [
        {
            "split": coco.cats[a["category_id"]].get("split", "base"),
            "size": next(name for name, (low, high) in SIZES.items() if low <= a["area"] < high),
            "iou": {kind: values[i] for kind, values in overlap.items()},
            "rank": {kind: int(values[i]) for kind, values in ranks.items()},
        }
        for i, a in enumerate(objects)
    ]


def ask(segmenter: Segmenter, picture, embeds: Tensor, words: list[str], threshold: float) -> dict:
    """The instances of some words, as the processor gives them."""
    image, features = picture
    proposals = min(threshold, segmenter.model.config.proposal_threshold)
    outputs = segmenter.model(features=features, text_embeds=embeds, proposal_threshold=proposals)
    return segmenter.processor.post_process_instance_segmentation(
        outputs, threshold=threshold, target_sizes=[(image.height, image.width)], text_labels=words
    )[0]


def rank(logits: Tensor, target: Tensor) -> Tensor:
    """logits [n, K], target [n] -> how many words score higher than the right one, [n]."""
    return (logits > logits.gather(1, target[:, None])).sum(1)


def iou(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n, H, W], [m, H, W] bool -> [n, m]"""
    a, b = masks.reshape(len(masks), -1).astype(np.float32), others.reshape(len(others), -1).astype(np.float32)
    shared = a @ b.T
    return shared / np.maximum(a.sum(1)[:, None] + b.sum(1)[None] - shared, 1)


def summarise(rows: list[dict]) -> dict[str, float]:
    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    figures = {}
    for kind in ("box", "click"):
        figures[f"{kind}: mean IoU"] = mean([r["iou"][kind] for r in rows])
        for split in ("base", "novel"):
            figures[f"{kind}: mean IoU, {split}"] = mean([r["iou"][kind] for r in rows if r["split"] == split])
        for size in SIZES:
            figures[f"{kind}: mean IoU, {size}"] = mean([r["iou"][kind] for r in rows if r["size"] == size])
    for kind in ("box", "click", "feature-crop"):
        for top in (1, 5):
            figures[f"name ({kind}): top-{top}"] = mean([r["rank"][kind] < top for r in rows if kind in r["rank"]])
            for split in ("base", "novel"):
                hits = [r["rank"][kind] < top for r in rows if r["split"] == split and kind in r["rank"]]
                figures[f"name ({kind}): top-{top}, {split}"] = mean(hits)
    for size in SIZES:
        hits = [r["rank"]["box"] < 1 for r in rows if r["split"] == "base" and r["size"] == size]
        figures[f"name (box): top-1, base, {size}"] = mean(hits)
    return figures


def average_precision(coco: COCO, detections: list[dict], image_ids: list[int]) -> dict[str, float]:
    """Mask AP over all words that some picture holds, and over the base and the novel ones."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes(detections) if detections else COCO()
    held = {a["category_id"] for a in coco.loadAnns(coco.getAnnIds(image_ids))}
    figures = {}
    for split in ("all", "base", "novel"):
        chosen = sorted(i for i in held if split in ("all", coco.cats[i].get("split", "base")))
        suffix = "" if split == "all" else f", {split}"
        if not detections or not chosen:
            figures |= {f"words -> masks: AP50{suffix}": 0.0, f"words -> masks: AP{suffix}": 0.0}
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(coco, results, "segm")
            evaluation.params.imgIds, evaluation.params.catIds = image_ids, chosen
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = evaluation.stats
        figures |= {f"words -> masks: AP50{suffix}": float(stats[1]), f"words -> masks: AP{suffix}": float(stats[0])}
        if split == "all":
            figures |= {f"words -> masks: AP, {s}": float(v) for s, v in zip(SIZES, stats[3:6], strict=True)}
    return figures


@torch.no_grad()
def measure_time(segmenter: Segmenter, coco: COCO, folder: Path, repeats: int = 7) -> dict[str, float]:
    """Median seconds of the whole model on the set's first picture: image encoder, words, proposals and refinement."""
    model, processor = segmenter.model, segmenter.processor
    first = min(coco.imgs)
    present = dict.fromkeys(coco.cats[a["category_id"]]["name"] for a in coco.loadAnns(coco.getAnnIds(first)))
    words = [*present, *coco.imgs[first]["absent_words"]][:10]
    inputs = processor(images=Image.open(folder / coco.imgs[first]["file_name"]), text=words)
    pixels = inputs["pixel_values"]
    # 20,000 cached embeddings: the first word's, and directions that no picture has.
    one = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])[:1]
    noise = torch.randn(19_999, one.shape[1], generator=torch.Generator().manual_seed(0))
    many = torch.cat([one, torch.nn.functional.normalize(noise, dim=-1)])

    def seconds(**question) -> float:
        times = []
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            model(pixel_values=pixels, **question)
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))

    return {
        "seconds per picture with 10 words": seconds(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ),
        # More words find more things, and each is refined; naming everything does the same work after the words.
        "20,000 words / 1 word, model time": seconds(text_embeds=many) / seconds(text_embeds=one),
        "20,000 words / 1 word, naming everything": seconds(text_embeds=many, everything=True)
        / seconds(text_embeds=one, everything=True),
        "threads": float(torch.get_num_threads()),
    }
