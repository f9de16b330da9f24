"""Clip2SamAdapter: class embedding of a prompted mask, from CLIP's maps (Open-Vocabulary SAM, Yuan et al. 2024,
§3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align
from transformers import initialization as init

from ovsam.modeling.adapters.common import AdapterModel, RegionProjection, ResidualMlp, TopDown, pool_from_pyramid
from ovsam.modeling.clip.base import mask_pool
from ovsam.modeling.geometry import boxes_to_clip, maps_to_clip
from ovsam.modeling.remote_code import RemoteCodeConfig
from ovsam.modeling.scoring import BlendedNaming, Naming

ROI = 7


class Clip2SamConfig(RemoteCodeConfig):
    """Configuration of Clip2SamAdapter.

    Args:
        in_channels: channels of CLIP's maps at strides 4, 8, 16, 32.
        embed_dim: D.
        width: width of the adapter.
        token_dim: the mask decoder's width C, or 0 to ignore its tokens (as in the released Open-Vocabulary SAM, which
            multiplies its label token by zero).
        mlp_dim: hidden width of a residual MLP on the class embedding, or 0 for none. A linear map of the features
            cannot reach the text embeddings of class names that look alike and are named differently, or the reverse.
        trained_words: class names of the training data. If there are any, masks are classified by a blend of the
            adapter and CLIP itself, in which CLIP has a small weight for these class names and a large one for others.
        clip_scale, clip_shift: scale and shift of CLIP's own cosines in that blend.
    """

    model_type = "ovsam_clip2sam"
    auto_classes = {"AutoModel": "Clip2SamAdapter"}

    in_channels: list | tuple = (32, 64, 96, 960)
    embed_dim: int = 384
    width: int = 128
    token_dim: int = 0
    mlp_dim: int = 0
    trained_words: list | tuple = ()
    clip_scale: float = 100.0
    clip_shift: float = -0.25


class Clip2SamAdapter(AdapterModel):
    """Light FPN + RoIAlign on the box, weighted by the mask, plus the mask token; added to CLIP's own pooled embedding.

    The logit of a text query is (cosine + logit_shift) * exp(log_scale); both are calibrated and stored as weights.
    """

    config: Clip2SamConfig
    base_model_prefix = "clip2sam"

    def __init__(self, config: Clip2SamConfig):
        super().__init__(config)
        channels = tuple(config.in_channels)
        self.region = RegionProjection(channels, config.embed_dim)
        self.pyramid = TopDown(channels[1:], config.width)
        self.roi_conv = nn.Conv2d(config.width + 1, config.width, 3, padding=1)  # + 1: the mask itself
        self.roi_out = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.token = nn.Linear(config.token_dim, config.width) if config.token_dim else None
        self.reads_tokens = bool(config.token_dim)
        self.embedding = nn.Linear(config.width, config.embed_dim)
        self.mlp = ResidualMlp(config.embed_dim, config.mlp_dim) if config.mlp_dim else None
        self.log_scale = nn.Parameter(torch.tensor(2.7))
        self.logit_shift = nn.Parameter(torch.tensor(-0.7))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.embedding or (self.mlp is not None and module is self.mlp.down):
            # The adapter starts as the tower's own embedding.
            init.zeros_(module.weight)
        elif module is self:
            init.constant_(self.log_scale, 2.7)
            init.constant_(self.logit_shift, -0.7)

    def forward(self, maps: tuple[Tensor, ...], boxes: Tensor, masks: Tensor, tokens: Tensor | None = None) -> Tensor:
        """
        Args:
            maps: CLIP's maps at strides 4, 8, 16, 32, each [B, Ci, hi, wi].
            boxes: [B, P, 4] xyxy in pixels of the model input.
            masks: probabilities [B, P, H/4, W/4].
            tokens: the mask decoder's mask tokens [B, P, C]; required if `token_dim` is not 0.

        Returns:
            class embeddings [B, P, D], L2-normalised.
        """
        b, p = boxes.shape[:2]
        pooled = mask_pool(self.region(maps), masks)  # [B, P, D]

        # [B*P, width, 7, 7], about 7 cells of its level across each box
        features = pool_from_pyramid(self.pyramid(maps[1:]), 8, boxes, ROI, 8 * ROI, sampling_ratio=2)
        each = torch.cat([torch.arange(b * p, device=boxes.device)[:, None], boxes.flatten(0, 1)], 1)
        inside = roi_align(masks.flatten(0, 1)[:, None].float(), each.float(), ROI, 1 / 4, 2, True).to(features.dtype)

        hidden = F.relu(self.roi_conv(torch.cat([features, inside - 0.5], 1)))
        hidden = F.relu(self.roi_out(hidden))
        weight = inside + 0.05  # context has a small weight, which also avoids division by zero for an empty mask
        hidden = (hidden * weight).sum((2, 3)) / weight.sum((2, 3))  # [B*P, width]
        hidden = hidden.view(b, p, self.config.width)
        if self.token is not None:
            hidden = hidden + F.relu(self.token(tokens))
        embeds = pooled + self.embedding(hidden)  # [B, P, D]
        if self.mlp is not None:
            embeds = self.mlp(embeds)
        return F.normalize(embeds, dim=-1)

    def name(self, features, masks: Tensor, boxes: Tensor, tokens: Tensor | None, clip) -> Naming | BlendedNaming:
        """Return the naming of masks in a whole model.

        Args:
            features: the model's OVSamFeatures.
            masks: logits [B, P, H/4, W/4] over the model input.
            boxes: [B, P, 4] xyxy in pixels of the model input.
            tokens: the mask decoder's mask tokens [B, P, C]; None if the adapter does not read them.
            clip: the model's CLIP side, for adapters that use it.
        """
        frame, size = features.clip_frame, features.clip_size
        seen = maps_to_clip(masks.sigmoid(), frame, 4 * masks.shape[-1], size)
        embeds = self(features.maps, boxes_to_clip(boxes, frame), seen, tokens)
        adapter = Naming(embeds, self.log_scale.exp(), self.logit_shift)
        config = self.config
        if not config.trained_words or features.clip is None:
            return adapter
        own = clip.pool(features.clip, boxes=boxes_to_clip(boxes, frame))  # [B, P, D]
        return BlendedNaming(
            adapter, Naming(own, config.clip_scale, config.clip_shift), frozenset(config.trained_words)
        )

    def logits(self, embeds: Tensor, words: Tensor) -> Tensor:
        """embeds [B, P, D], words [K, D] -> [B, P, K]"""
        return (embeds @ words.T + self.logit_shift) * self.log_scale.exp()
