"""The demo of ovsam: point at a thing and read its name, or name things and see them. Run it with `ovsam demo`.

engine.py asks the models, scene.py holds what a visitor sees, files.py writes the downloads, api.py is for programs.
"""

import base64
import html
import importlib.util
import io
import os
import shutil
from dataclasses import replace
from functools import wraps
from pathlib import Path

import engine
import gradio as gr
import torch
from api import add_endpoints, uploaded, word_list
from engine import FLOOR, MAX_MEGABYTES, ON_SPACE
from files import FORMATS
from PIL import Image
from scene import MOST_OVERLAP, Session, Sessions, Sliders

import ovsam
from ovsam.checkpoints.presets import choose_auto, offered
from ovsam.processing.images import open_image

HERE = Path(__file__).parent
EXAMPLES = [
    ["cat.jpg", "cat, remote", ""],
    ["desk.jpg", "laptop, mouse, keyboard", ""],
    ["horses.jpg", "horse, person", "cow"],
]
OWN, PASTE = "The model's own", "My own words"
NAMES = {
    OWN: None,
    "COCO (80)": "coco",
    "LVIS (1,203)": "lvis",
    "ImageNet-21k (21,841; slow the first time)": "imagenet21k",
    PASTE: PASTE,
}
SHOWN_SIDE = 1600  # px; the browser gets no more of a picture than this
LONGEST_TEXT = 50_000  # letters
QUEUE = 40  # questions that may wait; who comes then is told to come back
DELETE_EVERY, DELETE_AFTER = 300, 900  # seconds; for files that Gradio keeps of uploads and downloads

demo: gr.Blocks  # the page that is served, made by `main`
sessions = Sessions(lambda: demo.GRADIO_CACHE)


def told(handler):
    """Show an InputError as the sentence it is, in place of a traceback."""

    @wraps(handler)
    def wrapper(*arguments, **keywords):
        try:
            return handler(*arguments, **keywords)
        except ovsam.InputError as error:  # escaped, because the page shows HTML
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
        except torch.OutOfMemoryError as error:
            message = "The GPU has no memory left for this; try a smaller picture, or again in a minute."
            raise gr.Error(message, print_exception=False) from error

    return wrapper


def split(text: str) -> list[str]:
    # A list, never the bare text: ovsam may take a text for the name of a file.
    return word_list(text or "")


def vocabulary(choice: str, pasted: str) -> list[str] | str | None:
    if choice != PASTE:
        return NAMES[choice]
    if not split(pasted):
        raise ovsam.InputError("Your own list of names is empty: write words with commas between them.")
    return split(pasted)


@told
def receive(request: gr.Request, event: gr.EventData):
    """A new picture: show it at once."""
    upload = uploaded(demo, event._data)
    return show_picture(sessions.get(request.session_hash, new=True), upload.path)


@told
def take_example(request: gr.Request, event: gr.EventData):
    file, words, negative = EXAMPLES[event._data["number"]]
    session = sessions.get(request.session_hash, new=True)
    return *show_picture(session, HERE / "examples" / file), words, negative


def show_picture(session: Session, path: Path):
    picture = session.receive(path)
    canvas, listing = session.view(Sliders())
    return canvas | {"picture": to_url(picture.open(), SHOWN_SIDE)}, listing  # once, not with every answer


def to_url(picture: Image.Image, side: int) -> str:
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@told
def prepare(request: gr.Request, model: str):
    """Encode a picture before anyone asks about it."""
    session = sessions.get(request.session_hash, new=True)
    if session.picture:
        engine.ask(model, request.session_hash, session.picture, None)
    return describe(model)


@told
def find_words(request: gr.Request, words: str, negative: str, model: str, *sliders):
    if not split(words):
        raise ovsam.InputError("There is nothing to find yet: type a word, or several with commas between them.")
    return find(request, "words", model, sliders, "where", words=split(words), negative=split(negative))


@told
def find_everything(request: gr.Request, choice: str, pasted: str, model: str, *sliders):
    return find(request, "everything", model, sliders, "everything", vocabulary=vocabulary(choice, pasted))


