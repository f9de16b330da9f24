"""The demo: sessions, limits, downloads, and the server through gradio_client."""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import app
import engine
import image_tab
import numpy as np
import pytest
import torch
from common import ROOT, wait_until
from contours import to_path
from gradio_client import Client, handle_file
from page import LOOK, Page
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from scene import Scene, Session, Sessions, Sliders
from turns import Turns, WordLists, no_show

import ovsam
import ovsam_cli
from ovsam.errors import InputError
from ovsam.results.results import Results

DEMO = ROOT / "demo"
EXAMPLE = ROOT / "tests" / "data" / "photos-val" / "images" / "000000000599.jpg"
SIZE = (40, 60)  # height, width


def found(source="text", objectness=None):
    """Two overlapping bands (IoU 0.5), scores 0.8 and 0.2, and a small square, 0.5."""
    masks = np.zeros((3, *SIZE), bool)
    masks[0, :20], masks[1, 5:20], masks[2, 30:35, 30:35] = True, True, True
    masks[1, 20:25] = True
    names = [[("cat", 0.8), ("dog", 0.1)], [("cat", 0.2)], [("dog", 0.5)]]
    scores = {"scores": [0.8, 0.2, 0.5], "mask_scores": [0.9, 0.8, 0.3], "objectness": objectness}
    return Results.from_arrays(
        masks, ["cat", "cat", "dog"], [0, 0, 1], prompts=["cat", "cat", "dog"], source=source, topk=names, **scores
    )


@pytest.fixture
def session(tmp_path):
    Image.new("RGB", SIZE[::-1], (10, 90, 50)).save(tmp_path / "small.png")
    session = Session(tmp_path / "session")
    session.receive(tmp_path / "small.png")
    session.change(session.scene.find(found(), "words"))
    return session


def labels(session, **sliders):
    return [one.label for one in session.shown(Sliders(**sliders))]


def test_sliders_filter_like_results(session):
    answer = session.scene.answers[0].results
    assert labels(session) == ["cat", "cat", "dog"]
    assert labels(session, score=0.3) == answer.filter(score=0.3).labels == ["cat", "dog"]
    assert labels(session, mask_score=0.5) == answer.filter(mask_score=0.5).labels == ["cat", "cat"]
    assert labels(session, min_area=30) == answer.filter(min_area=30).labels == ["cat", "cat"]
    assert labels(session, overlap=0.4) == answer.filter(nms="fast", nms_threshold=0.4).labels == ["cat", "dog"]


def test_the_score_slider_goes_by_the_score_in_every_mode(session):
    session.change(session.scene.find(found("auto", objectness=[0.1, 0.9, 0.6]), "everything"))
    assert [one.score for one in session.shown(Sliders(score=0.5))] == [0.8, 0.5]


def test_corrections_are_undone_one_by_one(session):
    def rename(scene):
        return scene.edit("found 1.3", label="fox")

    for change in (rename, lambda s: s.edit("found 1.1", hidden=True), lambda s: s.delete("found 1.2")):
        session.change(change(session.scene))
    assert labels(session) == ["fox"] and session.shown(Sliders(score=0.9))[0].score == 1  # a person is sure
    view = session.view(Sliders())
    assert [row["label"] for row in view["listing"]["rows"]] == ["cat", "fox"]  # the hidden one can be shown again
    assert view["listing"]["counts"] == [("fox", 1)]
    seen = []
    while session.history:
        session.undo()
        seen.append(labels(session))
    assert seen == [["cat", "fox"], ["cat", "cat", "fox"], ["cat", "cat", "dog"], []]


def test_what_a_person_did_survives_every_later_question(session):
    """Renamed, deleted, hidden and drawn objects stay as they are, and the same objects are not found a second time."""
    session.change(session.scene.edit("found 1.1", label="lunch"))  # the upper band
    session.change(session.scene.delete("found 1.3"))  # the square
    for kind in ("words", "alike", "everything", "words"):
        session.change(session.scene.find(found(), kind))
        assert labels(session) == ["lunch", "cat"]
    key, drawn = session.scene.box((30, 30, 35, 35))
    session.change(session.scene.keep(key, replace(drawn, instance=found()[2])))
    session.change(session.scene.find(found(), "words"))
    assert labels(session) == ["dog", "lunch", "cat"]


