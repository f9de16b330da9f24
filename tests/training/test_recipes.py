"""Every recipe of adapters/ is read, and run for a step over tiny random towers of the same family and miniature data.

Weights differ from the recipes' and words are embedded at random; all else, down to the trainer, is what a person with
a GPU and the Hub would run.
"""

import math
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import SIZE, D, clip_config, randomise, sam_config
from safetensors.torch import load_file

from ovsam import data
from ovsam.data import open_data
from ovsam.errors import InputError
from ovsam.modeling.adapters.concepts import ConceptHead, ConceptHeadConfig
from ovsam.modeling.clip import CLIP_SIDES, OpenClipConfig
from ovsam.modeling.sam import SAM_SIDES
from ovsam.ops.arguments import accepted_arguments
from ovsam.training import engine as training_run
from ovsam.training import recipe as recipes
from ovsam.training.stages import STAGES, towers

ROOT = Path(__file__).resolve().parents[2]
READERS = Path(__file__).parents[1] / "data" / "readers"
RECIPES = sorted(path for path in (ROOT / "adapters").glob("*/recipe.toml"))
READ = {path.parent.name: tomllib.loads(path.read_text(encoding="utf-8")) for path in RECIPES}
DRY_RUN = [name for name, recipe in READ.items() if recipe["stage"] not in ("calibrate", "finetune", "memory")]
QUICK = ("clip2sam-siglip2", "concepts-convnext", "mae-vit")  # the others run in the whole suite
# What is smaller in a dry run; the rest of [stage_args] is the recipe's.
SMALLER = {"width": 16, "prompts": 2, "layers": 1, "heads": 4, "mask_objects": 2, "architecture": "test_vit"}
SMALLER |= {"image_size": SIZE, "window": SIZE // 2}
SCENES = {"min_objects": 2, "max_objects": 3, "min_size": 30.0, "max_size": 60.0}
MINIATURES = {
    "coco": {"annotations": READERS / "coco/annotations/instances_val2017.json", "images": READERS / "coco/val2017"},
    "lvis": {"annotations": READERS / "lvis/lvis_v1_val.json", "images": READERS / "coco"},
    "sa1b": {"folder": READERS / "sa1b"},
    "folders": {"folder": READERS / "imagenet" / "train"},
}


def tiny_sam(spec):
    """A side of the family that a recipe names, at tiny size."""
    family = "edgetam" if isinstance(spec, dict) else "sam2" if "sam2.1" in spec else "sam"
    return randomise(SAM_SIDES[family](sam_config(family)))


def tiny_clip(spec):
    name = spec if isinstance(spec, str) else spec.get("open_clip", "dual_encoder")
    if "model_cfg" in spec:
        vision = spec["model_cfg"]["vision_cfg"] | {"timm_model_name": "vit_tiny_patch16_224", "image_size": SIZE // 2}
        config = OpenClipConfig(model_cfg=spec["model_cfg"] | {"embed_dim": D, "vision_cfg": vision})
    else:
        kinds = {"owlv2": "owlv2", "siglip": "siglip", "convnext_large_d_320": "convnext", "RN50x16": "resnet"}
        config = clip_config(next((kind for part, kind in kinds.items() if part in name), name))
    return randomise(CLIP_SIDES[config.model_type](config, part="vision"))


def tiny_head(path, made):
    return randomise(ConceptHead(ConceptHeadConfig(in_channels=made.channels, embed_dim=made.embed_dim, width=16)))


def random_words(*_):
    def embed(words):
        generator = torch.Generator().manual_seed(0)
        return F.normalize(torch.randn(len(words), D, generator=generator), dim=-1)

    return embed


def miniature(name, folder, **settings):
    """A recipe at tiny size, as a file."""
    recipe = tomllib.loads((ROOT / "adapters" / name / "recipe.toml").read_text(encoding="utf-8"))
    recipe.pop("weights", None)
    arguments = recipe["stage_args"]
    arguments |= {key: value for key, value in SMALLER.items() if key in arguments}
    if "clip_size" in recipe.get("model", {}):
        recipe["model"]["clip_size"] = SIZE // 2
    kind = settings.get("data") or recipe["data"].get("format")
    if kind is None:
        recipe["data"] |= SCENES | {"canvas": SIZE}
    elif kind == "mixture":
        for part in recipe["data"]["sets"]:
            small = SCENES | {"styles": ["noto"]} if part["format"] == "emojiscenes" else MINIATURES[part["format"]]
            part |= {key: str(value) if isinstance(value, Path) else value for key, value in small.items()}
        recipe["data"] |= {"size": SIZE, "max_objects": 4, "length": 4}
    else:
        own = {key: str(path) for key, path in MINIATURES[kind].items()}
        recipe["data"] = recipe["data"] | own | {"format": kind, "size": SIZE, "max_objects": 4}
        recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in MINIATURES["coco"] or k in own}
    recipe["optim"] |= {"batch_size": 2, "accumulate": 1, "steps": 1, "warmup_steps": 0, "workers": 0}
    path = folder / name / "recipe.toml"
    path.parent.mkdir(parents=True)
    path.write_text(to_toml(recipe), encoding="utf-8")
    return path


def to_toml(recipe):
    lines, tables = [], []
    for key, value in recipe.items():
        tables += [key] if isinstance(value, dict) else []
        lines += [] if isinstance(value, dict) else [f"{key} = {written(value)}"]
    for table in tables:
        lines += [f"[{table}]", *(f"{key} = {written(value)}" for key, value in recipe[table].items())]
    return "\n".join(lines) + "\n"


def written(value):
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {written(item)}" for key, item in value.items()) + " }"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture
def tiny_towers(monkeypatch):
    monkeypatch.setattr(towers, "sam_side", tiny_sam)
    monkeypatch.setattr(towers, "clip_side", tiny_clip)
    monkeypatch.setattr(towers, "concept_head", tiny_head)
    monkeypatch.setattr(training_run, "text_embedder", random_words)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DRY_RUN]
)
def test_a_recipe_runs_over_tiny_towers(name, tmp_path, tiny_towers, capfd):
    folder = training_run.train_recipe(miniature(name, tmp_path), output=tmp_path / "out", device="cpu")
    state = load_file(folder / "model.safetensors")
    assert state and all(tensor.isfinite().all() for tensor in state.values())
    stage = READ[name]["stage"]
    published = {"adapters": {"concepts", "clip2sam"}, "mae": {"clip"}}.get(stage, {stage})
    if stage == "sam" and READ[name]["model"].get("composition") == "clip":
        published = {"sam", "sam2clip"}
    published = published | ({"clip"} if READ[name]["stage_args"].get("train_clip") else set())
    assert {key.split(".")[0] for key in state} == published
    assert f"stage {stage}" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip2sam-convnext", "concepts-siglip2"])
