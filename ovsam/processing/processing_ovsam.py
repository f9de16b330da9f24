"""OVSamProcessor: images, text queries and prompts -> tensors; OVSamOutput -> instances, in pixels of the image."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.models.sam2.processing_sam2 import Sam2Processor

from ovsam.errors import InputError
from ovsam.modeling.geometry import square_window
from ovsam.modeling.outputs import OVSamOutput
from ovsam.modeling.remote_code import auto_map, write_shim
from ovsam.ops import rle
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import OUTSIDE, mask_logits
from ovsam.ops.segments import segments_of
from ovsam.processing import arguments
from ovsam.processing.images import open_image, unit_to_uint8
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
from ovsam.processing.video_sessions import VideoSessions
from ovsam.processing.vocabulary import Vocabulary, as_read, check_letters, check_text_length, split_words

PADDING_LABEL = -10  # label of padding points


class OVSamProcessor(VideoSessions, Sam2Processor):
    """SAM 2's processor (image and coordinates) with a tokenizer, and a second image processor if CLIP needs one.

    Args:
        image_processor: prepares the model's square input: resized without keeping the aspect ratio as in SAM 2, or,
            with a `longest_edge` in its size as in SAM 1, with the aspect ratio kept and padding at the right or the
            bottom.
        tokenizer: tokenizer of the text tower of the CLIP side.
        clip_images: configuration of the stock image processor of a CLIP tower with other preprocessing, such as
            {"image_processor_type": "CLIPImageProcessor", "size": ...}; None if both sides share theirs. It must resize
            the whole image, or pad it to a square as OWLv2 does.
        max_text_length: length limit of the text tower in tokens.
        text_padding: "longest", or "max_length" for towers that were trained with padding (SigLIP).
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
        # Skip Sam2Processor.__init__, whose signature has no tokenizer.
        super(Sam2Processor, self).__init__(image_processor, tokenizer, **kwargs)
        self.point_pad_value = point_pad_value
        self.target_size = target_size or image_processor.size["longest_edge" if self.pads else "height"]
        self.clip_images = clip_images
        self.max_text_length = max_text_length
        self.text_padding = text_padding

    @property
    def pads(self) -> bool:
        """Whether the model input is padded (SAM 1) rather than resized without keeping the aspect ratio (SAM 2)."""
        return bool(getattr(self.image_processor.size, "longest_edge", None))

    def picture_share(self, height: int, width: int) -> tuple[float, float]:
        """Fraction of the model input's width and height that shows an image of height x width pixels; the rest is
        padding."""
        if not self.pads:
            return 1.0, 1.0
        scale = self.target_size / max(height, width)
        return int(width * scale + 0.5) / self.target_size, int(height * scale + 0.5) / self.target_size

    def _normalize_coordinates(self, target_size: int, coords: Tensor, original_size, is_bounding_box=False) -> Tensor:
        """Coordinates [..., 2] (or boxes [..., 4]) in pixels of an image (height, width) -> in pixels of the model
        input."""
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
            images: one image or a list of B.
            text: text queries for all images, or for each image. They are a list of phrases, or a mapping of phrases to
                class names: {"a pedestrian": "person", ...}. Queries per image are evaluated on their image only.
            negative_text: negative queries for all images; their instances are dropped.
            input_points: [image][prompt][point][x, y] in pixels of the image; input_labels likewise without [x, y].
            input_boxes: [image][prompt][x1, y1, x2, y2] in pixels of the image. Images may have different numbers of
                prompts: shorter lists are padded, and post-processing removes the padding.
            input_masks: logits [B, P, H/4, W/4] over the model input.

        Returns:
            the arguments of OVSamModel. `original_sizes` are the `target_sizes` of post-processing. Negative queries
            are tokenised after the text queries.

        Raises:
            InputError: a text query is empty or too long for the text tower, or the number of lists of text queries is
                not the number of images.
        """
        images = _pictures(images)
        sizes = _sizes(original_sizes)
        original_sizes = original_sizes if sizes is None else sizes
        form = "[image][prompt][point][x, y]"
        input_points = arguments.prompts("input_points", input_points, 3, 2, form)
        input_labels = arguments.prompts("input_labels", input_labels, 3, None, "[image][prompt][point], 1 or 0 each")
        input_boxes = arguments.prompts("input_boxes", input_boxes, 2, 4, "[image][box][x1, y1, x2, y2]")
        _check_prompts(images, sizes, input_points, input_labels, input_boxes, self.point_pad_value)
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
            text_labels = _words(text)
            if is_per_image(text_labels) and not _fits(text_labels, len(encoded["original_sizes"])):
                raise InputError(f"Text queries per image must be one list for each image; got {text_labels}.")
            encoded["text_labels"], words = text_labels, all_phrases(text_labels)
        if negative_text is not None:
            negatives = list(_words(negative_text))
            encoded["negative_labels"], words = negatives, words + negatives
        if text is not None or negative_text is not None:
            encoded.update(self.tokenize([as_read(word) if isinstance(word, str) else word for word in words]))
        encoded.pop("reshaped_input_sizes", None)  # of SAM 1; this processor computes it from the original size
        return BatchFeature(encoded)

    def _clip_window(self, sizes: Tensor) -> Tensor:
        """The rectangle of each model input that CLIP's input covers, [B, 4] in fractions of the model input."""
        rows = []
        for height, width in sizes.tolist():
            across, down = self.picture_share(height, width)
            x1, y1, x2, y2 = square_window(height, width) if self.clip_images.get("do_pad") else (0.0, 0.0, 1.0, 1.0)
            rows.append([x1 * across, y1 * down, x2 * across, y2 * down])
        return torch.tensor(rows)

    def mask_prompts(self, masks: Tensor, size: int) -> Tensor:
        """Masks [n, H, W], bool or logits, over one image -> input_masks [1, n, size / 4, size / 4], logits."""
        tensor = isinstance(masks, Tensor) and masks.ndim == 3
        if not tensor or not (masks.is_floating_point() or masks.dtype == torch.bool):
            masks = torch.from_numpy(arguments.masks(masks))
        if not masks.isfinite().all():
            raise InputError("The masks hold NaN or infinite values; they must be bool, or finite logits.")
        size = arguments.whole("size", size, 4)
        logits = mask_logits(masks)
        across, down = self.picture_share(*masks.shape[1:])
        grid = round(down * size / 4), round(across * size / 4)
        logits = F.interpolate(logits[None], grid, mode="bilinear", antialias=True)
        return F.pad(logits, (0, size // 4 - grid[1], 0, size // 4 - grid[0]), value=OUTSIDE)

    def tokenize(self, phrases: list[str]) -> dict[str, Tensor]:
        """Phrases -> input_ids and attention_mask [K, T]."""
        phrases = [phrases] if isinstance(phrases, str) else arguments.plain(phrases)
        if not arguments.is_sequence(phrases) or not phrases:
            raise InputError("The list of text queries is empty; pass at least one.")
        for phrase in phrases:
            if not isinstance(phrase, str) or not phrase.strip():
                raise InputError(
                    f"The text query {arguments.short(phrase)} is not valid; it must be a non-empty string."
                )
            check_letters(phrase)
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
            outputs: outputs of OVSamModel.
            threshold: lowest score of a proposal, or lowest objectness in everything mode; masks of prompts are always
                kept. By default the threshold of the checkpoint.
            mask_threshold: lowest probability of the pixels of a mask.
            target_sizes: (height, width) of each image; by default the grid of the mask decoder.
            text_labels: other names for the text queries; by default those of the processor's input, which are part of
                the outputs.
            top_k: number of class names for each instance.
            nms: non-maximum suppression of proposals by mask overlap: a key of ovsam.ops.nms.NMS, or None for none.
            per_word: whether suppression is limited to instances of the same class name.
            rescore: whether scores are multiplied by the predicted IoU of the mask (YOLACT++, Bolya et al. 2020, §6.1).
            exclusive: whether each pixel belongs to one instance only, that of the highest score; proposals without any
                pixels are removed.
            return_coco_annotation: whether masks are COCO run lengths, one dict for each instance; dense masks of many
                instances in a large image do not fit into memory.

        Returns:
            for each image a dict of scores [n], labels [n] (index into the labels of the image, -1 without text
            queries), text_labels and phrases [n] (the label, and the phrase with the highest score for it), boxes [n,
            4] xyxy, masks [n, H, W] bool, mask_scores [n], objectness [n] (None for prompts), prompt_ids [n] (index of
            the prompt or proposal) and topk [n] of [[label, score], ...]; proposals by descending score, prompts in the
            given order. In addition presence, {label: its highest score}, before any instances are removed; and
            dropped, the proposals with a higher score for a negative query: dicts of text_label, score, negative,
            negative_score.
        """
        arguments.number("mask_threshold", mask_threshold, 0, 1, inside=True)
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
        """Label of each pixel: that of the instance with the highest product of score and pixel probability
        (MaskFormer, Cheng et al. 2021, §3.4, with the maximum over instances instead of the sum, since instances may be
        duplicates). Arguments as in `post_process_instance_segmentation`.

        Returns:
            for each image a map [H, W] of indices into the labels of the image, -1 without any; with `return_scores`
            also a list of the products [H, W], 0 without any.
        """
        arguments.number("mask_threshold", mask_threshold, 0, 1, inside=True)
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
        """As the method of this name of Mask2Former: pixels as in `post_process_semantic_segmentation`, by instance.

        Args:
            overlap_mask_area_threshold: instances that keep at most this fraction of their mask are removed.
            label_ids_to_fuse: labels whose instances form one segment, such as those of sky and grass.

        Returns:
            for each image a dict of segmentation [H, W] int32, the segment id or 0, and segments_info: dicts of id,
            from 1 on, label_id, label, was_fused and score (the highest score of a fused segment).
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
        """As in the processors of OWLv2 and Grounding DINO: boxes of the instances, without masks.

        Returns:
            for each image a dict of scores [n], labels [n], boxes [n, 4] xyxy as proposed (in pixels of the image;
            without target_sizes in fractions of the model input) and text_labels [n].
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
        """Yield for each image the instances that are kept, and the size of their masks."""
        threshold = arguments.optional(arguments.number, "threshold", threshold, 0, 1)
        arguments.whole("top_k", options.get("top_k", 0), 0)
        sizes = _sizes(target_sizes)
        if sizes is not None and len(sizes) != len(outputs.pred_masks):
            raise InputError(f"There are {len(sizes)} target_sizes for {len(outputs.pred_masks)} images.")
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
        """Size of the masks of an image: the target size, or the grid of the mask decoder."""
        if target_sizes is None:
            return Canvas(*outputs.pred_masks.shape[-2:])
        height, width = (int(side) for side in target_sizes[image])
        return Canvas(height, width, self.picture_share(height, width))


def _pictures(images: Any) -> Any:
    """Pictures as the image processor takes them: whatever else can be opened becomes RGB."""
    if images is None:
        return None
    if not isinstance(images, list | tuple):
        return _picture(images)
    if not images:
        raise InputError("The list of images is empty; pass at least one.")
    return [_picture(one) for one in images]


def _picture(image: Any) -> Any:
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else open_image(image)
    if isinstance(image, Tensor | np.ndarray) and image.ndim in (3, 4) and image.dtype in (torch.uint8, np.uint8):
        if 4 in (image.shape[-1], image.shape[0]) and image.ndim == 3 and isinstance(image, np.ndarray):
            return open_image(image)
        return image
    if isinstance(image, Tensor | np.ndarray) and image.ndim in (3, 4):
        array = np.asarray(image.detach().cpu().float() if isinstance(image, Tensor) else image)
        if array.dtype.kind not in "iuf" or not array.size or not np.isfinite(array).all():
            raise InputError("An image holds values that are no finite numbers; pass uint8, or floats in [0, 1].")
        if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
            array = unit_to_uint8(array, "The image")
        return torch.from_numpy(array) if isinstance(image, Tensor) else array
    return open_image(image)


def _sizes(original_sizes: Any) -> list[list[int]] | None:
    """(height, width) of each image, whole and positive."""
    if original_sizes is None:
        return None
    found = arguments.rows("original_sizes", original_sizes, 2, "(height, width) in pixels, one for each image")
    if not all(side >= 1 and side == int(side) for row in found for side in row):
        raise InputError(f"The original_sizes are {arguments.short(original_sizes)}; they must be whole and positive.")
    return [[int(side) for side in row] for row in found]


def _check_prompts(images, sizes, points, labels, boxes, padding: int) -> None:
    """Prompts are one entry an image, and labels one a point."""
    if images is None and sizes is None and any(given is not None for given in (points, labels, boxes)):
        raise InputError("Prompts are in pixels of an image; pass images, or their original_sizes.")
    count = len(images) if isinstance(images, list) else len(sizes) if images is None and sizes is not None else None
    for name, given in (("input_points", points), ("input_labels", labels), ("input_boxes", boxes)):
        if given is not None and count is not None and len(given) != count:
            raise InputError(f"There are {count} images and {len(given)} entries of {name}; each image takes one.")
    if labels is None:
        return
    if points is None:
        raise InputError("There are input_labels without input_points; each point takes one.")
    for row, several in zip(points, labels, strict=False):
        if [len(one) for one in row] != [len(one) for one in several]:
            raise InputError("The input_labels do not fit the input_points; each point takes one.")
    for one in (label for several in labels for row in several for label in row):
        if one not in (1, 0, 2, 3, -1, padding):
            raise InputError(
                f"The input_labels hold {one}; each must be 1 (on the object), 0 (beside it), 2 or 3 (the corners of a "
                "box) or -1 (padding)."
            )


def _words(text: Any) -> Any:
    """Words as a list or a mapping, or a list of those for each image; a text is split as people write words."""
    if isinstance(text, str):
        return split_words(text) or [text]
    if isinstance(text, Vocabulary):
        return text.as_mapping()
    if isinstance(text, Mapping):
        return dict(text)
    text = arguments.plain(text)
    if not isinstance(text, Iterable) or isinstance(text, bytes):
        raise InputError(f"The words are {arguments.short(text)}; they must be a list of words, or one for each image.")
    words = list(text)
    if any(isinstance(one, str) for one in words):
        return [one for one in words if not isinstance(one, str) or one.strip()] or words
    rows = [list(one) if isinstance(one, tuple) else one for one in words]
    for one in rows:
        if not isinstance(one, list | Mapping) or not all(isinstance(word, str) for word in one):
            raise InputError(f"The words hold {arguments.short(one)}; each must be a word, or a list of words.")
    return rows


def _pad_boxes(boxes) -> tuple[Any, list[int] | None]:
    """Pad the boxes of each image to one length with empty boxes; also returns the number of each image."""
    if boxes is None:
        return None, None
    if isinstance(boxes, Tensor):
        return boxes, [boxes.shape[1]] * boxes.shape[0]
    counts = [len(row) for row in boxes]
    return [[*row, *[[0.0, 0.0, 1.0, 1.0]] * (max(counts) - len(row))] for row in boxes], counts


def _fits(text_labels, images: int) -> bool:
    return len(text_labels) == images and not any(isinstance(row, str) for row in text_labels)


def _areas(owners: Tensor, count: int) -> Tensor:
    """Number of pixels of each of `count` instances; owners [H, W], -1: none -> [count]."""
    return (owners + 1).flatten().bincount(minlength=count + 1)[1:]


def _look_up(values: Tensor, owners: Tensor, empty: int) -> Tensor:
    """Values [n] of the instances at their pixels, owners [H, W] (-1: none) -> [H, W]."""
    return torch.cat([values, values.new_tensor([empty])])[owners]