@told
def find_alike(request: gr.Request, event: gr.EventData, model: str, *sliders):
    """All things like one of those on the page."""
    scene = sessions.get(request.session_hash).scene
    one = scene.objects(Sliders()).get(event._data["key"])
    if one is None:
        raise ovsam.InputError("That object is gone; choose another one.")
    return find(request, "alike", model, sliders, "where", exemplars={one.label: [list(one.box)]})


def find(request: gr.Request, kind: str, model: str, sliders: tuple, question: str, **arguments):
    """Ask once, down to a low score. A first question of its kind sets the score's slider to the model's default."""
    session = sessions.get(request.session_hash, new=True)
    picture, default = session.given(), engine.default_score(model, question)
    arguments["threshold"] = engine.floor(model, default)
    found = engine.ask(model, request.session_hash, picture, question, **arguments)
    score = sliders[0] if (session.scene.kind, session.model) == (kind, model) else default
    session.answer(picture, model, lambda scene: scene.find(found, kind))
    return *session.view(Sliders(score, *sliders[1:])), gr.Slider(value=score), describe(model)


@told
def point_at(request: gr.Request, event: gr.EventData, choice: str, pasted: str, model: str, *sliders):
    """A click, x, y and whether it is on the thing; or a box x1, y1, x2, y2."""
    session = sessions.get(request.session_hash, new=True)
    picture, given = session.given(), event._data
    key, drawn = session.scene.box(tuple(given["box"])) if given.get("box") else session.scene.point(*given["point"])
    names = vocabulary(choice, pasted)
    found = engine.ask(model, request.session_hash, picture, "what", vocabulary=names, **drawn.arguments())
    session.answer(picture, model, lambda scene: scene.keep(key, replace(drawn, instance=found[0])))
    return *session.view(Sliders(*sliders)), describe(model)


@told
def change(request: gr.Request, event: gr.EventData, *sliders):
    """What a person does to an object, or taking that back; no model runs."""
    session, act = sessions.get(request.session_hash), event._data
    scene, key = session.scene, act.get("key", "")
    match act["act"]:
        case "undo":
            session.undo()
        case "activate":  # what is only looked at is nothing to undo
            session.scene = replace(scene, active=key)
        case "rename":
            session.change(scene.edit(key, label=act["label"].strip()[:200] or None))
        case "hide":
            session.change(scene.edit(key, hidden=not scene.edit_of(key).hidden))
        case "delete":
            session.change(scene.edit(key, deleted=True))
    return session.view(Sliders(*sliders))


@told
def sift(request: gr.Request, *sliders):
    """The sliders were moved; no model runs."""
    return sessions.get(request.session_hash, new=True).view(Sliders(*sliders))


@told
def download(request: gr.Request, kind: str, *sliders):
    session = sessions.get(request.session_hash, new=True)
    results = session.given() and session.shown(Sliders(*sliders))
    if not results:
        raise ovsam.InputError("There is nothing to save yet: nothing is shown.")
    folder = session.folder / "files"
    shutil.rmtree(folder, ignore_errors=True)  # the download before this one
    folder.mkdir(parents=True)
    return str(FORMATS[kind](results, session.picture.path, folder))


def forget(request: gr.Request):
    """The page was closed: its files go, and the features of its pictures."""
    sessions.close(request.session_hash)
    engine.features.forget(request.session_hash)


@told
def choose_model(model: str):
    return describe(model)


def describe(model: str) -> str:
    return f"**{html.escape(model)}** · {engine.speed(model)}"


def build(model: str) -> gr.Blocks:
    with gr.Blocks(title="ovsam", analytics_enabled=False, delete_cache=(DELETE_EVERY, DELETE_AFTER)) as blocks:
        gr.Markdown("# ovsam\nPoint at a thing and read its name, or name things and see them.", elem_id="title")
        image_tab(model)  # a video tab goes beside it: `with gr.Tab("Image")` around this, `with gr.Tab("Video")` below
        add_endpoints(blocks, model, told)
        blocks.unload(forget)
    return blocks.queue(max_size=QUEUE, default_concurrency_limit=8)