def test_a_deleted_object_is_found_again_under_other_words_only(session):
    session.change(session.scene.delete("found 1.3"))
    session.change(session.scene.find(found(), "words"))
    assert labels(session) == ["cat", "cat"]
    other = Results([replace(found()[2], label="fox")], SIZE)
    session.change(session.scene.find(other, "words"))
    assert labels(session) == ["fox"]
    session.change(session.scene.find(other, "everything"))
    assert labels(session) == []


def test_objects_like_one_are_added(session):
    cats, dogs = Results(found()[:2].instances, SIZE), Results([found()[2], found()[0]], SIZE)
    session.change(session.scene.find(cats, "words"))
    session.change(session.scene.find(dogs, "alike"))
    assert labels(session) == ["cat", "cat", "dog"]  # the cat that both found is there once
    session.change(session.scene.find(cats, "words"))
    assert labels(session) == ["cat", "cat"]


def test_a_click_means_what_a_person_means(session):
    scene = session.scene
    with pytest.raises(InputError, match="Choose an object first"):
        scene.click(1, 2, 0, Sliders())
    assert scene.click(32, 32, 1, Sliders()) == ("found 1.3", None)  # selects the square that was found there
    assert scene.click(50, 3, 1, Sliders()) == ("found 1.1", None)  # the smaller one of two
    key, new = scene.click(55, 38, 1, Sliders())
    assert key not in scene.objects(Sliders()) and new.arguments()["points"] == [[55, 38]]

    active = replace(scene, active="found 1.3")
    near, refined = active.click(35.5, 35.5, 1, Sliders())  # beside the square: more of it
    assert near == "found 1.3"
    assert refined.arguments() == {"points": [[35.5, 35.5]], "labels": [1], "boxes": [[30, 30, 35, 35]]}
    assert active.click(55, 38, 1, Sliders())[0] == key  # far from the square: another object
    assert active.click(3, 3, 1, Sliders()) == ("found 1.1", None)
    assert active.click(55, 38, 1, Sliders(), add=True)[0] == "found 1.3"
    assert active.click(3, 3, 0, Sliders())[1].arguments()["labels"] == [0]
    kept = active.keep(near, replace(refined, instance=found()[2]))
    again = kept.click(31, 31, 0, Sliders())[1]
    assert again.arguments() == {"points": [[35.5, 35.5], [31, 31]], "labels": [1, 0], "boxes": [[30, 30, 35, 35]]}


def test_clicks_refine_a_box_and_a_box_starts_another_object(session):
    key, drawn = session.scene.box((1, 2, 30, 20))
    session.change(session.scene.keep(key, replace(drawn, instance=found()[0])))
    again, refined = session.scene.click(5, 6, 0, Sliders())
    assert again == key
    assert refined.arguments() == {"points": [[5, 6]], "labels": [0], "boxes": [[1, 2, 30, 20]]}
    assert session.scene.box((0, 0, 9, 9))[0] != key


def test_absent_words_are_listed_with_their_best_score(session):
    some = found()
    some.presence, some.dropped = {"cat": 0.8, "tiger": 0.19}, [{"text_label": "wolf", "negative": "dog"}]
    session.change(session.scene.find(some, "words", ["cat", "tiger", "wolf"]))
    view = session.view(Sliders())["listing"]
    assert view["absent"] == ["tiger: none (best 0.19)", "wolf: excluded, more like dog"]
    session.change(session.scene.find(some, "words", [f"word {number}" for number in range(30)]))
    assert session.view(Sliders())["listing"]["absent"][-1] == "and 10 more words"


def test_the_list_offers_the_confidence_at_which_more_is_shown(session):
    assert session.view(Sliders())["listing"]["below"] == 0
    view = session.view(Sliders(score=0.9))["listing"]
    assert (view["rows"], view["below"], view["lower"]) == ([], 3, 0.2)
    assert labels(session, score=view["lower"]) == ["cat", "cat", "dog"]
    assert session.view(Sliders(min_area=10_000))["listing"]["lower"] is None  # another filter leaves them out


def test_an_answer_for_a_replaced_image_is_dropped(session, tmp_path):
    old = session.picture
    session.receive(tmp_path / "small.png")
    session.answer(old, "m", lambda scene: scene.find(found(), "words"))
    assert session.scene == Scene() and not old.path.exists()


