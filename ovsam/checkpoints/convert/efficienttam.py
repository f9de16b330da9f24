"""EfficientTAM's official .pt (Xiong et al. 2024), Ti and S, as our `EfficientTamModel`: the image path only."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ovsam.checkpoints.convert.base import CheckpointLayout, count_blocks, shape_of
from ovsam.checkpoints.convert.sam2 import SAM2_PROMPTS_AND_MASKS, image_processor
from ovsam.errors import InputError
from ovsam.modeling.sam.efficienttam import EfficientTamConfig, EfficientTamModel, EfficientTamSide

POSITIONS = "image_encoder.trunk.pos_embed"
SIZES = {(192, 12): ("EfficientTAM-Ti", 3), (384, 12): ("EfficientTAM-S", 6)}  # (width, blocks) -> name, heads


def _read_config(tensors: Mapping[str, Tensor], image_size: int | None) -> tuple[str, EfficientTamConfig]:
    width = shape_of(tensors, "image_encoder.trunk.patch_embed.proj.weight", 4)[0]
    blocks = count_blocks(tensors, "image_encoder.trunk.blocks.")
    if (width, blocks) not in SIZES:
        known = ", ".join(f"{name} ({blocks} of {width})" for (width, blocks), (name, _) in SIZES.items())
        raise InputError(f"EfficientTAM with {blocks} blocks of width {width} is unknown; known sizes: {known}.")
    name, heads = SIZES[width, blocks]
    side = image_size or 1024
    if side % 16:
        raise InputError(f"The side of the images must be a multiple of 16; got {side}.")
    vision = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "global_attn_indexes": [2, 5, 8, 11],
        "image_size": side,
    }
    return name, EfficientTamConfig(
        vision_config=vision, prompt_encoder_config={"image_size": side}, mask_decoder_config={}
    )


def _resize_positions(tensors: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """Drop the position of the class token and resize the grid, which the official code does at every call.

    [1, 1 + n*n, C] -> [1, C, n, n] -> [1, C, h, h] -> [1, h, h, C]
    """
    _, positions, _ = shape_of(tensors, POSITIONS, 3)
    side, grid = int((positions - 1) ** 0.5), config.vision_config.image_size // 16
    if side * side != positions - 1:
        raise InputError(
            f"The tensor {POSITIONS!r} has {positions} positions, which must be a square and a class token."
        )
    cells = tensors[POSITIONS][:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if side != grid:
        cells = F.interpolate(cells, size=(grid, grid), mode="bicubic", align_corners=False)
    return tensors | {POSITIONS: cells.permute(0, 2, 3, 1).contiguous()}


def _answer(model: PreTrainedModel, pixel_values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    side = EfficientTamSide(model.config)
    side.model.load_state_dict(model.state_dict())
    decoded = side.eval().decode(side.encode(pixel_values), points)
    return decoded.masks, decoded.iou


TRACKER = "is part of the tracker, for which transformers has no class"

EFFICIENTTAM = CheckpointLayout(
    title="EfficientTAM (official .pt, Ti or S; image path)",
    marks=(r"^image_encoder\.trunk\.blocks\.", r"^image_encoder\.neck\.convs\.0\.conv_1x1\.", r"^sam_mask_decoder\."),
    read_config=_read_config,
    renames=(
        (r"^image_encoder\.trunk\.blocks\.(\d+)\.norm", r"vision_encoder.layers.\1.layer_norm"),
        (r"^image_encoder\.trunk\.blocks\.(\d+)\.mlp\.layers\.0\.", r"vision_encoder.layers.\1.mlp.lin1."),
        (r"^image_encoder\.trunk\.blocks\.(\d+)\.mlp\.layers\.1\.", r"vision_encoder.layers.\1.mlp.lin2."),
        (r"^image_encoder\.trunk\.blocks\.", "vision_encoder.layers."),
        (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
        (r"^image_encoder\.trunk\.", "vision_encoder."),
        (r"^image_encoder\.neck\.convs\.0\.conv_1x1\.", "vision_encoder.neck.conv1."),
        (r"^image_encoder\.neck\.convs\.0\.norm_0\.", "vision_encoder.neck.layer_norm1."),
        (r"^image_encoder\.neck\.convs\.0\.conv_3x3\.", "vision_encoder.neck.conv2."),
        (r"^image_encoder\.neck\.convs\.0\.norm_1\.", "vision_encoder.neck.layer_norm2."),
        (r"^no_mem_embed$", "no_memory_embedding"),
        *SAM2_PROMPTS_AND_MASKS,
    ),
    unused=(
        (r"^(memory_attention|memory_encoder|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj)\.", TRACKER),
        (r"^(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial)$", TRACKER),
    ),
    model_classes=(EfficientTamModel,),
    processor=image_processor,
    prepare=_resize_positions,
    answer=_answer,
)
