"""The tasks of an evaluation, with one JSON record for each image.

- `prompts`: each object by its box, by one click and by three clicks: masks and class names.
- `words`: present and absent class names as text queries: instances with scores.
- `everything`: the hundred masks of highest objectness, classified with all class names of the set.

Figures are computed from the records (`summary.py`), so that an evaluation can be interrupted and resumed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovsam.errors import InputError
from ovsam.evaluation.datasets import ABSENT_WORDS, COCO_IN_LVIS, EvalSet
from ovsam.evaluation.metrics import boundary_iou, next_click, rank
from ovsam.inference.encoded import EncodedImage
from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.geometry import maps_to_clip
from ovsam.ops import rle
from ovsam.ops.masks import deepest_point, mask_overlap
from ovsam.ops.scores import calibrated
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.results import Results

CLICKS = 3
MOST = 100  # maximum number of masks of everything
LARGE = "lvis"  # vocabulary for classification besides that of the set
AP_FLOOR = 0.02  # detections below this score, before calibration, have no effect on AP
PROMPTS = ("input_points", "input_labels", "input_boxes", "input_masks")
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # as in COCO, area in pixels
CROP_MARGIN = 0.1  # margin on each side, as a fraction of the box


@dataclass
class Names:
    """A vocabulary, and the column of each class of the set in it."""

    words: list[str]
    embeds: Tensor
    column: dict[int, int]


@dataclass
class Examiner:
    """Runs the tasks on the images of a data set.

    Args:
        absent: number of absent class names queried per image; None for all of them.
        baselines: whether the training-free baselines are evaluated as well.
    """

    segmenter: Segmenter
    data: EvalSet
    absent: int | None = ABSENT_WORDS
    baselines: bool = True
    names: Names = field(init=False)
    large: Names | None = field(init=False)

    def __post_init__(self):
        words = list(dict.fromkeys(self.data.words.values()))
        own = {i: words.index(word) for i, word in self.data.words.items()}
        self.names = Names(words, self.segmenter.embed(Vocabulary(words))[1], own)
        self.large = self._large_vocabulary()
        targets = self.data.synonyms
        self.synonym_embeds = self.segmenter.embed(Vocabulary(list(targets)))[1] if targets else None

    def _large_vocabulary(self) -> Names | None:
        vocabulary = Vocabulary(LARGE)
        place = {word: i for i, word in enumerate(vocabulary.prompts)}
        column = {i: place.get(COCO_IN_LVIS.get(word, word)) for i, word in self.data.words.items()}
        if None in column.values() or len(self.names.words) >= len(place):
            return None
        return Names(vocabulary.prompts, self.segmenter.embed(vocabulary)[1], column)

    @property
    def floor(self) -> float:
        return ap_floor(self.segmenter)

    @torch.no_grad()
    def ask(self, image_id: int, tasks: tuple[str, ...]) -> dict:
        """Return the record of one image; without objects only its id."""
        record: dict = {"image_id": image_id}
        objects, truth = self.data.objects(image_id)
        if not objects:
            return record
        info, path = self.data.coco.imgs[image_id], self.data.picture(image_id)
        picture, seconds = timed(lambda: self.segmenter.encode(path), self.segmenter)
        if picture.image.size != (info["width"], info["height"]):
            raise InputError(f"{path} has another size than its annotations; it must be the annotated image.")
        record["encode"] = {"seconds": seconds}
        questions: dict[str, Callable] = {"prompts": self.prompts, "words": self.words, "everything": self.everything}
        for task in tasks:
            record[task] = questions[task](picture, image_id, objects, truth)
        return record

    # ---- the three tasks ----------------------------------------------------------------------------------------

    def prompts(self, picture: EncodedImage, image_id: int, objects: list[dict], truth: np.ndarray) -> dict:
        """Return one row for each object: IoUs of its masks, rank of its class name, and those of the baselines."""
        names, data = self.names, self.data
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in objects)]
        points = [[list(one.get("point") or deepest_point(mask))] for one, mask in zip(objects, truth, strict=True)]
        labels = [[1] for _ in objects]
        boxed, seconds = timed(lambda: self.prompt(picture, names, input_boxes=[boxes]), self.segmenter)
        clicked = self.prompt(picture, names, input_points=[points], input_labels=[labels])
        outputs = {"box": boxed, "click": clicked}
        masks = {kind: self.masks(picture, output) for kind, output in outputs.items()}
        last = masks["click"]
        for _ in range(CLICKS - 1):
            for mine, kinds, (x, y, label) in zip(points, labels, map(next_click, last, truth), strict=True):
                mine.append([x, y])
                kinds.append(label)
            given = {"input_points": [points], "input_labels": [labels], "input_masks": clicked.pred_masks[:, :, 0]}
            clicked = self.prompt(picture, None, **given)
            last = self.masks(picture, clicked)
        masks["three clicks"] = last
        overlap = {kind: (found & truth).sum((1, 2)) / (found | truth).sum((1, 2)) for kind, found in masks.items()}

        target = self._target(names, objects)
        ranks = {kind: rank(output.logits[0], target) for kind, output in outputs.items()}
        if self.large is not None:
            output = self.prompt(picture, self.large, input_boxes=[boxes])
            ranks["box, large"] = rank(output.logits[0], self._target(self.large, objects))
        if self.baselines and picture.features.clip is not None:
            ranks |= self.crops(picture, boxed, boxes, target)
        best, name = boxed.scores[0].max(-1)
        return {
            "seconds": seconds,
            "objects": [
                {
                    "id": one["id"],
                    "class": one["category_id"],
                    "split": data.split[one["category_id"]],
                    "size": next(name for name, (low, high) in SIZES.items() if low <= one["area"] < high),
                    "iou": {kind: float(values[i]) for kind, values in overlap.items()},
                    "boundary": {kind: boundary_iou(masks[kind][i], truth[i]) for kind in masks},
                    "rank": {kind: int(values[i]) for kind, values in ranks.items()},
                    "score": float(best[i]),
                    "name": names.words[int(name[i])],
                    "mask": rle.encode(masks["box"][i]),
                }
                for i, one in enumerate(objects)
            ],
        }

    def words(self, picture: EncodedImage, image_id: int, objects: list[dict], truth: np.ndarray) -> dict:
        """Return instances of present and absent class names, down to the lowest score with an effect on AP."""
        data, names = self.data, self.names
        present = list(dict.fromkeys(one["category_id"] for one in objects))
        absent = data.absent(image_id, self.absent)
        asked = [names.words[names.column[i]] for i in present + absent]
        embeds = names.embeds[torch.tensor([names.column[i] for i in present + absent])]
        found, seconds = timed(lambda: ask(self.segmenter, picture, embeds, asked, self.floor), self.segmenter)
        class_of = dict(zip(asked, present + absent, strict=True))
        codes = [rle.encode(mask.cpu().numpy()) for mask in found["masks"]]
        rows = zip(found["text_labels"], found["scores"].tolist(), codes, strict=True)
        record = {
            "seconds": seconds,
            "present": present,
            "absent": absent,
            "found": [_detection(image_id, class_of[label], score, code) for label, score, code in rows],
        }
        if self.baselines and picture.features.clip is not None:
            plain = cast(
                Results,
                self.segmenter.where(picture, Vocabulary(asked), threshold=0.0, proposer="clip-dense", top_k=0),
            )
            record["clip-dense"] = [
                _detection(image_id, class_of[one.label], one.score, one.segmentation) for one in plain
            ]
        shown = {data.words[i] for i in present}
        hits = {}
        for i, (synonym, word) in enumerate(data.synonyms.items()):
            if word in shown:
                threshold = self.segmenter.model.config.score_threshold
                found = ask(self.segmenter, picture, self.synonym_embeds[i : i + 1], [synonym], threshold)
                own = torch.from_numpy(truth[[data.words[one["category_id"]] == word for one in objects]])
                best = mask_overlap(found["masks"][:1].cpu(), own)
                hits[synonym] = bool(best.numel() and best.max() > 0.5)
        if data.synonyms:
            record["synonyms"] = hits
        return record

    def everything(self, picture: EncodedImage, image_id: int, objects: list[dict], truth: np.ndarray) -> dict:
        """Return the highest IoU of each object with the masks of highest objectness, and their class names."""
        words = Vocabulary(self.names.words)
        found, seconds = timed(
            lambda: self.segmenter.everything(picture, words, objectness=0.0, top_k=0), self.segmenter
        )
        best = sorted(found, key=lambda one: -(one.objectness or 0.0))[:MOST]
        class_of = {self.names.words[column]: i for i, column in self.names.column.items()}
        overlap = rle.iou([one.segmentation for one in best], [rle.encode(mask) for mask in truth])  # [n, objects]
        return {
            "seconds": seconds,
            "iou": (overlap.max(0) if len(best) else np.zeros(len(truth))).tolist(),
            "size": [next(name for name, (low, high) in SIZES.items() if low <= one["area"] < high) for one in objects],
            "found": [
                _detection(image_id, class_of[one.label], one.score, one.segmentation)
                | {"kept": (one.objectness or 0.0) >= self.segmenter.model.config.objectness_threshold}
                for one in best
            ],
        }

    # ---- their steps --------------------------------------------------------------------------------------------

    def _target(self, names: Names, objects: list[dict]) -> Tensor:
        return torch.tensor([names.column[one["category_id"]] for one in objects], device=names.embeds.device)

    def crops(self, picture: EncodedImage, boxed, boxes: list[list[float]], target: Tensor) -> dict[str, Tensor]:
        """Ranks of the training-free baselines of Open-Vocabulary SAM (Table 1): class names by the frozen CLIP alone,
        from its features under the same masks (feature-crop), and from the image in the box (image-crop)."""
        features, words, model = picture.features, self.names.embeds, self.segmenter.model
        under = boxed.pred_masks[:, :, 0].sigmoid()
        under = maps_to_clip(under, features.clip_frame, model.sam.image_size, features.clip_size)
        ranks = {"feature-crop": rank(model.clip.pool(features.clip, masks=under)[0] @ words.T, target)}
        return ranks | {"image-crop": rank(self.image_crops(picture, boxes) @ words.T, target)}

    def image_crops(self, picture: EncodedImage, boxes: list[list[float]], side: int | None = None) -> Tensor:
        """Embeddings [P, D] by the frozen CLIP of the image in each box, with a margin around it, resized to the model
        input or to `side` pixels."""
        segmenter, clip = self.segmenter, self.segmenter.model.clip
        embeds = []
        for x1, y1, x2, y2 in boxes:
            dx, dy = CROP_MARGIN * (x2 - x1), CROP_MARGIN * (y2 - y1)
            left, top = int(max(x1 - dx, 0)), int(max(y1 - dy, 0))
            right, bottom = math.ceil(min(x2 + dx, picture.image.width)), math.ceil(min(y2 + dy, picture.image.height))
            crop = picture.image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            inputs = segmenter.processor(images=[crop])
            pixels = inputs.get("clip_pixel_values", inputs["pixel_values"]).to(segmenter.device, segmenter.dtype)
            if side is not None:
                pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
            whole = pixels.new_ones(1, 1, *pixels.shape[-2:])
            embeds.append(clip.pool(clip.encode_image(pixels), masks=whole)[0])
        return torch.cat(embeds)

    def prompt(self, picture: EncodedImage, names: Names | None, **prompts):
        """Return the model's output for prompts in pixels of the image."""
        size = (picture.image.height, picture.image.width)
        inputs = self.segmenter.processor(original_sizes=[size], **prompts)
        given = {name: inputs[name].to(self.segmenter.device) for name in PROMPTS if name in inputs}
        words = {} if names is None else {"text_embeds": names.embeds, "text_labels": names.words}
        return self.segmenter.model(features=picture.features, **words, **given)

    def masks(self, picture: EncodedImage, outputs) -> np.ndarray:
        """Return the masks [n, H, W] bool."""
        size = [(picture.image.height, picture.image.width)]
        found = self.segmenter.processor.post_process_instance_segmentation(outputs, target_sizes=size, top_k=0)
        return found[0]["masks"].cpu().numpy()


def ask(segmenter: Segmenter, picture: EncodedImage, embeds: Tensor, words: list[str], threshold: float) -> dict:
    """Return the instances of some text queries, in the form of the processor."""
    image, features = picture.image, picture.features
    proposals = min(threshold, segmenter.model.config.proposal_threshold)
    outputs = segmenter.model(features=features, text_embeds=embeds, text_labels=words, proposal_threshold=proposals)
    return segmenter.processor.post_process_instance_segmentation(
        outputs, threshold=threshold, target_sizes=[(image.height, image.width)], text_labels=words
    )[0]


def ap_floor(segmenter: Segmenter) -> float:
    """Return the lowest score with an effect on AP, after the model's calibration."""
    return float(calibrated(torch.tensor(AP_FLOOR), segmenter.model.config.score_calibration))


def timed(run: Callable, segmenter: Segmenter) -> tuple:
    """Return the result of a call, and its seconds."""
    wait = torch.cuda.synchronize if segmenter.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    value = run()
    wait()
    return value, time.perf_counter() - start


def _detection(image_id: int, class_id: int, score: float, code: rle.RLE) -> dict:
    return {"image_id": image_id, "category_id": class_id, "score": round(score, 6), "segmentation": code}
