from types import SimpleNamespace

import app
import engine
import image_tab
import pytest


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The demo, served with the shipped checkpoint: `url`, and `asked`, the questions that the model has answered, with
    "encode" for each image."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_SHARE", "OVSAM_MODEL"):
        patch.delenv(name, raising=False)
    patch.setattr(engine, "AT_START", ())  # minutes of work that no test here waits for
    patch.setattr(image_tab, "GRACE", 0.0)
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
