"""A stranger's way: fine-tune a whole model on a COCO json, compare it with its base, calibrate it, and use it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import tiny_model, tiny_processor
from PIL import Image

import ovsam
from ovsam.data import reader_keys
from ovsam.data.words import Word
from ovsam.errors import InputError
from ovsam.evaluation import compare, metrics
from ovsam.evaluation.datasets import open_coco
from ovsam.evaluation.evaluate import measure
from ovsam.ops.scores import calibrated
from ovsam.training import calibrate
from ovsam.training.calibrate import best_f1
from ovsam.training.engine import train_recipe
from ovsam.training.recipe import read_recipe
from ovsam.training.stages import text_embeddings as texts
from ovsam.training.stages.finetune import FinetuneStage

COLOURS = {"cat": (220, 40, 40), "dog": (40, 200, 60), "moon": (60, 60, 230)}
RECIPE = """
stage = "finetune"
seed = 3
[model]
base = {base}
[data]
format = "coco"
annotations = "unused.json"
max_objects = 4
flip = true
[stage_args]
prompts = 4
[rehearsal]
share = {share}
scenes = {{ min_objects = 1, max_objects = 3, min_size = 30.0, max_size = 60.0 }}
[optim]
batch_size = 4
steps = {steps}
learning_rate = 5e-3
warmup_steps = 4
save_steps = {steps}
logging_steps = 10
[eval]
every = {steps}
pictures = 3
data = {{ format = "coco", annotations = {held_out} }}
"""


def write_set(folder, pictures, seed):
    """Coloured squares on grey: each colour is a word. COCO as an annotator writes it, with polygons."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    folder.mkdir(parents=True)
    for number in range(pictures):
        pixels = np.full((128, 128, 3), rng.integers(90, 160), np.uint8)
        for column, place in enumerate(rng.permutation(3)[: rng.integers(2, 4)].tolist()):
            name, side = list(COLOURS)[place], int(rng.integers(26, 38))
            x, y = 2 + 42 * column, int(rng.integers(2, 80))
            pixels[y : y + side, x : x + side] = COLOURS[name]
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            fixed = {"id": len(annotations) + 1, "image_id": number, "category_id": place + 1}
            annotations.append({**fixed, "segmentation": [corners]})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 128, "height": 128})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(COLOURS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def base(folder):
    model = tiny_model()
    model.config.vocabulary = ["tree", "cat"]
    model.config.clip2sam_config.trained_words = ["tree"]
    model.config.clip2sam_config.clip_scale = 1.0  # a random tower names at random: it must not decide
    model.save_pretrained(folder / "base")
    tiny_processor().save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def data(folder):
    return write_set(folder / "train", 12, seed=1), write_set(folder / "held-out", 6, seed=2)


@pytest.fixture(scope="module")
def tuned(folder, base, data):
    numbers = {"base": json.dumps(str(base)), "held_out": json.dumps(str(data[1])), "steps": 60, "share": 0.0}
    (folder / "recipe.toml").write_text(RECIPE.format(**numbers))
    output = folder / "tuned"
    return train_recipe(folder / "recipe.toml", output=output, data=data[0], images=data[0].parent, device="cpu")


@pytest.mark.slow
def test_the_tuned_model_beats_its_base_on_held_out_images(base, tuned, data, capsys):
    assert compare.run_compare(base, tuned, data=data[1], device="cpu")
    printed = capsys.readouterr().out
    assert "The tuned model beats the base" in printed and "box: mean IoU" in printed
    figures = measure(ovsam.load(tuned), open_coco(data[1]), data[1].parent)
    assert figures["name (box): top-1"] > 0.8
    assert not compare.run_compare(tuned, tuned, data=data[1], limit=2, device="cpu")


@pytest.mark.slow
def test_the_output_is_a_whole_model_and_its_adapters(base, tuned):
    whole, before = ovsam.OVSamModel.from_pretrained(tuned), ovsam.OVSamModel.from_pretrained(base)
    changed = {name.split(".")[0] for name, t in whole.state_dict().items() if not t.equal(before.state_dict()[name])}
    assert changed == {"clip2sam", "concepts"}
    assert whole.config.vocabulary == ["cat", "dog", "moon", "tree"]  # the new words, and the old ones
    assert whole.config.clip2sam_config.trained_words == ["cat", "dog", "moon", "tree"]
    for name, kind in (("clip2sam", ovsam.Clip2SamAdapter), ("concepts", ovsam.ConceptHead)):
        adapter = kind.from_pretrained(tuned / name)
        for key, tensor in adapter.state_dict().items():
            assert tensor.equal(getattr(whole, name).state_dict()[key]), key
    found = ovsam.load(tuned).where(Image.open(tuned.parent / "held-out" / "0.png"), ["cat", "dog"])
    assert {one.label for one in found} <= {"cat", "dog"}


@pytest.mark.slow
def test_curves_and_samples_are_drawn(tuned):
    with Image.open(tuned / "samples.png") as sheet:
        assert sheet.size == (2 * (2 * 384 + 6) + 18, 2 * 384 + 6)  # three pairs, two a row
        assert len(sheet.convert("RGB").getcolors(2**24)) > 50
    with Image.open(tuned / "curves.png") as curves:
        assert curves.width > 1000


@pytest.mark.slow
def test_a_table_of_rehearsal_mixes_in_a_quarter(folder, base, data, capsys):
    """The small CLIP tower can be trained too; the text tower does not change."""
    numbers = {"base": json.dumps(str(base)), "held_out": json.dumps(str(data[1])), "steps": 2, "share": 0.5}
    text = RECIPE.format(**numbers).replace("share = 0.5\n", "")
    text = text.replace("prompts = 4", "prompts = 4\ntrain_clip = true")
    (folder / "rehearsal.toml").write_text(text)
    output = train_recipe(
        folder / "rehearsal.toml", output=folder / "both", data=data[0], images=data[0].parent, device="cpu"
    )
    assert "rehearsal: 25% of the samples" in capsys.readouterr().out
    after, before = (ovsam.OVSamModel.from_pretrained(path).state_dict() for path in (output, base))
    changed = {name.rsplit(".", 1)[0] for name in after if not after[name].equal(before[name])}
    assert any(name.startswith("clip.vision_model") for name in changed)
    assert not any(name.startswith(("clip.text_model", "sam.")) for name in changed)


@pytest.mark.slow
def test_calibration_chooses_thresholds_and_writes_a_whole_model(folder, tuned, data):
    (folder / "calibrate.toml").write_text(
        f'stage = "calibrate"\nseed = 1\n[model]\nbase = {json.dumps(str(tuned))}\n'
        f'[stage_args]\npictures = 4\nabsent = 0.1\n[data]\nformat = "coco"\nannotations = {json.dumps(str(data[1]))}\n'
    )
    output = train_recipe(folder / "calibrate.toml", output=folder / "calibrated", device="cpu")
    thresholds = json.loads((output / "thresholds.json").read_text())
    config = ovsam.OVSamModel.from_pretrained(output).config
    assert {name: getattr(config, name) for name in thresholds} == thresholds
    assert 0 < thresholds["proposal_threshold"] < thresholds["score_threshold"] < 1
    assert thresholds["score_calibration"] != [1, 0] != thresholds["name_calibration"]
    with pytest.raises(InputError, match="already holds a model"):
        train_recipe(folder / "calibrate.toml", output=output, device="cpu")


def test_temperature_and_shift_are_those_the_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(40_000, generator=generator) * 2 - 1
    own = torch.rand(len(cosine), generator=generator) < torch.sigmoid(9.0 * (cosine - 0.0))
    pairs = calibrate.Pairs()
    words = torch.eye(1)  # one word: an embedding is its cosine
    pairs.add(cosine[:, None], torch.tensor(6.0), torch.tensor(-0.2), words, own[:, None])
    factor, shift = calibrate._fit(pairs, "test")
    assert factor == pytest.approx(1.5, abs=0.05) and shift == pytest.approx(0.2, abs=0.02)


def test_calibration_is_written_into_the_heads(base, data):
    segmenter, other = ovsam.load(base, device="cpu"), ovsam.load(base, device="cpu")
    fitted = {"names of masks": (1.3, 0.1), "text queries of locations": (0.7, -0.05)}
    source = calibrate.read_data({"format": "coco", "annotations": str(data[0])}, 0, 1, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_fit", lambda pairs, title: fitted[title])
        calibrate.calibrate(other, source, seed=0, pictures=2, absent=0.5)
    image = Image.open(data[0].parent / "0.png")
    before, after = segmenter.encode(image).features.concepts, other.encode(image).features.concepts
    torch.testing.assert_close(after.logit_scale, 0.7 * before.logit_scale)
    torch.testing.assert_close(after.logit_shift, before.logit_shift - 0.05)
    torch.testing.assert_close(other.model.clip2sam.log_scale.exp(), 1.3 * segmenter.model.clip2sam.log_scale.exp())
    torch.testing.assert_close(other.model.clip2sam.logit_shift, segmenter.model.clip2sam.logit_shift + 0.1)


def test_calibrated_scores_are_probabilities(capsys):
    """Scores that are too low, as a product with objectness is."""
    rng = np.random.default_rng(0)
    truth = rng.random(20_000)
    right = rng.random(len(truth)) < truth
    scores = calibrated(torch.tensor(truth), (0.25, -0.8))
    found = calibrate._platt(list(zip(scores.tolist(), right.tolist(), strict=True)), "test")
    assert found == pytest.approx([4.0, 3.2], abs=0.2)
    assert metrics.calibration_error(scores, right) > 0.1
    assert metrics.calibration_error(calibrated(scores, found), right) < 0.02
    scale, shift = calibrate._platt([(0.2, False), (0.3, False), (0.8, True)], "separable")
    assert 0 < scale <= np.exp(calibrate.LIMIT) + 0.01 and np.isfinite(shift)


def test_calibrated_scores_keep_logits_and_order(base, data):
    segmenter, other = ovsam.load(base, device="cpu"), ovsam.load(base, device="cpu")
    other.model.config.score_calibration, other.model.config.name_calibration = [3.0, 1.0], [2.0, -1.0]
    image = Image.open(data[0].parent / "0.png")
    _, embeds = segmenter.embed(list(COLOURS))
    features = segmenter.encode(image).features
    box = torch.tensor([[[2.0, 2.0, 40.0, 40.0]]])
    for question, pair in (
        ({"proposal_threshold": 0.0}, (3.0, 1.0)),
        ({"proposal_threshold": 0.0, "everything": True}, (2.0, -1.0)),
        ({"input_boxes": box}, (2.0, -1.0)),
    ):
        before, after = (s.model(features=features, text_embeds=embeds, **question) for s in (segmenter, other))
        torch.testing.assert_close(after.logits, before.logits)
        torch.testing.assert_close(after.scores, calibrated(before.scores, pair))
        assert after.scores.numel() and not torch.equal(after.scores, before.scores)


def test_a_calibration_that_reverses_the_order_raises_an_error(base):
    with pytest.raises(InputError, match="positive scale and a shift"):
        ovsam.OVSamConfig(**ovsam.load(base, device="cpu").model.config.to_dict() | {"name_calibration": (-1.0, 0.0)})


def test_novel_words_are_for_scenes(folder, base, data):
    (folder / "novel.toml").write_text(
        f'stage = "calibrate"\nseed = 1\n[model]\nbase = {json.dumps(str(base))}\n[stage_args]\nnovel = 2\n'
        f'[data]\nformat = "coco"\nannotations = {json.dumps(str(data[1]))}\n'
    )
    with pytest.raises(InputError, match="novel is for emojiscenes"):
        train_recipe(folder / "novel.toml", output=folder / "novel", device="cpu")


def test_models_without_a_trainable_part_raise_an_error(base):
    model = tiny_model(adapters=False)
    none = torch.zeros(2, 0, dtype=torch.bool)
    table = texts.WordTable(torch.eye(2, 32), torch.zeros(0, 32), none, torch.tensor([True, True]))
    with pytest.raises(InputError, match="nothing to fine-tune"):
        FinetuneStage(table, model)
    with pytest.raises(InputError, match="train_clip needs a CLIP side with a text tower"):
        FinetuneStage(table, tiny_model(clip="convnext"), train_clip=True)


def test_a_model_of_one_backbone_is_trained_on_the_pixels_of_inference():
    none = torch.zeros(1, 0, dtype=torch.bool)
    table = texts.WordTable(torch.eye(1, 32), torch.zeros(0, 32), none, torch.tensor([True]))
    model = tiny_model("clip")
    model.clip.image_mean, model.clip.image_std = (0.25,) * 3, (0.5,) * 3
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert FinetuneStage(table, model).pixels(white).unique().tolist() == [1.5]
    assert len(FinetuneStage(table, tiny_model()).pixels(white).unique()) == 3  # ImageNet's, of SAM and CLIP


def test_a_word_table_counts_base_words_keywords_only():
    words = [Word("", "cat", ("pet", "dog"), "base"), Word("", "dog", ("pet",), "base")]
    words.append(Word("", "cup", ("tea",), "novel"))
    asked = []
    table = texts.word_table(words, lambda texts: asked.extend(texts) or torch.eye(len(texts), 8))
    assert asked == ["cat", "dog", "cup", "pet"]  # dog is a name, and tea is of a novel word alone
    assert table.has_keyword.tolist() == [[True], [True], [False]] and table.is_base.tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["finetune", "calibrate-tiny"])
def test_recipes_that_start_from_a_whole_model_have_known_options(name):
    recipe = read_recipe(Path(__file__).parents[2] / "adapters" / name / "recipe.toml")
    accepted = reader_keys(recipe["data"].get("format", "emojiscenes"))
    assert recipe["data"].keys() - {"format"} <= accepted.keys()
    assert "rehearsal" not in recipe  # unless its table is there


def test_the_threshold_with_the_best_f1():
    found = [(0.9, True), (0.2, False), (0.8, False), (0.7, True)]
    assert best_f1(found, objects=2) == (pytest.approx(0.8), 0.7)  # two of three right, both objects found
    assert best_f1(found, objects=10) == (pytest.approx(4 / 13), 0.7)
    assert best_f1([], objects=3) == (0.0, 0.0)
