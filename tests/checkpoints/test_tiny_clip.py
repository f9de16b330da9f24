"""ovsam-tiny-clip, the variant of one backbone: what hatch_build.py and hub/build.py make of ovsam-tiny and an adapter.

The adapter is a stand-in here, the linear start of its recipe over two frozen scenes, so that these tests ask nothing
of how well it is trained; the last one looks at what is published.
"""

import importlib.util
import itertools
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hatch_build
import ovsam
from hatch_build import ADAPTER, CHECKPOINT, IMAGE_SHARD, SHARD, ShardError, build_all, build_variant
from ovsam.checkpoints import embedded as checkpoints
from ovsam.checkpoints import presets
from ovsam.checkpoints.cards import check_card
from ovsam.checkpoints.embedded import VARIANT, find_checkpoint
from ovsam.errors import InputError
from ovsam.training.stages import towers
from ovsam.training.stages.sam2clip import Sam2ClipStage

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.weights  # all of it is made of ovsam-tiny
BASE, PUBLISHED, SAM2CLIP = ROOT / CHECKPOINT, ROOT / hatch_build.VARIANT, ROOT / "adapters" / "sam2clip-tiny"
VAL = ROOT / "tests" / "data" / "emojiscenes-val"


def load_builder(root: Path):
    """hub/build.py, which is run and never imported, at work in another tree."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "hub" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SAM2CLIP = root / "adapters" / "sam2clip-tiny"
    return module


@pytest.fixture(scope="module")
def stand_in():
    """The weights of an adapter as the recipe's stage publishes them."""
    recipe = tomllib.loads((SAM2CLIP / "recipe.toml").read_text())
    for side in recipe["model"].values():
        side["weights"] = str(BASE / IMAGE_SHARD)
    stage = Sam2ClipStage(towers.build_towers(recipe["model"]), **recipe["stage_args"])
    scenes = [np.asarray(Image.open(VAL / "images" / name).convert("RGB")) for name in ("000.jpg", "001.jpg")]
    stage.fit_start([torch.from_numpy(scene.copy()).permute(2, 0, 1) for scene in scenes])
    return stage.published_state()


