"""Vision encoder of SAM 2 on Hiera (Ryali et al. 2023) for inference: the same weights and maps in less time.

- Windows do not depend on each other, so on a CPU a block runs on some rows of windows at a time, and all that it
  computes between its input and its output stays in the cache.
- The neck computes the maps alone. The stock neck adds position codes of every level, which images do not need.
- The stock attention computes a product of queries and keys that nothing reads (transformers 5.23).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam2.modeling_sam2 import do_pool, window_partition, window_unpartition

# Positions that a block takes at once on a CPU (measured).
STRIP = 2048


def hiera_pyramid(vision: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """Return the maps at strides 4, 8 and 16 of a `Sam2VisionModel` whose backbone is Hiera: [B, 3, H, W] -> [B, C, h,
    w], high resolution first."""
    backbone, maps = vision.backbone, []
    image = backbone.patch_embed(pixel_values)  # [B, H/4, W/4, C]
    image = image + backbone._get_pos_embed(image.shape[1:3])
    for number, block in enumerate(backbone.blocks):
        image = _run_block(block, image)
        if number in backbone.stage_ends:
            maps.append(image)
    return _run_neck(vision.neck, maps)[: vision.num_feature_levels]


def _run_neck(neck: nn.Module, maps: list[Tensor]) -> tuple[Tensor, ...]:
    """Maps [B, h, w, Ci] -> maps [B, C, h, w] of one width, high resolution first (FPN, Lin et al. 2017)."""
    levels: list[Tensor] = []
    for level in reversed(range(len(maps))):
        conv = neck.convs[len(maps) - 1 - level]
        lateral = conv(maps[level].permute(0, 3, 1, 2))
        if levels and level in neck.fpn_top_down_levels:
            lateral = lateral + F.interpolate(levels[0].float(), scale_factor=2.0, mode="nearest").to(lateral.dtype)
        levels.insert(0, lateral)
    return tuple(levels)


def _run_block(block: nn.Module, image: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, H', W', C'], half the size where queries are pooled."""
    if image.device.type != "cpu":
        return _feed_forward(block, _attend(block, image))
    if not block.window_size:
        return torch.cat([_feed_forward(block, strip) for strip in _strips(_attend(block, image), 1)], 1)
    return torch.cat([_feed_forward(block, _attend(block, strip)) for strip in _strips(image, block.window_size)], 1)


def _strips(image: Tensor, window: int) -> tuple[Tensor, ...]:
    """[B, H, W, C] -> strips [B, k * window, W, C]; the last one may be lower."""
    return image.split(window * max(1, STRIP // (window * image.shape[2])), 1)


def _attend(block: nn.Module, image: Tensor) -> Tensor:
    """Attention of the block with its residual: [B, H, W, C] -> [B, H', W', C']."""
    attention, window, stride = block.attn, block.window_size, block.query_stride
    heads, normed = attention.num_attention_heads, block.layer_norm1(image)
    residual = image if block.dim == block.dim_out else do_pool(block.proj(normed), stride)
    windows = window_partition(normed, window)[0] if window else normed  # [N, h, w, C]
    n, h, w, _ = windows.shape
    query, key, value = attention.qkv(windows).chunk(3, -1)  # [N, h, w, C']
    query = do_pool(query, stride)
    sides = query.shape[1:3]
    query, key, value = (each.reshape(n, -1, heads, each.shape[-1] // heads) for each in (query, key, value))
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [N, heads, h*w, C'/heads]
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    mixed = attention.proj(mixed.transpose(1, 2).reshape(n, *sides, -1))
    if window:
        side, size = sides[0], residual.shape[1:3]
        padded = tuple(length + -length % side for length in size)
        mixed = window_unpartition(mixed, side, padded, size)
    return residual + mixed


def _feed_forward(block: nn.Module, image: Tensor) -> Tensor:
    return image + block.mlp(block.layer_norm2(image))
