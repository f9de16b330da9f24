"""SAM (Kirillov et al. 2023), here called SAM 1: one map at stride 16, no object score."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, SamImageProcessor, SamModel

from ovsam.errors import InputError
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.base import SamSide


class Sam1Side(SamSide):
    """A `SamModel`; takes a `SamConfig`.

    SAM was trained on images whose longer side fills the square, the rest being black padding at the bottom or on the
    right; SAM 2 resizes without keeping the aspect ratio. The image processor does either; the side takes squares.
    """

    model_class = SamModel
    image_processor = SamImageProcessor
    corners_are_points = False

    def _pyramid(self, config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return plain_vit_map(config)

    def _encode(self, pixel_values: Tensor) -> SamFeatures:
        embedding = self.model.vision_encoder(pixel_values).last_hidden_state
        return SamFeatures(embedding=embedding, high_res=(), pyramid=(embedding,))

    def _encode_nothing(self, images: int, prompts: int) -> Tensor:
        none = self.model.prompt_encoder.no_mask_embed.weight
        return torch.zeros(images, prompts, 0, self.width, dtype=none.dtype, device=none.device)


def plain_vit_map(config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`_pyramid` of the families with a plain ViT: one map."""
    vision, prompts, width = config.vision_config, config.prompt_encoder_config, config.mask_decoder_config.hidden_size
    seen, told = (vision.image_size, vision.patch_size), (prompts.image_size, prompts.patch_size)
    if seen != told:
        raise InputError(
            f"The vision encoder's image_size and patch_size are {seen}, the prompt encoder's {told}; "
            "they must be the same."
        )
    if vision.output_channels != width:
        raise InputError(
            f"The vision encoder's output_channels are {vision.output_channels}; they must be the mask decoder's "
            f"hidden_size, {width}."
        )
    return (width,), (vision.image_size // vision.patch_size,)
