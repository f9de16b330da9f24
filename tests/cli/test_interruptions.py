"""Ctrl-C and a lack of memory, at any moment: an exit code and at most one sentence, never a traceback."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from common import ROOT
from PIL import Image

import ovsam
import ovsam_cli
from ovsam_cli import LESS_MEMORY

RECIPE = ROOT / "adapters" / "finetune" / "recipe.toml"
COMMANDS = {  # name -> its arguments, and the function that does the work
    "segment": ("a.png --text dog", "ovsam.load"),
    "label": ("a.png --text dog -o out --format coco --model photo", "ovsam.load"),
    "video": ("a.png --text dog --json a.json", "ovsam.load_video"),
    "eval": (".", "ovsam.evaluation.evaluate.run_eval"),
    "train": (f"{RECIPE} --data annotations.json --images .", "ovsam.training.engine.train_recipe"),
    "demo": ("--model photo", "app.main"),
}
DATA = {
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 30, 1, 30, 30]]}],
}


@pytest.fixture(autouse=True)
def handler():
    """Python's handler of Ctrl-C, which a test run in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command whose work is replaced; returns the exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48)).save("a.png")
    (tmp_path / "annotations.json").write_text(json.dumps(DATA))

    def run(name, work):
        arguments, target = COMMANDS[name]
        module, function = target.rsplit(".", 1)
        if module == "ovsam":
            monkeypatch.setattr(ovsam, function, work, raising=False)
        else:
            stand_in = types.ModuleType(module)
            setattr(stand_in, function, work)
            monkeypatch.setitem(sys.modules, module, stand_in)
        code = ovsam_cli.main([name, *arguments.split()])
        return code, capsys.readouterr().err

    return run


def interrupted(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)


def swallowed(*_, **__):
    try:
        interrupted()
    except BaseException:
        pass
    return types.SimpleNamespace()


def converted(*_, **__):
    try:
        interrupted()
    except BaseException as error:
        raise RuntimeError("a callback failed") from error


@pytest.mark.parametrize("work", [interrupted, swallowed, converted])
@pytest.mark.parametrize("name", ["segment", "label", "video", "eval", "train", "demo"])
def test_ctrl_c_is_exit_code_130(run, name, work):
    code, error = run(name, work)
    assert code == 130 and "Traceback" not in error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["ovsam.errors", "ovsam_cli.segment", "PIL.Image", "torch", "torch.nn", "transformers"]
)
def test_ctrl_c_during_an_import(module):
    program = f"""
import os, signal, sys, ovsam_cli

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.exit(ovsam_cli.main(sys.argv[1:]))
"""
    image = ROOT / "demo" / "examples" / "pizza.jpg"
    command = [sys.executable, "-c", program, "segment", image, "--text", "cat", "--model", "ovsam-tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)  # SIGINT is inherited
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("moment", ["import argparse", "before main", "after main", "atexit"])
def test_ctrl_c_around_the_command(tmp_path, moment):
    """The script of an installed package: imports, a call of `main`, the end of the interpreter."""
    stop = "os.kill(os.getpid(), signal.SIGINT)"
    script = tmp_path / "ovsam"
    script.write_text(f"""
import atexit, os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if {moment!r} == "import " + name:
            {stop}

sys.meta_path.insert(0, Interrupt())
sys.modules.pop("argparse", None)
from ovsam_cli import main

if {moment!r} == "before main":
    {stop}
if {moment!r} == "atexit":
    atexit.register(lambda: {stop})
code = main(["convert-labels", "a", "b", "--format", "coco"])
if {moment!r} == "after main":
    {stop}
sys.exit(code)
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 130 and "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr


def fails_with(error):
    def work(*_, **__):
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ..."),
     RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("segment", "a smaller --batch, --half"),
        ("label", "a smaller --batch, fewer --workers"),
        ("video", "fewer objects"),
        ("eval", "--device cpu"),
        ("train", "--set optim.batch_size=1"),
        ("demo", "a smaller --model"),
    ],
)
def test_a_lack_of_memory_is_one_sentence_that_names_an_option(run, name, option, error):
    code, printed = run(name, fails_with(error))
    assert code == 2 and printed.count("\n") == 1
    assert printed.startswith("ovsam: error: There is not enough memory; use ") and option in printed


def test_options_that_messages_name_exist():
    for name in ovsam_cli.COMMANDS:
        module = __import__(f"ovsam_cli.{name.replace('-', '_')}", fromlist=["x"])
        parser = ovsam_cli.Parser()
        module.add_arguments(parser)
        for word in getattr(module, "LESS_MEMORY", LESS_MEMORY).replace(",", "").split():
            assert not word.startswith("--") or word in parser._option_string_actions, (name, word)
