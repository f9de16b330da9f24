"""The Gradio Space: its handlers with a stand-in for the model, and its server with the embedded checkpoint."""

from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from ovsam.errors import InputError
from ovsam.images import open_image
from ovsam.results import Results

EXAMPLE = Path(__file__).parents[1] / "demo" / "examples" / "hamburgers.jpg"


class FakeSegmenter:
    """Finds the upper and the lower half of any picture, with scores 0.8 and 0.2, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def encode(self, image):
        self.asked.append(("encode", image))
        return open_image(image), "features"

    def _find(self, image, label, source):
        picture, features = image
        assert features == "features"
        masks = np.zeros((2, picture.height, picture.width), bool)
        masks[0, : picture.height // 2] = masks[1, picture.height // 2 :] = True
        names = [[(label, 0.8), ("thing", 0.1)], [(label, 0.2)]]
        return Results.from_arrays(masks, [label] * 2, [0] * 2, [0.8, 0.2], [0.5] * 2, [label] * 2, source, names)

    def where(self, image, words, negative=(), threshold=None):
        self.asked.append(("where", words, negative, threshold))
        return self._find(image, words[0], "text")

    def what(self, image, points=None, vocabulary=None):
        if points[0][0] > 60:
            raise InputError(f"The point {points[0][0]} is outside the picture <b>.")
        self.asked.append(("what", points, vocabulary))
        return self._find(image, "cat", "point")[1:]

    def everything(self, image, vocabulary=None):
        self.asked.append(("everything", vocabulary))
        return self._find(image, "dog", "auto")


@pytest.fixture(scope="module")
def app():
    from demo import app  # here, because it loads the model

    return app


@pytest.fixture
def fake(app, monkeypatch):
    monkeypatch.setattr(app, "segmenter", FakeSegmenter())
    app.encode.cache_clear()
    yield app.segmenter
    app.encode.cache_clear()


@pytest.fixture
def picture(app, tmp_path, monkeypatch):
    """A picture of 60x40 among the uploads."""
    monkeypatch.setattr(app.demo, "GRADIO_CACHE", str(tmp_path))
    path = tmp_path / "small.png"
    Image.new("RGB", (60, 40), (10, 90, 50)).save(path)
    return {"path": str(path)}


def test_words_are_found_and_the_slider_asks_nothing(app, fake, picture):
    answer, overlay, sentence, rows, coco = app.where(picture, " cat,\n black dog ,", "fox", 0.5)
    assert fake.asked == [("encode", picture["path"]), ("where", ["cat", "black dog"], ["fox"], app.FLOOR)]
    assert rows == [["cat", "0.80", "0.50", "0,0,60,20", 1200]]
    assert sentence == "Found: **1** × cat."
    assert len(coco["annotations"]) == 1 and coco["images"][0]["file_name"] == "small.png"
    assert overlay.size == (60 * 8, 40 * 8)  # enlarged, or the names would not fit

    assert len(app.show(answer, 0.1)[2]) == 2
    overlay, sentence, rows, coco = app.show(answer, 0.9)
    assert rows == [] and coco["annotations"] == []
    assert sentence == "Nothing scores 0.90 or more; the best of the rest scores 0.80."
    assert (np.asarray(overlay) == (10, 90, 50)).all()
    assert len(fake.asked) == 2


def test_a_picture_is_encoded_once_for_all_questions(app, fake, picture):
    assert app.prepare(picture) == (None, None, "", [], None)
    app.where(picture, "cat", "", 0.5)
    app.everything(picture, "", 0.5)
    app.what(picture, 3, 4, "cat, dog")
    assert [question for question, *_ in fake.asked] == ["encode", "where", "everything", "what"]
    assert fake.asked[2:] == [("everything", None), ("what", [[3, 4]], ["cat", "dog"])]


def test_a_click_has_its_answer_however_low_it_scores(app, fake, picture):
    answer, _, sentence, rows, _ = app.what(picture, 3, 4, "")
    assert sentence == "This is **cat 0.20**." and len(rows) == 1
    assert len(app.show(answer, 0.9)[2]) == 1

    path, results = answer
    nameless = Results([replace(instance, topk=[]) for instance in results], results.size)
    assert app.show((path, nameless), 0)[1] == "This is **something**."


@pytest.mark.parametrize(
    "ask, sentence",
    [
        (lambda app, _: app.where(None, "cat", "", 0.3), "There is no picture yet"),
        (lambda app, picture: app.where(picture, " , ", "", 0.3), "There is nothing to find yet"),
        (lambda app, picture: app.what(picture, 61, 4, ""), "outside the picture &lt;b&gt;."),
        (lambda app, picture: app.prepare({"path": picture["path"] + "x"}), "small.pngx does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(app, fake, picture, ask, sentence):
    with pytest.raises(gr.Error) as error:
        ask(app, picture)
    assert sentence in error.value.message and picture["path"] not in error.value.message
    assert not error.value.print_exception


def test_only_uploads_are_opened(app, fake, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(app.demo, "GRADIO_CACHE", str(tmp_path / "uploads"))
    with pytest.raises(gr.Error, match="must be uploaded"):
        app.where(picture, "cat", "", 0.5)
    assert not fake.asked


def test_the_endpoints_are_the_three_questions(app):
    api = app.demo.get_api_info()
    asked = {
        name: {p["parameter_name"]: p["python_type"]["type"] for p in endpoint["parameters"]}
        for name, endpoint in api["named_endpoints"].items()
    }
    assert asked == {
        "/where": {"picture": "filepath", "words": "str", "negative": "str", "threshold": "float"},
        "/what": {"picture": "filepath", "x": "float", "y": "float", "names": "str"},
        "/everything": {"picture": "filepath", "names": "str", "threshold": "float"},
    }
    assert not api["unnamed_endpoints"]
    assert all(endpoint["description"] for endpoint in api["named_endpoints"].values())


def test_the_examples_exist(app):
    assert all((EXAMPLE.parent / file).is_file() for file, *_ in app.EXAMPLES)


def test_the_server_answers_only_this_machine_and_as_the_library_does(app, monkeypatch, tmp_path):
    not_a_picture = tmp_path / "text.png"
    not_a_picture.write_text("no picture")
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_SHARE"):
        monkeypatch.delenv(name, raising=False)
    app.encode.cache_clear()
    try:
        _, url, shared = app.demo.launch(prevent_thread_lock=True, quiet=True)
        assert url.startswith("http://127.0.0.1:") and shared is None
        client = Client(url, verbose=False)
        overlay, sentence, table, coco = client.predict(
            handle_file(str(EXAMPLE)), "hamburger, bicycle", "", app.FLOOR, api_name="/where"
        )
        with pytest.raises(Exception, match="text.png is not a picture that can be read"):
            client.predict(handle_file(str(not_a_picture)), 5, 5, "cat", api_name="/what")
        with pytest.raises(Exception, match="The point 600,5 is outside the picture, which is 512x512 pixels."):
            client.predict(handle_file(str(EXAMPLE)), 600, 5, "cat", api_name="/what")
    finally:
        app.demo.close(verbose=False)

    expected = app.segmenter.where(EXAMPLE, ["hamburger", "bicycle"], threshold=app.FLOOR)
    assert len(expected) > 0
    assert [a["label"] for a in coco["annotations"]] == expected.labels
    assert [a["segmentation"] for a in coco["annotations"]] == [i.segmentation for i in expected]
    np.testing.assert_allclose([a["score"] for a in coco["annotations"]], expected.scores, atol=1e-5)
    assert coco["info"]["model"] == "ovsam-tiny" and coco["images"][0]["file_name"] == EXAMPLE.name
    assert len(table["data"]) == len(expected) and sentence.startswith("Found: ")
    with Image.open(overlay) as drawn, Image.open(EXAMPLE) as original:
        assert drawn.size == original.size
        change = np.abs(np.asarray(drawn, float) - np.asarray(original, float))
        assert change[expected.masks.any(axis=0)].mean() > 10  # JPEG alone changes 2
