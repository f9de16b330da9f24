"""The tab Video: limits of a clip, clicks on its frames, tracking, and the downloads."""

import asyncio
import json
from fractions import Fraction
from types import SimpleNamespace

import engine
import numpy as np
import orjson
import pytest
import video_tab
from clip import Clip, VideoScene
from common import SIZE, tiny_model, tiny_processor
from image_tab import sessions
from PIL import Image
from scene import Session

import ovsam
from ovsam.errors import InputError
from ovsam.inference.frames import FrameSource, VideoWriter
from ovsam.results.results import Results

pytest.importorskip("av", reason="needs `pip install av`")
FRAMES = 5


def write_clip(path, frames=FRAMES, size=(SIZE, SIZE // 2)):
    writer = VideoWriter(path, Fraction(10), size)
    for index in range(frames):
        image = Image.new("RGB", size, (20, 60, 90))
        image.paste((230, 120, 10), (10 + 4 * index, 10, 40 + 4 * index, 40))
        writer.write(image, index / 10)
    writer.close()
    return path


@pytest.fixture
def scene(tmp_path):
    clip = Clip.read(write_clip(tmp_path / "clip.mp4"), "clip.mp4", tmp_path / "frames")
    return VideoScene(clip)


def one_object(x, size=(SIZE // 2, SIZE)):
    mask = np.zeros(size, bool)
    mask[10:40, x : x + 30] = True
    return Results.from_arrays([mask], ["box"], [0], [0.9], [0.9], ["box"], "text")[0]


def test_a_clip_is_decoded_to_frames(scene):
    assert len(scene.clip) == FRAMES and scene.clip.size == (SIZE, SIZE // 2) and float(scene.clip.rate) == 10
    assert scene.clip.times == pytest.approx([index / 10 for index in range(FRAMES)])
    with Image.open(scene.clip.frame(3)) as frame:
        assert frame.size == scene.clip.size and frame.getpixel((30, 25))[0] > 150


def test_limits_of_a_clip_are_one_sentence(tmp_path, monkeypatch):
    path, folder = write_clip(tmp_path / "long.mp4"), tmp_path / "frames"

    def sentence(name="long.mp4"):
        with pytest.raises(InputError) as error:
            Clip.read(tmp_path / name, name, folder)
        assert str(tmp_path) not in str(error.value) and not folder.exists()
        return str(error.value)

    monkeypatch.setattr("clip.MAX_FRAMES", 4)
    assert sentence().startswith("long.mp4 has more than 4 frames")
    monkeypatch.setattr("clip.MAX_MEGABYTES", 0.001)
    assert "long.mp4 has more than 0.001 MB" in sentence()
    monkeypatch.undo()
    (tmp_path / "text.mp4").write_text("no video")
    assert "text.mp4 cannot be read as a video" in sentence("text.mp4")
    monkeypatch.setattr("clip.MAX_SIDE", 64)
    assert Clip.read(path, "long.mp4", folder).size == (64, 32)


def test_a_damaged_clip_keeps_what_could_be_read(tmp_path):
    path = write_clip(tmp_path / "whole.mkv", frames=60)
    content = path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    clip = Clip.read(tmp_path / "cut.mkv", "cut.mkv", tmp_path / "frames")
    assert 0 < len(clip) < 60


def test_a_click_selects_refines_or_starts_an_object(scene):
    with pytest.raises(InputError, match="Choose an object first"):
        scene.point(0, 5, 5, 0)
    assert scene.point(0, 20, 20, 1) == (1, True)
    scene.shown[0] = {1: one_object(10)}
    assert scene.point(0, 42, 20, 1) == (1, True)  # near it
    assert scene.point(0, 120, 60, 1) == (2, True)  # far from it
    assert scene.point(0, 15, 20, 1) == (1, False)  # on the first one: only a selection
    assert scene.point(0, 15, 20, 0) == (1, True)
    assert scene.point(3, 30, 20, 1) == (1, True)  # on a later frame, where nothing is shown yet: a correction
    scene.active = 0
    number = scene.box(2, (1, 2, 30, 40))
    shown = [(one.id, one.frame, one.points and len(one.points), one.box) for one in scene.prompts()]
    assert shown == [(1, 0, 3, None), (1, 3, 1, None), (2, 0, 1, None), (number, 2, None, (1, 2, 30, 40))]
    scene.remove(1)
    assert {one.id for one in scene.prompts()} == {2, number} and scene.shown == {0: {}}


def test_an_object_that_words_found_is_corrected_under_its_id(scene):
    scene.shown = {1: {4: one_object(14)}, 2: {4: one_object(18)}}
    scene.active = 4
    scene.point(2, 20, 20, 0)
    prompts = {(one.id, one.frame): one for one in scene.prompts()}
    assert prompts[4, 1].box == (14, 10, 44, 40) and prompts[4, 2].labels == [0]
    assert prompts[4, 1].name == "box"


def test_objects_are_few(scene):
    for number in range(10):
        scene.box(0, (number, 1, number + 20, 30))
    with pytest.raises(InputError, match="There are 10 objects already"):
        scene.box(0, (1, 1, 20, 30))


def run(handler, *arguments):
    async def collect():
        return [update async for update in handler(*arguments)]

    return asyncio.run(collect())


@pytest.fixture
def visitor(scene, monkeypatch, tmp_path):
    """A session with a clip, and a tiny model."""
    session = Session(tmp_path / "session")
    session.video = scene
    monkeypatch.setattr(sessions, "get", lambda name, new=False: session)
    segmenter = ovsam.Segmenter(tiny_model(), tiny_processor(), "tiny")
    monkeypatch.setattr(engine.models, "get", lambda name: segmenter)
    return SimpleNamespace(session_hash="a page")


def test_tracking_gives_frames_a_video_and_a_json(scene, visitor, tmp_path):
    scene.box(0, (10, 10, 40, 40))
    updates = run(video_tab.track, visitor, "", "tiny")
    shown = [update["player"] for update in updates if "player" in update]
    assert [one["at"] for one in shown[:-1]] == list(range(FRAMES)) and shown[-1]["whole"]
    assert all(orjson.dumps(update) for update in shown)  # as Gradio sends them
    assert updates[1]["message"]["text"].startswith(f"Frame 1 of {FRAMES}") and not engine.turns.free.locked()
    source = FrameSource(video_tab.save_video(visitor)["file"])
    assert len(list(source)) == FRAMES and float(source.rate) == 10
    with open(video_tab.save_json(visitor)["file"]) as file:
        data = json.load(file)
    assert data["videos"][0]["length"] == FRAMES and data["videos"][0]["file_name"] == "clip.mp4"
    assert [one["id"] for one in data["annotations"]] == [1] * len(scene.tracks.tracks)


def test_a_cancelled_track_leaves_valid_files(scene, visitor):
    async def begin():
        frames = video_tab.track(visitor, "", "tiny")
        async for update in frames:
            if update.get("player", {}).get("at") == 1:
                break
        await frames.aclose()

    scene.box(0, (10, 10, 40, 40))
    asyncio.run(begin())
    assert len(list(FrameSource(video_tab.save_video(visitor)["file"]))) == 2


def test_what_cannot_be_tracked_is_one_sentence(visitor):
    many = ", ".join("abcdefghijk")
    for words, sentence in (("", "There is nothing to follow yet"), (many, "There are 11 words")):
        with pytest.raises(InputError, match=sentence):
            run(video_tab.track, visitor, words, "tiny")
    with pytest.raises(InputError, match="press Track first"):
        video_tab.save_video(visitor)


def test_only_uploads_are_read(visitor):
    event = SimpleNamespace(_data={"path": "/etc/passwd"})
    with pytest.raises(InputError, match="must be uploaded"):
        asyncio.run(video_tab.receive_clip(visitor, event, show=lambda *state: None))
