"""The command line with a stub of the model: questions, outputs, and errors before loading."""

import errno
import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT
from PIL import Image
from pycocotools.coco import COCO

import ovsam
import ovsam_cli
from ovsam.errors import InputError
from ovsam.inference import options
from ovsam.results.results import Results


class FakeSegmenter:
    """Returns the upper half of any image, and records the questions."""

    def __init__(self):
        self.asked = []

    def _find(self, image, label, source):
        mask = np.zeros((1, image.height, image.width), bool)
        mask[:, : image.height // 2] = True
        return Results.from_arrays(mask, [label], [0], [0.75], [0.5], [label], source, model="fake")

    def where(self, image, words, negative=(), threshold=None, **how):
        self.how = how
        self.asked.append(("where", words.prompts, list(negative), threshold))
        return self._find(image, words.labels[0], "text")

    def what(self, image, points=None, labels=None, boxes=None, vocabulary=None):
        self.asked.append(("what", points, labels, boxes, vocabulary and vocabulary.prompts))
        return self._find(image, "thing", "point")

    def everything(self, image, vocabulary=None, threshold=None, **how):
        self.how = how
        self.asked.append(("everything", vocabulary and len(vocabulary.prompts), threshold))
        return self._find(image, "thing", "auto")[:0]


DATA = {
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 30, 1, 30, 30]]}],
}
TSV_HEADER = "image\tlabel\tscore\tmask_score\tx1\ty1\tx2\ty2\tarea\n"


