"""SAM 2's and SAM 2.1's official .pt (Ravi et al. 2024), four sizes, as `Sam2VideoModel` and `Sam2Model`."""

from collections.abc import Mapping

from torch import Tensor
from transformers import (
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)

from ovsam.checkpoints.convert.base import CheckpointLayout, count_blocks, shape_of
from ovsam.checkpoints.convert.sam import PROMPTS_AND_MASKS
from ovsam.errors import InputError

# Changes of SAM 2 in the prompt encoder and the mask decoder.
SAM2_PROMPTS_AND_MASKS = (
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"^prompt_encoder\.point_embeddings\.(\d)\.weight$", r"prompt_encoder.point_embed.weight[\1]"),
    (r"^(mask_decoder\.transformer\..*)\.out_proj\.", r"\1.o_proj."),
    (r"^(mask_decoder\.transformer\..*)\.mlp\.layers\.0\.", r"\1.mlp.proj_in."),
    (r"^(mask_decoder\.transformer\..*)\.mlp\.layers\.1\.", r"\1.mlp.proj_out."),
    *PROMPTS_AND_MASKS,
)

MEMORY = (
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^obj_ptr_proj\.layers\.0\.", "object_pointer_proj.proj_in."),
    (r"^obj_ptr_proj\.layers\.1\.", "object_pointer_proj.layers.0."),
    (r"^obj_ptr_proj\.layers\.2\.", "object_pointer_proj.proj_out."),
    (r"^(memory_attention\..*)\.out_proj\.", r"\1.o_proj."),
    (r"^(memory_attention\..*)\bnorm", r"\1layer_norm"),
    # The mask is downsampled four times, each time by a convolution, a normalisation and an activation.
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.0\.", "memory_encoder.mask_downsampler.layers.0.conv."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.1\.", "memory_encoder.mask_downsampler.layers.0.layer_norm."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.3\.", "memory_encoder.mask_downsampler.layers.1.conv."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.4\.", "memory_encoder.mask_downsampler.layers.1.layer_norm."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.6\.", "memory_encoder.mask_downsampler.layers.2.conv."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.7\.", "memory_encoder.mask_downsampler.layers.2.layer_norm."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.9\.", "memory_encoder.mask_downsampler.layers.3.conv."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.10\.", "memory_encoder.mask_downsampler.layers.3.layer_norm."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.layers\.(\d)\.gamma$", r"memory_encoder.memory_fuser.layers.\1.scale"),
    (r"^memory_encoder\.fuser\.layers\.(\d)\.dwconv\.", r"memory_encoder.memory_fuser.layers.\1.depthwise_conv."),
    (r"^memory_encoder\.fuser\.layers\.(\d)\.norm\.", r"memory_encoder.memory_fuser.layers.\1.layer_norm."),
    (r"^memory_encoder\.fuser\.layers\.(\d)\.pwconv", r"memory_encoder.memory_fuser.layers.\1.pointwise_conv"),
)

# (width, blocks) -> name, blocks a stage, heads of the first stage, blocks with attention over the whole image,
# window side of each stage, side of the position embedding
SIZES = {
    (96, 12): ("hiera tiny", [1, 2, 7, 2], 1, [5, 7, 9], [8, 4, 14, 7], 7),
    (96, 16): ("hiera small", [1, 2, 11, 2], 1, [7, 10, 13], [8, 4, 14, 7], 7),
    (112, 24): ("hiera base plus", [2, 3, 16, 3], 2, [12, 16, 20], [8, 4, 14, 7], 14),
    (144, 48): ("hiera large", [2, 6, 36, 4], 2, [23, 33, 43], [8, 4, 16, 8], 7),
}


def _read_config(tensors: Mapping[str, Tensor], image_size: int | None) -> tuple[str, Sam2VideoConfig]:
    width = shape_of(tensors, "image_encoder.trunk.patch_embed.proj.weight", 4)[0]
    blocks = count_blocks(tensors, "image_encoder.trunk.blocks.")
    if (width, blocks) not in SIZES:
        known = ", ".join(f"{name} ({blocks} of {width})" for (width, blocks), (name, *_) in SIZES.items())
        raise InputError(f"SAM 2 with {blocks} blocks of width {width} is unknown; known sizes: {known}.")
    name, per_stage, heads, global_blocks, windows, positions = SIZES[width, blocks]
    side = image_size or 1024
    widths = [width * 2**stage for stage in range(4)]
    trunk = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "image_size": [side, side],
        "num_attention_heads": heads,
        "blocks_per_stage": per_stage,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_size_per_stage": windows,
        "global_attention_blocks": global_blocks,
        "window_positional_embedding_background_size": [positions, positions],
    }
    newer = "no_obj_embed_spatial" in tensors or "obj_ptr_tpos_proj.weight" in tensors  # SAM 2.1
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": trunk,
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": feature_sizes(side),
        },
        prompt_encoder_config={"image_size": side},
        mask_decoder_config={},
        image_size=side,
        memory_attention_rope_feat_sizes=[side // 16] * 2,
        enable_occlusion_spatial_embedding=newer,
        enable_temporal_pos_encoding_for_object_pointers=newer,
    )
    return f"SAM {'2.1' if newer else '2'} {name}", config


def feature_sizes(side: int) -> list[list[int]]:
    """Return the sides of the feature maps; raises InputError unless they are whole numbers."""
    if side % 32:
        raise InputError(f"The side of the images must be a multiple of 32; got {side}.")
    return [[side // stride] * 2 for stride in (4, 8, 16)]


def image_processor(side: int) -> Sam2Processor:
    """Return the processor of images, resized to a square of that side."""
    size, mask_size = {"height": side, "width": side}, {"height": side // 4, "width": side // 4}
    return Sam2Processor(Sam2ImageProcessor(size=size, mask_size=mask_size), target_size=side)


def video_processor(side: int) -> Sam2VideoProcessor:
    """Return the processor of images and videos."""
    videos = Sam2VideoVideoProcessor(size={"height": side, "width": side})
    return Sam2VideoProcessor(image_processor(side).image_processor, videos, target_size=side)


SAM2 = CheckpointLayout(
    title="SAM 2 or 2.1 (official .pt, hiera tiny, small, base plus or large)",
    marks=(r"^image_encoder\.trunk\.blocks\.", r"^image_encoder\.neck\.convs\.\d\.conv\.", r"^sam_mask_decoder\."),
    read_config=_read_config,
    renames=(
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^vision_encoder\.backbone\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
        (r"^(vision_encoder\.backbone\.blocks\.\d+)\.norm", r"\1.layer_norm"),
        (r"^(vision_encoder\.backbone\.blocks\.\d+)\.mlp\.layers\.0\.", r"\1.mlp.proj_in."),
        (r"^(vision_encoder\.backbone\.blocks\.\d+)\.mlp\.layers\.1\.", r"\1.mlp.proj_out."),
        (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
        *SAM2_PROMPTS_AND_MASKS,
        *MEMORY,
    ),
    model_classes=(Sam2VideoModel, Sam2Model),
    processor=video_processor,
)
