"""Masks by the authors' own code of SAM 2, SAM, EdgeTAM and EfficientTAM, for random weights that are drawn by key.

    python tests/parity.py record     compute those of SAM 2 and SAM; needs the packages `sam2` and `segment-anything`
    python tests/parity.py check      convert every checkpoint and compare it with what is recorded; needs neither

`test_convert.py` checks the smallest of each family. data/parity/README.md says more.
"""

import argparse
import gzip
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EdgeTamModel, Sam2Model, Sam2Processor, Sam2VideoModel, SamModel, SamProcessor

from ovsam.checkpoints.convert import convert_checkpoint
from ovsam.modeling.sam.efficienttam import EfficientTamModel, EfficientTamSide

DATA = Path(__file__).resolve().parent / "data" / "parity"
SIZES = ("tiny", "small", "base_plus", "large")
# Checkpoint -> side of the images it is recorded for. SAM 1 is built for small ones: its ViT-H would take minutes.
SIDES = {f"sam{version}_hiera_{size}": 1024 for version in ("2", "2.1") for size in SIZES}
SIDES |= {"sam2.1_hiera_tiny_256": 256} | {f"sam_vit_{size}": 256 for size in "blh"}
PACKAGED = list(SIDES)  # the authors of the others publish no package
SIDES |= {"edgetam": 256, "efficienttam_ti": 256, "efficienttam_s": 512}
WITH_MEMORY = ("sam2.1_hiera_tiny_256",)  # all sizes have the same
KEPT = 16  # of the low-resolution masks, so many rows and columns are kept


def read_keys(name: str) -> dict[str, list[int]]:
    """Every key of an official checkpoint and its shape."""
    return json.loads(gzip.decompress((DATA / "official_keys.json.gz").read_bytes()))[name]


def resize_sam(keys: dict[str, list[int]], side: int) -> dict[str, list[int]]:
    """Keys of a SAM 1 that was built for images of another side than 1024 pixels."""
    grid = side // 16
    small = dict(keys)
    for key, shape in keys.items():
        if key == "image_encoder.pos_embed":
            small[key] = [1, grid, grid, shape[3]]
        elif "rel_pos" in key and shape[0] == 127:  # of the blocks with global attention
            small[key] = [2 * grid - 1, shape[1]]
    return small


