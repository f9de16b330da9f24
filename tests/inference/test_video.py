"""Videos: sources, prompts and words while it runs, identities, files."""

import functools
import http.server
import itertools
import resource
import signal
import socket
import struct
import threading
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import ovsam
from ovsam.errors import InputError
from ovsam.inference.frames import FrameSource, VideoWriter
from ovsam.ops import rle
from ovsam.results.results import Results
from tests.common import picture, tiny_model, tiny_processor

WIDTH, HEIGHT = 96, 64


def scene(count: int, step: int = 6) -> tuple[list[Image.Image], list[np.ndarray]]:
    """A textured square that moves to the right over a smooth background, and its masks."""
    back = np.asarray(picture(1, WIDTH, HEIGHT))
    patch = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    images, masks = [], []
    for number in range(count):
        image, mask = back.copy(), np.zeros((HEIGHT, WIDTH), dtype=bool)
        x = 8 + step * number
        image[20:44, x : x + 24], mask[20:44, x : x + 24] = patch, True
        images.append(Image.fromarray(image))
        masks.append(mask)
    return images, masks


@pytest.fixture(scope="module")
def video():
    torch.manual_seed(0)
    return ovsam.VideoSegmenter(ovsam.Segmenter(tiny_model(), tiny_processor(), "tiny"))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def write(path, images, rate=Fraction(10), times=None):
    writer = VideoWriter(path, rate, images[0].size)
    for number, image in enumerate(images):
        writer.write(image, number / rate if times is None else times[number])
    writer.close()


# ---- sources --------------------------------------------------------------------------------------------------------


def test_all_sources_give_the_same_frames(tmp_path):
    images, _ = scene(4)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number:03d}.png")
    arrays = [np.asarray(image) for image in images]
    for source in (tmp_path, str(tmp_path), images, arrays, (image for image in images)):
        frames = list(FrameSource(source))
        assert [frame.index for frame in frames] == [0, 1, 2, 3]
        for frame, array in zip(frames, arrays, strict=True):
            assert np.array_equal(np.asarray(frame.image), array)
    assert FrameSource(tmp_path).length == 4


@pytest.mark.parametrize("size", [(96, 64), (97, 63)])
def test_a_file_keeps_size_rate_and_uneven_times(tmp_path, size):
    times = [0.0, 0.1, 0.5, 0.6, 1.7]
    write(tmp_path / "clip.mp4", [picture(n, *size) for n in range(5)], times=times)
    source = FrameSource(tmp_path / "clip.mp4")
    frames = list(source)
    assert [frame.image.size for frame in frames] == [size] * 5
    assert [round(frame.time, 2) for frame in frames] == times
    first = np.abs(np.asarray(frames[0].image).astype(int) - np.asarray(picture(0, *size))).mean()
    assert first < 12  # compressed, but this image: another one differs by some 60


def test_a_rotation_flag_is_applied(tmp_path):
    write(tmp_path / "clip.mp4", [picture(0, 96, 64)])
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    # A quarter turn clockwise, as a phone that was held upright notes it: 16.16 numbers, the last column 2.30.
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30]
    content[matrix : matrix + 36] = struct.pack(">9i", *turn)
    (tmp_path / "turned.mp4").write_bytes(content)
    lying, upright = (next(iter(FrameSource(tmp_path / name))).image for name in ("clip.mp4", "turned.mp4"))
    assert upright.size == (64, 96)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(lying), -1))


@pytest.mark.parametrize(("container", "codec"), [("avi", "mjpeg"), ("mp4", "mpeg4")])
def test_a_truncated_file_gives_its_frames_and_then_one_error(tmp_path, container, codec):
    """The index of the mp4 is at its beginning, as in files for streaming."""
    whole, cut = tmp_path / f"whole.{container}", tmp_path / f"cut.{container}"
    writer = av.open(str(whole), "w", options={"movflags": "faststart"} if container == "mp4" else {})
    format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream = writer.add_stream(codec, rate=10, width=96, height=64, pix_fmt=format)
    for number in range(20):
        writer.mux(stream.encode(av.VideoFrame.from_image(picture(number, 96, 64))))
    writer.mux(stream.encode(None))
    writer.close()
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    frames = []
    with pytest.raises(InputError, match="(damaged|ends) after"):
        for frame in FrameSource(cut):
            frames.append(frame)
    assert 4 <= len(frames) < 16  # a decoder with one thread gives one less
    for frame in frames:  # what was readable is right
        wrong = np.abs(np.asarray(frame.image, float) - np.asarray(picture(frame.index, 96, 64), float))
        assert wrong.mean() < 12


