"""The side of ovsam: models, features of images, and their limits. Does not import Gradio."""

import asyncio
import atexit
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from turns import Show, Turns, WordLists, no_show

import ovsam
from ovsam.checkpoints.download import hub_has
from ovsam.checkpoints.embedded import EMBEDDED
from ovsam.checkpoints.presets import PRESETS
from ovsam.processing.images import open_file, open_image

try:  # on a ZeroGPU Space each such call gets a GPU
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(run: Callable) -> Callable:
        return run


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
ON_SPACE = "SPACE_ID" in os.environ
FLOOR = 0.1  # questions run down to about this score, so that the sliders need no model
MAX_MEGABYTES = 20
MAX_PIXELS = 25_000_000
PICTURES_A_SESSION = 3
FEATURE_BYTES = int(float(os.environ.get("OVSAM_DEMO_GB", 2)) * 1e9)  # features of all sessions together
MODELS = 2  # in memory at a time
MAX_WAITING = 40  # questions; one more raises an error
SHORT_LIST = 100  # words; longer lists are embedded before the question takes its turn
AT_START = ("coco", "lvis", "imagenet21k")  # vocabularies whose embeddings are made when a model is loaded


class Models:
    """Loaded models by name; the least recently used ones are dropped. Loading one does not delay the others.

    Visitors choose presets and models of the Hub. `own` are the models that this server was started with, which may be
    folders: what a visitor sends is never a path of the server.
    """

    def __init__(self):
        self.own: set[str] = set()
        self._kept: OrderedDict[str, ovsam.Segmenter] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> ovsam.Segmenter:
        name = (name or "").strip()
        if not name:
            raise ovsam.InputError("Choose a model: a preset, or a Hub id such as ORG/NAME.")
        if name not in self.own and name not in PRESETS and (not HUB_ID.fullmatch(name) or os.path.exists(name)):
            raise ovsam.InputError(
                f"A model is a preset ({', '.join(PRESETS)}) or a Hub id such as ORG/NAME; `ovsam demo --model` takes "
                "a folder."
            )
        with self._lock:
            loading = self._loading.setdefault(name, threading.Lock())
        with loading:
            model = self._find(name)
            return model if model is not None else self._keep(name, ovsam.load(name))

    def _find(self, name: str) -> ovsam.Segmenter | None:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def _keep(self, name: str, model: ovsam.Segmenter) -> ovsam.Segmenter:
        with self._lock:
            self._kept[name] = model
            while len(self._kept) > MODELS:
                self._kept.popitem(last=False)
        return model


class Features:
    """Features of images, on the CPU, limited in number for each session and in bytes for all.

    The least recently used ones are dropped, and computed again when they are needed.
    """

    def __init__(self, a_session: int = PICTURES_A_SESSION, size: int = FEATURE_BYTES):
        self.a_session, self.size = a_session, size
        self._kept: OrderedDict[tuple[str, str, str], Any] = OrderedDict()  # (session, model, image)
        self._sizes: dict[tuple[str, str, str], int] = {}
        self._lock = threading.RLock()

    def get(self, session: str, model: str, picture: str, make: Callable[[], Any]) -> Any:
        key = (session, model, picture)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = features = make()
                tensors = [leaf for leaf in tree_leaves(features.features) if isinstance(leaf, torch.Tensor)]
                self._sizes[key] = sum(tensor.nbytes for tensor in tensors)
            self._kept.move_to_end(key)
            features = self._kept[key]
            own = [other for other in self._kept if other[0] == session]
            for other in own[: -self.a_session]:
                self._drop(other)
            while self.bytes > self.size and self._kept:
                self._drop(next(iter(self._kept)))
            return features

    def forget(self, session: str) -> None:
        with self._lock:
            for key in [key for key in self._kept if key[0] == session]:
                self._drop(key)

    def _drop(self, key: tuple[str, str, str]) -> None:
        del self._kept[key], self._sizes[key]

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._kept)


models = Models()
features = Features()
turns = Turns(MAX_WAITING)
word_lists = WordLists(turns)
atexit.register(turns.close)
seconds: dict[str, float] = {}  # duration of the last encoding of each model


