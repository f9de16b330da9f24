"""The engine around the stages: order, checkpoints, resuming, several processes, reports and errors.

A toy stage stands in for the real ones: it has random numbers of its own, and a part that is not used at every step.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ovsam.data import SceneDataset
from ovsam.data.scenes.drawing import SceneConfig
from ovsam.data.words import Word
from ovsam.errors import InputError
from ovsam.training import checkpoint, preflight, recipe
from ovsam.training import engine as training_run
from ovsam.training import order as training_data
from ovsam.training.stages import STAGES

SEED = 5  # of the recipes' training data; held-out data have another one
SCENES = {"canvas": 48, "min_objects": 1, "max_objects": 2, "min_size": 16.0, "max_size": 30.0}


class Toy(nn.Module):
    """The covered fraction of an image. The loss is a mean over images, so that halves of a batch average to it."""

    def __init__(self, noise: float = 1.0, coin: float = 0.5):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head, self.sometimes = nn.Linear(8, 1), nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()))  # changes in training, like batch statistics
        self.noise, self.coin = noise, coin

    def guess(self, image):
        feature = self.encoder(image.float() / 255).mean((2, 3))
        return self.head(feature)[:, 0], feature

    def forward(self, image, masks, word_ids, known):
        guess, feature = self.guess(image)
        if self.training:
            self.seen += 1
            if torch.rand(()) < self.coin:
                guess = guess + self.sometimes(feature)[:, 0]
        if self.noise:
            guess = guess + self.noise * torch.randn(len(guess))
        error = (guess - masks.any(1).float().mean((1, 2))).square().mean()
        return {"loss": error, "absolute": error.detach().sqrt()}

    def predict(self, image, masks, word_ids, known):
        return [(masks[b, :1], word_ids[b, :1], torch.full((1,), 0.5)) for b in range(len(image))]

    def published_state(self):
        return self.state_dict()


def write_recipe(folder: Path, **more) -> Path:
    """A recipe.toml in the folder; `optim` and other tables can be changed."""
    optim = {"batch_size": 2, "steps": 6, "learning_rate": 1e-2, "warmup_steps": 1, "save_steps": 2, "logging_steps": 1}
    tables = {"stage_args": {}, "data": dict(SCENES), "optim": optim}
    top = {"stage": "toy", "seed": SEED}
    for name, value in more.items():
        if isinstance(value, dict):
            tables[name] = tables.get(name, {}) | value
        else:
            top[name] = value
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{k} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, dict)]
        for k, v in table.items():
            if isinstance(v, dict):
                lines += [f"[{name}.{k}]", *(f"{kk} = {json.dumps(vv)}" for kk, vv in v.items())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text("\n".join(lines) + "\n")
    return folder / "recipe.toml"


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(STAGES, "toy", Toy)


def assert_same(folder: Path, other: Path) -> None:
    got, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name].clone(), expected[name].clone(), atol=1e-6, rtol=1e-5, msg=name)


def logged(folder: Path, name: str, beside: str = "loss") -> list[float]:
    """The log of the last checkpoint."""
    state = json.loads((checkpoint.list_checkpoints(folder)[-1] / "trainer_state.json").read_text())
    return [line[name] for line in state["log_history"] if beside in line]


# ---- the order of the samples ---------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    """Picture i is all i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": torch.full((3, 8, 8), index, dtype=torch.uint8)}


def test_every_image_once_a_pass_and_each_pass_in_another_order():
    order = training_data.TrainingOrder(Numbers(10), 30, seed=1)
    drawn = [int(order[i]["image"][0, 0, 0]) for i in range(30)]
    passes = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    again = training_data.TrainingOrder(Numbers(10), 30, seed=1)
    assert int(again[17]["image"][0, 0, 0]) == drawn[17]  # a sample does not depend on those before it


def test_rehearsal_takes_its_share_and_skips_none_of_the_data():
    calls = []
    old = type("Old", (Numbers,), {"__getitem__": lambda self, i: calls.append(i) or {"image": None}})(100)
    order = training_data.TrainingOrder(Numbers(6), 16, seed=1, rehearsal=old, share=0.25)
    drawn = [order[i]["image"] for i in range(16)]
    assert calls == [0, 1, 2, 3]
    own = [int(image[0, 0, 0]) for image in drawn if image is not None]
    assert len(own) == 12 and sorted(own[:6]) == sorted(own[6:]) == list(range(6))


def test_each_pass_takes_other_crops_of_the_same_images():
    order = training_data.TrainingOrder(Numbers(12), 16, seed=1, pictures=4)  # three crops of four images
    drawn = [int(order[i]["image"][0, 0, 0]) for i in range(16)]
    passes = [sorted(drawn[i : i + 4]) for i in (0, 4, 8, 12)]
    assert passes == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]


