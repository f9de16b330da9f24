"""OVSamOutput -> the instances that are kept, with masks in pixels of the image.

Arrays are numpy arrays or tensors, as those of the output are. Shapes: I instances of an image in the model output, n
kept ones, K phrases, h w the grid of the mask decoder, H W the image.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.arrays import (
    Array,
    along,
    count,
    descending,
    floats,
    full,
    highest,
    highest_by,
    integers,
    like,
    namespace,
    sigmoid,
    to_numpy,
)
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import certainty, mask_overlap
from ovsam.ops.nms import NMS, within
from ovsam.ops.text_labels import all_phrases, is_per_image

Words = Sequence[str] | Mapping[str, str]

TIE = 1e-4  # rounding of the scores of a word depends on the other words in its batch


@dataclass
class Asked:
    """The phrases queried on an image, and their labels (by default the phrases themselves).

    columns: indices of the phrases among those of all images, None for all in order; label_ids: label of each phrase.
    """

    phrases: list[str]
    labels: list[str]
    label_ids: list[int]
    columns: list[int] | None = None

    @classmethod
    def of(cls, text_labels: Words | Sequence[Words] | None, image: int, number: int) -> "Asked":
        """The text queries of an image; without names (embeddings alone) the names are numbers."""
        if text_labels is None:
            text_labels = [str(place) for place in range(number)]
        given: Any = text_labels
        own = given[image] if is_per_image(given) else given
        columns = None
        if is_per_image(text_labels):
            column_of = {phrase: column for column, phrase in enumerate(all_phrases(text_labels))}
            columns = [column_of[phrase] for phrase in own]
        elif len(own) != number:
            raise InputError(
                f"There are {len(own)} entries of text_labels; there must be one for each of the {number} text queries."
            )
        phrases = list(own)
        meant = list(own.values()) if isinstance(own, Mapping) else phrases
        labels = list(dict.fromkeys(meant))
        place = {label: i for i, label in enumerate(labels)}
        return cls(phrases, labels, [place[label] for label in meant], columns)

    def by_label(self, scores: Array) -> Array:
        """Scores of the phrases [n, K] -> scores of the labels: the highest over the synonyms of a label."""
        if len(self.labels) == len(self.phrases):
            return scores
        return highest_by(scores, like(scores, self.label_ids, "int64"), len(self.labels))


@dataclass
class Selection:
    """The n instances of one image that are kept: proposals by descending score, prompts in their own order.

    index: their indices among the I instances of the model; scores, mask_scores, objectness (None for prompts): [n];
    phrase_ids: [n], indices into asked.phrases, -1 without text queries; logits: [n, h, w]; topk: the labels of highest
    score of each; dropped: proposals with a higher score for a negative query; presence: for each label the highest
    score of the I instances.
    """

    asked: Asked
    index: Array
    scores: Array
    mask_scores: Array
    objectness: Array | None
    phrase_ids: Array
    logits: Array
    topk: list[list[list[Any]]]
    dropped: list[dict[str, Any]]
    presence: dict[str, float]

    @property
    def phrases(self) -> list[str | None]:
        return [self.asked.phrases[i] if i >= 0 else None for i in self.phrase_ids.tolist()]

    @property
    def labels(self) -> Array:
        """[n], indices into asked.labels, -1 without text queries."""
        return like(self.phrase_ids, [*self.asked.label_ids, -1], "int64")[self.phrase_ids]

    @property
    def text_labels(self) -> list[str | None]:
        return [self.asked.labels[i] if i >= 0 else None for i in self.labels.tolist()]

    def take(self, keep: Array) -> "Selection":
        """Select instances by index [m]."""
        return Selection(
            asked=self.asked,
            index=self.index[keep],
            scores=self.scores[keep],
            mask_scores=self.mask_scores[keep],
            objectness=None if self.objectness is None else self.objectness[keep],
            phrase_ids=self.phrase_ids[keep],
            logits=self.logits[keep],
            topk=[self.topk[i] for i in keep.tolist()],
            dropped=self.dropped,
            presence=self.presence,
        )


def select(
    outputs: Any,
    image: int,
    text_labels: Words | Sequence[Words] | None,
    threshold: float,
    nms: str | None = "fast",
    per_word: bool = False,
    rescore: bool = False,
    top_k: int = 5,
) -> Selection:
    """Select among the instances of one image; see OVSamProcessor.post_process_instance_segmentation.

    `outputs` is an OVSamOutput, or has its fields that are read here, as arrays.
    """
    proposed = outputs.objectness is not None
    xp = namespace(outputs.valid)
    index = xp.where(outputs.valid[image])[0]  # [I]
    objectness = floats(outputs.objectness[image, index]) if proposed else None

    asked, names, presence = Asked([], [], []), None, {}
    if outputs.scores is not None:
        asked = Asked.of(text_labels, image, outputs.scores.shape[-1])
    if asked.phrases:
        names = floats(outputs.scores[image, index])  # [I, K]
        names = names if asked.columns is None else names[:, asked.columns]
        score, phrase_ids = xp.amax(names, -1), names.argmax(-1)
        if len(index):
            best = asked.by_label(xp.amax(names, 0)[None])[0]
        else:
            best = like(names, [0.0] * len(asked.labels), "float32")
        presence = dict(zip(asked.labels, best.tolist(), strict=True))
    else:
        phrase_ids = xp.full_like(index, -1)
        score = objectness if proposed else floats(xp.ones_like(index))

    order, dropped = count(index, 0, len(index)), []
    if proposed:
        rank = objectness if outputs.everything else score
        order = xp.where(rank >= threshold)[0]
        if outputs.negative_scores is not None:
            against = floats(outputs.negative_scores[image, index[order]])
            unwanted, which = xp.amax(against, -1), against.argmax(-1)
            lost = unwanted >= score[order] - TIE
            columns = phrase_ids[order[lost]], score[order[lost]], which[lost], unwanted[lost]
            for phrase, own, word, other in zip(*(column.tolist() for column in columns), strict=True):
                label = asked.labels[asked.label_ids[phrase]] if phrase >= 0 else None
                negative = outputs.negative_labels[word]
                dropped.append({"text_label": label, "score": own, "negative": negative, "negative_score": other})
            order = order[~lost]
    logits, quality = best_masks(outputs, image, index[order])
    trust = quality.clip(0, 1) if rescore else xp.ones_like(quality)
    score = score[order] * trust
    if proposed:
        rank = objectness[order] * trust if outputs.everything else score
        decayed = rank * (logits > 0).any(-1).any(-1)
        if nms is not None:
            overlap = mask_overlap(logits > 0)
            overlap = within(overlap, phrase_ids[order]) if per_word else overlap
            decayed = NMS[nms](
                overlap, decayed, 1.0 if outputs.mask_nms_threshold is None else outputs.mask_nms_threshold
            )
        keep = descending(decayed)
        keep = keep[(decayed[keep] >= threshold) & (decayed[keep] > 0)]
        score = score * decayed / rank.clip(min=1e-12)
        order, score, logits, quality = order[keep], score[keep], logits[keep], quality[keep]
    return Selection(
        asked=asked,
        index=index[order],
        scores=score,
        mask_scores=quality,
        objectness=objectness[order] if proposed else None,
        phrase_ids=phrase_ids[order],
        logits=logits,
        topk=_topk(asked.by_label(names[order]), asked.labels, top_k) if names is not None else [[] for _ in order],
        dropped=dropped,
        presence=presence,
    )


def best_masks(outputs: Any, image: int, index: Array) -> tuple[Array, Array]:
    """The candidate mask with the highest predicted IoU of each instance, logits [n, h, w], and its predicted IoU
    [n]."""
    xp, masks = namespace(index), floats(outputs.pred_masks[image, index])  # [n, M, h, w]
    if outputs.iou_scores is None:  # masks of the ConceptHead: mean probability of their pixels
        return masks[:, 0], floats(certainty(masks[:, 0]))
    quality = floats(outputs.iou_scores[image, index])  # [n, M]
    best = quality.argmax(-1)
    return along(masks, best[:, None, None, None], 1)[:, 0], xp.amax(quality, -1)


@dataclass
class Canvas:
    """Size to which the grid of the mask decoder is enlarged: height and width in pixels. `share` is the part of the
    grid's width and height that shows the image; the rest is padding, which is removed."""

    height: int
    width: int
    share: tuple[float, float] = (1.0, 1.0)

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def enlarge(self, logits: Array, level: float) -> Iterator[tuple[tuple[slice, slice], Array]]:
        """Interpolate the logits [h, w] of each of n masks bilinearly where they can exceed `level`: yields the window
        of the canvas, rows and columns, and the values there. A window for each mask saves a hundred times the memory
        and the time for small objects in a large image."""
        (h, w), (across, down) = logits.shape[-2:], self.share
        for mask, (x1, y1, x2, y2) in zip(logits, integers(masks_to_boxes(logits > level)).tolist(), strict=True):
            rows = _reach(y1, y2, self.height / (h * down), self.height)
            columns = _reach(x1, x2, self.width / (w * across), self.width)
            wide = _lines(mask.T, w * across / self.width, columns).T  # [h, w] -> [h, columns]
            yield (rows, columns), _lines(wide, h * down / self.height, rows)