def polygon(path, steps=40):
    """The rings of an outline as points, with `steps` on each curve."""
    rings = []
    for ring in re.findall(r"M([^z]*)z", path):
        points = []
        for part in re.findall(r"([-\d.]+) ([-\d.]+)Q([-\d.]+) ([-\d.]+) ([-\d.]+) ([-\d.]+)", ring):
            start, corner, end = np.array(part, float).reshape(3, 2)
            share = np.linspace(0, 1, steps)[:, None]
            points += list((1 - share) ** 2 * start + 2 * share * (1 - share) * corner + share**2 * end)
        rings.append(np.array(points))
    return rings


def test_outlines_are_smooth_and_keep_to_the_mask():
    mask = Image.new("1", (200, 160))
    ImageDraw.Draw(mask).ellipse((20, 20, 150, 120), fill=1)
    mask = np.array(mask)
    mask[50:80, 60:110] = False  # a hole
    mask[140:150, 10:40] = True  # another part
    rings = polygon(to_path(Results.from_arrays([mask], ["a"], [0], [1], [1], ["a"], "text")[0]))
    assert len(rings) == 3
    drawn = Image.new("1", (800, 640))
    for ring in rings:
        one = Image.new("1", drawn.size)
        ImageDraw.Draw(one).polygon([tuple(point * 4) for point in ring], fill=1)
        drawn = Image.fromarray(np.array(drawn) ^ np.array(one))  # even-odd
    exact = mask.repeat(4, 0).repeat(4, 1)
    assert (np.array(drawn) & exact).sum() / (np.array(drawn) | exact).sum() > 0.97
    way = np.diff(rings[0], axis=0, append=rings[0][:1])
    way = way[np.linalg.norm(way, axis=1) > 0.05]
    turn = np.abs(np.angle(np.exp(1j * np.diff(np.arctan2(way[:, 1], way[:, 0])))))
    assert np.degrees(turn.max()) < 20  # along the edges of the pixels it turns by 90


def test_features_are_few_a_session_and_bounded_in_all():
    kept, made = engine.Features(a_session=2, size=1000), []

    def get(session, picture, count=50):
        return kept.get(
            session, "m", picture, lambda: made.append(picture) or ovsam.EncodedImage(None, torch.zeros(count))
        )

    for picture in "abab":
        get("one", picture)
    assert made == ["a", "b"] and kept.bytes == 400
    get("one", "c")
    assert len(kept) == 2
    for visitor in range(20):
        get(f"v{visitor}", "x")
        assert kept.bytes <= 1000
    get("v19", "x")
    assert len(made) == 23
    get("one", "c")  # went, and is made again
    assert len(made) == 24
    get("huge", "y", 10_000)
    assert kept.bytes == 0
    get("one", "c")
    kept.forget("one")
    assert len(kept) == 0


def test_errors_about_uploads_do_not_show_the_path(tmp_path, monkeypatch):
    def sentence(name):
        with pytest.raises(InputError) as error:
            engine.Upload(tmp_path / name, name, "")
        assert str(tmp_path) not in str(error.value)
        return str(error.value)

    Image.new("1", (6000, 5000)).save(tmp_path / "wide.png")
    assert sentence("wide.png").startswith("wide.png has 6000x5000 pixels; 25 million are the most here.")
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png is not an image in a supported format" in sentence("text.png")
    monkeypatch.setattr(engine, "MAX_MEGABYTES", 0.01)
    (tmp_path / "heavy.png").write_bytes(b"0" * 20_000)
    assert "heavy.png has more than" in sentence("heavy.png")


def test_sessions_are_bounded_and_take_their_files_with_them(tmp_path, session):
    sessions = Sessions(lambda: tmp_path / "all", most=3)
    for number in range(5):
        sessions.get(f"s{number}", new=True).receive(tmp_path / "small.png")
    assert len(sessions) == 3 and len(list((tmp_path / "all").iterdir())) == 3
    with pytest.raises(InputError, match="idle for too long"):
        sessions.get("s0")
    old = sessions.get("s4")
    assert sessions.restore("reloaded", old.token) is old and sessions.restore("other", "guess") is None
    assert sessions.close("s4") is None and old.picture.path.exists()  # the reloaded page has it
    assert sessions.close("reloaded") is old
    for number in range(5):
        sessions.close(f"s{number}")
    assert not list((tmp_path / "all").iterdir())


