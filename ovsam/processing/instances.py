"""The post-processing calls of the processor: OVSamOutput -> instances, label maps, segments and boxes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ovsam.errors import InputError
from ovsam.modeling.outputs import OVSamOutput
from ovsam.ops.nms import NMS
from ovsam.ops.segments import segments_of
from ovsam.ops.text_labels import is_per_image
from ovsam.processing import arguments
from ovsam.processing.inputs import check_sizes, split_queries
from ovsam.processing.postprocessing import (
    Canvas,
    Selection,
    Words,
    areas_of,
    assign,
    describe,
    look_up,
    select,
)


class PostProcessing:
    """The `post_process_*` methods of a processor."""

    target_size: int  # both are the processor's
    picture_share: Callable[[int, int], tuple[float, float]]

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
        arguments.flag("exclusive", exclusive)
        arguments.flag("return_coco_annotation", return_coco_annotation)
        options = {"nms": nms, "per_word": per_word, "rescore": rescore, "top_k": top_k}
        return [
            describe(chosen, canvas, mask_threshold, exclusive, return_coco_annotation)
            for chosen, canvas in self._choose(outputs, target_sizes, text_labels, threshold, **options)
        ]

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
        arguments.flag("return_scores", return_scores)
        maps, scores = [], []
        for chosen, canvas in self._choose(outputs, target_sizes, text_labels, threshold, nms=None):
            owners, values, _ = assign(chosen.logits, chosen.scores, canvas, mask_threshold, by_pixel=True)
            maps.append(look_up(chosen.labels, owners, empty=-1))
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
        arguments.number("mask_threshold", mask_threshold, 0, 1, inside=True)
        least = arguments.number("overlap_mask_area_threshold", overlap_mask_area_threshold, 0, 1)
        fused = arguments.whole_numbers("label_ids_to_fuse", label_ids_to_fuse)
        results = []
        for chosen, canvas in self._choose(
            outputs,
            target_sizes,
            text_labels,
            threshold,
            nms=nms,
        ):
            owners, _, areas = assign(chosen.logits, chosen.scores, canvas, mask_threshold, by_pixel=True)
            left = areas_of(owners, len(areas))
            kept = (left > least * areas).tolist()
            ids, segments = segments_of(chosen.labels.tolist(), chosen.text_labels, chosen.scores.tolist(), kept, fused)
            segmentation = look_up(torch.tensor(ids, dtype=torch.int32, device=owners.device), owners, empty=0)
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

    post_process_object_detection = post_process_grounded_object_detection  # the name of OWL-ViT and DETR

    def _choose(
        self, outputs: OVSamOutput, target_sizes, text_labels, threshold, **options
    ) -> Iterator[tuple[Selection, Canvas]]:
        """Yield for each image the instances that are kept, and the size of their masks."""
        if getattr(outputs, "pred_masks", None) is None:
            raise InputError(f"The outputs are {arguments.short(outputs)}; they must be those of OVSamModel.")
        threshold = arguments.optional(arguments.number, "threshold", threshold, 0, 1)
        arguments.whole("top_k", options.get("top_k", 0), 0)
        if options.get("nms") is not None:
            arguments.choice("NMS", options["nms"], NMS)
        for name in ("per_word", "rescore"):
            arguments.flag(name, options.get(name, False))
        if text_labels is not None:
            text_labels = split_queries(text_labels)
            if is_per_image(text_labels) and len(text_labels) != len(outputs.pred_masks):
                raise InputError(f"There are {len(text_labels)} text_labels for {len(outputs.pred_masks)} images.")
        sizes = check_sizes(target_sizes)
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
            yield chosen, self._canvas(outputs, image, sizes)

    def _canvas(self, outputs: OVSamOutput, image: int, sizes: list[list[int]] | None) -> Canvas:
        """Size of the masks of an image: the target size, or the grid of the mask decoder."""
        if sizes is None:
            return Canvas(*outputs.pred_masks.shape[-2:])
        height, width = sizes[image]
        return Canvas(height, width, self.picture_share(height, width))
