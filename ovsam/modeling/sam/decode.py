"""Mask decoder of the SAM family: the same weights and masks in a fraction of the time for many prompts.

In the two-way transformer (Kirillov et al. 2023, appendix A) some ten tokens of a prompt and the thousands of positions
of its image attend to each other. The stock order copies the image for every prompt and projects every copy in each of
five attentions. The same numbers come out if

- the first layer, in which all prompts of an image share its embedding, projects that embedding once;
- from then on the projections move to the token side: q·(W x + b) = (Wᵀ q)·x + q·b, and Σ a (V x) = V (Σ a x);
- a mask prompt, whose embedding has rank 16, moves there too: the image keeps its shared projections and gets 16 more
  columns for each prompt;
- transposed convolutions whose kernel is their stride become matrix products, and pixels stay in nested order (a coarse
  cell, its quarters, their quarters) until one permutation at the end;
- prompts go in chunks that fit the cache.

Shapes: B images, P prompts on each. N images in the first layer, G prompts on each, N·G = B·P: N is B, or B·P if each
prompt has a dense embedding of its own. T tokens, L = h·w positions, H heads of width d, M mask tokens, C width, R = 16
the rank of mask prompts.
"""

from dataclasses import dataclass

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


@dataclass
class MaskPrompts:
    """Mask logits [B, P, 4h, 4w], one mask for each prompt, and the prompt encoder's module `mask_embed`."""

    masks: Tensor
    embed: nn.Module

    def over(self, image: "_SharedImage", images: slice, prompts: slice) -> "_MaskedImages":
        """Some of the prompts over some of the images."""
        last = self.embed.conv3.weight.flatten(1)  # [C, R]
        return _MaskedImages(image, self._hidden(self.masks[images, prompts]), last)

    def _hidden(self, masks: Tensor) -> Tensor:
        """Masks [N, G, 4h, 4w] -> input of the last convolution [N, G, L, R]. Convolutions whose kernel is their stride
        are matrix products in nested order."""
        embed = self.embed
        rows = _nest(masks.flatten(0, 1)[:, None], 2).unflatten(0, masks.shape[:2])  # -> [N, G, L*16, 1]
        for convolution, norm in ((embed.conv1, embed.layer_norm1), (embed.conv2, embed.layer_norm2)):
            weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # [R', R, 2, 2] -> [R', 4*R]
            quarters = rows.unflatten(2, (-1, 4)).flatten(3)  # [N, G, L*4, R] -> [N, G, L, 4, R] -> [N, G, L, 4*R]
            rows = F.linear(quarters, weight, convolution.bias)
            rows = embed.activation(F.layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, norm.eps))
        return rows