def test_damaged_frames_are_left_out_and_reported_at_the_end(tmp_path):
    write(tmp_path / "whole.mp4", [picture(number, 96, 64) for number in range(6)])
    source = FrameSource(tmp_path / "whole.mp4")
    decoded = list(source._container.decode(source._stream))
    frames, whole = [], FrameSource(tmp_path / "whole.mp4")
    # libav marks what it made up; frames cannot be marked from here.
    marked = [
        SimpleNamespace(time=f.time, is_corrupt=n == 2, rotation=0, to_ndarray=f.to_ndarray)
        for n, f in enumerate(decoded)
    ]
    whole._container = SimpleNamespace(decode=lambda stream: iter(marked))
    with pytest.raises(InputError, match="damaged: 1 of its 6 frames are left out"):
        for frame in whole:
            frames.append(frame.index)
    assert frames == [0, 1, 3, 4, 5]


def test_a_file_without_its_index_is_one_error(tmp_path):
    """The index of most mp4 files is at their end."""
    write(tmp_path / "whole.mp4", [picture(number, 96, 64) for number in range(20)])
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut.mp4 cannot be read as a video"):
        FrameSource(tmp_path / "cut.mp4")


@pytest.mark.parametrize(
    ("source", "message"), [("nowhere.mp4", "There is no video"), (3.5, "got float"), (__file__, "cannot be read")]
)
def test_other_files_than_videos_raise_an_error(source, message):
    with pytest.raises(InputError, match=message):
        FrameSource(source)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_a_mask_is_followed_and_keeps_its_id_and_name(video):
    images, masks = scene(6)
    stream = video.track(images, prompts=[ovsam.Prompt(mask=masks[0], id=7, name="thing")])
    tracks = ovsam.Tracks()
    for frame, mask in zip(stream, masks, strict=True):
        assert [(one.id, one.label) for one in frame.results] == [(7, "thing")]
        assert overlap(frame.results[0].mask, mask) > 0.5
        assert set(np.unique(frame.id_map())) == {0, 7}
        tracks.add(frame)
    data = tracks.to_youtube_vis("clip.mp4")
    (annotation,) = data["annotations"]
    assert data["videos"][0] | {"length": 6, "width": WIDTH, "height": HEIGHT} == data["videos"][0]
    assert len(annotation["segmentations"]) == 6 and annotation["id"] == 7
    assert overlap(rle.decode(annotation["segmentations"][5]), masks[5]) > 0.5


def test_frames_come_one_by_one_and_objects_are_added_corrected_and_removed_meanwhile(video):
    images, masks = scene(6)
    read = []

    def camera():
        for number, image in enumerate(images):
            read.append(number)
            yield image

    stream = video.track(camera(), prompts=[ovsam.Prompt(mask=masks[0])])
    frames = iter(stream)
    next(frames)
    assert read == [0]
    stream.add(ovsam.Prompt(box=[60, 4, 90, 18], frame=2, name="late"))
    assert [one.id for one in next(frames).results] == [1]
    assert {one.label for one in next(frames).results} >= {"late"} or 2 in stream._objects
    wrong = np.zeros_like(masks[2])
    wrong[2:12, 2:12] = True
    corrected = stream.correct(ovsam.Prompt(mask=wrong, id=1))
    assert corrected.index == 2
    assert overlap(next(one for one in corrected.results if one.id == 1).mask, wrong) > 0.5
    assert len(stream.what(1, ["cat", "dog"])) == 2
    stream.remove(1)
    assert 1 not in [one.id for one in next(frames).results]
    with pytest.raises(InputError, match="no track 1"):
        stream.remove(1)
    with pytest.raises(InputError, match="has passed"):
        stream.add(ovsam.Prompt(mask=wrong, frame=1))


