"""Tiles: where they lie, and how pieces become one set of instances. The finder is exact: the answer is known."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from ovsam.errors import InputError
from ovsam.inference.tiling import TilePiece, Window, merge, place, segment_tiled, tiles
from ovsam.ops import rle
from ovsam.results.results import Results

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 60, 230), "yellow": (240, 220, 30)}


def blobs(mask):
    """The connected parts of a mask [h, w], as (x, y, part)."""
    parts, _ = ndimage.label(mask)
    for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        yield columns.start, rows.start, parts[rows, columns] == number


def find(image):
    """Every blob of every colour; larger ones have a higher score."""
    pixels, size = np.asarray(image), (image.height, image.width)
    found = []
    for label, colour in COLOURS.items():
        near = np.logical_and.reduce([abs(pixels[..., i] - np.int16(colour[i])) < 20 for i in range(3)])
        found += [(label, rle.encode(part, int(x), int(y), size)) for x, y, part in blobs(near)]
    names = [label for label, _ in found]
    scores = [min(0.99, 0.5 + rle.area(mask) / 1e7) for _, mask in found]
    masks, ids = [mask for _, mask in found], [list(COLOURS).index(name) for name in names]
    return Results.from_arrays(masks, names, ids, scores, scores, names, "text", model="fake", size=size)


def scene(width, height, small, seed=0):
    """Big shapes, one of them larger than any tile, and `small` ellipses, none of which touch: image and masks."""
    generator = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    truth, taken = [], np.zeros((height, width), bool)

    def add(label, points, shape):
        (x1, y1), (x2, y2) = np.min(points, 0), np.max(points, 0)
        if taken[max(0, y1 - 6) : y2 + 7, max(0, x1 - 6) : x2 + 7].any():
            return
        taken[max(0, y1 - 6) : y2 + 7, max(0, x1 - 6) : x2 + 7] = True
        own = Image.new("1", (int(x2 - x1 + 1), int(y2 - y1 + 1)))
        getattr(ImageDraw.Draw(own), shape)([(int(x - x1), int(y - y1)) for x, y in points], fill=1)
        draw.bitmap((x1, y1), own, fill=COLOURS[label])
        truth.append((label, rle.encode(np.asarray(own), int(x1), int(y1), (height, width))))

    add("blue", [(width // 8, height // 10), (width * 5 // 8, height * 6 // 10)], "ellipse")  # 2,000 x 1,500 px
    x1, x2, x3 = width * 3 // 4, width * 6 // 7, width * 7 // 8
    y1, y2, y3, y4 = (height * tenths // 10 for tenths in (1, 2, 7, 8))
    bracket = [(x1, y1), (x3, y1), (x3, y4), (x1, y4), (x1, y3), (x2, y3), (x2, y2), (x1, y2)]
    add("red", bracket, "polygon")  # its arms begin in other tiles than they meet in
    words = list(COLOURS)
    while len(truth) < small + 2:
        x, y = generator.integers(0, width - 40), generator.integers(0, height - 40)
        a, b = generator.integers(10, 40, 2)
        label = words[generator.integers(len(words))]
        add(label, [(x, y), (x + a, y + b)], "ellipse")
    return picture, truth


def test_windows_cover_the_image_and_overlap():
    for size in ((3000, 4000), (1024, 5000), (700, 700), (1025, 1024)):
        windows = tiles(size, 1024, 200)
        seen = np.zeros(size, np.uint8)
        for window in windows:
            x1, y1, x2, y2 = window
            assert x2 - x1 == min(1024, size[1]) and y2 - y1 == min(1024, size[0])
            seen[y1:y2, x1:x2] += 1
        assert seen.min() == 1 and (len(windows) == 1) == (max(size) <= 1024)
        columns = sorted({(window.x1, window.x2) for window in windows})
        assert all(left[1] - right[0] >= 200 for left, right in zip(columns, columns[1:], strict=False))
    assert len(tiles((1848, 1848), 1024, 200)) == 4  # as few as can be
    for overlap in (-1, 64, 100):
        with pytest.raises(InputError, match="must be less than the tile"):
            tiles((500, 500), 64, overlap)


@pytest.mark.slow
def test_an_image_of_300_small_and_two_huge_objects():
    picture, truth = scene(4000, 3000, 300)
    seen = []

    def ask(image):
        seen.append(image.size)
        return find(image)

    tracemalloc.start()
    found = segment_tiled(ask, picture, tile=1024, overlap=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) == 21 and max(max(size) for size in seen) == 1024 and seen[-1] == (1024, 768)
    assert peak < 100e6  # the finder's own share is 60 MB; 302 masks of 12 megapixels would be 3.6 GB

    assert found.size == (3000, 4000) and found.model == "fake"
    assert len(found) == len(truth) == 302
    overlap = rle.iou([mask for _, mask in truth], [one.segmentation for one in found])
    assert (overlap.max(1) > 0.95).all() and len(set(overlap.argmax(1))) == 302
    assert [found[i].label for i in overlap.argmax(1)] == [label for label, _ in truth]
    assert [one.id for one in found] == list(range(1, 303))
    assert sorted(found.scores, reverse=True) == found.scores.tolist()
    for one in found[:5]:
        assert one.area == one.mask.sum() and one.bbox == rle.bbox(one.segmentation)


def test_objects_of_the_overview_are_added_and_replace_their_cut_pieces():
    picture, truth = scene(1000, 760, 0)

    def ask(image):
        """Misses objects that cover nearly the whole image, as models do."""
        found = find(image)
        return found._of(one for one in found if one.area < 0.5 * image.width * image.height)

    found = segment_tiled(ask, picture, tile=256, overlap=32)
    assert sorted(found.labels) == ["blue", "red"]
    overlap = rle.iou([mask for _, mask in truth], [one.segmentation for one in found])
    assert (overlap.max(1) > 0.9).all()
    alone = segment_tiled(ask, picture, tile=256, overlap=32, whole=False)
    assert rle.iou([truth[0][1]], [one.segmentation for one in alone]).max() < 0.9  # its middle is missing


def instances(size, *things):
    """(label, score, (x1, y1, x2, y2)) -> Results"""
    masks = np.zeros((len(things), *size), bool)
    for mask, (_, _, (x1, y1, x2, y2)) in zip(masks, things, strict=True):
        mask[y1:y2, x1:x2] = True
    labels, scores = [thing[0] for thing in things], [thing[1] for thing in things]
    return Results.from_arrays(masks, labels, range(len(things)), scores, scores, labels, "text")


LEFT, RIGHT = Window(0, 0, 100, 100), Window(60, 0, 160, 100)


def pieces(left, right):
    size = (100, 160)
    return place(instances((100, 100), *left), LEFT, size) + place(instances((100, 100), *right), RIGHT, size)


def test_an_object_cut_by_a_seam_is_joined_under_the_better_name():
    (one,) = merge(pieces([("dog", 0.6, (20, 10, 100, 30))], [("dog", 0.8, (0, 10, 90, 30))]))
    assert one.bbox == (20, 10, 130, 20) and (one.label, one.score, one.id) == ("dog", 0.8, 1)
    # A whole object is kept instead of a part of it, even one of higher score.
    (one,) = merge(pieces([("dog", 0.6, (20, 10, 95, 30))], [("cat", 0.8, (0, 10, 35, 30))]))
    assert one.bbox == (20, 10, 75, 20) and (one.label, one.score) == ("dog", 0.6)


def test_suppression_per_word():
    two = pieces([("dog", 0.6, (20, 10, 95, 30))], [("cat", 0.8, (0, 10, 35, 30))])
    assert [(one.label, one.bbox[2]) for one in merge(two, per_word=True)] == [("cat", 35), ("dog", 75)]
    same = pieces([("dog", 0.6, (70, 10, 90, 30))], [("cat", 0.8, (10, 10, 30, 30))])
    assert [one.label for one in merge(same)] == ["cat"] and len(merge(same, per_word=True)) == 2


def test_neighbours_in_the_strip_stay_two():
    found = merge(pieces([("dog", 0.6, (62, 10, 78, 30))], [("dog", 0.8, (20, 10, 40, 30))]))
    assert [one.bbox[0] for one in found] == [80, 62]
    # Two tiles with different halves of a strip have different instances.
    found = merge(pieces([("dog", 0.6, (10, 10, 100, 30))], [("dog", 0.8, (0, 40, 90, 60))]))
    assert len(found) == 2


def test_a_part_is_merged_only_with_an_object_of_the_same_word():
    whole = ("dog", 0.6, (60, 10, 98, 60))
    assert len(merge(pieces([whole], [("dog", 0.9, (2, 12, 20, 30))]))) == 1
    assert len(merge(pieces([whole], [("eye", 0.9, (2, 12, 20, 30))]))) == 2


def test_pieces_of_one_window_are_joined_only_through_another():
    left = [("dog", 0.6, (20, 10, 100, 30)), ("dog", 0.7, (20, 60, 100, 80))]
    assert len(merge(pieces(left, []))) == 2
    right = [("dog", 0.8, (0, 10, 40, 30)), ("dog", 0.9, (0, 60, 40, 80))]
    assert len(merge(pieces(left, right))) == 2
    size = (100, 160)
    bracket = np.zeros((100, 100), bool)  # the shape of which the arms are parts
    bracket[10:30, :60], bracket[60:80, :60], bracket[10:80, 50:60] = True, True, True
    joint = Results.from_arrays(bracket[None], ["dog"], [0], [0.9], [0.9], ["dog"], "text")
    (one,) = merge(place(instances((100, 100), *left), LEFT, size) + place(joint, RIGHT, size))
    assert one.area == 2 * 20 * 100 + 10 * 30 and one.bbox == (20, 10, 100, 70)


def test_an_overview_adds_new_objects_only():
    size = (100, 160)
    small = pieces([("dog", 0.6, (20, 10, 95, 30))], [])
    known = instances(size, ("dog", 0.9, (20, 10, 95, 30)))
    assert [one.score for one in merge(small, known)] == [0.6]  # the tile's mask is finer
    crowd = instances(size, ("dog", 0.9, (20, 10, 95, 31)))
    two = pieces([("dog", 0.6, (20, 10, 58, 30)), ("dog", 0.5, (58, 10, 95, 30))], [])
    assert [one.score for one in merge(two, crowd)] == [0.6, 0.5]  # one blob for two objects
    large = instances(size, ("dog", 0.9, (0, 0, 160, 100)))
    found = merge(pieces([("dog", 0.6, (20, 10, 100, 90)), ("dog", 0.7, (5, 5, 15, 15))], []), large)
    assert [(one.score, one.bbox[2]) for one in found] == [(0.9, 160), (0.7, 10)]


def test_no_piece_and_one_window():
    assert merge([]) == [] and merge([], instances((9, 9), ("dog", 0.5, (0, 0, 9, 9))))[0].id == 1
    grey = Image.new("RGB", (300, 200))
    empty = segment_tiled(find, grey, tile=128, overlap=32)
    assert len(empty) == 0 and empty.size == (200, 300)
    once = []
    segment_tiled(lambda image: once.append(image.size) or find(image), grey, tile=300, overlap=32)
    assert once == [(300, 200)]


def test_pieces_are_in_coordinates_of_the_image():
    (piece,) = place(instances((100, 100), ("dog", 0.5, (5, 6, 20, 30))), RIGHT, (100, 160))
    assert isinstance(piece, TilePiece) and piece.window == RIGHT
    assert piece.instance.box == (65, 6, 80, 30) and piece.instance.segmentation["size"] == [100, 160]
    expected = np.zeros((100, 160), bool)
    expected[6:30, 65:80] = True
    np.testing.assert_array_equal(piece.instance.mask, expected)