async def ask(
    model: str, session: str, picture: "Upload", question: str | None, show: Show = no_show, **arguments
) -> ovsam.Results | None:
    """Run a question, a method of Segmenter, on an image; None only encodes it, so that the next question is fast.

    `show` gets the progress. Long lists of words are embedded before the question takes its turn, so that they do not
    delay other questions.
    """
    await asyncio.to_thread(models.get, model)
    for words in (arguments.get("words"), arguments.get("vocabulary")):
        if isinstance(words, str) or len(words or ()) > SHORT_LIST:
            await prepare_words(model, words, show)
    return await turns.take(lambda: ask_now(model, session, picture, question, **arguments), show)


def ask_now(model: str, session: str, picture: "Upload", question: str | None, **arguments) -> ovsam.Results | None:
    encoded = features.get(session, model, picture.sha256, lambda: encode(model, picture))
    if question is None:
        return None
    found = answer(model, question, encoded, arguments)
    found.file_name = picture.name
    return found


async def prepare_words(model: str, words: str | list[str], show: Show = no_show) -> None:
    """Wait until a list is embedded."""
    name = words if isinstance(words, str) else "\n".join(words)
    segmenter = await asyncio.to_thread(models.get, model)
    await word_lists.ready((model, name), lambda progress: segmenter.embed(words, progress), show)


def prepare_built_in(model: str) -> None:
    """Start embedding the built-in vocabularies before they are needed."""
    segmenter = models.get(model)
    for words in (segmenter.model.config.vocabulary, *AT_START):
        if words:
            name = words if isinstance(words, str) else "own"
            word_lists.begin((model, name), lambda progress, words=words: segmenter.embed(words, progress))


def default_score(model: str, question: str) -> float:
    """The default threshold of the library; `everything` selects by objectness and has none."""
    return 0.0 if question == "everything" else models.get(model).model.config.score_threshold


def floor(model: str, score: float) -> float:
    """The threshold of a question: instances over `score` are those of the library, and sliders can go lower.

    Below its proposal_threshold a model would refine more proposals, and find more instances over `score`.
    """
    return min(max(FLOOR, models.get(model).model.config.proposal_threshold), score)


def encode(model: str, picture: "Upload") -> ovsam.EncodedImage:
    start = time.perf_counter()
    encoded = encode_on_device(model, picture.open())
    seconds[model] = time.perf_counter() - start
    return encoded


@on_gpu
def encode_on_device(model: str, picture: Image.Image) -> ovsam.EncodedImage:
    return models.get(model).encode(picture).to("cpu")


@on_gpu
def answer(model: str, question: str, encoded: ovsam.EncodedImage, arguments: dict) -> ovsam.Results:
    segmenter = models.get(model)
    return getattr(segmenter, question)(encoded.to(segmenter.device), **arguments)


class Upload:
    """An image on disk within the limits, identified by the hash of its file."""

    def __init__(self, path: Path, name: str, sha256: str):
        self.path, self.name, self.sha256 = path, name, sha256
        if path.stat().st_size > MAX_MEGABYTES * 1e6:
            raise ovsam.InputError(f"{name} has more than {MAX_MEGABYTES} MB; make it smaller, for example as JPEG.")
        check_pixels(path, name)
        self.size = self.open().size  # width and height, upright
        self.animated = is_animated(path)

    def open(self) -> Image.Image:
        try:
            return open_image(self.path)
        except ovsam.InputError as error:  # do not show paths of the server
            raise ovsam.InputError(str(error).replace(str(self.path), self.name)) from error


def check_pixels(path: Path, name: str) -> None:
    """Check the size in the header before decoding; `open_image` raises an error for files without one."""
    try:
        with open_file(path) as picture:
            width, height = picture.size
    except Exception:  # each decoder raises errors of its own
        return
    if width * height > MAX_PIXELS:
        raise ovsam.InputError(
            f"{name} has {width}x{height} pixels; {MAX_PIXELS // 10**6} million are the most here. Make it smaller."
        )


def is_animated(path: Path) -> bool:
    with open_file(path) as picture:
        return getattr(picture, "is_animated", False)


def missing(model: str) -> bool:
    """Whether a preset is neither in the cache nor can be downloaded."""
    preset = PRESETS.get(model)
    return bool(preset and preset.parts) and not preset.is_cached and not hub_has(preset.parts["sam"])


def speed(model: str) -> str:
    """The measured time of an image, in one sentence."""
    device = models.get(model).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
    note = " It is small, and finds COCO's 80 words best." if model == EMBEDDED else ""
    if model not in seconds:
        return f"On {where}; the first image shows how long one takes.{note}"
    return f"An image takes {seconds[model]:.1f} s on {where}, once; questions about it are faster.{note}"