def test_a_batch_is_padded_to_its_largest_sample():
    sample = {"image": torch.zeros(3, 8, 8), "masks": torch.zeros(6, 8, 8, dtype=torch.bool), "known": torch.ones(1)}
    named = sample | {"word_ids": torch.tensor([0, 0, -1, -1, -1, -1])}  # two objects, fully covered by others
    nameless = sample | {"word_ids": torch.full((6,), -1), "masks": sample["masks"].clone()}
    nameless["masks"][3, 2, 2] = True
    assert training_data.collate([named])["masks"].shape == (1, 2, 8, 8)
    assert training_data.collate([named, nameless])["word_ids"].shape == (2, 4)


def test_rehearsal_words_are_unknown_to_the_data_and_shared_words_are_one():
    class Few(Numbers):
        max_objects = 1
        words = [Word("", "blimp", (), "base"), Word("", "rocket", ("zeppelin",), "base")]

        def __getitem__(self, index):
            return {
                "image": torch.zeros(3, 48, 48, dtype=torch.uint8),
                "masks": torch.ones(1, 48, 48, dtype=torch.bool),
                "word_ids": torch.tensor([1]),
                "known": torch.tensor([True, False]),
            }

    scenes = SceneDataset(3, 1, SceneConfig(**SCENES))
    new, old, words = training_data.mix_rehearsal(Few(1), scenes)
    names = [word.name for word in words]
    assert names[:2] == ["blimp", "rocket"] and names.count("rocket") == 1 and len(names) == len(scenes.words) + 1
    assert "zeppelin" in words[1].keywords and len(words[1].keywords) > 1
    assert new[0]["known"].tolist() == [True] + [False] * (len(names) - 1)
    assert new[0]["word_ids"].tolist() == [1, -1] and new[0]["masks"].shape == (2, 48, 48)
    assert not old[0]["known"][0] and old[0]["known"][1:].all()  # the scenes are not annotated for blimps
    for mapped, own in zip(old[0]["word_ids"].tolist(), scenes[0]["word_ids"].tolist(), strict=True):
        assert (mapped < 0) == (own < 0) and (own < 0 or names[mapped] == scenes.words[own].name)


# ---- killed and resumed ---------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(path, output, moment):
    """In a process of its own: the run is killed at a moment of its choice."""
    torch.set_num_threads(1)
    STAGES["toy"] = Toy
    if moment == "in a step":  # the fifth, between checkpoints
        draw, drawn = SceneDataset.__getitem__, []
        SceneDataset.__getitem__ = lambda self, i: (
            draw(self, i) if self.seed != SEED or len(drawn.append(i) or drawn) < 12 else die()
        )
    elif moment == "in a save":  # the model is written, the optimiser half
        save = torch.save

        def half(content, path, *args, **kwargs):
            if "checkpoint-4" in str(path) and "optimizer" in str(path):
                Path(path).write_bytes(b"PK half a file")
                die()
            return save(content, path, *args, **kwargs)

        torch.save = half
    elif moment == "before the rename":
        publish = training_run.publish_checkpoint
        training_run.publish_checkpoint = lambda folder, name: die() if name[-1] == "4" else publish(folder, name)
    elif moment == "before the old one is deleted":
        checkpoint.shutil.rmtree = lambda path, **kwargs: die() if "checkpoint-2" in str(path) else None
    elif moment == "in the last write":
        training_run.write_whole = lambda path, write: (Path(path).with_name(".model-1").write_bytes(b"half"), die())
    training_run.train_recipe(path, output=output, device="cpu")


