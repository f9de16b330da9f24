"""The CLIP side that holds an open_clip model: ViT, ModifiedResNet, and timm towers such as ConvNeXt.

open_clip and timm are imported where a model is built: they take as long to import as the rest of ovsam.
"""

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ovsam.errors import InputError
from ovsam.modeling.clip.base import ClipSide, map_blocks, region_pool, value_path
from ovsam.modeling.outputs import ClipFeatures
from ovsam.ops.boxes import masks_to_boxes

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer


class OpenClipConfig(PreTrainedConfig):
    """Configuration of an open_clip model.

    Args:
        model_cfg: the `model_cfg` of open_clip (embed_dim, vision_cfg, text_cfg, ...), as in its
            `open_clip_config.json`; ViT-B-32 by default. `quick_gelu` must be set for the weights that need it.
        image_size: side of the square input in pixels; by default, and always for transformers, that of `model_cfg`.
        image_mean: mean of each colour channel.
        image_std: standard deviation of each colour channel.
    """

    model_type = "ovsam_open_clip"

    model_cfg: dict | None = None
    image_size: int | None = None
    image_mean: list | tuple = tuple(OPENAI_CLIP_MEAN)
    image_std: list | tuple = tuple(OPENAI_CLIP_STD)

    def __post_init__(self, **kwargs):
        if self.model_cfg is None:
            import open_clip

            self.model_cfg = open_clip.get_model_config("ViT-B-32")
        if self.image_size is None:
            self.image_size = self.model_cfg["vision_cfg"].get("image_size", 224)
        super().__post_init__(**kwargs)


