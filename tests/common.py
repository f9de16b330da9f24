"""Whole models at tiny random size, one for every composition and for sides of several families."""

import copy
import json
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    EdgeTamConfig,
    EdgeTamModel,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    Owlv2Config,
    Owlv2ForObjectDetection,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3TrackerConfig,
    SamConfig,
    SamHQConfig,
    SamImageProcessor,
    SamModel,
    SiglipConfig,
    SiglipModel,
)

import ovsam
from ovsam.modeling.clip import DualEncoderConfig, OpenClipConfig, OpenClipSide
from ovsam.modeling.sam import EfficientTamConfig

ROOT = Path(__file__).resolve().parents[1]
VAL = ROOT / "tests" / "data" / "emojiscenes-val"  # frozen images; the fixture `val` holds their annotations
SIZE, GRID, C, D = 128, 8, 32, 32
WORDS = ("cat", "dog", "car", "tree", "red ball", "cup", "moon", "star")

PROMPT = {"hidden_size": C, "image_size": SIZE}
DECODER = {"hidden_size": C, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 16}
PYRAMID = {"backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2], "fpn_hidden_size": C}
VIT = {
    "hidden_size": 16,
    "output_channels": C,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 24,
    "image_size": SIZE,
    "window_size": 3,  # does not divide the grid: windows are padded
    "global_attn_indexes": [1],
    "num_pos_feats": C // 2,
}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "blocks_per_stage": [1, 1, 2, 1],
    "window_size_per_stage": [8, 4, 8, 4],
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [7, 7],
    "image_size": [SIZE, SIZE],
}
SAM3_VIT = {
    "model_type": "sam3_vit_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "pretrain_image_size": 64,
}


def timm_trunk(architecture="test_efficientnet", **args) -> dict:
    """The image encoder of an EdgeTAM."""
    args = {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]} | args
    return {"model_type": "timm_wrapper", "architecture": architecture, "num_classes": 0, "model_args": args}


_CHANNELS = {"sam2": [64, 32, 16, 8], "edgetam": [64, 48, 32, 24]}  # of the image encoder's maps, coarsest first
SAM_CONFIGS = {  # family -> class of its configuration, and content of its vision_config
    "sam": (SamConfig, VIT),
    "sam_hq": (SamHQConfig, VIT),
    "efficienttam": (EfficientTamConfig, VIT),
    "sam2": (Sam2Config, PYRAMID | {"backbone_config": HIERA, "backbone_channel_list": _CHANNELS["sam2"]}),
    "edgetam": (
        EdgeTamConfig,
        PYRAMID
        | {"backbone_config": timm_trunk(), "backbone_channel_list": _CHANNELS["edgetam"]}
        | {"fpn_top_down_levels": [0, 1, 2, 3]},
    ),
    "sam3_tracker": (Sam3TrackerConfig, PYRAMID | {"backbone_config": SAM3_VIT, "scale_factors": [4.0, 2.0, 1.0]}),
}