@pytest.mark.parametrize("refine", [True, False])
def test_an_image_that_is_encoded_for_tracking_answers_as_any_other(video, refine):
    segmenter, image = video.segmenter, picture(2, WIDTH, HEIGHT)
    for ask in (
        lambda encoded: segmenter.where(encoded, ["dog"], threshold=0.0, refine=refine),
        lambda encoded: segmenter.everything(encoded, ["dog"], objectness=0.0, refine=refine),
    ):
        found, expected = ask(segmenter.encode_frame(image)), ask(segmenter.encode(image))
        assert [(one.score, one.segmentation) for one in found] == [(one.score, one.segmentation) for one in expected]
        assert len(expected) > 0


def test_the_concept_head_runs_only_on_frames_with_a_question(video, monkeypatch):
    images, masks = scene(5)
    head, runs = video.segmenter.model.concepts, []
    own = head.forward
    monkeypatch.setattr(head, "forward", lambda *given: (runs.append(stream.frame), own(*given))[1])
    prompts = [ovsam.Prompt(mask=masks[0], name="square"), ovsam.Prompt(box=[10, 10, 40, 50], frame=3, name="box")]
    stream = video.track(images, prompts=prompts, words=["dog"], redetect_every=2)
    list(stream)
    before = [-1 if frame is None else frame.index for frame in runs]  # the frame that was yielded before
    assert before == [-1, 1, 2, 3]  # words on frames 0, 2 and 4, the box on frame 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ovsam.Prompt(), "needs points"),
        (ovsam.Prompt(box=[5, 5, 500, 20]), "inside the frame"),
        (ovsam.Prompt(points=[[500, 5]]), "outside the frame"),
        (ovsam.Prompt(mask=np.ones((3, 3), bool)), "must be equal"),
        (ovsam.Prompt(mask=np.zeros((HEIGHT, WIDTH), bool)), "is empty"),
        (ovsam.Prompt(points=[[5, 5]], labels=[1, 0]), "2 labels for 1 points"),
    ],
)
def test_wrong_prompts_are_one_clear_error(video, prompt, message):
    with pytest.raises(InputError, match=message):
        list(video.track(scene(1)[0], prompts=[prompt]))


# ---- words: detections are given by the test ----------------------------------------


class Detections:
    """A Segmenter whose `where` answers with given masks."""

    def __init__(self, segmenter, by_frame):
        self._segmenter, self._by_frame, self.asked = segmenter, by_frame, []

    def __getattr__(self, name):
        return getattr(self._segmenter, name)

    def where(self, encoded, words, **_):
        found = self._by_frame[len(self.asked)]
        self.asked.append(words)
        count = len(found)
        return Results.from_arrays(
            np.array([mask for mask, _ in found]).reshape(count, HEIGHT, WIDTH),
            [label for _, label in found], [0] * count, [0.9] * count, [0.9] * count, ["q"] * count, "text",
            size=(HEIGHT, WIDTH),
        )  # fmt: skip


def test_words_are_matched_to_tracks_and_new_objects_enter(video):
    images, masks = scene(5)
    other = np.zeros_like(masks[0])
    other[2:14, 70:90] = True
    given = Detections(video.segmenter, [[(masks[0], "cat")], [(masks[2], "cat"), (other, "dog")], [(masks[4], "cat")]])
    stream = ovsam.VideoSegmenter(given).track(images, words=["cat", "dog"], redetect_every=2)
    shown = [[(one.id, one.label) for one in frame.results] for frame in stream]
    assert len(given.asked) == 3
    assert shown[0] == shown[1] == [(1, "cat")]
    assert shown[2] == [(1, "cat"), (2, "dog")]
    assert shown[4][0] == (1, "cat")