@pytest.mark.parametrize("kind", image_tab.FORMATS)
def test_every_download_has_the_corrected_names(session, tmp_path, kind):
    session.change(session.scene.edit("found 1.3", label="red/fox").delete("found 1.2"))
    path = image_tab.FORMATS[kind](session.shown(Sliders()), session.picture.path, tmp_path)
    if kind == "COCO json":
        coco = COCO(path)
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["cat", "red/fox"]
        assert [int(coco.annToMask(a).sum()) for a in coco.loadAnns(coco.getAnnIds())] == [1200, 25]
    elif kind == "LabelMe":
        record = json.loads(path.read_text())
        assert [s["label"] for s in record["shapes"]] == ["cat", "red/fox"] and record["imagePath"] == "small.png"
    elif kind == "PNG id map":
        with Image.open(path) as image:
            assert np.bincount(np.asarray(image).ravel()).tolist() == [1175, 1200, 25]
    else:
        with zipfile.ZipFile(path) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
            if kind == "YOLO-seg":
                assert names == {"data.yaml", "images/small.png", "labels/small.txt", "scores/small.txt"}
                assert '1: "red/fox"' in archive.read("data.yaml").decode()
            else:
                assert names == {"001-cat.png", "002-red-fox.png"}
                with archive.open("002-red-fox.png") as file, Image.open(file) as cut:
                    assert cut.size == (5, 5) and cut.mode == "RGBA"


def test_the_endpoints_are_the_three_questions_with_types_and_descriptions(page):
    api = app.demo.get_api_info()
    types = {
        name: {p["parameter_name"]: p["python_type"]["type"] for p in endpoint["parameters"]}
        for name, endpoint in api["named_endpoints"].items()
    }
    names = "list[str] | Literal['own', 'coco', 'lvis', 'imagenet21k']"
    sliders = {"score": "None | float", "mask_score": "float", "overlap": "float", "min_area": "int", "model": "str"}
    boxes, words = "None | list[list[float]]", "None | list[str]"
    assert types == {
        "/what": {"picture": "filepath", "points": boxes, "boxes": boxes, "vocabulary": names, "model": "str"},
        "/where": {"picture": "filepath", "words": words, "negative": words, "exemplars": boxes, **sliders},
        "/everything": {"picture": "filepath", "vocabulary": names, **sliders},
    }
    assert not api["unnamed_endpoints"]
    assert all(endpoint["description"] for endpoint in api["named_endpoints"].values())


@pytest.fixture(scope="module")
def client(page):
    client = Client(page.url, verbose=False)
    yield client
    client.close()


def assert_same(coco, results):
    assert [a["label"] for a in coco["annotations"]] == results.labels and len(results) > 0
    assert [a["segmentation"] for a in coco["annotations"]] == [one.segmentation for one in results]
    np.testing.assert_allclose([a["score"] for a in coco["annotations"]], results.scores, atol=1e-5)
    assert coco["info"]["model"] == "ovsam-tiny" and coco["images"][0]["file_name"] == EXAMPLE.name


@pytest.mark.slow
def test_a_client_gets_the_answers_of_the_library_and_of_the_page(page, client):
    segmenter, picture = engine.models.get("ovsam-tiny"), handle_file(str(EXAMPLE))
    encoded = segmenter.encode(EXAMPLE)
    box = [1.0, 30.0, 330.0, 323.0]
    page.asked.clear()

    words = client.predict(picture, words=["cat", "remote"], api_name="/where")
    assert_same(words, segmenter.where(encoded, ["cat", "remote"]))
    named = client.predict(picture, points=[[120, 180], [480, 40, 0]], vocabulary=["cat", "dog"], api_name="/what")
    assert_same(
        named, segmenter.what(encoded, points=[[120, 180], [480, 40]], labels=[1, 0], vocabulary=["cat", "dog"])
    )
    assert_same(client.predict(picture, boxes=[box], api_name="/what"), segmenter.what(encoded, boxes=[box]))
    assert_same(
        client.predict(picture, vocabulary="coco", api_name="/everything"), segmenter.everything(encoded, "coco")
    )
    alike = client.predict(picture, exemplars=[box], api_name="/where")
    assert_same(alike, segmenter.where(encoded, exemplars=[box]))
    assert page.asked == ["encode", "where", "what", "what", "everything", "where"]

    request, sessions = app.gr.Request(session_hash="a page"), image_tab.sessions
    image_tab.show_picture(sessions.get("a page", new=True), EXAMPLE)
    asked = image_tab.find_words(request, "cat, remote", "", "ovsam-tiny", *vars(Sliders(0.9)).values(), show=no_show)
    updates = asyncio.run(asked)
    shown = sessions.get("a page").shown(Sliders(updates["score"].value))
    assert json.loads(json.dumps(shown.to_coco())) == words
    sessions.close("a page")


