"""The released Open-Vocabulary SAM (Yuan et al. 2024), four files in one folder, as `OVSamModel` and its processor.

The release has one file for each part: `sam2clip_vith_rn50x16.pth` is the SAM2CLIP adapter, `clip2sam_coco_rn50x16.pth`
or `clip2sam_lvis_rn50x16.pth` the CLIP2SAM adapter and the mask decoder; the prompt encoder is that of SAM ViT-H, and
the backbone is OpenAI's RN50x16 (as open_clip_model.safetensors of timm/resnet50x16_clip.openai). Files are recognised
by the names of their tensors.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ovsam.checkpoints.convert.base import (
    Report,
    count_blocks,
    load_back,
    map_tensors,
    new_folder,
    read_tensors,
    shape_of,
)
from ovsam.checkpoints.convert.sam import PROMPTS_AND_MASKS
from ovsam.checkpoints.tokenizer import clip_tokenizer
from ovsam.errors import InputError
from ovsam.modeling.adapters import Clip2SamFpnConfig, Sam2ClipVitConfig
from ovsam.modeling.clip import OpenClipConfig
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.sam import LabelTokenSamConfig
from ovsam.processing.processing_ovsam import OVSamProcessor
from ovsam.processing.vocabulary import Vocabulary

KIND = "open-vocabulary-sam"

# Part -> prefix of the names of some of its tensors, and its name in messages.
PARTS = {
    "sam2clip": ("neck_student.", "the SAM2CLIP adapter, sam2clip_vith_rn50x16.pth"),
    "clip2sam": ("fpn_neck.", "the CLIP2SAM adapter, clip2sam_coco_rn50x16.pth or clip2sam_lvis_rn50x16.pth"),
    "clip": ("visual.", "CLIP's RN50x16, open_clip_model.safetensors of timm/resnet50x16_clip.openai"),
    "sam": ("prompt_encoder.", "SAM ViT-H, sam_vit_h_4b8939.pth"),
}

# Mapping of part/key to our key, see `map_tensors`.
RENAMES = (
    (r"^sam2clip/neck_student\.", "sam2clip."),
    (r"^sam2clip\.patch_embeds\.(\d)\.projection\.", r"sam2clip.to_stride16.\1."),
    (r"^sam2clip\.level_encoding\.weight$", "sam2clip.level_embed"),
    (r"^(sam2clip\.blocks\.\d+)\.norm", r"\1.layer_norm"),
    (r"^sam2clip\.neck\.0\.", "sam2clip.neck.conv1."),
    (r"^sam2clip\.neck\.1\.", "sam2clip.neck.layer_norm1."),
    (r"^sam2clip\.neck\.2\.", "sam2clip.neck.conv2."),
    (r"^sam2clip\.neck\.3\.", "sam2clip.neck.layer_norm2."),
    (r"^clip2sam/fpn_neck\.lateral_convs\.(\d)\.conv\.", r"clip2sam.pyramid.laterals.\1."),
    (r"^clip2sam/fpn_neck\.fpn_convs\.(\d)\.conv\.", r"clip2sam.smooth.\1."),
    (r"^clip2sam/mask_decoder\.roi_conv\.0\.conv\.", "clip2sam.roi_conv."),
    (r"^clip2sam/mask_decoder\.label_token\.", "mask_decoder.iou_token."),  # which it replaces
    (r"^clip2sam/mask_decoder\.mask_decoder\.", "mask_decoder."),
    (r"^sam/prompt_encoder\.", "prompt_encoder."),
    *PROMPTS_AND_MASKS,
    (r"(^| )(prompt_encoder|mask_decoder|shared_image_embedding)\.", r"\1sam.model.\2."),
    (r"^clip/(visual\.|logit_scale$)", r"clip.model.\1"),
    (r"^clip/", "clip.model.text."),
)
UNUSED = (
    (r"^sam2clip/(?!neck_student\.)", "belongs to the training of the SAM2CLIP adapter"),
    (r"^clip2sam/(?!fpn_neck\.|mask_decoder\.)", "belongs to the training of the CLIP2SAM adapter"),
    (r"^clip2sam/mask_decoder\.label_mlp\.", "the release multiplies its result by zero"),
    (r"^sam/image_encoder\.", "is replaced by the SAM2CLIP adapter"),
    (r"^sam/mask_decoder\.", "the release has a mask decoder of its own"),
    (r"^sam/pixel_(mean|std)$", "the processor normalises images"),
    (r"^clip/(input_resolution|context_length|vocab_size)$", "follows from the shapes"),
)

# The sentences of ViLD (Gu et al. 2022) as in the release: some end in a full stop and some do not.
TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(
        sentence.format(size=size)
        for size in ("small", "medium", "large")
        for sentence in (
            "a photo of a {size} {{}}.",
            "This is a photo of a {size} {{}}.",
            "There is a {size} {{}} in the scene.",
        )
    ),
)

# The 48 base categories of open-vocabulary COCO (Bansal et al. 2018).
COCO_TRAINED = (
    "person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep, bear, zebra, giraffe, backpack, "
    "handbag, suitcase, frisbee, skis, kite, surfboard, bottle, fork, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, pizza, donut, chair, bed, toilet, tv, laptop, mouse, remote, microwave, oven, toaster, "
    "refrigerator, book, clock, vase, toothbrush"
).split(", ")


def convert_open_vocabulary_sam(source: str | Path, output: str | Path) -> Report:
    """Convert the released Open-Vocabulary SAM to a new folder with a whole model and its processor.

    The folder is loaded back, its weights are compared bit by bit with the source and the model is run on a point
    before the folder gets its name; after an error nothing is left.

    Args:
        source: folder of the four files; the name of the file of the CLIP2SAM adapter contains "coco" or "lvis".
        output: a folder that does not exist or is empty.

    Raises:
        InputError: a file is missing, ambiguous or of another kind; a tensor is missing, unexpected, of another shape
            or not finite; or the written folder does not equal the source.
    """
    with new_folder(output) as folder:
        files, tensors, beside = _read_parts(Path(source))
        trained_on = _trained_on(files["clip2sam"])
        config = read_config(tensors, trained_on)
        with torch.device("meta"):
            model = OVSamModel(config)
        mapped, unused = map_tensors(tensors, model.state_dict(), RENAMES, UNUSED)
        model.load_state_dict(mapped, strict=True, assign=True)
        model.save_pretrained(folder)
        _processor(config.sam_config.prompt_encoder_config.image_size).save_pretrained(folder)
        _check(mapped, folder)
    size = f"Open-Vocabulary SAM RN50x16, trained on {trained_on.upper()}"
    return Report(KIND, size, len(tensors) - len(unused), unused | beside, (OVSamModel.__name__,))


def _read_parts(source: Path) -> tuple[dict[str, Path], dict[str, Tensor], dict[str, str]]:
    """Return the file of each part, all tensors as part/key, and the reason for each unused entry of the files."""
    files, tensors, beside = {}, {}, {}
    for path in sorted(path for path in source.iterdir() if path.suffix in (".pth", ".pt", ".safetensors")):
        content, other = read_tensors(path)
        part = next((part for part, (mark, _) in PARTS.items() if any(key.startswith(mark) for key in content)), None)
        if part is None:
            raise InputError(
                f"{path} is not a part of Open-Vocabulary SAM (its first tensor is {next(iter(content))!r})."
            )
        if part in files:
            raise InputError(f"{files[part]} and {path} are both {PARTS[part][1]}; leave one of them in the folder.")
        files[part] = path
        tensors |= {f"{part}/{key}": tensor for key, tensor in content.items()}
        beside |= {f"{part}/{key}": reason for key, reason in other.items()}
    for part, (_, title) in PARTS.items():
        if part not in files:
            raise InputError(f"{source} lacks {title}; put it there.")
    return files, tensors, beside


def _trained_on(path: Path) -> str:
    named = [name for name in ("coco", "lvis") if name in path.name.lower()]
    if len(named) != 1:
        raise InputError(
            f"The name of {path} must contain the training data, as in clip2sam_coco_rn50x16.pth or "
            "clip2sam_lvis_rn50x16.pth: it does not follow from the tensors."
        )
    return named[0]


def read_config(tensors: Mapping[str, Tensor], trained_on: str) -> OVSamConfig:
    """Return the configuration, given the shapes of the tensors (part/key) and the data set, "coco" or "lvis"."""

    def shape(key: str) -> torch.Size:
        return shape_of(tensors, key)

    neck, decoder = "sam2clip/neck_student.", "clip2sam/mask_decoder.mask_decoder."
    _, grid, _, hidden = shape(neck + "pos_embed")
    positions = [shape(f"{neck}blocks.{i}.attn.rel_pos_h") for i in range(count_blocks(tensors, neck + "blocks."))]
    channels = [shape(f"clip2sam/fpn_neck.lateral_convs.{i}.conv.weight")[1] for i in range(4)]
    width = shape("clip2sam/mask_decoder.label_token.weight")[1]
    codes = shape("sam/prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")[1]
    side = 16 * grid
    words = Vocabulary(trained_on).labels
    held_out = set(Vocabulary(words_file("lvis_rare")).labels)
    trained = COCO_TRAINED if trained_on == "coco" else [word for word in words if word not in held_out]
    return OVSamConfig(
        composition="clip",
        sam_config=LabelTokenSamConfig(
            # No vision encoder is built; this sets the width of the position encoding.
            vision_config={
                "hidden_size": 2,
                "num_hidden_layers": 0,
                "image_size": side,
                "output_channels": width,
                "num_pos_feats": codes,
            },
            prompt_encoder_config={"image_size": side, "hidden_size": width},
            mask_decoder_config={
                "hidden_size": width,
                "mlp_dim": shape(decoder + "transformer.layers.0.mlp.lin1.weight")[0],
                "num_hidden_layers": count_blocks(tensors, decoder + "transformer.layers."),
                "num_multimask_outputs": shape(decoder + "mask_tokens.weight")[0] - 1,
                "layer_norm_eps": 1e-5,
            },
        ),
        clip_config=_clip_config(tensors, side),
        sam2clip_config=Sam2ClipVitConfig(
            in_channels=channels,
            hidden_size=hidden,
            num_layers=len(positions),
            num_heads=hidden // positions[0][1],
            window_size=(positions[0][0] + 1) // 2,
            global_blocks=[i for i, (length, _) in enumerate(positions) if length != positions[0][0]],
            grid=grid,
            width=width,
        ),
        clip2sam_config=Clip2SamFpnConfig(
            in_channels=channels,
            width=shape("clip2sam/fpn_neck.fpn_convs.0.conv.weight")[0],
            embed_dim=shape("clip2sam/mask_decoder.roi_conv.0.conv.weight")[0],
            roi_size={"coco": 12, "lvis": 7}[trained_on],
            trained_words=sorted(word.lower() for word in trained),
        ),
        vocabulary=words,
        templates=TEMPLATES,
        dtype="float32",
    )


def _clip_config(tensors: Mapping[str, Tensor], side: int) -> OpenClipConfig:
    """Return the configuration of a ModifiedResNet of OpenAI."""
    embed_dim = shape_of(tensors, "clip/visual.attnpool.c_proj.weight")[0]
    grid = round((shape_of(tensors, "clip/visual.attnpool.positional_embedding")[0] - 1) ** 0.5)
    text_width = shape_of(tensors, "clip/ln_final.weight")[0]
    return OpenClipConfig(
        model_cfg={
            "embed_dim": embed_dim,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": 32 * grid,
                "layers": [count_blocks(tensors, f"clip/visual.layer{stage}.") for stage in (1, 2, 3, 4)],
                "width": shape_of(tensors, "clip/visual.layer1.0.conv1.weight")[0],
            },
            "text_cfg": {
                "context_length": shape_of(tensors, "clip/positional_embedding")[0],
                "vocab_size": shape_of(tensors, "clip/token_embedding.weight")[0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": count_blocks(tensors, "clip/transformer.resblocks."),
            },
        },
        image_size=side,
        image_mean=IMAGENET_DEFAULT_MEAN,  # of SAM; CLIP gets the same input in the release
        image_std=IMAGENET_DEFAULT_STD,
    )


def words_file(name: str) -> Path:
    return Path(__file__).parents[2] / "processing" / "vocabularies" / f"{name}.txt"


def _processor(side: int) -> OVSamProcessor:
    images = SamImageProcessor(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": side // 4},
        mask_pad_size={"height": side // 4, "width": side // 4},
    )
    return OVSamProcessor(images, clip_tokenizer(), target_size=side, max_text_length=77)


def _check(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load the folder, compare all weights bit by bit and run the model on a point; raises InputError if they
    differ."""
    model = load_back(OVSamModel, tensors, folder)
    side = model.sam.image_size
    generator = torch.Generator().manual_seed(0)
    words = F.normalize(torch.randn(3, model.clip.embed_dim, generator=generator), dim=-1)
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    with torch.no_grad():
        point = torch.full((1, 1, 1, 2), side / 2)
        output = model(pixel_values=pixels, input_points=point, text_embeds=words)
    for name in ("pred_masks", "logits"):
        if not output[name].isfinite().all():
            raise InputError(f"The converted model's {name} are not finite; a file is damaged or of another kind.")
