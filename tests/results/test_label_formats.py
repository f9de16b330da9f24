"""Label files, each read back to the masks that it was made of."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.polygons import fill as fill_polygons
from ovsam.ops.polygons import outlines, parts, to_polygon
from ovsam.results.formats import FORMATS, read_labels, recognise, write_labels, write_yolo
from ovsam.results.formats.coco import to_coco, write_coco
from ovsam.results.formats.label_studio import decode_rle, encode_rle, write_label_studio
from ovsam.results.formats.labelme import to_labelme, write_labelme
from ovsam.results.formats.masks import cutouts, write_id_map
from ovsam.results.formats.yolo import to_yolo
from ovsam.results.results import Results

SIZE = (60, 80)


def odd_masks():
    """A ring around an island, two far parts, pixels that touch by corners both ways, one pixel, noise, everything."""
    masks = np.zeros((6, *SIZE), bool)
    masks[0, 5:45, 5:60], masks[0, 10:40, 10:50], masks[0, 20:25, 20:30] = True, False, True
    masks[1, :7, :9], masks[1, 50:, 70:] = True, True
    masks[2, 10:14, 10:14] = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 0, 1, 1]])
    masks[3, 59, 79] = True
    masks[4] = np.random.default_rng(0).random(SIZE) < 0.3
    masks[5] = True
    return masks


def fill(polygon, even_odd):
    """Which pixels' centres a polygon surrounds: crossings of a ray to the right, counted or signed."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    winding = np.zeros(SIZE, int)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (y1 <= y) != (y2 <= y)
        if crosses.any():
            where = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
            winding += (crosses & (where > x)) * (1 if even_odd or y2 > y1 else -1)
    return winding % 2 == 1 if even_odd else winding != 0


@pytest.mark.parametrize("number", range(6))
def test_polygons_fill_to_the_very_mask(number):
    mask = odd_masks()[number]
    polygon = to_polygon(mask)
    for even_odd in (False, True):
        np.testing.assert_array_equal(fill(polygon, even_odd), mask)


def test_outlines_of_parts_and_holes():
    ring, parts, corners = (outlines(mask) for mask in odd_masks()[:3])

    def area(polygon):
        x, y = polygon.T
        return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2

    assert [area(polygon) for polygon in ring] == [40 * 55, -30 * 40, 50]  # clockwise on the screen is positive
    assert ring[0].tolist() == [[5, 5], [60, 5], [60, 45], [5, 45]]
    assert [area(polygon) for polygon in parts] == [63, 100]
    assert sum(map(area, corners)) == odd_masks()[2].sum()
    assert outlines(np.zeros(SIZE, bool)) == [] and to_polygon(np.zeros(SIZE, bool)).shape == (0, 2)


def test_a_tolerance_takes_corners_not_shape():
    disc = Image.new("1", SIZE[::-1])
    ImageDraw.Draw(disc).ellipse((10, 5, 70, 55), fill=1)
    mask = np.asarray(disc)
    exact, rough = to_polygon(mask), to_polygon(mask, tolerance=1)
    assert len(rough) < len(exact) / 3
    again = fill(rough, even_odd=False)
    assert (again & mask).sum() / (again | mask).sum() > 0.95
    assert len(to_polygon(odd_masks()[3], tolerance=5)) == 3


@pytest.fixture
def results():
    labels = ["ring", "two", "ring", "dot", "noise", "all"]
    ids = [4, 5, 4, 6, 7, 8]
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    return Results.from_arrays(
        odd_masks(), labels, ids, scores, scores, labels, "text", model="fake", file_name="photos/pets.jpg"
    )


NAMES = ["dot", "ring", "two", "noise", "all"]


