"""The trackers SAM 2 (Ravi et al. 2024, section 4) and EdgeTAM (Zhou et al. 2025) of transformers, as SAM sides.

On images they equal `Sam2Side` and `EdgeTamSide`. In video each frame's features are read together with the memories of
an object (`recall`), decoded without a prompt (`segment`), and stored (`memorise`). The weights and the arithmetic are
those of `Sam2VideoModel` and `EdgeTamVideoModel`; the order differs: all objects of a frame form one batch, and shared
parts, such as self-attention of the first layer, are computed once. Gradients flow.

Shapes: B images, P objects on each, L = h*w positions, T tokens of one spatial memory, K tokens of all memories, C
width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EdgeTamVideoModel, PreTrainedConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import (
    NO_OBJ_SCORE,
    Sam2VideoPositionEmbeddingSine,
    get_1d_sine_pe,
    rotate_pairwise,
)

from ovsam.errors import InputError
from ovsam.modeling.outputs import DecodedMasks, SamFeatures, TrackedMasks
from ovsam.modeling.sam.base import Part, check_prompts
from ovsam.modeling.sam.decode import decode_masks
from ovsam.modeling.sam.memory import Recall
from ovsam.modeling.sam.sam2 import Sam2Side
from ovsam.ops.masks import INSIDE, OUTSIDE

# Queries and keys of attention on a CPU that are multiplied at once: their scores must stay in the cache.
ROWS_AT_ONCE, KEYS_AT_ONCE = 1024, 512


class Sam2VideoSide(Sam2Side):
    """A `Sam2VideoModel`; takes a `Sam2VideoConfig`.

    Raises:
        InputError: the sizes of the memory do not fit the image size.
    """

    model_class = Sam2VideoModel
    memory_parts: tuple[str, ...] = (
        "memory_attention",
        "memory_encoder",
        "mask_downsample",
        "object_pointer_proj",
        "temporal_positional_encoding_projection_layer",
        "no_memory_positional_encoding",
        "memory_temporal_positional_encoding",
        "no_object_pointer",
        "occlusion_spatial_embedding_parameter",
    )

    def __init__(self, config: PreTrainedConfig, part: Part = "all"):
        super().__init__(config, part)
        if part in ("vision", "decoder"):
            for name in self.memory_parts:
                setattr(self.model, name, None)
        self._cells = Sam2VideoPositionEmbeddingSine(self.width // 2, normalize=True)  # as the vision encoder's
        sizes = list(config.memory_attention_rope_feat_sizes)
        if sizes != [self.grid, self.grid] or config.image_size != self.image_size:
            raise InputError(
                f"For images of {self.image_size} pixels memory_attention_rope_feat_sizes must be "
                f"{[self.grid, self.grid]} and image_size {self.image_size}; got {sizes} and {config.image_size}."
            )
        if self.width % config.memory_encoder_output_channels:
            raise InputError(
                f"The width {self.width} must be a multiple of memory_encoder_output_channels, "
                f"{config.memory_encoder_output_channels}: an object pointer is divided into tokens of that width."
            )

    # ------------------------------------------------------------------------------------ memory -> features

    def recall(self, features: SamFeatures, plan: Recall, spatial: Tensor, pointers: Tensor) -> Tensor:
        """Memory attention: return the features of the image conditioned on each object's memory.

        Args:
            features: features of B images.
            plan: plan that all objects share.
            spatial: the n spatial memories of each object, [B, P, n, T, 64].
            pointers: the m object pointers of each object, [B, P, m, C].

        Returns:
            [B, P, C, h, w].
        """
        assert features.pyramid is not None
        raw, attention, p = features.pyramid[2], self.model.memory_attention, spatial.shape[1]
        b, c, h, w = raw.shape
        rows = (raw + 0.1 * self._image_position(raw)).flatten(2).mT  # [B, C, h, w] -> [B, L, C]
        cells = attention.rotary_emb(rows, attention.position_ids)
        parts = c // spatial.shape[-1]  # a pointer becomes this many tokens of 64
        memory = torch.cat([spatial.to(raw.dtype).flatten(2, 3), pointers.unflatten(-1, (parts, -1)).flatten(2, 3)], 2)
        memory = memory.flatten(0, 1)  # [B, P, K, 64] -> [B*P, K, 64]
        position = torch.cat([self._frame_position(plan, raw), self._pointer_position(plan, raw, parts)])  # [K, 64]
        turn = self._key_rotation(cells, len(plan.frames), len(position))
        keys = memory + position
        for number, layer in enumerate(attention.layers):
            # Before the first cross-attention all objects share the image: B rows, not B*P.
            query = layer.layer_norm1(rows)[:, None]
            rows = rows + layer.dropout1(layer.self_attn(query, query, query, position_embeddings=cells)[0][:, 0])
            query = layer.layer_norm2(rows)
            if number == 0:
                rows = rows[:, None].expand(-1, p, -1, -1).flatten(0, 1)  # [B, L, C] -> [B*P, L, C]
                query = query[:, None].expand(-1, p, -1, -1).flatten(0, 1)
            rows = rows + layer.dropout2(_read_memory(layer.cross_attn_image, query, keys, memory, cells, turn))
            rows = rows + layer.dropout3(self._feed_forward(layer, layer.layer_norm3(rows)))
        rows = attention.layer_norm(rows)
        return rows.mT.reshape(b, p, c, h, w)  # [B*P, L, C] -> [B, P, C, h, w]

    def _feed_forward(self, layer: nn.Module, rows: Tensor) -> Tensor:
        return layer.linear2(layer.dropout(layer.activation(layer.linear1(rows))))

    def _image_position(self, raw: Tensor) -> Tensor:
        """Sine codes of the image's cells, [1, C, h, w]."""
        return self._cells((1, *raw.shape[1:]), raw.device, raw.dtype)

    def _spatial_position(self, raw: Tensor) -> Tensor:
        """Position codes of the tokens of one spatial memory, [T, 64]."""
        shape = (1, self.model.mem_dim, *raw.shape[-2:])
        return self.model.memory_encoder.position_encoding(shape, raw.device, raw.dtype)[0].flatten(1).mT

    def _frame_position(self, plan: Recall, raw: Tensor) -> Tensor:
        """Position codes of all spatial memories, [n*T, 64]: place plus time."""
        time = self.model.memory_temporal_positional_encoding.flatten(1)  # [num_maskmem, 1, 1, 64] -> [.., 64]
        place = self._spatial_position(raw)
        return torch.cat(
            [place + time[offset - 1] for offset in plan.frames]
        )  # 0, a conditioned frame, takes the last one

    def _pointer_position(self, plan: Recall, raw: Tensor, parts: int) -> Tensor:
        """Position codes of the pointers' tokens, [m*parts, 64]: time."""
        if not self.model.config.enable_temporal_pos_encoding_for_object_pointers:
            return raw.new_zeros(len(plan.pointers) * parts, self.model.mem_dim)
        times = torch.tensor(plan.pointers, device=raw.device, dtype=torch.float32) / (plan.longest - 1)
        code = get_1d_sine_pe(times, dim=raw.shape[1]).to(raw.dtype)
        return self.model.temporal_positional_encoding_projection_layer(code).repeat_interleave(parts, 0)

    def _key_rotation(self, cells: tuple[Tensor, Tensor], frames: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for every key, [1, K, d]; pointers have no place and are not rotated."""
        return _fill(cells[0].repeat(1, frames, 1), tokens, 1.0), _fill(cells[1].repeat(1, frames, 1), tokens, 0.0)

    # ------------------------------------------------------------------------------------- features -> masks

    def without_memory(self, features: SamFeatures, objects: int) -> Tensor:
        """Replaces `recall` on the first frame of an object: [B, P, C, h, w]."""
        assert features.embedding is not None
        return features.embedding[:, None].expand(-1, objects, -1, -1, -1)

    def takes_best(self, points: int, first: bool) -> bool:
        """Whether the best of the three masks of an ambiguous prompt is taken, as configured, for a number of points
        (a box has two; 0 without a prompt) on the first frame of an object or on a later one."""
        config = self.model.config
        ambiguous = config.multimask_min_pt_num <= points <= config.multimask_max_pt_num
        return config.multimask_output_in_sam and ambiguous and (first or config.multimask_output_for_tracking)

    def segment(
        self,
        features: SamFeatures,
        recalled: Tensor,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        multimask: bool = False,
    ) -> TrackedMasks:
        """Return the mask of each object, from features conditioned on its memory, from its prompt, or from both.

        Args:
            recalled: features conditioned on memory, [B, P, C, h, w].
            input_points, input_labels: points [B, P, N, 2] in pixels of the model input and labels [B, P, N]: 1 inside,
                0 outside, 2 and 3 the corners of a box; None without a prompt.
            multimask: whether to take the best of the three masks of an ambiguous prompt, else the single mask.
        """
        decoded = self._decode_objects(features, recalled, input_points, input_labels, None)
        return self._choose(decoded, multimask)

    def adopt(self, features: SamFeatures, masks: Tensor) -> TrackedMasks:
        """Turn given masks [B, P, H, W] of 0 and 1, at the size of the model input, into the form of predicted ones."""
        assert features.pyramid is not None
        b, p = masks.shape[:2]
        dtype = features.pyramid[2].dtype
        logits = masks.to(dtype) * (INSIDE - OUTSIDE) + OUTSIDE
        quarter = [side // 4 for side in masks.shape[-2:]]
        low = F.interpolate(logits.float(), quarter, mode="bilinear", align_corners=False, antialias=True).to(dtype)
        prompt = self.model.mask_downsample(masks.to(dtype).flatten(0, 1)[:, None])  # -> [B*P, 1, H/4, W/4]
        recalled = features.pyramid[2][:, None].expand(-1, p, -1, -1, -1)
        decoded = self._decode_objects(features, recalled, None, None, prompt)
        chosen = self._choose(decoded, True)
        shown = masks.flatten(2).any(-1, keepdim=True).to(dtype)  # [B, P, 1]
        pointer = shown * chosen.pointers + (1 - shown) * self.model.no_object_pointer
        return TrackedMasks(low, masks.new_ones(b, p).to(dtype), shown * 20 - 10, pointer, logits)

    def _decode_objects(self, features, recalled, points, labels, mask_prompts) -> DecodedMasks:
        """Decode objects that have image features of their own, [B, P, C, h, w]; maps of high resolution are shared."""
        model, (b, p) = self.model, recalled.shape[:2]
        with torch.autocast(recalled.device.type, enabled=False):
            if points is None:
                sparse = self._encode_nothing(b, p)
            else:
                check_prompts(b, points, labels, None, None)
                sparse, _ = model.prompt_encoder(points.float(), labels, None, None)
            position = self._position()
        if mask_prompts is None:
            dense = model.prompt_encoder.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        else:
            dense = model.prompt_encoder.mask_embed(mask_prompts).unflatten(0, (b, p))
        # The decoder adds the embedding of each prompt to that of the image, so the image is set to zero.
        blank = torch.zeros_like(recalled[:, 0])
        return decode_masks(model.mask_decoder, blank, position, features.high_res, sparse, recalled + dense)

    def _choose(self, decoded: DecodedMasks, multimask: bool) -> TrackedMasks:
        masks = self.select_masks(decoded, multimask)
        token = masks.tokens[:, :, 0] if multimask else decoded.tokens[:, :, 0]  # [B, P, C]
        if multimask:
            best = masks.iou.argmax(-1)[..., None]  # [B, P, 1]
            token = masks.tokens.take_along_dim(best[..., None], 2)[:, :, 0]
            masks.masks, masks.iou = masks.masks.take_along_dim(best[..., None, None], 2), masks.iou.gather(2, best)
        shown = (decoded.object_logits > 0).to(token.dtype)  # [B, P, 1]
        pointer = shown * self.model.object_pointer_proj(token) + (1 - shown) * self.model.no_object_pointer
        logits = masks.masks[:, :, 0]
        if not self.training:  # in training a wrong score must not hide the mask from its loss
            logits = logits.masked_fill(decoded.object_logits[..., None] <= 0, NO_OBJ_SCORE)
        return TrackedMasks(logits, masks.iou[:, :, 0], decoded.object_logits, pointer)

    # ------------------------------------------------------------------------------------- masks -> memory

    def memorise(self, features: SamFeatures, tracked: TrackedMasks, prompted: Tensor) -> Tensor:
        """Memory encoder: return the spatial memory of each object on this frame, [B, P, T, 64].

        Args:
            features: features of B images.
            tracked: masks of P objects on each image.
            prompted: [P] bool: objects whose mask comes from a prompt; their masks are binarised. This is decided for
                each object, as in SAM 2's own code; transformers' SAM 2 decides once for all objects.
        """
        assert features.pyramid is not None
        model, raw = self.model, features.pyramid[2]
        encoder, config, (b, p) = model.memory_encoder, model.config, tracked.masks.shape[:2]
        logits = tracked.full
        if logits is None:
            size = (self.image_size, self.image_size)
            logits = F.interpolate(tracked.masks.float(), size, mode="bilinear", align_corners=False).to(raw.dtype)
        shades = logits.sigmoid()
        if not self.training:
            shades = torch.where(prompted[:, None, None], (logits > 0).to(raw.dtype), shades)
        shades = shades * config.sigmoid_scale_for_mem_enc + config.sigmoid_bias_for_mem_enc
        mask = encoder.mask_downsampler(shades.flatten(0, 1)[:, None]).unflatten(0, (b, p))  # [B, P, C, h, w]
        fused = (encoder.feature_projection(raw)[:, None] + mask).flatten(0, 1)  # -> [B*P, C, h, w]
        memory = encoder.projection(encoder.memory_fuser(fused))  # [B*P, 64, h, w]
        if model.occlusion_spatial_embedding_parameter is not None:
            hidden = (tracked.object_logits <= 0).to(raw.dtype).reshape(b * p, 1, 1, 1)
            memory = memory + hidden * model.occlusion_spatial_embedding_parameter[..., None, None]
        return self._pack(memory).unflatten(0, (b, p))

    def _pack(self, memory: Tensor) -> Tensor:
        """[N, 64, h, w] -> [N, T, 64], the stored form."""
        memory = memory.flatten(2).mT
        return memory if self.training else memory.to(torch.bfloat16)


class EdgeTamVideoSide(Sam2VideoSide):
    """An `EdgeTamVideoModel`; takes an `EdgeTamVideoConfig`. A perceiver compresses each spatial memory into few
    tokens, some of which have a position in a coarse grid (EdgeTAM, section 3.2)."""

    model_class = EdgeTamVideoModel
    memory_parts = (*Sam2VideoSide.memory_parts, "spatial_perceiver")

    def _feed_forward(self, layer: nn.Module, rows: Tensor) -> Tensor:
        return layer.mlp(rows)

    def _spatial_position(self, raw: Tensor) -> Tensor:
        perceiver = self.model.spatial_perceiver
        placed = perceiver.num_latents_2d
        side = int(placed**0.5)
        shape = (1, perceiver.hidden_size, side, side)
        code = perceiver.positional_encoding(shape, raw.device, raw.dtype)[0].flatten(1).mT  # [side*side, 64]
        return torch.cat([code.new_zeros(perceiver.num_latents_1d, code.shape[1]), code])

    def _key_rotation(self, cells: tuple[Tensor, Tensor], frames: int, tokens: int) -> tuple[Tensor, Tensor]:
        attention, free = self.model.memory_attention, self.model.spatial_perceiver.num_latents_1d
        placed = attention.rotary_emb(cells[0], attention.position_ids_k)
        turn = []
        for table, rest in zip(placed, (1.0, 0.0), strict=True):
            one = torch.cat([table.new_full((1, free, table.shape[-1]), rest), table], 1)
            turn.append(_fill(one.repeat(1, frames, 1), tokens, rest))
        return turn[0], turn[1]

    def _pack(self, memory: Tensor) -> Tensor:
        """Forward of the perceiver; its own supports one object at a time only (transformers 5.23)."""
        perceiver, n = self.model.spatial_perceiver, len(memory)
        position = self.model.memory_encoder.position_encoding(memory.shape, memory.device, memory.dtype)
        packed = []
        if perceiver.num_latents_1d:
            packed.append(perceiver._forward_1d(memory, position)[0])
        if perceiver.num_latents_2d:
            side = int(perceiver.num_latents_2d**0.5)
            window = memory.shape[-1] // side
            cells = memory.unflatten(3, (side, window)).unflatten(2, (side, window))  # [N, 64, s, v, s, v]
            cells = cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)  # -> [N*s*s, v*v, 64]
            latents = perceiver.latents_2d.repeat(n, 1)[:, None]  # [s*s, 64] -> [N*s*s, 1, 64]
            for layer in perceiver.layers:
                latents = layer(latents, cells, positional_encoding=None)
            packed.append(perceiver.layer_norm(latents).view(n, -1, latents.shape[-1]))
        return torch.cat(packed, 1)


def _fill(table: Tensor, tokens: int, value: float) -> Tensor:
    """[1, n, d] -> [1, K, d]"""
    rest = table.new_full((1, tokens - table.shape[1], table.shape[2]), value)
    return torch.cat([table, rest], 1)


def _read_memory(
    attention: nn.Module,
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    cells: tuple[Tensor, Tensor],
    turn: tuple[Tensor, Tensor],
) -> Tensor:
    """Cross-attention of query [N, L, C] to keys and memory [N, K, 64] with rotary positions -> [N, L, C].

    Values are averaged before they are projected, V (sum a m) = sum a (V m): memories have 64 channels, values C.
    """
    heads = attention.num_attention_heads
    query, memory = _rotate(_heads(attention.q_proj(query), heads), *cells), memory[:, None]
    if query.device.type == "cpu" and not (torch.is_grad_enabled() and query.requires_grad):
        # One object at a time, in blocks that stay in the cache; torch's own need values as wide as the queries.
        place = torch.complex(turn[0][..., ::2].float(), turn[1][..., ::2].float())  # [1, K, d/2]
        mean = torch.stack(
            [
                _average(rows * attention.scaling, _turn(_heads(attention.k_proj(k), heads), place), m)
                for rows, k, m in zip(query, keys, memory, strict=True)
            ]
        )
    else:
        keys = _rotate(_heads(attention.k_proj(keys), heads), *turn)
        memory = memory.expand(-1, heads, -1, -1)
        mean = F.scaled_dot_product_attention(query, keys, memory, scale=attention.scaling)
    # mean [N, heads, L, 64]
    weight = attention.v_proj.weight.unflatten(0, (heads, -1))  # [heads*d, 64] -> [heads, d, 64]
    value = mean @ weight.mT + attention.v_proj.bias.view(heads, 1, -1)
    return attention.o_proj(value.transpose(1, 2).flatten(2))  # [N, heads, L, d] -> [N, L, heads*d] -> [N, L, C]


def _average(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(query keys^T) values: query [heads, L, d], keys [heads, K, d], values [1, K, 64] -> [heads, L, 64]."""
    return torch.cat([_average_block(rows, keys, values) for rows in query.split(ROWS_AT_ONCE, 1)], 1)


def _average_block(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[heads, R, d], [heads, K, d], [1, K, 64] -> [heads, R, 64] (FlashAttention-2, Dao 2023, algorithm 1)"""
    top = query.new_full((*query.shape[:2], 1), -torch.inf)
    total, mean = torch.zeros_like(top), query.new_zeros(*query.shape[:2], values.shape[-1])
    for some_keys, some_values in zip(keys.split(KEYS_AT_ONCE, 1), values.split(KEYS_AT_ONCE, 1), strict=True):
        scores = query @ some_keys.mT
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, fade = scores.sub_(higher).exp_(), (top - higher).exp_()
        total = total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        mean = mean.mul_(fade).add_(weights @ some_values)
        top = higher
    return mean / total


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[..., L, heads*d] -> [..., heads, L, d]"""
    return rows.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (rows.float() * cos + rotate_pairwise(rows.float()) * sin).type_as(rows)


def _turn(rows: Tensor, place: Tensor) -> Tensor:
    """`_rotate` in one pass over memory: rows [heads, K, d] as complex numbers, times their places [1, K, d/2]."""
    turned = torch.view_as_complex(rows.float().unflatten(-1, (-1, 2))) * place
    return torch.view_as_real(turned).flatten(-2).type_as(rows)