@pytest.mark.parametrize(
    "endpoint, asked, sentence",
    [
        ("/what", {"points": [[600, 5]]}, "The point 600,5 is outside the "),
        ("/what", {"points": [[5]]}, "A point is"),
        ("/what", {"boxes": [[5, 6]]}, "each must be 4 numbers"),
        ("/what", {}, "pass points, boxes or masks"),
        ("/where", {}, "pass words or exemplars"),
        ("/everything", {"vocabulary": "/etc/passwd"}, "A vocabulary is a list of words or one of own, coco"),
        ("/where", {"words": ["cat"], "model": "/no/model"}, "A model is a preset"),
    ],
)
def test_errors_are_one_sentence(client, endpoint, asked, sentence):
    with pytest.raises(Exception, match=re.escape(sentence)) as error:
        client.predict(handle_file(str(EXAMPLE)), **asked, api_name=endpoint)
    assert "Traceback" not in str(error.value)


def test_questions_take_turns_and_long_lists_of_words_let_them_pass():
    turns, order, shown = Turns(most=3), [], []
    lists = WordLists(turns)
    going, begun = threading.Event(), threading.Event()

    def embed(progress):
        assert not turns.free.locked()  # questions need not wait while the words are read
        progress(0, 8)
        for done in range(1, 9):
            assert turns.free.locked()
            order.append(f"words {done}")
            begun.set()
            going.wait(5)
            progress(done, 8)
        assert not turns.free.locked()  # nor while the embeddings are written

    def question(name):
        assert turns.free.locked()
        order.append(name)
        time.sleep(0.02)
        return name

    async def visit():
        waiting = asyncio.create_task(lists.ready("list", embed, lambda *state: shown.append(state)))
        await asyncio.to_thread(begun.wait)
        asked = [asyncio.create_task(turns.take(lambda name=name: question(name))) for name in "abc"]
        await asyncio.sleep(0.05)
        with pytest.raises(InputError, match="3 questions are waiting already"):
            await turns.take(lambda: question("d"))
        asked[1].cancel()  # gives up its place
        going.set()
        assert await asked[0] == "a" and await asked[2] == "c"
        await waiting

    asyncio.run(visit())
    assert order == ["words 1", "a", "c", *(f"words {number}" for number in range(2, 9))]
    assert shown[0][0] in ("The words are next", "0 of 8 words")

    def wrong(progress):
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        asyncio.run(lists.ready("wrong", wrong))


def test_words_take_a_small_share_of_the_time_while_questions_wait(monkeypatch):
    monkeypatch.setattr("turns.PATIENCE", 0.05)
    turns, going = Turns(most=3), threading.Event()

    async def visit():
        question = asyncio.create_task(turns.take(lambda: going.wait(5)))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        await asyncio.to_thread(turns.let_pass, 0.02)  # seconds of the last part
        waited = time.monotonic() - start
        going.set()
        await question
        return waited

    assert asyncio.run(visit()) >= 0.02 / 0.02


@pytest.mark.slow
def test_the_end_of_the_program_waits_for_the_running_part_alone():
    program = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import engine

def embed(progress):
    progress(0, 3)
    for done in (1, 2, 3):
        begun.set()
        time.sleep(0.3)
        print("part", done, flush=True)
        progress(done, 3)

begun = threading.Event()
engine.word_lists.begin("list", embed)
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", program, Path(engine.__file__).parent], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "part 1\n"), done.stderr


def test_the_place_in_the_queue_is_shown():
    turns, shown = Turns(most=5), []

    async def visit():
        first = asyncio.create_task(turns.take(lambda: time.sleep(0.4)))
        await asyncio.sleep(0.05)
        await turns.take(lambda: time.sleep(0.6), lambda text, share: shown.append(text))
        await first

    asyncio.run(visit())
    assert shown[0] == "1 before you" and shown[-1] == "The model is running"