def test_the_same_recipe_reads_lvis(name, tmp_path, tiny_towers):
    folder = training_run.train_recipe(miniature(name, tmp_path, data="lvis"), output=tmp_path / "out", device="cpu")
    assert (folder / "model.safetensors").is_file()


def test_names_of_stages_and_formats_need_no_torch():
    assert recipes.STAGE_NAMES == tuple(STAGES) and recipes.FORMATS == tuple(data.READERS)


@pytest.mark.parametrize("name", READ)
def test_stage_and_arguments_of_a_recipe_exist(name):
    recipe = READ[name]
    if recipe["stage"] == "calibrate":
        return
    accepted = accepted_arguments(STAGES[recipe["stage"]].__mro__)
    assert recipe["stage_args"].keys() <= accepted.keys()
    if "towers" in accepted:
        assert recipe["model"].keys() <= {"sam", "clip", "concepts", "composition", "clip_size", "templates"}
    # A passage of the whole data takes a whole number of steps that is worth a warm-up.
    assert recipe["optim"]["warmup_steps"] < recipe["optim"]["steps"]


@pytest.mark.parametrize("name", [n for n, r in READ.items() if isinstance(r.get("model", {}).get("sam"), str)])
def test_the_card_of_a_recipe_for_released_towers_estimates_its_memory(name):
    text = (ROOT / "adapters" / name / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "GB" in line and "estimate" in line.lower())
    gigabytes = float(line.split(" GB")[0].split()[-1])
    assert math.isfinite(gigabytes) and gigabytes <= 24


