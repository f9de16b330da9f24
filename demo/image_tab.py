"""The Image tab: prompts and text queries, corrections and downloads."""

import asyncio
import html
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import engine
import gradio as gr
from api import names, uploaded, word_list
from engine import FLOOR, MAX_MEGABYTES
from files import FORMATS
from gradio.utils import get_upload_folder
from page import HERE, LONGEST_TEXT, SAVE, Page, message, script, to_url
from scene import GRACE, MOST_OVERLAP, Session, Sessions, Sliders
from turns import Show

import ovsam
from ovsam.checkpoints.presets import offered
from ovsam.processing.images import open_image

EXAMPLES = [  # file, words, excluded words
    ["tennis.jpg", "person", ""],
    ["train.jpg", "train", ""],
    ["pizza.jpg", "pizza, wine glass", ""],
]
OWN, PASTE = "The model's own", "My own words"
VOCABULARIES = {
    OWN: "own",
    "COCO (80)": "coco",
    "LVIS (1,203)": "lvis",
    "ImageNet-21k (21,841)": "imagenet21k",
    PASTE: PASTE,
}
SHOWN_SIDE = 1600  # px, of the longer side in the browser

sessions = Sessions(get_upload_folder)


def split(text: str) -> list[str]:
    # A list, never the bare text: ovsam may take a text for the name of a file.
    return word_list(text or "")


def vocabulary(choice: str, pasted: str) -> list[str] | str | None:
    if choice != PASTE:
        return names(VOCABULARIES[choice])
    if not split(pasted):
        raise ovsam.InputError("Your own list of names is empty; write words with commas between them.")
    return split(pasted)


# ---- an image comes, or comes back ----------------------------------------------------------------------------------


def receive(request: gr.Request, event: gr.EventData):
    """A new image: show it at once, without the words of the last one."""
    upload = uploaded(event._data)
    return show_picture(sessions.get(request.session_hash, new=True), upload.path) | note_on(upload)


def note_on(upload: engine.Upload | None) -> dict:
    if upload is None or not upload.animated:
        return {}
    return {"message": f"{upload.name} is an animation; this is its first frame. The tab Video takes videos."}


def take_example(request: gr.Request, event: gr.EventData):
    file, words, negative = EXAMPLES[event._data["number"]]
    session = sessions.get(request.session_hash, new=True)
    return show_picture(session, HERE / "examples" / file) | {"words": words, "negative": negative}


def show_picture(session: Session, path: Path) -> dict:
    picture = session.receive(path)
    updates = session.view(Sliders()) | {"words": "", "negative": ""}
    updates["canvas"]["picture"] = to_url(picture.open(), SHOWN_SIDE)  # once, not with every answer
    return updates


def restore(request: gr.Request, event: gr.EventData, *sliders):
    """The page was reloaded: restore it."""
    session = sessions.restore(request.session_hash, str(event._data["token"]))
    if session is None or session.picture is None:
        return {}
    updates = session.view(Sliders(*sliders))
    updates["canvas"]["picture"] = to_url(session.picture.open(), SHOWN_SIDE)
    return updates | dict(zip(("words", "negative"), session.question, strict=True))


def forget(request: gr.Request):
    """The page was closed. Its files and features are deleted soon, but not before a reload could ask for them."""
    name = request.session_hash

    def close() -> None:
        session = sessions.close(name)
        engine.features.forget(name)  # those of the page's endpoints
        if session is not None:
            engine.features.forget(session.token)

    timer = threading.Timer(GRACE, close)
    timer.daemon = True
    timer.start()


async def prepare(request: gr.Request, model: str, *, show):
    """Encode an image before the first question."""
    session = sessions.get(request.session_hash, new=True)
    if session.picture:
        await engine.ask(model, session.token, session.picture, None, show)
    return {"status": describe(model)} | note_on(session.picture)


# ---- questions ------------------------------------------------------------------------------------------------------


async def find_words(request: gr.Request, words: str, negative: str, model: str, *sliders, show):
    if not split(words):
        raise ovsam.InputError("There are no words yet; type one, or several with commas between them.")
    sessions.get(request.session_hash, new=True).question = (words, negative)
    asked = {"words": split(words), "negative": split(negative)}
    return await find(request, "words", model, sliders, "where", show, **asked)


async def find_everything(request: gr.Request, choice: str, pasted: str, model: str, *sliders, show):
    asked = {"vocabulary": vocabulary(choice, pasted)}
    return await find(request, "everything", model, sliders, "everything", show, **asked)


