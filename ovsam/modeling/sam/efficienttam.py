"""EfficientTAM (Xiong et al. 2024): SAM 2's prompts and masks on a plain ViT, of which only the last map is used.

This is the image path only: transformers has no tracker for it. The ViT is SAM's without relative positions (windowed
blocks, a few global ones, a neck of two convolutions), so transformers' `SamVisionEncoder` runs it unchanged.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, SamVisionConfig
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamVisionEncoder
from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig, Sam2PromptEncoderConfig
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder, Sam2PositionalEmbedding, Sam2PromptEncoder

from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.base import SamSide
from ovsam.modeling.sam.sam1 import plain_vit_map


class EfficientTamVisionConfig(SamVisionConfig):
    """A plain ViT; the defaults are EfficientTAM-S (Ti has hidden_size 192 and 3 heads).

    The released position embedding has 14 x 14 cells and a class token; here it has the size of the grid, resized once
    (bicubic) instead of at every call.
    """

    model_type = "efficienttam_vision_model"

    hidden_size: int = 384
    num_attention_heads: int = 6
    use_rel_pos: bool = False


class EfficientTamConfig(PreTrainedConfig):
    """An EfficientTAM, image path only: a plain ViT with SAM 2's prompt encoder and mask decoder."""

    model_type = "efficienttam"
    sub_configs_defaults = {
        "vision_config": EfficientTamVisionConfig,
        "prompt_encoder_config": Sam2PromptEncoderConfig,
        "mask_decoder_config": Sam2MaskDecoderConfig,
    }

    vision_config: PreTrainedConfig | None = None
    prompt_encoder_config: PreTrainedConfig | None = None
    mask_decoder_config: PreTrainedConfig | None = None
    initializer_range: float = 0.02


AutoConfig.register(EfficientTamVisionConfig.model_type, EfficientTamVisionConfig)
AutoConfig.register(EfficientTamConfig.model_type, EfficientTamConfig)


class EfficientTamModel(PreTrainedModel):
    """EfficientTAM with its parts named as in transformers' `Sam2Model`."""

    config: EfficientTamConfig
    base_model_prefix = "efficienttam"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: EfficientTamConfig):
        super().__init__(config)
        prompts, decoder = config.prompt_encoder_config, config.mask_decoder_config
        self.shared_image_embedding = Sam2PositionalEmbedding(prompts)
        self.vision_encoder = SamVisionEncoder(config.vision_config)
        self.prompt_encoder = Sam2PromptEncoder(prompts)
        decoder._attn_implementation = config._attn_implementation  # not inherited, since it is no PreTrainedModel
        self.mask_decoder = Sam2MaskDecoder(decoder)
        del self.mask_decoder.conv_s0, self.mask_decoder.conv_s1  # there are no finer maps
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, decoder.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Sam2PositionalEmbedding):
            init.normal_(module.positional_embedding, std=module.scale)
        elif isinstance(module, EfficientTamModel):
            init.zeros_(module.no_memory_embedding)


class EfficientTamSide(SamSide):
    """An `EfficientTamModel`; takes an `EfficientTamConfig`. One map, at stride 16: there is no `high_res`."""

    model_class = EfficientTamModel
    encoder_parts = ("vision_encoder", "no_memory_embedding")

    def _pyramid(self, config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return plain_vit_map(config)

    def _encode(self, pixel_values: Tensor) -> SamFeatures:
        raw = self.model.vision_encoder(pixel_values).last_hidden_state
        embedding = raw + self.model.no_memory_embedding.view(-1, 1, 1)
        return SamFeatures(embedding=embedding, high_res=(), pyramid=(raw,))
