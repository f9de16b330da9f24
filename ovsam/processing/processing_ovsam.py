"""OVSamProcessor: images, text queries and prompts -> tensors; OVSamOutput -> instances, in pixels of the image."""

import os

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import BatchFeature
from transformers.models.sam2.processing_sam2 import Sam2Processor

from ovsam.errors import InputError
from ovsam.modeling.geometry import square_window
from ovsam.modeling.remote_code import auto_map, write_shim
from ovsam.ops.masks import OUTSIDE, mask_logits
from ovsam.ops.text_labels import all_phrases, is_per_image
from ovsam.processing import arguments
from ovsam.processing.inputs import check_prompts, check_sizes, fits, open_pictures, pad_boxes, split_queries
from ovsam.processing.instances import PostProcessing
from ovsam.processing.postprocessing import Words
from ovsam.processing.video_sessions import VideoSessions
from ovsam.processing.vocabulary import as_read, check_letters, check_text_length

PADDING_LABEL = -10  # label of padding points


class OVSamProcessor(PostProcessing, VideoSessions, Sam2Processor):
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
            padding, truncation, max_length: have no effect; phrases are tokenised as the text tower was trained.

        Returns:
            the arguments of OVSamModel. `original_sizes` are the `target_sizes` of post-processing. Negative queries
            are tokenised after the text queries.

        Raises:
            InputError: a text query is empty or too long for the text tower, or the number of lists of text queries is
                not the number of images.
        """
        for name in ("padding", "truncation", "max_length"):
            kwargs.pop(name, None)
        images = open_pictures(images)
        sizes = check_sizes(original_sizes)
        original_sizes = original_sizes if sizes is None else sizes
        form = "[image][prompt][point][x, y]"
        input_points = arguments.prompts("input_points", input_points, 3, 2, form)
        input_labels = arguments.prompts("input_labels", input_labels, 3, None, "[image][prompt][point], 1 or 0 each")
        input_boxes = arguments.prompts("input_boxes", input_boxes, 2, 4, "[image][box][x1, y1, x2, y2]")
        check_prompts(images, sizes, input_points, input_labels, input_boxes, self.point_pad_value)
        input_boxes, counts = pad_boxes(input_boxes)
        try:
            encoded = super().__call__(
                images=images,
                input_points=input_points,
                input_labels=input_labels,
                input_boxes=input_boxes,
                original_sizes=original_sizes,
                return_tensors=return_tensors,
                **kwargs,
            )
        except (InputError, MemoryError):
            raise
        except Exception as error:  # the image processors of transformers raise errors of many kinds
            raise InputError(f"The images or prompts cannot be used: {' '.join(str(error).split())[:200]}") from error
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
            text_labels = split_queries(text)
            if is_per_image(text_labels) and not fits(text_labels, len(encoded["original_sizes"])):
                raise InputError(f"Text queries per image must be one list for each image; got {text_labels}.")
            encoded["text_labels"], words = text_labels, all_phrases(text_labels)
        if negative_text is not None:
            negatives = list(split_queries(negative_text))
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

    def post_process_masks(
        self, masks, original_sizes, mask_threshold: float = 0.0, binarize: bool = True, **options
    ) -> list[Tensor]:
        """As the method of this name of SAM and SAM 2.

        Args:
            masks: logits [P, M, h, w] over the model input for each image, such as `pred_masks`.
            original_sizes: (height, width) of each image.
            mask_threshold: lowest logit of the pixels of a mask.
            binarize: whether masks are bool, rather than logits.
            options: further keywords of the image processor.

        Returns:
            for each image [P, M, H, W].

        Raises:
            InputError: masks are no floating-point tensors of that form, or their number is not that of the sizes.
        """
        sizes = check_sizes(original_sizes)
        if sizes is None:
            raise InputError("The original_sizes are None; they must be (height, width) in pixels, one for each image.")
        arguments.number("mask_threshold", mask_threshold, -1e4, 1e4)
        arguments.flag("binarize", binarize)
        if not isinstance(masks, Tensor | np.ndarray | list | tuple) or not getattr(masks, "ndim", 1):
            raise InputError(f"The masks are {arguments.short(masks)}; they must be logits [P, M, h, w] of each image.")
        logits = [torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in masks]
        for one in logits:
            if not isinstance(one, Tensor) or one.ndim != 4 or not one.is_floating_point():
                got = f"{one.dtype} {list(one.shape)}" if isinstance(one, Tensor) else arguments.short(one)
                raise InputError(f"The masks of an image must be logits [P, M, h, w]; got {got}.")
        if len(logits) != len(sizes):
            raise InputError(f"There are masks of {len(logits)} images, and original_sizes of {len(sizes)}.")
        if self.pads:
            shares = [self.picture_share(*size) for size in sizes]
            inputs = [[round(down * self.target_size), round(across * self.target_size)] for across, down in shares]
            options["pad_size"] = {"height": self.target_size, "width": self.target_size}
            return self.image_processor.post_process_masks(logits, sizes, inputs, mask_threshold, binarize, **options)
        return super().post_process_masks(logits, sizes, mask_threshold, binarize, **options)

    def mask_prompts(self, masks: Tensor, size: int) -> Tensor:
        """Masks [n, H, W], bool or logits, over one image -> input_masks [1, n, size / 4, size / 4], logits."""
        tensor = isinstance(masks, Tensor) and masks.ndim == 3
        if not tensor or not (masks.is_floating_point() or masks.dtype == torch.bool):
            masks = torch.from_numpy(arguments.masks(masks))
        if not masks.isfinite().all():
            raise InputError("The masks hold NaN or infinite values; they must be bool, or finite logits.")
        size = arguments.whole("size", size, 4, 2**16)
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
