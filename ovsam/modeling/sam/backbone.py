"""Other image encoders under the neck of SAM 2: one class that turns the feature maps of a backbone into its input.

`Sam2Config(vision_config={"backbone_config": SamTrunkConfig(backbone_config=...), ...})` builds a SAM 2 on Hiera of
transformers (`hiera`), ConvNeXt V2 (`convnextv2`), or any model of timm (`timm_backbone`: RepViT, RegNet, ...). EdgeTAM
takes models of timm directly. A plain ViT has one map and no pyramid: see `efficienttam`.
"""

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from ovsam.errors import InputError

STRIDES = (4, 8, 16, 32)


class SamTrunkConfig(PreTrainedConfig):
    """Configuration of a SAM 2 trunk made of any backbone of transformers.

    `backbone_config` is the configuration of a class that `AutoBackbone` supports, with four `out_features` or
    `out_indices` whose maps have strides 4, 8, 16 and 32. `Sam2VisionConfig.backbone_channel_list` lists their
    channels, coarsest map first.
    """

    model_type = "ovsam_sam_trunk"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="hiera")}

    backbone_config: dict | PreTrainedConfig | None = None


class SamTrunk(PreTrainedModel):
    """Backbone whose feature maps have the layout that `Sam2VisionModel` expects: channels last, finest first.

    Raises:
        InputError: the backbone does not return four maps at strides 4, 8, 16 and 32.
    """

    config: SamTrunkConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: SamTrunkConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the backbone initialises itself."""

    def forward(self, pixel_values: Tensor, **kwargs) -> ModelOutput:
        maps = self.backbone(pixel_values, return_dict=True).feature_maps
        sides = [pixel_values.shape[-1] // stride for stride in STRIDES]
        if [feature.shape[-1] for feature in maps] != sides:
            found = [list(feature.shape[-2:]) for feature in maps]
            raise InputError(
                f"A trunk must return four maps at strides 4, 8, 16 and 32; this one returns {found} for images of "
                f"{pixel_values.shape[-1]} pixels: choose its out_indices or out_features accordingly."
            )
        maps = tuple(feature.permute(0, 2, 3, 1) for feature in maps)  # [B, C, h, w] -> [B, h, w, C]
        return ModelOutput(
            last_hidden_state=maps[-1], intermediate_hidden_states=maps, hidden_states=None, attentions=None
        )


AutoConfig.register(SamTrunkConfig.model_type, SamTrunkConfig)
AutoModel.register(SamTrunkConfig, SamTrunk)
