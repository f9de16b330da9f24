"""SAM 2's mask decoder with the same weights and the same masks, in a fraction of the time for many prompts.

In the two-way transformer (Kirillov et al. 2023, appendix A) some ten tokens of a prompt and the thousands of positions
of its image attend to each other. The stock order copies the image for every prompt and projects every copy in each of
five attentions. The same numbers come out if

- the first layer, where all prompts still see one image, projects that image once;
- from then on the projections move to the token side: q·(W x + b) = (Wᵀ q)·x + q·b, and Σ a (V x) = V (Σ a x);
- transposed convolutions whose kernel is their stride become matrix products, and pixels stay in nested order (a coarse
  cell, its quarters, their quarters) until one permutation at the end;
- prompts go in chunks that fit the cache.

Shapes: B images, P prompts on each. N images as the first layer sees them, G prompts on each, N·G = B·P: N is B, or B·P
where each prompt has a mask prompt of its own. T tokens, L = h·w positions, H heads of width d, M mask tokens, C width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

# Elements of image embedding in one chunk of prompts: what stays in a CPU's cache (4 MB in fp32, measured), what fills
# an accelerator without filling its memory.
CPU_CHUNK = 2**20
ACCELERATOR_CHUNK = 2**26


@dataclass
class DecodedMasks(ModelOutput):
    """What the mask decoder says of every prompt.

    Attributes:
        masks: logits at stride 4, [B, P, M, 4h, 4w].
        iou: predicted IoU of each mask, [B, P, M].
        tokens: the decoder's output token of each mask, [B, P, M, C].
        object_logits: is there an object at all, [B, P, 1].
    """

    masks: Tensor | None = None
    iou: Tensor | None = None
    tokens: Tensor | None = None
    object_logits: Tensor | None = None


def decode_masks(
    mask_decoder: nn.Module,
    embedding: Tensor,
    position: Tensor,
    high_res: tuple[Tensor, Tensor],
    sparse: Tensor,
    dense: Tensor,
) -> DecodedMasks:
    """Masks of all prompts of all images from every mask token; index 0 is the single-mask token.

    Args:
        mask_decoder: transformers' `Sam2MaskDecoder` or `EdgeTamMaskDecoder`. Its projections are read as plain
            weights, so adapters such as LoRA must be merged into them first.
        embedding: image embedding, [B, C, h, w].
        position: position encoding of its cells, [1, C, h, w].
        high_res: what `conv_s0` and `conv_s1` made of the finer maps, [B, C/8, 4h, 4w] and [B, C/4, 2h, 2w].
        sparse: embedded points and boxes, [B, P, T, C].
        dense: embedded mask prompts, [B or 1, P or 1, C, h or 1, w or 1].
    """
    b, p = sparse.shape[:2]
    c, h, w = embedding.shape[1:]
    masks_per_image = dense.shape[1]  # 1 or P
    dense = dense.expand(b, -1, -1, -1, -1).flatten(0, 1)  # [B|1, P|1, C, h|1, w|1] -> [N, C, h|1, w|1]
    learned = [mask_decoder.obj_score_token.weight, mask_decoder.iou_token.weight, mask_decoder.mask_tokens.weight]
    tokens = torch.cat([torch.cat(learned).expand(b, p, -1, -1), sparse.to(learned[0].dtype)], dim=2)
    tokens = tokens.reshape(len(dense), -1, *tokens.shape[2:])  # [B, P, T, C] -> [N, G, T, C]
    position = _nest(position.to(embedding.dtype), 0)
    s0, s1 = high_res
    s0 = s0 + mask_decoder.upscale_conv2.bias[:, None, None]
    s1 = s1 + mask_decoder.upscale_conv1.bias[:, None, None]

    prompts = max(1, (CPU_CHUNK if embedding.device.type == "cpu" else ACCELERATOR_CHUNK) // (c * h * w))
    images = max(1, prompts // tokens.shape[1])
    owners = torch.arange(len(dense), device=embedding.device) // masks_per_image  # image n shows picture owners[n]
    decoded = []
    for owner, of_image, own in zip(owners.split(images), dense.split(images), tokens.split(images), strict=True):
        image = _SharedImage(_nest(embedding[owner] + of_image, 0), position, mask_decoder.transformer.layers[0])
        skips = _nest(s1[owner], 1), _nest(s0[owner], 2)
        parts = [_decode_chunk(mask_decoder, some, image, position, skips) for some in own.split(prompts, dim=1)]
        decoded.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])  # each [n, G, ...]
    masks, iou, mask_tokens, object_logits = (
        torch.cat(part).view(b, p, *part[0].shape[2:]) for part in zip(*decoded, strict=True)
    )
    # From nested order to rows and columns:
    # [B, P, M, L*16] -> [B, P, M, h, w, 2, 2, 2, 2] -> [B, P, M, h, 2, 2, w, 2, 2] -> [B, P, M, 4h, 4w]
    masks = masks.unflatten(-1, (h, w, 2, 2, 2, 2)).permute(0, 1, 2, 3, 5, 7, 4, 6, 8).reshape(b, p, -1, 4 * h, 4 * w)
    return DecodedMasks(masks=masks, iou=iou, tokens=mask_tokens, object_logits=object_logits)


def _nest(feature: Tensor, levels: int) -> Tensor:
    """A map as rows of a matrix, the cells 2**levels times coarser first, then their quarters, then theirs:
    [N, C, h*2^k, w*2^k] -> [N, C, h, 2, .., w, 2, ..] -> [N, h, w, 2, 2, .., C] -> [N, h*w*4^k, C]."""
    h, w = (side >> levels for side in feature.shape[-2:])
    feature = feature.unflatten(3, (w, *[2] * levels)).unflatten(2, (h, *[2] * levels))
    pairs = [axis for level in range(levels + 1) for axis in (2 + level, 3 + levels + level)]
    return feature.permute(0, *pairs, 1).flatten(1, -2).contiguous()


def _decode_chunk(
    decoder: nn.Module, prompt: Tensor, image: "_SharedImage", position: Tensor, skips: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts [N, G, T, C] on N images -> masks [N, G, M, L*16] in nested order, iou, mask tokens, object logits."""
    tokens, rows = _two_way_transformer(decoder.transformer, prompt, image, position)
    mask_tokens = tokens[:, :, 2 : 2 + decoder.num_mask_tokens]
    hyper = [mlp(mask_tokens[:, :, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]

    # Each position becomes four, twice; a convolution's weight [C, C', 2, 2] is a matrix [C, 4*C'].
    n, g, length, c = rows.shape
    s1, s0 = skips[0][:, None], skips[1][:, None]  # [N, 1, L*4, C/4], [N, 1, L*16, C/8]
    rows = (rows @ decoder.upscale_conv1.weight.permute(0, 2, 3, 1).flatten(1)).view(n, g, length * 4, c // 4) + s1
    norm = decoder.upscale_layer_norm  # its own forward expects channels first
    rows = decoder.activation(F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    rows = (rows @ decoder.upscale_conv2.weight.permute(0, 2, 3, 1).flatten(1)).view(n, g, length * 16, c // 8) + s0
    masks = torch.stack(hyper, dim=2) @ decoder.activation(rows).mT  # [N, G, M, C/8] @ [N, G, C/8, L*16]
    object_token, iou_token = tokens[:, :, 0], tokens[:, :, 1]
    return masks, decoder.iou_prediction_head(iou_token), mask_tokens, decoder.pred_obj_score_head(object_token)


def _two_way_transformer(
    transformer: nn.Module, prompt: Tensor, image: "_SharedImage | _PromptImages", position: Tensor
) -> tuple[Tensor, Tensor]:
    """Prompts [N, G, T, C] -> tokens [N, G, T, C] and the image as each prompt sees it [N, G, L, C]."""
    tokens = prompt
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = layer.self_attn(query=tokens, key=tokens, value=tokens)[0]
        else:
            placed = tokens + prompt
            tokens = tokens + layer.self_attn(query=placed, key=placed, value=tokens)[0]
        tokens = layer.layer_norm1(tokens)
        tokens = layer.layer_norm2(tokens + image.read(layer.cross_attn_token_to_image, tokens + prompt))
        tokens = layer.layer_norm3(tokens + layer.mlp(tokens))
        written = image.write(layer.cross_attn_image_to_token, tokens + prompt, tokens)
        image = _PromptImages(layer.layer_norm4(written), position)
    tokens = tokens + image.read(transformer.final_attn_token_to_image, tokens + prompt)
    return transformer.layer_norm_final_attn(tokens), image.rows


class _SharedImage:
    """The image before the first layer, one for all prompts on it: rows [N, L, C], projected once."""

    def __init__(self, rows: Tensor, position: Tensor, first_layer: nn.Module):
        self.rows = rows
        reader, writer = first_layer.cross_attn_token_to_image, first_layer.cross_attn_image_to_token
        placed = rows + position
        self.key = _split_heads(reader.k_proj(placed), reader)  # [N, H, L, d]
        self.value = _split_heads(reader.v_proj(rows), reader)
        self.query = _split_heads(writer.q_proj(placed), writer)

    def read(self, attention: nn.Module, queries: Tensor) -> Tensor:
        """Tokens [N, G, T, C] attend to the image -> [N, G, T, C]."""
        query = _split_heads(attention.q_proj(queries.flatten(1, 2)), attention)  # -> [N, H, G*T, d]
        read = F.scaled_dot_product_attention(query, self.key, self.value, scale=attention.scaling)
        return attention.o_proj(read.transpose(1, 2).flatten(2)).view_as(queries)

    def write(self, attention: nn.Module, keys: Tensor, values: Tensor) -> Tensor:
        """The image attends to the tokens [N, G, T, C] and adds what it finds -> [N, G, L, C]."""
        key = _split_heads(attention.k_proj(keys.flatten(1, 2)), attention) * attention.scaling  # [N, H, G*T, d]
        scores = (key @ self.query.mT).unflatten(2, keys.shape[1:3])  # [N, H, G*T, L] -> [N, H, G, T, L]
        return self.rows[:, None] + _mix(attention, scores.transpose(1, 2), values)


class _PromptImages:
    """The image as each prompt has changed it: rows [N, G, L, C], never projected."""

    def __init__(self, rows: Tensor, position: Tensor):
        self.rows = rows
        self.placed = rows + position

    def read(self, attention: nn.Module, queries: Tensor) -> Tensor:
        """Tokens [N, G, T, C] attend to the image -> [N, G, T, C]."""
        query = _split_heads(attention.q_proj(queries), attention)
        weights = self._scores(attention, query, attention.k_proj).softmax(-1)  # [N, G, H, T, L]
        mean = (weights.flatten(2, 3) @ self.rows).view(*query.shape[:4], -1)  # [N, G, H*T, C] -> [N, G, H, T, C]
        read = mean @ attention.v_proj.weight.unflatten(0, (query.shape[2], -1)).mT  # [N, G, H, T, C] @ [H, C, d]
        return attention.o_proj(read.transpose(2, 3).flatten(3) + attention.v_proj.bias)

    def write(self, attention: nn.Module, keys: Tensor, values: Tensor) -> Tensor:
        """The image attends to the tokens [N, G, T, C] and adds what it finds -> [N, G, L, C]."""
        key = _split_heads(attention.k_proj(keys), attention)
        return self.rows + _mix(attention, self._scores(attention, key, attention.q_proj), values)

    def _scores(self, attention: nn.Module, tokens: Tensor, projection: nn.Linear) -> Tensor:
        """Scaled products of tokens [N, G, H, T, d] with the projection of the image -> [N, G, H, T, L]."""
        tokens = tokens * attention.scaling
        heads = tokens.shape[2]
        folded = tokens @ projection.weight.unflatten(0, (heads, -1))  # @ [H, d, C] -> [N, G, H, T, C]
        constant = tokens @ projection.bias.unflatten(0, (heads, -1, 1))  # @ [H, d, 1] -> [N, G, H, T, 1]
        return (folded.flatten(2, 3) @ self.placed.mT).unflatten(2, tokens.shape[2:4]) + constant


def _mix(attention: nn.Module, scores: Tensor, values: Tensor) -> Tensor:
    """Scores [N, G, H, T, L] of every position for every token, and the tokens' values [N, G, T, C] -> [N, G, L, C]."""
    # o_proj goes onto the values; its bias is shared out over the heads, since each head's weights sum to one.
    value = _split_heads(attention.v_proj(values), attention)  # [N, G, H, T, d]
    weight = attention.o_proj.weight.unflatten(1, (attention.num_attention_heads, -1))  # [C, H*d] -> [C, H, d]
    value = value @ weight.permute(1, 2, 0) + attention.o_proj.bias / attention.num_attention_heads  # [N, G, H, T, C]
    # Softmax over the tokens with positions innermost vectorises; rows of ten elements would not.
    return scores.softmax(3).flatten(2, 3).mT @ value.flatten(2, 3)  # [N, G, L, H*T] @ [N, G, H*T, C]


def _split_heads(features: Tensor, attention: nn.Module) -> Tensor:
    """[..., T, H*d] -> [..., H, T, d]"""
    return features.unflatten(-1, (attention.num_attention_heads, -1)).transpose(-3, -2)