def sam_config(family: str, **vision) -> PreTrainedConfig:
    """A SAM of 128 px and some ten thousand parameters; `vision` overrides values of its vision_config."""
    config_class, own = SAM_CONFIGS[family]
    prompt = PROMPT | ({"patch_size": 16} if family == "sam3_tracker" else {})
    decoder = DECODER | ({"vit_dim": VIT["hidden_size"]} if family == "sam_hq" else {})
    parts = {"vision_config": own | vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    return config_class(**copy.deepcopy(parts))


_TEXT = {"vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 62, "eos_token_id": 63}
_TOWER = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_PATCHES = _TOWER | {"image_size": SIZE, "patch_size": 16, "num_hidden_layers": 4}


VIDEO_C = 128  # the least that transformers' trackers can do: pointers are cut into tokens of 64, and there must be two


def _sam_video(kind: str):
    """The configuration of a tracker; `kind` is sam2_video or edgetam_video."""
    parts = {
        name: {**part, "hidden_size": VIDEO_C}
        for name, part in sam_config(kind.removesuffix("_video")).to_dict().items()
        if name.endswith("_config")
    }
    for name in ("prompt_encoder_config", "mask_decoder_config"):
        parts[name].pop("model_type", None)
    parts["vision_config"]["fpn_hidden_size"] = parts["vision_config"].pop("hidden_size")
    widths = ("memory_attention_hidden_size", "memory_encoder_hidden_size", "mask_downsampler_embed_dim")
    parts |= dict.fromkeys((*widths, "memory_fuser_embed_dim", "memory_fuser_intermediate_dim"), VIDEO_C)
    parts |= {"image_size": SIZE, "memory_attention_rope_feat_sizes": [GRID, GRID], "memory_fuser_num_layers": 1}
    parts |= {"memory_attention_num_layers": 2, "num_maskmem": 4, "max_object_pointers_in_encoder": 6}
    if kind == "sam2_video":
        return Sam2VideoConfig(**parts, memory_attention_feed_forward_hidden_size=64)
    packed = {"perceiver_resampler_num_latents": 8, "perceiver_resampler_num_latents_2d": 16}
    return EdgeTamVideoConfig(
        **parts, **packed, memory_attention_mlp_hidden_size=64, memory_attention_rope_k_sizes=[4, 4]
    )


def _open_clip(**vision) -> OpenClipConfig:
    text = {"context_length": 12, "vocab_size": 64, "width": D, "heads": 2, "layers": 2}
    model_cfg = {"embed_dim": D, "vision_cfg": {"image_size": SIZE} | vision, "text_cfg": text}
    return OpenClipConfig(model_cfg=model_cfg)


def clip_config(kind: str) -> PreTrainedConfig:
    """A CLIP of 128 px (eva: 224) and some hundred thousand parameters."""
    match kind:
        case "dual_encoder":
            text = _TOWER | {"vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return DualEncoderConfig(
                architecture="test_efficientnet",
                text_config=text,
                embed_dim=D,
                image_size=SIZE,
                max_text_length=12,
            )
        case "convnext":
            return _open_clip(timm_model_name="test_convnext", timm_pool="", timm_proj="linear")
        case "resnet":
            return _open_clip(layers=[1, 1, 1, 1], width=8, head_width=64)
        case "eva":  # its rotary tables are buffers that are not saved
            tower = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear"}
            return _open_clip(image_size=224, **tower)
        case "clip":
            return CLIPConfig(text_config=_TOWER | _TEXT, vision_config=_PATCHES, projection_dim=D)
        case "siglip":
            return SiglipConfig(text_config=_TOWER | _TEXT | {"projection_size": D}, vision_config=_PATCHES)
        case "owlv2":
            return Owlv2Config(text_config=_TOWER | _TEXT, vision_config=_PATCHES, projection_dim=D)


CHANNELS = {"dual_encoder": [24, 32, 48, 64], "convnext": [24, 32, 48, 64], "resnet": [32, 64, 128, 256]}
CHANNELS |= dict.fromkeys(("clip", "siglip", "owlv2"), [D] * 4)


def tiny_config(composition="dual", sam="edgetam", clip="dual_encoder", adapters=True, **more) -> ovsam.OVSamConfig:
    """A few hundred thousand parameters, 128 px."""
    read = {"in_channels": [C] * 4 if composition == "sam" else CHANNELS.get(clip), "embed_dim": D, "width": 16}
    if adapters:
        more = {
            "clip2sam_config": ovsam.Clip2SamConfig(**read, token_dim=C),
            "concepts_config": ovsam.ConceptHeadConfig(**read, mask_width=12),
        } | more
    if composition == "clip":
        stand_in = ovsam.Sam2ClipConfig(in_channels=CHANNELS[clip], width=C, num_layers=1, num_heads=4)
        more["sam2clip_config"] = stand_in
    return ovsam.OVSamConfig(composition=composition, sam_config=sam_config(sam), clip_config=clip_config(clip), **more)


@torch.no_grad()
def randomise(model: nn.Module, seed=0) -> nn.Module:
    """Weights at which everything matters: an untrained model's images, prompts and words hardly change its output."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_model(*args, **kwargs) -> ovsam.OVSamModel:
    torch.manual_seed(0)
    model = randomise(ovsam.OVSamModel(tiny_config(*args, **kwargs)))
    if model.concepts is not None:  # scores all over (0, 1); a new head's are all near 0
        model.concepts.objectness.bias.data.zero_()
        model.concepts.scale_shift.bias.data.copy_(torch.tensor([8.0, 0.0]))
    return model


def tiny_video_model(kind="edgetam_video", adapters=True) -> ovsam.OVSamVideoModel:
    """A tracker with random weights, whose objects are in every frame unless a test changes it."""
    torch.manual_seed(0)
    config = tiny_config(adapters=False)
    config.sam_config = _sam_video(kind)
    if adapters:
        read = {"in_channels": CHANNELS["dual_encoder"], "embed_dim": D, "width": 16}
        config.clip2sam_config = ovsam.Clip2SamConfig(**read, token_dim=VIDEO_C)
        config.concepts_config = ovsam.ConceptHeadConfig(**read, mask_width=12)
    model = randomise(ovsam.OVSamVideoModel(config))
    model.sam.model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(100.0)
    if model.concepts is not None:
        model.concepts.objectness.bias.data.zero_()
        model.concepts.scale_shift.bias.data.copy_(torch.tensor([8.0, 0.0]))
    return model


def save_sam(folder: Path, kind: str) -> Path:
    """A SAM of a family, random, as it is published: weights, configuration, image processor, card."""
    torch.manual_seed(1)
    if kind.endswith("_video"):
        model_class = {"sam2_video": Sam2VideoModel, "edgetam_video": EdgeTamVideoModel}[kind]
    else:
        model_class = {"sam": SamModel, "sam2": Sam2Model, "edgetam": EdgeTamModel}[kind]
    model = randomise(model_class(_sam_video(kind) if kind.endswith("_video") else sam_config(kind)))
    code = model.prompt_encoder.shared_embedding.positional_embedding  # one and the same in released weights
    model.shared_image_embedding.positional_embedding.data.copy_(code)
    model.mask_decoder.iou_prediction_head.proj_out.bias.data.fill_(1.0)  # mostly above 0, as trained ones
    model.save_pretrained(folder)
    square, small = {"height": SIZE, "width": SIZE}, {"height": SIZE // 4, "width": SIZE // 4}
    if kind == "sam":
        edges = {"size": {"longest_edge": SIZE}, "mask_size": {"longest_edge": SIZE // 4}}
        SamImageProcessor(**edges, pad_size=square, mask_pad_size=small).save_pretrained(folder)
    else:
        Sam2ImageProcessor(size=square, mask_size=small).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# SAM\n")
    return folder


def save_clip(folder: Path, kind: str) -> Path:
    """A CLIP of a family, random, as it is published: by open_clip (convnext, resnet), or by transformers."""
    torch.manual_seed(2)
    config = clip_config(kind)
    if kind in ("convnext", "resnet"):
        folder.mkdir()
        model = randomise(OpenClipSide(config).model)
        preprocess = {"mean": list(config.image_mean), "std": list(config.image_std)}
        published = {"model_cfg": config.model_cfg, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(published))
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    else:
        classes = {"clip": CLIPModel, "siglip": SiglipModel, "owlv2": Owlv2ForObjectDetection}
        model = randomise(classes[kind](config))
        if kind == "owlv2":  # untrained scales are near 0
            model.class_head.logit_scale.bias.data.fill_(8.0)
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer(
    ids: dict[str, int], start: str, end: str, unknown: str = "[UNK]", **more
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, which puts `start` before a phrase and `end` behind it."""
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, **more)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", *sorted({part for word in WORDS for part in word.split()})]
    ids = {word: index for index, word in enumerate(vocabulary)} | {"[BOS]": 62, "[EOS]": 63}
    return word_tokenizer(ids, "[BOS]", "[EOS]", pad_token="[PAD]", eos_token="[EOS]")


def tiny_processor(**more) -> ovsam.OVSamProcessor:
    side, mask_side = {"height": SIZE, "width": SIZE}, {"height": SIZE // 4, "width": SIZE // 4}
    images = Sam2ImageProcessor(size=side, mask_size=mask_side)
    return ovsam.OVSamProcessor(images, tiny_tokenizer(), **{"max_text_length": 12} | more)


def picture(seed=0, width=SIZE, height=SIZE) -> Image.Image:
    """Random coloured blobs."""
    torch.manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6)
    pixels = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