async def find_alike(request: gr.Request, event: gr.EventData, model: str, *sliders, show):
    """Add all objects similar to one on the page."""
    one = sessions.get(request.session_hash).scene.objects(Sliders()).get(event._data["key"])
    if one is None:
        raise ovsam.InputError("That object is gone; choose another one.")
    asked = {"exemplars": {one.label: [list(one.box)]}}
    return await find(request, "alike", model, sliders, "where", show, **asked)


async def find(request: gr.Request, kind: str, model: str, sliders: tuple, question: str, show: Show, **asked):
    """Run a question once, down to a low score. The first one of its kind sets the slider of the score to the default
    of the model."""
    session = sessions.get(request.session_hash, new=True)
    picture, sliders = session.given(), Sliders(*sliders)
    await asyncio.to_thread(engine.models.get, model)
    default = engine.default_score(model, question)
    threshold = engine.floor(model, default)
    found = await engine.ask(model, session.token, picture, question, show, threshold=threshold, **asked)
    if (session.scene.kind, session.model) != (kind, model) and not (kind == "alike" and session.scene.kind):
        sliders = replace(sliders, score=default)
    session.answer(picture, model, lambda scene: scene.find(found, kind, asked.get("words", ())))
    view = await asyncio.to_thread(session.view, sliders)
    return view | {"score": gr.Slider(value=sliders.score), "status": describe(model)}


async def point_at(
    request: gr.Request, event: gr.EventData, choice: str, pasted: str, model: str, *sliders,
    show,
):  # fmt: skip
    """A click: x, y, whether it is on the object, and whether it must not start another one; or a box x1, y1, x2,
    y2."""
    session, sliders = sessions.get(request.session_hash, new=True), Sliders(*sliders)
    picture, given = session.given(), event._data
    if given.get("box"):
        key, chosen = session.scene.box(tuple(given["box"]))
    else:
        key, chosen = session.scene.click(*given["point"], sliders, bool(given.get("add")))
    if chosen is None:  # only a selection
        session.scene = replace(session.scene, active=key)
        return session.view(sliders)
    asked = {"vocabulary": vocabulary(choice, pasted), **chosen.arguments()}
    found = await engine.ask(model, session.token, picture, "what", show, **asked)
    if not found[0].area:
        raise ovsam.InputError(
            "The object has no pixels left with this click, so that it stays as it was; undo the click before."
            if chosen.instance is not None
            else "No object was found there; click on the middle of one, or draw a box around it."
        )
    session.answer(picture, model, lambda scene: scene.keep(key, replace(chosen, instance=found[0])))
    return await asyncio.to_thread(session.view, sliders) | {"status": describe(model)}


# ---- without a model ------------------------------------------------------------------------------------------------


def change(request: gr.Request, event: gr.EventData, *sliders):
    """Apply an action of the user to an object, or undo the last one."""
    session, act = sessions.get(request.session_hash), event._data
    scene, key = session.scene, act.get("key", "")
    match act["act"]:
        case "undo":
            session.undo()
        case "activate":  # a selection is not undone
            session.scene = replace(scene, active=key)
        case "rename":
            session.change(scene.edit(key, label=act["label"].strip()[:200] or None))
        case "hide":
            session.change(scene.edit(key, hidden=not scene.edit_of(key).hidden))
        case "delete":
            session.change(scene.delete(key))
    return session.view(Sliders(*sliders))


def sift(request: gr.Request, *sliders):
    """The sliders were moved."""
    return sessions.get(request.session_hash, new=True).view(Sliders(*sliders))


def lower(request: gr.Request, event: gr.EventData, *sliders):
    """Lower the confidence to the value of the button."""
    score = min(max(float(event._data["score"]), 0.0), 1.0)
    return sift(request, score, *sliders[1:]) | {"score": gr.Slider(value=score)}


def download(request: gr.Request, kind: str, *sliders):
    session = sessions.get(request.session_hash, new=True)
    results = session.given() and session.shown(Sliders(*sliders))
    if not results:
        raise ovsam.InputError("There is nothing to download yet: no object is shown.")
    folder = session.folder / "files"
    shutil.rmtree(folder, ignore_errors=True)  # the download before this one
    folder.mkdir(parents=True)
    return {"file": str(FORMATS[kind](results, session.picture.path, folder))}


async def choose_model(request: gr.Request, model: str, last: str, *, show):
    """Load another model; if it cannot be loaded, the last one stays."""
    show(f"Loading {model}")
    try:
        await asyncio.to_thread(engine.models.get, model)
    except ovsam.InputError as error:
        return {"models": last, "message": f"{error} The model is still {last}."}
    engine.prepare_built_in(model)
    return {"last": model, "status": describe(model)}


def describe(model: str) -> str:
    return f"Model **{html.escape(model)}** · {engine.speed(model)}"


# ---- the layout -----------------------------------------------------------------------------------------------------