@pytest.mark.parametrize("patience", [2, 30])
def test_an_object_that_returns_keeps_its_id(video, patience):
    images, masks = scene(2, step=0)
    empty = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), 127, np.uint8))] * 6
    clip = [images[0], images[0], *empty, images[0]]
    given = Detections(video.segmenter, [[(masks[0], "cat")], *[[]] * 7, [(masks[0], "cat")]])
    stream = ovsam.VideoSegmenter(given).track(clip, words=["cat"], redetect_every=1, patience=patience)
    ids = []
    for number, frame in enumerate(stream):
        if 2 <= number < 8 and 1 in stream._objects:  # no object is there
            stream._session.labels.frames.clear()
        ids.append([one.id for one in frame.results])
    assert ids[0] == [1] and ids[8] == [1]
    assert [] in ids[3:8]


def test_tracks_of_words_take_their_best_names_from_any_vocabulary(video):
    images, masks = scene(2)
    given, names = Detections(video.segmenter, [[(masks[0], "cat")]]), ["dog", "moon", "star"]
    stream = ovsam.VideoSegmenter(given).track(images, words=["cat"], vocabulary=names, top_k=2)
    tracks = ovsam.Tracks(stream).tracks
    assert tracks[1].label == "cat" and sorted(tracks[1].frames) == [0, 1]
    assert len(tracks[1].topk) == 2 and {name for name, _ in tracks[1].topk} <= {*names}


# ---- sources that are not files -------------------------------------------------------------------------------------


def test_a_camera_is_opened_by_its_number(monkeypatch):
    opened = []

    def open_device(name, **options):
        opened.append((name, options))
        raise av.FFmpegError(5, "no such device")

    monkeypatch.setattr(av, "open", open_device)
    with pytest.raises(InputError, match="/dev/video3 cannot be read"):
        FrameSource(3)
    assert opened == [("/dev/video3", {"format": "v4l2"})]


def test_an_address_is_decoded_as_it_arrives(tmp_path):
    """HTTP, as RTSP, which needs a server of its own."""
    write(tmp_path / "clip.mp4", [picture(n, 96, 64) for n in range(5)])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = FrameSource(f"http://127.0.0.1:{server.server_address[1]}/clip.mp4")
        assert [frame.image.size for frame in source] == [(96, 64)] * 5
        source.close()
        server.shutdown()


def test_a_live_stream_gives_frames_before_it_ends(tmp_path):
    """MPEG-TS over TCP, without a length: the second part is sent when the first frames have arrived."""
    container = av.open(str(tmp_path / "live.ts"), "w", format="mpegts")
    stream = container.add_stream("mpeg2video", rate=10, width=96, height=64, pix_fmt="yuv420p")
    for number in range(80):
        container.mux(stream.encode(av.VideoFrame.from_image(picture(number, 96, 64))))
    container.mux(stream.encode(None))
    container.close()
    content, arrived, ended = (tmp_path / "live.ts").read_bytes(), threading.Event(), []
    cut = len(content) * 3 // 4

    def send():
        connection, _ = server.accept()
        with connection:
            connection.sendall(content[:cut])
            ended.append(arrived.wait(30))
            connection.sendall(content[cut:])

    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        source = FrameSource(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        assert source.length is None
        frames = iter(source)
        early = [next(frames) for _ in range(20)]
        arrived.set()
        times = [frame.time for frame in [*early, *frames]]
        sender.join(30)
    assert ended == [True]  # not after a vain wait
    assert times == pytest.approx([number / 10 for number in range(80)], abs=1e-3)


def test_a_source_without_an_end_is_read_frame_by_frame(video):
    images, masks = scene(3)
    read = itertools.count()
    endless = (images[min(number, 2)] for number in read)
    frames = iter(video.track(endless, prompts=[ovsam.Prompt(mask=masks[0])]))
    assert [next(frames).index for _ in range(4)] == [0, 1, 2, 3]
    assert next(read) == 4


def test_a_disk_that_fills_up_leaves_the_older_file(tmp_path):
    """The limit of the size of files stands for a full disk."""
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            writer = VideoWriter(target, 10, (96, 64))
            for number in range(300):
                writer.write(picture(number, 96, 64), number / 10)
            writer.close()
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert target.read_bytes() == b"older" and list(tmp_path.iterdir()) == [target]