def decode_masks(
    mask_decoder: nn.Module,
    embedding: Tensor,
    position: Tensor,
    high_res: tuple[Tensor, ...],
    sparse: Tensor,
    dense: Tensor | MaskPrompts,
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
        dense: mask prompts; or their embedding [B or 1, P or 1, C, h or 1, w or 1].
        hq_features: features of SAM-HQ, [B, C/8, 4h, 4w]; the mask that its own token makes of them comes last, and has
            no predicted IoU.
    """
    b, p = sparse.shape[:2]
    h, w = embedding.shape[2:]
    own_masks = dense if isinstance(dense, MaskPrompts) else None
    if isinstance(dense, MaskPrompts):  # the constant of their embedding belongs to the image
        dense = dense.embed.conv3.bias.view(1, 1, -1, 1, 1)
    masks_per_image = dense.shape[1]  # 1 or P
    dense = dense.expand(b, -1, -1, -1, -1).flatten(0, 1)  # [B|1, P|1, C, h|1, w|1] -> [N, C, h|1, w|1]
    learned = [getattr(mask_decoder, name).weight for name in TOKENS if hasattr(mask_decoder, name)]
    tokens = torch.cat([torch.cat(learned).expand(b, p, -1, -1), sparse.to(learned[0].dtype)], dim=2)
    rows = dense.shape[0]  # not len(), which would fix the number of prompts of an exported program
    tokens = tokens.reshape(rows, -1, *tokens.shape[2:])  # [B, P, T, C] -> [N, G, T, C]
    position = _nest(position.to(embedding.dtype), 0)
    upscaling = mask_decoder.upscale_conv1, mask_decoder.upscale_conv2
    if high_res:
        skips = [_nest(each, level) for each, level in zip(reversed(high_res), (1, 2), strict=True)]
        skips = [skip + convolution.bias for skip, convolution in zip(skips, upscaling, strict=True)]
    else:
        skips = [convolution.bias.expand(b, 1, -1) for convolution in upscaling]
    places = _places(h, w, embedding.device)
    owners = torch.arange(rows, device=embedding.device) // masks_per_image  # row n holds image owners[n]

    def decode_some(some: slice, prompts: int) -> list[Tensor]:
        """Decode some images with all their prompts, `prompts` at a time."""
        owner, own = owners[some], tokens[some]
        image = _SharedImage(_nest(embedding[owner] + dense[some], 0), position, mask_decoder.transformer.layers[0])
        finer = [skip[owner] for skip in skips]
        hq = None if hq_features is None else hq_features[owner]
        parts = []
        for start in range(0, own.shape[1], prompts) if prompts else (0,):
            chunk = slice(start, start + prompts) if prompts else slice(None)
            seen = image if own_masks is None else own_masks.over(image, some, chunk)
            parts.append(_decode_chunk(mask_decoder, own[:, chunk], seen, position, finer, hq, places))
        return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]  # each [n, G, ...]

    if torch.compiler.is_compiling():
        parts = decode_some(slice(None), 0)
    else:
        prompts = prompts_per_chunk(embedding)
        images = max(1, prompts // tokens.shape[1])
        chunks = [decode_some(slice(start, start + images), prompts) for start in range(0, len(dense), images)]
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


def _places(h: int, w: int, device: torch.device) -> Tensor:
    """Where in two levels of `_nest` each pixel of a map is: [4h, 4w]."""
    cells = torch.arange(h * w * 16, device=device).view(h, w, 2, 2, 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(4 * h, 4 * w)  # [h, w, 2, 2, 2, 2] -> [h, 2, 2, w, 2, 2]


def _decode_chunk(
    decoder: nn.Module,
    prompt: Tensor,
    image: "_SharedImage | _MaskedImages",
    position: Tensor,
    skips: list[Tensor],
    hq_features: Tensor | None,
    places: Tensor,
) -> list[Tensor]:
    """Prompts [N, G, T, C] on N images -> masks [N, G, M, 4h, 4w], iou, mask tokens and, if the decoder has them,
    object logits."""
    tokens, rows = _two_way_transformer(decoder.transformer, prompt, image, position)
    first = 1 if hasattr(decoder, "obj_score_token") else 0  # the IoU token, which the mask tokens follow
    mask_tokens = tokens[:, :, first + 1 : first + 1 + decoder.num_mask_tokens]
    hyper = [mlp(mask_tokens[:, :, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]

    # Each position becomes four, twice.
    norm = decoder.upscale_layer_norm  # its own forward expects channels first
    rows = _upscale(rows, decoder.upscale_conv1, skips[0])  # -> [N, G, L*4, C/4]
    rows = decoder.activation(F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    rows = decoder.activation(_upscale(rows, decoder.upscale_conv2, skips[1]))  # -> [N, G, L*16, C/8]
    masks = torch.stack(hyper, dim=2) @ rows.mT  # [N, G, M, C/8] @ [N, G, C/8, L*16]
    masks = masks.flatten(0, 2).index_select(1, places.flatten()).view(*masks.shape[:3], *places.shape)
    if hq_features is not None:
        upscaled = rows.index_select(-2, places.flatten()).mT.unflatten(-1, places.shape)  # -> [N, G, C/8, 4h, 4w]
        hq_mask = _hq_mask(decoder, upscaled, mask_tokens[:, :, -1], hq_features)
        masks = torch.cat([masks, hq_mask], dim=2)
    parts = [masks, decoder.iou_prediction_head(tokens[:, :, first]), mask_tokens]
    return parts + [decoder.pred_obj_score_head(tokens[:, :, 0]) for _ in range(first)]


def _upscale(rows: Tensor, convolution: nn.ConvTranspose2d, skip: Tensor) -> Tensor:
    """A transposed convolution whose kernel is its stride, [N, G, L, C] -> [N, G, L*4, C'] nested: its weight [C, C',
    2, 2] is a matrix [C, 4*C']. skip [N, L*4 or 1, C'] is the skip of each image plus the bias."""
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    return (rows @ weight).unflatten(-1, (4, -1)).flatten(2, 3).add_(skip[:, None])


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
    transformer: nn.Module, prompt: Tensor, image: "_SharedImage | _MaskedImages | _PromptImages", position: Tensor
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
        rows = layer.layer_norm4(written)
        image = _PromptImages(rows, position)
    tokens = tokens + image.read(transformer.final_attn_token_to_image, tokens + prompt)
    return transformer.layer_norm_final_attn(tokens), rows


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


class _MaskedImages:
    """The image before the first layer plus a mask prompt for each prompt, hidden [N, G, L, R] times last [C, R]: the
    projection of the image is shared, and that of the mask prompt moves to the token side."""

    def __init__(self, image: _SharedImage, hidden: Tensor, last: Tensor):
        self.image, self.hidden, self.last = image, hidden, last

    def read(self, attention: nn.Module, queries: Tensor) -> Tensor:
        """Tokens [N, G, T, C] attend to the image -> [N, G, T, C]."""
        query = _split_heads(attention.q_proj(queries), attention) * attention.scaling  # [N, G, H, T, d]
        weights = self._scores(query, self.image.key, attention.k_proj).softmax(-1)  # [N, G, H, T, L]
        of_image = self._by_head(weights) @ self.image.value  # [N, H, G*T, L] @ [N, H, L, d]
        read = of_image.unflatten(2, query.shape[1:4:2]).transpose(1, 2)  # -> [N, H, G, T, d] -> [N, G, H, T, d]
        of_mask = (weights.flatten(2, 3) @ self.hidden).view(*query.shape[:4], -1)  # -> [N, G, H, T, R]
        read = read + of_mask @ self._folded(attention.v_proj, query.shape[2]).mT
        return _output(attention)(read.transpose(2, 3).flatten(3))

    def write(self, attention: nn.Module, keys: Tensor, values: Tensor) -> Tensor:
        """The image attends to the tokens [N, G, T, C] and the result is added -> [N, G, L, C]."""
        key = _split_heads(attention.k_proj(keys), attention) * attention.scaling
        scores = self._scores(key, self.image.query, attention.q_proj)
        rows = (self.hidden @ self.last.mT).add_(self.image.rows[:, None])
        return _mix(attention, scores, values, rows)

    def _scores(self, tokens: Tensor, projected: Tensor, projection: nn.Linear) -> Tensor:
        """Products of tokens [N, G, H, T, d] with the projection of the sum -> [N, G, H, T, L]; `projected` [N, H, L,
        d] is that of the image."""
        of_image = self._by_head(tokens) @ projected.mT  # [N, H, G*T, d] @ [N, H, d, L]
        of_image = of_image.unflatten(2, tokens.shape[1:4:2]).transpose(1, 2)  # -> [N, G, H, T, L]
        folded = (tokens @ self._folded(projection, tokens.shape[2])).flatten(2, 3)  # -> [N, G, H*T, R]
        return (folded @ self.hidden.mT).view(of_image.shape).add_(of_image)

    def _folded(self, projection: nn.Linear, heads: int) -> Tensor:
        """The projection of mask prompts, [H, d, R]."""
        return (projection.weight @ self.last).unflatten(0, (heads, -1))

    def _by_head(self, tokens: Tensor) -> Tensor:
        """[N, G, H, T, d] -> [N, H, G*T, d]"""
        return tokens.transpose(1, 2).flatten(2, 3)


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
        heads, tokens = tokens.shape[2], tokens * attention.scaling
        folded = (tokens @ projection.weight.unflatten(0, (heads, -1))).flatten(2, 3)  # @ [H, d, C] -> [N, G, H*T, C]
        constant = tokens @ projection.bias.unflatten(0, (heads, -1, 1))  # @ [H, d, 1] -> [N, G, H, T, 1]
        return (folded @ self.placed.mT).view(*tokens.shape[:4], -1).add_(constant)


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
    return (weights.mT @ value).unflatten(0, (n, g)).add_(rows)  # [N*G, L, H*T] @ [N*G, H*T, C]


def _output(attention: nn.Module) -> nn.Linear:
    """Output projection of an attention layer, which has another name in transformers' SAM 1 than in SAM 2."""
    return attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj


def _split_heads(features: Tensor, attention: nn.Module) -> Tensor:
    """[..., T, H*d] -> [..., H, T, d]"""
    return features.unflatten(-1, (attention.num_attention_heads, -1)).transpose(-3, -2)
