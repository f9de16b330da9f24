"""The Gradio Space of ovsam, one page: click a thing and read its name, or type a name and see the things."""

import functools
import html
import re
from pathlib import Path

import gradio as gr

import ovsam

FLOOR = 0.05  # the model is asked for everything down to this score, so that the slider need not ask it again
COLUMNS = ["label", "score", "mask score", "box", "area"]
EXAMPLES = [
    ["hamburgers.jpg", "hamburger, bicycle", ""],
    ["pumpkins.jpg", "pumpkin, unicorn, books", ""],
    ["cows.jpg", "cow, bee, trophy", "mosquito"],
]
SAVE_JSON = """coco => {
    if (!coco) return alert("There is no answer to save yet.");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(coco)], {type: "application/json"}));
    link.download = "ovsam.json";
    link.click();
}"""

segmenter = ovsam.load("auto")
EMBEDDED = Path(segmenter.name).name == "ovsam-tiny"
NAMES = segmenter.model.config.vocabulary or []  # what it names things with when it is given no names
KNOWS = "It knows pictograms, not photographs." if EMBEDDED else ""
THRESHOLD = segmenter.model.config.score_threshold


@functools.lru_cache(maxsize=8)
def encode(path: str):
    """Features of a picture for all questions about it. Equal uploads share a path, which holds their hash."""
    try:
        return segmenter.encode(path)
    except ovsam.InputError as error:  # where the file lies on this machine is nobody's business
        raise ovsam.InputError(str(error).replace(path, Path(path).name)) from error


def uploaded(picture: dict | None) -> str:
    """The path of an upload. Gradio would open it too, and with less to say about what is wrong with a picture."""
    if not picture or not picture["path"]:
        raise ovsam.InputError("There is no picture yet: drop one on the left, or take an example.")
    # A client that leaves out the "meta" of an upload could name any file of this machine.
    if not Path(picture["path"]).resolve().is_relative_to(Path(demo.GRADIO_CACHE).resolve()):
        raise ovsam.InputError("The picture must be uploaded.")
    return picture["path"]


def split(text: str) -> list[str]:
    # A list, never the bare text: ovsam takes a text for the name of a file.
    return [word.strip() for word in re.split("[,\n]", text or "") if word.strip()]


def tell_mistakes(ask):
    """Show the sentence of an InputError in the page, or send it to the client, in place of a traceback."""

    @functools.wraps(ask)
    def wrapper(*arguments):
        try:
            return ask(*arguments)
        except ovsam.InputError as error:  # escaped, because the page shows HTML
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    return wrapper


@tell_mistakes
def where(picture: dict, words: str, negative: str, threshold: float):
    """Every instance of the words (separated by commas), but for what looks more like a negative word."""
    path = uploaded(picture)
    if not split(words):
        raise ovsam.InputError("There is nothing to find yet: type a word, or several with commas between them.")
    found = segmenter.where(encode(path), split(words), negative=split(negative), threshold=FLOOR)
    return (path, found), *show((path, found), threshold)


@tell_mistakes
def what(picture: dict, x: float, y: float, names: str):
    """The thing at pixel x, y, named from these names (separated by commas; the model's own, if empty)."""
    path = uploaded(picture)
    found = segmenter.what(encode(path), points=[[x, y]], vocabulary=split(names) or None)
    return (path, found), *show((path, found), 0)


@tell_mistakes
def everything(picture: dict, names: str, threshold: float):
    """Everything in the picture, named from these names (separated by commas; the model's own, if empty)."""
    path = uploaded(picture)
    found = segmenter.everything(encode(path), vocabulary=split(names) or None)
    return (path, found), *show((path, found), threshold)


@tell_mistakes
def prepare(picture: dict | None):
    """A new picture: encode it before anyone asks, and take the old answer away."""
    if picture:
        encode(uploaded(picture))
    return None, *show(None, 0)


