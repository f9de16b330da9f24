"""Builds the Hub folders from trained parts: `python hub/build.py`. Run after the recipes of adapters/.

`--cards` writes the cards alone, from model_card.md; `--check` says where a mirror has drifted from what it is made of.

It merges runs/*/model.safetensors into hub/ovsam-tiny/ (config, processor, tokenizer, weights, shim, card) and writes
each adapter's own folder in adapters/. Matrices are stored in half precision, vectors in full; everything loads as
float32. The text tower is a shard of its own that git does not track (see hatch_build.py).

hub/ovsam-tiny-clip/ is the same with one backbone: only its Sam2ClipAdapter is trained for it, and git tracks none of
its weights, which hatch_build.py puts together. It is built where runs/sam2clip-tiny/ is there.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import tomllib
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
from benchmarks import figures  # noqa: E402
from ovsam.modeling.adapters.clip2sam import Clip2SamConfig  # noqa: E402
from ovsam.modeling.adapters.concepts import ConceptHeadConfig  # noqa: E402
from ovsam.modeling.adapters.sam2clip import Sam2ClipConfig  # noqa: E402
from ovsam.checkpoints.cards import LINK, check_card  # noqa: E402
from ovsam.checkpoints.embedded import TEXT_SHARD  # noqa: E402
from ovsam.modeling.clip import DualEncoderConfig  # noqa: E402
from ovsam.errors import InputError  # noqa: E402
from ovsam.checkpoints.push import CARD, full_precision, write_json  # noqa: E402
from ovsam.modeling.remote_code import SHIM, auto_map, write_shim  # noqa: E402
from ovsam.data.scenes.words import all_words  # noqa: E402
from ovsam.checkpoints.text_tower import text_config  # noqa: E402
from ovsam.training.stages.towers import edgetam_config  # noqa: E402

IMAGE_SIZE = 512
PROTOTYPE_WEIGHT = 1.0  # on scenes apart from the frozen sets 0.5 and 2 did about as well, and 0 three points worse for boxes
TRAINED_SHARD = hatch_build.IMAGE_SHARD  # not model.safetensors, which would be taken for the whole
CHANNELS = [32, 64, 96, 960]  # MobileNetV4-S at strides 4, 8, 16, 32
MIRROR = ROOT / "hub" / "ovsam-tiny"
ADAPTERS = {"clip2sam": ROOT / "adapters" / "clip2sam-tiny", "concepts": ROOT / "adapters" / "concepts-tiny"}
VARIANT = ROOT / "hub" / "ovsam-tiny-clip"
SAM2CLIP = ROOT / "adapters" / "sam2clip-tiny"  # the variant's own adapter, and its results.json
SOURCE = ROOT / "model_card.md"
SHARED = ("Training data and licences", "Limits")  # its sections that adapters' cards end with
FROM_SOURCE = "<!-- from model_card.md -->\n"
COMMON = ("license", "library_name", "language", "datasets")  # its front matter that theirs repeats
NOT_COMPARED = ("transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")
CALIBRATED = ("_threshold", "_calibration")  # how the names end of what the stage `calibrate` chooses
PARTS = ("clip-tiny", "sam-tiny-512", "concepts-tiny", "clip2sam-tiny")  # of one tensor, the last part's counts


def tiny_config(thresholds: dict, composition: str = "dual", **more) -> ovsam.OVSamConfig:
    architecture = "mobilenetv4_conv_small"
    return ovsam.OVSamConfig(
        composition=composition,
        sam_config=edgetam_config(architecture, CHANNELS, width=128, mlp_dim=512, image_size=IMAGE_SIZE),
        clip_config=DualEncoderConfig(architecture=architecture, text_config=text_config(), image_size=IMAGE_SIZE),
        clip2sam_config=Clip2SamConfig(in_channels=CHANNELS, embed_dim=384, width=128),
        concepts_config=ConceptHeadConfig(in_channels=CHANNELS, embed_dim=384, width=128),
        vocabulary=[word.name for word in all_words()],
        prototype_weight=PROTOTYPE_WEIGHT,
        **thresholds,
        **more,
    )


def variant_config(thresholds: dict) -> ovsam.OVSamConfig:
    """ovsam-tiny's, the adapter of its recipe in place of the SAM side's image encoder."""
    layers = tomllib.loads((SAM2CLIP / "recipe.toml").read_text())["stage_args"]
    adapter = Sam2ClipConfig(in_channels=CHANNELS, width=128, num_layers=layers["layers"], num_heads=layers["heads"])
    return tiny_config(thresholds, composition="clip", sam2clip_config=adapter)


def compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in half precision, vectors (biases, norms, running statistics) as they are."""
    return {n: t.half().contiguous() if t.ndim > 1 and "positional" not in n else t for n, t in state.items()}


