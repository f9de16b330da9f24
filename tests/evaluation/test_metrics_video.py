"""Metrics of video against the published implementation, and the evaluation over small videos."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import ovsam
from ovsam.errors import InputError
from ovsam.evaluation import evaluate_video
from ovsam.evaluation.evaluate_video import measure_videos, summarise_videos, table
from ovsam.evaluation.metrics_video import TrackOverlap, boundary_accuracy, region_similarity
from ovsam.evaluation.videos import Video, moving_videos, open_videos
from ovsam.ops import rle
from ovsam.results.results import Results
from tests.common import ROOT, tiny_model, tiny_processor
from tests.inference.test_video import scene

VAL = ROOT / "tests" / "data" / "photos-val"

# J and F by db_eval_iou and f_measure of davis2017-evaluation (commit ac7c43f) on the masks of `masks(seed)`.
PUBLISHED = [
    (0.139114, 0.106038), (0.872678, 0.500336), (0.764248, 0.350227),
    (0.738613, 0.277515), (0.718228, 0.300752), (0.694033, 0.448999),
]  # fmt: skip


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two blobs [120, 160], in most cases one shifted by a few pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:120, :160]

    def blob():
        mask = np.zeros((120, 160), bool)
        for _ in range(3):
            down, right, a, b = (rng.integers(*r) for r in ((-10, 130), (-10, 170), (8, 40), (8, 40)))
            mask |= ((y - down) / a) ** 2 + ((x - right) / b) ** 2 < 1
        return mask

    one, other = blob(), blob()
    if rng.random() < 0.7:
        other = np.roll(one, (int(rng.integers(0, 6)), int(rng.integers(0, 6))), (0, 1))
    return one, other


@pytest.mark.parametrize("seed", range(6))
def test_j_and_f_are_those_of_davis(seed):
    truth, mask = masks(seed)
    assert region_similarity(mask, truth) == pytest.approx(PUBLISHED[seed][0], abs=1e-6)
    assert boundary_accuracy(mask, truth) == pytest.approx(PUBLISHED[seed][1], abs=1e-6)


def test_empty_masks():
    empty, full = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    full[5:10, 5:10] = True
    assert region_similarity(empty, empty) == boundary_accuracy(empty, empty) == 1
    assert region_similarity(empty, full) == boundary_accuracy(empty, full) == boundary_accuracy(full, empty) == 0


def test_identity_switches():
    left, right, none = np.zeros((4, 8), bool), np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    left[:, :3], right[:, 5:] = True, True
    objects = {1: left, 2: right}
    frames = [
        ({10: left, 20: right}, objects),
        ({20: left, 10: right}, objects),  # both switch
        ({20: left}, objects),
        ({30: right}, {1: none, 2: right}),  # the second one again, by a third track; the first is not there
    ]
    overlap = TrackOverlap()
    for tracks, truth in frames:
        overlap.add(tracks, truth)
    assert overlap.covered() == {1: 1.0, 2: 0.75}
    # The first object: track 10 once, 20 twice of three; the second: three tracks, once each of four.
    assert overlap.objects() == {1: (True, 1), 2: (False, 2)}


def test_overlap_of_tracks_over_time():
    one, two, none = np.zeros((4, 8), bool), np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    one[:, :4], two[:, 2:6] = True, True
    overlap = TrackOverlap()
    overlap.add({7: one}, {1: one})
    overlap.add({7: two}, {1: one})
    overlap.add({7: one, 8: two}, {1: none, 2: two})
    # Track 7 and object 1: 16 + 8 common pixels of 48 + 32 - 24.
    np.testing.assert_allclose(overlap.iou([7, 8], [1, 2]), [[24 / 56, 8 / 56], [0, 1]])
    assert overlap.iou([], [1]).shape == (0, 1)
    wrong = TrackOverlap()
    wrong.add({7: one}, {1: one}, allowed=lambda track, number: False)
    assert wrong.objects() == {1: (False, 0)}


def write_davis(folder, official: bool):
    images, truth = scene(6)
    for number, (image, mask) in enumerate(zip(images, truth, strict=True)):
        places = ("JPEGImages/480p/clip", "Annotations/480p/clip") if official else ("clip", "clip")
        for place, what, end in zip(places, (image, Image.fromarray(mask)), ("jpg", "png"), strict=True):
            (folder / place).mkdir(parents=True, exist_ok=True)
            what.save(folder / place / f"{number:05d}.{end}")
    return truth


@pytest.mark.parametrize("official", [True, False])
def test_videos_in_the_layout_of_davis_are_measured(tmp_path, official):
    truth = write_davis(tmp_path, official)
    (video,) = open_videos(tmp_path)
    assert video.name == "clip" and np.array_equal(video.truth(3)[1], truth[3])
    records = measure_videos(ovsam.Segmenter(tiny_model(), tiny_processor()), [video])
    figures = summarise_videos(records)
    assert list(figures) == ["mask given", "box given", "copy the first mask", "detect in every frame"]
    copied = np.mean([region_similarity(truth[0], mask) for mask in truth[1:-1]])
    assert figures["copy the first mask"]["J"] == pytest.approx(copied)
    assert figures["mask given"]["J"] > 0.5 > copied
    assert "clip 1" in table(records)


def test_an_interrupted_evaluation_continues(tmp_path, monkeypatch):
    write_davis(tmp_path / "set", False)
    (video,) = open_videos(tmp_path / "set")
    videos = [replace(video, name=name) for name in ("one", "two")]
    measured, whole = [], evaluate_video._measure

    def measure(segmenter, video, *given):
        measured.append(video.name)
        if measured == ["one", "two"]:
            raise KeyboardInterrupt
        return whole(segmenter, video, *given)

    monkeypatch.setattr(evaluate_video, "_measure", measure)
    segmenter = ovsam.Segmenter(tiny_model(), tiny_processor())
    asked = {"given": ["mask"], "baselines": False, "file": tmp_path / "out" / "records.jsonl", "asked": {"model": "x"}}
    with pytest.raises(KeyboardInterrupt):
        measure_videos(segmenter, videos, **asked)
    records = measure_videos(segmenter, videos, **asked)
    assert measured == ["one", "two", "two"] and [record["video"] for record in records] == ["one", "two"]
    with pytest.raises(InputError, match="another evaluation"):
        measure_videos(segmenter, videos, **asked | {"asked": {"model": "y"}})


def test_a_json_of_youtube_vis(tmp_path):
    write_davis(tmp_path, False)
    _, truth = scene(6)
    content = {
        "videos": [{"id": 4, "height": 64, "width": 96, "file_names": [f"clip/{n:05d}.jpg" for n in range(6)]}],
        "annotations": [{"id": 9, "video_id": 4, "segmentations": [None, *(rle.encode(mask) for mask in truth[1:])]}],
    }
    (tmp_path / "vis.json").write_text(json.dumps(content))
    (video,) = open_videos(tmp_path / "vis.json")
    assert video.truth(0) == {} and np.array_equal(video.truth(2)[9], truth[2])
    (record,) = measure_videos(ovsam.Segmenter(tiny_model(), tiny_processor()), [video], ["mask"], baselines=False)
    assert (record["video"], record["object"]) == ("4", 9) and record["J"] > 0.5


def test_a_folder_without_videos_raises_an_error(tmp_path):
    with pytest.raises(InputError, match="no video with masks"):
        open_videos(tmp_path)


def test_moving_scenes_are_drawn_and_measured_with_class_names(monkeypatch):
    (video,) = moving_videos(VAL, seed=4, count=1)
    assert len(video.images) == 60 and set(video.truth(0)) == set(video.words)
    segmenter = ovsam.Segmenter(tiny_model(), tiny_processor())
    truth = {frame: video.truth(frame) for frame in range(5)}
    names = list(video.words.values())

    def where(encoded, words, **_):  # answers with the truth, except for the first object
        assert set(words.prompts) == {*names, *video.absent}
        frame = where.asked
        where.asked += 1
        shown = [(mask, video.words[number]) for number, mask in truth[frame].items() if number > 1]
        found = np.array([mask for mask, _ in shown])
        count = len(shown)
        return Results.from_arrays(
            found, [name for _, name in shown], [0] * count, [0.9] * count, [0.9] * count, ["q"] * count, "text",
            size=found.shape[1:],
        )  # fmt: skip

    where.asked = 0
    segmenter.where = where
    short = Video("short", [video.images[n] for n in range(2)], truth.get, video.words, video.absent)
    records = measure_videos(segmenter, [short], ["mask"], baselines=False)
    figures = summarise_videos(records)["words"]
    others = len(names) - 1
    assert where.asked == 1  # the second frame is followed
    assert figures["found"] == pytest.approx(others / len(names), abs=0.35) and figures["found"] < 1
    assert figures["IL_MCC"] > 0 and 0 <= figures["cgF1"] <= figures["pmF1"]
    assert "class names as text queries: found" in table(records)
