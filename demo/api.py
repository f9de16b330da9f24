"""The three questions for programs: typed endpoints that gradio_client, curl and MCP clients can call."""

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import engine
import gradio as gr
from scene import MOST_OVERLAP, Drawn, Sliders, sift

import ovsam

BuiltIn = Literal["own", "coco", "lvis", "imagenet21k"]


def add_endpoints(blocks: gr.Blocks, page_model: str, told: Callable) -> None:
    """Add /what, /where and /everything to a page, from within it; `told` makes an InputError a message."""

    def ask(request: gr.Request, picture: Any, model: str, question: str, sliders: Sliders, **arguments) -> dict:
        session = request.session_hash or secrets.token_hex(16)
        try:
            upload = uploaded(blocks, picture)
            return sift(engine.ask(model or page_model, session, upload, question, **arguments), sliders).to_coco()
        finally:
            if not request.session_hash:  # nobody could come back to these features
                engine.features.forget(session)

    @told
    def what(
        request: gr.Request,
        picture: gr.FileData,
        points: list[list[float]] | None = None,
        boxes: list[list[float]] | None = None,
        vocabulary: list[str] | BuiltIn = "own",
        model: str = "",
    ) -> dict:
        """Segment and name what is at clicked points or in boxes.

        Args:
            picture: The picture.
            points: Clicks on one object: [x, y] on it, [x, y, 0] beside it; pixels from the top left corner.
            boxes: Boxes [left, top, right, bottom] in pixels, an object each; together with points, one box.
            vocabulary: The names to choose from: a list of words, "coco", "lvis", "imagenet21k", or "own", the model's.
            model: A preset or a Hub id; empty for the model of the page.

        Returns:
            A COCO data set of this picture, whose annotations also have label, score, mask_score and topk.
        """
        if not all(len(point) in (2, 3) for point in points or ()):
            raise ovsam.InputError("A point is [x, y], [x, y, 1] (on the object) or [x, y, 0] (beside it).")
        if not all(len(box) == 4 for box in boxes or ()):
            raise ovsam.InputError("A box is [left, top, right, bottom].")
        clicks = tuple((x, y, int(label[0]) if label else 1) for x, y, *label in points or ())
        arguments = Drawn(clicks).arguments() | {"boxes": boxes or None, "vocabulary": names(vocabulary)}
        return ask(request, picture, model, "what", Sliders(), **arguments)

    @told
    def where(
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
        """Find every instance of some words, or of all things that are like the ones in some boxes.

        Args:
            picture: The picture.
            words: What to find.
            negative: What only looks like it: an instance that these describe better is left out.
            exemplars: Boxes [left, top, right, bottom] in pixels around things of which all alike are wanted.
            score: The least score, 0 to 1; the model's default if not given.
            mask_score: The least predicted IoU of a mask.
            overlap: The largest IoU that two masks may have.
            min_area: The least area in pixels.
            model: A preset or a Hub id; empty for the model of the page.

        Returns:
            A COCO data set of this picture, whose annotations also have label, score, mask_score and topk.
        """
        model = model or page_model
        score = engine.default_score(model, "where") if score is None else score
        sliders = Sliders(score, mask_score, overlap, min_area)
        arguments = {"words": words or None, "negative": negative or [], "exemplars": exemplars or None}
        return ask(request, picture, model, "where", sliders, threshold=engine.floor(model, score), **arguments)

    @told
    def everything(
        request: gr.Request,
        picture: gr.FileData,
        vocabulary: list[str] | BuiltIn = "own",
        score: float | None = None,
        mask_score: float = 0.0,
        overlap: float = MOST_OVERLAP,
        min_area: int = 0,
        model: str = "",
    ) -> dict:
        """Segment and name everything in a picture.

        Args:
            picture: The picture.
            vocabulary: The names to choose from: a list of words, "coco", "lvis", "imagenet21k", or "own", the model's.
            score: The minimum score, 0 to 1; any if not given.
            mask_score: The least predicted IoU of a mask.
            overlap: The largest IoU that two masks may have.
            min_area: The least area in pixels.
            model: A preset or a Hub id; empty for the model of the page.

        Returns:
            A COCO data set of this picture, whose annotations also have label, score, mask_score and topk.
        """
        model = model or page_model
        score = engine.default_score(model, "everything") if score is None else score
        sliders = Sliders(score, mask_score, overlap, min_area)
        arguments = {"threshold": engine.floor(model, score), "vocabulary": names(vocabulary)}
        return ask(request, picture, model, "everything", sliders, **arguments)

    for endpoint in (what, where, everything):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_id="model", concurrency_limit=1)


def names(vocabulary: list[str] | BuiltIn) -> list[str] | str | None:
    if isinstance(vocabulary, str) and vocabulary not in BuiltIn.__args__:  # ovsam would take it for a file's name
        raise ovsam.InputError(f"A vocabulary is a list of words or one of {', '.join(BuiltIn.__args__)}.")
    return None if vocabulary == "own" else vocabulary


def uploaded(blocks: gr.Blocks, picture: Any) -> engine.Upload:
    """What a client uploaded; it could name any file of this machine, which are not for it."""
    path = Path(picture["path"] or "").resolve() if picture else None
    if path is None or not path.is_relative_to(Path(blocks.GRADIO_CACHE).resolve()) or not path.is_file():
        raise ovsam.InputError("The picture must be uploaded.")
    return engine.Upload(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
