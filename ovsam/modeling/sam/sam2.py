"""SAM 2 and 2.1 (Ravi et al. 2024)."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

from ovsam.errors import InputError
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.base import SamSide
from ovsam.modeling.sam.hiera import hiera_pyramid


class Sam2Side(SamSide):
    """A `Sam2Model`; takes a `Sam2Config`, whose trunk is Hiera or a `SamTrunkConfig`."""

    model_class = Sam2Model
    trackers: ClassVar[tuple[str, ...]] = ("sam2_video",)
    encoder_parts = ("vision_encoder", "no_memory_embedding")
    image_layers = ("conv_s0", "conv_s1")
    finer_maps = 2

    def _pyramid(self, config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        vision, grid = config.vision_config, self.grid
        sizes = [list(size) for size in vision.backbone_feature_sizes]
        if sizes != [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]:
            raise InputError(
                f"For images of {self.image_size} x {self.image_size} pixels backbone_feature_sizes must be "
                f"{[[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]}; got {sizes}."
            )
        return (vision.fpn_hidden_size,) * 3, (4 * grid, 2 * grid, grid)

    def _encode(self, pixel_values: Tensor) -> SamFeatures:
        decoder = self.model.mask_decoder
        encoder = self.model.vision_encoder
        stock = torch.is_grad_enabled() or torch.compiler.is_compiling()  # which would unroll the strips
        if stock or not isinstance(encoder.backbone, Sam2HieraDetModel):
            pyramid = tuple(encoder(pixel_values, return_dict=True).fpn_hidden_states[:3])
        else:
            pyramid = hiera_pyramid(encoder, pixel_values)
        return SamFeatures(
            embedding=pyramid[2] + self.model.no_memory_embedding.view(-1, 1, 1),
            high_res=(decoder.conv_s0(pyramid[0]), decoder.conv_s1(pyramid[1])),
            pyramid=pyramid,
        )
