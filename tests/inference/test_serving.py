"""The model behind labelling tools, called as their own libraries call it."""

import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from label_stub import FakeSegmenter
from PIL import Image

import ovsam
import ovsam_cli
from ovsam.errors import InputError
from ovsam.inference.serving import cvat, label_studio
from ovsam.results.formats.label_studio import decode_rle, read_label_studio
from ovsam.results.results import Results

INTERFACE = """<View>
  <Image name="photo" value="$picture"/>
  <BrushLabels name="tag" toName="photo" model_score_threshold="0.1">
    <Label value="Dog" predicted_values="puppy, hound"/><Label value="red ball"/>
  </BrushLabels>
  <KeyPointLabels name="click" toName="photo" smart="true"><Label value="red ball"/></KeyPointLabels>
  <RectangleLabels name="frame" toName="photo" smart="true"><Label value="Dog"/></RectangleLabels>
</View>"""


class OneImage(FakeSegmenter):
    """The stand-in, asked about one image as `Segmenter.where` is."""

    asked: list

    def where(self, image, words, threshold=None):
        self.asked = [words.as_mapping(), threshold]
        found = self._find(image, np.asarray(image).mean(), words)
        return Results(found.instances, found.size, model=self.name).filter(score=threshold or 0)

    def encode(self, image):
        self.batches.append(1)
        return image

    def what(self, image, points=None, labels=None, boxes=None, vocabulary=None):
        self.asked = [points, labels, boxes]
        found = self._find(image, 0, vocabulary)
        return Results(found.instances[:1], found.size, model=self.name)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))


def test_cvat_gets_masks_and_polygons(picture, monkeypatch):
    sdk = pytest.importorskip("cvat_sdk.auto_annotation")
    masks = pytest.importorskip("cvat_sdk.masks")
    monkeypatch.setattr(cvat, "load", lambda model, device: OneImage())
    function = cvat.create("dog, red ball")
    assert isinstance(function.spec, sdk.DetectionFunctionSpec)
    assert [(label.name, label.id) for label in function.spec.labels] == [("dog", 0), ("red ball", 1)]
    expected = function.segmenter.where(picture, function.words)
    context = SimpleNamespace(frame_name="a.png", conf_threshold=None, conv_mask_to_poly=False)
    shapes = function.detect(context, picture)
    assert [(shape.type.value, shape.label_id, shape.frame) for shape in shapes] == [("mask", 0, 0), ("mask", 1, 0)]
    for shape, mask in zip(shapes, expected.masks, strict=True):
        np.testing.assert_array_equal(masks.decode_mask(shape.points, image_width=48, image_height=40), mask)
    context.conv_mask_to_poly = True
    shapes = function.detect(context, picture)
    assert {shape.type.value for shape in shapes} == {"polygon"} and min(shapes[0].points[1::2]) == 2
    context.conf_threshold = expected.scores.min() + 1e-4
    assert len(function.detect(context, picture)) == 1
    assert len(cvat.create("coco").words.labels) == 80
    with pytest.raises(InputError, match="There are no words"):
        cvat.create(" ,")