@pytest.fixture(scope="module")
def tree(tmp_path_factory, stand_in):
    """A tree with ovsam-tiny, out of which hub/build.py has made the variant."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(BASE, root / CHECKPOINT, copy_function=shutil.copyfile)
    adapter, variant = (root / ADAPTER).parent, root / hatch_build.VARIANT
    for folder, source in ((adapter, SAM2CLIP), (variant, PUBLISHED)):
        folder.mkdir(parents=True)
        shutil.copyfile(source / "README.md", folder / "README.md")
    shutil.copyfile(SAM2CLIP / "recipe.toml", adapter / "recipe.toml")
    (root / "runs" / adapter.name).mkdir(parents=True)
    save_file(stand_in, root / "runs" / adapter.name / "model.safetensors")
    builder = load_builder(root)
    builder.build_variant(root / "runs", variant, root / CHECKPOINT, {"score_threshold": 0.25})
    builder.write_variant_cards(variant)
    return root


@pytest.fixture(scope="module")
def segmenter(tree):
    return ovsam.load(tree / hatch_build.VARIANT, device="cpu")


# --------------------------------------------------------------------------------------------------- the build hook


def test_the_weights_are_those_of_their_parts(tree, stand_in):
    made, base = (load_file(tree / folder / IMAGE_SHARD) for folder in (hatch_build.VARIANT, CHECKPOINT))
    own = {name: tensor for name, tensor in made.items() if name.startswith("sam2clip.")}
    assert own.keys() == stand_in.keys()
    for name, tensor in own.items():
        stored = stand_in[name].half() if stand_in[name].ndim > 1 else stand_in[name]
        assert torch.equal(tensor, stored), name
    left_out = {name for name in base if name not in made}
    assert left_out and all("vision_encoder" in name or "no_memory" in name for name in left_out)
    assert made.keys() - own.keys() == base.keys() - left_out
    assert all(torch.equal(made[name], base[name]) for name in made.keys() - own.keys())
    for name in (SHARD, *hatch_build.COMMON):
        assert (tree / hatch_build.VARIANT / name).read_bytes() == (tree / CHECKPOINT / name).read_bytes()
    assert (tree / hatch_build.VARIANT / SHARD).samefile(tree / CHECKPOINT / SHARD)  # not twice on the disk


@pytest.fixture
def small(tmp_path):
    """Parts as the hook takes them, of a few numbers each, and the folder that it makes."""
    base, adapter, folder = tmp_path / CHECKPOINT, tmp_path / ADAPTER, tmp_path / hatch_build.VARIANT
    for made in (base, adapter.parent, folder):
        made.mkdir(parents=True)
    names = (
        "clip.weight",
        "sam.model.vision_encoder.weight",
        "sam.model.no_memory_embedding",
        "sam.model.mask_decoder",
    )
    save_file({name: torch.rand(2, 3) for name in names}, base / IMAGE_SHARD)
    save_file({"out.weight": torch.rand(2)}, adapter)
    for name in (SHARD, *hatch_build.COMMON):
        (base / name).write_text(name)
    return folder, base, adapter


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_hook_writes_what_is_not_there_and_nothing_else(small):
    folder, base, adapter = small
    build_variant(*small)
    files = {SHARD, IMAGE_SHARD, *hatch_build.COMMON}
    assert set(load_file(folder / IMAGE_SHARD)) == {"clip.weight", "sam.model.mask_decoder", "sam2clip.out.weight"}
    first = stamps(folder)
    build_variant(*small)
    assert stamps(folder) == first and first.keys() == files

    save_file({"out.weight": torch.zeros(2)}, adapter)  # as a pull brings it
    (folder / SHARD).unlink()
    (folder / "tokenizer.json").write_text("another")
    build_variant(*small)
    assert not load_file(folder / IMAGE_SHARD)["sam2clip.out.weight"].any()
    assert (folder / SHARD).read_text() == SHARD and (folder / "tokenizer.json").read_text() == "tokenizer.json"
    assert stamps(folder).keys() == files


def test_the_hook_copies_where_there_are_no_links(small, monkeypatch):
    def refuse(self, target):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    build_variant(*small)
    folder, base, _ = small
    assert (folder / SHARD).read_text() == SHARD and not (folder / SHARD).samefile(base / SHARD)


@pytest.mark.parametrize("broken", ["cut", "page", "gone", "no tokenizer"])
def test_a_broken_source_is_refused_in_one_sentence(small, broken):
    folder, base, adapter = small
    damage = {
        "cut": lambda: adapter.write_bytes(adapter.read_bytes()[:-1]),
        "page": lambda: adapter.write_text("<!doctype html><title>version of a large file</title>"),
        "gone": lambda: (base / IMAGE_SHARD).unlink(),
        "no tokenizer": lambda: (base / "tokenizer.json").unlink(),
    }
    damage[broken]()
    with pytest.raises(ShardError) as error:
        build_variant(*small)
    message, source = str(error.value), {"gone": base / IMAGE_SHARD, "no tokenizer": base / "tokenizer.json"}
    assert VARIANT in message and str(source.get(broken, adapter)) in message and "\n" not in message
    assert message.endswith("run `python hatch_build.py`.")
    assert not any(".safetensors" in name and name not in (SHARD, IMAGE_SHARD) for name in stamps(folder))
    assert (folder / IMAGE_SHARD).exists() == (broken == "no tokenizer")


@pytest.mark.parametrize("version", ["editable", "standard"])
def test_the_wheel_does_without_the_variant(small, monkeypatch, version):
    folder, base, _ = small
    monkeypatch.setattr(hatch_build, "build_text_shard", lambda folder: folder / SHARD)
    root = folder.parents[1]
    assert build_all(root) == [base] and not any(folder.iterdir())  # not published in this tree
    (folder / "config.json").touch()
    build_data: dict = {"force_include": {}}
    hatch_build.get_build_hook()(str(root), {}, None, None, str(root), "wheel").initialize(version, build_data)
    assert (folder / IMAGE_SHARD).is_file() == (version == "editable")
    assert not any(VARIANT in path for path in build_data["force_include"])


# ------------------------------------------------------------------------------------------------------- the model


def test_it_loads_whole_and_has_one_backbone(tree):
    folder = tree / hatch_build.VARIANT
    model, report = ovsam.OVSamModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(torch.isfinite(t).all() and t.dtype in (torch.float32, torch.int64) for t in model.state_dict().values())
    assert model.config.composition == "clip" and model.config.score_threshold == 0.25
    assert not [name for name in model.state_dict() if "vision_encoder" in name]
    assert sum(name.startswith("clip.vision_model.conv_stem") for name in model.state_dict()) == 1
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert presets.PRESETS[VARIANT].parameters == pytest.approx(millions, abs=0.1)
    assert type(AutoModel.from_pretrained(folder)) is ovsam.OVSamModel


def test_parts_of_ovsam_tiny_answer_as_in_ovsam_tiny(segmenter):
    """The CLIP side and the ConceptHead see the same; the SAM features differ."""
    tiny = ovsam.load("ovsam-tiny", device="cpu")
    seen = [each.encode(VAL / "images" / "002.jpg").features for each in (segmenter, tiny)]
    for name in ("objectness", "boxes", "embeds"):
        torch.testing.assert_close(*(getattr(features.concepts, name) for features in seen))
    torch.testing.assert_close(*(each.embed(["car", "puppy"])[1] for each in (segmenter, tiny)))
    assert seen[0].sam.embedding.shape == seen[1].sam.embedding.shape
    assert not torch.allclose(seen[0].sam.embedding, seen[1].sam.embedding, atol=0.1)


def test_it_answers_the_three_questions(segmenter):
    coco = COCO(str(VAL / "annotations.json"))
    annotations = coco.loadAnns(coco.getAnnIds(1))
    x, y, w, h = annotations[0]["bbox"]
    picture = segmenter.encode(VAL / coco.imgs[1]["file_name"])
    height, width = coco.imgs[1]["height"], coco.imgs[1]["width"]
    named = segmenter.what(picture, boxes=[[x, y, x + w, y + h]])
    assert len(named) == 1 and named[0].mask.shape == (height, width) and named[0].mask.any()
    assert named[0].label in segmenter.model.config.vocabulary
    found = segmenter.where(picture, [coco.cats[each["category_id"]]["name"] for each in annotations])
    every = segmenter.everything(picture)
    for results in (found, every):
        assert len(results) > 0 and all(0 < each.score <= 1 and each.mask.any() for each in results)


def test_it_is_found_in_a_checkout_and_named_as_on_the_hub_elsewhere(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PACKAGE", tree / "ovsam")
    assert find_checkpoint(VARIANT) == tree / hatch_build.VARIANT
    assert ovsam.load(VARIANT, device="cpu").name == VARIANT
    assert presets.table().splitlines()[-1].split()[5] == "checkout" and VARIANT in presets.offered()

    monkeypatch.setattr(checkpoints, "PACKAGE", tmp_path / "ovsam")
    with pytest.raises(InputError, match=f"{VARIANT} is not part of the installed package.*ORG/{VARIANT}"):
        ovsam.load(VARIANT, device="cpu")
    assert presets.table().splitlines()[-1].split()[5] == "no" and VARIANT not in presets.offered()


# ----------------------------------------------------------------------------------------------------- hub/build.py


def test_incomplete_parts_are_refused(tree, stand_in, tmp_path):
    (tmp_path / "sam2clip-tiny").mkdir()
    lacking = {name: tensor for name, tensor in stand_in.items() if "stride4" not in name}
    save_file(lacking, tmp_path / "sam2clip-tiny" / "model.safetensors")
    with pytest.raises(SystemExit, match=r"missing \['sam2clip.stride4.bias', 'sam2clip.stride4.weight'\]"):
        load_builder(tree).build_variant(tmp_path, tmp_path / VARIANT, tree / CHECKPOINT, {})
    assert not (tmp_path / VARIANT).exists()


def test_drift_of_the_variant_is_found(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree", copy_function=shutil.copyfile)
    builder, folder, base = load_builder(root), root / hatch_build.VARIANT, root / CHECKPOINT
    adapter = builder.SAM2CLIP
    assert builder.variant_differences(folder, adapter, base) == []

    for path, old, new in (
        (folder / "README.md", "## Limits", "## No limits"),
        (folder / "config.json", '"composition": "clip"', '"composition": "dual"'),
        (folder / "processor_config.json", '"max_text_length": 64', '"max_text_length": 63'),
        (folder / "model.safetensors.index.json", '"sam2clip.local', '"sam2clip.lost'),
        (adapter / "config.json", '"num_heads"', '"other_heads"'),
        (adapter / "README.md", "license: apache-2.0", "license: mit"),
    ):
        text = path.read_text()
        assert old in text, old
        path.write_text(text.replace(old, new))
    found = builder.variant_differences(folder, adapter, base)
    for sentence in (
        f"{VARIANT}/README.md is not what model_card.md",
        "config.json has another composition",
        "processor_config.json is not the processor",
        "index.json does not list the tensors",
        "sam2clip-tiny/config.json has another num_heads",
        "another license than model_card.md",
    ):
        assert sum(sentence in each for each in found) == 1, (sentence, found)

    weights = {name: tensor.clone() for name, tensor in load_file(base / IMAGE_SHARD).items()}
    weights["clip2sam.log_scale"] += 1  # another ovsam-tiny
    save_file(weights, base / IMAGE_SHARD)
    assert "run `python hatch_build.py`" in builder.variant_differences(folder, adapter, base)[-1]
    build_variant(folder, base, adapter / "model.safetensors")
    assert not any("hatch_build" in each for each in builder.variant_differences(folder, adapter, base))


def test_the_cards_show_the_measured_figures(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree", copy_function=shutil.copyfile)
    builder, folder = load_builder(root), root / hatch_build.VARIANT
    names = [row[1] if isinstance(row[1], tuple) else (row[1],) for row in builder.figures.ROWS]
    of_tiny = dict.fromkeys([*itertools.chain(*names), *builder.figures.WORDS], 0.5)
    builder.ADAPTERS = {"clip2sam": tmp_path}
    for adapter, measured in ((tmp_path, of_tiny), (builder.SAM2CLIP, of_tiny | {"box: mean IoU": 0.12})):
        (adapter / "results.json").write_text(json.dumps(measured))
    for _ in range(2):  # writing once more changes nothing
        builder.write_variant_cards(folder)
        card, own = ((each / "README.md").read_text() for each in (folder, builder.SAM2CLIP))
        check_card(card, folder)
        (row,) = [line for line in card.splitlines() if line.startswith("| box prompt: mean IoU")]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0.12", "0.50"]  # beside ovsam-tiny's
        assert builder.ModelCard(card).data.model_name == VARIANT
        for text in (card, own):
            results = builder.ModelCard(text).data.eval_results
            assert results[0].metric_name == "box: mean IoU" and results[0].metric_value == 0.12
    assert builder.variant_differences(folder, builder.SAM2CLIP, root / CHECKPOINT) == []


# -------------------------------------------------------------------------------------------- what is published


def test_the_mirror_equals_its_parts():
    """As `python hub/build.py --check` says."""
    assert load_builder(ROOT).variant_differences() == []