def test_yolo_is_read_back(results, tmp_path):
    empty = Results([], SIZE, "fake", "none.png")
    write_yolo([results, empty], tmp_path, NAMES)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "data.yaml", "labels/none.txt", "labels/photos/pets.txt", "scores/none.txt", "scores/photos/pets.txt",
    ]  # fmt: skip
    lines = (tmp_path / "labels/photos/pets.txt").read_text().splitlines()
    assert [NAMES[int(line.split()[0])] for line in lines] == results.labels
    for line, mask in zip(lines, odd_masks(), strict=True):
        corners = np.array(line.split()[1:], float).reshape(-1, 2)
        assert corners.min() >= 0 and corners.max() <= 1
        np.testing.assert_array_equal(fill(corners * SIZE[::-1], even_odd=False), mask)
    assert (tmp_path / "labels/none.txt").read_text() == ""
    assert (tmp_path / "scores/photos/pets.txt").read_text().split() == [f"{score:.4f}" for score in results.scores]
    assert (tmp_path / "data.yaml").read_text().splitlines()[-5:] == [
        '  0: "dot"', '  1: "ring"', '  2: "two"', '  3: "noise"', '  4: "all"',
    ]  # fmt: skip
    assert to_yolo(results).split("\n")[0].startswith("4 ")  # without names, the label_id
    with pytest.raises(InputError, match="'ring' is not one of the 1 labels"):
        to_yolo(results, ["dot"])


def test_label_files_have_names_of_their_own(results, tmp_path):
    write_labelme([results, Results([], SIZE, "", "other/pets.png")], tmp_path)
    assert (tmp_path / "photos/pets.json").is_file() and (tmp_path / "other/pets.json").is_file()
    with pytest.raises(InputError, match="photos/pets.jpg and photos/pets.png would both have the label file"):
        write_yolo([results, Results([], SIZE, "", "photos/pets.png")], tmp_path, NAMES)
    outside = [Results([], SIZE, "", f"{folder}/pets.png") for folder in ("..", "/a")]
    with pytest.raises(InputError, match="would both have the label file 'pets'"):
        write_labelme(outside, tmp_path)
    with pytest.raises(InputError, match="without a file_name"):
        write_labelme([Results([], SIZE)], tmp_path)


@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_labelme_is_read_back(results, tmp_path, shape):
    write_labelme([results], tmp_path, shape)
    record = json.loads((tmp_path / "photos/pets.json").read_text())
    assert record["imageData"] is None and record["imagePath"] == "pets.jpg"
    assert (record["imageHeight"], record["imageWidth"]) == SIZE
    assert [one["label"] for one in record["shapes"]] == results.labels
    for one, mask in zip(record["shapes"], odd_masks(), strict=True):
        assert one["shape_type"] == shape
        if shape == "polygon":
            again = fill(np.array(one["points"]), even_odd=True)
        else:
            (x1, y1), (x2, y2) = one["points"]
            part = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["mask"]))))
            again = np.zeros(SIZE, bool)
            again[y1 : y2 + 1, x1 : x2 + 1] = part
        np.testing.assert_array_equal(again, mask)
    with pytest.raises(InputError, match="no shape for LabelMe 'box'"):
        to_labelme(results, "box")


def test_id_map_is_read_back(results, tmp_path):
    write_id_map(results, tmp_path / "ids.png")
    ids = np.asarray(Image.open(tmp_path / "ids.png"))
    expected = np.zeros(SIZE, int)
    for place, mask in reversed(list(enumerate(odd_masks(), start=1))):  # scores fall
        expected[mask] = place
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(results.id_map(), expected)


def test_cutouts(results):
    pixels = np.random.default_rng(1).integers(0, 255, (*SIZE, 3), np.uint8)
    cut = cutouts(results, pixels)
    assert len(cut) == 6 and cut[3].size == (1, 1) and cut[1].size == (80, 60)
    ring = np.asarray(cut[0])
    np.testing.assert_array_equal(ring[..., 3] > 0, odd_masks()[0][5:45, 5:60])
    np.testing.assert_array_equal(ring[..., :3], pixels[5:45, 5:60])
    with pytest.raises(InputError, match="these results are for 80x60"):
        cutouts(results, pixels[:50])


