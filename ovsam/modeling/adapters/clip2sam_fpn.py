"""Clip2SamFpnAdapter: the CLIP2SAM adapter of the Open-Vocabulary SAM release (Yuan et al. 2024, §3.2): a feature
pyramid, RoIAlign on the box of the mask, and one linear layer."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.modeling.adapters.common import AdapterModel, TopDown, pool_from_pyramid
from ovsam.modeling.geometry import boxes_to_clip, maps_to_clip
from ovsam.modeling.remote_code import RemoteCodeConfig
from ovsam.modeling.scoring import FusedNaming
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import EMPTY


class Clip2SamFpnConfig(RemoteCodeConfig):
    """`in_channels` are the channels of CLIP's maps at strides 4, 8, 16, 32; `roi_size` is 12 in the release for COCO
    and 7 in the one for LVIS; a box less than twice `finest_size` pixels wide is read at stride 4, less than four times
    at stride 8, and so on. `log_scale` is the scale of the softmax. `trained_words` are the class names of the training
    data, in lower case and without underscores. The defaults are the released sizes."""

    model_type = "ovsam_clip2sam_fpn"
    auto_classes = {"AutoModel": "Clip2SamFpnAdapter"}

    in_channels: list | tuple = (384, 768, 1536, 3072)
    width: int = 256
    embed_dim: int = 768
    roi_size: int = 12
    finest_size: int = 56
    log_scale: float = 4.6052
    trained_words: list | tuple = ()


class Clip2SamFpnAdapter(AdapterModel):
    """The class embedding of a mask, from the box around it; CLIP's own embedding enters only through its probability.

    The label token of the released decoder is unused: it is multiplied by zero.
    """

    config: Clip2SamFpnConfig
    base_model_prefix = "clip2sam"

    def __init__(self, config: Clip2SamFpnConfig):
        super().__init__(config)
        channels = tuple(config.in_channels)
        self.pyramid = TopDown(channels, config.width)
        self.smooth = nn.ModuleList([nn.Conv2d(config.width, config.width, 3, padding=1) for _ in channels])
        self.roi_conv = nn.Conv2d(config.width, config.embed_dim, 1, bias=False)
        self.post_init()

    def forward(self, maps: tuple[Tensor, ...], masks: Tensor) -> Tensor:
        """
        Args:
            maps: CLIP's maps at strides 4, 8, 16, 32, each [B, Ci, hi, wi].
            masks: probabilities [B, P, Hm, Wm] over CLIP's input, at any resolution.

        Returns:
            class embeddings [B, P, D], L2-normalised; zeros for an empty mask.
        """
        stride = 4 * maps[0].shape[-1] / masks.shape[-1]
        boxes = masks_to_boxes(masks > 0.5) * stride  # [B, P, 4] in pixels of CLIP's input
        config = self.config
        rois = pool_from_pyramid(self.levels(maps), 4, boxes, config.roi_size, config.finest_size)
        embeds = F.relu(self.roi_conv(rois)).mean((2, 3))  # [B*P, D, r, r] -> [B*P, D]
        return F.normalize(embeds, dim=-1).unflatten(0, boxes.shape[:2])

    def name(self, features, masks: Tensor, boxes: Tensor, tokens: Tensor | None, clip) -> FusedNaming:
        """Return the naming of masks in a whole model, fused with CLIP's own; arguments as in `Clip2SamAdapter.name`.

        The adapter pools over the box of the mask, CLIP over `boxes`, which may be given by the user.
        """
        frame, size = features.clip_frame, features.clip_size
        if frame is not None:  # no mask outside the model input
            masks = maps_to_clip(masks - EMPTY, frame, 4 * masks.shape[-1], size) + EMPTY
        coarse = F.interpolate(masks, features.maps[-1].shape[-2:], mode="bilinear", align_corners=False)
        return FusedNaming(
            embeds=self(features.maps, masks.sigmoid()),
            clip_embeds=clip.pool(features.clip, boxes=boxes_to_clip(boxes, frame)),
            clip_sees=(coarse > 0).flatten(2).any(2),
            scale=math.exp(self.config.log_scale),
            trained_words=frozenset(self.config.trained_words),
        )

    def levels(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """Maps at strides 4, 8, 16, 32 -> the feature pyramid at the same strides, each [B, width, hi, wi]."""
        return [conv(level) for conv, level in zip(self.smooth, self.pyramid(maps), strict=True)]
