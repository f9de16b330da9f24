"""`ovsam video`: outputs and errors."""

import json

import av
import numpy as np
import pytest
from PIL import Image

import ovsam_cli
from ovsam.ops import rle
from tests.common import tiny_model, tiny_processor
from tests.inference.test_video import HEIGHT, WIDTH, overlap, scene, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip(tmp_path):
    images, masks = scene(5)
    write(tmp_path / "clip.mp4", images)
    ids = np.where(masks[0], 3, 0).astype(np.uint8)
    ids[2:12, 70:90] = 5
    Image.fromarray(ids).save(tmp_path / "ids.png")
    Image.fromarray(masks[0]).save(tmp_path / "binary.png")
    return tmp_path, masks


def test_it_writes_video_json_and_id_maps(model, clip, capsys):
    folder, masks = clip
    targets = ["-o", f"{folder}/out.mp4", "--json", f"{folder}/out.json", "--masks", f"{folder}/maps"]
    asked = ["--mask", f"0:{folder}/ids.png", "--model", model]
    assert ovsam_cli.main(["video", f"{folder}/clip.mp4", *asked, *targets]) == 0
    with av.open(f"{folder}/out.mp4") as written:
        stream = written.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (WIDTH, HEIGHT, 10)
        assert len(list(written.decode(stream))) == 5
    data = json.loads((folder / "out.json").read_text())
    assert sorted(one["id"] for one in data["annotations"]) == [3, 5]
    thing = next(one for one in data["annotations"] if one["id"] == 3)
    for number, mask in enumerate(masks):
        with Image.open(folder / "maps" / f"{number:05d}.png") as image:
            assert image.mode == "L"
            ids = np.asarray(image)
        assert ids.shape == (HEIGHT, WIDTH) and set(np.unique(ids)) <= {0, 3, 5}
        assert overlap(ids == 3, mask) > 0.5
        assert np.array_equal(ids == 3, rle.decode(thing["segmentations"][number]))
    assert "frames 0-4 (5)" in capsys.readouterr().out


def test_a_folder_of_frames_every_second_and_a_binary_mask(model, clip):
    folder, _ = clip
    (folder / "frames").mkdir()
    for number, image in enumerate(scene(5)[0]):
        image.save(folder / "frames" / f"{number:05d}.png")
    asked = ["--mask", f"0:{folder}/binary.png", "--point", "2:10,10", "--every", "2", "--model", model]
    assert ovsam_cli.main(["video", f"{folder}/frames", *asked, "--masks", f"{folder}/maps"]) == 0
    assert sorted(path.name for path in (folder / "maps").iterdir()) == ["00000.png", "00002.png", "00004.png"]


def test_an_interruption_closes_both_files(model, clip, monkeypatch):
    from ovsam.inference.video import VideoStream

    folder, _ = clip
    whole = VideoStream.__iter__

    def interrupted(self):
        for number, frame in enumerate(whole(self)):
            if number == 3:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(VideoStream, "__iter__", interrupted)
    asked = ["--mask", f"0:{folder}/binary.png", "--model", model]
    targets = ["-o", f"{folder}/out.mp4", "--json", f"{folder}/out.json"]
    assert ovsam_cli.main(["video", f"{folder}/clip.mp4", *asked, *targets]) == 130
    with av.open(f"{folder}/out.mp4") as written:
        assert len(list(written.decode(video=0))) == 3
    assert json.loads((folder / "out.json").read_text())["videos"][0]["length"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.mp4", "--text", "dog", "-o", "out.mp4"], "There is no video nowhere.mp4"),
        (["{clip}", "-o", "out.mp4"], "nothing to track"),
        (["{clip}", "--text", "dog"], "There is no output"),
        (["{clip}", "--mask", "0:nowhere.png", "--json", "out.json"], "There is no mask nowhere.png"),
        (["{clip}", "--text", "dog", "-o", "{clip}"], "is the video itself"),
    ],
)
def test_invalid_arguments_raise_an_error_before_a_model_is_loaded(clip, capsys, arguments, message):
    path = str(clip[0] / "clip.mp4")
    assert ovsam_cli.main(["video", *(one.replace("{clip}", path) for one in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["10,20", "x:10,20", "0:10", "-1:10,20"])
def test_a_prompt_without_a_frame_raises_an_error(clip, capsys, value):
    with pytest.raises(SystemExit):
        ovsam_cli.main(["video", str(clip[0] / "clip.mp4"), "--point", value, "-o", "out.mp4"])
    assert value.removeprefix("0:") in capsys.readouterr().err