def test_one_recipe_serves_all_sizes_of_sam(tmp_path):
    path = miniature("clip2sam-convnext", tmp_path)
    settings = ["model.sam=facebook/sam2.1-hiera-large", "optim.batch_size=1", "stage_args.train_decoder=true"]
    recipe = recipes.read_recipe(path, settings=[*settings, 'data.flavour="x"'])
    assert recipe["model"]["sam"] == "facebook/sam2.1-hiera-large"
    assert recipe["optim"]["batch_size"] == 1 and recipe["stage_args"]["train_decoder"] is True
    assert recipe["data"]["flavour"] == "x"
    with pytest.raises(InputError, match="KEY=VALUE"):
        recipes.read_recipe(path, settings=["model.sam"])
    with pytest.raises(InputError, match="not a table"):
        recipes.read_recipe(path, settings=["seed.sam=1"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('seed="x"', "The value seed of .* is a string; it must be a whole number"),
        ("seed=-1", "The value seed of .* must be a whole number >= 0"),
        ("seed=true", "The value seed of .* is true or false"),
        ('data="x"', "The value data of .* is a string; it must be a table"),
        ("optim=[]", "The value optim of .* is a list; it must be a table"),
        ("optim.steps=1.5", "The value optim.steps of .* is a number; it must be a whole number"),
        ("optim.learning_rate=nan", "The value optim.learning_rate of .* must be a number > 0"),
        ("optim.learning_rate=0", "The value optim.learning_rate of .* must be a number > 0"),
        ("optim.bf16=1", "The value optim.bf16 of .* is a whole number; it must be true or false"),
        ("optim.batch_size=99999999999999999", "The value optim.batch_size of .* must be a whole number <="),
        ("stage=[1]", "has the stage"),
        ("stage_args=3", "The value stage_args of .* is a whole number"),
        ('stage_args.width="wide"', r"The value width of \[stage_args\] of .* is a string; it must be a whole number"),
        ("stage_args.word_weight=inf", r"The value word_weight of \[stage_args\] of .* must be a number <="),
        ("weights=[[1]]", r"The value weights\[0\] of .* is a list; it must be a string"),
        ("model=1", "The value model of .* is a whole number"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_one_sentence_with_its_place(setting, message):
    path = ROOT / "adapters" / "concepts-tiny" / "recipe.toml"
    with pytest.raises(InputError, match=message) as caught:
        recipes.read_recipe(path, settings=[setting])
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text_or_too_deep_is_refused(tmp_path):
    for content in (b"\xff\xfe\0", b"a = " + b"[" * 5000, b"a = 1\na = 2", b""):
        (tmp_path / "recipe.toml").write_bytes(content)
        with pytest.raises(InputError, match="recipe.toml"):
            recipes.read_recipe(tmp_path / "recipe.toml")


def test_wrong_values_of_a_reader_are_one_sentence():
    for table, message in (
        ({"format": "coco", "annotations": 5}, r"The value annotations of \[data\].* it must be a string"),
        ({"format": "coco", "annotations": "a.json", "novel": "cat"}, "The value novel of .* must be a list"),
        ({"format": "coco", "annotations": "a.json", "size": 1.5}, "The value size of .* must be a whole number"),
        ({"format": ["coco"]}, "has the format"),
        ({"length": "x"}, "The value length of .* must be a whole number"),
        ({"format": "mixture", "sets": [5]}, r"The value sets\[0\] of .* must be a table"),
    ):
        with pytest.raises(InputError, match=message):
            open_data(table)
