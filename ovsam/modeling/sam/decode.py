"""Mask decoder of the SAM family: the same weights and masks in a fraction of the time for many prompts.

In the two-way transformer (Kirillov et al. 2023, appendix A) some ten tokens of a prompt and the thousands of positions
of its image attend to each other. The stock order copies the image for every prompt and projects every copy in each of
five attentions. The same numbers come out if

- the first layer, in which all prompts of an image share its embedding, projects that embedding once;
- from then on the projections move to the token side: q·(W x + b) = (Wᵀ q)·x + q·b, and Σ a (V x) = V (Σ a x);
- transposed convolutions whose kernel is their stride become matrix products, and pixels stay in nested order (a coarse
  cell, its quarters, their quarters) until one permutation at the end;
- prompts go in chunks that fit the cache.

Shapes: B images, P prompts on each. N images in the first layer, G prompts on each, N·G = B·P: N is B, or B·P if each
prompt has a mask prompt of its own. T tokens, L = h·w positions, H heads of width d, M mask tokens, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.modeling.outputs import DecodedMasks

# Size of one chunk of prompts: bytes of image embedding that stay in a CPU's cache (measured); the share of an
# accelerator's free memory or, if that is unknown, bytes of image embedding.
CPU_CACHE = 2**22
SHARE_OF_FREE_MEMORY = 0.5
ACCELERATOR_CACHE = 2**28
# During decoding a prompt holds this many copies of an image embedding: itself, with its positions, the upscaled maps
# (as large and twice as large) before and after their activations, and its masks.
COPIES = 12
# Learned output tokens before the prompt tokens, in order; SAM 1 has no object token, only SAM-HQ has the last one.
TOKENS = ("obj_score_token", "iou_token", "mask_tokens", "hq_token")


def decode_masks(
    mask_decoder: nn.Module,
    embedding: Tensor,
    position: Tensor,
    high_res: tuple[Tensor, ...],
    sparse: Tensor,
    dense: Tensor,
    hq_features: Tensor | None = None,
) -> DecodedMasks:
    """Return the masks of all prompts of all images for every mask token; index 0 is the single-mask token.

    Under torch.compile and torch.export all prompts go in one chunk, so that no loop is unrolled, and an exported
    program may take any number of them.

    Args:
        mask_decoder: mask decoder of transformers' SAM, SAM-HQ, SAM 2, EdgeTAM or SAM 3 tracker. Its projections are
            read as plain weights, so adapters such as LoRA must be merged into them first.
        embedding: image embedding, [B, C, h, w].
        position: position encoding of its cells, [1, C, h, w].
        high_res: outputs of `conv_s0` and `conv_s1` for the finer maps, [B, C/8, 4h, 4w] and [B, C/4, 2h, 2w]; empty if
            there are none.
        sparse: embedded points and boxes, [B, P, T, C].
        dense: embedded mask prompts, [B or 1, P or 1, C, h or 1, w or 1].
        hq_features: features of SAM-HQ, [B, C/8, 4h, 4w]; the mask that its own token makes of them comes last, and has
            no predicted IoU.
    """
    b, p = sparse.shape[:2]
    c, h, w = embedding.shape[1:]
    masks_per_image = dense.shape[1]  # 1 or P
    dense = dense.expand(b, -1, -1, -1, -1).flatten(0, 1)  # [B|1, P|1, C, h|1, w|1] -> [N, C, h|1, w|1]
    learned = [getattr(mask_decoder, name).weight for name in TOKENS if hasattr(mask_decoder, name)]
    tokens = torch.cat([torch.cat(learned).expand(b, p, -1, -1), sparse.to(learned[0].dtype)], dim=2)
    tokens = tokens.reshape(len(dense), -1, *tokens.shape[2:])  # [B, P, T, C] -> [N, G, T, C]
    position = _nest(position.to(embedding.dtype), 0)
    skips = [_nest(feature, level) for feature, level in zip(high_res, (2, 1), strict=False)]

    owners = torch.arange(len(dense), device=embedding.device) // masks_per_image  # row n holds image owners[n]

    def decode_some(owner: Tensor, of_image: Tensor, own: Tensor, prompts: int) -> list[Tensor]:
        """Decode some images with all their prompts, `prompts` at a time."""
        image = _SharedImage(_nest(embedding[owner] + of_image, 0), position, mask_decoder.transformer.layers[0])
        finer = [skip[owner] for skip in skips]
        hq = None if hq_features is None else hq_features[owner]
        chunks = [own] if prompts == 0 else own.split(prompts, dim=1)
        parts = [_decode_chunk(mask_decoder, chunk, image, position, finer, hq, (h, w)) for chunk in chunks]
        return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]  # each [n, G, ...]

    if torch.compiler.is_compiling():
        parts = decode_some(owners, dense, tokens, 0)
    else:
        prompts = prompts_per_chunk(embedding)
        images = max(1, prompts // tokens.shape[1])
        split = zip(owners.split(images), dense.split(images), tokens.split(images), strict=True)
        chunks = [decode_some(*some, prompts) for some in split]
        parts = [torch.cat(part) for part in zip(*chunks, strict=True)]
    return DecodedMasks(*(part.view(b, p, *part.shape[2:]) for part in parts))  # [N, G, ...] -> [B, P, ...]


def prompts_per_chunk(embedding: Tensor) -> int:
    """Number of prompts that are decoded at once over an image embedding [B, C, h, w]."""
    size = embedding[0].numel() * embedding.element_size()
    if embedding.device.type == "cpu":
        return max(1, CPU_CACHE // size)
    if embedding.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(embedding.device)
        reserved = torch.cuda.memory_reserved(embedding.device) - torch.cuda.memory_allocated(embedding.device)
        return max(1, int(SHARE_OF_FREE_MEMORY * (free + reserved)) // (COPIES * size))
    return max(1, ACCELERATOR_CACHE // size)


def _nest(feature: Tensor, levels: int) -> Tensor:
    """A map as rows of a matrix, the cells 2**levels times coarser first, then their quarters, then theirs:
    [N, C, h*2^k, w*2^k] -> [N, C, h, 2, .., w, 2, ..] -> [N, h, w, 2, 2, .., C] -> [N, h*w*4^k, C]."""
    h, w = (side >> levels for side in feature.shape[-2:])
    feature = feature.unflatten(3, (w, *[2] * levels)).unflatten(2, (h, *[2] * levels))
    pairs = [axis for level in range(levels + 1) for axis in (2 + level, 3 + levels + level)]
    return feature.permute(0, *pairs, 1).flatten(1, -2).contiguous()


def _unnest(rows: Tensor, h: int, w: int) -> Tensor:
    """Inverse of two levels of `_nest` on the last axis: [..., h*w*16] -> [..., h, w, 2, 2, 2, 2] -> [..., h, 2, 2, w,
    2, 2] -> [..., 4h, 4w]."""
    cells = rows.unflatten(-1, (h, w, 2, 2, 2, 2)).movedim((-4, -2), (-5, -4))
    return cells.flatten(-3).flatten(-4, -2)


def _decode_chunk(
    decoder: nn.Module,
    prompt: Tensor,
    image: "_SharedImage",
    position: Tensor,
    skips: list[Tensor],
    hq_features: Tensor | None,
    size: tuple[int, int],
) -> list[Tensor]:
    """Prompts [N, G, T, C] on N images -> masks [N, G, M, 4h, 4w], iou, mask tokens and, if the decoder has them,
    object logits."""
    tokens, rows = _two_way_transformer(decoder.transformer, prompt, image, position)
    first = 1 if hasattr(decoder, "obj_score_token") else 0  # the IoU token, which the mask tokens follow
    mask_tokens = tokens[:, :, first + 1 : first + 1 + decoder.num_mask_tokens]
    hyper = [mlp(mask_tokens[:, :, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]

    # Each position becomes four, twice.
    norm = decoder.upscale_layer_norm  # its own forward expects channels first
    rows = _upscale(rows, decoder.upscale_conv1, skips[1] if skips else None)  # -> [N, G, L*4, C/4]
    rows = decoder.activation(F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    rows = decoder.activation(_upscale(rows, decoder.upscale_conv2, skips[0] if skips else None))  # [N, G, L*16, C/8]
    masks = _unnest(torch.stack(hyper, dim=2) @ rows.mT, *size)  # [N, G, M, C/8] @ [N, G, C/8, L*16]
    if hq_features is not None:
        hq_mask = _hq_mask(decoder, _unnest(rows.mT, *size), mask_tokens[:, :, -1], hq_features)
        masks = torch.cat([masks, hq_mask], dim=2)
    parts = [masks, decoder.iou_prediction_head(tokens[:, :, first]), mask_tokens]
    return parts + [decoder.pred_obj_score_head(tokens[:, :, 0]) for _ in range(first)]


def _upscale(rows: Tensor, convolution: nn.ConvTranspose2d, skip: Tensor | None) -> Tensor:
    """A transposed convolution whose kernel is its stride, [N, G, L, C] -> [N, G, L*4, C'] nested, plus the skip
    [N, L*4, C'] of each image: its weight [C, C', 2, 2] is a matrix [C, 4*C']."""
    n, g, length, _ = rows.shape
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    added = convolution.bias.expand(n, length * 4, -1) if skip is None else skip + convolution.bias
    added = added.reshape(n, 1, length, -1).expand(-1, g, -1, -1).flatten(0, 1)  # -> [N*G, L, 4*C']
    return torch.baddbmm(added, rows.flatten(0, 1), weight.expand(n * g, -1, -1)).view(n, g, length * 4, -1)


def _hq_mask(decoder: nn.Module, upscaled: Tensor, token: Tensor, hq_features: Tensor) -> Tensor:
    """SAM-HQ's mask [N, G, 1, 4h, 4w] of the upscaled image [N, G, C/8, 4h, 4w], its own token [N, G, C] and the finer
    features [N, C/8, 4h, 4w].

    The mask is a product with `hyper`, and so is its last convolution: of that only one channel is computed."""
    n, g = upscaled.shape[:2]
    hyper = decoder.hq_mask_mlp(token)  # [N, G, C/8]
    maps = decoder.activation(decoder.mask_norm(decoder.mask_conv1(upscaled.flatten(0, 1))))  # [N*G, C/4, 4h, 4w]
    last = decoder.mask_conv2
    kernel = (hyper.flatten(0, 1) @ last.weight.flatten(1)).unflatten(1, last.weight.shape[1:])  # [N*G, C/4, 3, 3]
    own = F.conv2d(maps.flatten(0, 1)[None], kernel, padding=last.padding, groups=n * g)[0]  # -> [N*G, 4h, 4w]
    shared = torch.einsum("ngc,nchw->nghw", hyper, hq_features + last.bias[:, None, None])
    return (own.view_as(shared) + shared)[:, :, None]


def _two_way_transformer(
    transformer: nn.Module, prompt: Tensor, image: "_SharedImage | _PromptImages", position: Tensor
) -> tuple[Tensor, Tensor]:
    """Prompts [N, G, T, C] -> tokens [N, G, T, C] and the image after attention to each prompt [N, G, L, C]."""
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
    """The image before the first layer, shared by all its prompts: rows [N, L, C], projected once."""

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
        return _output(attention)(read.transpose(1, 2).flatten(2)).view_as(queries)

    def write(self, attention: nn.Module, keys: Tensor, values: Tensor) -> Tensor:
        """The image attends to the tokens [N, G, T, C] and the result is added -> [N, G, L, C]."""
        key = _split_heads(attention.k_proj(keys.flatten(1, 2)), attention) * attention.scaling  # [N, H, G*T, d]
        scores = (key @ self.query.mT).unflatten(2, keys.shape[1:3])  # [N, H, G*T, L] -> [N, H, G, T, L]
        return _mix(attention, scores.transpose(1, 2), values, self.rows[:, None])


class _PromptImages:
    """The image after attention to each prompt: rows [N, G, L, C], never projected."""

    def __init__(self, rows: Tensor, position: Tensor):
        self.rows = rows
        self.placed = rows + position

    def read(self, attention: nn.Module, queries: Tensor) -> Tensor:
        """Tokens [N, G, T, C] attend to the image -> [N, G, T, C]."""
        query = _split_heads(attention.q_proj(queries), attention)
        weights = self._scores(attention, query, attention.k_proj).softmax(-1)  # [N, G, H, T, L]
        mean = (weights.flatten(2, 3) @ self.rows).view(*query.shape[:4], -1)  # [N, G, H*T, C] -> [N, G, H, T, C]
        read = mean @ attention.v_proj.weight.unflatten(0, (query.shape[2], -1)).mT  # [N, G, H, T, C] @ [H, C, d]
        return _output(attention)(read.transpose(2, 3).flatten(3) + attention.v_proj.bias)

    def write(self, attention: nn.Module, keys: Tensor, values: Tensor) -> Tensor:
        """The image attends to the tokens [N, G, T, C] and the result is added -> [N, G, L, C]."""
        key = _split_heads(attention.k_proj(keys), attention)
        return _mix(attention, self._scores(attention, key, attention.q_proj), values, self.rows)

    def _scores(self, attention: nn.Module, tokens: Tensor, projection: nn.Linear) -> Tensor:
        """Scaled products of tokens [N, G, H, T, d] with the projection of the image -> [N, G, H, T, L]."""
        n, g, heads, count, _ = tokens.shape
        tokens = tokens * attention.scaling
        folded = tokens @ projection.weight.unflatten(0, (heads, -1))  # @ [H, d, C] -> [N, G, H, T, C]
        constant = tokens @ projection.bias.unflatten(0, (heads, -1, 1))  # @ [H, d, 1] -> [N, G, H, T, 1]
        folded, constant = (part.reshape(n * g, heads * count, -1) for part in (folded, constant))
        return torch.baddbmm(constant, folded, self.placed.flatten(0, 1).mT).view(n, g, heads, count, -1)


def _mix(attention: nn.Module, scores: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Weight the tokens' values [N, G, T, C] by the scores [N, G, H, T, L] of every position and add them to the rows
    [N, G or 1, L, C] -> [N, G, L, C]."""
    # The output projection is applied to the values, and its bias divided among the heads, whose weights sum to one.
    n, g, heads = scores.shape[:3]
    output = _output(attention)
    value = _split_heads(attention.v_proj(values), attention)  # [N, G, H, T, d]
    weight = output.weight.unflatten(1, (heads, -1))  # [C, H*d] -> [C, H, d]
    value = value @ weight.permute(1, 2, 0) + output.bias / heads  # [N, G, H, T, C]
    # Softmax over the tokens with positions innermost vectorises; rows of ten elements would not.
    weights, value = (part.reshape(n * g, -1, part.shape[-1]) for part in (scores.softmax(3), value))
    rows = rows.expand(n, g, -1, -1).flatten(0, 1)
    return torch.baddbmm(rows, weights.mT, value).unflatten(0, (n, g))  # [N*G, L, H*T] @ [N*G, H*T, C]


def _output(attention: nn.Module) -> nn.Linear:
    """Output projection of an attention layer, which has another name in transformers' SAM 1 than in SAM 2."""
    return attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj


def _split_heads(features: Tensor, attention: nn.Module) -> Tensor:
    """[..., T, H*d] -> [..., H, T, d]"""
    return features.unflatten(-1, (attention.num_attention_heads, -1)).transpose(-3, -2)