@pytest.fixture
def loaded(monkeypatch):
    """The segmenters that were loaded, with the arguments of each."""
    loads = []

    def load(model="auto", device=None, dtype=None):
        loads.append((FakeSegmenter(), model, device))
        return loads[-1][0]

    monkeypatch.setattr(ovsam, "load", load, raising=False)
    return loads


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images a.png and b.jpg of 64x48 and three broken ones, as the current directory."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (10, 90, 50)).save("a.png")
    Image.new("RGB", (64, 48), (90, 10, 50)).save("b.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-20])
    Image.new("RGB", (1, 1)).save("dot.png")
    (tmp_path / "words.txt").write_text("dog\ncat\n")
    (tmp_path / "out").mkdir()
    return tmp_path


def run(command):
    try:
        return ovsam_cli.main(command.split() if isinstance(command, str) else command)
    except SystemExit as stop:  # argparse's own way out
        return stop.code


def test_words(folder, loaded, capsys):
    assert run(["segment", "a.png", "--text", "dog", "red ball", "--not", "cat", "--threshold", "0.3"]) == 0
    ((segmenter, model, device),) = loaded
    assert (model, device) == ("auto", None) and segmenter.asked == [("where", ["dog", "red ball"], ["cat"], 0.3)]
    out, err = capsys.readouterr()
    assert out == TSV_HEADER + "a.png\tdog\t0.7500\t0.5000\t0\t0\t64\t24\t1536\n"
    assert err == "a.png: 1 found (fake)\n"


def test_a_terminal_shows_a_table_for_people(folder, loaded, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("segment a.png --text dog") == 0
    assert capsys.readouterr().out.splitlines() == [
        "a.png: 1 found (fake)",
        "label  score  mask score        box  area",
        "dog     0.75        0.50  0,0,64,24  1536",
    ]


def test_overlay_and_json(folder, loaded, capsys):
    assert run("segment a.png --text dog cat -o out.png --json found.json --model photo --device cpu") == 0
    assert loaded[0][1:] == ("photo", "cpu")
    assert capsys.readouterr().err.splitlines()[-2:] == ["overlay: out.png", "json: found.json"]
    with Image.open("out.png") as overlay:
        assert overlay.size == (5 * 64, 5 * 48)  # enlarged, so that names can be read
        assert overlay.getpixel((300, 230)) == (10, 90, 50) != overlay.getpixel((300, 60))
    coco = COCO("found.json")
    assert [category["name"] for category in coco.cats.values()] == ["dog", "cat"]
    assert coco.imgs[1]["file_name"] == "a.png" and coco.dataset["info"]["model"] == "fake"
    assert coco.annToMask(coco.anns[1]).sum() == coco.anns[1]["area"] == 64 * 24


def test_clicks_boxes_everything(folder, loaded, capsys):
    assert run("segment a.png --point 5,6 --point 9.5,7,0 --vocabulary words.txt") == 0
    assert run("segment a.png b.jpg --box 1,2,30,40 --box 0,0,64,48") == 0
    assert run("segment a.png --point 5,6,0 --box 1,2,30,40") == 0
    assert run("segment a.png --everything --vocabulary coco --threshold 0.5") == 0
    asked = [question for segmenter, *_ in loaded for question in segmenter.asked]
    assert asked == [
        ("what", [[5, 6], [9.5, 7]], [1, 0], None, ["dog", "cat"]),
        ("what", None, None, [[1, 2, 30, 40], [0, 0, 64, 48]], None),
        ("what", None, None, [[1, 2, 30, 40], [0, 0, 64, 48]], None),
        ("what", [[5, 6]], [0], [[1, 2, 30, 40]], None),
        ("everything", 80, 0.5),
    ]
    assert len(loaded) == 4  # once a command, not once an image
    assert "a.png: 0 found (fake)" in capsys.readouterr().err


def test_a_broken_image_does_not_stop_the_others(folder, loaded, capsys):
    (folder / "out" / "sub").mkdir()
    Image.new("RGB", (64, 48)).save("out/sub/a.jpg")
    pictures = ["a.png", "text.png", "out/sub/a.jpg", "missing.png", "b.jpg"]
    assert run(["segment", *pictures, "--text", "dog", "-o", "out", "--json", "all.json"]) == 1
    out, err = capsys.readouterr()
    errors = [line.split()[2] for line in err.splitlines() if line.startswith("ovsam: error")]
    assert errors == ["text.png", "missing.png"]
    assert out.count("dog") == err.count("1 found") == 3 and len(loaded[0][0].asked) == 3
    written = sorted(path.name for path in (folder / "out").glob("*.png"))
    assert written == ["a-ovsam-2.png", "a-ovsam.png", "b-ovsam.png"]
    images = json.loads((folder / "all.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "out/sub/a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("segment missing.png --text dog", "missing.png does not exist"),
        ("segment text.png --text dog", "text.png is not an image"),
        ("segment empty.png --text dog", "empty.png is empty"),
        ("segment cut.jpg --text dog", "cut.jpg cannot be read"),
        ("segment dot.png --text dog", "dot.png is 1x1 pixels"),
        ("segment a.png --point 64,5", "point 64,5 is outside a.png, which is 64x48 pixels"),
        ("segment a.png --point -1,5", "point -1,5 is outside"),
        ("segment a.png --point nan,5", "'nan,5' is not X,Y"),
        ("segment a.png --point 5", "'5' is not X,Y"),
        ("segment a.png --point 5,5,2", "'5,5,2' is not X,Y"),
        ("segment a.png --point 5,5,0", "at least one must be on it"),
        ("segment a.png --point", "expected one argument"),
        ("segment a.png --box 30,5,10,20", "box 30,5,10,20 is reversed"),
        ("segment a.png --box 3,5,3,20", "box 3,5,3,20 is reversed or empty"),
        ("segment a.png --box nan,5,3,20", "is reversed or empty"),
        ("segment a.png --box 3,5,65,20", "box 3,5,65,20 is not inside a.png"),
        ("segment a.png --box 3,5,20", "'3,5,20' is not X1,Y1,X2,Y2"),
        (["segment", "a.png", "--text", " "], "empty"),
        ("segment --text dog a.png", "--text took a.png for a text query"),
        ("segment a.png --text dog --tile 8", "argument --tile: 8 is too small"),
        ("segment a.png --text dog --format yolo", "--format yolo needs -o"),
        ("segment a.png --text dog --format yolo -o -", "writes several files; name a folder"),
        ("segment a.png --text dog --json - -o -", "would both write to stdout"),
        ("segment @missing.txt --text dog", "There is no list of images at missing.txt"),
        ("segment *.webp --text dog", "There is no file like *.webp"),
        ("segment out --text dog", "out is a folder without images"),
        ("segment a.png --exemplar 3,5,3,20", "is reversed or empty"),
        ("segment a.png --box 3,5,20,20 --max 3", "--max needs --text or --everything"),
        (["segment", "a.png", "--text", "dog", "--not", ""], "empty"),
        (["segment", "a.png", "--text", "dog " * 500], "has 500 words"),
        ("segment a.png --text dog --not dog", "'dog' is in --text and in --not"),
        ("segment a.png --everything --not dog", "--not needs --text"),
        ("segment a.png --everything --vocabulary nonsense", "nonsense"),
        ("segment a.png --text dog --vocabulary coco", "--text already gives the text queries"),
        ("segment a.png", "There is no question"),
        ("segment a.png --vocabulary coco", "There is no question"),
        ("segment a.png --point 5,5 --everything", "give one of them"),
        ("segment a.png --text dog --box 1,1,9,9", "give one of them"),
        ("segment a.png --point 5,5 --box 1,1,9,9 --box 2,2,9,9", "at most one --box"),
        ("segment a.png --point 5,5 --threshold 0.5", "--threshold needs"),
        ("segment a.png --text dog --objectness 0.5", "--objectness needs --everything"),
        ("segment a.png --text dog --threshold 1.5", "'1.5' is not a number from 0 to 1"),
        ("segment a.png --text dog -o a.png/out.png", "a part of the path is a file"),
        ("segment a.png --text dog -o nowhere", "neither an image file"),
        ("segment a.png --text dog -o a.png", "is the image itself"),
        ("segment a.png b.jpg --text dog -o text.png", "a part of the path is a file"),
        ("segment a.png --text dog --json a.png/out.json", "a part of the path is a file"),
        (["segment", "a.png", "--text", "dog", "--json", "j" * 300 + ".json"], "the name is too long"),
        ("segment a.png --text dog --json out", "--json out is a folder"),
        ("segment --text dog", "IMAGE"),
        ("segment a.png --texts dog", "--texts"),
        ("dance", "'dance'"),
        ("segmnt a.png", "did you mean `segment`?"),
        ("demo --port 99999", "it must be a number from 1 to 65535"),
        ("label-studio --port 99999", "it must be a number from 1 to 65535"),
        ("train recipe.toml --steps 0", "'0' is not a whole number above 0"),
        ("segment a.png --text dog --batch " + "9" * 5000, "is not a whole number above 0"),
        (["segment", "a.png", "--text", "dog", "-o", ""], "The argument -o/--output is empty"),
        (["segment", "a.png", "--everything", "--vocabulary", ""], "The argument --vocabulary is empty"),
        ("segment @/dev/zero --text dog", "There is no list of images at /dev/zero"),
        ("segment a.png --text dog --json /proc/found.json", "/proc/found.json cannot be written"),
    ],
)
def test_errors_are_one_line_before_a_model_is_loaded(folder, loaded, capsys, command, message):
    before = sorted(folder.rglob("*"))
    assert run(command) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ovsam: error: ") and message in err and err.count("\n") == 1
    assert not loaded and not out and sorted(folder.rglob("*")) == before


def test_an_error_of_loading_is_one_line(folder, monkeypatch, capsys):
    def load(model, device, dtype):
        raise InputError(f"The model {model!r} is damaged.")

    monkeypatch.setattr(ovsam, "load", load, raising=False)
    assert run("segment a.png --text dog --model photo") == 2
    assert capsys.readouterr().err == "ovsam: error: The model 'photo' is damaged.\n"


def test_eval_and_train_hand_over(monkeypatch, capsys, tmp_path):
    calls, here = [], str(tmp_path)
    for module, function in (("ovsam.evaluation.evaluate", "run_eval"), ("ovsam.training.engine", "train_recipe")):
        stand_in = type(sys)(module)
        setattr(stand_in, function, lambda *arguments, **named: calls.append((arguments, named)))
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for image in ("a.png", "pictures/a.png"):
        (tmp_path / image).touch()
    for name in ("annotations.json", "coco.json"):
        (tmp_path / name).write_text(json.dumps(DATA))
    assert run(f"eval {here} --json figures.json --limit 5 --task words --absent all") == 0
    more = "--data coco.json --images pictures --set optim.workers=2"
    recipe = ROOT / "adapters" / "finetune" / "recipe.toml"
    assert run(f"train {recipe} --resume --steps 7 --output there --device cpu {more}") == 0
    assert calls == [
        (
            (here,),
            {
                "model": "ovsam-tiny",
                "tasks": ["words"],
                "images": None,
                "output": None,
                "json_path": "figures.json",
                "limit": 5,
                "absent": None,
                "baselines": True,
                "device": None,
            },
        ),
        (
            (str(recipe),),
            {
                "output": "there",
                "resume": True,
                "steps": 7,
                "device": "cpu",
                "data": ["coco.json"],
                "images": ["pictures"],
                "settings": ["optim.workers=2"],
            },
        ),
    ]


def test_compare_fails_unless_the_tuned_model_is_better(monkeypatch, tmp_path):
    calls = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("runs/mine/config.json", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "coco.json").write_text(json.dumps(DATA))
    stand_in = type(sys)("ovsam.evaluation.compare")
    stand_in.run_compare = lambda *models, **named: calls.append((models, named)) or len(calls) == 1
    monkeypatch.setitem(sys.modules, "ovsam.evaluation.compare", stand_in)
    assert run("compare ovsam-tiny runs/mine --data coco.json --limit 3") == 0
    assert run("compare ovsam-tiny runs/mine --data coco.json") == 1
    named = {"data": "coco.json", "images": None, "json_path": None, "limit": 3, "device": None}
    assert calls[0] == (("ovsam-tiny", "runs/mine"), named)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["segment", "--help"],
        ["--version"],
        ["segment"],
        ["models"],
        ["segment", "missing.png", "--text", "dog"],
        ["segment", "missing.png", "--text", "dog", "--vocabulary", "nonsense"],
        ["demo", "--port", "99999"],
        ["train", "nothing.toml"],
        ["train", "nothing.toml", "--set", "x"],
        ["train", str(ROOT / "adapters/finetune/recipe.toml")],
        ["train", str(ROOT / "adapters/finetune/recipe.toml"), "--set", "stage=dance"],
        ["eval", str(ROOT / "tests/data/photos-val"), "--images", str(ROOT / "tests/data/readers")],
    ],
)
def test_help_and_errors_do_not_import_torch(arguments):
    """Importing torch and transformers takes seconds, help and mistakes must take none."""
    program = (
        "import sys, ovsam_cli\n"
        "try: ovsam_cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    # Time of the processor, since others may be at work beside this test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


MISTAKES = {
    "segment a.png --text dog --model nope": "There is no model 'nope'",
    "segment a.png --text dog --model out": "'out' lacks config.json",
    "segment a.png --text dog --model org/nope": "the Hub does not respond",
    "segment a.png --text dog --device warp9": "'warp9' is not a device",
    f"segment a.png --text dog --device {'cuda' if sys.platform == 'darwin' else 'mps'}": "cannot be used here",
    "segment a.png --text dog --proposer nope": "There is no proposer 'nope'",
    "segment a.png --text dog --proposer detector:org/nope": "the Hub does not respond",
    "label a.png --text dog -o a.png/labels": "a part of the path is a file",
    "label a.png --text dog -o labels --tile 3": "3 is too small",
    "label --merge out -o labels": "There is no journal in out",
    "eval out": "There is no data set out",
    "eval annotations.json --json out": "--json out is a folder",
    "eval words.txt": "words.txt is not a JSON file",
    "eval labelme.json": "looks like LabelMe's format",
    "eval empty.json": "no annotations or no categories",
    "eval broken.json": "annotations[0].segmentation of broken.json",
    "eval lost.json --images out": "None of the 1 images of lost.json is in out",
    "compare photo nope --data words.txt": "There is no model 'nope'",
    "compare photo photo --data words.txt": "words.txt is not a JSON file",
    "compare photo photo --data annotations.json --json out": "--json out is a folder",
    "compose --sam a --clip b -o new": "'a' is neither a folder nor the id of a model",
    "compose --sam full --clip ovsam-tiny -o full": "full exists already",
    "convert words.txt -o full": "full exists already",
    "convert nope.pt -o new": "nope.pt is not a file",
    "export -o full": "full exists already",
    "export nope -o new": "There is no model 'nope'",
    "push out org/name": "out has no config.json",
    "push full org/name/more": "it must be ORG/NAME",
    "train recipe.toml": "recipe.toml lacks stage",
    "train recipe.toml --data words.txt --images nowhere": "There is no folder nowhere",
    "train good.toml --set stage=dance": "has the stage 'dance'; choose one of clip,",
    "train good.toml --set weights=nothing.safetensors": "starts from nothing.safetensors, which does not exist",
    "train good.toml": "There is no JSON file of annotations at nothing.json",
    "train good.toml --data words.txt --images .": "words.txt is not a JSON file",
    "train good.toml --data annotations.json labelme.json --images .": "looks like LabelMe's format",
    "train good.toml --data annotations.json lost.json --images out": "None of the 1 images of lost.json is in out",
    "train good.toml --set data.format=dance": "[data] has the format 'dance'; choose one of emojiscenes,",
    "train good.toml --set data.images=nowhere": "There is no folder nowhere",
    "video a.png --text dog -o found.txt": "its name must end in .mp4",
    "video words.txt --text dog -o found.mp4": "cannot be read as a video",
    "video a.png --box 0:9,9,3,3 -o found.mp4": "is reversed or empty",
    "video a.png --box 0:9,9,300,300 -o found.mp4": "is not inside the frame",
    "video frames --point 7:9,9 -o found.mp4": "There is no frame 7",
    "video a.png --mask 0:words.txt -o found.mp4": "words.txt cannot be read as a mask",
    "video a.png --box 0:3,3,9,9 --vocabulary nope -o found.mp4": "There is no vocabulary 'nope'",
    f"video {'9' * 5000} --text dog -o found.mp4": "There is no video",
}

RECIPE = """
stage = "finetune"
seed = 1
[model]
base = "ovsam-tiny"
[data]
format = "coco"
annotations = "nothing.json"
[optim]
batch_size = 1
steps = 1
learning_rate = 1e-3
"""


def test_mistakes_of_every_command_are_found_without_torch(folder):
    (folder / "full").mkdir()
    (folder / "full" / "config.json").write_text("{}")
    (folder / "recipe.toml").write_text("seed = 1")
    (folder / "good.toml").write_text(RECIPE)
    for name, content in {
        "annotations.json": DATA,
        "broken.json": DATA | {"annotations": [DATA["annotations"][0] | {"segmentation": 5}]},
        "lost.json": DATA | {"images": [DATA["images"][0] | {"file_name": "lost.png"}]},
        "empty.json": DATA | {"annotations": []},
        "labelme.json": {"shapes": [], "imagePath": "a.png"},
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "frames").mkdir()
    Image.new("RGB", (64, 48)).save("frames/0.png")
    program = (
        "import json, sys, ovsam_cli\n"
        "for command in json.loads(sys.stdin.read()):\n"
        "    try: code = ovsam_cli.main(command.split())\n"
        "    except SystemExit as stop: code = stop.code\n"
        "    print(code, 'torch' in sys.modules, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(list(MISTAKES)),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    errors = done.stderr.splitlines()
    assert done.stdout.split() == ["2", "False"] * len(MISTAKES) and len(errors) == len(MISTAKES)
    for error, message in zip(errors, MISTAKES.values(), strict=True):
        assert error.startswith("ovsam: error: ") and message in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no-such-model", "--text", "cat"], "There is no model 'no-such-model'"),
        (["--device", "warp9", "--text", "cat"], "'warp9' is not a device"),
        (["--device", "cuda:99", "--text", "cat"], "device 'cuda:99' cannot be used here"),
        (["--text", "cat " * 20], "tokens; this model takes at most 12"),
    ],
)
def test_errors_of_the_model_are_one_line(folder, tiny_folder, capsys, arguments, sentence):
    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    assert run(["segment", "a.png", *arguments, *model]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ovsam: error: ") and error.count("\n") == 1 and sentence in error


def test_no_command_prints_the_help(capsys):
    assert run([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ovsam_cli.COMMANDS)


def test_labels_of_one_tool_become_those_of_another(tmp_path, capsys):
    masks = np.zeros((2, 48, 64), bool)
    masks[0, :20, :30], masks[1, 30:, 40:] = True, True
    found = Results.from_arrays(masks, ["cat", "dog"], [0, 1], [0.5, 0.25], [1, 1], ["", ""], "text", file_name="a.png")
    (tmp_path / "found.json").write_text(json.dumps(found.to_coco()))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images/a.png")
    steps = [("found.json", "yolo", "yolo"), ("yolo", "a.xml", "cvat"), ("a.xml", "tasks.json", "label-studio")]
    steps += [("tasks.json", "labelme", "labelme"), ("labelme", "last.json", "coco")]
    for source, target, name in steps:
        command = ["convert-labels", str(tmp_path / source), str(tmp_path / target), "--format", name]
        assert run([*command, "--images", str(tmp_path / "images")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / target}: 1 images, 2 objects, 2 labels\n"
    (again,) = Results.from_coco(tmp_path / "last.json")
    assert again.labels == ["cat", "dog"] and again.scores.tolist() == [0.5, 0.25] and again.file_name == "a.png"
    np.testing.assert_array_equal(again.masks, masks)
    for command, message in (
        ("no.json out --format yolo", "There are no labels at no.json"),
        (f"{tmp_path}/found.json {tmp_path} --format coco", "is a folder; coco needs a file"),
        (f"{tmp_path}/found.json {tmp_path}/found.json/a.xml --format cvat", "a part of the path is a file"),
    ):
        assert run(f"convert-labels {command}") == 2
        assert message in capsys.readouterr().err


def test_many_images_at_once(folder, loaded, capsys, monkeypatch):
    (folder / "in").mkdir()
    for name in ("c.png", "d.jpg", "note.txt"):
        (folder / "in" / name).write_bytes((folder / "a.png").read_bytes())
    (folder / "list.txt").write_text("# mine\na.png\nin/d.jpg\n")
    content = (folder / "b.jpg").read_bytes()
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(content)}))
    for given, names in (
        (["in"], ["in/c.png", "in/d.jpg"]),
        (["in/*.png", "a.p?g"], ["in/c.png", "a.png"]),
        (["@list.txt", "a.png"], ["a.png", "in/d.jpg"]),
        (["-", "a.png"], ["stdin", "a.png"]),
    ):
        assert run(["segment", *given, "--text", "dog"]) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row.split("\t")[0] for row in rows] == names