def enlarge(logits: Array, canvas: Canvas, mask_threshold: float) -> Array:
    """logits [n, h, w] -> masks [n, H, W] bool."""
    masks = full(logits, (len(logits), *canvas.size), False)
    level = _logit(mask_threshold)
    for mask, (window, values) in zip(masks, canvas.enlarge(logits, level), strict=True):
        mask[window] = values > level
    return masks


def enlarge_rle(logits: Array, canvas: Canvas, mask_threshold: float, owners: Array | None = None) -> list[rle.RLE]:
    """As `enlarge`, but to run lengths, in the memory of the largest mask.

    owners [H, W]: index of the one instance that each pixel belongs to; None if masks may overlap.
    """
    level = _logit(mask_threshold)
    segmentations = []
    for number, (window, values) in enumerate(canvas.enlarge(logits, level)):
        inside = values > level
        if owners is not None:
            inside &= owners[window] == number
        rows, columns = window
        segmentations.append(rle.encode(to_numpy(inside), columns.start, rows.start, canvas.size))
    return segmentations


def assign(
    logits: Array, scores: Array, canvas: Canvas, mask_threshold: float, by_pixel: bool
) -> tuple[Array, Array, Array]:
    """Assign each pixel to one of n instances.

    Args:
        logits: mask logits [n, h, w]; scores: [n].
        by_pixel: whether to assign by the highest product of score and pixel probability (MaskFormer, Cheng et al.
            2021, §3.4) instead of the highest score.

    Returns:
        owners [H, W], -1 without a mask; their value [H, W] (score, or product; 0 without a mask); areas [n] of the
        masks before the assignment.
    """
    level = _logit(mask_threshold)
    xp = namespace(logits)
    owners, values = full(logits, canvas.size, -1), floats(full(logits, canvas.size, -1.0))
    areas = full(logits, (len(logits),), 0)
    for number, (window, part) in enumerate(canvas.enlarge(logits, level)):
        inside = part > level
        areas[number] = inside.sum()
        weight = scores[number] * (sigmoid(part) if by_pixel else xp.ones_like(part))
        better = inside & (weight > values[window])
        values[window] = xp.where(better, weight, values[window])
        owners[window] = xp.where(better, number, owners[window])
    return owners, values.clip(min=0), areas


