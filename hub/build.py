"""Builds a Hub folder from trained parts: `python hub/build.py`. Run after the recipes of adapters/; see CONTRIBUTING.

It merges runs/*/model.safetensors into hub/ovsam-tiny/ (config, processor, tokenizer, weights, shim, card) and writes
each adapter's own folder in adapters/. Matrices are stored in half precision, vectors in full; everything loads as
float32. The text tower is a shard of its own that git does not track (see hatch_build.py).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Sam2ImageProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs from a checkout that is not installed

import ovsam  # noqa: E402
from ovsam.adapters.clip2sam import Clip2SamConfig  # noqa: E402
from ovsam.adapters.concepts import ConceptHeadConfig  # noqa: E402
from ovsam.checkpoints import TEXT_SHARD  # noqa: E402
from ovsam.clip import DualEncoderConfig  # noqa: E402
from ovsam.scenes.words import all_words  # noqa: E402
from ovsam.training.sam_stage import edgetam_config  # noqa: E402
from ovsam.training.texts import text_config  # noqa: E402

IMAGE_SIZE = 512
TRAINED_SHARD = "vision_model.safetensors"  # not model.safetensors, which would be taken for the whole
CHANNELS = [32, 64, 96, 960]  # MobileNetV4-S at strides 4, 8, 16, 32
PARTS = ("clip-tiny", "sam-tiny-512", "concepts-tiny", "clip2sam-tiny")  # of one tensor, the last part's counts


def tiny_config(thresholds: dict) -> ovsam.OVSamConfig:
    architecture = "mobilenetv4_conv_small"
    return ovsam.OVSamConfig(
        composition="dual",
        sam_config=edgetam_config(architecture, CHANNELS, width=128, mlp_dim=512, image_size=IMAGE_SIZE),
        clip_config=DualEncoderConfig(architecture=architecture, text_config=text_config(), image_size=IMAGE_SIZE),
        clip2sam_config=Clip2SamConfig(in_channels=CHANNELS, embed_dim=384, width=128),
        concepts_config=ConceptHeadConfig(in_channels=CHANNELS, embed_dim=384, width=128),
        vocabulary=[word.name for word in all_words()],
        **thresholds,
    )


def compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in half precision, vectors (biases, norms, running statistics) as they are."""
    return {n: t.half().contiguous() if t.ndim > 1 and "positional" not in n else t for n, t in state.items()}


def full_precision(config: dict) -> dict:
    """`"dtype": "float32"` at every level, or a half-precision folder would open as half precision."""
    return {k: full_precision(v) if isinstance(v, dict) else v for k, v in config.items()} | (
        {"dtype": "float32"} if "model_type" in config else {}
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_adapter(folder: Path, config, state: dict[str, Tensor]) -> None:
    write_json(folder / "config.json", full_precision(config.to_dict()))
    save_file(compact(state), folder / "model.safetensors", metadata={"format": "pt"})


def build_tiny(runs: Path, folder: Path, thresholds: dict) -> None:
    config = tiny_config(thresholds)
    state: dict[str, Tensor] = {}
    for part in PARTS:
        state |= load_file(runs / part / "model.safetensors")

    # Every tensor of the model is in the shards, and nothing else is.
    with torch.device("meta"):
        wanted = set(ovsam.OVSamModel(config).state_dict())
    text = {name for name in load_file(folder / TEXT_SHARD)}
    if wanted != set(state) | text:
        missing, extra = sorted(wanted - set(state) - text), sorted((set(state) | text) - wanted)
        raise SystemExit(f"the parts do not make the whole: missing {missing[:5]}, not wanted {extra[:5]}")

    save_file(compact(state), folder / TRAINED_SHARD, metadata={"format": "pt"})
    shards = dict.fromkeys(sorted(state), TRAINED_SHARD) | dict.fromkeys(sorted(text), TEXT_SHARD)
    size = sum((folder / name).stat().st_size for name in (TRAINED_SHARD, TEXT_SHARD))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": shards})

    config.architectures = ["OVSamModel"]
    config.save_pretrained(folder)  # and the shim
    content = full_precision(json.loads((folder / "config.json").read_text()))
    write_json(folder / "config.json", content)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mask_side = {"height": IMAGE_SIZE // 4, "width": IMAGE_SIZE // 4}
    processor = ovsam.OVSamProcessor(
        Sam2ImageProcessor(size=side, mask_size=mask_side), AutoTokenizer.from_pretrained(folder), max_text_length=64
    )
    processor.save_pretrained(folder)
    if (ROOT / "model_card.md").is_file():
        shutil.copy(ROOT / "model_card.md", folder / "README.md")

    for name, part_config in (("clip2sam", config.clip2sam_config), ("concepts", config.concepts_config)):
        own = {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
        target = ROOT / "adapters" / f"{name}-tiny"
        target.mkdir(parents=True, exist_ok=True)
        write_adapter(target, part_config, own)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where `ovsam train` wrote the parts")
    parser.add_argument("--folder", type=Path, default=ROOT / "hub" / "ovsam-tiny")
    arguments = parser.parse_args()
    calibrated = arguments.runs / "thresholds.json"
    build_tiny(
        arguments.runs, arguments.folder, json.loads(calibrated.read_text()) if calibrated.is_file() else {}
    )
