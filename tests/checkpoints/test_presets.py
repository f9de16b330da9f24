"""Presets: their parts and sizes, and the choice of `auto`."""

import pytest
import torch
from common import save_clip, save_sam
from fake_hub import FakeHub
from huggingface_hub import constants
from transformers import Owlv2Config, Sam2Config, Sam2VideoConfig, Sam2VideoModel

import ovsam
import ovsam_cli
from ovsam.checkpoints import presets
from ovsam.checkpoints.compose import compose_model, licence
from ovsam.checkpoints.convert.sam2 import SIZES
from ovsam.checkpoints.presets import PRESETS

OWLV2 = {
    "photo": {"vision_config": {"image_size": 960, "patch_size": 16}, "projection_dim": 512},
    "photo-large": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 1008,
            "patch_size": 14,
        },
        "projection_dim": 768,
    },
}


def vision_config(preset):
    """Of the SAM 2.1 that a preset names."""
    size = PRESETS[preset].parts["sam"].rpartition("-")[2]
    width = next(width for (width, _), (name, *_) in SIZES.items() if name == f"hiera {size}")
    _, per_stage, heads, global_blocks, windows, positions = next(s for s in SIZES.values() if s[0] == f"hiera {size}")
    widths = [width * 2**stage for stage in range(4)]
    trunk = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "blocks_per_stage": per_stage,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_size_per_stage": windows,
        "global_attention_blocks": global_blocks,
        "window_positional_embedding_background_size": [positions, positions],
    }
    return {"backbone_config": trunk, "backbone_channel_list": widths[::-1]}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("preset", ["photo", "photo-large"])
def test_sizes_are_those_of_the_parts(preset):
    with torch.device("meta"):
        sam = Sam2Config(vision_config=vision_config(preset))
        model = ovsam.OVSamModel(ovsam.OVSamConfig(sam_config=sam, clip_config=Owlv2Config(**OWLV2[preset])))
        tracker = Sam2VideoModel(Sam2VideoConfig(vision_config=vision_config(preset)))
    assert PRESETS[preset].parameters == pytest.approx(count(model), abs=0.1)
    downloaded = 4 * (count(tracker) + count(model.clip))  # MB in float32
    assert PRESETS[preset].download == pytest.approx(downloaded, rel=0.005)


def put_into_cache(cache, name, save, commit="c" * 40, ref="main"):
    """A repository in the cache of the Hub's client, as a download leaves it."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    (repo / "snapshots").mkdir(exist_ok=True)
    save(repo / "snapshots" / commit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a Hub that cannot be reached."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("OVSAM_MODEL", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def cached_photo(cache):
    put_into_cache(cache, PRESETS["photo"].parts["sam"], lambda folder: save_sam(folder, "sam2"))
    put_into_cache(cache, PRESETS["photo"].parts["clip"], lambda folder: save_clip(folder, "owlv2"))
    return cache


def test_models_lists_every_preset(cached_photo, capsys):
    assert ovsam_cli.main(["models"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["preset", "parameters", "download", "here", "parts"]
    photo, large, tiny = (row.split() for row in rows)
    assert photo[:6] == ["photo", "193.5", "M", "804", "MB", "cached"]
    assert " ".join(photo[6:]).startswith(
        "facebook/sam2.1-hiera-small (Apache-2.0) + google/owlv2-base-patch16-ensemble (Apache-2.0)"
    )
    assert large[:6] == ["photo-large", "654.5", "M", "2,650", "MB", "no"]
    assert tiny[:6] == ["ovsam-tiny", f"{PRESETS['ovsam-tiny'].parameters}", "M", "0", "MB", "embedded"]


def test_auto_is_photo_if_it_is_cached(cached_photo, capsys):
    segmenter = ovsam.load(device="cpu")
    assert segmenter.name == "photo" and not capsys.readouterr().err.count("ovsam:")
    assert segmenter.model.config.sam_config.model_type == "sam2"
    assert segmenter.model.config.clip_config.model_type == "owlv2"
    assert segmenter.model.config.score_threshold == 0.2 and segmenter.model.config.vocabulary == "lvis"


@pytest.mark.slow
def test_photo_in_video_keeps_the_memory_of_sam2(cache):
    name = PRESETS["photo"].parts["sam"]

    put_into_cache(cache, name, lambda folder: save_sam(folder, "sam2_video"))
    put_into_cache(cache, PRESETS["photo"].parts["clip"], lambda folder: save_clip(folder, "owlv2"))
    kinds = {
        tracker: ovsam.load_video("photo", "cpu", tracker=tracker).segmenter.model.config.sam_config.model_type
        for tracker in ("auto", "memory", "propagation")
    }
    assert kinds == {"auto": "sam2_video", "memory": "sam2_video", "propagation": "sam2"}
    assert ovsam.load("photo", "cpu").model.config.sam_config.model_type == "sam2"


@pytest.mark.weights
def test_auto_is_embedded_without_cache_and_hub(cache, capsys):
    segmenter = ovsam.load(device="cpu")
    assert segmenter.name == "ovsam-tiny"
    assert PRESETS["ovsam-tiny"].parameters == pytest.approx(count(segmenter.model), abs=0.1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ovsam:")]
    assert "using ovsam-tiny, which is small and finds COCO's 80 words best" in line


@pytest.mark.slow
def test_auto_is_downloaded_once_if_the_hub_responds(cache, tmp_path, monkeypatch, capsys):
    """Whole repositories, of which only the required files are fetched; also one in the layout of open_clip."""
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    parts = PRESETS["photo"].parts
    saved = {parts["sam"]: save_sam(tmp_path / "sam", "sam2"), parts["clip"]: save_clip(tmp_path / "clip", "owlv2")}
    saved |= {"org/convnext": save_clip(tmp_path / "convnext", "convnext")}
    card = {"README.md": b"---\nlicense: apache-2.0\n---\n", "sam2.1_hiera_small.pt": b"never read"}
    for repo, folder in saved.items():
        hub.put(repo, {path.name: path.read_bytes() for path in folder.iterdir()} | card)
    try:
        assert ovsam.load(device="cpu").name == "photo"
        assert "ovsam: the model photo is downloaded once, about 804 MB\n" in capsys.readouterr().err
        model, found = compose_model(parts["sam"], "org/convnext")
        assert model.config.clip_config.model_type == "ovsam_open_clip" and licence(found["clip"]) == "apache-2.0"
        assert not list(cache.rglob("*.pt"))
    finally:
        hub.shutdown()
        hub.server_close()
    assert ovsam.load(device="cpu").name == "photo"  # now without the Hub
    assert "downloaded" not in capsys.readouterr().err


@pytest.mark.weights
def test_the_environment_chooses(cached_photo, monkeypatch):
    monkeypatch.setenv("OVSAM_MODEL", "ovsam-tiny")
    assert ovsam.load(device="cpu").name == "ovsam-tiny"
    assert ovsam.load("photo", device="cpu").name == "photo"  # the preset that was named


@pytest.mark.parametrize("partly", ["sam", "clip"])
def test_half_of_photo_is_not_photo(cache, partly, capsys):
    save = {"sam": lambda folder: save_sam(folder, "sam2"), "clip": lambda folder: save_clip(folder, "owlv2")}
    put_into_cache(cache, PRESETS["photo"].parts[partly], save[partly])
    assert presets.choose_auto() == "ovsam-tiny"
    assert "using ovsam-tiny" in capsys.readouterr().err
