"""The demo in a real browser, from the image to the file. Screenshots of all steps go to a temporary
folder, or to the one that OVSAM_SCREENSHOTS names."""

import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import app
import engine
import image_tab
import pytest
from common import ROOT, wait_until
from PIL import Image
from pycocotools.coco import COCO

from ovsam.inference.frames import FrameSource, VideoWriter

playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]

TIMEOUT = 60_000  # milliseconds; two cores may be busy
EXAMPLE = ROOT / "tests" / "data" / "photos-val" / "images" / "000000000599.jpg"


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=TIMEOUT)
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
        self.tab.set_default_timeout(TIMEOUT)
        self.problems = []
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.goto(f"{url}?__theme={theme}")
        self.rows, self.shapes = (
            self.tab.locator("#listing ul:not(.absent) > li"),
            self.tab.locator("#canvas path.object"),
        )

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
        return self.tab.locator("#listing .label").all_inner_texts()

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


def test_a_message_moves_nothing(visitor):
    visitor.give(EXAMPLE)
    image, said = visitor.tab.locator("#canvas svg"), visitor.tab.locator("[role=tabpanel] .say:visible")
    soon(0, said)
    before = image.bounding_box()
    for message in ('"One moment"', '{text: "Frame 1", busy: true, share: 0.5}'):
        visitor.tab.evaluate(
            f"document.querySelector('#canvas').dispatchEvent("
            f"new CustomEvent('ovsam-message', {{detail: {message}, bubbles: true}}))"
        )
        soon(1, said)
        assert image.bounding_box() == before


