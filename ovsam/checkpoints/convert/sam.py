"""SAM's official .pth (Kirillov et al. 2023), ViT-B, ViT-L and ViT-H, as `SamModel`."""

from collections.abc import Mapping

from torch import Tensor
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

from ovsam.checkpoints.convert.base import CheckpointLayout, count_blocks, shape_of
from ovsam.errors import InputError

# Prompt encoder and mask decoder, which have the same layout in SAM 2 and EdgeTAM.
PROMPTS_AND_MASKS = (
    (
        r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
        "prompt_encoder.shared_embedding.positional_embedding = shared_image_embedding.positional_embedding",
    ),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^(mask_decoder\.transformer\..*)\bnorm(\d|_final_attn)\.", r"\1layer_norm\2."),
    # The small networks of three layers, one for each mask token and each score.
    (r"^(mask_decoder\.(?:\w+_mlps\.\d|\w+_head))\.layers\.0\.", r"\1.proj_in."),
    (r"^(mask_decoder\.(?:\w+_mlps\.\d|\w+_head))\.layers\.1\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:\w+_mlps\.\d|\w+_head))\.layers\.2\.", r"\1.proj_out."),
)

# (width, blocks) -> name, heads, blocks with attention over the whole image
SIZES = {
    (768, 12): ("ViT-B", 12, [2, 5, 8, 11]),
    (1024, 24): ("ViT-L", 16, [5, 11, 17, 23]),
    (1280, 32): ("ViT-H", 16, [7, 15, 23, 31]),
}


def _read_config(tensors: Mapping[str, Tensor], image_size: int | None) -> tuple[str, SamConfig]:
    _, _, grid, width = shape_of(tensors, "image_encoder.pos_embed", 4)
    blocks = count_blocks(tensors, "image_encoder.blocks.")
    if (width, blocks) not in SIZES:
        raise InputError(f"SAM with {blocks} blocks of width {width} is unknown; known sizes: {_names()}.")
    if image_size not in (None, 16 * grid):
        raise InputError(f"The position embedding is for images of {16 * grid} pixels, not {image_size}.")
    name, heads, global_blocks = SIZES[width, blocks]
    vision = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "global_attn_indexes": global_blocks,
        "image_size": 16 * grid,
    }
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"image_size": 16 * grid},
        mask_decoder_config={"layer_norm_eps": 1e-5},  # the official value; the default of transformers is 1e-6
    )
    return name, config


def _names() -> str:
    return ", ".join(f"{name} ({blocks} of {width})" for (width, blocks), (name, *_) in SIZES.items())


def _processor(side: int) -> SamProcessor:
    return SamProcessor(
        SamImageProcessor(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            mask_size={"longest_edge": side // 4},
            mask_pad_size={"height": side // 4, "width": side // 4},
        )
    )


SAM = CheckpointLayout(
    title="SAM 1 (official .pth, ViT-B, ViT-L or ViT-H)",
    marks=(r"^image_encoder\.blocks\.", r"^mask_decoder\."),
    read_config=_read_config,
    renames=(
        (r"^image_encoder\.", "vision_encoder."),
        (r"^vision_encoder\.blocks\.(\d+)\.norm", r"vision_encoder.layers.\1.layer_norm"),
        (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
        (r"^vision_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
        (r"^vision_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
        (r"^vision_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
        (r"^vision_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
        (r"^vision_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
        *PROMPTS_AND_MASKS,
    ),
    unused=((r"^pixel_(mean|std)$", "the processor normalises images"),),
    model_classes=(SamModel,),
    processor=_processor,
)
