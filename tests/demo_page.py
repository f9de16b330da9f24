"""The demo as it is served, with the embedded checkpoint, and a count of what its model was asked."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))  # its modules lie flat, as on a Space

import app  # noqa: E402
import engine  # noqa: E402
import scene  # noqa: E402, F401


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """`url`; `asked`, the questions that the model answered so far, with "encode" for each picture."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_SHARE", "OVSAM_MODEL"):
        patch.delenv(name, raising=False)
    asked = []
    for name, word in (("answer", lambda _, question, *rest: question), ("encode", lambda *rest: "encode")):
        original = getattr(engine, name)
        patch.setattr(
            engine,
            name,
            lambda *arguments, original=original, word=word: asked.append(word(*arguments)) or original(*arguments),
        )
    _, url, shared = app.main("ovsam-tiny", "127.0.0.1", wait=False)
    assert shared is None
    yield SimpleNamespace(url=url, asked=asked)
    app.demo.close(verbose=False)
    patch.undo()


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
