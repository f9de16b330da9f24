"""Builds the Hub folders from trained parts: `python hub/build.py`. Run after the recipes of adapters/.

`--cards` writes the cards alone, from model_card.md; `--check` lists the differences between a mirror and its sources.

It merges runs/*/model.safetensors into hub/ovsam-tiny/ (config, processor, tokenizer, weights, shim, card). Matrices
are stored in half precision, vectors in full; everything loads as float32. The text tower and the folders of adapters
are made by hatch_build.py, and git does not track them.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Sam2ImageProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs from a checkout that is not installed

import hatch_build  # noqa: E402
import ovsam  # noqa: E402
from hub.tower import ARCHITECTURE, MEAN, STD, image_config  # noqa: E402
from ovsam.checkpoints.cards import LINK, check_card  # noqa: E402
from ovsam.checkpoints.embedded import TEXT_SHARD  # noqa: E402
from ovsam.checkpoints.push import CARD, full_precision, write_json  # noqa: E402
from ovsam.data.scenes.words import all_words  # noqa: E402
from ovsam.errors import InputError  # noqa: E402
from ovsam.modeling import adapters  # noqa: E402
from ovsam.modeling.adapters.clip2sam import Clip2SamConfig  # noqa: E402
from ovsam.modeling.adapters.concepts import ConceptHeadConfig  # noqa: E402
from ovsam.modeling.adapters.sam2clip import Sam2ClipConfig  # noqa: E402
from ovsam.modeling.remote_code import SHIM, auto_map, write_shim  # noqa: E402
from ovsam.training.stages.towers import edgetam_config  # noqa: E402

IMAGE_SIZE = 512
MASK_HEAD_WEIGHT = 2.0  # of clicks and mask prompts; chosen on the calibration photographs
VISION_SHARD = hatch_build.VISION_SHARD  # not model.safetensors, which would be taken for the whole
DECODER_SHARD = hatch_build.DECODER_SHARD
TRUNK = [24, 48, 120, 352]  # its channels at strides 4, 8, 16, 32
NAME_MLP = 320  # hidden width of Clip2SamAdapter's MLP
CHANNELS = [24, 48, 120, 1280]  # of the maps that adapters read; the last is the one that the classifier pools
MIRROR = ROOT / "hub" / "ovsam-tiny"
ADAPTERS = {name: ROOT / "adapters" / f"{name}-tiny" for name in adapters.ADAPTERS}
SOURCE = ROOT / "model_card.md"
SHARED = ("Training data and licences", "Limits")  # its sections that adapters' cards end with
FROM_SOURCE = "<!-- from model_card.md -->\n"
COMMON = ("license", "library_name", "language", "datasets")  # its front matter that theirs repeats
NOT_COMPARED = ("transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")
SHARDS = (VISION_SHARD, DECODER_SHARD, TEXT_SHARD)
CONSE = {"clip_scale": 9.06, "clip_shift": -0.885}  # logistic regression of ConSE's cosines on training pictures
COCO = json.loads((ROOT / "tests" / "data" / "photos-val" / "annotations.json").read_text())
CALIBRATED = ("_threshold", "_calibration")  # suffixes of the options that the stage `calibrate` sets
PARTS = ("tower", "concepts-tiny", "sam2clip-tiny")


def tiny_config(thresholds: dict) -> ovsam.OVSamConfig:
    read = {"in_channels": CHANNELS, "embed_dim": 384, "width": 128}
    coco = tuple(category["name"] for category in COCO["categories"])
    trained = [*coco, *(word.name for word in all_words() if word.split == "base")]
    words = ovsam.Vocabulary("coco").labels
    return ovsam.OVSamConfig(
        composition="clip",
        sam_config=edgetam_config(ARCHITECTURE, TRUNK, width=128, mlp_dim=512, image_size=IMAGE_SIZE),
        clip_config=image_config(),
        sam2clip_config=Sam2ClipConfig(in_channels=CHANNELS, width=128, num_layers=2, num_heads=4),
        clip2sam_config=Clip2SamConfig(
            **read, mlp_dim=NAME_MLP, trained_words=sorted({word.lower() for word in trained}), **CONSE
        ),
        concepts_config=ConceptHeadConfig(**read, strides=[8, 16, 32], mask_stride=2),
        vocabulary="coco",
        id2label=dict(enumerate(words)),
        label2id={word: number for number, word in enumerate(words)},
        mask_head_weight=MASK_HEAD_WEIGHT,
        refine_boxes=False,  # the decoder does not improve them (docs/measurements.md)
        exemplar_scale=1.0,  # class embeddings were trained to be text embeddings, so that an exemplar is like a word
        templates=("{}",),
        **thresholds,
    )


def compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in half precision, vectors (biases, norms, running statistics) as they are."""
    return {n: t.half().contiguous() if t.ndim > 1 and "positional" not in n else t for n, t in state.items()}