@pytest.mark.slow
@pytest.mark.weights
def test_embeddings_of_built_in_vocabularies_are_made_off_the_questions(page, monkeypatch, tmp_path):
    """A visitor who asks for a long vocabulary waits for it; meanwhile others are answered."""
    monkeypatch.setattr("ovsam.inference.text_embedder.CACHE", tmp_path)
    upload, words = engine.Upload(EXAMPLE, "cat.jpg", "x"), [f"thing {number}" for number in range(600)]
    asked, inside = [], []
    segmenter = engine.models.get("ovsam-tiny")
    encode = segmenter.encode_words

    def spy(some):
        inside.append(threading.current_thread().name)
        return encode(some)

    monkeypatch.setattr(segmenter, "encode_words", spy)

    async def visit():
        async def ask(name, **arguments):
            await engine.ask("ovsam-tiny", name, upload, "everything", **arguments)
            asked.append(name)

        await engine.ask("ovsam-tiny", "other", upload, None)
        long = asyncio.create_task(ask("long", vocabulary=words))
        await asyncio.sleep(0.1)
        await asyncio.gather(ask("other", vocabulary=["a word of its own"]), long)

    asyncio.run(visit())
    assert asked == ["other", "long"]
    assert len(set(inside)) == 2  # the short list in its question, the long one beside them
    for name in ("other", "long"):
        engine.features.forget(name)


def test_a_model_that_cannot_be_loaded_leaves_the_menu_as_it_was(monkeypatch):
    def refuse(name):
        raise InputError(f"There is no {name}.")

    monkeypatch.setattr(engine.models, "get", refuse)
    updates = asyncio.run(image_tab.choose_model(None, "photo", "ovsam-tiny", show=no_show))
    assert updates == {"models": "ovsam-tiny", "message": "There is no photo. The model is still ovsam-tiny."}
    monkeypatch.setattr(engine, "missing", lambda name: name == "photo")
    assert ("photo (not available: no connection to the Hub)", "photo") in image_tab.model_choices("ovsam-tiny")


@pytest.mark.slow
@pytest.mark.parametrize("file, coco_id", [("tennis.jpg", 352257), ("train.jpg", 565778), ("pizza.jpg", 121647)])
def test_the_examples_succeed(ovsam_tiny, file, coco_id):
    """The words that come with an example are found, with the masks that people drew."""
    words = next(words for name, words, _ in image_tab.EXAMPLES if name == file).split(", ")
    photos = COCO(str(ROOT / "tests" / "data" / "photos-val" / "annotations.json"))
    [image] = [one["id"] for one in photos.dataset["images"] if one["coco_id"] == coco_id]
    names = {one["id"]: one["name"] for one in photos.dataset["categories"]}
    results = ovsam_tiny.where(DEMO / "examples" / file, words)
    for word in words:
        drawn = [photos.annToMask(one) > 0 for one in photos.imgToAnns[image] if names[one["category_id"]] == word]
        best = max((mask & one.mask).sum() / (mask | one.mask).sum() for one in results[word] for mask in drawn)
        assert best > 0.5


def test_a_message_stays_until_something_is_reported():
    """After an upload that failed, the image that is not there is prepared, which must not remove the error."""

    async def quiet(show):
        await asyncio.sleep(0.01)
        return {"status": "done"}

    async def busy(show):
        show("Encoding the image")
        await asyncio.sleep(3 * LOOK)
        return {"status": "done"}

    async def results(handler, keeps_message):
        page = Page(message="message", status="status")
        return [one async for one in page.does(handler, keeps_message)()]

    assert asyncio.run(results(quiet, True)) == [{"status": "done"}]
    assert asyncio.run(results(quiet, False))[-1] == {"message": "", "status": "done"}
    assert [one["message"] for one in asyncio.run(results(busy, True))][1:] == [""]


