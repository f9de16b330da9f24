"""The three questions for programs: typed endpoints that gradio_client, curl and MCP clients can call."""

import asyncio
import hashlib
import math
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import engine
import gradio as gr
from gradio.utils import get_upload_folder
from page import told
from scene import MOST_OVERLAP, Chosen, Sliders, sift

import ovsam
from ovsam.processing import arguments
from ovsam.processing.vocabulary import split_words

# Limits of one question.
MAX_WORDS, MAX_POINTS, MAX_BOXES, MAX_EXEMPLARS = 2_000, 50, 50, 20

BuiltIn = Literal["own", "coco", "lvis", "imagenet21k"]


def add_endpoints(page_model: str) -> None:
    """Add /what, /where and /everything to a page, from within it."""

    async def ask(request: gr.Request, picture: Any, model: str, question: str, sliders: Sliders, **asked) -> dict:
        session = request.session_hash or secrets.token_hex(16)
        try:
            upload = uploaded(picture)
            found = await engine.ask(name_of(model) or page_model, session, upload, question, **asked)
            return sift(found, sliders).to_coco()
        finally:
            if not request.session_hash:  # these features cannot be used again
                engine.features.forget(session)

    async def loaded(model: Any) -> str:
        """Load the model and return its name, since its default scores are read before the question."""
        name = name_of(model) or page_model
        await asyncio.to_thread(engine.models.get, name)
        return name

    @told
    async def what(
        request: gr.Request,
        picture: gr.FileData,
        points: list[list[float]] | None = None,
        boxes: list[list[float]] | None = None,
        vocabulary: list[str] | BuiltIn = "own",
        model: str = "",
    ) -> dict:
        """Segment and classify the objects at points or in boxes.

        Args:
            picture: The image.
            points: Points of one object: [x, y] on it, [x, y, 0] beside it; pixels from the top left corner.
            boxes: Boxes [left, top, right, bottom] in pixels, an object each; together with points, one box.
            vocabulary: Class names: a list, "coco", "lvis", "imagenet21k", or "own", those of the model.
            model: A preset or a Hub id; empty for the model of the page.

        Returns:
            A COCO data set of this image; its annotations also have label, score, mask_score and topk.
        """
        prompts = Chosen(clicks(points)).arguments()
        prompts |= {"boxes": few("boxes", arguments.boxes(boxes), MAX_BOXES) or None, "vocabulary": names(vocabulary)}
        return await ask(request, picture, model, "what", Sliders(), **prompts)

    @told
    async def where(
        request: gr.Request,
        picture: gr.FileData,
        words: list[str] | None = None,
        negative: list[str] | None = None,
        exemplars: list[list[float]] | None = None,
        score: float | None = None,
        mask_score: float = 0.0,
        overlap: float = MOST_OVERLAP,
        min_area: int = 0,
        model: str = "",
    ) -> dict:
        """Find all instances of text queries, or all objects similar to those in boxes.

        Args:
            picture: The image.
            words: Text queries.
            negative: Negative queries: instances with a higher score for them are dropped.
            exemplars: Boxes [left, top, right, bottom] in pixels around example objects.
            score: The lowest score, 0 to 1; the model's default if not given.
            mask_score: The lowest predicted IoU of a mask.
            overlap: The highest IoU of two masks.
            min_area: The smallest area in pixels.
            model: A preset or a Hub id; empty for the model of the page.

        Returns:
            A COCO data set of this image; its annotations also have label, score, mask_score and topk.
        """
        model = await loaded(model)
        wanted = {
            "words": word_list(words) or None,
            "negative": word_list(negative),
            "exemplars": few("exemplars", arguments.boxes(exemplars, "exemplars"), MAX_EXEMPLARS) or None,
        }
        sliders = check_sliders(score, mask_score, overlap, min_area)
        score = engine.default_score(model, "where") if score is None else score
        sliders = replace(sliders, score=score)
        return await ask(request, picture, model, "where", sliders, threshold=engine.floor(model, score), **wanted)

    @told
    async def everything(
        request: gr.Request,
        picture: gr.FileData,
        vocabulary: list[str] | BuiltIn = "own",
        score: float | None = None,
        mask_score: float = 0.0,
        overlap: float = MOST_OVERLAP,
        min_area: int = 0,
        model: str = "",
    ) -> dict:
        """Segment and classify all objects in an image.

        Args:
            picture: The image.
            vocabulary: Class names: a list, "coco", "lvis", "imagenet21k", or "own", those of the model.
            score: The lowest score, 0 to 1; 0 if not given.
            mask_score: The lowest predicted IoU of a mask.
            overlap: The highest IoU of two masks.
            min_area: The smallest area in pixels.
            model: A preset or a Hub id; empty for the model of the page.

        Returns:
            A COCO data set of this image; its annotations also have label, score, mask_score and topk.
        """
        model, words = await loaded(model), names(vocabulary)
        sliders = check_sliders(score, mask_score, overlap, min_area)
        score = engine.default_score(model, "everything") if score is None else score
        sliders = replace(sliders, score=score)
        floor = engine.floor(model, score)
        return await ask(request, picture, model, "everything", sliders, threshold=floor, vocabulary=words)

    for endpoint in (what, where, everything):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)