def pictures_below(folder, *results):
    """The image files, which some formats read for their size."""
    for result in results:
        path = folder / result.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", result.size[::-1]).save(path)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(results, tmp_path, name):
    empty = Results([], (32, 48), "fake", "none.png")
    images = pictures_below(tmp_path / "images", results, empty)
    target = tmp_path / f"out{FORMATS[name]}"
    write_labels(iter([results, empty]), target, name, NAMES, images)
    assert recognise(target) == name
    again = {one.file_name: one for one in read_labels(target, images=images)}
    assert again.keys() == {"photos/pets.jpg", "none.png"}
    assert again["none.png"].size == (32, 48) and not again["none.png"].instances
    found = again["photos/pets.jpg"]
    if name == "masks":  # one instance a pixel: where masks overlap, those of higher scores
        ids = results.id_map()
        expected = [(ids == place, one) for place, one in enumerate(results, start=1) if (ids == place).any()]
    else:
        expected = [(one.mask, one) for one in results]
    assert found.size == SIZE and [one.label for one in found] == [one.label for _, one in expected]
    for one, (mask, truth) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.mask, mask)
        if name != "geojson":
            assert one.score == pytest.approx(truth.score, abs=1e-4)


def test_coco_is_streamed_as_it_is_made(results, tmp_path):
    other = Results(list(results)[:2], SIZE, "other", "more.png")
    write_coco(iter([results, other, Results([], SIZE, "fake", "none.png")]), tmp_path / "all.json", ["dot", "cow"])
    whole = to_coco([results, other, Results([], SIZE, "fake", "none.png")], labels=["dot", "cow"])
    assert json.loads((tmp_path / "all.json").read_text()) == json.loads(json.dumps(whole))
    assert [one["name"] for one in whole["categories"]][:2] == ["dot", "cow"]
    write_coco([], tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text())["images"] == []
    again = Results.from_coco(whole)
    assert [list(one) for one in again[:2]] == [
        [replace(one, label_id=["dot", "cow", "ring", "two", "noise", "all"].index(one.label)) for one in result]
        for result in (results, other)
    ]


def test_coco_of_other_tools(tmp_path, caplog):
    square, hole = [5, 5, 25, 5, 25, 25, 5, 25], rle.encode(odd_masks()[0])
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 60, "width": 80}],
        "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [square, [30, 30, 40, 30, 40, 40]]},
            {"id": 2, "image_id": 7, "category_id": 90, "segmentation": hole, "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4]},
        ],
    }
    (found,) = Results.from_coco(content)
    assert [(one.label, one.label_id, one.score, one.source) for one in found] == [("dog", 1, 1.0, "file")]
    assert found[0].mask[5:25, 5:25].all() and found[0].mask[30:40, 30:40].any() and not found[0].mask[:5].any()
    assert "1 crowds (iscrowd) left out" in caplog.text and "1 boxes without an outline left out" in caplog.text
    for wrong, message in (
        ({"category_id": 5}, r"annotations\[0\].category_id of the data set is 5, which is missing"),
        ({"image_id": 5}, r"annotations\[0\].image_id of the data set is 5, which is missing"),
        ({"segmentation": [[0, 0, 500, 0, 500, 9]]}, r"annotations\[0\].segmentation of the data set lies outside"),
    ):
        broken = content | {"annotations": [content["annotations"][0] | wrong]}
        with pytest.raises(InputError, match=message):
            Results.from_coco(broken)
    del content["images"][0]["width"]
    with pytest.raises(InputError, match=r"images\[0\] of the data set has no width and height"):
        Results.from_coco(content)


def test_yolo_of_other_tools(tmp_path):
    pictures_below(tmp_path / "images", Results([], SIZE, "", "a.png"))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("1 0.25 0.5 0.5 0.5 0.5 1\n")
    for names in ("names: ['cat', 'dog']", "names:\n- cat\n- 'dog'\nnc: 2", 'names:\n  0: cat\n  1: "dog"\n'):
        (tmp_path / "data.yaml").write_text(f"train: images\n{names}\n")
        (found,) = Results.from_yolo(tmp_path)
        assert found.labels == ["dog"] and found.file_name == "a.png" and 280 < found[0].area < 320
    assert Results.from_yolo(tmp_path, labels=["cow", "ant"])[0].labels == ["ant"]
    for line, message in (
        ("2 0 0 1 0 1 1", "Line 1 of .*a.txt must be the number of one of 2 names"),
        ("1 0 0 1 0 1", "must be the number of one of 2 names and a polygon x, y"),
        ("1 0 0 3 0 3 3", "Line 1 of .*a.txt lies outside its image"),
        ("1", "Line 1 of .*a.txt has no polygon of three points or more"),
        ("1 0 0 1 1", "Line 1 of .*a.txt has no polygon of three points or more"),
    ):
        (tmp_path / "labels/a.txt").write_text(line)
        with pytest.raises(InputError, match=message):
            Results.from_yolo(tmp_path)
    (tmp_path / "labels/b.txt").touch()
    (tmp_path / "labels/a.txt").write_text("")
    with pytest.raises(InputError, match="There is no image b in"):
        Results.from_yolo(tmp_path)