def image_tab(model: str) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            canvas = gr.HTML(
                {}, html_template="", js_on_load=script("canvas.js"), elem_id="canvas", apply_default_css=False,
                megabytes=MAX_MEGABYTES, examples=[to_url(open_image(HERE / "examples" / e[0]), 160) for e in EXAMPLES],
            )  # fmt: skip
            status = gr.Markdown(describe(model), elem_id="status")
            with gr.Accordion("Model", open=False):
                models = gr.Dropdown(
                    offered() + [model] * (model not in offered()), value=model, allow_custom_value=True,
                    label="A preset, or a Hub id" + ", or a folder" * (not ON_SPACE),
                )  # fmt: skip
        with gr.Column(scale=2, min_width=320):
            with gr.Group():
                words = gr.Textbox(label="Find these words", placeholder="cat, remote", max_length=LONGEST_TEXT)
                negative = gr.Textbox(label="But not", placeholder="what only looks like them", max_length=LONGEST_TEXT)
                find_button = gr.Button("Find", variant="primary")
            with gr.Group():
                names = gr.Dropdown(list(NAMES), value=OWN, label="Names for clicks, boxes and everything")
                pasted = gr.Textbox(label="My own words", lines=3, visible=False, max_length=LONGEST_TEXT)
                everything = gr.Button("Find everything")
            listing = gr.HTML(
                {}, html_template="", js_on_load=script("listing.js"), elem_id="listing", apply_default_css=False
            )
            with gr.Accordion("Sliders"):
                score = gr.Slider(0, 1, FLOOR, step=0.01, label="Least score")
                mask_score = gr.Slider(0, 1, 0, step=0.01, label="Least mask score")
                overlap = gr.Slider(0, MOST_OVERLAP, MOST_OVERLAP, step=0.05, label="Most overlap of two objects (IoU)")
                min_area = gr.Slider(0, 20_000, 0, step=10, label="Least area (pixels)")
            with gr.Row(elem_id="save"):
                kind = gr.Dropdown(list(FORMATS), show_label=False, container=False, scale=2, min_width=140)
                save = gr.Button("Download", scale=1, min_width=110)
            file = gr.File(visible="hidden")

    sliders = [score, mask_score, overlap, min_area]
    private = {"api_visibility": "private"}
    # One question at a time on the one model; what asks no model does not wait for those that do.
    asks = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress_on": canvas,
        "show_progress": "minimal",
        **private,
    }
    quick = {"show_progress": "hidden", **private}
    found = {"outputs": [canvas, listing, score, status], **asks}

    canvas.picture(receive, None, [canvas, listing], **quick).success(prepare, models, status, **asks)
    canvas.example(take_example, None, [canvas, listing, words, negative], **quick).success(
        prepare, models, status, **asks
    )
    gr.on([find_button.click, words.submit, negative.submit], find_words, [words, negative, models, *sliders], **found)
    everything.click(find_everything, [names, pasted, models, *sliders], **found)
    listing.alike(find_alike, [models, *sliders], **found)
    canvas.point(point_at, [names, pasted, models, *sliders], [canvas, listing, status], **asks)
    for source in (canvas, listing):
        source.act(change, sliders, [canvas, listing], **quick)
    for slider in sliders:
        slider.input(sift, sliders, [canvas, listing], trigger_mode="always_last", **quick)
    names.input(lambda choice: gr.Textbox(visible=choice == PASTE), names, pasted, **quick)
    models.input(choose_model, models, status, **asks).success(prepare, models, status, **asks)
    save.click(download, [kind, *sliders], file, **quick).success(None, file, None, js=SAVE, **quick)


SAVE = "file => { const a = document.createElement('a'); a.href = file.url; a.download = file.orig_name; a.click(); }"


def script(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def main(
    model: str | None = None, host: str | None = None, port: int | None = None, share: bool = False, wait: bool = True
):
    """Serve the page; returns its address, once it is closed if `wait`."""
    global demo
    if model in (None, "auto"):
        model = os.environ.get("OVSAM_MODEL") or choose_auto()
    engine.models.get(model)
    demo = build(model)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing is fetched
    return demo.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=not wait, quiet=not wait,
        max_file_size=f"{MAX_MEGABYTES}mb", theme=gr.themes.Default(**fonts), css_paths=HERE / "page.css",
        footer_links=["api"], mcp_server=importlib.util.find_spec("mcp") is not None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