def image_tab(model: str) -> None:
    page = Page(message=message())
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            page["canvas"] = canvas = gr.HTML(
                {}, html_template="", js_on_load=script("upload.js", "canvas.js"), elem_id="canvas",
                apply_default_css=False,
                megabytes=MAX_MEGABYTES, megapixels=engine.MAX_PIXELS // 10**6,
                examples=[to_url(open_image(HERE / "examples" / e[0]), 160) for e in EXAMPLES],
            )  # fmt: skip
            page["status"] = gr.Markdown(describe(model), elem_id="status")
            with gr.Accordion("Model", open=False):
                page["models"] = models = gr.Dropdown(
                    model_choices(model), value=model, allow_custom_value=True,
                    label="A preset, or a Hub id",
                )  # fmt: skip
                page["last"] = last = gr.State(model)
        with gr.Column(scale=2, min_width=320):
            with gr.Group():
                with gr.Row(elem_id="ask", equal_height=True):
                    page["words"] = words = gr.Textbox(
                        label="Find these words", placeholder="cat, remote", max_length=LONGEST_TEXT, scale=4
                    )
                    find_button = gr.Button("Find", variant="primary", scale=1, min_width=80)
                page["negative"] = negative = gr.Textbox(
                    label="Exclude", placeholder="words for what only looks like them", max_length=LONGEST_TEXT
                )
            with gr.Group():
                with gr.Row(equal_height=True):
                    vocabularies = gr.Dropdown(
                        list(VOCABULARIES), value=OWN, label="Class names for clicks, boxes and everything", scale=4
                    )
                    everything = gr.Button("Find everything", scale=1, min_width=80, elem_id="everything")
                pasted = gr.Textbox(label="My own words", lines=3, visible=False, max_length=LONGEST_TEXT)
            with gr.Row(elem_id="save"):
                kind = gr.Dropdown(
                    list(FORMATS), show_label=False, container=False, scale=2, min_width=140, label="Format"
                )
                save = gr.Button("Download", scale=1, min_width=110)
            page["listing"] = listing = gr.HTML(
                {}, html_template="", js_on_load=script("listing.js"), elem_id="listing", apply_default_css=False
            )
            with gr.Accordion("Filters"):
                page["score"] = score = gr.Slider(0, 1, FLOOR, step=0.01, label="Confidence")
                mask_score = gr.Slider(0, 1, 0, step=0.01, label="Mask quality (predicted IoU)")
                overlap = gr.Slider(0, MOST_OVERLAP, MOST_OVERLAP, step=0.05, label="Overlap (NMS IoU)")
                min_area = gr.Slider(0, 20_000, 0, step=10, label="Smallest area (pixels)")
            page["file"] = file = gr.File(visible="hidden")

    sliders = [score, mask_score, overlap, min_area]
    outputs = list(page.values())
    quick = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

    encode = page.does(prepare, keeps_message=True)
    running = [
        canvas.picture(page.does(receive), None, outputs, **quick).success(encode, models, outputs, **quick),
        canvas.example(page.does(take_example), None, outputs, **quick).success(encode, models, outputs, **quick),
        gr.on(
            [find_button.click, words.submit, negative.submit],
            page.does(find_words), [words, negative, models, *sliders], outputs, **quick,
        ),
        everything.click(page.does(find_everything), [vocabularies, pasted, models, *sliders], outputs, **quick),
        listing.alike(page.does(find_alike), [models, *sliders], outputs, **quick),
        canvas.point(page.does(point_at), [vocabularies, pasted, models, *sliders], outputs, **quick),
        models.input(page.does(choose_model), [models, last], outputs, **quick),
    ]  # fmt: skip
    running.append(running[-1].success(encode, last, outputs, **quick))
    page["message"].cancel(page.does(lambda: {"message": "Cancelled."}), None, outputs, cancels=running, **quick)
    canvas.restore(page.does(restore), sliders, outputs, **quick)
    listing.lower(page.does(lower), sliders, outputs, **quick)
    for source in (canvas, listing):
        source.act(page.does(change), sliders, outputs, **quick)
    for slider in sliders:
        slider.input(page.does(sift), sliders, outputs, trigger_mode="always_last", **quick)
    vocabularies.input(lambda choice: gr.Textbox(visible=choice == PASTE), vocabularies, pasted, **quick)
    save.click(page.does(download), [kind, *sliders], outputs, **quick).success(None, file, None, js=SAVE, **quick)


def model_choices(model: str) -> list[tuple[str, str]]:
    """The presets, and whether they are downloaded."""
    return [
        (f"{name} (not available: no connection to the Hub)" if engine.missing(name) else name, name)
        for name in [*offered(), *([model] if model not in offered() else [])]
    ]