def test_an_animation_is_announced(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    assert engine.Upload(tmp_path / "moving.gif", "moving.gif", "").animated
    assert not engine.Upload(tmp_path / "still.gif", "still.gif", "").animated


def test_too_much_for_one_question_is_one_sentence(client):
    many = {"words": [f"word {number}" for number in range(2001)]}
    with pytest.raises(Exception, match="There are 2,001 words; 2,000 are the most here. Ask in parts."):
        client.predict(handle_file(str(EXAMPLE)), **many, api_name="/where")
    boxes = {"boxes": [[0, 0, 9, 9]] * 51}
    with pytest.raises(Exception, match="There are 51 boxes; 50 are the most here."):
        client.predict(handle_file(str(EXAMPLE)), **boxes, api_name="/what")


def test_only_uploads_are_opened(client, page):
    page.asked.clear()
    with pytest.raises(Exception, match="must be uploaded"):
        client.predict({"path": "/etc/passwd"}, words=["cat"], api_name="/where")
    assert not page.asked


@pytest.mark.weights
def test_a_visitor_names_no_folder_of_the_server(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in (str(tiny_folder), "/etc", "/nothing", "a/b", "../a", "~/model", "a/b/c", "a/b@/etc", "model\n"):
        with pytest.raises(InputError, match=r"^A model is a preset \(photo, "):
            engine.models.get(name)
    monkeypatch.setattr(engine.models, "own", {str(tiny_folder)})  # that of `ovsam demo --model`
    assert engine.models.get(str(tiny_folder)).name == str(tiny_folder)
    assert engine.models.get("ovsam-tiny").name == "ovsam-tiny"


@pytest.mark.slow
def test_twenty_visitors_at_once_get_their_own_images(page, tmp_path, monkeypatch):
    """Each has a part of another size of the example by the same file name, and some ask again."""
    monkeypatch.setattr(engine.features, "size", 100_000_000)  # three images: most are encoded again
    whole, together = Image.open(EXAMPLE).convert("RGB"), threading.Barrier(20, timeout=120)
    segmenter, biggest = engine.models.get("ovsam-tiny"), 0

    def visit(number):
        nonlocal biggest
        path = tmp_path / str(number) / "picture.png"
        path.parent.mkdir()
        part = whole.crop((0, 0, 300 + 10 * number, whole.height))
        part.save(path)
        client = Client(page.url, verbose=False, httpx_kwargs={"timeout": 120.0})
        together.wait()
        for _ in range(2 if number % 7 == 0 else 1):
            coco = client.predict(handle_file(str(path)), points=[[100, 200]], vocabulary=["cat"], api_name="/what")
            biggest = max(biggest, engine.features.bytes)
            with Image.open(path) as own:
                assert (coco["images"][0]["width"], coco["images"][0]["height"]) == own.size
        client.close()
        return number, part, coco

    with ThreadPoolExecutor(20) as pool:
        visits = list(pool.map(visit, range(20)))
    for _, part, coco in visits[::7]:
        expected = segmenter.what(part, points=[[100, 200]], vocabulary=["cat"])
        assert [a["segmentation"] for a in coco["annotations"]] == [one.segmentation for one in expected]
    assert biggest <= 100_000_000
    wait_until(lambda: len(engine.features) <= 1)  # the module's own client may have one


def test_the_command_serves_this_machine_only_by_default(monkeypatch):
    served = []
    monkeypatch.setattr(app, "main", lambda *arguments: served.append(arguments))
    assert ovsam_cli.main(["demo"]) == 0
    assert ovsam_cli.main(["demo", "--model", "photo", "--host", "0.0.0.0", "--port", "80", "--share"]) == 0
    assert served == [("auto", "127.0.0.1", 7860, False), ("photo", "0.0.0.0", 80, True)]


def test_a_port_in_use_raises_an_error(page, capsys):
    port = page.url.rstrip("/").rsplit(":", 1)[1]
    assert ovsam_cli.main(["demo", "--model", "ovsam-tiny", "--port", port]) == 2
    assert capsys.readouterr().err.endswith(f"cannot be served at 127.0.0.1:{port}; try another --port.\n")


def test_the_space_is_the_demo_with_our_wheel(tmp_path):
    import runpy

    wheel = tmp_path / f"ovsam-{ovsam.__version__}-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    build = runpy.run_path(str(ROOT / "hub" / "build_space.py"))["build_space"]
    build("me/ovsam", wheel, tmp_path / "space")
    written = {str(path.relative_to(tmp_path / "space")) for path in (tmp_path / "space").rglob("*") if path.is_file()}
    shown = {str(path.relative_to(DEMO)) for path in DEMO.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert written == shown | {wheel.name}
    requirement = (tmp_path / "space" / "requirements.txt").read_text()
    assert requirement.startswith("ovsam[demo] @ https://") and requirement.endswith(
        f"/spaces/me/ovsam/resolve/main/{wheel.name}\n"
    )
    assert (tmp_path / "space" / "README.md").read_text().startswith("---\ntitle: ovsam\n")
    with pytest.raises(SystemExit, match="not empty"):
        build("me/ovsam", wheel, tmp_path / "space")