def build_tiny(runs: Path, folder: Path, thresholds: dict) -> None:
    config = tiny_config(thresholds)
    state: dict[str, Tensor] = {}
    for part in PARTS:
        state |= load_file(runs / part / "model.safetensors")
    check_whole(config, set(state) | names_in(folder / TEXT_SHARD))
    vision = {name: tensor for name, tensor in state.items() if name.startswith("clip.")}
    decoder = {name: tensor for name, tensor in state.items() if name not in vision}
    for shard, part in ((VISION_SHARD, vision), (DECODER_SHARD, decoder)):
        save_file(compact(part), folder / shard, metadata={"format": "pt"})
    for name, target in ADAPTERS.items():
        write_json(target / "config.json", full_precision(getattr(config, f"{name}_config").to_dict()))
    hatch_build.build_adapters(ROOT)
    write_beside_shards(folder, config)


def names_in(shard: Path) -> set[str]:
    with safe_open(shard, framework="pt") as file:
        return set(file.keys())


def check_whole(config: ovsam.OVSamConfig, names: set[str]) -> None:
    """Exit unless the shards contain exactly the tensors of the model."""
    with torch.device("meta"):
        wanted = set(ovsam.OVSamModel(config).state_dict())
    if wanted != names:
        missing, extra = sorted(wanted - names), sorted(names - wanted)
        raise SystemExit(f"the parts do not make the whole: missing {missing[:5]}, not wanted {extra[:5]}")


def write_beside_shards(folder: Path, config: ovsam.OVSamConfig) -> None:
    """The index, the configuration with the shim, and the processor."""
    shards: dict[str, str] = {}
    for shard in SHARDS:
        shards |= dict.fromkeys(sorted(names_in(folder / shard)), shard)
    size = sum((folder / name).stat().st_size for name in SHARDS)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": shards})

    config.architectures = ["OVSamModel"]
    config.save_pretrained(folder)  # and the shim
    content = full_precision(json.loads((folder / "config.json").read_text()))
    write_json(folder / "config.json", content)
    tiny_processor(folder).save_pretrained(folder)


