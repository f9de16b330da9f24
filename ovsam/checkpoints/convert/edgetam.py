"""EdgeTAM's official .pt (Zhou et al. 2025), as `EdgeTamVideoModel` and `EdgeTamModel`."""

from collections.abc import Mapping

from torch import Tensor
from transformers import EdgeTamModel, EdgeTamVideoConfig, EdgeTamVideoModel

from ovsam.checkpoints.convert.base import CheckpointLayout
from ovsam.checkpoints.convert.sam2 import MEMORY, SAM2_PROMPTS_AND_MASKS, feature_sizes, video_processor

# A Perceiver compresses the memory; its attention keeps keys and values in one matrix.
PERCEIVER = (
    (r"^spatial_perceiver\.latents$", "spatial_perceiver.latents_1d"),
    (r"^spatial_perceiver\.norm\.", "spatial_perceiver.layer_norm."),
    (r"^(spatial_perceiver\.layers\.\d)\.attn\.norm_x\.", r"\1.layer_norm_input."),
    (r"^(spatial_perceiver\.layers\.\d)\.attn\.norm_latents\.", r"\1.layer_norm_latents."),
    (r"^(spatial_perceiver\.layers\.\d)\.self_attn\.norm\.", r"\1.layer_norm_self."),
    (r"^(spatial_perceiver\.layers\.\d)\.attn\.", r"\1.cross_attention."),
    (r"^(spatial_perceiver\.layers\.\d)\.self_attn\.", r"\1.self_attention."),
    (r"^(spatial_perceiver\..*_attention)\.to_q\.", r"\1.q_proj."),
    (r"^(spatial_perceiver\..*_attention)\.to_kv\.", r"\1.{k_proj,v_proj}."),
    (r"^(spatial_perceiver\..*_attention)\.to_out\.", r"\1.o_proj."),
    (r"^(spatial_perceiver\.layers\.\d)\.(self_)?ff\.0\.", r"\1.\2mlp.layer_norm."),
    (r"^(spatial_perceiver\.layers\.\d)\.(self_)?ff\.1\.", r"\1.\2mlp.up_proj."),
    (r"^(spatial_perceiver\.layers\.\d)\.(self_)?ff\.3\.", r"\1.\2mlp.down_proj."),
)


def _read_config(tensors: Mapping[str, Tensor], image_size: int | None) -> tuple[str, EdgeTamVideoConfig]:
    side = image_size or 1024
    trunk = {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "num_classes": 0,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    }
    config = EdgeTamVideoConfig(
        vision_config={
            "model_type": "edgetam_vision_model",
            "backbone_config": trunk,
            "backbone_feature_sizes": feature_sizes(side),
        },
        prompt_encoder_config={"image_size": side},
        mask_decoder_config={},
        image_size=side,
        memory_attention_rope_feat_sizes=[side // 16] * 2,
        enable_occlusion_spatial_embedding=False,
        enable_temporal_pos_encoding_for_object_pointers=False,
    )
    return "RepViT-M1", config


EDGETAM = CheckpointLayout(
    title="EdgeTAM (official .pt)",
    marks=(r"^image_encoder\.trunk\.body\.", r"^sam_mask_decoder\.", r"^spatial_perceiver\."),
    read_config=_read_config,
    renames=(
        (r"^image_encoder\.trunk\.body\.", "vision_encoder.backbone.timm_model."),
        (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
        *SAM2_PROMPTS_AND_MASKS,
        *MEMORY,
        (r"^(memory_attention\.layers\.\d)\.linear1\.", r"\1.mlp.up_proj."),
        (r"^(memory_attention\.layers\.\d)\.linear2\.", r"\1.mlp.down_proj."),
        *PERCEIVER,
    ),
    model_classes=(EdgeTamVideoModel, EdgeTamModel),
    processor=video_processor,
)
