"""The page of labels to review, in a real browser."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ovsam.errors import InputError
from ovsam.results.report import write_report
from ovsam.results.results import Results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def results():
    """Three images: two cats and a dog, a dog, nothing."""
    masks = np.zeros((3, 48, 64), bool)
    masks[0, :20, :30] = masks[1, 30:, 40:] = masks[2, 20:25, 10:50] = True
    labels, ids, scores = ["cat", "dog", "cat"], [0, 1, 0], [0.9, 0.6, 0.3]
    yield Results.from_arrays(masks, labels, ids, scores, scores, labels, "text", file_name="in/a.png")
    yield Results.from_arrays(masks[1:2], ["dog"], [1], [0.2], [0.2], ["dog"], "text", file_name="b.png")
    yield Results([], (48, 64), file_name="</script><b>c.png")


def open_image(name):
    if name == "b.png":
        raise InputError("b.png does not exist.")
    return Image.new("RGB", (64, 48), "white")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
def test_a_person_filters_the_page(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    write_report(results(), tmp_path / "report.html", open_image)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())

        def cards():
            """The lines of each caption, their parts apart by a space."""
            return page.evaluate(
                """[...document.querySelectorAll("figcaption")].map(caption => [...caption.children].map(
                line => [...line.childNodes].map(part => part.textContent).filter(Boolean).join(" ")))"""
            )

        def label(name):
            return page.locator("aside button", has_text=name)

        assert cards() == [
            ["b.png", "dog 0.20"],  # the lowest score first
            ["a.png", "in/", "cat 0.30 0.90", "dog 0.60"],
            ["script><b>c.png", "</", "nothing found"],
        ]
        assert page.inner_text("#shown") == "3 of 3 images, 4 objects"
        assert page.locator("figure image").count() == 2 and page.locator("figure path").count() == 4
        assert page.locator("aside button").all_inner_texts() == ["all labels\n4", "cat\n2", "dog\n2"]
        assert label("cat").locator("rect[height='10']").count() == 2
        page.locator("figcaption").get_by_text("0.30").hover()  # shows its mask alone
        assert page.locator("path.hot title").all_text_contents() == ["cat 0.30"]
        label("cat").click()
        assert cards() == [["a.png", "in/", "cat 0.30 0.90"]] and not page.locator("path.hot").count()
        assert label("cat").get_attribute("aria-pressed") == "true"
        page.fill("#high", "0.5")
        page.dispatch_event("#high", "change")
        assert cards() == [["a.png", "in/", "cat 0.30"]] and page.inner_text("#shown") == "1 of 3 images, 1 objects"
        label("all labels").click()
        assert [name for name, *_ in cards()] == ["b.png", "a.png"] and not errors
        browser.close()