def tiny_processor(folder: Path) -> ovsam.OVSamProcessor:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mask_side = {"height": IMAGE_SIZE // 4, "width": IMAGE_SIZE // 4}
    images = Sam2ImageProcessor(size=side, mask_size=mask_side, image_mean=list(MEAN), image_std=list(STD))
    return ovsam.OVSamProcessor(images, AutoTokenizer.from_pretrained(folder), max_text_length=64)


def mirror_card() -> tuple[str, dict[str, Path]]:
    """model_card.md as it is published, and its pictures, which lie beside it there."""
    card = SOURCE.read_text()
    pictures = {Path(link).name: ROOT / link for link in LINK.findall(card)}
    return LINK.sub(lambda link: f"]({Path(link.group(1)).name}", card), pictures


def derived_card(folder: Path) -> str:
    """Return the card of an adapter: its own text, then the sections of model_card.md that all share."""
    source = SOURCE.read_text()
    sections = [re.search(rf"^## {title}\n.*?(?=^## |\Z)", source, re.M | re.S).group(0).strip() for title in SHARED]
    own, _, _ = (folder / CARD).read_text().partition(FROM_SOURCE)
    return own.rstrip("\n") + "\n\n" + FROM_SOURCE + "\n" + "\n\n".join(sections) + "\n"


def write_cards(folder: Path) -> None:
    card, pictures = mirror_card()
    (folder / CARD).write_text(card)
    for name, picture in pictures.items():
        shutil.copyfile(picture, folder / name)
    for adapter in ADAPTERS.values():
        (adapter / CARD).write_text(derived_card(adapter))


def differences(folder: Path = MIRROR, adapters: dict[str, Path] = ADAPTERS) -> list[str]:
    """Return the differences between the published folders of ovsam-tiny and their sources, a sentence each. The text
    tower, which git does not track, is not compared: hatch_build.py has its hash."""
    found = []
    card, pictures = mirror_card()
    if (folder / CARD).read_text() != card:
        found.append(f"{folder / CARD} is not model_card.md: run `python hub/build.py --cards`.")
    for name, picture in pictures.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != picture.read_bytes():
            found.append(f"{folder / name} is not {picture}: run `python hub/build.py --cards`.")
    for adapter in adapters.values():
        if (adapter / CARD).read_text() != derived_card(adapter):
            found.append(f"{adapter / CARD} does not end as model_card.md says: run `python hub/build.py --cards`.")
    found += _front_matter_differences([folder, *adapters.values()])
    wanted = tiny_config(_calibrated(folder))
    return found + _beside_differences(folder, wanted) + _weight_differences(folder, wanted, adapters)


def _front_matter_differences(folders: list[Path]) -> list[str]:
    """Return cards that the Hub would reject, or that contradict model_card.md."""
    found = []
    ours = ModelCard(SOURCE.read_text()).data.to_dict()
    for published in folders:
        text = (published / CARD).read_text()
        try:
            check_card(text, published)
        except InputError as error:
            found.append(str(error))
            continue
        theirs = ModelCard(text).data.to_dict()
        unlike = [key for key in COMMON if ours.get(key) != theirs.get(key)]
        found += [f"{published / CARD} has another {key} than model_card.md." for key in unlike]
    return found


def _calibrated(folder: Path) -> dict:
    """Return the options that the stage `calibrate` has set."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in config.items() if name.endswith(CALIBRATED)}


def _beside_differences(folder: Path, wanted: ovsam.OVSamConfig) -> list[str]:
    """Compare the configuration and the processor with those that this file writes, calibration apart."""
    found = _config_differences(folder, wanted)
    content = json.loads((folder / "config.json").read_text())
    if content != full_precision(content):
        found.append(f'{folder / "config.json"} lacks "dtype": "float32" at some level, so it would open as float16.')
    if content.get("auto_map") != auto_map(AutoConfig="OVSamConfig", **wanted.auto_classes):
        found.append(f"{folder / 'config.json'} has another auto_map than {SHIM} serves.")
    made = tiny_processor(folder).to_dict()
    if ovsam.OVSamProcessor.from_pretrained(folder).to_dict() != made:
        found.append(f"{folder / 'processor_config.json'} is not the processor that hub/build.py makes.")
    with tempfile.TemporaryDirectory() as scratch:
        write_shim(scratch)
        if (folder / SHIM).read_bytes() != (Path(scratch) / SHIM).read_bytes():
            found.append(f"{folder / SHIM} is not the shim of ovsam/modeling/remote_code.py.")
    return found


def _weight_differences(folder: Path, wanted: ovsam.OVSamConfig, adapters: dict[str, Path]) -> list[str]:
    found = []
    # Every tensor of the model is in the shard that the index names; and adapters are the whole's own tensors.
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with torch.device("meta"):
        names = set(ovsam.OVSamModel(wanted).state_dict())
    tracked = {shard: names_in(folder / shard) for shard in (VISION_SHARD, DECODER_SHARD)}
    if set(shards) != names or any({n for n in shards if shards[n] == s} != own for s, own in tracked.items()):
        found.append(f"{folder / 'model.safetensors.index.json'} does not list the tensors of the model.")
    trained = load_file(folder / DECODER_SHARD)
    for name, adapter in adapters.items():
        found += _config_differences(adapter, getattr(wanted, f"{name}_config"))
        if not (adapter / "model.safetensors").is_file():
            found.append(f"{adapter / 'model.safetensors'} is not there: run `python hatch_build.py`.")
            continue
        with safe_open(adapter / "model.safetensors", framework="pt") as file:
            own = {f"{name}.{key}": file.get_tensor(key) for key in file.keys()}
        part = {key: tensor for key, tensor in trained.items() if key.startswith(f"{name}.")}
        if own.keys() != part.keys() or not all(torch.equal(own[key], part[key]) for key in part):
            found.append(f"{adapter / 'model.safetensors'} has other weights than {folder / DECODER_SHARD}.")
    return found


def _config_differences(folder: Path, wanted) -> list[str]:
    """Compare configurations after loading, since fields at their defaults may be missing in a file."""
    ours, theirs = wanted.to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    keys = sorted((ours.keys() | theirs.keys()) - set(NOT_COMPARED))
    unlike = [key for key in keys if _compared(ours.get(key)) != _compared(theirs.get(key))]
    return [f"{folder / 'config.json'} has another {key} than hub/build.py makes." for key in unlike]


def _compared(value):
    """Return a value without the entries that depend on the version of transformers or on the writer."""
    if isinstance(value, dict):
        return {key: _compared(each) for key, each in value.items() if key not in NOT_COMPARED}
    return [_compared(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="output folder of `ovsam train`")
    parser.add_argument("--folder", type=Path, default=MIRROR)
    parser.add_argument("--cards", action="store_true", help="write only the cards")
    parser.add_argument(
        "--check", action="store_true", help="change nothing, and fail if a mirror differs from its sources"
    )
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit("\n".join(differences(arguments.folder)) or None)
    if not arguments.cards:
        thresholds = {}
        if (calibrated := arguments.runs / "calibrate-tiny" / "thresholds.json").is_file():
            thresholds = json.loads(calibrated.read_text())
        build_tiny(arguments.runs, arguments.folder, thresholds)
    write_cards(arguments.folder)