def show(answer: tuple[str, ovsam.Results] | None, threshold: float):
    """(overlay, sentence, table, COCO json) of what scores at least the threshold; a click always has its answer."""
    if answer is None:
        return None, "", [], None
    path, found = answer
    clicked = len(found) > 0 and found[0].source == "point"
    kept = found if clicked else found.filter(score=threshold)
    kept.file_name = Path(path).name
    if clicked:
        first, *others = [f"{name} {score:.2f}" for name, score in found[0].topk] or ["something"]  # without names
        sentence = f"This is **{first}**" + (f", or else {', '.join(others)}." if others else ".")
    elif kept:
        sentence = "Found: " + ", ".join(f"**{count}** × {label}" for label, count in kept.counts().items()) + "."
    elif found:
        sentence = f"Nothing scores {threshold:.2f} or more; the best of the rest scores {found.scores.max():.2f}."
    else:
        sentence = "Nothing was found."
    rows = [
        [i.label, f"{i.score:.2f}", f"{i.mask_score:.2f}", ",".join(f"{v:.0f}" for v in i.box), i.area]
        for i in sorted(kept, key=lambda instance: -instance.score)
    ]
    zoom = max(1, 512 // max(found.size))  # names need room
    return kept.overlay(encode(path)[0], zoom), sentence, rows, kept.to_coco()


def locate(click: gr.SelectData):
    return click.index


with gr.Blocks(title="ovsam", analytics_enabled=False) as demo:
    gr.Markdown(
        "# ovsam: an open vocabulary for segmentation\n**Click** a thing and read its name, or **type** a name and see "
        f"the things. The model here is `{Path(segmenter.name).name}`. {KNOWS}"
    )
    answer = gr.State(time_to_live=3600)  # the picture and all that was found in it
    x, y = gr.Number(label="x", visible=False), gr.Number(label="y", visible=False)
    with gr.Row():
        with gr.Column():
            picture = gr.Image(label="Picture", height=480, sources=["upload"], buttons=[])
            words = gr.Textbox(label="Words to find", placeholder="hamburger, bicycle", max_length=20_000)
            negative = gr.Textbox(label="But not", placeholder="what only looks like them", max_length=20_000)
            names = gr.Textbox(
                label="Names for clicks and for everything",
                placeholder=f"empty: the {len(NAMES):,} names of the model",
                max_length=20_000,
            )
            with gr.Row():
                find = gr.Button("Find the words", variant="primary")
                find_all = gr.Button("Find everything")
            here = Path(__file__).parent / "examples"
            gr.Examples([[str(here / file), *rest] for file, *rest in EXAMPLES], [picture, words, negative])
        with gr.Column():
            overlay = gr.Image(label="Answer", format="jpeg", height=480, buttons=["download", "fullscreen"])
            threshold = gr.Slider(FLOOR, 1, THRESHOLD, step=0.01, label="Least score")
            sentence = gr.Markdown(label="Summary")
            table = gr.Dataframe(
                headers=COLUMNS, datatype=["str", "str", "str", "str", "number"], label="What was found",
                interactive=False, max_height=300, wrap=True, column_widths=["32%", "13%", "14%", "27%", "14%"],
            )  # fmt: skip
            save = gr.Button("Download as COCO json")
            coco = gr.JSON(label="COCO json", visible="hidden")

    page = [overlay, sentence, table, coco]
    private = {"api_visibility": "private"}
    # One question at a time; and ovsam opens the pictures, so gradio need not.
    model = {"outputs": [answer, *page], "concurrency_id": "model", "preprocess": False, "show_progress_on": overlay}
    picture.change(prepare, picture, **model, **private)
    gr.on(
        [find.click, words.submit, negative.submit],
        where, [picture, words, negative, threshold], api_name="where", **model,
    )  # fmt: skip
    picture.select(locate, None, [x, y], **private).then(what, [picture, x, y, names], api_name="what", **model)
    find_all.click(everything, [picture, names, threshold], api_name="everything", **model)
    threshold.change(show, [answer, threshold], page, trigger_mode="always_last", show_progress="hidden", **private)
    save.click(None, coco, None, js=SAVE_JSON, **private)

if __name__ == "__main__":
    if NAMES:
        segmenter.embed(NAMES)  # a few seconds, once: they are kept on disk
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # each has all letters
    demo.launch(max_file_size="20mb", theme=gr.themes.Default(**fonts))
