"""OVSamProcessor: pictures, words and prompts -> tensors; OVSamOutput -> masks with names, in the picture's pixels."""

import os
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import BatchFeature
from transformers.models.sam2.processing_sam2 import Sam2Processor

from ovsam.boxes import masks_to_boxes
from ovsam.errors import InputError
from ovsam.modeling_ovsam import OVSamOutput, instance_scores
from ovsam.nms import mask_overlap, suppress
from ovsam.remote_code import auto_map, write_shim
from ovsam.vocabulary import check_text_length

PADDING_LABEL = -10  # of a point that is not there


class OVSamProcessor(Sam2Processor):
    """SAM 2's processor (image and coordinates) with a tokenizer, and a second image processor where CLIP needs one.

    Args:
        image_processor: resizes to the model's square input (a squash, as in SAM 2).
        tokenizer: of the CLIP side's text tower.
        clip_images: configuration of the stock image processor of a CLIP tower whose geometry differs, such as
            {"image_processor_type": "CLIPImageProcessor", "size": ...}; None where both sides share theirs.
        max_text_length: tokens that the text tower reads; text_padding: "longest", or "max_length" for towers that were
            trained to read their padding (SigLIP).
        mask_nms_threshold: two instances whose masks overlap more are one.
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
        mask_nms_threshold: float = 0.6,
        **kwargs,
    ):
        # Past Sam2Processor.__init__, whose signature has no tokenizer.
        super(Sam2Processor, self).__init__(image_processor, tokenizer, **kwargs)
        self.point_pad_value = point_pad_value
        self.target_size = target_size if target_size is not None else image_processor.size["height"]
        self.clip_images = clip_images
        self.max_text_length = max_text_length
        self.text_padding = text_padding
        self.mask_nms_threshold = mask_nms_threshold

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
        text: str | list[str] | list[list[str]] | None = None,
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
            text: words for all images; or a list per image, each answered for its own words only, as if it were alone.
            negative_text: words for all images whose things are not wanted.
            input_points: [image][prompt][point][x, y] in the picture's pixels; input_labels likewise without [x, y].
            input_boxes: [image][prompt][x1, y1, x2, y2] in the picture's pixels. Images may differ in how many prompts
                they have: the shorter are padded, and post-processing drops the padding again.
            input_masks: logits [B, P, H/4, W/4] of the model input.

        Returns:
            what OVSamModel takes, plus `original_sizes` and `text_labels` for post-processing.

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
        if input_masks is not None:
            encoded["input_masks"] = input_masks
        if text is not None:
            text_labels = [text] if isinstance(text, str) else list(text)
            if _per_image(text_labels) and not _fits(text_labels, len(encoded["original_sizes"])):
                raise InputError(f"Words per image are one list for each image, all of them lists; got {text_labels}.")
            words = _union(text_labels)
            encoded.update(self.tokenize(words))
            encoded["text_labels"] = text_labels
            if _per_image(text_labels):
                encoded["text_mask"] = torch.tensor([[word in row for word in words] for row in text_labels])
        if negative_text is not None:
            tokens = self.tokenize([negative_text] if isinstance(negative_text, str) else list(negative_text))
            encoded.update({f"negative_{name}": value for name, value in tokens.items()})
        return BatchFeature(encoded)

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
        text_labels: list[str] | list[list[str]] | None = None,
        prompt_counts: Tensor | list[int] | None = None,
        everything: bool = False,
        top_k: int = 5,
    ) -> list[dict[str, Any]]:
        """
        Args:
            outputs: of OVSamModel.
            threshold: least score of a proposal; prompts always give their mask. Default 0.3.
            mask_threshold: least probability of a pixel.
            target_sizes: (height, width) per image; the mask decoder's own grid if not given.
            text_labels: the words, as given to the processor.
            prompt_counts: how many prompts each image really has (from the processor).
            everything: as in the model's call: instances are chosen by objectness, and words only name them.
            top_k: how many names per instance.

        Returns:
            per image a dict of scores [n], labels [n] (index into the image's words, -1 without), boxes [n, 4] xyxy,
            masks [n, H, W] bool, text_labels [n], mask_scores [n], prompt_ids [n] (index of the prompt or proposal) and
            topk [n] of [[word, score], ...]; best first for proposals, in the prompts' order for prompts.
        """
        threshold = 0.3 if threshold is None else threshold
        proposed = outputs.objectness is not None
        results = []
        for image in range(len(outputs.pred_masks)):
            valid = outputs.valid[image].clone()
            if prompt_counts is not None:
                valid &= torch.arange(len(valid), device=valid.device) < int(prompt_counts[image])
            index = valid.nonzero()[:, 0]
            objectness = outputs.objectness[image, index].float() if proposed else None
            weight = objectness[:, None] if proposed and not everything else None
            words, columns = _own_words(outputs.logits, text_labels, image)
            if words:
                names = instance_scores(outputs.logits[image, index][:, columns].float(), weight)  # [n, K]
                best, labels = names.max(-1)
            else:
                names, labels = None, torch.full_like(index, -1)
                best = objectness if proposed else torch.ones(len(index), device=index.device)
            if proposed:
                rank = objectness if everything else best
                order = rank.argsort(descending=True)
                order = order[rank[order] >= threshold]
                if outputs.negative_logits is not None:
                    unwanted = instance_scores(outputs.negative_logits[image, index].float(), weight).amax(-1)
                    order = order[unwanted[order] < best[order]]
            else:
                order = torch.arange(len(index), device=index.device)
            candidates, quality = self._masks(outputs, image, index[order])
            if proposed:
                keep = suppress(mask_overlap(candidates > 0), self.mask_nms_threshold).to(order.device)
                keep &= (candidates > 0).flatten(1).any(1)
                order, candidates, quality = order[keep], candidates[keep], quality[keep]
            masks = _resize(candidates, target_sizes[image] if target_sizes is not None else None, mask_threshold)
            results.append(
                {
                    "scores": best[order],
                    "labels": labels[order],
                    "boxes": masks_to_boxes(masks),
                    "masks": masks,
                    "text_labels": [words[i] if i >= 0 else None for i in labels[order].tolist()],
                    "mask_scores": quality,
                    "prompt_ids": index[order],
                    "topk": _topk(names[order], words, top_k) if names is not None else [[] for _ in order],
                }
            )
        return results

    def _masks(self, outputs: OVSamOutput, image: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """The best candidate mask of each instance, logits [n, h, w], and its predicted IoU [n]."""
        masks = outputs.pred_masks[image, index].float()  # [n, M, h, w]
        if outputs.iou_scores is None:  # prototype masks: how sure their own pixels are (YOLACT++'s idea, untrained)
            on = masks[:, 0] > 0
            sure = (masks[:, 0].sigmoid() * on).sum((-1, -2)) / on.sum((-1, -2)).clamp(min=1)
            return masks[:, 0], sure
        quality, best = outputs.iou_scores[image, index].float().max(-1)
        return masks.take_along_dim(best[:, None, None, None], 1)[:, 0], quality


def _pad_boxes(boxes) -> tuple[Any, list[int] | None]:
    """Boxes per image, padded to one length with an empty box; and how many each image had."""
    if boxes is None:
        return None, None
    if isinstance(boxes, Tensor):
        return boxes, [boxes.shape[1]] * boxes.shape[0]
    counts = [len(row) for row in boxes]
    return [[*row, *[[0.0, 0.0, 1.0, 1.0]] * (max(counts) - len(row))] for row in boxes], counts


def _per_image(text_labels) -> bool:
    return bool(text_labels) and isinstance(text_labels[0], list | tuple)


def _fits(text_labels, images: int) -> bool:
    return len(text_labels) == images and not any(isinstance(row, str) for row in text_labels)


def _union(text_labels) -> list[str]:
    if _per_image(text_labels):
        return list(dict.fromkeys(word for row in text_labels for word in row))
    return list(text_labels)


def _own_words(logits: Tensor | None, text_labels, image: int) -> tuple[list[str], list[int]]:
    """The words of an image, and where they stand among those of all images; words not given are called by number."""
    if logits is None:
        return [], []
    if text_labels is None:
        text_labels = [str(number) for number in range(logits.shape[-1])]
    place = {word: number for number, word in enumerate(_union(text_labels))}
    own = text_labels[image] if _per_image(text_labels) else text_labels
    return list(own), [place[word] for word in own]


def _resize(logits: Tensor, size, mask_threshold: float) -> Tensor:
    """logits [n, h, w] -> masks [n, H, W] bool."""
    if size is not None and len(logits):
        size = tuple(int(side) for side in size)
        logits = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    elif size is not None:
        logits = logits.new_zeros(0, *(int(side) for side in size))
    return logits.sigmoid() > mask_threshold


def _topk(scores: Tensor, words: list[str], count: int) -> list[list[list[Any]]]:
    values, index = scores.topk(min(count, scores.shape[1]), dim=1)
    return [
        [[words[i], round(v, 4)] for i, v in zip(row, value, strict=True)]
        for row, value in zip(index.tolist(), values.tolist(), strict=True)
    ]