def draw_weights(keys: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights at which everything matters; each tensor depends on its key, its shape and the seed alone."""
    weights = {}
    for key, shape in keys.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape, dtype=np.float32)
        if key.endswith("running_var"):
            noise = 1 + 0.1 * np.abs(noise)
        elif len(shape) == 1:
            noise = 0.1 * noise + (key.endswith(".weight") or key.endswith("gamma"))  # of a normalisation
        elif "pos_embed" in key or "rel_pos" in key:
            noise *= 0.2
        elif "gaussian_matrix" not in key and shape[0] > 4:  # not the few tokens and prompt embeddings
            noise *= (noise.size / shape[0]) ** -0.5
        weights[key] = torch.from_numpy(noise)
    return weights


def draw_picture(side: int, height: int | None = None) -> np.ndarray:
    """Coloured waves, uint8 [height, side, 3]; no resizing is needed, in which libraries differ."""
    y, x = np.mgrid[: height or side, :side] / side
    waves = [np.sin(9 * x + 5 * y), np.sin(14 * x * y + 2), np.cos(11 * y - 4 * x)]
    return (np.stack(waves, -1) * 127 + 128).astype(np.uint8)


def draw_prompts(side: int) -> dict[str, dict]:
    """Prompts in pixels of an image of that width, and whether three masks or one are asked for."""
    points = np.array([[0.3, 0.4], [0.6, 0.2]]) * side
    box = np.array([0.2, 0.1, 0.7, 0.6]) * side
    y, x = np.mgrid[: side // 4, : side // 4] / (side // 4)
    disc = (8 - 60 * ((x - 0.4) ** 2 + (y - 0.3) ** 2)).astype(np.float32)
    return {
        "points": {"points": points, "multimask": True},
        "box": {"box": box, "multimask": False},
        "box and point": {"box": box, "points": points[:1], "multimask": True},
        "mask and point": {"mask": disc, "points": points[:1], "multimask": False},
    }


def sample(masks: Tensor, iou: Tensor) -> dict[str, Tensor]:
    """Low-resolution masks [M, h, w] and predicted IoU [M] -> the values that are compared."""
    return {
        "masks": masks[:, :: masks.shape[1] // KEPT, :: masks.shape[2] // KEPT].contiguous(),
        "statistics": torch.stack([masks.mean((1, 2)), masks.std((1, 2))]),
        "iou": iou.clone(),
    }


@torch.no_grad()
def masks_of_folder(folder: Path, name: str) -> dict[str, Tensor]:
    """The outputs of a converted folder, sampled like the record."""
    family = name.split("_")[0]
    processor = (SamProcessor if family == "sam" else Sam2Processor).from_pretrained(folder)
    picture = draw_picture(SIDES[name], SIDES[name] * 3 // 4 if family == "sam" else None)
    images = processor(images=picture, return_tensors="pt")["pixel_values"]
    if family == "efficienttam":
        trained = EfficientTamModel.from_pretrained(folder)
        model = EfficientTamSide(trained.config).eval()
        model.model.load_state_dict(trained.state_dict())
        features = model.encode(images)
    else:
        model_class = {"sam": SamModel, "edgetam": EdgeTamModel}.get(family, Sam2Model)
        model = model_class.from_pretrained(folder).eval()
        features = model.get_image_embeddings(images)

    found = {}
    for question, prompt in draw_prompts(SIDES[name]).items():
        given = {}
        if "points" in prompt:
            points = prompt["points"].tolist()
            given |= {"input_points": [[points]], "input_labels": [[[1, 0][: len(points)]]]}
        if "box" in prompt:
            given["input_boxes"] = [[prompt["box"].tolist()]]
        encoded = processor(images=picture, return_tensors="pt", **given)
        inputs = {key: encoded[key].float() if key != "input_labels" else encoded[key] for key in given}
        if "mask" in prompt:
            inputs["input_masks"] = torch.from_numpy(prompt["mask"])[None, None]
        if family == "efficienttam":
            decoded = model.select_masks(model.decode(features, **inputs), prompt["multimask"])
            masks, iou = decoded.masks, decoded.iou
        else:
            output = model(image_embeddings=features, multimask_output=prompt["multimask"], **inputs)
            masks, iou = output.pred_masks, output.iou_scores
        masks = masks if family == "sam" else masks.clamp(-32, 32)  # as SAM 2's own predictor does
        found |= {f"{question}: {key}": value for key, value in sample(masks[0, 0], iou[0, 0]).items()}
    return found | memory_of_folder(folder) if name in WITH_MEMORY else found


def draw_memory() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input of the parts of the tracker only: features and a mask to encode, and tokens that attend to a memory."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 16, 256), dtype=np.float32))
    tokens, memory = noise.view(256, 1, 256), noise.view(1024, 1, 64)
    return noise.permute(2, 0, 1)[None], noise.view(1, 1, 256, 256), tokens, memory


def sample_memory(encoded: Tensor, attended: Tensor) -> dict[str, Tensor]:
    return {"memory: encoder": encoded[0, ::16].contiguous(), "memory: attention": attended.flatten()[::64].clone()}


@torch.no_grad()
def memory_of_folder(folder: Path) -> dict[str, Tensor]:
    model = Sam2VideoModel.from_pretrained(folder).eval()
    features, mask, tokens, memory = draw_memory()
    encoded, _ = model.memory_encoder(features, mask)
    return sample_memory(encoded, model.memory_attention(tokens, memory, 0.5 * tokens, 0.5 * memory))


@torch.no_grad()
def memory_of_original(model) -> dict[str, Tensor]:
    features, mask, tokens, memory = draw_memory()
    encoded = model.memory_encoder(features, mask, skip_mask_sigmoid=True)["vision_features"]
    return sample_memory(encoded, model.memory_attention(tokens, memory, 0.5 * tokens, 0.5 * memory))


def masks_of_original(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The outputs of the original code for these weights."""
    first = name.startswith("sam_")
    side = SIDES[name]
    predictor = _original_sam(weights, name, side) if first else _original_sam2(weights, name, side)
    predictor.set_image(draw_picture(side, side * 3 // 4 if first else None))
    found = {}
    for question, prompt in draw_prompts(side).items():
        points = prompt.get("points")
        _, iou, masks = predictor.predict(
            point_coords=points,
            point_labels=None if points is None else np.array([1, 0])[: len(points)],
            box=prompt.get("box"),
            mask_input=prompt["mask"][None] if "mask" in prompt else None,
            multimask_output=prompt["multimask"],
        )
        sampled = sample(torch.from_numpy(masks).float(), torch.from_numpy(iou).float())
        found |= {f"{question}: {key}": value for key, value in sampled.items()}
    return found | memory_of_original(predictor.model) if name in WITH_MEMORY else found


def _original_sam2(weights: dict[str, Tensor], name: str, side: int):
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    version, _, size = name.removesuffix("_256").split("_", 2)
    letter = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}[size]
    config = f"configs/{version}/{version}_hiera_{letter}.yaml"
    model = build_sam2(config, device="cpu", hydra_overrides_extra=[f"++model.image_size={side}"])
    model.load_state_dict(weights, strict=True)
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [
        (side // stride, side // stride) for stride in (4, 8, 16)
    ]  # it supports 1024 pixels only
    return predictor


def _original_sam(weights: dict[str, Tensor], name: str, side: int):
    from functools import partial

    from segment_anything import SamPredictor
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    width, depth, heads = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}[name[-1]]
    grid = side // 16
    encoder = ImageEncoderViT(
        img_size=side,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=[depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4)],
        window_size=14,
    )
    model = Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(256, (grid, grid), (side, side), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        ),
    )
    model.load_state_dict(weights, strict=True)
    return SamPredictor(model.eval())