def test_output_of_each_format_in_a_new_folder(folder, loaded, capsys):
    question = ["a.png", "b.jpg", "--text", "dog"]
    assert run(["segment", *question, "-o", "new/overlays/"]) == 0
    assert sorted(os.listdir("new/overlays")) == ["a-ovsam.png", "b-ovsam.png"]
    assert run(["segment", *question, "-o", "yolo", "--format", "yolo"]) == 0
    assert sorted(os.listdir("yolo/labels")) == ["a.txt", "b.txt"]
    assert run(["segment", *question, "-o", "cut", "--format", "cutouts"]) == 0
    with Image.open("cut/a-ovsam/001-dog.png") as cut:
        assert cut.size == (64, 24) and cut.mode == "RGBA"
    assert run(["segment", *question, "-o", "t.tsv", "--format", "tsv"]) == 0
    assert (folder / "t.tsv").read_text().count("\n") == 3
    capsys.readouterr()
    assert run(["segment", *question, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_json_on_stdout_is_all_there_is_on_stdout(folder, loaded, capfd):
    assert run(["segment", "a.png", "--text", "dog", "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["images"][0]["file_name"] == "a.png" and "a.png: 1 found" in err


def test_words_split_as_people_write_them(folder, loaded):
    assert run(["segment", "a.png", "--text", "dog, red ball", "cat . cow", '"salt, pepper"']) == 0
    assert loaded[0][0].asked[0][1] == ["dog", "red ball", "cat", "cow", "salt, pepper"]


def test_a_full_disk_without_a_file_name_is_one_sentence(monkeypatch, capsys):
    """As writers of other libraries raise it."""

    def fails(args):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr("ovsam_cli.models.run", fails)
    assert run("models") == 2
    assert capsys.readouterr().err == "ovsam: error: The output cannot be written (File too large).\n"


def test_a_gpu_is_absent_only_where_no_driver_has_a_device_file(monkeypatch, tmp_path):
    monkeypatch.setattr(options, "GPU_FILES", (str(tmp_path / "nvidia*"), str(tmp_path / "kfd")))
    monkeypatch.setattr(sys, "platform", "linux")
    assert options.is_absent("cuda") and options.is_absent("mps") and not options.is_absent("cpu")
    (tmp_path / "nvidia0").touch()
    assert not options.is_absent("cuda")
    monkeypatch.setattr(sys, "platform", "win32")
    assert not options.is_absent("cuda")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert options.is_absent("cuda") and not options.is_absent("mps")
