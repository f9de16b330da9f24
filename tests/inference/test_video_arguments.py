"""Arguments of videos, sessions and the pipeline: whatever is given, an answer or one sentence."""

import itertools
import math

import numpy as np
import pytest
import torch
from common import picture, tiny_model, tiny_processor

import ovsam
from ovsam.errors import InputError
from ovsam.inference.frames import FrameSource

BOX = [10, 10, 50, 50]
FRAMES = [picture(number) for number in range(2)]
WRONG = [None, 5, -1, 1.5, math.nan, 10**400, "x", "", b"x", [], [[]], [None], {}, {"a": 1}, True, object(), int]
WRONG += [np.array([]), np.array(math.nan), torch.tensor([[1.0, 2.0]]), torch.zeros(2, device="meta"), [1, 2, 3, 4]]
WRONG += [[[1, 2], [3]], [[[1, 2]]], [["cat"]], ["cat", 5], {"cat": "dog"}, range(3), "\ud800", 1j]


@pytest.fixture(scope="module")
def video():
    return ovsam.VideoSegmenter(ovsam.Segmenter(tiny_model(), tiny_processor()))


@pytest.fixture(scope="module")
def session_model():
    model = ovsam.OVSamVideoModel(tiny_model().config)
    return model.eval()


def answered(ask, *given, **named):
    """Nothing but InputError, of one line, is raised."""
    try:
        found = ask(*given, **named)
        if hasattr(found, "__next__") or isinstance(found, ovsam.VideoStream):
            list(itertools.islice(iter(found), 2))
    except InputError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 500


PROMPT = ["points", "labels", "box", "mask", "frame", "id", "name"]
TRACK = ["source", "words", "prompts", "negative", "threshold", "vocabulary", "redetect_every", "patience"]
TRACK += ["exclusive", "every", "top_k"]


@pytest.mark.parametrize("name", PROMPT)
def test_prompts(video, name):
    for value in WRONG:
        answered(lambda value=value: video.track(FRAMES, prompts=[ovsam.Prompt(**{"box": BOX} | {name: value})]))
        answered(lambda value=value: video.track(FRAMES, prompts=[ovsam.Prompt(**{name: value})]))


@pytest.mark.parametrize("name", TRACK)
def test_tracks(video, name):
    for value in WRONG:
        answered(video.track, **{"source": FRAMES, "words": ["cat"]} | {name: value})


def test_a_running_stream(video):
    stream = video.track(FRAMES, prompts=ovsam.Prompt(box=BOX))
    next(iter(stream))
    for ask, value in itertools.product((stream.add, stream.correct, stream.what, stream.remove), WRONG):
        answered(ask, value)
    tracks = ovsam.Tracks([stream.frame])
    for value in WRONG:
        answered(tracks.to_youtube_vis, value)
        answered(tracks.to_youtube_vis, "a.mp4", value)
        answered(ovsam.Tracks, value)


@pytest.mark.parametrize("source", [np.array(1.0), torch.tensor(1), 10**400, -1, "x" * 5000], ids=repr)
def test_no_source(source):
    with pytest.raises(InputError):
        FrameSource(source)


SESSION = ["frame_idx", "obj_ids", "input_points", "input_labels", "input_boxes", "input_masks", "original_size"]


@pytest.mark.parametrize("name", SESSION)
def test_prompts_of_a_session(video, session_model, name):
    processor = video.segmenter.processor
    good = {"frame_idx": 0, "obj_ids": 1, "input_points": [[[[20, 20]]]], "input_labels": [[[1]]]}

    def ask(value):
        session = processor.init_video_session(FRAMES)
        processor.add_inputs_to_inference_session(session, **good | {name: value})
        return session_model.propagate_in_video_iterator(session)

    for value in WRONG:
        answered(ask, value)


def test_sessions(video, session_model):
    processor = video.segmenter.processor

    def started(**how):
        session = processor.init_video_session(FRAMES)
        processor.add_inputs_to_inference_session(session, 0, 1, input_boxes=[[BOX]])
        return session_model.propagate_in_video_iterator(session, **how)

    for value in WRONG:
        answered(processor.init_video_session, value)
        answered(processor.init_video_session, FRAMES, tracker=value)
        answered(processor.add_text_prompt, processor.init_video_session(FRAMES), value)
        answered(processor.add_text_prompt, processor.init_video_session(FRAMES), "cat", value)
        for name in ("start_frame_idx", "max_frame_num_to_track"):
            answered(lambda name=name, value=value: started(**{name: value}))


def test_objects_of_a_session_may_have_different_numbers_of_points(video):
    processor = video.segmenter.processor
    session = processor.init_video_session(FRAMES)
    points = [[[[20, 20]], [[60, 60], [70, 70]]]]
    processor.add_inputs_to_inference_session(session, 0, [1, 2], input_points=points, input_boxes=[[BOX, BOX]])
    assert [session.prompts[number][0].labels.tolist() for number in (1, 2)] == [[2, 3, 1], [2, 3, 1, 1]]