def draw_checkpoint(name: str) -> dict[str, Tensor]:
    keys = read_keys(name.removesuffix("_256"))
    return draw_weights(resize_sam(keys, SIDES[name]) if name.startswith("sam_") else keys)


def record(names: list[str]) -> None:
    for name in names:
        found = masks_of_original(draw_checkpoint(name), name)
        save_file(found, DATA / f"{name}.safetensors")
        print(name, {key: f"{value.std():.2f}" for key, value in found.items() if key.endswith("masks")}, flush=True)


def compare(found: dict[str, Tensor], name: str) -> tuple[bool, dict[str, float]]:
    """Return whether each tensor is within 5e-5 of its own range of the record, and the largest differences by kind.

    The record was made in float32 on another processor. Rounding alone moves mask logits, which reach 17, by up to 3e-4
    there (2e-5 of the range); a weight that went to a wrong place moves them by more than 1.
    """
    recorded = load_file(DATA / f"{name}.safetensors")
    close, worst = found.keys() == recorded.keys(), dict[str, float]()
    for key in recorded.keys() & found.keys():
        close &= torch.allclose(
            found[key], recorded[key], rtol=0, atol=5e-5 * max(1.0, recorded[key].abs().max().item())
        )
        what = key.split(": ")[1]
        worst[what] = max(worst.get(what, 0.0), (found[key] - recorded[key]).abs().max().item())
    return close, worst


def write_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint as its authors write theirs."""
    path = folder / ("source.pth" if name.startswith("sam_") else "source.pt")
    weights = draw_checkpoint(name)
    torch.save(weights if name.startswith("sam_") else {"model": weights}, path)
    return path


def check(names: list[str]) -> int:
    failed = 0
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            source, folder = write_checkpoint(name, Path(scratch)), Path(scratch) / "converted"
            convert_checkpoint(source, folder, image_size=SIDES[name])
            close, worst = compare(masks_of_folder(folder, name), name)
        print(name, "ok" if close else "DIFFERS", {what: f"{value:.1e}" for what, value in sorted(worst.items())})
        failed |= not close
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["record", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SIDES)}")
    arguments = parser.parse_args()
    if arguments.do == "record":
        record(arguments.names or PACKAGED)
    else:
        sys.exit(check(arguments.names or list(SIDES)))
