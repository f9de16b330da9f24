"""Shared by both tabs: handlers whose errors become one sentence in one place of the page, and the scripts."""

import asyncio
import base64
import html
import inspect
import io
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from turns import LOOK

import ovsam
from ovsam.errors import is_out_of_memory

HERE = Path(__file__).parent
LONGEST_TEXT = 50_000  # letters
NO_MEMORY = "There is no memory left for this; try a smaller image or fewer words, or ask again in a minute."
# Downloads the file that the event before has put into a hidden gr.File.
SAVE = """file => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""


def sentence(error: Exception) -> str:
    """The message for the visitor; other errors than invalid input are logged on the server."""
    if isinstance(error, ovsam.InputError):
        return str(error)
    if is_out_of_memory(error):
        return NO_MEMORY
    traceback.print_exception(error)
    return "Something went wrong on the server; ask again."


def told(handler: Callable) -> Callable:
    """For the endpoints: raise errors as one sentence without a traceback."""

    @wraps(handler)
    async def wrapper(*arguments, **keywords):
        try:
            return await handler(*arguments, **keywords)
        except Exception as error:
            raise gr.Error(html.escape(sentence(error), quote=False), print_exception=False) from error

    return wrapper


class Page(dict):
    """The components of a tab by name. Handlers return values for some of them: {"canvas": ..., "message": ...}."""

    def does(self, handler: Callable, keeps_message: bool = False) -> Callable:
        """A handler for Gradio. Its errors become messages. A handler with an argument `show` reports its progress
        with it, which is the message until it is finished or cancelled.

        The last message is removed unless `keeps_message`; then it stays until the handler reports something.
        """
        before = {} if keeps_message else {"message": ""}

        def values(updates: dict[str, Any]) -> dict:
            return {self[name]: value for name, value in (before | updates).items()}

        if inspect.isasyncgenfunction(handler):

            @wraps(handler)
            async def wrapper(*arguments):
                try:
                    async for updates in handler(*arguments):
                        yield values(updates)
                except Exception as error:
                    yield values({"message": sentence(error)})

        elif "show" in inspect.signature(handler).parameters:

            @wraps(handler)
            async def wrapper(*arguments):
                shown, reported = [] if keeps_message else [busy("One moment")], not keeps_message
                task = asyncio.create_task(
                    handler(*arguments, show=lambda text, share=None: shown.append(busy(text, share)))
                )
                try:
                    while not task.done():
                        if shown:
                            yield values({"message": shown[-1]})
                            shown.clear()
                            reported = True
                        await asyncio.wait([task], timeout=LOOK)
                    yield values(({"message": ""} if reported else {}) | task.result())
                except Exception as error:
                    yield values({"message": sentence(error)})
                finally:
                    task.cancel()

            own = inspect.signature(handler)  # Gradio must not pass `show`
            wrapper.__signature__ = own.replace(
                parameters=[one for one in own.parameters.values() if one.name != "show"]
            )

        else:

            @wraps(handler)
            def wrapper(*arguments):
                try:
                    return values(handler(*arguments))
                except Exception as error:
                    return values({"message": sentence(error)})

        return wrapper


def busy(text: str, share: float | None = None) -> dict[str, Any]:
    """A message while something runs or waits, with a button that cancels it."""
    return {"text": text, "share": share, "busy": True}


def message() -> gr.HTML:
    """The place for messages of a tab; each replaces the last one."""
    return gr.HTML(
        "", html_template="", js_on_load=script("message.js"), elem_classes="message", apply_default_css=False,
    )  # fmt: skip


def script(*names: str) -> str:
    return "".join((HERE / name).read_text(encoding="utf-8") for name in names)


def to_url(picture: Image.Image, side: int) -> str:
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
