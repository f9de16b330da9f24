"""Stage `memory`: its training forward is the inference of the tracker, it trains the memory alone, and the recipe runs
to the end over a tiny random model."""

import tomllib

import pytest
import torch
from common import ROOT, SIZE, picture, tiny_config, tiny_processor, tiny_video_model

import ovsam
from ovsam.data.moving import MovingScenes
from ovsam.errors import InputError
from ovsam.modeling.modeling_ovsam_video import with_memory
from ovsam.modeling.sam.memory import Recall
from ovsam.modeling.sam.video import Sam2VideoSide
from ovsam.modeling.tracking import OVSamVideoSession, VideoPrompt
from ovsam.training.engine import train_recipe
from ovsam.training.stages.memory import MemoryStage

PHOTOS = ROOT / "tests" / "data" / "photos-val"


def squares(frames: int = 4, size: int = SIZE) -> dict[str, torch.Tensor]:
    """Two textured squares that move over noise, and a place without an object."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(90, 120, (2, frames, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(2, 3, frames, size, size, dtype=torch.bool)
    for clip in range(2):
        for number in range(2):
            texture = torch.randint(0, 255, (3, 40, 40), generator=generator, dtype=torch.uint8)
            for frame in range(frames):
                x, y = 8 + 10 * frame + 6 * clip, 8 + 60 * number
                image[clip, frame, :, y : y + 40, x : x + 40] = texture
                masks[clip, number, frame, y : y + 40, x : x + 40] = True
    return {
        "image": image,
        "masks": masks,
        "word_ids": torch.tensor([[0, 1, -1]] * 2),
        "known": torch.zeros(2, 4, dtype=torch.bool),
    }


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    return MemoryStage(tiny_video_model("sam2_video", adapters=False), objects=2, mask_share=1.0, box_share=0.0)


@torch.no_grad()
def test_the_training_forward_is_the_inference_of_the_tracker(stage):
    """In evaluation mode, where memories are rounded and masks hidden in both: the same masks in every frame."""
    batch, masks = squares(), []
    stage = MemoryStage(stage.model.double(), objects=2, mask_share=1.0, box_share=0.0).eval()  # as in test_tracking.py
    follow = stage._follow
    stage._follow = lambda *given: masks.append(follow(*given)) or masks[-1]
    torch.manual_seed(0)
    stage(**batch)
    frames = list(batch["image"][0])
    video = OVSamVideoSession(frames, lambda frame: {"pixel_values": stage.pixels(frame[None])}, SIZE, SIZE)
    for number in (0, 1):
        video.add_prompt(number, 0, VideoPrompt(mask=batch["masks"][0, number, 0]))
    outputs = list(stage.model.propagate_in_video_iterator(video))[1:]
    scale = max(float(output.pred_masks.abs().max()) for output in outputs)
    for tracked, output in zip(masks, outputs, strict=True):
        # Objects are chosen in a random order.
        nearest = [(tracked.masks[0] - output.pred_masks[n, 0]).abs().amax((1, 2)).min() for n in (0, 1)]
        assert max(map(float, nearest)) <= 1e-4 * scale


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam2_video", "edgetam_video"])
def test_it_trains_the_memory_alone_and_learns(kind):
    torch.manual_seed(0)
    stage = MemoryStage(tiny_video_model(kind, adapters=False), objects=2).train()
    batch = squares()
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    trained = [(name, p) for name, p in stage.named_parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([p for _, p in trained], 2e-3)
    history, reached = [], set()
    for step in range(16):
        torch.manual_seed(step % 4)
        optimizer.zero_grad()
        loss = stage(**batch)["loss"]
        loss.backward()
        reached |= {name for name, p in trained if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-4:]) < 0.9 * sum(history[:4]), history
    changed = {name for name, tensor in stage.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = [name.split(".")[3] for name in changed]
    assert {*parts} <= {*stage.sam.memory_parts, "mask_decoder"}
    assert all("pred_obj_score_head" in name for name in changed if ".mask_decoder." in name)
    for part in ("memory_attention", "memory_encoder", "object_pointer_proj"):
        assert part in parts, f"{part} learned nothing"
    published = stage.published_state()
    other = MemoryStage(tiny_video_model(kind, adapters=False), objects=2)
    other.load_published(published)
    for name, tensor in published.items():
        assert torch.equal(other.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("composition", ["dual", "clip"])
def test_a_memory_is_added_to_a_model_and_changes_no_image(composition, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(composition, adapters=False, sam="edgetam")
    plain = ovsam.OVSamModel(wide(config, composition)).eval()
    model = with_memory(plain, memory_attention_num_layers=1, num_maskmem=3)
    assert isinstance(model.sam, Sam2VideoSide)
    pixels, boxes = torch.randn(1, 3, SIZE, SIZE), torch.tensor([[[20.0, 20, 90, 80]]])
    with torch.no_grad():
        expected = plain(pixel_values=pixels, input_boxes=boxes).pred_masks
        torch.testing.assert_close(model(pixel_values=pixels, input_boxes=boxes).pred_masks, expected)
        model.save_pretrained(tmp_path)
        loaded = ovsam.OVSamVideoModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(pixel_values=pixels, input_boxes=boxes).pred_masks, expected)
    session = OVSamVideoSession(tracker="memory")
    session.add_prompt(1, 0, VideoPrompt(mask=squares()["masks"][0, 0, 0]))
    for frame in torch.randn(3, 3, SIZE, SIZE):
        assert loaded(session, frame=frame).pred_masks.isfinite().all()


def test_a_new_memory_starts_at_the_scale_of_the_features():
    torch.manual_seed(0)
    plain = ovsam.OVSamModel(wide(tiny_config("dual", adapters=False, sam="edgetam"), "dual")).eval()
    with torch.no_grad():
        for weight in plain.sam.model.vision_encoder.neck.parameters():
            weight.mul_(30)
        model = with_memory(plain, memory_attention_num_layers=1)
        features = model.encode(torch.randn(1, 3, SIZE, SIZE)).sam
        stage = MemoryStage(model)
        stored = model.sam.memorise(features, stage._prompt(features, squares()["masks"][:1, :1, 0]), torch.ones(1) > 0)
        recalled = model.sam.recall(
            features, Recall((0,), (), 2), stored[:, :, None].float(), torch.zeros(1, 1, 0, 128)
        )
    assert 0.5 < recalled.std() / features.pyramid[2].std() < 2


def test_images_of_another_size_take_the_same_weights():
    torch.manual_seed(0)
    plain = ovsam.OVSamModel(wide(tiny_config("clip", adapters=False, sam="edgetam"), "clip")).eval()
    small = MemoryStage(plain, layers=1, image_size=SIZE // 2)
    half = {name: part[..., ::2, ::2] if part.ndim > 3 else part for name, part in squares().items()}
    losses = small(**half)
    assert losses["loss"].isfinite()
    large = MemoryStage(small.model, image_size=SIZE)
    assert large(**squares())["loss"].isfinite()
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(large.model.state_dict()[name], tensor), name
    with pytest.raises(InputError, match="multiple of"):
        with_memory(plain, 100)


def wide(config: ovsam.OVSamConfig, composition: str) -> ovsam.OVSamConfig:
    """A SAM side of 128 channels, the least that object pointers need."""
    sam = config.sam_config
    for part in (sam.prompt_encoder_config, sam.mask_decoder_config):
        part.hidden_size = 128
    sam.vision_config.fpn_hidden_size = 128
    if composition == "clip":
        config.sam2clip_config.width = 128
    return config


def test_clips_are_a_function_of_their_number():
    data = MovingScenes(PHOTOS / "annotations.json", PHOTOS / "images", length=4, size=64, frames=3, step=2)
    one, again = data[1], data[1]
    assert one["image"].shape == (3, 3, 64, 64) and one["masks"].shape == (5, 3, 64, 64)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name]), name
    assert one["masks"].any() and not torch.equal(one["image"][0], one["image"][2])
    with pytest.raises(InputError, match="frozen scenes"):
        MovingScenes(PHOTOS / "annotations.json", PHOTOS / "images", seed=900_201)
    with pytest.raises(InputError, match="frames in all"):
        MovingScenes(PHOTOS / "annotations.json", PHOTOS / "images", frames=40)


@pytest.mark.slow
def test_the_recipe_runs_to_the_end_and_its_model_tracks(tmp_path):
    config = tiny_config("clip", sam="edgetam")
    torch.manual_seed(0)
    config = wide(config, "clip")
    config.clip2sam_config.token_dim = 128
    ovsam.OVSamModel(config).save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    recipe = tomllib.loads((ROOT / "adapters" / "memory-tiny" / "recipe.toml").read_text())
    assert recipe["stage"] == "memory" and recipe["model"]["base"] == "ovsam-tiny"
    small = {"model.base": f'"{tmp_path / "base"}"', "data.annotations": f'"{PHOTOS / "annotations.json"}"'}
    small |= {
        "data.images": f'"{PHOTOS / "images"}"',
        "data.frames": 3,
        "optim.warmup_steps": 0,
        "stage_args.layers": 1,
    }
    settings = [f"{key}={value}" for key, value in small.items()]
    path = ROOT / "adapters" / "memory-tiny" / "recipe.toml"
    out = train_recipe(path, tmp_path / "run", steps=2, settings=settings, device="cpu")
    video = ovsam.load_video(str(out), "cpu", tracker="memory")
    mask = torch.zeros(96, 128, dtype=torch.bool)
    mask[20:60, 30:80] = True
    frames = [picture(0, 128, 96)] * 3
    shown = list(video.track(frames, prompts=[ovsam.Prompt(mask=mask.numpy(), name="thing")]))
    assert len(shown) == 3 and shown[0].results[0].label == "thing"
    assert video.segmenter.model.config.sam_config.model_type == "sam2_video"
    assert video.segmenter.model.config.vocabulary == ovsam.OVSamConfig.from_pretrained(tmp_path / "base").vocabulary
