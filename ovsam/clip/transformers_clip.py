"""CLIP sides that hold a transformers dual encoder: CLIP, and SigLIP with the fixed-resolution SigLIP 2."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ovsam.clip.base import ClipFeatures, map_blocks, region_pool, value_path
from ovsam.errors import InputError


class _TransformersSide(nn.Module):
    """What both have in common. Any image size will do: position embeddings are interpolated.

    `maps` are the patch tokens after four blocks, all at the stride of the patches; `pool_map` holds an embedding of
    width D for every patch, by the value path, and `pool` averages it.
    """

    def __init__(self, model: CLIPModel | SiglipModel, embed_dim: int, part: str):
        super().__init__()
        self.model = model
        self.embed_dim = embed_dim
        vision = model.config.vision_config
        self.blocks = map_blocks(vision.num_hidden_layers)
        self.channels = (vision.hidden_size,) * len(self.blocks)
        self.strides = (vision.patch_size,) * len(self.blocks)
        self.image_size = vision.image_size
        self.max_text_length = model.config.text_config.max_position_embeddings
        for name, _ in list(model.named_children()):  # vision_model, visual_projection; text_model, text_projection
            if (part == "text" and name.startswith("vis")) or (part == "vision" and name.startswith("text")):
                setattr(model, name, None)

    def encode_image(self, pixel_values: torch.Tensor) -> ClipFeatures:
        """[B, 3, H, W] -> four maps [B, C, h, w] and the patch embeddings [B, D, h, w]."""
        hidden = self.model.vision_model(
            pixel_values, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states  # the input of the first block, then the output of each
        size = [side // self.strides[0] for side in pixel_values.shape[-2:]]
        # The class token, where there is one, comes first: [B, 1 + h*w, C] -> [B, C, h, w]
        states = [state[:, -math.prod(size) :].mT.unflatten(2, size) for state in hidden]
        maps = tuple(states[block + 1] for block in self.blocks)
        return ClipFeatures(maps=maps, pool_map=self._embed_patches(states))

    def _embed_patches(self, states: list[torch.Tensor]) -> torch.Tensor:
        """States before and after every block, each [B, C, h, w] -> [B, D, h, w]."""
        raise NotImplementedError

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[K, T] -> [K, D], L2-normalised. No mask is needed: see the classes for what padding does."""
        return F.normalize(self.model.get_text_features(input_ids).pooler_output, dim=-1)

    def pool(
        self, features: ClipFeatures, masks: torch.Tensor | None = None, boxes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the patch embeddings under masks [B, P, Hm, Wm] or in boxes [B, P, 4] -> [B, P, D], L2-normalised."""
        return F.normalize(region_pool(features.pool_map, self.strides[-1], masks, boxes), dim=-1)


class TransformersClipSide(_TransformersSide):
    """CLIP (Radford et al., 2021). Its value path is that of the last block; the text tower is causal and does not read
    what comes after a phrase."""

    image_mean = tuple(OPENAI_CLIP_MEAN)
    image_std = tuple(OPENAI_CLIP_STD)

    def __init__(self, config: CLIPConfig, part: str = "all"):
        super().__init__(CLIPModel(config), config.projection_dim, part)

    def _embed_patches(self, states: list[torch.Tensor]) -> torch.Tensor:
        vision = self.model.vision_model
        last_block = vision.encoder.layers[-1]

        def embed(tokens: torch.Tensor) -> torch.Tensor:
            return self.model.visual_projection(vision.post_layernorm(last_block(tokens, attention_mask=None)))

        return value_path(embed, states[-2])


class TransformersSiglipSide(_TransformersSide):
    """SigLIP (Zhai et al., 2023), and SigLIP 2 at a fixed resolution. Its value path is that of the attention pooling
    head; the text tower was trained on padding and reads it, so T must be `max_text_length`."""

    image_mean = tuple(IMAGENET_STANDARD_MEAN)
    image_std = tuple(IMAGENET_STANDARD_STD)

    def __init__(self, config: SiglipConfig, part: str = "all"):
        super().__init__(SiglipModel(config), config.vision_config.hidden_size, part)

    def _embed_patches(self, states: list[torch.Tensor]) -> torch.Tensor:
        vision = self.model.vision_model
        return value_path(lambda tokens: vision.head(vision.post_layernorm(tokens)), states[-1])

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[K, max_text_length] -> [K, D], L2-normalised."""
        if input_ids.shape[1] != self.max_text_length:
            raise InputError(
                f"SigLIP reads phrases padded to {self.max_text_length} tokens, not {input_ids.shape[1]}; tokenise "
                f"them with padding='max_length', max_length={self.max_text_length}."
            )
        return super().encode_text(input_ids)
