"""Label files, each read back to the masks that it was made of."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ovsam.errors import InputError
from ovsam.results.label_formats import (
    cutouts,
    outlines,
    to_labelme,
    to_polygon,
    to_yolo,
    write_id_map,
    write_labelme,
    write_yolo,
)
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
        "data.yaml", "labels/none.txt", "labels/pets.txt", "scores/none.txt", "scores/pets.txt",
    ]  # fmt: skip
    lines = (tmp_path / "labels/pets.txt").read_text().splitlines()
    assert [NAMES[int(line.split()[0])] for line in lines] == results.labels
    for line, mask in zip(lines, odd_masks(), strict=True):
        corners = np.array(line.split()[1:], float).reshape(-1, 2)
        assert corners.min() >= 0 and corners.max() <= 1
        np.testing.assert_array_equal(fill(corners * SIZE[::-1], even_odd=False), mask)
    assert (tmp_path / "labels/none.txt").read_text() == ""
    assert (tmp_path / "scores/pets.txt").read_text().split() == [f"{score:.4f}" for score in results.scores]
    assert (tmp_path / "data.yaml").read_text().splitlines()[-5:] == [
        '  0: "dot"', '  1: "ring"', '  2: "two"', '  3: "noise"', '  4: "all"',
    ]  # fmt: skip
    assert to_yolo(results).split("\n")[0].startswith("4 ")  # without names, the label_id
    with pytest.raises(InputError, match="'ring' is not among the 1 labels"):
        to_yolo(results, ["dot"])


def test_label_files_have_names_of_their_own(results, tmp_path):
    with pytest.raises(InputError, match="2 pictures are called 'pets'"):
        write_yolo([results, Results([], SIZE, "", "other/pets.png")], tmp_path, NAMES)
    with pytest.raises(InputError, match="without a file_name"):
        write_labelme([Results([], SIZE)], tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        write_labelme([results], tmp_path / "no")


@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_labelme_is_read_back(results, tmp_path, shape):
    write_labelme([results], tmp_path, shape)
    record = json.loads((tmp_path / "pets.json").read_text())
    assert record["imageData"] is None and record["imagePath"] == "photos/pets.jpg"
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
    with pytest.raises(InputError, match="'polygon' or 'mask', not 'box'"):
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
