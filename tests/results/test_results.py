"""The records, their exports and the drawing of them."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image, ImageFont
from pycocotools.coco import COCO

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_whole
from ovsam.results import overlay
from ovsam.results.formats.coco import to_coco, write_coco
from ovsam.results.results import Results

HEIGHT, WIDTH = 120, 160


def masks_of(*boxes, size=(HEIGHT, WIDTH)):
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


@pytest.fixture
def masks():
    masks = masks_of((10, 20, 50, 60), (70, 30, 150, 110), (5, 90, 15, 100))
    masks[1, 50:60, 90:100] = False  # a hole
    return masks


@pytest.fixture
def results(masks):
    return Results.from_arrays(
        masks,
        labels=["dog", "cat", "dog"],
        label_ids=[1, 0, 1],
        scores=np.float32([0.9, 0.5, 0.25]),
        mask_scores=[0.8, 0.7, 0.6],
        prompts=["puppy", "cat", "dog"],
        source="text",
        topk=[[("dog", 0.9), ("cat", 0.1)], [], []],
        model="fake",
        file_name="pets.jpg",
    )


def test_records(results, masks):
    dog = results[0]
    assert (dog.id, dog.label, dog.label_id, dog.prompt, dog.source) == (1, "dog", 1, "puppy", "text")
    assert dog.bbox == (10, 20, 40, 40) and dog.box == (10, 20, 50, 60) and dog.area == 1600
    assert dog.topk == [("dog", 0.9), ("cat", 0.1)]
    assert results[1].area == 80 * 80 - 100
    np.testing.assert_array_equal(dog.mask, masks[0])
    np.testing.assert_array_equal(results.masks, masks)
    np.testing.assert_array_equal(results.boxes, [[10, 20, 50, 60], [70, 30, 150, 110], [5, 90, 15, 100]])
    np.testing.assert_allclose(results.scores, [0.9, 0.5, 0.25])
    np.testing.assert_allclose(results.mask_scores, [0.8, 0.7, 0.6])


def test_sequence(results):
    assert len(results) == 3 and [instance.label for instance in results] == results.labels == ["dog", "cat", "dog"]
    assert results[-1].id == 3 and results[1:].labels == ["cat", "dog"]
    assert results[:0].masks.shape == (0, HEIGHT, WIDTH) and results[:0].boxes.shape == (0, 4)
    assert repr(results) == "Results(2 dog, 1 cat; 160x120 pixels; fake)"
    assert repr(results[:0]) == "Results(nothing; 160x120 pixels; fake)"


def test_filter_and_counts(results, masks):
    assert results.counts() == {"dog": 2, "cat": 1}
    assert [instance.id for instance in results.filter(score=0.5)] == [1, 2]
    assert [instance.id for instance in results.filter(mask_score=0.7)] == [1, 2]
    assert [instance.id for instance in results.filter(labels="dog")] == [1, 3]
    assert [instance.id for instance in results.filter(labels=["cat", "cow"], min_area=1600)] == [2]
    np.testing.assert_array_equal(results.filter(labels=["cat"]).masks, masks[1:2])
    assert results.filter(score=0.5).model == "fake" and len(results.filter(score=0.95)) == 0


def test_masks_may_be_run_lengths(results, masks):
    segmentations = [rle.encode(mask) for mask in masks]
    again = Results.from_arrays(
        segmentations,
        labels=results.labels,
        label_ids=[1, 0, 1],
        scores=results.scores,
        mask_scores=[0.8, 0.7, 0.6],
        prompts=["puppy", "cat", "dog"],
        source="text",
        topk=[instance.topk for instance in results],
        size=(HEIGHT, WIDTH),
    )
    assert list(again) == list(results) and again.size == results.size
    none = Results.from_arrays([], [], [], [], [], [], "text", size=(HEIGHT, WIDTH))
    assert len(none) == 0 and none.masks.shape == (0, HEIGHT, WIDTH)


OVERLAPPING = ((0, 0, 10, 10), (0, 0, 10, 9), (0, 0, 10, 4), (50, 50, 60, 60))  # IoU with the first: 0.9, 0.4, 0


def overlapping(**more):
    labels, scores = ["dog", "cat", "dog", "dog"], [0.9, 0.8, 0.7, 0.2]
    masks = masks_of(*OVERLAPPING)
    return Results.from_arrays(masks, labels, [1, 0, 1, 1], scores, scores, labels, "text", **more)


def test_filtering_again_needs_no_model():
    found = overlapping()
    before = list(found)

    def ids(results):
        return [instance.id for instance in results]

    assert ids(found.filter(nms="fast")) == [1, 3, 4] and ids(found.filter(nms="fast", nms_threshold=0.3)) == [1, 4]
    assert ids(found.filter(nms="fast", per_word=True)) == [1, 2, 3, 4]
    assert ids(found.filter(nms="fast", nms_threshold=0.3, per_word=True)) == [1, 2, 4]
    assert ids(found.filter(score=0.5, nms="fast", nms_threshold=0.95)) == [1, 2, 3]
    decayed = [0.9, 0.8 * np.exp(-(0.9**2) / 0.5), 0.7 * np.exp(-(0.4**2) / 0.5), 0.2]
    np.testing.assert_allclose(found.filter(nms="matrix").scores, decayed, rtol=1e-5)
    assert ids(found.filter(score=0.18, nms="matrix")) == [1, 3, 4]
    assert ids(found.filter(min_area=95, nms="fast")) == [1, 4] and list(found) == before
    assert len(found[:0].filter(nms="matrix")) == 0
    with pytest.raises(InputError, match="no NMS 'best'; there are fast, matrix"):
        found.filter(nms="best")


def test_proposals_are_ranked_by_objectness():
    boxes, scores = overlapping().proposals()
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.7, 0.2])
    boxes, scores = overlapping(objectness=[0.1, 0.5, 0.3, 0.9]).proposals()
    np.testing.assert_allclose(scores, [0.9, 0.5, 0.3, 0.1])
    np.testing.assert_array_equal(boxes, np.array(OVERLAPPING)[[3, 1, 2, 0]])


def test_maps_of_pixels():
    found = Results(reversed(list(overlapping())), (HEIGHT, WIDTH))  # the order does not matter, the score does
    ids, semantic = found.id_map(), found.to_semantic()
    assert ids[5, 5] == ids[9, 5] == 4 and ids[55, 55] == 1 and ids[100, 100] == 0
    assert semantic[5, 5] == 1 and semantic[55, 55] == 1 and semantic[100, 100] == -1 and (semantic != 0).all()
    assert found[:0].to_semantic().tolist() == np.full((HEIGHT, WIDTH), -1).tolist()


def test_panoptic():
    masks = masks_of((0, 0, 40, 40), (0, 0, 40, 50), (60, 0, 70, 10), (80, 0, 90, 10))
    found = Results.from_arrays(
        masks, ["dog", "cat", "sky", "sky"], [1, 0, 2, 2], [0.9, 0.8, 0.3, 0.7], [1] * 4, [""] * 4, "auto"
    )
    parts = found.to_panoptic(label_ids_to_fuse={2})
    assert parts["segments_info"] == [
        {"id": 1, "label_id": 1, "label": "dog", "was_fused": False, "score": pytest.approx(0.9)},
        {"id": 2, "label_id": 2, "label": "sky", "was_fused": True, "score": pytest.approx(0.7)},
    ]  # of the cat only a fifth is left
    segmentation = parts["segmentation"]
    assert np.bincount(segmentation.ravel())[1:].tolist() == [1600, 200] and segmentation[45, 5] == 0
    kept = found.to_panoptic(overlap_mask_area_threshold=0.1)
    assert [one["id"] for one in kept["segments_info"]] == [1, 2, 3, 4] and kept["segmentation"][45, 5] == 2


def test_run_lengths_of_parts_are_those_of_the_whole():
    whole = np.random.default_rng(0).random((30, 20)) < 0.6
    for y1, y2, x1, x2 in ((0, 30, 0, 20), (0, 30, 3, 9), (4, 5, 0, 20), (7, 25, 6, 20), (3, 3, 5, 5)):
        inside = np.zeros_like(whole)
        inside[y1:y2, x1:x2] = whole[y1:y2, x1:x2]
        part = rle.encode(whole[y1:y2, x1:x2], x1, y1, (30, 20))
        assert part == rle.encode(inside)
        reference = pycocotools.mask.encode(np.asfortranarray(inside, np.uint8))
        assert part["counts"] == reference["counts"].decode() and part["size"] == reference["size"]
        np.testing.assert_array_equal(rle.decode(part), inside)
        assert rle.area(part) == inside.sum()
    with pytest.raises(InputError, match="20x30 pixels at 1,0 does not fit into"):
        rle.encode(whole, 1, 0, (30, 20))


def test_run_lengths_are_compared():
    masks = masks_of(*OVERLAPPING, (0, 0, 0, 0))
    lengths = [rle.encode(mask) for mask in masks]
    np.testing.assert_allclose(rle.iou(lengths, lengths)[0], [1, 0.9, 0.4, 0, 0])
    np.testing.assert_allclose(rle.covered(lengths, lengths)[:, 1], [0.9, 1, 1, 0, 0])
    np.testing.assert_array_equal(rle.decode(rle.union(lengths)), masks.any(0))
    assert rle.iou([], lengths).shape == (0, 5) and rle.covered(lengths, []).shape == (5, 0)


def test_table(results):
    assert results.table().splitlines() == [
        "label  score  mask score            box  area",
        "dog     0.90        0.80    10,20,50,60  1600",
        "cat     0.50        0.70  70,30,150,110  6300",
        "dog     0.25        0.60    5,90,15,100   100",
        "2 dog, 1 cat",
    ]
    assert len(results[:1].table().splitlines()) == 2


def test_coco_file_loads_in_pycocotools(results, masks, tmp_path):
    other = Results.from_arrays(
        masks_of((0, 0, 4, 6), size=(20, 30)), ["cow"], [7], [1.0], [1.0], [[[1, 2, 1]]], "point", model="fake"
    )
    write_coco([results, results[:0], other], tmp_path / "found.json", labels=["cat", "dog", "ant"])
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]

    coco = COCO(tmp_path / "found.json")
    assert coco.dataset["info"]["model"] == "fake"
    assert [coco.cats[number]["name"] for number in (1, 2, 3, 4)] == ["cat", "dog", "ant", "cow"]
    assert coco.imgs[1] == {"id": 1, "file_name": "pets.jpg", "height": HEIGHT, "width": WIDTH}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    for annotation, mask in zip(annotations, masks, strict=True):
        np.testing.assert_array_equal(coco.annToMask(annotation), mask)
        assert isinstance(annotation["segmentation"]["counts"], str) and annotation["iscrowd"] == 0
    assert annotations[0]["bbox"] == [10.0, 20.0, 40.0, 40.0] and annotations[0]["category_id"] == 2
    assert [annotation["label"] for annotation in annotations] == ["dog", "cat", "dog"]
    assert annotations[1]["score"] == 0.5 and annotations[1]["mask_score"] == 0.7
    last = coco.loadAnns(coco.getAnnIds(imgIds=[3]))[0]
    assert last["id"] == 4 and last["category_id"] == 4 and last["prompt"] == [[1, 2, 1]] and last["source"] == "point"


def test_images_from_memory_get_names_of_their_own(results, tmp_path):
    results.file_name = None
    write_coco([results, results], tmp_path / "a.json")
    names = [image["file_name"] for image in json.loads((tmp_path / "a.json").read_text())["images"]]
    assert names == ["image_000001.jpg", "image_000002.jpg"]


def test_coco_of_one_image(results):
    one = results.to_coco(image_id=5)
    assert json.loads(json.dumps(one))["annotations"][2]["image_id"] == 5
    assert one == to_coco([results], first_image_id=5)
    assert one["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(InputError, match="out.txt cannot be written: disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_coco([], tmp_path / "no" / "out.json")  # folders are made
    assert json.loads((tmp_path / "no" / "out.json").read_text())["images"] == []


def test_supervision(results, masks, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    detections = results.to_supervision()
    np.testing.assert_array_equal(detections.mask, masks)
    np.testing.assert_array_equal(detections.xyxy, results.boxes)
    assert detections.class_id.tolist() == [1, 0, 1] and detections.data["class_name"].tolist() == ["dog", "cat", "dog"]


def test_overlay_changes_masks_and_tags_only(results, masks):
    grey = Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
    drawn = np.asarray(results.overlay(grey), int)
    assert drawn.shape == (HEIGHT, WIDTH, 3) and grey.getpixel((30, 40)) == (128, 128, 128)
    wanted = (1 - overlay.FILL) * 128 + overlay.FILL * np.array(overlay.PALETTE[0])
    np.testing.assert_allclose(drawn[100, 120], wanted, atol=1)  # inside the cat, label_id 0
    assert (drawn[55, 95] == 128).all()  # the hole
    assert (drawn[112:, 20:66] == 128).all()  # far from everything
    assert results[:0].overlay(grey) == grey
    assert results.overlay(grey, zoom=2).size == (2 * WIDTH, 2 * HEIGHT)
    with pytest.raises(InputError, match="9x9 pixels and these results are for 160x120"):
        results.overlay(Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (48, 400), (1200, 900)])
def test_tags_stay_inside_and_apart(size, monkeypatch):
    width, height = size
    boxes = [(0, 0, width, height), (0, 0, width // 3, height // 3), (width // 2, height // 2, width, height)]
    boxes += [(width - 1, height - 1, width, height), (width // 3, 1, width // 3 + 1, height)]
    names = ["thing", "a very long name that cannot fit into a narrow picture", "bee", "é", "x"]
    results = Results.from_arrays(
        masks_of(*boxes, size=(height, width)), names, range(5), [0.5] * 5, [0.5] * 5, names, "text"
    )
    places = []
    place = overlay._place_tag
    monkeypatch.setattr(overlay, "_place_tag", lambda *arguments: places.append(place(*arguments)) or places[-1])
    assert results.overlay(np.zeros((height, width, 3), np.uint8)).size == size
    tags = np.array(places)
    if size == (1200, 900):
        assert (overlay._overlap(tags, tags) == np.diag((tags[:, 2:] - tags[:, :2]).prod(axis=1))).all()
    if min(size) >= 48:
        assert (tags >= -1).all() and (tags[:, [0, 2]] <= width).all() and (tags[:, [1, 3]] <= height).all()


def test_text_is_fitted():
    instance = SimpleNamespace(label="traffic light", score=0.5)
    font = ImageFont.load_default(12)
    assert overlay._fit_text(instance, font, 200) == "traffic light 0.50"
    assert overlay._fit_text(instance, font, font.getlength("traffic light")) == "traffic light"
    short = overlay._fit_text(instance, font, 40)
    assert short.startswith("tr") and short.endswith("...") and font.getlength(short) <= 40
    assert overlay._fit_text(instance, font, 1) == "..."


def test_colours_are_distinct_and_stay_with_their_label():
    def choose(*ids):
        return overlay._choose_colours([SimpleNamespace(label=f"word {number}", label_id=number) for number in ids])

    crowd = choose(*range(0, 5 * len(overlay.PALETTE), 5))
    assert len(crowd) == len(set(crowd.values())) == len(overlay.PALETTE)
    assert choose(3, 4)["word 3"] == choose(3, 17, 9)["word 3"]
    assert len(choose(*range(100))) == 100


def test_a_label_picks_its_instances(results):
    assert results["dog"].labels == ["dog", "dog"] and results["dog"].size == results.size
    assert not results["bird"] and "dog" in results and "bird" not in results and results[0] in results


def test_plot_and_save_use_the_image_at_hand(results, tmp_path):
    grey = Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
    results.file_name = None
    with pytest.raises(InputError, match="do not hold their image"):
        results.plot()
    assert results._repr_png_() is None
    results.picture = np.asarray(grey)
    assert results.plot(zoom=1) == results.overlay(grey) and results.plot().width > WIDTH
    assert results[:1].plot(zoom=1) == results[:1].overlay(grey)  # parts keep it
    assert Image.open(io.BytesIO(results._repr_png_())).size == results.plot().size
    results.save(tmp_path / "new" / "found.png")
    with Image.open(tmp_path / "new" / "found.png") as saved:
        assert saved.size == results.plot().size
    results.save(tmp_path / "found.json")
    assert len(json.loads((tmp_path / "found.json").read_text())["annotations"]) == len(results)
    with pytest.raises(InputError, match="neither an image file"):
        results.save(tmp_path / "found.docx")
    grey.save(tmp_path / "a.png")
    results.picture, results.file_name = None, str(tmp_path / "a.png")
    assert results.plot(zoom=1) == results.overlay(grey)


def test_masks_cutouts_and_a_data_frame(results, masks):
    assert [np.asarray(mask).astype(bool).tolist() for mask in results.to_masks()] == masks.tolist()
    cut = results.to_cutouts(Image.new("RGB", (WIDTH, HEIGHT)))
    assert [part.size for part in cut] == [(int(one.bbox[2]), int(one.bbox[3])) for one in results]
    pandas = pytest.importorskip("pandas")
    frame = results.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and frame["label"].tolist() == results.labels
    assert frame[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == results.boxes.tolist()


@pytest.mark.parametrize(
    "wrong", [{"score": "x"}, {"score": float("nan")}, {"mask_score": 2}, {"labels": 5}, {"nms": "best"}]
)
def test_an_invalid_filter_is_one_sentence(results, wrong):
    with pytest.raises(InputError):
        results.filter(**wrong)