def test_labelme_of_people(tmp_path):
    shapes = [
        {"label": "box", "shape_type": "rectangle", "points": [[30, 40], [10, 20]]},
        {"label": "disc", "shape_type": "circle", "points": [[40, 30], [40, 40]]},
        {"label": "line", "shape_type": "line", "points": [[1, 2], [3, 4]]},
        {"label": "box", "shape_type": "polygon", "points": [[0, 0], [10, 0], [10, 10]], "description": "score 0.25"},
    ]
    record = {"shapes": shapes, "imagePath": "..\\far\\a.png", "imageHeight": 60, "imageWidth": 80}
    (tmp_path / "a.json").write_text(json.dumps(record))
    (found,) = Results.from_labelme(tmp_path)
    assert found.file_name == "a.png" and found.labels == ["box", "disc", "box"]
    assert found.scores.tolist() == [1, 1, 0.25] and [one.label_id for one in found] == [0, 1, 0]
    assert found[0].area == 400 and found[1].area == pytest.approx(314, abs=12)
    shapes[0]["points"][0][0] = 300
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"The value shapes\[0\] of .*a.json lies outside its image"):
        Results.from_labelme(tmp_path)


@pytest.mark.parametrize("kind", ["labelme", "label-studio"])
def test_an_image_that_is_too_large_for_run_lengths(tmp_path, kind):
    side, corners = 1_000_000, [[1, 1], [5, 1], [5, 5]]
    shape = {"label": "cup", "shape_type": "polygon", "points": corners}
    labelme = {"imagePath": "a.png", "imageHeight": side, "imageWidth": side, "shapes": [shape]}
    value = {"points": corners, "polygonlabels": ["cup"]}
    region = {"original_width": side, "original_height": side, "type": "polygonlabels", "value": value}
    tasks = [{"data": {"image": "a.png"}, "annotations": [{"result": [region]}]}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(labelme if kind == "labelme" else tasks))
    with pytest.raises(InputError, match="1000000x1000000 pixels; masks need an image of under"):
        read_labels(path, kind)


def test_label_studio_of_people(tmp_path):
    facts = {"original_width": 80, "original_height": 60, "from_name": "label", "to_name": "image"}
    mask = odd_masks()[0]
    brush = {"id": "b", "type": "brushlabels", "value": {"rle": encode_rle(mask), "brushlabels": ["ring"]}, **facts}
    box = {"x": 25, "y": 50, "width": 50, "height": 25, "rotation": 0, "rectanglelabels": ["box"]}
    box = {"id": "r", "type": "rectanglelabels", "value": box, **facts}
    choice = {"id": "c", "type": "choices", "value": {"choices": ["good"]}}
    task = {
        "data": {"image": "/data/local-files/?d=photos/a.png"},
        "annotations": [{"result": [brush]}, {"result": [brush, box, choice]}, {"was_cancelled": True, "result": []}],
        "predictions": [{"result": [box]}],
    }
    (tmp_path / "a.json").write_text(json.dumps([task]))
    (found,) = Results.from_label_studio(tmp_path / "a.json")
    assert found.file_name == "photos/a.png" and found.labels == ["ring", "box"] and found[1].area == 40 * 15
    np.testing.assert_array_equal(found[0].mask, mask)
    brush["value"]["brushlabels"] = []
    (tmp_path / "a.json").write_text(json.dumps([task]))
    assert Results.from_label_studio(tmp_path / "a.json")[0].labels == ["object", "box"]
    brush["value"]["rle"][4] |= 0b10000000
    (tmp_path / "a.json").write_text(json.dumps([task]))
    with pytest.raises(InputError, match=r"The region b of .*, task \[0\], has run lengths of 24 bits a value"):
        Results.from_label_studio(tmp_path / "a.json")
    brush["value"]["rle"] = encode_rle(mask)[:-8]
    (tmp_path / "a.json").write_text(json.dumps([task]))
    with pytest.raises(InputError, match=r"The region b of .*, task \[0\], has incomplete run lengths"):
        Results.from_label_studio(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps([{"data": {"image": "a.png"}}]))
    with pytest.raises(InputError, match=r"The value \[0\] of .* has no size"):
        Results.from_label_studio(tmp_path / "a.json")


