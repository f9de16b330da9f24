"""The pieces of benchmarks/reproduce_paper.py, and the training stages that it needs."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import CHANNELS, SIZE, C, D, randomise, tiny_config
from safetensors.torch import save_file
from torch import nn

from ovsam.checkpoints.text_tower import embed_texts
from ovsam.data import SceneDataset
from ovsam.data.scenes.drawing import SceneConfig
from ovsam.data.scenes.words import all_words
from ovsam.errors import InputError
from ovsam.modeling.clip import DualEncoderConfig, DualEncoderSide
from ovsam.modeling.sam import SAM_SIDES
from ovsam.training.stages.clip import ClipStage, write_caption
from ovsam.training.stages.sam2clip import Sam2ClipStage
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers

ROOT = Path(__file__).resolve().parents[1]
SMALL = SceneConfig(canvas=96, min_objects=2, max_objects=3, min_size=24.0, max_size=40.0)


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("reproduce_paper", ROOT / "research" / "reproduce_paper.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.fixture(scope="module")
def stages(paper):
    return sys.modules["paper.stages"]


def tiny_towers(embed_dim=D) -> Towers:
    torch.manual_seed(0)
    config = tiny_config(adapters=False)
    clip = DualEncoderConfig(**config.clip_config.to_diff_dict() | {"embed_dim": embed_dim})
    return Towers(randomise(SAM_SIDES["edgetam"](config.sam_config)), randomise(DualEncoderSide(clip, part="vision")))


def rectangles() -> dict[str, torch.Tensor]:
    """Two pictures of two coloured rectangles each; four words."""
    image = torch.full((2, 3, SIZE, SIZE), 100, dtype=torch.uint8)
    masks = torch.zeros(2, 2, SIZE, SIZE, dtype=torch.bool)
    word_ids = torch.tensor([[0, 1], [2, 3]])
    for b in range(2):
        for o in range(2):
            masks[b, o, 16 + 56 * o : 56 + 56 * o, 20 : 100 - 20 * b] = True
            image[b, :, masks[b, o]] = torch.tensor([40, 90, 240]).roll(b * 2 + o)[:, None].byte() // (1 + b)
    return {"image": image, "masks": masks, "word_ids": word_ids, "known": torch.ones(2, 4, dtype=torch.bool)}


def descend(stage: nn.Module, batch: dict, steps: int, rate: float = 3e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    losses = []
    for _ in range(steps):
        torch.manual_seed(1)  # the same prompts and captions
        out = stage.train()(**batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    return losses


# ---- words --------------------------------------------------------------------------------------------------------


def test_the_words_are_split_as_the_papers_are(paper):
    words, base = paper.read_words()
    assert len(set(words)) == 65 and len(set(base)) == 48 and set(base) < set(words)
    assert base == [word for word in words if word in base]
    known = {word.name: word for word in all_words()}
    assert all(known[word].split == "base" and len(word.split()) < 3 for word in words)


def test_the_files_of_words_are_what_the_rule_chooses(paper, monkeypatch):
    """With the drawings that the real styles lack left out by hand: all of them are not to be had everywhere."""
    monkeypatch.setattr(paper, "drawable", lambda styles: list(range(len(all_words()))))
    words, novel = paper.choose_words()
    assert len(set(words)) == 65 and len(set(novel)) == 17 and set(novel) < set(words)
    places = [[word.name for word in all_words()].index(word) for word in words]
    assert places == sorted(places) and max(np.diff(places)) < 4 * len(all_words()) / 65
    read, base = paper.read_words()
    assert [word for word in read if word not in base] == [read[k * 65 // 17] for k in range(17)]


def test_scenes_of_a_vocabulary(tmp_path):
    names = ["sunflower", "taco", "ghost"]
    data = SceneDataset(6, 1, SMALL, names)
    assert [word.name for word in data.words] == names
    samples = [data[i] for i in range(6)]
    seen = torch.cat([sample["word_ids"][sample["word_ids"] >= 0] for sample in samples])
    assert set(seen.tolist()) == {0, 1, 2} and samples[0]["known"].shape == (3,)
    # The same scenes, whose words are the same ones under other numbers.
    position = [word.name for word in all_words()]
    ids = sorted(position.index(name) for name in names)
    other = SceneDataset(6, 1, SMALL, [position[i] for i in ids])
    assert [data.words[i].name for i in data[0]["word_ids"] if i >= 0] != [] and len(other.words) == 3
    (tmp_path / "words.txt").write_text("\n".join(names) + "\n")
    read = SceneDataset(6, 1, SMALL, str(tmp_path / "words.txt"))
    assert torch.equal(read[3]["image"], samples[3]["image"])
    assert torch.equal(read[3]["word_ids"], samples[3]["word_ids"])


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (["taco", "no such thing"], "has 'no such thing', which is no base word"),
        ([next(word.name for word in all_words() if word.split == "novel")], "which is no base word"),
        (["taco", "taco"], "each of them once"),
        ([], "at least one name"),
        ("nowhere.txt", "nowhere.txt, which is no file"),
    ],
)
def test_a_wrong_vocabulary_is_refused(vocabulary, message):
    with pytest.raises(InputError, match=message):
        SceneDataset(6, 1, SMALL, vocabulary)


# ---- training -----------------------------------------------------------------------------------------------------


def test_a_caption_names_every_word_once():
    words = ["fork", "cat face", "red apple", "moon"]
    assert write_caption(torch.tensor([1]), words) == "cat face"
    torch.manual_seed(0)
    captions = {write_caption(torch.tensor([0, 2, 0, 1]), words) for _ in range(40)}
    assert len(captions) == 6 and "fork, cat face and red apple" in captions


def test_captions_of_whole_pictures_are_learned():
    table = WordTable(
        embed_texts(["a", "b"]), torch.zeros(0, 384), torch.zeros(2, 0, dtype=torch.bool), torch.ones(2) > 0
    )
    stage = ClipStage(table, tiny_towers(embed_dim=384), pictures="captions")
    names = ["taco", "ghost", "sunflower", "old key"]
    data = SceneDataset(4, 1, SMALL, names)
    assert stage.prepare(data, Path(), "") is data
    batch = rectangles()
    losses = descend(stage, batch, 12)
    assert losses[-1] < 0.5 * losses[0]
    other = ({}, {"masks": batch["masks"].flip(-1)}, {"word_ids": batch["word_ids"].flip(0)})
    before, moved, swapped = (descend(stage, batch | change, 1, rate=0.0) for change in other)
    assert moved == before  # where things are makes no difference, what is there does
    assert swapped[0] > before[0] + 1


def test_captions_need_a_tower_of_our_own():
    with pytest.raises(InputError, match="pictures is 'caption'; it is one of objects, whole, captions"):
        ClipStage(None, tiny_towers(), pictures="caption")


def test_a_learned_prompt_without_context_is_the_name(stages):
    names = ["old key", "cow face", "five-thirty"]
    plain = embed_texts(names)
    assert torch.allclose(stages.LearnedPrompt(0)(names), plain, atol=1e-5)
    torch.manual_seed(0)
    prompt = stages.LearnedPrompt(8)
    learned = prompt(names)
    assert learned.shape == plain.shape and not torch.allclose(learned, plain, atol=1e-2)
    learned.sum().backward()
    assert [name for name, p in prompt.named_parameters() if p.grad is not None] == ["context"]


def tiny_table() -> WordTable:
    names = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    return WordTable(names, torch.zeros(0, D), torch.zeros(4, 0, dtype=torch.bool), torch.ones(4) > 0)


def test_the_label_token_learns_with_its_decoder_and_the_towers_do_not(stages, tmp_path):
    towers = tiny_towers()
    state = Sam2ClipStage(towers, layers=1, heads=8, cache=False).published_state()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "sam2clip.safetensors")
    stage = stages.TokenStage(tiny_table(), towers, str(tmp_path / "sam2clip.safetensors"), prompts=2, points=256)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    losses = descend(stage, rectangles(), 25)
    assert losses[-1] < 0.6 * losses[0]
    changed = {name for name, tensor in stage.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("sam.model.mask_decoder.") for name in changed)
    assert "sam.model.mask_decoder.iou_token.weight" in changed  # the label token
    assert set(stage.published_state()) >= {name.removeprefix("sam.model.mask_decoder.") for name in changed}


def test_fpn_and_roi_align_learn_names_over_frozen_maps(stages):
    stage = stages.RoiStage(tiny_table(), tiny_towers(), width=16, roi_size=3)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    losses = descend(stage, rectangles(), 30)
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in stage.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("clip2sam.") for name in changed)
    assert set(stage.published_state()) == {name for name, _ in stage.clip2sam.named_parameters()}


def test_the_label_token_becomes_a_class_embedding(stages):
    towers = tiny_towers()
    own = stages.with_label_token(towers.sam, D)
    features = towers.encode_sam(rectangles()["image"])
    boxes = torch.tensor([[[10.0, 10, 60, 60], [20, 20, 100, 90], [5, 5, 20, 20]]] * 2)
    decoded, stock = own.decode(features, input_boxes=boxes), towers.sam.decode(features, input_boxes=boxes)
    embeds = stages.class_embeds(decoded)
    assert embeds.shape == (2, 3, D) and torch.allclose(embeds.norm(dim=-1), torch.ones(2, 3), atol=1e-5)
    assert torch.allclose(decoded.masks, stock.masks, atol=1e-5)  # it starts as the IoU token, and changes no mask
    assert stock.iou.shape == (2, 3, 4) and not any(p.requires_grad for p in towers.parameters())


# ---- measuring ----------------------------------------------------------------------------------------------------


def test_crops_are_squares_around_their_boxes_and_inside_the_picture(paper):
    boxes = torch.tensor(
        [[100.0, 200, 140, 300], [0, 0, 50, 20], [480, 470, 511, 511], [0, 0, 0, 0], [0, 10, 512, 500]]
    )
    x, y, side = paper.crop_boxes(boxes, 512).unbind(1)
    assert side.tolist() == [125, 63, 52, 8, 512]
    assert (x >= 0).all() and (y >= 0).all() and (x + side <= 512).all() and (y + side <= 512).all()
    assert (x <= boxes[:, 0]).all() and (y <= boxes[:, 1]).all()
    assert (x + side >= boxes[:, 2]).all() and (y + side >= boxes[:, 3]).all()
    assert (x[0], y[0]) == (58, 188)  # centred


def test_prompts_are_the_papers(paper):
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:31, 20:61] = True
    masks[1, 40:45, 3:8] = True
    prompts = paper.true_prompts(masks)
    x, y = prompts["point"]["input_points"][0, 0, 0].tolist()
    assert y == 20 and 30 <= x <= 50  # ten pixels inside
    assert prompts["point"]["input_points"][0, 1, 0].tolist() == [5, 42]
    assert prompts["box"]["input_boxes"][0, 1, :2].tolist() == [3, 40]


def test_iou_and_figures_by_hand(paper):
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[0, :16], truth[1, :, :16] = True, True
    logits = torch.full((2, 8, 8), -5.0)
    logits[0, :4], logits[1, :2] = 5.0, 5.0
    found = paper.instance_iou(logits, truth)
    assert found[0] == 1 and found[1] == pytest.approx(8 * 16 / (32 * 16 + 8 * 32 - 8 * 16), abs=1e-6)
    rows = torch.tensor([[0.5, 1, 0], [0.7, 0, 0], [0.9, 1, 1]])
    wanted = {"iou_base": 60.0, "iou_novel": 90.0, "acc": 66.67, "acc_base": 50.0, "acc_novel": 100.0, "instances": 3}
    assert paper.figures(rows) == wanted


def test_parts_over_other_weights_are_not_mixed(paper, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(paper, "train_recipe", lambda path, output, **kwargs: trained.append(output.name))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vision_model.safetensors").write_text(name)
    paper.train(tmp_path / "one", tmp_path / "runs")
    assert trained[0] == "clip" and set(trained[1:]) == {
        f"{stage}-{tower}" for stage in ("sam2clip", "coop", "token", "roi") for tower in ("captions", "crops")
    }
    (tmp_path / "runs" / "clip").mkdir()
    (tmp_path / "runs" / "clip" / "model.safetensors").touch()
    paper.train(tmp_path / "one", tmp_path / "runs")
    assert trained.count("clip") == 1 and trained.count("roi-crops") == 2
    with pytest.raises(SystemExit, match="trained over other weights"):
        paper.train(tmp_path / "two", tmp_path / "runs")


def made_up(paper, acc: float) -> dict:
    numbers = {"iou_base": 71.04, "iou_novel": 72.0, "acc": acc, "acc_base": 45.0, "acc_novel": 35.0, "instances": 9}
    figures = {row: numbers | {"acc": acc + 5 * i} for i, row in enumerate(paper.ROWS | paper.CHECKS)}
    cost = {row: {"parameters": 3.0, "gflops": 6.0 - i, "ms": 12.3} for i, row in enumerate(paper.ROWS)}
    return {"box": figures, "point": figures, "costs": cost}


def test_the_report_says_what_was_measured(paper, tmp_path):
    results = {"captions": made_up(paper, 40.0), "crops": made_up(paper, 50.0), "pictures": 3, "weights": "abc"}
    text = paper.report(results)
    assert text.count("| image-crop |") == 3  # two towers, and the paper's own
    assert (
        "| feature-crop | 71.0 / 72.0 | 45.0 (45.0 / 35.0) | 71.0 / 72.0 | 45.0 (45.0 / 35.0) | 3.0 | 5.0 | 12 |"
        in text
    )
    assert "+20.0 by box and +20.0 by point. FLOPs of feature-crop / whole: 5.00." in text
    assert "of feature-crop under the true masks: 70.0 and 70.0, of FPN" in text
    assert "+29.2 by box and +44.6 by point" in text
    path = tmp_path / "document.md"
    path.write_text(f"before\n{paper.START}old\n{paper.END}after\n")
    paper.write(text, path)
    once = path.read_text()
    paper.write(text, path)
    assert path.read_text() == once and once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    assert text in once
    path.write_text("no place")
    with pytest.raises(SystemExit, match="has no place"):
        paper.write(text, path)


def test_channels_of_the_tiny_tower():
    assert list(tiny_towers().channels) == CHANNELS["dual_encoder"] and tiny_towers().sam.width == C
