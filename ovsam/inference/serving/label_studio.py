"""A machine-learning backend for Label Studio: a WSGI application, which `ovsam label-studio` serves.

    GET /health      {"status": "UP"}
    POST /setup      a labelling interface is checked when a project is connected
    POST /predict    tasks -> predictions; with the context of a smart tool, the mask of its clicks or box

The words are the labels of the project's labelling interface, so that one backend serves any project. A label with
`predicted_values="puppy,hound"` is searched for by these phrases in place of its name. The protocol needs no package of
Label Studio.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from xml.etree import ElementTree

import httpx
from PIL import Image

from ovsam.errors import InputError
from ovsam.inference.labelling.sources import Item
from ovsam.inference.segmenter import EncodedImage, Segmenter
from ovsam.processing.images import open_image
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats.label_studio import SHAPES, to_label_studio
from ovsam.results.results import Results

logger = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs")  # of image addresses; a request must not open files of this machine
SECONDS = 30.0  # to wait for an image that Label Studio serves


@dataclass(frozen=True)
class Interface:
    """What predictions need of a labelling interface: the tag that shows the image, its field in the data of a task,
    and the tag of the labels, with the shape of its regions.

    threshold: lowest score, the attribute `model_score_threshold` of the tag of the labels; None without it.
    """

    field: str
    to_name: str
    from_name: str
    shape: str
    words: Vocabulary
    threshold: float | None = None


def read_interface(config: str) -> Interface:
    """Read a labelling interface: the first BrushLabels, else PolygonLabels, else RectangleLabels on an image.

    Raises InputError if it has none, or they have no labels.
    """
    try:
        root = ElementTree.fromstring(config)
    except ElementTree.ParseError as error:
        raise InputError(f"The labelling interface is not valid XML ({error}).") from error
    images = {tag.get("name"): tag.get("value", "").removeprefix("$") for tag in root.iter("Image")}
    for shape in SHAPES:
        for tag in root.iter(f"{shape.title()}Labels"):
            if tag.get("toName") in images:
                words = {}
                for label in tag.iter("Label"):
                    name = label.get("value", "")
                    words |= {phrase: name for phrase in (label.get("predicted_values") or name).split(",")}
                given = tag.get("model_score_threshold")
                image = str(tag.get("toName"))
                threshold = float(given) if given else None
                return Interface(images[image], image, tag.get("name", ""), shape, Vocabulary(words), threshold)
    expected = " or ".join(f"<{shape.title()}Labels>" for shape in SHAPES)
    raise InputError(f"The labelling interface has no labels for masks of an image; add {expected} with toName.")


class Backend:
    """Predicts the tasks of Label Studio; an instance is a WSGI application.

    Args:
        segmenter: the model.
        threshold: lowest score where the labelling interface gives none; by default the model's own.
        url, token: address and API key of Label Studio, to download the images that it serves; by default those that it
            sends when a project is connected.
    """

    def __init__(self, segmenter: Segmenter, threshold: float | None = None, url: str = "", token: str = ""):
        self.segmenter, self.threshold = segmenter, threshold
        self.url, self.token, self._given = url.rstrip("/"), token, bool(url)
        self._lock = threading.Lock()  # one prediction at a time
        self._last: tuple[str, EncodedImage] | None = None  # the image that is being clicked on

    def setup(self, request: dict[str, Any]) -> dict[str, Any]:
        """Check a labelling interface (`schema`), and keep the address and the API key of Label Studio."""
        read_interface(request.get("schema") or "")
        if not self._given:
            self.url, self.token = str(request.get("hostname") or "").rstrip("/"), request.get("access_token") or ""
        return {"model_version": self.segmenter.name}

    def predict(
        self, tasks: Sequence[dict[str, Any]], config: str, context: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return a prediction for each task.

        Args:
            tasks: tasks with `data`.
            config: the labelling interface.
            context: the regions of a smart tool: clicks, or a box, on one object.

        Raises:
            InputError: the labelling interface or the context is invalid, or no image can be opened.
        """
        interface = read_interface(config)
        regions = (context or {}).get("result") or []
        predictions, errors = [], []
        for task in tasks:
            try:
                found = self._prompted(task, interface, regions) if regions else self._searched(task, interface)
                written = to_label_studio(found, interface.shape, names=(interface.from_name, interface.to_name))
                predictions += written["predictions"]
            except InputError as error:  # the others are predicted
                logger.warning("Task %s: %s", task.get("id"), error)
                predictions.append({"result": [], "model_version": self.segmenter.name})
                errors.append(error)
        if errors and len(errors) == len(tasks):
            raise errors[0]
        return predictions

    def _searched(self, task: dict[str, Any], interface: Interface) -> Results:
        image = self._open(task, interface)
        threshold = self.threshold if interface.threshold is None else interface.threshold
        with self._lock:
            return cast(Results, self.segmenter.where(image, interface.words, threshold=threshold))

    def _prompted(self, task: dict[str, Any], interface: Interface, regions: Sequence[dict[str, Any]]) -> Results:
        """The object of clicks or a box, with the label that is selected in the tool, or else the most similar one."""
        points, labels, boxes, chosen = [], [], [], None
        for region in regions:
            value, kind = region["value"], region["type"]
            width, height = region["original_width"] / 100, region["original_height"] / 100  # from percent
            x, y = value["x"] * width, value["y"] * height
            if kind.startswith("keypoint"):
                points.append([x, y])
                labels.append(int(region.get("is_positive", True)))
            elif kind.startswith("rectangle"):
                boxes.append([x, y, x + value["width"] * width, y + value["height"] * height])
            chosen = next(iter(value.get(kind) or []), chosen)
        prompts: dict[str, Any] = {"points": points, "labels": labels} if points else {}
        prompts |= {"boxes": boxes} if boxes else {}
        address, last = str(task["data"].get(interface.field)), self._last
        if last is None or last[0] != address:
            image = self._open(task, interface)
            with self._lock:
                last = address, self.segmenter.encode(image)
            self._last = last
        with self._lock:
            found = cast(Results, self.segmenter.what(last[1], **prompts, vocabulary=interface.words))
        if chosen in interface.words.labels:
            found.instances[:] = [replace(one, label=chosen) for one in found]
        return found

    def _open(self, task: dict[str, Any], interface: Interface) -> Image.Image:
        address = str(task["data"].get(interface.field) or "")
        if address.startswith("/") or (self.url and address.startswith(f"{self.url}/")):
            return self._download(address)
        if address.partition("://")[0] not in SCHEMES:
            expected = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise InputError(f"The image {address!r} is no address; it must start with {expected} or /.")
        return Item(address, address).open()

    def _download(self, address: str) -> Image.Image:
        """Download an image that Label Studio serves, with its API key."""
        if not self.url:
            raise InputError(f"The image {address} is served by Label Studio; set LABEL_STUDIO_URL to its address.")
        try:
            kind, key = "Token", self.token
            if key.count(".") == 2:  # a personal access token is exchanged for one of five minutes
                renewed = httpx.post(f"{self.url}/api/token/refresh", json={"refresh": key}, timeout=SECONDS)
                kind, key = "Bearer", renewed.raise_for_status().json()["access"]
            headers = {"Authorization": f"{kind} {key}"} if key else {}
            answer = httpx.get(self.url + address.removeprefix(self.url), headers=headers, timeout=SECONDS)
            return open_image(answer.raise_for_status().content)
        except httpx.HTTPError as error:
            raise InputError(
                f"The image {address} cannot be downloaded from {self.url} ({error}); set LABEL_STUDIO_URL and "
                "LABEL_STUDIO_API_KEY."
            ) from error

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request, as WSGI defines it; errors are answered with status 400 and {"error": sentence}."""
        status, answer = HTTPStatus.OK, {}
        match environ["REQUEST_METHOD"], environ["PATH_INFO"].rstrip("/"):
            case "GET", "" | "/health":
                answer = {"status": "UP", "model_class": self.segmenter.name}
            case "POST", ("/setup" | "/predict" | "/webhook") as path:
                try:
                    answer = self._post(path, json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
                except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
                    reason = str(error) if isinstance(error, InputError) else f"The request is invalid ({error!r})."
                    logger.warning("%s: %s", path, reason)
                    status, answer = HTTPStatus.BAD_REQUEST, {"error": reason}
            case _:
                status, answer = HTTPStatus.NOT_FOUND, {"error": "There are /health, /setup and /predict only."}
        content = json.dumps(answer).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [content]

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path == "/setup":
            return self.setup(request)
        if path == "/webhook":  # annotations were saved, which a model that is not trained here need not learn of
            return {"status": "ok"}
        context = (request.get("params") or {}).get("context")
        found = self.predict(request["tasks"], request.get("label_config") or "", context)
        return {"results": found, "model_version": self.segmenter.name}


class _Server(ThreadingMixIn, WSGIServer):  # /health is answered during a prediction
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.info(format, *args)


def make_backend_server(segmenter: Segmenter, host: str, port: int, threshold: float | None = None) -> WSGIServer:
    """Return a server of the backend, to be run by `serve_forever`.

    The environment variables LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY are `url` and `token` of the Backend.

    Raises InputError if the address cannot be used.
    """
    backend = Backend(
        segmenter, threshold, os.environ.get("LABEL_STUDIO_URL", ""), os.environ.get("LABEL_STUDIO_API_KEY", "")
    )
    try:
        return make_server(host, port, backend, _Server, _Handler)
    except OSError as error:
        raise InputError(f"The backend cannot be served at {host}:{port} ({error.strerror or error}).") from error
