"""The demo in a real browser, from the image to the file. Screenshots of all steps go to a temporary
folder, or to the one that OVSAM_SCREENSHOTS names."""

import os
import shutil
from pathlib import Path

import app
import engine
import pytest
from common import ROOT, wait_until
from PIL import Image
from pycocotools.coco import COCO

playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]

EXAMPLE = ROOT / "demo" / "examples" / "cat.jpg"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return Path(os.environ.get("OVSAM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


class Visitor:
    """A browser tab with the demo, and the actions of a user."""

    def __init__(self, browser, url, width=1400, theme="light"):
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.tab.set_default_timeout(20_000)
        self.problems = []
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.goto(f"{url}?__theme={theme}")
        self.rows, self.shapes = self.tab.locator("#listing li"), self.tab.locator("#canvas path.object")

    def give(self, path):
        self.tab.set_input_files("#canvas input[type=file]", path)
        playwright.expect(self.tab.locator("#canvas .stage")).to_be_visible()

    def click(self, x, y, **how):
        """At a position of the image, in fractions of its sides."""
        size = self.tab.locator("#canvas svg").bounding_box()
        self.tab.locator("#canvas svg").click(position={"x": x * size["width"], "y": y * size["height"]}, **how)

    def drag(self, x1, y1, x2, y2):
        self.tab.locator("#canvas svg").scroll_into_view_if_needed()
        size = self.tab.locator("#canvas svg").bounding_box()
        places = [(size["x"] + x * size["width"], size["y"] + y * size["height"]) for x, y in ((x1, y1), (x2, y2))]
        self.tab.mouse.move(*places[0])
        self.tab.mouse.down()
        self.tab.mouse.move(*places[1], steps=4)
        self.tab.mouse.up()

    def find(self, words):
        self.tab.get_by_label("Find these words").fill(words)
        self.tab.get_by_role("button", name="Find", exact=True).click()

    def names(self):
        return self.tab.locator("#listing li .label").all_inner_texts()

    def slide(self, label, value):
        field = self.tab.get_by_label(f"number input for {label}")
        field.fill(str(value))
        field.press("Enter")


@pytest.fixture
def visitor(browser, page):
    visitor = Visitor(browser, page.url)
    page.asked.clear()
    yield visitor
    visitor.tab.close()
    assert not visitor.problems


def soon(count, locator):
    playwright.expect(locator).to_have_count(count)


def test_from_an_image_to_a_corrected_coco_file(visitor, page, shots, tmp_path):
    segmenter, tab = engine.models.get("ovsam-tiny"), visitor.tab
    visitor.give(EXAMPLE)
    wait_until(lambda: page.asked == ["encode"])

    # A click: its name, with four others and their scores; another click beside it refines it.
    visitor.click(0.25, 0.55)
    soon(1, visitor.rows)
    named = segmenter.what(EXAMPLE, points=[[512 * 0.25, 326 * 0.55]])[0]
    assert visitor.names() == [named.label]
    label, score = tab.locator("#listing .name").all_inner_texts()[0].split("\n")
    assert label == named.label and float(score) == pytest.approx(named.score, abs=0.02)  # the page rounds the click
    soon(5, tab.locator("#listing .name"))
    visitor.click(0.9, 0.2, button="right")
    soon(2, tab.locator("#canvas circle"))
    assert visitor.rows.count() == 1 and page.asked == ["encode", "what", "what"]
    visitor.drag(0.75, 0.72, 0.9, 0.87)
    soon(2, visitor.rows)
    soon(1, tab.locator("#canvas rect.prompt"))
    tab.screenshot(path=shots / "clicks.png", full_page=True)

    # Words: as many masks as the library finds, beside the two that were drawn.
    visitor.find("cat, remote, couch")
    expected = segmenter.where(EXAMPLE, ["cat", "remote", "couch"])
    soon(2 + len(expected), visitor.rows)
    soon(2 + len(expected), visitor.shapes)
    assert visitor.names()[2:] == expected.labels
    tab.screenshot(path=shots / "words.png", full_page=True)

    # Sliders: fewer or more, and the model is not asked.
    asked = list(page.asked)
    floor = engine.floor("ovsam-tiny", segmenter.model.config.score_threshold)
    found = segmenter.where(EXAMPLE, ["cat", "remote", "couch"], threshold=floor)
    best = float(found.scores[0])
    for score in (round(best, 2) - 0.01, round(best / 2, 2)):
        expected = found.filter(score=score)
        visitor.slide("Least score", score)
        soon(2 + len(expected), visitor.rows)

    # Corrections, and taking one back.
    tab.locator("#listing li >> nth=2").get_by_label("Rename").click()
    tab.get_by_label("New name").fill("<b>lunch</b>")
    tab.get_by_label("New name").press("Enter")
    playwright.expect(tab.locator("#listing li >> nth=2").locator(".label")).to_have_text("<b>lunch</b>")
    visitor.rows.nth(0).get_by_label("Delete").click()
    soon(1 + len(expected), visitor.rows)
    tab.get_by_role("button", name="undo").click()
    soon(2 + len(expected), visitor.rows)
    visitor.rows.nth(0).get_by_label("Hide").click()
    soon(1 + len(expected), visitor.shapes)
    assert page.asked == asked

    with tab.expect_download() as started:
        tab.get_by_role("button", name="Download").click()
    started.value.save_as(tmp_path / "found.json")
    assert started.value.suggested_filename == "cat.coco.json"
    coco = COCO(tmp_path / "found.json")
    annotations = coco.loadAnns(coco.getAnnIds())
    assert [a["label"] for a in annotations][1:] == ["<b>lunch</b>", *expected.labels[1:]]
    assert [a["segmentation"] for a in annotations][1:] == [one.segmentation for one in expected]
    assert all(coco.annToMask(a).sum() == a["area"] > 0 for a in annotations)

    # The page is closed: its files go, and its features.
    assert len(app.sessions) == 1 and len(engine.features) == 1
    [folder] = Path(app.demo.GRADIO_CACHE).glob("session-*")
    tab.close()
    wait_until(lambda: not (len(app.sessions) or len(engine.features) or folder.exists()))


def test_errors_are_one_message(visitor, page, tmp_path):
    tab, message = visitor.tab, visitor.tab.locator(".toast-body")
    visitor.find("cat")
    playwright.expect(message).to_contain_text("There is no picture yet: choose one, or take an example.")
    tab.locator(".toast-close").click()
    soon(0, message)

    bad = tmp_path / "text.png"
    bad.write_text("no picture")
    tab.set_input_files("#canvas input[type=file]", bad)
    playwright.expect(message).to_contain_text("text.png is not an image in a supported format")
    soon(1, message)
    assert str(app.demo.GRADIO_CACHE) not in message.inner_text()
    tab.locator(".toast-close").click()

    Image.new("1", (6000, 5000)).save(tmp_path / "wide.png")
    tab.set_input_files("#canvas input[type=file]", tmp_path / "wide.png")
    playwright.expect(message).to_contain_text("wide.png has 6000x5000 pixels; 25 million are the most here.")
    (tmp_path / "heavy.png").write_bytes(b"0" * 21_000_000)
    tab.set_input_files("#canvas input[type=file]", tmp_path / "heavy.png")
    playwright.expect(tab.locator("#canvas .problem")).to_contain_text("heavy.png has more than 20 MB")
    assert page.asked == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(browser, page, shots, theme):
    """Nothing is wider than the screen; names from a pasted list, everything, and all like one."""
    visitor = Visitor(browser, page.url, width=400, theme=theme)
    tab = visitor.tab
    tab.locator("#canvas .examples button").first.click()
    playwright.expect(tab.get_by_label("Find these words")).to_have_value("cat, remote")
    tab.get_by_label("Names for clicks, boxes and everything").click()
    tab.get_by_role("option", name="My own words").click()
    tab.get_by_role("textbox", name="My own words").fill("cat, remote")
    tab.get_by_role("button", name="Find everything").click()
    playwright.expect(visitor.rows.first).to_be_visible()
    assert set(visitor.names()) <= {"cat", "remote"}
    tab.screenshot(path=shots / f"everything-{theme}.png", full_page=True)
    page.asked.clear()
    visitor.rows.filter(has_text="cat").first.get_by_label("Find all like this").click()
    playwright.expect(tab.locator("#listing tr")).to_have_count(1)
    assert set(visitor.names()) == {"cat"} and page.asked == ["where"]
    tab.screenshot(path=shots / f"phone-{theme}.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.close()
    assert not visitor.problems