@pytest.fixture(scope="module")
def server():
    """Children start from a process that has imported everything, so that each costs no seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ovsam.training.engine"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGES, "toy", Toy)
        path = write_recipe(folder / "toy", eval={"every": 3, "pictures": 3, "data": SCENES})
        return path, training_run.train_recipe(path, output=folder / "run", device="cpu")


MOMENTS = {  # and the step after which the run goes on
    "in a step": 4,
    "in a save": 2,
    "before the rename": 2,
    "before the old one is deleted": 4,
    "in the last write": 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_result(whole, server, tmp_path, monkeypatch, moment):
    path, expected = whole
    process = server.Process(target=train_and_die, args=(path, tmp_path / "run", moment))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / "model.safetensors").exists()
    checkpoints = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.checkpoint_step(checkpoints[-1]) == MOMENTS[moment]

    drawn, draw = [], SceneDataset.__getitem__
    count = lambda self, i: (drawn.append(i) if self.seed == SEED else None) or draw(self, i)  # noqa: E731
    monkeypatch.setattr(SceneDataset, "__getitem__", count)
    resumed = training_run.train_recipe(path, output=tmp_path / "run", resume=True, device="cpu")
    assert len(drawn) == 1 + 2 * (6 - MOMENTS[moment])  # the dry run's sample, and nothing that was seen before
    assert_same(resumed, expected)
    assert not (resumed / checkpoint.SAVING).exists()
    assert logged(resumed, "step") == logged(expected, "step") == [1, 2, 3, 4, 5, 6]
    assert logged(resumed, "loss") == pytest.approx(logged(expected, "loss"))
    assert logged(resumed, "eval_loss", "eval_loss") == pytest.approx(logged(expected, "eval_loss", "eval_loss"))


@pytest.mark.slow
def test_the_error_about_resuming_with_another_recipe_lists_the_changes(whole, tmp_path):
    path, _ = whole
    training_run.train_recipe(path, output=tmp_path / "run", device="cpu")
    changed = write_recipe(tmp_path / "changed", optim={"learning_rate": 2e-2}, data={"max_size": 31.0})
    message = "data.max_size was 30.0 and is 31.0; optim.learning_rate was 0.01 and is 0.02"
    with pytest.raises(InputError, match=message):
        training_run.train_recipe(changed, output=tmp_path / "run", resume=True, device="cpu")
    with pytest.raises(InputError, match="optim.steps was 6 and is 8"):
        training_run.train_recipe(path, output=tmp_path / "run", resume=True, steps=8, device="cpu")
    with pytest.raises(InputError, match="already has a run; pass --resume"):
        training_run.train_recipe(path, output=tmp_path / "run", device="cpu")
    more_often = write_recipe(tmp_path / "often", optim={"save_steps": 3})  # which changes no weight
    training_run.train_recipe(more_often, output=tmp_path / "run", resume=True, device="cpu")


# ---- several processes ----------------------------------------------------------------------------------------


def train_as(rank, port, path, output):
    """In a process of its own: one of two, with the environment of `accelerate launch` and torchrun."""
    torch.set_num_threads(1)
    STAGES["toy"] = Toy
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    steps, step = [], training_run.StageTrainer.training_step
    training_run.StageTrainer.training_step = lambda self, *args: steps.append(1) or step(self, *args)
    with (output / f"said-by-{rank}").open("w") as file, contextlib.redirect_stdout(file):
        training_run.train_recipe(path, output=output / "run", device="cpu")
    (output / f"steps-of-{rank}").write_text(str(len(steps)))


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(server, tmp_path):
    """Noise is drawn for each process by itself, hence none here."""
    common = {"stage_args": {"noise": 0.0}, "eval": {"every": 3, "pictures": 5, "data": SCENES}}
    alone = write_recipe(tmp_path / "alone", optim={"batch_size": 4}, **common)
    single = training_run.train_recipe(alone, output=tmp_path / "single", device="cpu")
    halves = write_recipe(tmp_path / "halves", optim={"batch_size": 2}, **common)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [server.Process(target=train_as, args=(rank, port, halves, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 0]
    double = tmp_path / "run"
    assert [(tmp_path / f"steps-of-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    said = [(tmp_path / f"said-by-{rank}").read_text() for rank in (0, 1)]
    assert "6 steps of 4 images (2 at a time on each of 2 processes)" in said[0] and "images" not in said[1]
    assert_same(double, single)
    for name in ("loss", "eval_loss"):
        assert logged(double, name, name) == pytest.approx(logged(single, name, name), rel=1e-4)
    assert {path.name for path in (double / "checkpoint-6").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_accumulated_batches_make_the_same_step(tmp_path):
    args = {"noise": 0.0, "coin": 0.0}
    whole = write_recipe(tmp_path / "a", stage_args=args, optim={"batch_size": 4})
    parts = write_recipe(tmp_path / "b", stage_args=args, optim={"batch_size": 1, "accumulate": 4})
    parts = training_run.train_recipe(parts, output=tmp_path / "parts", device="cpu")
    got, expected = load_file(parts / "model.safetensors"), training_run.train_recipe(whole, output=tmp_path / "whole")
    expected = load_file(expected / "model.safetensors")
    assert got.pop("seen") == 4 * expected.pop("seen")
    for name in expected:
        torch.testing.assert_close(got[name].clone(), expected[name].clone(), atol=1e-6, rtol=1e-5, msg=name)


# ---- before the run -------------------------------------------------------------------------------------------


class Line(nn.Module):
    """One layer, so that the tensors kept by autograd can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.layer, self.frozen = nn.Linear(64, 10, bias=False), nn.Linear(100, 1)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x):
        return {"loss": self.norm(self.layer(x)).exp().sum() + torch.rand(())}


