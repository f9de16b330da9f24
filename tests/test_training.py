"""Each stage learns on a batch, and an interrupted run ends where an uninterrupted one does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovsam.errors import InputError
from ovsam.scenes.drawing import SceneConfig
from ovsam.scenes.words import all_words
from ovsam.training import losses, targets
from ovsam.training import run as training_run
from ovsam.training.adapters_stage import AdaptersStage, assign, text_targets
from ovsam.training.clip_stage import ClipStage
from ovsam.training.data import SceneDataset
from ovsam.training.sam_stage import SamStage
from ovsam.training.texts import WordTable

MODEL = {
    "architecture": "mobilenetv4_conv_small",
    "channels": [32, 64, 96, 960],
    "width": 64,
    "mlp_dim": 64,
    "image_size": 128,
}
SCENES = SceneConfig(canvas=64, min_objects=2, max_objects=4, min_size=20, max_size=40)


@pytest.fixture(scope="module")
def words():
    generator = torch.Generator().manual_seed(0)
    count = len(all_words())
    embeds = torch.nn.functional.normalize(torch.randn(count + 50, 384, generator=generator), dim=-1)
    has_keyword = torch.rand(count, 50, generator=generator) < 0.05
    is_base = torch.tensor([w.split == "base" for w in all_words()])
    return WordTable(embeds[:count], embeds[count:], has_keyword, is_base)


@pytest.fixture(scope="module")
def batch():
    items = [SceneDataset(4, 1, SCENES)[i] for i in range(4)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def learn(stage, batch, steps, rate):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=rate)
    history = []
    for _ in range(steps):
        loss = stage(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return sum(history[:3]) / 3, sum(history[-3:]) / 3


def sam_stage():
    torch.manual_seed(0)
    return SamStage(MODEL, prompts=2, focal_gamma=0.0, mask_weight=5.0, dice_weight=5.0)


def test_clip_stage_learns_names(words, batch):
    torch.manual_seed(0)
    stage = ClipStage(words, "mobilenetv4_conv_small", label_smoothing=0.05, keyword_weight=0.3)
    first, last = learn(stage, batch, 20, 2e-3)
    assert last < 0.7 * first
    assert not any("text_model" in name for name in stage.published_state())


def test_sam_stage_learns_masks(batch):
    first, last = learn(sam_stage(), batch, 25, 1e-3)
    assert last < 0.9 * first


def test_sam_stage_ties_its_position_codes_and_goes_on_from_weights():
    stage, other = sam_stage(), SamStage(MODEL, 2, 0.0, 5.0, 5.0)
    codes = stage.sam.shared_image_embedding, stage.sam.prompt_encoder.shared_embedding
    assert torch.equal(*(code.positional_embedding for code in codes))
    other.load_published(stage.published_state())
    for name, tensor in stage.published_state().items():
        assert torch.equal(tensor, other.published_state()[name]), name


def test_adapters_stage_learns_and_leaves_clip_alone(words, batch, tmp_path):
    torch.manual_seed(0)
    clip = ClipStage(words, "mobilenetv4_conv_small", label_smoothing=0.05, keyword_weight=0.3)
    save_file({n: t.contiguous() for n, t in clip.published_state().items()}, tmp_path / "clip.safetensors")
    arguments = {"width": 32, "prompts": 3, "label_smoothing": 0.05, "word_weight": 0.2}
    stage = AdaptersStage(words, str(tmp_path / "clip.safetensors"), "mobilenetv4_conv_small", **arguments)
    stage.train()
    before = {name: tensor.clone() for name, tensor in stage.clip.state_dict().items()}
    first, last = learn(stage, batch, 20, 1e-3)
    assert last < 0.75 * first
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.clip.state_dict().items())


def test_a_location_belongs_to_the_object_under_it(batch):
    masks = targets.object_masks(batch["index_map"], 4)
    from ovsam.boxes import masks_to_boxes

    place = assign(batch["index_map"], masks_to_boxes(masks), masks, (16, 32))
    assert place.owner.shape == (4, 4 * 4 + 2 * 2)
    for b in range(4):
        # Each object has at least one location that is surely its own.
        visible = {i for i in range(4) if masks[b, i].sum() >= 64}
        assert visible <= {int(o) for o, c in zip(place.owner[b], place.centrality[b], strict=True) if c > 0.5}


def test_text_targets_leave_out_names_that_also_fit():
    words = WordTable(
        names=torch.eye(3),
        keywords=torch.eye(2, 3),
        has_keyword=torch.tensor([[True, False], [True, False], [False, True]]),
        is_base=torch.tensor([True, True, False]),
    )
    # Words 0 and 1 share their only keyword; word 2 is novel, so its name is no target of anyone.
    assert text_targets(words).tolist() == [[1, -1, 1, 0], [-1, 1, 1, 0], [0, 0, 0, 1]]


def test_losses_by_hand():
    boxes, truth = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    loss, iou = losses.giou_loss(boxes, truth)
    assert iou.item() == pytest.approx(1 / 3) and loss.item() == pytest.approx(2 / 3)  # the hull adds nothing here
    assert losses.dice_loss(torch.full((1, 4, 4), 50.0), torch.ones(1, 4, 4)).item() == pytest.approx(0, abs=1e-5)
    logits, target = torch.tensor([2.0]), torch.tensor([1.0])
    plain = losses.focal_loss(logits, target, gamma=0.0)
    assert losses.focal_loss(logits, target, gamma=2.0).item() == pytest.approx(
        (plain * (1 - logits.sigmoid()) ** 2).item()
    )


def recipe(folder, steps=4):
    folder.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(f"{k} = {json.dumps(v)}" for k, v in MODEL.items())
    scenes = "\n".join(f"{k} = {v}" for k, v in vars(SCENES).items())
    text = f"""
stage = "sam"
seed = 5
[stage_args]
prompts = 2
focal_gamma = 0.0
mask_weight = 5.0
dice_weight = 5.0
[stage_args.model]
{rows}
[data]
{scenes}
[optim]
batch_size = 2
steps = {steps}
learning_rate = 1e-3
weight_decay = 0.05
warmup_steps = 1
save_steps = 2
logging_steps = 1
"""
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    path = recipe(tmp_path / "tiny")
    whole = training_run.train_recipe(path, output=tmp_path / "whole", device="cpu")

    drawn = []
    original = SceneDataset.__getitem__

    def stop_at_seven(self, index):
        drawn.append(index)
        if len(drawn) == 7:  # in step 4, after the checkpoint of step 2
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(SceneDataset, "__getitem__", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        training_run.train_recipe(path, output=tmp_path / "broken", device="cpu")
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    monkeypatch.setattr(SceneDataset, "__getitem__", lambda self, index: drawn.append(index) or original(self, index))
    before = len(drawn)
    resumed = training_run.train_recipe(path, output=tmp_path / "broken", resume=True, device="cpu")
    assert len(drawn) - before == 4  # two steps of two pictures: nothing seen before is drawn again

    expected, got = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_missing_recipe_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="There is no recipe"):
        training_run.train_recipe(tmp_path / "nothing.toml")
