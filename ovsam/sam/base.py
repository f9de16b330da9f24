"""What every SAM side gives and takes, and the implementation that SAM 2 and EdgeTAM share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ovsam.errors import InputError

from .decode import DecodedMasks, decode_masks

__all__ = ["DecodedMasks", "SamFeatures", "SamSide"]


@dataclass
class SamFeatures(ModelOutput):
    """Image features of a SAM side, reusable for any number of prompts.

    Attributes:
        embedding: what the mask decoder reads, [B, C, h, w] at stride 16; `no_memory_embedding` is in it.
        high_res: what it adds while upscaling, [B, C/8, 4h, 4w] and [B, C/4, 2h, 2w].
        pyramid: the maps of the feature pyramid as they are, high resolution first, each [B, Ci, hi, wi]; channels and
            strides are the side's `pyramid_channels` and `pyramid_strides`.
    """

    embedding: Tensor | None = None
    high_res: tuple[Tensor, Tensor] | None = None
    pyramid: tuple[Tensor, ...] | None = None


class SamSide(nn.Module):
    """A SAM 2 or EdgeTAM of transformers, held as `model`: image -> SamFeatures, prompts -> DecodedMasks.

    Prompts and image cells share one position encoding, as in released weights; transformers alone draws two.
    It stays in fp32 whatever dtype the rest is cast to, and prompts are encoded in fp32: bf16 moves small boxes.

    Args:
        config: the configuration of the whole model, whichever part is kept.
        part: "all"; "vision", only what `encode` needs; or "decoder", only what `decode` needs. Names of weights are
            the same in all three.

    Attributes:
        image_size: side of the square input in pixels.
        width: C, the width of the embedding and of the tokens.
        pyramid_channels: channels of each map of the pyramid, high resolution first.
        pyramid_strides: their strides in pixels.

    Raises:
        InputError: the configuration is not of square images with feature maps at strides 4, 8 and 16.
    """

    model_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, part: Literal["all", "vision", "decoder"] = "all"):
        super().__init__()
        prompts, vision = config.prompt_encoder_config, config.vision_config
        sizes = [list(size) for size in vision.backbone_feature_sizes]
        if not isinstance(prompts.image_size, int):
            raise InputError(f"image_size must be one number, the side of a square; got {prompts.image_size}.")
        grid = prompts.image_size // prompts.patch_size
        if sizes != [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]:
            raise InputError(
                f"For images of {prompts.image_size} x {prompts.image_size} pixels backbone_feature_sizes must be "
                f"{[[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]}; got {sizes}."
            )
        self.image_size = prompts.image_size
        self.width = config.mask_decoder_config.hidden_size
        self.pyramid_channels = (vision.fpn_hidden_size,) * len(sizes)
        self.pyramid_strides = tuple(self.image_size // size[0] for size in sizes)

        self.model = self.model_class(config)
        if part == "vision":
            decoder = self.model.mask_decoder
            self.model.mask_decoder = nn.ModuleDict({"conv_s0": decoder.conv_s0, "conv_s1": decoder.conv_s1})
            self.model.shared_image_embedding = self.model.prompt_encoder = None
        else:
            # One module under two names is tied for good: through random init, load, cast and copy. Built in fp32, it
            # stays so in from_pretrained(dtype=...), which gives each tensor the dtype that the model was built with.
            self.model.shared_image_embedding = self.model.prompt_encoder.shared_embedding.float()
            self.register_state_dict_post_hook(_untie_in_state_dict)
        if part == "decoder":
            self.model.vision_encoder = self.model.no_memory_embedding = None

    def encode(self, pixel_values: Tensor) -> SamFeatures:
        """Features of normalised images [B, 3, H, W] of the model's own square size, with gradients.

        Raises:
            InputError: the images have another size.
        """
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixel_values.shape[-2:]
            raise InputError(
                f"This model sees square images of {self.image_size} x {self.image_size} pixels; "
                f"got {height} x {width}: resize them first, as the processor does."
            )
        decoder = self.model.mask_decoder
        pixel_values = pixel_values.to(decoder.conv_s0.weight.dtype)
        pyramid = tuple(self.model.vision_encoder(pixel_values, return_dict=True).fpn_hidden_states)
        return SamFeatures(
            embedding=pyramid[2] + self.model.no_memory_embedding.view(-1, 1, 1),
            high_res=(decoder.conv_s0(pyramid[0]), decoder.conv_s1(pyramid[1])),
            pyramid=pyramid,
        )

    def decode(
        self,
        features: SamFeatures,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
    ) -> DecodedMasks:
        """Masks of every prompt from every mask token (M = 4 in released weights; index 0 is the single-mask token).

        All prompts may be combined; without points and boxes SAM's padding point stands in for them. Coordinates are
        pixels of the model's input.

        Args:
            features: of B images.
            input_points: [B, P, N, 2] as x, y.
            input_labels: [B, P, N]: 1 inside, 0 outside, -10 padding; all 1 if not given.
            input_boxes: [B, P, 4] as x1, y1, x2, y2.
            input_masks: logits [B, P, 4h, 4w], one mask for each prompt; other sizes are resized.

        Raises:
            InputError: the prompts do not agree on B, P or N, or have too many or too few dimensions.
        """
        images = len(features.embedding)
        _check_prompts(images, input_points, input_labels, input_boxes, input_masks)
        encoder, device = self.model.prompt_encoder, features.embedding.device
        if input_points is None and input_boxes is None:
            prompts = 1 if input_masks is None else input_masks.shape[1]
            input_points = torch.zeros(images, prompts, 1, 2, device=device)
            input_labels = torch.full((images, prompts, 1), -1, device=device)
        elif input_points is not None and input_labels is None:
            input_labels = torch.ones(input_points.shape[:3], dtype=torch.long, device=device)

        with torch.autocast(device.type, enabled=False):
            points = None if input_points is None else input_points.float()
            boxes = None if input_boxes is None else input_boxes.float()
            sparse, _ = encoder(points, input_labels, boxes, None)  # [B, P, T, C]
            position = self.model.get_image_wide_positional_embeddings()  # [1, C, h, w]
        if input_masks is None:
            dense = encoder.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        else:
            masks = input_masks.float()
            if masks.shape[-2:] != encoder.mask_input_size:
                masks = F.interpolate(masks, encoder.mask_input_size, mode="bilinear", antialias=True)
            masks = masks.flatten(0, 1)[:, None].to(encoder.mask_embed.conv1.weight.dtype)  # -> [B*P, 1, 4h, 4w]
            dense = encoder.mask_embed(masks).unflatten(0, input_masks.shape[:2])  # [B*P, C, h, w] -> [B, P, C, h, w]
        return decode_masks(self.model.mask_decoder, features.embedding, position, features.high_res, sparse, dense)

    def select_masks(self, decoded: DecodedMasks, multimask_output: bool) -> DecodedMasks:
        """The masks SAM 2 would give, with their tokens.

        Args:
            decoded: all M masks of each prompt.
            multimask_output: true, the M - 1 masks of an ambiguous prompt; false, one mask: the single-mask token's,
                or, in evaluation mode and if the configuration says `dynamic_multimask_via_stability`, the best of the
                others by predicted IoU where that one is unstable (its area changes with the threshold).
        """
        decoder = self.model.mask_decoder
        masks, iou, tokens, object_logits = decoded.to_tuple()
        if multimask_output or not decoder.dynamic_multimask_via_stability or self.training:
            kept = slice(1, None) if multimask_output else slice(0, 1)
            return DecodedMasks(masks[:, :, kept], iou[:, :, kept], tokens[:, :, kept], object_logits)
        delta = decoder.dynamic_multimask_stability_delta
        inner, outer = (masks[:, :, 0] > delta).sum((-1, -2)), (masks[:, :, 0] > -delta).sum((-1, -2))  # areas [B, P]
        stable = torch.where(outer > 0, inner / outer, 1.0) >= decoder.dynamic_multimask_stability_thresh
        choice = torch.where(stable, 0, iou[:, :, 1:].argmax(-1) + 1)[:, :, None]  # [B, P, 1]
        return DecodedMasks(
            masks.take_along_dim(choice[..., None, None], 2),
            iou.take_along_dim(choice, 2),
            tokens.take_along_dim(choice[..., None], 2),
            object_logits,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SamSide":
        """Moves the position encoding with the rest, but casts it to nothing."""
        encoder = self.model.prompt_encoder
        if encoder is None:
            return super()._apply(fn, recurse)
        exact = encoder.shared_embedding.positional_embedding
        super()._apply(fn, recurse)
        moved = encoder.shared_embedding.positional_embedding
        if moved.dtype != exact.dtype:
            encoder.shared_embedding.positional_embedding = exact.to(moved.device)
        return self


def _untie_in_state_dict(side: SamSide, state_dict: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Files hold both names, as transformers' own classes expect, as two tensors: safetensors takes no aliases."""
    name = prefix + "model.shared_image_embedding.positional_embedding"
    state_dict[name] = state_dict[name].clone()


PROMPT_SHAPES = {
    "input_points": "[B, P, N, 2]",
    "input_labels": "[B, P, N]",
    "input_boxes": "[B, P, 4]",
    "input_masks": "[B, P, H, W]",
}


def _check_prompts(images: int, *prompts: Tensor | None) -> None:
    named = zip(PROMPT_SHAPES, prompts, strict=True)
    shapes = {name: list(prompt.shape) for name, prompt in named if prompt is not None}
    agree = len({tuple(shape[:2]) for shape in shapes.values()}) <= 1
    agree &= all(len(shape) == PROMPT_SHAPES[name].count(",") + 1 for name, shape in shapes.items())
    agree &= all(shape[0] == images for shape in shapes.values())
    if "input_points" in shapes and "input_labels" in shapes:
        agree &= shapes["input_points"][:3] == shapes["input_labels"]
    if not agree:
        expected = ", ".join(f"{name} {PROMPT_SHAPES[name]}" for name in shapes)
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"Prompts must be {expected} with B = {images} images and the same P and N; got {got}.")