def describe(
    chosen: Selection, canvas: Canvas, mask_threshold: float = 0.5, exclusive: bool = False, run_lengths: bool = False
) -> dict[str, Any]:
    """The kept instances with their masks, as OVSamProcessor.post_process_instance_segmentation describes them."""
    owners, xp = None, namespace(chosen.scores)
    if exclusive:
        owners, _, _ = assign(chosen.logits, chosen.scores, canvas, mask_threshold, by_pixel=False)
        if chosen.objectness is not None:
            left = xp.where(areas_of(owners, len(chosen.scores)) > 0)[0]
            place = xp.full_like(chosen.index, -1)
            place[left] = count(left, 0, len(left))
            owners, chosen = look_up(place, owners, empty=-1), chosen.take(left)
    if run_lengths:
        masks: Any = enlarge_rle(chosen.logits, canvas, mask_threshold, owners)
        boxes = [[x, y, x + w, y + h] for x, y, w, h in map(rle.bbox, masks)]
        boxes = like(chosen.scores, boxes, "float32").reshape(-1, 4)
    else:
        if owners is None:
            masks = enlarge(chosen.logits, canvas, mask_threshold)
        else:
            masks = owners == count(owners, 0, len(chosen.scores))[:, None, None]
        boxes = masks_to_boxes(masks)
    return {
        "scores": chosen.scores,
        "labels": chosen.labels,
        "boxes": boxes,
        "masks": masks,
        "text_labels": chosen.text_labels,
        "phrases": chosen.phrases,
        "mask_scores": chosen.mask_scores,
        "objectness": chosen.objectness,
        "prompt_ids": chosen.index,
        "topk": chosen.topk,
        "presence": chosen.presence,
        "dropped": chosen.dropped,
    }


def areas_of(owners: Array, number: int) -> Array:
    """Number of pixels of each of `number` instances; owners [H, W], -1: none -> [number]."""
    return namespace(owners).bincount((owners + 1).reshape(-1), minlength=number + 1)[1:]


def look_up(values: Array, owners: Array, empty: int) -> Array:
    """Values [n] of the instances at their pixels, owners [H, W] (-1: none) -> [H, W]."""
    last = like(values, [empty], str(values.dtype).removeprefix("torch."))
    return namespace(values).concatenate([values, last])[owners]


def _reach(low: int, high: int, scale: float, length: int) -> slice:
    """The pixels that interpolation of cells low to high can change, where a cell is `scale` of the `length` pixels:
    the value of a cell extends to the centre of the next cell at most."""
    start = min(max(0, math.floor((low - 1) * scale)), length - 1)
    return slice(start, min(max(start + 1, math.ceil((high + 1) * scale)), length))


def _lines(values: Array, step: float, lines: slice) -> Array:
    """values [h, w], interpolated linearly like F.interpolate, at lines that are `step` apart."""
    place = floats(count(values, lines.start, lines.stop))
    place = ((place + 0.5) * step - 0.5).clip(0, len(values) - 1)
    low = integers(place)
    high = (low + 1).clip(max=len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)[:, None]


def _logit(probability: float) -> float:
    if probability <= 0 or probability >= 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))


def _topk(scores: Array, words: list[str], number: int) -> list[list[list[Any]]]:
    values, index = highest(scores, min(number, scores.shape[1]))
    return [
        [[words[i], round(v, 4)] for i, v in zip(row, value, strict=True)]
        for row, value in zip(index.tolist(), values.tolist(), strict=True)
    ]