class LabelStudio(BaseHTTPRequestHandler):
    """Serves one image, as Label Studio does: with its API key only."""

    content = b""

    def do_GET(self):
        allowed = self.headers["Authorization"] in ("Token key", "Bearer five minutes")
        self.send_response((200 if self.path == "/data/upload/1/a.png" else 404) if allowed else 401)
        self.end_headers()
        self.wfile.write(self.content)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = (self.path, request) == ("/api/token/refresh", {"refresh": "a.b.c"})
        self.send_response(200 if good else 401)
        self.end_headers()
        self.wfile.write(b'{"access": "five minutes"}')

    def log_message(self, *_):
        pass


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def tool(picture):
    """The address of a stand-in for Label Studio."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    LabelStudio.content = buffer.getvalue()
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), LabelStudio)) as address:
        yield address


@pytest.fixture
def backend():
    """The stand-in for the model, and a client of its backend."""
    segmenter = OneImage()
    with (
        serving(label_studio.make_backend_server(segmenter, "127.0.0.1", 0)) as address,
        httpx.Client(base_url=address) as client,
    ):
        yield segmenter, client


def set_up(client, tool, token="key", schema=INTERFACE):
    return client.post("/setup", json={"schema": schema, "project": "1.2", "hostname": tool, "access_token": token})


def ask(client, *addresses, config=INTERFACE, context=None):
    tasks = [{"id": number, "data": {"picture": address}} for number, address in enumerate(addresses)]
    return client.post("/predict", json={"tasks": tasks, "label_config": config, "params": {"context": context}})


def test_label_studio_gets_predictions(backend, tool, picture, tmp_path):
    segmenter, client = backend
    assert client.get("/health").json() == {"status": "UP", "model_class": "fake"} == client.get("/").json()
    assert set_up(client, tool).json() == {"model_version": "fake"}
    answer = ask(client, "/data/upload/1/a.png", f"{tool}/data/upload/1/a.png").json()
    assert segmenter.asked == [{"puppy": "Dog", "hound": "Dog", "red ball": "red ball"}, 0.1]
    first, second = answer["results"]
    assert first == second and first["model_version"] == answer["model_version"] == "fake"
    expected = segmenter.where(picture, label_studio.read_interface(INTERFACE).words)
    assert [region["value"]["brushlabels"] for region in first["result"]] == [["Dog"], ["red ball"]]
    assert {(region["from_name"], region["to_name"], region["type"]) for region in first["result"]} == {
        ("tag", "photo", "brushlabels")
    }
    for region, mask in zip(first["result"], expected.masks, strict=True):
        np.testing.assert_array_equal(decode_rle(region["value"]["rle"], 40, 48), mask)
    assert first["score"] == pytest.approx(expected.scores.mean(), abs=1e-3)
    assert client.post("/webhook", json={"action": "ANNOTATION_CREATED"}).json() == {"status": "ok"}
    # What was predicted and accepted is exported as an annotation, which comes back.
    data = {"picture": "/data/upload/1/a.png"}
    (tmp_path / "export.json").write_text(json.dumps([{"data": data, "annotations": [first]}]))
    (again,) = read_label_studio(tmp_path / "export.json")
    assert again.file_name == "a.png" and [one.label for one in again] == ["Dog", "red ball"]


def test_label_studio_gets_boxes_and_polygons(backend, tool, picture):
    segmenter, client = backend
    set_up(client, tool)
    expected = segmenter.where(picture, label_studio.read_interface(INTERFACE).words)
    boxes = INTERFACE.replace("BrushLabels", "RectangleLabels", 2).replace(' model_score_threshold="0.1"', "")
    (found,) = ask(client, "/data/upload/1/a.png", config=boxes).json()["results"]
    assert segmenter.asked[1] is None and {region["type"] for region in found["result"]} == {"rectanglelabels"}
    for region, one in zip(found["result"], expected, strict=True):
        value = region["value"]
        sides = [value["x"] * 0.48, value["y"] * 0.4, value["width"] * 0.48, value["height"] * 0.4]
        assert sides == pytest.approx(one.bbox, abs=1e-4) and value["rotation"] == 0
    (found,) = ask(client, "/data/upload/1/a.png", config=boxes.replace("Rectangle", "Polygon")).json()["results"]
    assert {region["type"] for region in found["result"]} == {"polygonlabels"}


def test_smart_tools_of_label_studio(backend, tool):
    segmenter, client = backend
    set_up(client, tool)
    size = {"original_width": 48, "original_height": 40}
    clicks = [
        {"type": "keypointlabels", "value": {"x": 50, "y": 25, "keypointlabels": ["red ball"]}, **size},
        {
            "type": "keypointlabels",
            "value": {"x": 75, "y": 50, "keypointlabels": ["red ball"]},
            "is_positive": 0,
            **size,
        },
    ]
    (found,) = ask(client, "/data/upload/1/a.png", context={"result": clicks}).json()["results"]
    assert segmenter.asked == [[[24, 10], [36, 20]], [1, 0], None]
    assert [region["value"]["brushlabels"] for region in found["result"]] == [["red ball"]]
    frame = {"x": 25, "y": 50, "width": 50, "height": 25, "rectanglelabels": ["unknown"]}
    box = {"type": "rectanglelabels", "value": frame, **size}
    (found,) = ask(client, "/data/upload/1/a.png", context={"result": [box]}).json()["results"]
    assert segmenter.asked == [None, None, [[12, 20, 36, 30]]]
    assert [region["value"]["brushlabels"] for region in found["result"]] == [["Dog"]]  # the model's own choice
    assert segmenter.batches == [1]  # the image is encoded once


def test_label_studio_is_told_what_is_wrong(backend, tool, tmp_path, caplog):
    segmenter, client = backend
    Image.new("RGB", (48, 40)).save(tmp_path / "a.png")
    set_up(client, tool, "a.b.c")
    assert ask(client, "/data/upload/1/a.png").status_code == 200  # a personal access token
    good, bad = ask(client, "/data/upload/1/a.png", "/data/upload/2/b.png").json()["results"]
    assert len(good["result"]) == 2 and bad["result"] == [] and "Task 1: The image /data/upload/2/b.png" in caplog.text
    set_up(client, tool, "other")
    for answer, message in (
        (ask(client, "/data/upload/1/a.png"), "cannot be downloaded from"),
        (ask(client, str(tmp_path / "a.png")), "cannot be downloaded from"),  # no file of this machine
        (ask(client, f"file://{tmp_path}/a.png"), "it must start with http://, https://, s3://, gs://"),
        (ask(client, "a.png", config="<View/>"), "add <BrushLabels> or <PolygonLabels> or <RectangleLabels>"),
        (ask(client, "a.png", config="<View"), "is not valid XML"),
        (set_up(client, tool, schema="<View/>"), "has no labels for masks"),
        (ask(client, "/data/upload/1/a.png", context={"result": [{}]}), "The request is invalid (KeyError('value'))"),
        (client.post("/predict", content=b"no"), "The request is invalid"),
    ):
        assert answer.status_code == 400 and message in answer.json()["error"], answer.text
    assert client.get("/train").status_code == 404
    with pytest.raises(InputError, match="set LABEL_STUDIO_URL to its address"):
        label_studio.Backend(segmenter).predict([{"data": {"picture": "/data/a.png"}}], INTERFACE)
    with pytest.raises(InputError, match="cannot be served at 127.0.0.1"):
        label_studio.make_backend_server(segmenter, "127.0.0.1", client.base_url.port)


def test_the_address_of_label_studio_from_the_environment(tool, monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_URL", f"{tool}/")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "key")
    server = label_studio.make_backend_server(OneImage(), "127.0.0.1", 0)
    with serving(server) as address, httpx.Client(base_url=address) as client:
        set_up(client, "http://127.0.0.1:1", "wrong")  # which is not used
        assert ask(client, "/data/upload/1/a.png").status_code == 200


def test_the_command_serves_until_it_is_interrupted(monkeypatch, capsys):
    def interrupted(server):
        assert server.get_app().segmenter.name == "fake"
        raise KeyboardInterrupt

    monkeypatch.setattr(ovsam, "load", lambda model, device: OneImage())
    monkeypatch.setattr(label_studio.WSGIServer, "serve_forever", interrupted)
    assert ovsam_cli.main(["label-studio", "--port", "9137"]) == 130
    assert capsys.readouterr().out == "Label Studio's backend with the model fake: http://127.0.0.1:9137\n"


def test_label_studio_sdk_accepts_the_predictions(backend, tool, picture):
    sdk = pytest.importorskip("label_studio_sdk.label_interface")
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    segmenter, client = backend
    set_up(client, tool)
    expected = segmenter.where(picture, label_studio.read_interface(INTERFACE).words)
    boxes = INTERFACE.replace("BrushLabels", "RectangleLabels", 2)
    for config in (INTERFACE, boxes, boxes.replace("RectangleLabels", "PolygonLabels")):
        (found,) = ask(client, "/data/upload/1/a.png", config=config).json()["results"]
        assert sdk.LabelInterface(config).validate_prediction(found, return_errors=True) == []
        if config is INTERFACE:
            for region, mask in zip(found["result"], expected.masks, strict=True):
                decoded = brush.decode_rle(region["value"]["rle"]).reshape(40, 48, 4)[..., 3]
                np.testing.assert_array_equal(decoded > 0, mask)


def test_label_studio_ml_serves_the_same_predictions(tool, picture, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it keeps a cache
    base = pytest.importorskip("label_studio_ml.model").LabelStudioMLBase
    init_app = pytest.importorskip("label_studio_ml.api").init_app
    backend = label_studio.Backend(OneImage(), url=tool, token="key")

    class Model(base):
        def predict(self, tasks, context=None, **_):
            return backend.predict(tasks, self.label_config, context)

    client = init_app(Model).test_client()
    assert client.get("/health").json["status"] == "UP"
    assert client.post("/setup", json={"project": "1.2", "schema": INTERFACE}).status_code == 200
    task = {"id": 1, "data": {"picture": "/data/upload/1/a.png"}}
    answer = client.post("/predict", json={"tasks": [task], "project": "1.2", "label_config": INTERFACE, "params": {}})
    assert answer.json["results"] == backend.predict([task], INTERFACE)