def test_memory_is_counted_and_the_dry_run_changes_nothing():
    torch.manual_seed(0)
    stage, batch = Line().eval(), {"x": torch.randn(5, 64)}
    before, random = {n: t.clone() for n, t in stage.state_dict().items()}, torch.get_rng_state()
    memory = preflight.measure_memory(stage, batch)
    trained = 4 * (640 + 10 + 10)
    assert memory.gradients == trained and memory.optimiser == 2 * trained
    assert memory.weights == trained + 4 * 101 + 4 * 20 + 8  # and the statistics, and their count
    # The layer's input, the norm's input with its mean and deviation, and what exp returned (5 rows).
    assert memory.activations == pytest.approx(4 * (5 * 64 + 2 * 5 * 10 + 2 * 10), abs=16)
    assert all(torch.equal(before[n], t) for n, t in stage.state_dict().items()) and not stage.training
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in stage.parameters())


def test_invalid_runs_raise_an_error():
    with pytest.raises(InputError, match="does not depend on a trainable parameter"):
        stage = Line()
        stage.forward = lambda x: {"loss": x.sum()}
        preflight.measure_memory(stage, {"x": torch.randn(5, 64)})
    with pytest.raises(InputError, match="loss of the first sample is nan"):
        preflight.measure_memory(Line(), {"x": torch.full((5, 64), float("inf"))})
    with pytest.raises(InputError, match="no trainable parameters"):
        preflight.check_trainable(Line().requires_grad_(False), "toy")
    with pytest.raises(InputError, match="no layer of this stage supports it"):
        preflight.recompute_activations(Line())
    with pytest.raises(InputError, match="999999 workers on"):
        preflight.check_workers(999999)
    with pytest.raises(InputError, match="has an object"):
        empty = {"masks": torch.zeros(1, 4, 4, dtype=torch.bool)}
        preflight.first_sample([empty] * 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stage": "tos"}, "has the stage 'tos'; choose one of"),
        ({"steps": 3}, "has steps; a recipe takes"),
        ({"optim": {"lr": 0.1}}, r"has lr in \[optim\], which takes"),
        ({"optim": {"steps": 0}}, "The value optim.steps of .* must be a whole number >= 1"),
        ({"stage_args": {"nose": 1}}, r"has nose in \[stage_args\]; the stage toy takes coin, noise"),
        ({"eval": {"every": 2}}, r"lacks data in \[eval\]"),
        ({"weights": "nowhere.safetensors"}, "starts from nowhere.safetensors, which does not exist"),
        ({"data": {"sides": 3}}, "'sides'"),
        ({"data": {"format": "coca"}}, "format 'coca'; choose one of"),
    ],
)
def test_an_invalid_recipe_raises_an_error(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        training_run.train_recipe(write_recipe(tmp_path, **change), output=tmp_path / "run", device="cpu")


def test_the_command_line_replaces_the_data(tmp_path):
    path = write_recipe(tmp_path, data={"format": "coco", "annotations": "a.json", "flip": True, "novel": ["cat"]})
    for key in SCENES:
        assert key in recipe.read_recipe(path)["data"]
    changed = recipe.read_recipe(path, data="b.json", images="pictures", steps=3)
    assert changed["data"].items() >= {"annotations": "b.json", "images": "pictures", "flip": True}.items()
    assert changed["optim"]["steps"] == 3 and changed["optim"]["accumulate"] == 1
    with pytest.raises(InputError, match="go together"):
        recipe.read_recipe(path, data="b.json")
    several = recipe.read_recipe(path, data=["b.json", "c.json"], images=["pictures"], steps=3)["data"]
    assert several["format"] == "mixture" and [one["annotations"] for one in several["sets"]] == ["b.json", "c.json"]
    assert all(one["images"] == "pictures" and one["flip"] and one["novel"] == ["cat"] for one in several["sets"])
    with pytest.raises(InputError, match="There are 2 --data and 3 --images"):
        recipe.read_recipe(path, data=["b.json", "c.json"], images=["x", "y", "z"])
    with pytest.raises(InputError, match="There is no recipe"):
        recipe.read_recipe(tmp_path / "nothing.toml")


def test_an_unknown_device_raises_an_error(tmp_path):
    path = write_recipe(tmp_path)
    with pytest.raises(InputError, match="--device tpu is not supported for training"):
        training_run.train_recipe(path, output=tmp_path / "run", device="tpu")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    forward = Toy.forward

    def broken(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        return outputs | {"loss": outputs["loss"] * (float("nan") if self.seen > 3 else 1)}

    monkeypatch.setattr(Toy, "forward", broken)
    with pytest.raises(InputError, match="became nan by step 4.*checkpoint is .*checkpoint-2"):
        training_run.train_recipe(write_recipe(tmp_path), output=tmp_path / "run", device="cpu")


def test_activations_are_computed_again_to_the_same_gradients():
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).train()
    picture, gradients, kept = torch.randn(1, 3, 32, 32), [], []
    for again in (False, True):
        if again:
            preflight.recompute_activations(model)
        model.zero_grad()
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(picture).last_hidden_state.square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < 0.7 * kept[0]
