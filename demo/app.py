"""The demo of ovsam: click on an object to name it, or type words to find their objects. Run it with `ovsam demo`.

image_tab.py and video_tab.py are the page, engine.py runs the models, api.py has the endpoints.
"""

import importlib.metadata
import importlib.util
import os

import engine
import gradio as gr
from api import add_endpoints
from clip import MAX_MEGABYTES
from image_tab import forget, image_tab
from page import HERE
from video_tab import video_tab

from ovsam.checkpoints.presets import choose_auto

WAITING = 200  # events in Gradio's queue; engine.MAX_WAITING limits questions to the models
DELETE_EVERY, DELETE_AFTER = 300, 900  # seconds; for files that Gradio keeps of uploads and downloads
PAPER, LICENCE = "https://arxiv.org/abs/2401.02955", "https://www.apache.org/licenses/LICENSE-2.0"

demo: gr.Blocks  # the page, made by `main`


def header() -> str:
    links = {"paper": PAPER, "licence: Apache-2.0": LICENCE}
    if engine.ON_SPACE:
        links = {"code": f"https://huggingface.co/spaces/{os.environ['SPACE_ID']}/tree/main"} | links
    for entry in importlib.metadata.metadata("ovsam").get_all("Project-URL") or ():
        name, _, address = entry.partition(", ")
        links[name.lower()] = address
    shown = " · ".join(f"[{name}]({address})" for name, address in links.items())
    return f"# ovsam\nClick on an object to name it, or type words to find their objects. {shown}"


def build(model: str) -> gr.Blocks:
    engine.models.own.add(model)
    with gr.Blocks(title="ovsam", analytics_enabled=False, delete_cache=(DELETE_EVERY, DELETE_AFTER)) as blocks:
        gr.Markdown(header(), elem_id="title")
        with gr.Tab("Image"):
            image_tab(model)
        if importlib.util.find_spec("av") is not None:  # pip install "ovsam[video]"
            with gr.Tab("Video"):
                video_tab(model)
        add_endpoints(model)
        blocks.unload(forget)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=None)


def main(
    model: str | None = None, host: str | None = None, port: int | None = None, share: bool = False, wait: bool = True
):
    """Serve the page; returns its address, after it is closed if `wait`."""
    global demo
    if model in (None, "auto"):
        model = os.environ.get("OVSAM_MODEL") or choose_auto()
    engine.prepare_built_in(model)
    demo = build(model)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing is fetched
    return demo.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=not wait, quiet=not wait,
        max_file_size=f"{MAX_MEGABYTES}mb", theme=gr.themes.Default(**fonts), css_paths=HERE / "page.css",
        footer_links=["api"], mcp_server=importlib.util.find_spec("mcp") is not None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
