"""Stage `clip`: the image tower of the small dual encoder, drawn towards a locked text tower (LiT, Zhai et al. 2022).

A "picture" is one object of a scene: the tower sees a whole window once, and each object's features are averaged under
its mask. That costs per object what a small crop costs, and the tower learns the dense features that the adapters will
read, at the scale and in the clutter in which they will read them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.clip.base import ClipFeatures, mask_pool
from ovsam.clip.dual_encoder import DualEncoderConfig, DualEncoderSide

from .targets import object_masks
from .texts import WordTable, text_config


class ClipStage(nn.Module):
    def __init__(self, words: WordTable, architecture: str, label_smoothing: float, keyword_weight: float):
        super().__init__()
        self.clip = DualEncoderSide(
            DualEncoderConfig(architecture=architecture, text_config=text_config()), part="vision"
        )
        self.clip.to(memory_format=torch.channels_last)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.label_smoothing, self.keyword_weight = label_smoothing, keyword_weight
        # Classes are the base words; a base word's class is its rank among them.
        self.register_buffer("names", words.names[words.is_base], persistent=False)  # [V, D]
        self.register_buffer("keywords", words.keywords, persistent=False)  # [Kw, D]
        share = words.has_keyword.float() / words.has_keyword.sum(1, keepdim=True).clamp(min=1)
        self.register_buffer("keyword_share", share, persistent=False)  # [W, Kw], rows sum to 1 or 0
        self.register_buffer("class_of", words.is_base.long().cumsum(0) - 1, persistent=False)  # [W]
        self.register_buffer("mean", torch.tensor(self.clip.image_mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.clip.image_std)[:, None, None] * 255, persistent=False)

    def published_state(self) -> dict[str, Tensor]:
        return {f"clip.{name}": tensor for name, tensor in self.clip.state_dict().items()}

    def forward(self, image: Tensor, index_map: Tensor, word_ids: Tensor) -> dict[str, Tensor]:
        features = self.clip.encode_image(self.pixels(image))
        masks = object_masks(index_map, word_ids.shape[1])  # [B, O, H, W]
        visible = (masks.flatten(2).sum(-1) >= 64) & (word_ids >= 0)
        return self.losses(features, masks, visible, word_ids)

    def pixels(self, image: Tensor) -> Tensor:
        return ((image.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def losses(self, features: ClipFeatures, masks: Tensor, visible: Tensor, word_ids: Tensor) -> dict[str, Tensor]:
        embeds = F.normalize(mask_pool(features.pool_map, masks)[visible].float(), dim=-1)  # [n, D]
        ids = word_ids[visible]
        scale = self.log_scale.clamp(max=4.6).exp()
        logits = scale * embeds @ self.names.T  # [n, V]
        classes = self.class_of[ids]
        name_loss = F.cross_entropy(logits, classes, label_smoothing=self.label_smoothing)
        keyword_logits = scale * embeds @ self.keywords.T  # [n, Kw]
        share = self.keyword_share[ids]
        keyword_loss = -(share * keyword_logits.log_softmax(-1)).sum(-1).mean()
        metrics = {"top1": (logits.argmax(-1) == classes).float().mean(), "scale": scale.detach()}
        return {"loss": name_loss + self.keyword_weight * keyword_loss, "name_loss": name_loss.detach(), **metrics}
