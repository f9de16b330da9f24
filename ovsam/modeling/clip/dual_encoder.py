"""A small CLIP: a convolutional image tower of timm and a mean-pooled BERT text tower, as in sentence encoders.

The text tower is locked (LiT, Zhai et al. 2022): only the image tower is trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedConfig

from ovsam.modeling.clip.base import ClipSide, boxes_to_masks, mask_pool
from ovsam.modeling.outputs import ClipFeatures


class SentenceClipConfig(PreTrainedConfig):
    """An image tower of timm, `architecture`, beside a sentence encoder, `text_config`."""

    sub_configs_defaults = {"text_config": BertConfig}

    architecture: str = ""
    text_config: dict | PreTrainedConfig | None = None
    embed_dim: int = 384
    image_size: int = 512
    image_mean: list | tuple = (0.485, 0.456, 0.406)
    image_std: list | tuple = (0.229, 0.224, 0.225)
    max_text_length: int = 64


class DualEncoderConfig(SentenceClipConfig):
    """The maps of `architecture` at `out_indices` must have strides 4, 8, 16 and 32."""

    model_type = "ovsam_dual_encoder"

    architecture: str = "mobilenetv4_conv_small"
    out_indices: list | tuple = (1, 2, 3, 4)


class DualEncoderSide(ClipSide):
    """Image -> maps at strides 4, 8, 16, 32 and a [B, D, h/16, w/16] map to pool; texts -> [K, D].

    The embedding of a region is the mean of `pool_map` over it, that of a whole image the mean over the map. `part` is
    "all", "vision" or "text"; weights have the same names in all three.
    """

    logit_scale = 100.0  # the limit in training, as in CLIP; it is not stored
    logit_shift = 0.0

    def __init__(self, config: DualEncoderConfig, part: str = "all"):
        import timm  # here, since it takes long to import

        super().__init__()
        self.vision_model = timm.create_model(
            config.architecture, features_only=True, out_indices=tuple(config.out_indices), pretrained=False
        )
        self.text_model = None if part == "vision" else BertModel(config.text_config, add_pooling_layer=False)
        self.channels = tuple(self.vision_model.feature_info.channels())
        self.strides = tuple(self.vision_model.feature_info.reduction())
        # The pooled map combines detail (stride 16) and context (stride 32).
        self.detail_projection = nn.Conv2d(self.channels[-2], config.embed_dim, 1)
        self.context_projection = nn.Conv2d(self.channels[-1], config.embed_dim, 1)
        self.embed_dim = config.embed_dim
        self.image_size = config.image_size
        self.image_mean = tuple(config.image_mean)
        self.image_std = tuple(config.image_std)
        self.max_text_length = config.max_text_length
        if part == "text":
            self.vision_model = self.detail_projection = self.context_projection = None

    def encode_image(self, pixel_values: Tensor) -> ClipFeatures:
        maps = tuple(self.vision_model(pixel_values))
        context = F.interpolate(self.context_projection(maps[-1]), scale_factor=2.0, mode="nearest")
        return ClipFeatures(maps=maps, pool_map=self.detail_projection(maps[-2]) + context)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [K, T, D]
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def pool(self, features: ClipFeatures, masks: Tensor | None = None, boxes: Tensor | None = None) -> Tensor:
        if masks is None:
            masks = boxes_to_masks(boxes, features.pool_map.shape[-2:], self.strides[-2])
        return F.normalize(mask_pool(features.pool_map, masks), dim=-1)

    def dense(self, features: ClipFeatures) -> Tensor:
        return F.normalize(features.pool_map, dim=1)