def test_label_studio_polygons(results, tmp_path):
    write_label_studio([results], tmp_path / "tasks.json", NAMES, shape="polygon", image_url="/data/local-files/?d=")
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=photos/pets.jpg"
    points = np.array(task["predictions"][0]["result"][0]["value"]["points"])
    assert points.max() == 75  # percent
    again = Results.from_label_studio(tmp_path / "tasks.json")[0]
    np.testing.assert_array_equal(again.masks, odd_masks())
    interface = (tmp_path / "tasks.xml").read_text()
    assert '<PolygonLabels name="label"' in interface and '<Label value="noise"/>' in interface


@pytest.mark.parametrize("number", range(6))
def test_run_lengths_of_label_studio(number):
    mask = odd_masks()[number]
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), *SIZE), mask)
    with pytest.raises(InputError, match="has run lengths of 4800 pixels; its image has 4900"):
        decode_rle(encode_rle(mask), 70, 70)


def test_geojson_has_holes_parts_and_directions(results):
    features = results.to_geojson()["features"]
    assert [one["geometry"]["type"] for one in features[:2]] == ["MultiPolygon", "MultiPolygon"]
    (ring, hole), (island,) = features[0]["geometry"]["coordinates"]

    def area(points):
        (x, y), (u, v) = np.array(points[:-1]).T, np.array(points[1:]).T
        return (x * v - u * y).sum() / 2

    assert [area(one) for one in (ring, hole, island)] == [40 * 55, -30 * 40, 50] and ring[0] == ring[-1]
    placed = results.to_geojson(transform=[0.5, 0, 100, 0, -0.5, 200], crs="EPSG:32633")
    (ring, hole), (island,) = placed["features"][0]["geometry"]["coordinates"]
    assert [area(one) for one in (ring, hole, island)] == [550, -300, 12.5]  # outer rings counterclockwise
    assert np.array(ring).min(0).tolist() == [102.5, 177.5] and np.array(ring).max(0).tolist() == [130, 197.5]
    assert placed["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"


@pytest.mark.parametrize("number", range(6))
def test_parts_are_the_mask(number):
    mask, again = odd_masks()[number], np.zeros(SIZE, bool)
    for part in parts(mask):
        alone = np.zeros(SIZE, bool)
        for ring in part:
            alone ^= rle.decode(fill_polygons([ring], *SIZE))
        assert not (again & alone).any()
        again |= alone
    np.testing.assert_array_equal(again, mask)


def test_formats_are_recognised(results, tmp_path):
    for name, content, message in (
        ("a.json", "{}", "has none of the supported formats, coco, yolo"),
        ("b.json", "{", "is not a JSON file"),
        ("c.xml", "<a", "is not an XML file"),
        ("d.xml", "<a/>", "is not a file of CVAT for images 1.1"),
        ("e.txt", "", "is one label file of YOLO"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / name)
    with pytest.raises(InputError, match="There are no labels at"):
        read_labels(tmp_path / "no")
    with pytest.raises(InputError, match="There is no label format 'voc'; there are coco"):
        write_labels([], tmp_path / "x", "voc")
    (tmp_path / "e.txt").unlink()
    with pytest.raises(InputError, match="is a folder"):
        read_labels(tmp_path)