class OpenClipSide(PreTrainedModel, ClipSide):
    """An open_clip model, built from its configuration alone, without files or a network.

    Weights have the layout of `open_clip.CustomTextCLIP` (text tower under `text.`), whichever class open_clip uses.
    The `_…Tower` classes of this file define `maps` and the pooling of regions for each kind of tower.

    Raises:
        InputError: the tower is not supported.
    """

    config: OpenClipConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True

    def __init__(self, config: OpenClipConfig, part: str = "all"):
        import open_clip

        super().__init__(config)
        model_cfg = copy.deepcopy(config.model_cfg)
        model_cfg.pop("custom_text", None)
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
        if "multimodal_cfg" in model_cfg or "hf_model_name" in model_cfg["text_cfg"]:
            raise InputError(
                "CoCa and text towers of the Hugging Face Hub are not supported; choose another open_clip model."
            )
        self.model = open_clip.CustomTextCLIP(**model_cfg)
        self.tower = _tower(self.model.visual)
        self.channels = self.tower.channels
        self.strides = self.tower.strides
        self.embed_dim = model_cfg["embed_dim"]
        self.image_size = config.image_size
        self.image_mean = tuple(config.image_mean)
        self.image_std = tuple(config.image_std)
        self.max_text_length = self.model.context_length
        self.text_padding = "max_length" if self._reads_padding else "longest"
        self.softmax = self.model.logit_bias is None  # in open_clip, models trained with SigLIP's loss have a bias
        if part == "text":
            self.model.visual = self.tower = None
        elif part == "vision":
            self.model.text = None
        for tensor in (*self.parameters(), *self.buffers()):
            # open_clip and timm have initialised the weights, except on the meta device, so post_init must not.
            tensor._is_hf_initialized = not tensor.is_meta
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the tensors that `from_pretrained` left as uninitialised memory: weights that the checkpoint
        lacks, and buffers that are not saved (the causal mask, rotary tables, window indices)."""
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, std=0.02)
        super()._init_weights(module)
        if hasattr(module, "build_causal_mask") and module.attn_mask is not None:  # open_clip's text transformer
            init.copy_(module.attn_mask, module.build_causal_mask())
        elif hasattr(module, "init_non_persistent_buffers"):  # a convention of timm
            module.init_non_persistent_buffers()

    @property
    def _reads_padding(self) -> bool:
        return self.model.text.attn_mask is None  # not causal

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.model.logit_scale.float().exp().squeeze()

    @property
    def logit_shift(self) -> torch.Tensor | float:
        return 0.0 if self.softmax else self.model.logit_bias.float().squeeze() / self.logit_scale

    def encode_image(self, pixel_values: torch.Tensor) -> ClipFeatures:
        """[B, 3, H, W] -> maps [B, Ci, hi, wi] and the map that `pool` reads."""
        return self.tower.encode(pixel_values)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[K, T] -> [K, D], L2-normalised.

        A causal tower does not read the padding after a phrase. Others were trained with padding and read it, so T must
        be `max_text_length`. Neither uses a mask.
        """
        missing = self.max_text_length - input_ids.shape[1]
        if missing < 0 or (missing > 0 and self._reads_padding):
            raise InputError(
                f"This text tower takes phrases padded to {self.max_text_length} tokens, not {input_ids.shape[1]}; "
                f"tokenise them with padding='max_length', max_length={self.max_text_length}."
            )
        return F.normalize(self.model.text(F.pad(input_ids, (0, missing))), dim=-1)

    def pool(
        self, features: ClipFeatures, masks: torch.Tensor | None = None, boxes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Regions, as masks [B, P, Hm, Wm] or boxes [B, P, 4] -> [B, P, D], L2-normalised."""
        return F.normalize(self.tower.pool(features.pool_map, masks, boxes), dim=-1)

    def dense(self, features: ClipFeatures) -> torch.Tensor:
        """Class embedding of every location of `pool_map`, [B, D, h, w], L2-normalised."""
        return F.normalize(self.tower.dense(features.pool_map), dim=1)


class _ResNetTower:
    """ResNets of CLIP: four stages; RoIAlign to the grid of the attention pool, followed by that pool (RegionCLIP,
    Zhong et al., 2022; Open-Vocabulary SAM). A mask is pooled over its box. The grid is the same at any image size."""

    def __init__(self, visual: "ModifiedResNet"):
        self.visual = visual
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        self.channels = tuple(stage[-1].conv3.out_channels for stage in stages)
        self.strides = (4, 8, 16, 32)
        self.grid = visual.image_size // 32

    def encode(self, pixel_values: torch.Tensor) -> ClipFeatures:
        _, *maps = self.visual.forward_intermediates(pixel_values, intermediates_only=True)["image_intermediates"]
        return ClipFeatures(maps=tuple(maps), pool_map=maps[-1])

    def pool(self, pool_map: torch.Tensor, masks: torch.Tensor | None, boxes: torch.Tensor | None) -> torch.Tensor:
        stride = self.strides[-1]
        if boxes is None:
            scale = pool_map.shape[-1] * stride / masks.shape[-1]  # masks cover the image at any resolution
            boxes = masks_to_boxes(masks > 0.5) * scale
        # RoIAlign does not support half precision on CPU: [B, C, h, w] and B x [P, 4] -> [B*P, C, grid, grid]
        regions = roi_align(pool_map.float(), list(boxes.float()), self.grid, 1 / stride, aligned=True)
        embeds = attention_pool(self.visual.attnpool, regions.to(pool_map.dtype))
        return embeds.unflatten(0, boxes.shape[:2])  # [B*P, D] -> [B, P, D]

    def dense(self, pool_map: torch.Tensor) -> torch.Tensor:
        """The pool's value path, without its position embedding, as in MaskCLIP: [B, C, h, w] -> [B, D, h, w]."""
        pool = self.visual.attnpool
        return value_path(lambda tokens: pool.c_proj(pool.v_proj(tokens)), pool_map)


def attention_pool(pool: "AttentionPool2d", feature_map: torch.Tensor) -> torch.Tensor:
    """CLIP's attention pool, exact at a fraction of the cost.

    Only the query of the mean is needed, so the key projection is applied to the query (the key bias shifts all scores
    of a head equally, which the softmax cancels) and the value projection after the average.

    Args:
        pool: the tower's pool.
        feature_map: [n, C, g, g], g as in the position embedding of the pool.

    Returns:
        [n, D]
    """
    tokens = feature_map.flatten(2).mT  # [n, C, g, g] -> [n, g*g, C]
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    heads = (pool.num_heads, -1)
    key_weight = pool.k_proj.weight.unflatten(0, heads)  # [C, C] -> [heads, C/heads, C]
    value_weight = pool.v_proj.weight.unflatten(0, heads)
    query = pool.q_proj(tokens[:, 0]).unflatten(1, heads) * key_weight.shape[1] ** -0.5  # [n, heads, C/heads]
    scores = torch.einsum("nhd,hdc->nhc", query, key_weight) @ tokens.mT  # [n, heads, 1 + g*g]
    average = scores.softmax(-1) @ tokens  # [n, heads, C]
    value = torch.einsum("nhc,hdc->nhd", average, value_weight).flatten(1) + pool.v_proj.bias  # [n, C]
    return pool.c_proj(value)


class _ViTTower:
    """A plain vision transformer: the patch tokens after four blocks, and an embedding of every patch, at any image
    size: position embeddings are interpolated as open_clip does for weights of another size.

    If the image embedding is the class token, patches take the value path of the last block and the head; if patches
    are pooled (average, or SigLIP's attention), that of the head alone.
    """

    def __init__(self, visual: "VisionTransformer"):
        if visual.attn_pool is not None:
            raise InputError("open_clip's attentional pooling (CoCa) is not supported; choose another open_clip model.")
        self.visual = visual
        self.last_block = visual.transformer.resblocks[-1]
        self.pools_class_token = visual.pool_type == "tok"
        self._describe(len(visual.transformer.resblocks), visual.conv1.out_channels, visual.patch_size[0])

    def _describe(self, depth: int, width: int, patch_size: int) -> None:
        self.depth = depth
        self.blocks = map_blocks(depth)
        self.channels = (width,) * len(self.blocks)
        self.strides = (patch_size,) * len(self.blocks)

    def encode(self, pixel_values: torch.Tensor) -> ClipFeatures:
        wanted = sorted({*self.blocks, self.depth - 2})
        maps = dict(zip(wanted, self._run(pixel_values, wanted), strict=True))
        if self.pools_class_token:
            pool_map = value_path(lambda tokens: self._head(self.last_block(tokens)), maps[self.depth - 2])
        else:
            pool_map = value_path(self._head, maps[self.depth - 1])
        return ClipFeatures(maps=tuple(maps[block] for block in self.blocks), pool_map=pool_map)

    def _run(self, pixel_values: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        """Return the patch tokens after the given blocks, each [B, C, h, w]."""
        visual = self.visual
        tokens = visual.conv1(pixel_values)  # [B, C, h, w]
        batch, _, *size = tokens.shape
        from timm.layers import resample_abs_pos_embed

        positions = resample_abs_pos_embed(visual.positional_embedding[None], size, visual.grid_size)
        tokens = torch.cat([visual.class_embedding.expand(batch, 1, -1), tokens.flatten(2).mT], 1)  # [B, 1 + h*w, C]
        tokens = visual.ln_pre(tokens + positions)
        _, states = visual.transformer.forward_intermediates(tokens, indices=blocks, stop_early=True)
        return [state[:, 1:].mT.unflatten(2, size) for state in states]

    def _head(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [n, 1, C] -> [n, 1, D]."""
        return self.visual.ln_post(tokens) @ self.visual.proj

    def pool(self, pool_map: torch.Tensor, masks: torch.Tensor | None, boxes: torch.Tensor | None) -> torch.Tensor:
        return region_pool(pool_map, self.strides[-1], masks, boxes)

    def dense(self, pool_map: torch.Tensor) -> torch.Tensor:
        return pool_map


class _TimmViTTower(_ViTTower):
    """A plain vision transformer of timm."""

    def __init__(self, visual: "TimmModel"):
        trunk = visual.trunk
        self.visual = visual
        self.last_block = trunk.blocks[-1]
        self.pools_class_token = trunk.global_pool == "token"
        self._describe(len(trunk.blocks), trunk.embed_dim, trunk.feature_info[-1]["reduction"])
        # Equivalent to dynamic_img_size of timm, which open_clip does not pass at construction.
        trunk.dynamic_img_size = True
        embed = trunk.patch_embed
        from timm.layers import Format

        embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
        rope = getattr(trunk, "rope", None)
        if rope is not None:
            rope.feat_shape, rope.pos_embed, rope._use_cached_embed = None, None, False

    def _run(self, pixel_values: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        # timm rejects pixels beyond the last whole patch, where open_clip drops them.
        height, width = (side - side % self.strides[0] for side in pixel_values.shape[-2:])
        pixel_values = pixel_values[..., :height, :width]
        return self.visual.trunk.forward_intermediates(pixel_values, indices=blocks, intermediates_only=True)

    def _head(self, tokens: torch.Tensor) -> torch.Tensor:
        trunk = self.visual.trunk
        tokens = trunk.norm(tokens)
        pooled = tokens[:, 0] if trunk.attn_pool is None else trunk.attn_pool(tokens)
        return self.visual.head(trunk.head(trunk.fc_norm(pooled)))  # [n, D]


class _TimmPyramidTower:
    """A timm tower with stages, such as ConvNeXt: its maps from stride 4 on; the last one is averaged under the mask
    and passed to the tower's own head (FC-CLIP, Yu et al., 2023). Convolutions take any image size; Swin does not."""

    def __init__(self, visual: "TimmModel"):
        self.visual = visual
        info = visual.trunk.feature_info
        self.stages = [index for index, stage in enumerate(info) if stage["reduction"] >= 4]
        self.channels = tuple(info[index]["num_chs"] for index in self.stages)
        self.strides = tuple(info[index]["reduction"] for index in self.stages)
        if len(set(self.strides)) < len(self.strides):
            raise InputError(
                f"The image tower {type(visual.trunk).__name__} of timm is not supported; choose another model."
            )
        self.channels_last = getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC"  # Swin
        embed = getattr(visual.trunk, "patch_embed", None)
        self.only_size = embed.img_size if getattr(embed, "strict_img_size", False) else None

    def encode(self, pixel_values: torch.Tensor) -> ClipFeatures:
        if self.only_size not in (None, tuple(pixel_values.shape[-2:])):
            raise InputError(
                f"This image tower takes images of {self.only_size[0]} x {self.only_size[1]} pixels only, not "
                f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}."
            )
        pool_map, maps = self.visual.trunk.forward_intermediates(pixel_values, indices=self.stages)
        if self.channels_last:
            pool_map = pool_map.permute(0, 3, 1, 2)  # [B, h, w, C] -> [B, C, h, w]
        return ClipFeatures(maps=tuple(maps), pool_map=pool_map)

    def pool(self, pool_map: torch.Tensor, masks: torch.Tensor | None, boxes: torch.Tensor | None) -> torch.Tensor:
        means = region_pool(pool_map, self.strides[-1], masks, boxes)
        return self._head(means.flatten(0, 1)).unflatten(0, means.shape[:2])  # [B*P, D] -> [B, P, D]

    def dense(self, pool_map: torch.Tensor) -> torch.Tensor:
        """Apply the head to every location by itself: [B, C, h, w] -> [B, D, h, w]."""
        return value_path(lambda tokens: self._head(tokens[:, 0]), pool_map)

    def _head(self, means: torch.Tensor) -> torch.Tensor:
        """Pooled features [n, C] -> [n, D]. They are passed to timm as maps of one pixel."""
        pixel = means[:, None, None] if self.channels_last else means[..., None, None]
        return self.visual.head(self.visual.trunk.forward_head(pixel))


Tower = _ResNetTower | _ViTTower | _TimmPyramidTower


def _tower(visual: nn.Module) -> Tower:
    """Return the reader of an image tower. It refers to the modules of the tower and owns none."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models import eva, vision_transformer

    towers: dict[type, type[Tower]] = {
        ModifiedResNet: _ResNetTower,
        VisionTransformer: _ViTTower,
        vision_transformer.VisionTransformer: _TimmViTTower,
        eva.Eva: _TimmViTTower,
    }
    kind = type(visual.trunk) if isinstance(visual, TimmModel) else type(visual)
    return towers.get(kind, _TimmPyramidTower)(visual)
