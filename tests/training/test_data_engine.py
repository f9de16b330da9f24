"""SAM's data engine on a small scale: corrections in the demo become training data and a better model.

The commands and snippets are those of adapters/README.md, run as they stand.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scene import Session, Sliders

import ovsam
import ovsam_cli
from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.scenes.words import all_words
from ovsam.evaluation.compare import DECISIVE
from ovsam.ops.masks import mask_overlap
from ovsam.results.formats import write_coco
from ovsam.results.results import Results
from ovsam.training.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "adapters" / "README.md").read_text(encoding="utf-8")
WORDS = ("garlic", "lotion bottle", "oyster", "ring buoy")  # novel: ovsam-tiny was trained on none of them
SEED = 900_000  # no recipe's
PICTURES = 4
SCENE = SceneConfig(min_objects=4, max_objects=5, min_size=70.0, max_size=180.0)
# Of the recipe everything is kept but its length: no rehearsal, and few steps of a high rate.
SHORT = "--steps 12 --device cpu --set rehearsal.share=0 --set optim.batch_size=2 --set optim.warmup_steps=2"
SHORT += " --set optim.learning_rate=1e-3 --set stage_args.prompts=5 --set data.flip=false --set data.crop=1.0"


def snippet(name):
    return re.search(rf"<!-- snippet: {name} -->\n```\w*\n(.*?)```", README, re.S).group(1)


def correct(segmenter, path, truth, names, downloads):
    """The actions of a user: find everything, rename objects, delete false instances, box what was
    missed, download. Masks stay as the model gave them.

    truth: the true masks [n, H, W]; names: the true n names. Returns the names that the model itself had given.
    """
    session = Session(downloads / path.stem)
    upload, encoded = session.receive(path), segmenter.encode(path)
    found = segmenter.everything(encoded)
    scene = session.scene.find(found, "everything")
    overlap = mask_overlap(torch.as_tensor(found.masks), torch.as_tensor(truth)).numpy()  # [n found, n true]
    wrong, missed = [], set(range(len(names)))
    for (key, one), row in zip(scene.answers[0].items(), overlap, strict=True):
        best = int(row.argmax())
        if best in missed and row[best] > 0.6:
            missed.remove(best)
            scene = scene.edit(key, label=names[best])
            wrong.append(one.label)
        else:
            scene = scene.delete(key)
    for best in missed:
        ys, xs = np.nonzero(truth[best])
        key, drawn = scene.box(tuple(map(float, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))))
        answer = segmenter.what(encoded, **drawn.arguments())[0]
        scene = scene.keep(key, type(drawn)(box=drawn.box, instance=answer)).edit(key, label=names[best])
        wrong.append(answer.label)
    session.answer(upload, segmenter.name, lambda _: scene)
    files.coco(session.shown(Sliders()), path, downloads)
    return wrong


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """A folder with pictures/, corrections/ (one json a picture, as the demo gives them), corrected.json, and
    truth.json, which holds what was drawn."""
    folder = tmp_path_factory.mktemp("data-engine")
    for name in ("hub", "adapters", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "pictures").mkdir()
    (folder / "corrections").mkdir()
    names = [word.name for word in all_words()]
    word_ids = np.array([names.index(word) for word in WORDS])
    assert all(all_words()[i].split == "novel" for i in word_ids)
    segmenter, given, drawn = ovsam.load("ovsam-tiny", device="cpu"), [], []
    for index in range(PICTURES):
        scene = draw_scene(SEED, index, word_ids, SCENE)
        path = folder / "pictures" / f"{index}.jpg"
        scene.image.save(path, quality=92)
        truth = np.stack([scene.index_map == i + 1 for i in range(len(scene.word_ids))])  # [n, H, W]
        labels = [names[i] for i in scene.word_ids]
        given += correct(segmenter, path, truth, labels, folder / "corrections")
        ones = [1.0] * len(labels)
        label_ids = [WORDS.index(label) for label in labels]
        drawn.append(
            Results.from_arrays(truth, labels, label_ids, ones, ones, labels, source="mask", file_name=path.name)
        )
    assert not set(given) & set(WORDS)  # it knew none of them
    write_coco(drawn, folder / "truth.json", labels=WORDS)
    subprocess.run([sys.executable, "-c", snippet("merge")], cwd=folder, check=True)
    return folder


@pytest.mark.weights
@pytest.mark.slow
def test_corrections_from_the_demo_make_a_better_model(corrected, monkeypatch, capfd):
    merged = json.loads((corrected / "corrected.json").read_text(encoding="utf-8"))
    truth = json.loads((corrected / "truth.json").read_text(encoding="utf-8"))
    assert {category["name"] for category in merged["categories"]} == set(WORDS)
    assert [image["file_name"] for image in merged["images"]] == [image["file_name"] for image in truth["images"]]
    # Corrected by the user: each object is there once.
    assert per_picture(merged) == per_picture(truth)

    monkeypatch.chdir(corrected)
    train, compare, use = (shlex.split(line)[1:] for line in snippet("finetune").strip().splitlines())
    assert ovsam_cli.main([*train, *shlex.split(SHORT)]) == 0
    assert f"coco: {PICTURES} images, {len(truth['annotations'])} instances of 4 words" in capfd.readouterr().out
    on_truth = [part.replace("corrected", "truth") for part in compare]
    assert ovsam_cli.main([*on_truth, "--device", "cpu", "--json", "figures.json"]) == 0  # 1: it is no better
    assert "The tuned model beats the base" in capfd.readouterr().out
    before, after = json.loads(Path("figures.json").read_text()).values()
    for figure in DECISIVE:
        assert after[figure] > before[figure] + 0.2, figure
    assert ovsam_cli.main([*use, "--device", "cpu"]) == 0
    found = capfd.readouterr().out  # of the two words that it asks for, of which it may miss one
    assert ("garlic" in found or "oyster" in found) and Path("found.png").stat().st_size > 1000


def per_picture(coco):
    names = {category["id"]: category["name"] for category in coco["categories"]}
    return sorted((one["image_id"], names[one["category_id"]]) for one in coco["annotations"])


@pytest.mark.weights
@pytest.mark.slow
def test_the_readme_builds_and_trains_a_custom_adapter(corrected):
    # In the first step of a warm-up nothing moves.
    shorter = """
import ovsam.training.engine as run
whole_run = run.train_recipe
def train_recipe(*given, settings, **named):
    settings = [*settings, "rehearsal.share=0", "optim.batch_size=1"]
    return whole_run(*given, settings=settings, steps=2, device="cpu", **named)
run.train_recipe = train_recipe
"""
    program = shorter + snippet("adapter") + snippet("train-adapter")
    done = subprocess.run([sys.executable, "-c", program], cwd=corrected, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Results(1 " in done.stdout
    before, after = (load_file(corrected / "runs" / name / "model.safetensors") for name in ("own", "own-tuned"))
    learnt = {key for key in after if not torch.equal(after[key].clone(), before[key].clone())}
    assert {"clip2sam.region.detail.weight", "clip2sam.log_scale"} <= learnt
    assert not any(key.startswith("sam.") for key in learnt)


def test_the_tables_list_every_recipe():
    rows = set(re.findall(r"^\| \[?`([\w-]+)`", README, re.M))
    assert {path.parent.name for path in (ROOT / "adapters").glob("*/recipe.toml")} <= rows
    assert set(STAGES) <= rows