def names(vocabulary: list[str] | BuiltIn) -> list[str] | str | None:
    if isinstance(vocabulary, str) and vocabulary not in BuiltIn.__args__:  # ovsam would read it as a file name
        raise ovsam.InputError(f"A vocabulary is a list of words or one of {', '.join(BuiltIn.__args__)}.")
    if vocabulary is None or vocabulary == "own":
        return None
    return vocabulary if isinstance(vocabulary, str) else word_list(vocabulary)


def word_list(words: Any) -> list[str]:
    """Words as a list, never as a string, which ovsam could read as the name of a file of this machine."""
    if words is None:
        return []
    if isinstance(words, str):
        words = split_words(words)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ovsam.InputError(f"The words are {arguments.short(words)}; they must be a list of words.")
    return few("words", words, MAX_WORDS)


def few(name: str, given: list, most: int) -> list:
    """Limit the size of a question, since questions wait for each other."""
    if len(given) > most:
        raise ovsam.InputError(f"There are {len(given):,} {name}; {most:,} are the most here. Ask in parts.")
    return given


def clicks(points: Any) -> tuple[tuple[float, float, int], ...]:
    """[x, y] or [x, y, label] of each click."""
    given = points or []
    if not isinstance(given, list) or not all(isinstance(point, list) and len(point) in (2, 3) for point in given):
        raise ovsam.InputError("A point is [x, y], [x, y, 1] (on the object) or [x, y, 0] (beside it).")
    places = arguments.points([point[:2] for point in given])
    labels = arguments.point_labels([point[2] if len(point) == 3 else 1 for point in given], len(given))
    few("points", given, MAX_POINTS)
    return tuple((x, y, label) for (x, y), label in zip(places, labels, strict=True))


def check_sliders(score: Any, mask_score: Any, overlap: Any, min_area: Any) -> Sliders:
    """The sliders; a score of None becomes 0."""
    score = arguments.optional(arguments.number, "score", score, 0, 1)
    return Sliders(
        score or 0.0,
        arguments.number("mask_score", mask_score, 0, 1),
        arguments.number("overlap", overlap, 0, 1),
        arguments.number("min_area", min_area, 0, math.inf),
    )


def name_of(model: Any) -> str:
    if not isinstance(model, str | None):
        raise ovsam.InputError(f"The model is {arguments.short(model)}; it must be a preset or a Hub id.")
    return model or ""


def uploaded(picture: Any) -> engine.Upload:
    """The upload of a client; other files of this machine are not accepted."""
    given = picture.get("path") if isinstance(picture, dict) else getattr(picture, "path", None)
    path = Path(given).resolve() if isinstance(given, str) and given and "\0" not in given else None
    if path is None or not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise ovsam.InputError("The image must be uploaded.")
    return engine.Upload(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
