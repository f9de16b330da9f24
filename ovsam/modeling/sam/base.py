"""Interface of the SAM sides, and the code that the families share."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Sam2ImageProcessor

from ovsam.errors import InputError
from ovsam.modeling.outputs import DecodedMasks, SamFeatures
from ovsam.modeling.sam.decode import MaskPrompts, decode_masks

__all__ = ["DecodedMasks", "SamFeatures", "SamSide"]

Part = Literal["all", "vision", "decoder", "tracker"]

# Defaults of SAM 2, for families whose configuration has none.
STABILITY_DELTA = 0.05
STABILITY_THRESHOLD = 0.98


class SamSide(nn.Module):
    """A model of the SAM family, held as `model`: image -> SamFeatures, prompts -> DecodedMasks.

    Prompts and image cells share one position encoding, as in released weights; transformers alone initialises two. It
    stays in fp32 whatever the dtype of the rest, and prompts are encoded in fp32: bf16 moves small boxes.

    A family defines its model class, `_pyramid`, `_encode`, and the class attributes in which it differs from SAM 2.

    Args:
        config: configuration of the whole SAM, for all values of `part`.
        part: "all"; "vision", the modules that `encode` needs; "decoder", the modules that `decode` needs; or
            "tracker", these and the memory of a video model. Weights have the same names in all of them.

    Attributes:
        model_class: the transformers class of `model`.
        trackers: model types of the video models that contain this image model.
        image_processor: the transformers class that prepares the model's input; SAM 1 pads images to the square, later
            models resize them without keeping the aspect ratio.
        encoder_parts: modules of `model` that are used by `encode` only.
        image_layers: modules of the mask decoder that depend on the image only; `encode` applies them.
        image_size: side of the square input in pixels.
        grid: side of the embedding in cells.
        width: C, the width of the embedding and of the tokens.
        finer_maps: number of maps of `SamFeatures.high_res` that the mask decoder reads.
        corners_are_points: whether a box is encoded as two points with the labels 2 and 3 (all families but SAM 1's).
        pyramid_channels: channels of each map of the pyramid, high resolution first.
        pyramid_strides: strides of these maps in pixels.

    Raises:
        InputError: the configuration is not for square images, or its parts do not fit each other.
    """

    model_class: type[PreTrainedModel]
    trackers: ClassVar[tuple[str, ...]] = ()
    image_processor: ClassVar[type] = Sam2ImageProcessor
    encoder_parts: tuple[str, ...] = ("vision_encoder",)
    image_layers: tuple[str, ...] = ()
    finer_maps: int = 0
    corners_are_points: ClassVar[bool] = True

    def __init__(self, config: PreTrainedConfig, part: Part = "all"):
        super().__init__()
        prompts = config.prompt_encoder_config
        if not isinstance(prompts.image_size, int):
            raise InputError(f"image_size must be one number, the side of a square; got {prompts.image_size}.")
        self.image_size = prompts.image_size
        self.grid = self.image_size // prompts.patch_size
        self.width = config.mask_decoder_config.hidden_size
        self.pyramid_channels, sizes = self._pyramid(config)
        self.pyramid_strides = tuple(self.image_size / size for size in sizes)

        self.model = self.model_class(config)
        encoder = self.model.prompt_encoder
        # transformers' SAM 1 stores the position encoding as a parameter, which an optimiser would change; the original
        # code and all later models store it as a buffer.
        code = encoder.shared_embedding.positional_embedding.data
        del encoder.shared_embedding.positional_embedding
        encoder.shared_embedding.positional_embedding = nn.Buffer(code)
        if part == "vision":
            layers = {name: getattr(self.model.mask_decoder, name) for name in self.image_layers}
            self.model.mask_decoder = nn.ModuleDict(layers)
            self.model.shared_image_embedding = self.model.prompt_encoder = None
        else:
            # One module under two names stays tied through random initialisation, load, cast and copy. It is built in
            # fp32 and stays so in from_pretrained(dtype=...), which keeps the dtype in which each tensor was built.
            self.model.shared_image_embedding = encoder.shared_embedding.float()
            self.register_state_dict_post_hook(_untie_in_state_dict)
        if part in ("decoder", "tracker"):
            for name in self.encoder_parts:
                setattr(self.model, name, None)

    # ------------------------------------------------------------------------------------- defined by each family

    def _pyramid(self, config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels and sides of the maps in `SamFeatures.pyramid`; raises InputError if the configuration is
        invalid."""
        raise NotImplementedError

    def _encode(self, pixel_values: Tensor) -> SamFeatures:
        """Images [B, 3, H, W] of the right size and dtype -> features."""
        raise NotImplementedError

    def _encode_nothing(self, images: int, prompts: int) -> Tensor:
        """Sparse embedding [B, P, T, C] if no points or boxes are given: the padding point of SAM 2."""
        device = self.model.prompt_encoder.no_mask_embed.weight.device
        points = torch.zeros(images, prompts, 1, 2, device=device)
        return self.model.prompt_encoder(points, torch.full((images, prompts, 1), -1, device=device), None, None)[0]

    def _decode(
        self, features: SamFeatures, position: Tensor, sparse: Tensor, dense: Tensor | MaskPrompts
    ) -> DecodedMasks:
        """Embedded prompts -> masks; arguments as in `decode_masks`."""
        high_res = (features.high_res or ())[: self.finer_maps]
        return decode_masks(self.model.mask_decoder, features.embedding, position, high_res, sparse, dense)

    # ------------------------------------------------------------------------------------------------ shared

    def encode(self, pixel_values: Tensor) -> SamFeatures:
        """Return the features of normalised images [B, 3, H, W] of the model's square size, with gradients.

        Raises:
            InputError: the images have another size.
        """
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixel_values.shape[-2:]
            raise InputError(
                f"This model takes square images of {self.image_size} x {self.image_size} pixels; "
                f"got {height} x {width}: resize them first, as the processor does."
            )
        return self._encode(pixel_values.to(next(self.model.vision_encoder.parameters()).dtype))

    def decode(
        self,
        features: SamFeatures,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
    ) -> DecodedMasks:
        """Return the masks of every prompt for every mask token (M = 4 in released weights; index 0: single-mask
        token).

        Kinds of prompts can be combined, and each is optional. Coordinates are in pixels of the model input.

        Args:
            features: features of B images; maps that the decoder does not read are ignored.
            input_points: points [B, P, N, 2] as x, y.
            input_labels: labels [B, P, N]: 1 inside, 0 outside, -10 padding; all 1 if not given.
            input_boxes: boxes [B, P, 4] as x1, y1, x2, y2.
            input_masks: mask logits [B, P, 4h, 4w], one mask for each prompt; other sizes are resized.

        Raises:
            InputError: the prompts do not agree on B, P or N, or have too many or too few dimensions; or the features
                lack maps that the mask decoder reads.
        """
        images, given = len(features.embedding), len(features.high_res or ())
        if given < self.finer_maps:
            raise InputError(
                f"This mask decoder reads {self.finer_maps} maps of high_res; the features have {given}: use those "
                "of the same family."
            )
        check_prompts(images, input_points, input_labels, input_boxes, input_masks)
        encoder, device = self.model.prompt_encoder, features.embedding.device
        if input_points is not None and input_labels is None:
            input_labels = torch.ones(input_points.shape[:3], dtype=torch.long, device=device)

        with torch.autocast(device.type, enabled=False):
            if input_points is None and input_boxes is None:
                sparse = self._encode_nothing(images, 1 if input_masks is None else input_masks.shape[1])
            else:
                points = None if input_points is None else input_points.float()
                boxes = None if input_boxes is None else input_boxes.float()
                sparse, _ = encoder(points, input_labels, boxes, None)  # [B, P, T, C]
            position = self._position()
        if input_masks is None:
            dense: Tensor | MaskPrompts = encoder.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        else:
            masks = input_masks.float()
            if masks.shape[-2:] != (4 * self.grid, 4 * self.grid):
                masks = F.interpolate(masks, (4 * self.grid, 4 * self.grid), mode="bilinear", antialias=True)
            dense = MaskPrompts(masks.to(encoder.mask_embed.conv1.weight.dtype), encoder.mask_embed)
        return self._decode(features, position, sparse, dense)

    def select_masks(
        self, decoded: DecodedMasks, multimask_output: bool, by_stability: bool | None = None
    ) -> DecodedMasks:
        """The masks that transformers' model would give, with their tokens.

        Args:
            decoded: all M masks of each prompt.
            multimask_output: true, the M - 1 masks of an ambiguous prompt; false, one mask: the single-mask token's.
            by_stability: for one mask, take the best of the others by predicted IoU where the single-mask token's is
                unstable (its area changes with the threshold). By default where the configuration says
                `dynamic_multimask_via_stability`, in evaluation mode; SAM 1's cannot say so, and it may be asked for.
        """
        config = self.model.config.mask_decoder_config
        masks, iou, tokens = decoded.masks, decoded.iou, decoded.tokens
        if by_stability is None:
            by_stability = not self.training and getattr(config, "dynamic_multimask_via_stability", False)
        if multimask_output or not by_stability:
            kept = slice(1, None) if multimask_output else slice(0, 1)
            return DecodedMasks(masks[:, :, kept], iou[:, :, kept], tokens[:, :, kept], decoded.object_logits)
        delta = getattr(config, "dynamic_multimask_stability_delta", STABILITY_DELTA)
        least = getattr(config, "dynamic_multimask_stability_thresh", STABILITY_THRESHOLD)
        inner, outer = (masks[:, :, 0] > delta).sum((-1, -2)), (masks[:, :, 0] > -delta).sum((-1, -2))  # areas [B, P]
        stable = torch.where(outer > 0, inner / outer, 1.0) >= least
        choice = torch.where(stable, 0, iou[:, :, 1:].argmax(-1) + 1)[:, :, None]  # [B, P, 1]
        return take_masks(decoded, choice)

    def _position(self) -> Tensor:
        """Position encoding of the cells' centres, [1, C, h, w]."""
        code = self.model.prompt_encoder.shared_embedding
        line = (torch.arange(self.grid, device=code.positional_embedding.device) + 0.5) / self.grid
        y, x = torch.meshgrid(line, line, indexing="ij")
        return code(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]

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


def take_masks(decoded: DecodedMasks, choice: Tensor) -> DecodedMasks:
    """Some of each prompt's masks, in the order of choice [B, P, M'] (indices into M)."""
    b, p = choice.shape[:2]
    images = torch.arange(b, device=choice.device)[:, None, None]
    prompts = torch.arange(p, device=choice.device)[:, None]
    masks, iou, tokens = (part[images, prompts, choice] for part in (decoded.masks, decoded.iou, decoded.tokens))
    return DecodedMasks(masks, iou, tokens, decoded.object_logits)


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


def check_prompts(images: int, *prompts: Tensor | None) -> None:
    """Raises InputError unless the prompts, in the order of PROMPT_SHAPES, agree with each other and the images."""
    if torch.compiler.is_compiling():  # lengths are symbols, which cannot be compared without fixing them
        return
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
