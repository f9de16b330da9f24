"""OVSamProcessor: pictures, words and prompts -> tensors; OVSamOutput -> masks with names, in the picture's pixels."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import BatchFeature
from transformers.models.sam2.processing_sam2 import Sam2Processor

from ovsam.errors import InputError
from ovsam.modeling.geometry import square_window
from ovsam.modeling.outputs import OVSamOutput
from ovsam.modeling.remote_code import auto_map, write_shim
from ovsam.ops import rle
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.segments import segments_of
from ovsam.processing.postprocessing import (
    Canvas,
    Selection,
    Words,
    all_phrases,
    assign,
    enlarge,
    enlarge_rle,
    is_per_image,
    select,
)
from ovsam.processing.vocabulary import check_text_length

PADDING_LABEL = -10  # of a point that is not there


class OVSamProcessor(Sam2Processor):
    """SAM 2's processor (image and coordinates) with a tokenizer, and a second image processor where CLIP needs one.

    Args:
        image_processor: makes the model's square input: a squash as in SAM 2, or with a `longest_edge` in its size, as
            SAM 1's, the picture in its own proportions, padded at the right or the bottom.
        tokenizer: of the CLIP side's text tower.
        clip_images: configuration of the stock image processor of a CLIP tower whose geometry differs, such as
            {"image_processor_type": "CLIPImageProcessor", "size": ...}; None where both sides share theirs. It must
            squash the whole picture, or pad it to a square as OWLv2's.
        max_text_length: tokens that the text tower reads; text_padding: "longest", or "max_length" for towers that were
            trained to read their padding (SigLIP).
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        clip_images: dict | None = None,
        target_size: int | None = None,
        point_pad_value: int = PADDING_LABEL,
        max_text_length: int = 64,
        text_padding: str = "longest",
        **kwargs,
    ):
        # Past Sam2Processor.__init__, whose signature has no tokenizer.
        super(Sam2Processor, self).__init__(image_processor, tokenizer, **kwargs)
        self.point_pad_value = point_pad_value
        self.target_size = target_size or image_processor.size["longest_edge" if self.pads else "height"]
        self.clip_images = clip_images
        self.max_text_length = max_text_length
        self.text_padding = text_padding

    @property
    def pads(self) -> bool:
        """Is the model input a padded picture (SAM 1), not a squashed one (SAM 2)?"""
        return bool(getattr(self.image_processor.size, "longest_edge", None))

    def picture_share(self, height: int, width: int) -> tuple[float, float]:
        """Which part of the model input's width and height shows a picture of height x width pixels; the rest is
        padding."""
        if not self.pads:
            return 1.0, 1.0
        scale = self.target_size / max(height, width)
        return int(width * scale + 0.5) / self.target_size, int(height * scale + 0.5) / self.target_size

    def _normalize_coordinates(self, target_size: int, coords: Tensor, original_size, is_bounding_box=False) -> Tensor:
        """Coordinates [..., 2] (or boxes [..., 4]) in pixels of a picture (height, width) -> of the model input."""
        height, width = (int(side) for side in original_size)
        across, down = self.picture_share(height, width)
        scale = torch.tensor([across * target_size / width, down * target_size / height])
        return coords.float() * (scale.repeat(2) if is_bounding_box else scale)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> list[str]:
        write_shim(save_directory)
        self.auto_map = auto_map(AutoProcessor=type(self).__name__)
        files = super().save_pretrained(save_directory, *args, **kwargs)
        del self.auto_map
        return files

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Remote code is one shim file beside the weights (see hub/); transformers must not copy our sources."""

    def __call__(
        self,
        images=None,
        text: str | Words | list[Words] | None = None,
        negative_text: str | list[str] | None = None,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        input_masks: Tensor | None = None,
        original_sizes=None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one picture or a list of B.
            text: words for all images; or words per image, each answered for its own only, as if it were alone. Words
                are a list, or a mapping of phrases to the labels they stand for: {"a pedestrian": "person", ...}.
            negative_text: words for all images whose things are not wanted.
            input_points: [image][prompt][point][x, y] in the picture's pixels; input_labels likewise without [x, y].
            input_boxes: [image][prompt][x1, y1, x2, y2] in the picture's pixels. Images may differ in how many prompts
                they have: the shorter are padded, and post-processing drops the padding again.
            input_masks: logits [B, P, H/4, W/4] of the model input.

        Returns:
            the arguments of OVSamModel. `original_sizes` are the `target_sizes` of post-processing. Negative words are
            tokenised after the words.

        Raises:
            InputError: an empty word, a phrase the text tower cannot read whole, lists of words that are not one per
                image.
        """
        input_boxes, counts = _pad_boxes(input_boxes)
        encoded = super().__call__(
            images=images,
            input_points=input_points,
            input_labels=input_labels,
            input_boxes=input_boxes,
            original_sizes=original_sizes,
            return_tensors=return_tensors,
            **kwargs,
        )
        if counts is not None:
            encoded["prompt_counts"] = torch.tensor(counts)
        elif input_points is not None:
            encoded["prompt_counts"] = (encoded["input_points"] != self.point_pad_value).any(-1).any(-1).sum(-1)
        if images is not None and self.clip_images is not None:
            kind = getattr(transformers, self.clip_images["image_processor_type"])
            clip = kind(**self.clip_images)(images, return_tensors=return_tensors)
            encoded["clip_pixel_values"] = clip["pixel_values"]
            if self.pads or self.clip_images.get("do_pad"):
                encoded["clip_window"] = self._clip_window(encoded["original_sizes"])
        if input_masks is not None:
            encoded["input_masks"] = input_masks
        words: list[str] = []
        if text is not None:
            text_labels = [text] if isinstance(text, str) else text
            text_labels = dict(text_labels) if isinstance(text_labels, Mapping) else list(text_labels)
            if is_per_image(text_labels) and not _fits(text_labels, len(encoded["original_sizes"])):
                raise InputError(f"Words per image are one list for each image, all of them lists; got {text_labels}.")
            encoded["text_labels"], words = text_labels, all_phrases(text_labels)
        if negative_text is not None:
            negatives = [negative_text] if isinstance(negative_text, str) else list(negative_text)
            encoded["negative_labels"], words = negatives, words + negatives
        if text is not None or negative_text is not None:
            encoded.update(self.tokenize(words))
        encoded.pop("reshaped_input_sizes", None)  # SAM 1's; this processor computes it from the original size
        return BatchFeature(encoded)

    def _clip_window(self, sizes: Tensor) -> Tensor:
        """The rectangle that CLIP's input covers in each model input, [B, 4] in fractions of the latter."""
        rows = []
        for height, width in sizes.tolist():
            across, down = self.picture_share(height, width)
            x1, y1, x2, y2 = square_window(height, width) if self.clip_images.get("do_pad") else (0.0, 0.0, 1.0, 1.0)
            rows.append([x1 * across, y1 * down, x2 * across, y2 * down])
        return torch.tensor(rows)

    def mask_prompts(self, masks: Tensor, size: int) -> Tensor:
        """Masks [n, H, W], bool or logits, over one picture -> input_masks [1, n, size / 4, size / 4], logits."""
        if masks.ndim != 3:
            raise InputError(f"Masks are [n, H, W], one for each object; got {list(masks.shape)}.")
        logits = torch.where(masks, 10.0, -10.0) if masks.dtype == torch.bool else masks.float()
        across, down = self.picture_share(*masks.shape[1:])
        grid = round(down * size / 4), round(across * size / 4)
        logits = F.interpolate(logits[None], grid, mode="bilinear", antialias=True)
        return F.pad(logits, (0, size // 4 - grid[1], 0, size // 4 - grid[0]), value=-10.0)

    def tokenize(self, phrases: list[str]) -> dict[str, Tensor]:
        """Phrases -> input_ids and attention_mask [K, T]."""
        if not phrases:
            raise InputError("The list of words is empty; pass at least one word.")
        for phrase in phrases:
            if not isinstance(phrase, str) or not phrase.strip():
                raise InputError(f"{phrase!r} is no word; a word is a string that is not empty.")
        lengths = [len(ids) for ids in self.tokenizer(phrases, truncation=False)["input_ids"]]
        check_text_length(phrases, lengths, self.max_text_length)
        tokens = self.tokenizer(
            phrases, padding=self.text_padding, max_length=self.max_text_length, return_attention_mask=True
        )
        return {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}

    def post_process_instance_segmentation(
        self,
        outputs: OVSamOutput,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        target_sizes: Tensor | list[tuple[int, int]] | None = None,
        text_labels: Words | list[Words] | None = None,
        top_k: int = 5,
        nms: str | None = "fast",
        per_word: bool = False,
        rescore: bool = False,
        exclusive: bool = False,
        return_coco_annotation: bool = False,
    ) -> list[dict[str, Any]]:
        """
        Args:
            outputs: of OVSamModel.
            threshold: minimum score of a proposal, or minimum objectness in everything mode; prompts always give their
                mask. By default the threshold of the checkpoint.
            mask_threshold: least probability of a pixel.
            target_sizes: (height, width) per image; the mask decoder's own grid if not given.
            text_labels: other names for the words; by default those of the processor's input, which the outputs carry.
            top_k: how many names per instance.
            nms: how proposals whose masks overlap are thinned out: a key of ovsam.ops.nms.NMS, None for not at all.
            per_word: an instance of one word leaves those of other words alone.
            rescore: scores are multiplied by the predicted IoU of the mask (YOLACT++, Bolya et al. 2020, §6.1).
            exclusive: a pixel belongs to one instance, that of the highest score; proposals left with none go.
            return_coco_annotation: masks as COCO's run lengths, one dict an instance; dense masks of many instances in
                a large picture do not fit into memory.

        Returns:
            per image a dict of scores [n], labels [n] (index into the image's labels, -1 without words), text_labels
            and phrases [n] (the label, and the phrase that stands for it), boxes [n, 4] xyxy, masks [n, H, W] bool,
            mask_scores [n], objectness [n] (None for prompts), prompt_ids [n] (index of the prompt or proposal) and
            topk [n] of [[label, score], ...]; best first for proposals, in the prompts' order for prompts. Besides,
            presence, {label: its best score}, before anything is left out; and dropped, the proposals that looked more
            like a negative word: dicts of text_label, score, negative, negative_score.
        """
        options = {"nms": nms, "per_word": per_word, "rescore": rescore, "top_k": top_k}
        results = []
        for chosen, canvas in self._choose(outputs, target_sizes, text_labels, threshold, **options):
            owners = None
            if exclusive:
                owners, _, _ = assign(chosen.logits, chosen.scores, canvas, mask_threshold, by_pixel=False)
                if chosen.objectness is not None:
                    left = _areas(owners, len(chosen.scores)).nonzero()[:, 0]
                    place = torch.full_like(chosen.index, -1)
                    place[left] = torch.arange(len(left), device=place.device)
                    owners, chosen = _look_up(place, owners, empty=-1), chosen.take(left)
            if return_coco_annotation:
                masks = enlarge_rle(chosen.logits, canvas, mask_threshold, owners)
                boxes = [[x, y, x + w, y + h] for x, y, w, h in map(rle.bbox, masks)]
                boxes = torch.tensor(boxes, device=chosen.scores.device).reshape(-1, 4)
            else:
                if owners is None:
                    masks = enlarge(chosen.logits, canvas, mask_threshold)
                else:
                    masks = owners == torch.arange(len(chosen.scores), device=owners.device)[:, None, None]
                boxes = masks_to_boxes(masks)
            results.append(
                {
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
            )
        return results

    def post_process_semantic_segmentation(
        self,
        outputs: OVSamOutput,
        target_sizes: Tensor | list[tuple[int, int]] | None = None,
        text_labels: Words | list[Words] | None = None,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        return_scores: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """Which label each pixel has: that of the instance whose score times the pixel's probability is the largest
        (MaskFormer, Cheng et al. 2021, §3.4, with the maximum over instances for their sum, since ours may be
        duplicates). Arguments as in `post_process_instance_segmentation`.

        Returns:
            per image a map [H, W] of indices into the image's labels, -1 where there is none of them; with
            `return_scores` also a list of those products [H, W], 0 where there is none.
        """
        maps, scores = [], []
        for chosen, canvas in self._choose(outputs, target_sizes, text_labels, threshold, nms=None):
            owners, values, _ = assign(chosen.logits, chosen.scores, canvas, mask_threshold, by_pixel=True)
            maps.append(_look_up(chosen.labels, owners, empty=-1))
            scores.append(values)
        return (maps, scores) if return_scores else maps

    def post_process_panoptic_segmentation(
        self,
        outputs: OVSamOutput,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: Tensor | list[tuple[int, int]] | None = None,
        text_labels: Words | list[Words] | None = None,
        nms: str | None = "fast",
    ) -> list[dict[str, Any]]:
        """As Mask2Former's method of this name: pixels as in `post_process_semantic_segmentation`, instances apart.

        Args:
            overlap_mask_area_threshold: an instance that keeps no more than this share of its mask goes.
            label_ids_to_fuse: labels whose instances are one segment, such as those of sky and grass.

        Returns:
            per image a dict of segmentation [H, W] int32, the segment's id or 0, and segments_info: dicts of id, from 1
            on, label_id, label, was_fused and score (of a fused segment its best).
        """
        results = []
        for chosen, canvas in self._choose(
            outputs,
            target_sizes,
            text_labels,
            threshold,
            nms=nms,
        ):
            owners, _, areas = assign(chosen.logits, chosen.scores, canvas, mask_threshold, by_pixel=True)
            left = _areas(owners, len(areas))
            kept = (left > overlap_mask_area_threshold * areas).tolist()
            ids, segments = segments_of(
                chosen.labels.tolist(), chosen.text_labels, chosen.scores.tolist(), kept, label_ids_to_fuse
            )
            segmentation = _look_up(torch.tensor(ids, dtype=torch.int32, device=owners.device), owners, empty=0)
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def post_process_grounded_object_detection(
        self,
        outputs: OVSamOutput,
        threshold: float | None = None,
        target_sizes: Tensor | list[tuple[int, int]] | None = None,
        text_labels: Words | list[Words] | None = None,
        nms: str | None = "fast",
    ) -> list[dict[str, Any]]:
        """As the processors of OWLv2 and Grounding DINO: the boxes of `post_process_instance_segmentation`'s instances.

        Returns:
            per image a dict of scores [n], labels [n], boxes [n, 4] xyxy as they were proposed (in the picture's
            pixels; without target_sizes in fractions of the model input) and text_labels [n].
        """
        results = []
        given = target_sizes, text_labels, threshold
        for image, (chosen, canvas) in enumerate(self._choose(outputs, *given, nms=nms)):
            boxes = outputs.pred_boxes[image, chosen.index].float() / self.target_size
            boxes = (boxes / boxes.new_tensor(canvas.share).repeat(2)).clamp(0, 1)
            if target_sizes is not None:
                boxes = boxes * boxes.new_tensor([canvas.width, canvas.height]).repeat(2)
            results.append(
                {
                    "scores": chosen.scores,
                    "labels": chosen.labels,
                    "boxes": boxes,
                    "text_labels": chosen.text_labels,
                }
            )
        return results

    def _choose(
        self, outputs: OVSamOutput, target_sizes, text_labels, threshold, **options
    ) -> Iterator[tuple[Selection, Canvas]]:
        """For each image the instances that are kept, and what their masks are to be enlarged to."""
        for image in range(len(outputs.pred_masks)):
            chosen = select(
                outputs,
                image,
                outputs.text_labels if text_labels is None else text_labels,
                (outputs.score_threshold or 0.0) if threshold is None else threshold,
                **options,
            )
            yield chosen, self._canvas(outputs, image, target_sizes)

    def _canvas(self, outputs: OVSamOutput, image: int, target_sizes) -> Canvas:
        """What an image's masks are enlarged to: the size that was asked for, or the mask decoder's own grid."""
        if target_sizes is None:
            return Canvas(*outputs.pred_masks.shape[-2:])
        height, width = (int(side) for side in target_sizes[image])
        return Canvas(height, width, self.picture_share(height, width))


def _pad_boxes(boxes) -> tuple[Any, list[int] | None]:
    """Boxes per image, padded to one length with an empty box; and how many each image had."""
    if boxes is None:
        return None, None
    if isinstance(boxes, Tensor):
        return boxes, [boxes.shape[1]] * boxes.shape[0]
    counts = [len(row) for row in boxes]
    return [[*row, *[[0.0, 0.0, 1.0, 1.0]] * (max(counts) - len(row))] for row in boxes], counts


def _fits(text_labels, images: int) -> bool:
    return len(text_labels) == images and not any(isinstance(row, str) for row in text_labels)


def _areas(owners: Tensor, count: int) -> Tensor:
    """How many pixels each of `count` instances owns; owners [H, W], -1: none -> [count]."""
    return (owners + 1).flatten().bincount(minlength=count + 1)[1:]


def _look_up(values: Tensor, owners: Tensor, empty: int) -> Tensor:
    """values [n] of the instances that own the pixels, owners [H, W] (-1: none) -> [H, W]."""
    return torch.cat([values, values.new_tensor([empty])])[owners]
