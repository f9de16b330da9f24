"""Drawing styles: packages are fetched once and checked against their hash; OpenMoji is never trained on."""

import base64
import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from ovsam.data import SceneDataset
from ovsam.data.scenes import styles
from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.scenes.words import all_words
from ovsam.errors import InputError

SQUARE = '<path fill="#f00" d="M2 2h12v12H2z"/>'
DISC = '<circle cx="8" cy="8" r="6" fill="#00f"/>'


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package of two drawings (one by code point, one by name, through an alias), and how often it was fetched."""
    words = all_words()
    first, second = words[0], next(word for word in words if word.name == "red apple")
    icons = {
        "icons": {"a": {"body": SQUARE}, "the-apple": {"body": DISC}},
        "aliases": {"red-apple": {"parent": "the-apple"}},
        "width": 16,
        "height": 16,
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (("icons", icons), ("chars", {f"{ord(first.char):x}": "a"})):
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    calls = []

    def npm(command, cwd, **_):
        calls.append(command)
        (tmp_path.__class__(cwd) / "made-up-1.0.0.tgz").write_bytes(buffer.getvalue())

    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    made = styles.IconPackage("made-up", "1.0.0", digest, "MIT")
    monkeypatch.setattr(styles, "PACKAGES", styles.PACKAGES | {"made-up": made})
    monkeypatch.setattr(styles, "STYLES", (*styles.STYLES, "made-up"))
    monkeypatch.setattr(styles, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(styles.subprocess, "run", npm)
    styles.sprites.cache_clear()
    yield made, (words.index(first), words.index(second)), calls
    styles.sprites.cache_clear()


def test_a_package_is_drawn_once_and_kept(package):
    pytest.importorskip("resvg_py")
    _, (square, disc), calls = package
    pictures = styles.sprites("made-up")
    assert len(pictures) == len(all_words()) and [i for i, p in enumerate(pictures) if p] == sorted((square, disc))
    assert np.asarray(pictures[square])[5, 5].tolist() == [255, 0, 0, 255]
    assert np.asarray(pictures[disc].getchannel("A"))[0, 0] == 0  # a disc has no corners
    assert pictures[square].size == (102, 102)  # twelve sixteenths of 136 px
    styles.sprites.cache_clear()
    again = styles.sprites("made-up")
    assert len(calls) == 1 and np.array_equal(np.asarray(again[disc]), np.asarray(pictures[disc]))
    assert styles.drawable(["made-up"]) == sorted((square, disc))


def test_another_hash_raises_an_error(package, monkeypatch):
    made, _, _ = package
    wrong = dataclasses.replace(made, sha512="another")
    with pytest.raises(InputError, match="made-up@1.0.0 from npm has an unexpected hash"):
        styles.read_package(wrong, all_words())


def test_a_missing_npm_is_named(package, monkeypatch):
    def fail(*_, **__):
        raise subprocess.CalledProcessError(1, "npm")

    monkeypatch.setattr(styles.subprocess, "run", fail)
    with pytest.raises(InputError, match="cannot be fetched with `npm pack`"):
        styles.sprites("made-up")


def test_an_unknown_style_raises_an_error():
    with pytest.raises(InputError, match="no drawing style 'crayon'; choose one of noto, twemoji"):
        styles.sprites("crayon")


def test_openmoji_is_never_trained_on():
    with pytest.raises(InputError, match="openmoji is reserved for testing"):
        SceneDataset(10, seed=1, config=SceneConfig(styles=["noto", "openmoji"]))


@pytest.mark.slow
def test_every_object_has_a_style_that_draws_it(package, monkeypatch):
    """Two styles: one draws two words only. Both appear, and a word of one style alone is drawn in that one."""
    _, (square, disc), _ = package
    red = Image.new("RGBA", (100, 100), (255, 0, 0, 255))
    fake = {"made-up": (red,) * len(all_words()), "noto": styles.sprites("noto")}
    fake["noto"] = tuple(None if i == disc else picture for i, picture in enumerate(fake["noto"]))
    monkeypatch.setattr("ovsam.data.scenes.drawing.sprites", lambda style="noto": fake[style])
    config = SceneConfig(canvas=200, min_objects=6, max_objects=6, max_size=60, styles=("noto", "made-up"))
    scenes = [draw_scene(3, i, np.array([square, disc]), config) for i in range(6)]
    reds = {square: [], disc: []}
    for scene in scenes:
        pixels = np.asarray(scene.image).astype(int)
        for i, word in enumerate(scene.word_ids):
            mean = pixels[scene.index_map == i + 1].mean(0)
            reds[word].append(bool(mean[0] > 120 and mean[1:].max() < 60))
    assert all(reds[disc]) and any(reds[square]) and not all(reds[square])


def test_one_style_leaves_scenes_as_they_were():
    """The frozen sets come out again: naming the one style draws no random number."""
    config = SceneConfig(canvas=160, max_size=80)
    one = draw_scene(3, 7, np.arange(50), config)
    same = draw_scene(3, 7, np.arange(50), dataclasses.replace(config, styles=["noto"]))
    assert np.array_equal(np.asarray(one.image), np.asarray(same.image))