def write_adapter(folder: Path, config, state: dict[str, Tensor]) -> None:
    write_json(folder / "config.json", full_precision(config.to_dict()))
    save_file(compact(state), folder / "model.safetensors", metadata={"format": "pt"})


def build_tiny(runs: Path, folder: Path, thresholds: dict) -> None:
    config = tiny_config(thresholds)
    state: dict[str, Tensor] = {}
    for part in PARTS:
        state |= load_file(runs / part / "model.safetensors")

    check_whole(config, set(state) | names_in(folder / TEXT_SHARD))
    save_file(compact(state), folder / TRAINED_SHARD, metadata={"format": "pt"})
    for name, target in ADAPTERS.items():
        own = {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
        write_adapter(target, getattr(config, f"{name}_config"), own)
    write_beside_shards(folder, config)


def build_variant(runs: Path, folder: Path, base: Path, thresholds: dict) -> None:
    """The variant of what lies in `base`."""
    config, name = variant_config(thresholds), hatch_build.ADAPTER_PREFIX
    state = load_file(runs / SAM2CLIP.name / "model.safetensors")
    of_base = {n for n in names_in(base / TRAINED_SHARD) if not n.startswith(hatch_build.LEFT_OUT)}
    check_whole(config, set(state) | of_base | names_in(base / TEXT_SHARD))
    write_adapter(SAM2CLIP, config.sam2clip_config, {n.removeprefix(name): t for n, t in state.items()})
    folder.mkdir(exist_ok=True)
    hatch_build.build_variant(folder, base, SAM2CLIP / "model.safetensors")
    write_beside_shards(folder, config)


def names_in(shard: Path) -> set[str]:
    with safe_open(shard, framework="pt") as file:
        return set(file.keys())


def check_whole(config: ovsam.OVSamConfig, names: set[str]) -> None:
    """Every tensor of the model has to be in the shards, and nothing else."""
    with torch.device("meta"):
        wanted = set(ovsam.OVSamModel(config).state_dict())
    if wanted != names:
        missing, extra = sorted(wanted - names), sorted(names - wanted)
        raise SystemExit(f"the parts do not make the whole: missing {missing[:5]}, not wanted {extra[:5]}")


def write_beside_shards(folder: Path, config: ovsam.OVSamConfig) -> None:
    """The index, the configuration with the shim, and the processor."""
    shards: dict[str, str] = {}
    for shard in (TRAINED_SHARD, TEXT_SHARD):
        shards |= dict.fromkeys(sorted(names_in(folder / shard)), shard)
    size = sum((folder / name).stat().st_size for name in (TRAINED_SHARD, TEXT_SHARD))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": shards})

    config.architectures = ["OVSamModel"]
    config.save_pretrained(folder)  # and the shim
    content = full_precision(json.loads((folder / "config.json").read_text()))
    write_json(folder / "config.json", content)
    tiny_processor(folder).save_pretrained(folder)


def tiny_processor(folder: Path) -> ovsam.OVSamProcessor:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mask_side = {"height": IMAGE_SIZE // 4, "width": IMAGE_SIZE // 4}
    images = Sam2ImageProcessor(size=side, mask_size=mask_side)
    return ovsam.OVSamProcessor(images, AutoTokenizer.from_pretrained(folder), max_text_length=64)


def mirror_card() -> tuple[str, dict[str, Path]]:
    """model_card.md as it is published, and its pictures, which lie beside it there."""
    card = SOURCE.read_text()
    pictures = {Path(link).name: ROOT / link for link in LINK.findall(card)}
    return LINK.sub(lambda link: f"]({Path(link.group(1)).name}", card), pictures


def derived_card(folder: Path) -> str:
    """The card of an adapter or of the variant: its own words, then what holds for all of them, by model_card.md."""
    source = SOURCE.read_text()
    sections = [re.search(rf"^## {title}\n.*?(?=^## |\Z)", source, re.M | re.S).group(0).strip() for title in SHARED]
    own, _, _ = (folder / CARD).read_text().partition(FROM_SOURCE)
    return own.rstrip("\n") + "\n\n" + FROM_SOURCE + "\n" + "\n\n".join(sections) + "\n"


def variant_cards(variant: Path) -> dict[Path, str]:
    """Of the variant and of its adapter, with the variant's figures, where it was measured, beside ovsam-tiny's."""
    cards = {folder: derived_card(folder) for folder in (variant, SAM2CLIP)}
    results = SAM2CLIP / "results.json"
    if not results.is_file():
        return cards
    measured = figures.read(results)
    all_metrics = figures.MASKS | figures.NAMES | figures.WORDS
    for folder, name, metrics in ((variant, VARIANT.name, all_metrics), (SAM2CLIP, SAM2CLIP.name, figures.MASKS)):
        cards[folder] = figures.with_index(cards[folder], name, metrics, measured)
    of_tiny = figures.table(figures.read(ADAPTERS["clip2sam"] / "results.json"))
    lines = [f"| figure | {VARIANT.name} | {MIRROR.name} |", "|---|---|---|"]
    for ours, theirs in zip(figures.table(measured).splitlines()[2:], of_tiny.splitlines()[2:], strict=True):
        _, figure, value, *_ = ours.split("|")
        lines.append(f"|{figure}|{value}|{theirs.split('|')[2]}|")
    table = "\n".join(lines)
    return cards | {variant: figures.TABLE.sub(lambda line: f"{line.group(1)}\n{table}\n", cards[variant])}


def write_cards(folder: Path) -> None:
    card, pictures = mirror_card()
    (folder / CARD).write_text(card)
    for name, picture in pictures.items():
        shutil.copyfile(picture, folder / name)
    for adapter in ADAPTERS.values():
        (adapter / CARD).write_text(derived_card(adapter))


def write_variant_cards(variant: Path) -> None:
    for folder, card in variant_cards(variant).items():
        (folder / CARD).write_text(card)


def differences(folder: Path = MIRROR, adapters: dict[str, Path] = ADAPTERS) -> list[str]:
    """Where the published folders of ovsam-tiny are not what they are made of, a sentence each. The text tower, which
    git does not track, is not looked at: hatch_build.py has its hash."""
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


def variant_differences(folder: Path = VARIANT, adapter: Path = SAM2CLIP, base: Path = MIRROR) -> list[str]:
    """The same of ovsam-tiny-clip, whose weights are those of `base` and of its adapter."""
    found = []
    for described, card in variant_cards(folder).items():
        if (described / CARD).read_text() != card:
            found.append(
                f"{described / CARD} is not what model_card.md and {SAM2CLIP.name}/results.json make of it: "
                "run `python hub/build.py --cards`."
            )
    found += _front_matter_differences([folder, adapter])
    wanted = variant_config(_calibrated(folder))
    found += _beside_differences(folder, wanted)
    shard = folder / TRAINED_SHARD
    if not shard.is_file() or shard.read_bytes() != hatch_build.variant_shard(base, adapter / "model.safetensors"):
        return [*found, f"{shard} is not made of today's weights: run `python hatch_build.py`."]
    return found + _weight_differences(folder, wanted, {"sam2clip": adapter})


def _front_matter_differences(folders: list[Path]) -> list[str]:
    """Cards that the Hub would not take, or that contradict model_card.md."""
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
    """What `calibrate` has chosen."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in config.items() if name.endswith(CALIBRATED)}


def _beside_differences(folder: Path, wanted: ovsam.OVSamConfig) -> list[str]:
    """The configuration and the processor are what this file would write today, but for what is calibrated."""
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
    # Every tensor of the model is in the shard that the index says; and adapters are the whole's own tensors.
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with torch.device("meta"):
        names = set(ovsam.OVSamModel(wanted).state_dict())
    trained = load_file(folder / TRAINED_SHARD)
    if set(shards) != names or {name for name in shards if shards[name] == TRAINED_SHARD} != set(trained):
        found.append(f"{folder / 'model.safetensors.index.json'} does not list the tensors of the model.")
    for name, adapter in adapters.items():
        found += _config_differences(adapter, getattr(wanted, f"{name}_config"))
        with safe_open(adapter / "model.safetensors", framework="pt") as file:
            own = {f"{name}.{key}": file.get_tensor(key) for key in file.keys()}
        part = {key: tensor for key, tensor in trained.items() if key.startswith(f"{name}.")}
        if own.keys() != part.keys() or not all(torch.equal(own[key], part[key]) for key in part):
            found.append(f"{adapter / 'model.safetensors'} has other weights than {folder / TRAINED_SHARD}.")
    return found


def _config_differences(folder: Path, wanted) -> list[str]:
    """Compared as what they are once loaded: a field at its default may be missing from the file."""
    ours, theirs = wanted.to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    keys = sorted((ours.keys() | theirs.keys()) - set(NOT_COMPARED))
    unlike = [key for key in keys if _compared(ours.get(key)) != _compared(theirs.get(key))]
    return [f"{folder / 'config.json'} has another {key} than hub/build.py makes." for key in unlike]


def _compared(value):
    """Without what depends on the version of transformers or on how the file was written."""
    if isinstance(value, dict):
        return {key: _compared(each) for key, each in value.items() if key not in NOT_COMPARED}
    return [_compared(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where `ovsam train` wrote the parts")
    parser.add_argument("--folder", type=Path, default=MIRROR)
    parser.add_argument("--cards", action="store_true", help="write the cards alone")
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a mirror has drifted")
    arguments = parser.parse_args()
    variant = arguments.folder.with_name(VARIANT.name)
    if arguments.check:
        found = differences(arguments.folder)
        if (variant / "config.json").is_file():
            found += variant_differences(variant, base=arguments.folder)
        sys.exit("\n".join(found) or None)
    if not arguments.cards:
        thresholds = {}
        if (calibrated := arguments.runs / "calibrate-tiny" / "thresholds.json").is_file():
            thresholds = json.loads(calibrated.read_text())
        build_tiny(arguments.runs, arguments.folder, thresholds)
        if (arguments.runs / SAM2CLIP.name / "model.safetensors").is_file():
            if (calibrated := arguments.runs / "calibrate-tiny-clip" / "thresholds.json").is_file():
                thresholds = json.loads(calibrated.read_text())
            build_variant(arguments.runs, variant, arguments.folder, thresholds)
        elif (variant / "config.json").is_file():  # its adapter was distilled over other towers
            print(f"{variant} was not built again: {arguments.runs / SAM2CLIP.name} is not trained.", file=sys.stderr)
    write_cards(arguments.folder)
    if (variant / "config.json").is_file():
        write_variant_cards(variant)