def test_an_animation_is_announced_until_the_next_question(visitor, page, tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    visitor.give(tmp_path / "moving.gif")
    wait_until(lambda: page.asked == ["encode"])
    said = visitor.tab.locator("[role=tabpanel] .say:visible")
    playwright.expect(said.get_by_role("button")).to_have_count(0)
    visitor.tab.wait_for_timeout(1000)
    playwright.expect(said).to_contain_text("moving.gif is an animation; this is its first frame")


def test_from_an_image_to_a_corrected_coco_file(visitor, page, shots, tmp_path, monkeypatch):
    segmenter, tab, words = engine.models.get("ovsam-tiny"), visitor.tab, ["cat", "remote", "couch", "tiger"]
    visitor.give(EXAMPLE)
    wait_until(lambda: page.asked == ["encode"])

    # A click: its name, with four others and their scores; a background click refines it; a box is another object.
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
    for left in (1, 1, 0):
        tab.get_by_role("button", name="Undo").click()
        soon(left, visitor.rows)

    # Words: as many masks as the library finds, and a line for those that are absent.
    visitor.find(", ".join(words))
    expected = segmenter.where(EXAMPLE, words)
    assert len(expected) and "tiger" not in expected.labels
    soon(len(expected), visitor.rows)
    soon(len(expected), visitor.shapes)
    assert visitor.names() == expected.labels
    line = tab.locator("#listing .absent li").last
    playwright.expect(line).to_have_text(f"tiger: none (best {expected.presence['tiger']:.2f})")
    tab.screenshot(path=shots / "words.png", full_page=True)

    # Filters: fewer or more, and the model is not asked; a button shows what is below them.
    asked = list(page.asked)
    floor = engine.floor("ovsam-tiny", segmenter.model.config.score_threshold)
    found = segmenter.where(EXAMPLE, words, threshold=floor)
    visitor.slide("Confidence", 1)
    soon(0, visitor.rows)
    playwright.expect(tab.locator("#listing")).to_contain_text(f"No object passes the filters; {len(found)} are below.")
    tab.get_by_role("button", name="Lower the confidence").click()
    soon(min(len(found), 5), visitor.rows)
    visitor.slide("Confidence", round(float(found.scores[0]) - 0.01, 2))
    shown = found.filter(score=round(float(found.scores[0]) - 0.01, 2))
    soon(len(shown), visitor.rows)

    # A click on an object selects it; zooming moves the places of clicks.
    visitor.rows.first.click()
    soon(1, tab.locator("#listing li.active"))
    tab.get_by_role("button", name="Zoom in").click()
    left, top, width, _ = map(float, tab.locator("#canvas svg").first.get_attribute("viewBox").split())
    assert width == pytest.approx(512 / 1.5, abs=0.1) and left == pytest.approx((512 - width) / 2, abs=0.1)
    tab.get_by_role("button", name="Zoom out").click()
    tab.get_by_role("button", name="Deselect").click()
    soon(0, tab.locator("#listing li.active"))
    assert page.asked == asked

    # Corrections, and taking one back.
    tab.locator("#listing li >> nth=0").get_by_label("Rename").click()
    tab.get_by_label("New name").fill("<b>lunch</b>")
    tab.get_by_label("New name").press("Enter")
    playwright.expect(visitor.rows.nth(0).locator(".label")).to_have_text("<b>lunch</b>")
    visitor.rows.nth(0).get_by_label("Delete").click()
    soon(len(shown) - 1, visitor.rows)
    tab.get_by_role("button", name="Undo").click()
    soon(len(shown), visitor.rows)

    # They survive the next question, and a reload of the page.
    visitor.find("tiger")
    playwright.expect(tab.locator("#listing .absent li")).to_have_count(1)
    assert visitor.names() == ["<b>lunch</b>"]
    monkeypatch.setattr(image_tab, "GRACE", 60.0)
    tab.reload()
    playwright.expect(visitor.rows.locator(".label").first).to_have_text("<b>lunch</b>")
    playwright.expect(tab.get_by_label("Find these words")).to_have_value("tiger")

    with tab.expect_download() as started:
        tab.get_by_role("button", name="Download").click()
    started.value.save_as(tmp_path / "found.json")
    assert started.value.suggested_filename == "000000000599.coco.json"
    coco = COCO(tmp_path / "found.json")
    [annotation] = coco.loadAnns(coco.getAnnIds())
    assert annotation["label"] == "<b>lunch</b>" and annotation["segmentation"] == found[0].segmentation
    assert coco.annToMask(annotation).sum() == annotation["area"] > 0

    # The page is closed: its files go, and its features.
    monkeypatch.setattr(image_tab, "GRACE", 0.0)
    folder = next(reversed(image_tab.sessions._open.values())).folder
    assert folder.exists() and len(engine.features) == 1
    image_tab.sessions.close(next(iter(image_tab.sessions._open)))  # that of the page before the reload
    tab.close()
    wait_until(lambda: not (len(image_tab.sessions) or len(engine.features) or folder.exists()))


def test_a_question_that_waits_is_shown_and_cancelled(visitor, page):
    tab, message = visitor.tab, visitor.tab.locator(".say:visible")
    tab.locator("#canvas .examples button").first.click()
    playwright.expect(tab.get_by_label("Find these words")).not_to_have_value("")
    wait_until(lambda: page.asked == ["encode"])
    with engine.turns.free:  # another visitor's question runs
        visitor.find("cat")
        playwright.expect(message).to_contain_text("The model is running")
        message.get_by_role("button", name="Cancel").click()
        playwright.expect(message).to_have_text("Cancelled.")
    wait_until(lambda: not engine.turns.waiting())
    soon(0, visitor.rows)


def test_errors_are_one_message(visitor, page, tmp_path):
    tab, message = visitor.tab, visitor.tab.locator(".say:visible")
    visitor.find("cat")
    playwright.expect(message).to_have_text("There is no image yet; choose one, or take an example.")

    bad = tmp_path / "text.png"
    bad.write_text("no picture")
    tab.set_input_files("#canvas input[type=file]", bad)
    playwright.expect(message).to_contain_text("text.png is not an image in a supported format")
    soon(1, message)
    soon(0, tab.locator(".toast-body"))
    assert str(app.demo.GRADIO_CACHE) not in message.inner_text()

    Image.new("1", (6000, 5000)).save(tmp_path / "wide.png")
    tab.set_input_files("#canvas input[type=file]", tmp_path / "wide.png")
    playwright.expect(message).to_contain_text("wide.png has 6000x5000 pixels; 25 million are the most here.")
    (tmp_path / "heavy.png").write_bytes(b"0" * 21_000_000)
    tab.set_input_files("#canvas input[type=file]", tmp_path / "heavy.png")
    playwright.expect(message).to_contain_text("heavy.png has more than 20 MB")
    assert page.asked == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(browser, page, shots, theme):
    """Nothing is wider than the screen; names from a pasted list, everything, and all like one."""
    visitor = Visitor(browser, page.url, width=400, theme=theme)
    tab = visitor.tab
    tab.locator("#canvas .examples button").first.click()
    playwright.expect(tab.get_by_label("Find these words")).to_have_value("person")
    tab.get_by_label("Class names for clicks, boxes and everything").click()
    tab.get_by_role("option", name="My own words").click()
    tab.get_by_role("textbox", name="My own words").fill("person, tennis racket")
    tab.get_by_role("button", name="Find everything").click()
    playwright.expect(visitor.rows.first).to_be_visible()
    assert set(visitor.names()) <= {"person", "tennis racket"}
    tab.screenshot(path=shots / f"everything-{theme}.png", full_page=True)
    page.asked.clear()
    before = visitor.names()
    visitor.rows.first.get_by_label("Find similar objects").click()
    wait_until(lambda: page.asked == ["where"])
    playwright.expect(tab.locator(".say:visible")).to_have_count(0)
    assert visitor.names()[: len(before)] == before  # similar ones are added
    tab.screenshot(path=shots / f"phone-{theme}.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.close()
    assert not visitor.problems


def test_a_clip_from_the_file_to_its_tracks(visitor, page, shots, tmp_path):
    """The example moves through the frames; the object that is clicked on the second one is followed."""
    pytest.importorskip("av", reason="needs `pip install av`")
    whole, writer = Image.open(EXAMPLE).convert("RGB"), VideoWriter(tmp_path / "pan.mp4", Fraction(10), (400, 320))
    for index in range(4):
        writer.write(whole.crop((8 * index, 0, 8 * index + 400, 320)), index / 10)
    writer.close()
    tab, message = visitor.tab, visitor.tab.locator(".say:visible")
    tab.get_by_role("tab", name="Video").click()
    playwright.expect(tab.locator("#player .drop")).to_contain_text("up to 50 MB and 300 frames")
    (tmp_path / "text.mp4").write_text("no video")
    tab.set_input_files("#player input[type=file]", tmp_path / "text.mp4")
    playwright.expect(message).to_contain_text("text.mp4 cannot be read as a video")
    tab.get_by_role("button", name="Download json").click()
    playwright.expect(message).to_have_text("There is no clip yet; choose one.")

    tab.set_input_files("#player input[type=file]", tmp_path / "pan.mp4")
    playwright.expect(tab.locator("#player output")).to_have_text("1 / 4")
    tab.get_by_role("button", name="Track").click()
    playwright.expect(message).to_contain_text("There is nothing to follow yet")
    frame = tab.get_by_role("slider", name="Frame")
    frame.fill("1")
    area = tab.locator("#player svg").bounding_box()
    tab.locator("#player svg").click(position={"x": area["width"] * 0.3, "y": area["height"] * 0.55})
    objects = tab.locator("#player .objects li")
    soon(1, objects)
    soon(1, tab.locator("#player circle"))
    tab.get_by_role("button", name="Track").click()
    playwright.expect(message).to_contain_text("followed")
    playwright.expect(objects.first).to_contain_text(re.compile(r"[123] frames?"))  # none before the click
    soon(0, tab.locator("#player path.object"))
    frame.fill("1")
    soon(1, tab.locator("#player path.object"))
    tab.screenshot(path=shots / "video.png", full_page=True)
    for button, name in (("Download video", "pan.tracked.mp4"), ("Download json", "pan.tracks.json")):
        with tab.expect_download() as started:
            tab.get_by_role("button", name=button).click()
        started.value.save_as(tmp_path / name)
        assert started.value.suggested_filename == name
    assert len(list(FrameSource(tmp_path / "pan.tracked.mp4"))) == 4
    [annotation] = json.loads((tmp_path / "pan.tracks.json").read_text())["annotations"]
    assert annotation["segmentations"][0] is None and annotation["segmentations"][1] is not None
    objects.first.get_by_role("button", name="Remove").click()
    soon(0, objects)
