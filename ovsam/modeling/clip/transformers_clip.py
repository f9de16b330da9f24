"""CLIP sides that hold a dual encoder of transformers: CLIP, SigLIP, SigLIP 2 at a fixed resolution, and SigLIP 2 at
any resolution ("NaFlex")."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel
from transformers import initialization as init
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ovsam.errors import InputError
from ovsam.modeling.clip.base import ClipSide, map_blocks, region_pool, value_path
from ovsam.modeling.outputs import ClipFeatures


class _TransformersSide(ClipSide):
    """Shared base. Images may have any size: position embeddings are interpolated.

    `maps` are the patch tokens after four blocks, all at the stride of the patches; `pool_map` holds an embedding of
    width D for every patch, by the value path, and `pool` averages it.
    """

    def __init__(self, config: CLIPConfig | SiglipConfig | Siglip2Config, embed_dim: int, image_size: int, part: str):
        super().__init__()
        self.model = model = self.model_class(config)
        self.embed_dim = embed_dim
        vision = config.vision_config
        self.blocks = map_blocks(vision.num_hidden_layers)
        self.channels = (vision.hidden_size,) * len(self.blocks)
        self.strides = (vision.patch_size,) * len(self.blocks)
        self.image_size = image_size
        self.max_text_length = config.text_config.max_position_embeddings
        for name, _ in list(model.named_children()):  # vision_model, visual_projection; text_model, text_projection
            if (part == "text" and name.startswith("vis")) or (part == "vision" and name.startswith("text")):
                setattr(model, name, None)

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.model.logit_scale.float().exp().squeeze()

    @property
    def logit_shift(self) -> torch.Tensor | float:
        return 0.0

    def encode_image(self, pixel_values: torch.Tensor) -> ClipFeatures:
        """[B, 3, H, W] -> four maps [B, C, h, w] and the patch embeddings [B, D, h, w]."""
        hidden = self._hidden_states(pixel_values)
        size = [side // self.strides[0] for side in pixel_values.shape[-2:]]
        # The class token, where there is one, comes first: [B, 1 + h*w, C] -> [B, C, h, w]
        states = [state[:, -math.prod(size) :].mT.unflatten(2, size) for state in hidden]
        maps = tuple(states[block + 1] for block in self.blocks)
        return ClipFeatures(maps=maps, pool_map=self._embed_patches(states))

    def _hidden_states(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, 3, H, W] -> the input of the first block, then the output of each, each [B, (1 +) h*w, C]."""
        vision = self.model.vision_model
        return vision(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states

    def _embed_patches(self, states: list[torch.Tensor]) -> torch.Tensor:
        """States before and after every block, each [B, C, h, w] -> [B, D, h, w]."""
        raise NotImplementedError

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[K, T] -> [K, D], L2-normalised. The attention mask is not used; the classes describe the effect of
        padding."""
        return F.normalize(self.model.get_text_features(input_ids).pooler_output, dim=-1)

    def pool(
        self, features: ClipFeatures, masks: torch.Tensor | None = None, boxes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the patch embeddings under masks [B, P, Hm, Wm] or in boxes [B, P, 4] -> [B, P, D], L2-normalised."""
        return F.normalize(region_pool(features.pool_map, self.strides[-1], masks, boxes), dim=-1)

    def dense(self, features: ClipFeatures) -> torch.Tensor:
        """The patch embeddings [B, D, h, w], L2-normalised."""
        return F.normalize(features.pool_map, dim=1)


class ClipModel(CLIPModel):
    """A CLIPModel that also initialises its logit scale if a checkpoint lacks it, which transformers does not."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)


class TransformersClipSide(_TransformersSide):
    """CLIP (Radford et al., 2021). Patches take the value path of the last block; the text tower is causal and does not
    read the padding after a phrase."""

    image_mean = tuple(OPENAI_CLIP_MEAN)
    image_std = tuple(OPENAI_CLIP_STD)
    model_class = ClipModel

    def __init__(self, config: CLIPConfig, part: str = "all"):
        super().__init__(config, config.projection_dim, config.vision_config.image_size, part)

    def _embed_patches(self, states: list[torch.Tensor]) -> torch.Tensor:
        vision = self.model.vision_model
        last_block = vision.encoder.layers[-1]

        def embed(tokens: torch.Tensor) -> torch.Tensor:
            return self.model.visual_projection(vision.post_layernorm(last_block(tokens, attention_mask=None)))

        return value_path(embed, states[-2])


class TransformersSiglipSide(_TransformersSide):
    """SigLIP (Zhai et al., 2023), and SigLIP 2 at a fixed resolution. Patches take the value path of the attention
    pooling head; the text tower was trained with padding and reads it, so T must be `max_text_length`."""

    image_mean = tuple(IMAGENET_STANDARD_MEAN)
    image_std = tuple(IMAGENET_STANDARD_STD)
    model_class = SiglipModel
    text_padding = "max_length"
    softmax = False

    def __init__(self, config: SiglipConfig, part: str = "all"):
        super().__init__(config, config.vision_config.hidden_size, config.vision_config.image_size, part)

    @property
    def logit_shift(self) -> torch.Tensor:
        return self.model.logit_bias.float().squeeze() / self.logit_scale

    def _embed_patches(self, states: list[torch.Tensor]) -> torch.Tensor:
        vision = self.model.vision_model
        return value_path(lambda tokens: vision.head(vision.post_layernorm(tokens)), states[-1])

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[K, max_text_length] -> [K, D], L2-normalised."""
        if input_ids.shape[1] != self.max_text_length:
            raise InputError(
                f"SigLIP takes phrases padded to {self.max_text_length} tokens, not {input_ids.shape[1]}; tokenise "
                f"them with padding='max_length', max_length={self.max_text_length}."
            )
        return super().encode_text(input_ids)


class TransformersSiglip2Side(TransformersSiglipSide):
    """SigLIP 2 (Tschannen et al., 2025) at any resolution and aspect ratio ("NaFlex"). The patches of an image always
    fill the grid of its own H and W, so that there is no padding; `image_size` is the size of the grid in training.
    """

    model_class = Siglip2Model

    def __init__(self, config: Siglip2Config, part: str = "all"):
        vision = config.vision_config
        image_size = math.isqrt(vision.num_patches) * vision.patch_size
        _TransformersSide.__init__(self, config, vision.hidden_size, image_size, part)

    def _hidden_states(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        patch = self.strides[0]
        batch, _, *size = pixel_values.shape
        h, w = (side // patch for side in size)
        patches = pixel_values[..., : h * patch, : w * patch].unflatten(3, (w, patch)).unflatten(2, (h, patch))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, 3, h, p, w, p] -> [B, h*w, p*p*3]
        # No mask: no patch is padding. The shapes are read one by one, so they stay on the CPU.
        shapes = torch.tensor([[h, w]] * batch, device="cpu")
        return self.model.vision_model(patches, None, shapes, output_hidden_states=True).hidden_states
