"""No network: cached models work, and others raise an error of one sentence without a long wait."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
from common import picture, save_clip, save_sam
from huggingface_hub import constants
from test_presets import put_into_cache
from web import serve

import ovsam
from ovsam.checkpoints.compose import compose_model
from ovsam.checkpoints.download import hub_answers, split_revision
from ovsam.checkpoints.presets import PRESETS, choose_auto
from ovsam.checkpoints.weight_files import fetch
from ovsam.inference.proposers import get_proposer

pytestmark = pytest.mark.slow  # it waits for servers that do not answer

SECONDS = 5.0


@pytest.fixture(scope="module")
def silent():
    """The address of a server that accepts connections and sends nothing."""
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.fixture(params=["silent", "nobody listens", "HF_HUB_OFFLINE"])
def cut_off(request, silent, tmp_path, monkeypatch):
    """A machine from which the Hub cannot be reached, with an empty cache."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "HF_HUB_OFFLINE")
    endpoints = {"silent": silent, "nobody listens": "http://127.0.0.1:9"}
    monkeypatch.setattr(constants, "ENDPOINT", endpoints.get(request.param, "https://huggingface.co"))
    monkeypatch.delenv("OVSAM_MODEL", raising=False)
    return tmp_path / "cache"


ASKING = {
    "load": lambda name: ovsam.load(name, "cpu"),
    "compose": lambda name: compose_model(name, name),
    "from_parts": lambda name: ovsam.from_parts(name, name),
    "detector": lambda name: get_proposer(f"detector:{name}"),
    "sam3": lambda name: get_proposer(f"sam3:{name}"),
}


@pytest.mark.slow
def test_an_empty_cache_raises_an_error(cut_off):
    for ask in ASKING.values():
        for name, command in (("org/name", "org/name"), ("org/name@v1.0", "org/name --revision v1.0")):
            start = time.perf_counter()
            with pytest.raises(ovsam.InputError) as caught:
                ask(name)
            assert time.perf_counter() - start < SECONDS
            assert f"'{name}'" in str(caught.value) and f"`hf download {command}`" in str(caught.value)
            assert re.fullmatch(r"[^\n]*\.", str(caught.value)) and ". " not in str(caught.value)
    with pytest.raises(ovsam.InputError, match="hf download facebook/sam2.1-hiera-large"):
        ovsam.load("photo-large", "cpu")


@pytest.mark.weights
def test_auto_works_without_a_network(cut_off, capsys):
    start = time.perf_counter()
    name = choose_auto()
    assert time.perf_counter() - start < SECONDS
    segmenter = ovsam.load(name, device="cpu")
    assert capsys.readouterr().err.count("ovsam: ") == 1
    assert segmenter.what(picture(0), boxes=[[10, 10, 60, 60]]).model == "ovsam-tiny"


def test_auto_does_not_take_a_captive_portal_for_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve(tmp_path) as (address, _):  # it responds, but has no models
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert hub_answers() and choose_auto() == "ovsam-tiny"


def test_a_filled_cache_is_enough(cut_off):
    parts = PRESETS["photo"].parts
    put_into_cache(cut_off, parts["sam"], lambda folder: save_sam(folder, "sam2"))
    put_into_cache(cut_off, parts["clip"], lambda folder: save_clip(folder, "owlv2"))
    start = time.perf_counter()
    assert choose_auto() == "photo" and time.perf_counter() - start < SECONDS
    segmenter = ovsam.load(device="cpu")
    found = segmenter.where(picture(0, width=100, height=60), ["cat"], threshold=0.0)
    assert found.model == "photo" and len(found)


def test_a_revision_is_the_one_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for ref, commit in commits.items():
        kind = {"main": "sam2", "v1": "edgetam"}[ref]
        put_into_cache(tmp_path, "org/sam", lambda folder, kind=kind: save_sam(folder, kind), commit, ref)
    put_into_cache(tmp_path, "org/clip", lambda folder: save_clip(folder, "clip"))
    for name, kind in (("org/sam", "sam2"), ("org/sam@v1", "edgetam"), (f"org/sam@{'a' * 40}", "sam2")):
        assert compose_model(name, "org/clip")[0].config.sam_config.model_type == kind
    assert fetch("org/sam@v1").name == "b" * 40
    with pytest.raises(ovsam.InputError, match="hf download org/sam --revision v2"):
        fetch("org/sam@v2")


def test_an_incomplete_download_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def half(folder):
        save_sam(folder, "sam2")
        (folder / "model.safetensors").unlink()

    put_into_cache(tmp_path, "org/sam", half)
    with pytest.raises(ovsam.InputError, match="hf download org/sam"):
        fetch("org/sam")


def test_names(tmp_path, monkeypatch):
    assert split_revision("org/name@v1") == ("org/name", "v1")
    assert split_revision("org/name") == ("org/name", None)
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ovsam.InputError, match="did you mean 'photo'. Pass photo, photo-large, ovsam-tiny"):
        ovsam.load("photos", "cpu")
    with pytest.raises(ovsam.InputError, match="neither a folder nor the id"):
        ovsam.load(tmp_path / "nothing" / "there", "cpu")
    save_sam(tmp_path / "sam", "sam2")
    with pytest.raises(ovsam.InputError, match="of type 'sam2', not a whole OVSam model: `ovsam compose`"):
        ovsam.load(tmp_path / "sam", "cpu")


@pytest.mark.slow
def test_the_hub_is_contacted_once(silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent + "/once")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    assert not hub_answers()
    first = time.perf_counter()
    assert not hub_answers()
    assert first - start < 4 and time.perf_counter() - first < 0.1


@pytest.mark.slow
def test_the_command_line_from_a_fresh_process(silent, tmp_path):
    """As a user meets it: nothing is patched."""
    picture(0).save(tmp_path / "a.png")
    program = (
        "import time, sys, ovsam, ovsam_cli\n"
        "ovsam.Segmenter, ovsam.OVSamModel  # the time is that of the command, not of imports\n"
        "start = time.perf_counter()\n"
        "try: ovsam_cli.main(['segment', 'a.png', '--text', 'cat', '--model', 'org/name'])\n"
        "except SystemExit as stop: print(stop.code, time.perf_counter() - start)"
    )
    environment = os.environ | {"HF_ENDPOINT": silent, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    code, seconds = done.stdout.split()
    assert code == "2" and float(seconds) < SECONDS
    assert done.stderr.count("\n") == 1 and "`hf download org/name`" in done.stderr
