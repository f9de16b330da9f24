"""Every reader on a miniature set in its format's layout (tests/data/readers), and every error."""

import io
import json
import re
import shutil
import tomllib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from testers.reader import OBJECTS, SIZE, ReaderTester
from transformers import Sam2ImageProcessor

from ovsam.data import READERS, Coco, HuggingFace, Mixture, merge_words, open_data, outlined, reader_keys
from ovsam.data.folders import wordnet
from ovsam.data.pictures import read_header
from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.words import Word
from ovsam.errors import InputError
from ovsam.ops.outlines import _run_lengths, check_outline
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats import write_coco
from ovsam.results.results import Results

SETS = Path(__file__).parents[1] / "data" / "readers"
COCO = {
    "format": "coco",
    "annotations": SETS / "coco/annotations/instances_val2017.json",
    "images": SETS / "coco/val2017",
}
LVIS = {"format": "lvis", "annotations": SETS / "lvis/lvis_v1_val.json", "images": SETS / "coco"}
UNTURNED = {  # how a camera stores an image of each EXIF orientation, the inverse of rotating it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def names(data, sample):
    return [data.words[i].name if i >= 0 else None for i in sample["word_ids"].tolist()]


def known(data, sample):
    return {word.name for word, is_known in zip(data.words, sample["known"].tolist(), strict=True) if is_known}


def box_mask(size, left, top, right, bottom):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def alike(mask, left, top, right, bottom):
    """Whether a mask is this box but for its corners, which resampling rounds."""
    wrong = (mask ^ box_mask(mask.shape[0], left, top, right, bottom)).nonzero().tolist()
    return all([row, column] in [[y, x] for y in (top, bottom - 1) for x in (left, right - 1)] for row, column in wrong)


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def white_on_black(width, height, *boxes):
    picture = Image.new("RGB", (width, height))
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return picture


def small_coco(folder, change=None, pictures=1, box=(12, 6, 30, 26), **picture):
    """A COCO set of 48x32 images with one object each; `change` edits the json."""
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "pen"}]}
    for number in range(1, pictures + 1):
        white_on_black(48, 32, box).save(folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 32} | picture)
        outline = {"id": number, "image_id": number, "category_id": 7, "iscrowd": 0, "segmentation": [rectangle(*box)]}
        content["annotations"].append(outline)
    if change:
        change(content)
    (folder / "coco.json").write_text(json.dumps(content))
    return {"format": "coco", "annotations": folder / "coco.json", "size": 32}


class TestCoco(ReaderTester):
    config, needs = COCO, ("annotations",)
    pictures, instances, words = 3, 5, ["person", "dog", "bottle"]


class TestLvis(ReaderTester):
    config, needs = LVIS, ("annotations",)
    pictures, instances = 3, 5


class TestSa1b(ReaderTester):
    config, needs = {"format": "sa1b", "folder": SETS / "sa1b"}, ("folder",)
    pictures, instances, words = 2, 4, []


class TestFolders(ReaderTester):
    config, needs = {"format": "folders", "folder": SETS / "imagenet/train"}, ("folder",)
    pictures, instances = 4, 4
    words = ["tench", "crane", "crane (2)"]  # the bird, and the machine


class TestHuggingFace(ReaderTester):
    config, needs = {"format": "huggingface", "dataset": str(SETS / "huggingface/detection")}, ("dataset",)
    pictures, instances, words = 2, 3, ["coverall", "face shield", "gloves"]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def cache(cls, tmp_path_factory):
        cls.config = cls.config | {"cache_dir": str(tmp_path_factory.mktemp("cache"))}


class TestEmojiScenes(ReaderTester):
    config = {"length": 3, "seed": 5, "min_objects": 2, "max_objects": OBJECTS, "min_size": 20, "max_size": 40}
    pictures, instances = 3, None

    @classmethod
    def open(cls, **more):
        return open_data(cls.config | {"canvas": SIZE} | more)  # which is the size, and as many objects as are drawn


class TestMixture(ReaderTester):
    config = {"format": "mixture", "length": 9, "sets": [COCO | {"share": 1}, LVIS | {"share": 2}]}
    needs, pictures, instances = ("sets",), 6, 10


# COCO


def test_coco_values():
    data = open_data(COCO | {"size": 64, "max_objects": 4})
    first, second, third = data
    # 96x64 squashed to 64x64: x is two thirds.
    assert names(data, first) == ["person", "dog", None, None]
    assert torch.equal(first["masks"][0], box_mask(64, 8, 8, 32, 40))
    assert torch.equal(first["masks"][1], box_mask(64, 40, 16, 60, 56))
    assert not first["masks"][2:].any()
    # An outline in two parts, and a compressed mask that overlaps it.
    assert names(data, second) == ["bottle", "dog", None, None]
    assert torch.equal(second["masks"][0], box_mask(64, 8, 8, 24, 40) | box_mask(64, 36, 8, 56, 40))
    assert torch.equal(second["masks"][1], box_mask(64, 20, 30, 44, 50))
    assert (second["masks"][0] & second["masks"][1]).sum() == 120
    # The crowd is not an object; persons are not annotated exhaustively in its image.
    assert names(data, third) == ["bottle", None, None, None]
    assert third["masks"][0].sum() == pytest.approx(np.pi * 16 * 24 * 64 / 96, rel=0.02)
    assert known(data, first) == {"person", "dog", "bottle"} and known(data, third) == {"dog", "bottle"}


def test_coco_counts_skipped_annotations():
    data = open_data(COCO)
    assert data.describe().splitlines() == [
        "coco: 3 images, 5 instances of 3 words",
        "  Annotations of crowds (iscrowd), which are not objects: 1.",
        "  Images without objects, skipped (keep_empty = true keeps them): 1.",
    ]
    with_empty = open_data(COCO | {"keep_empty": True})
    assert (with_empty.pictures, with_empty.instances) == (4, 5)
    assert not with_empty[3]["masks"].any() and known(with_empty, with_empty[3]) == {"person", "dog", "bottle"}


def test_a_word_held_out_is_in_no_sample_and_never_known():
    data = open_data(COCO | {"novel": ["dog"]})
    assert [word.split for word in data.words] == ["base", "novel", "base"]
    assert data.instances == 3 and "Annotations of held-out classes, skipped: 2." in data.describe()
    for sample in data:
        assert "dog" not in names(data, sample) and "dog" not in known(data, sample)
    with pytest.raises(InputError, match="novel has 'cow'"):
        open_data(COCO | {"novel": ["cow"]})


def test_coco_reads_back_our_own_json(tmp_path):
    masks = np.zeros((2, 32, 48), bool)
    masks[0, 4:20, 6:30], masks[1, 10:30, 33:45] = True, True
    path = tmp_path / "in" / "found.png"
    path.parent.mkdir()
    white_on_black(48, 32, (6, 4, 30, 20)).save(path)
    found = Results.from_arrays(
        masks, ["cup", "pen"], [0, 1], [0.9, 0.8], [0.9, 0.8], ["cup", "pen"], "text", file_name=str(path)
    )
    write_coco([found], tmp_path / "found.json", labels=["cup", "pen", "ant"])
    data = open_data({"format": "coco", "annotations": tmp_path / "found.json", "size": 96, "max_objects": 2})
    assert [word.name for word in data.words] == ["cup", "pen", "ant"]
    assert alike(data[0]["masks"][0], 12, 12, 60, 60) and alike(data[0]["masks"][1], 66, 30, 90, 90)
    # Another folder of the same images, with other paths in the json.
    moved = tmp_path / "moved"
    moved.mkdir()
    path.rename(moved / path.name)
    assert Coco(tmp_path / "found.json", images=moved).pictures == 1


def test_boxes_without_outlines_are_left_out_and_their_word_is_unknown(tmp_path):
    def add_box(content):
        content["annotations"].append({"id": 9, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]})

    data = open_data(small_coco(tmp_path, add_box))
    assert known(data, data[0]) == {"cup"}
    assert "Annotations with a box but no outline (segmentation), skipped: 1." in data.notes

    def only_boxes(content):
        content["annotations"] = [{"id": 9, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5], "segmentation": []}]

    with pytest.raises(InputError, match="no instances to train on. Annotations with a box but no outline .*: 1"):
        open_data(small_coco(tmp_path, only_boxes))


def test_categories_of_one_name_are_one_word(tmp_path):
    def change(content):
        content["categories"].append({"id": 8, "name": "cup "})
        content["annotations"][1]["category_id"] = 8

    data = open_data(small_coco(tmp_path, change, pictures=2))
    assert [word.name for word in data.words] == ["cup", "pen"]
    assert data[0]["word_ids"][0] == data[1]["word_ids"][0] == 0
    assert data.notes == ["Categories called 'cup', read as one class: 2."]


def edit(table, **values):
    return lambda content: content[table][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].clear(), "has no instances to train on"),
        (edit("categories", name=" "), r"categories\[0\].name of .* is empty"),
        (lambda c: c["categories"][1].pop("name"), r"categories\[1\] of .* lacks name"),
        (edit("categories", id=3), r"categories\[1\].id of .* is 3, as that of another category"),
        (edit("annotations", category_id=5), r"annotations\[0\].category_id of .* is 5, which is missing"),
        (edit("annotations", image_id=None), r"annotations\[0\].image_id of .* is null; it must be"),
        (
            lambda c: c["images"].append(c["images"][0] | {"file_name": "2.png"}),
            r"images\[\d\].id of .* is 1, as that of another image",
        ),
        (lambda c: c["images"][0].pop("id"), r"images\[0\] of .* lacks id"),
        (lambda c: c["images"][0].pop("file_name"), r"images\[0\] of .* has no file_name"),
        (
            edit("annotations", segmentation=[rectangle(0, 0, 60, 10)]),
            r"annotations\[0\].segmentation of .*1\.png\) lies outside .* 48x32",
        ),
        (edit("annotations", segmentation=[rectangle(0, -9, 40, 10)]), "lies outside its image: .* y -9 to 10"),
        (edit("annotations", segmentation=[[0, 0, float("nan"), 5, 9, 9]]), "lies outside its image"),
        (edit("annotations", segmentation=[[0, 0, 9, 0, 9, 9, 9]]), "not a list of numbers x, y, x, y"),
        (edit("annotations", segmentation=[["a"] * 6]), r"annotations\[0\].segmentation\[0\].* is a string"),
        (edit("annotations", segmentation={"size": [48, 32], "counts": [1536]}), r"size \[48, 32\].* \[32, 48\]"),
        (edit("annotations", segmentation={"size": [32, 48], "counts": [3, 40]}), "do not add up to .* 1536 pixels"),
        (edit("annotations", segmentation={"size": [32, 48], "counts": "X1"}), "do not add up to"),
        (
            edit("annotations", segmentation={"size": [32, 48], "counts": "~~"}),
            "run lengths that are not in COCO's format",
        ),
        (edit("annotations", segmentation="1.png"), r"annotations\[0\].segmentation of .* is a string; it must be"),
    ],
)
def test_invalid_coco_annotations_raise_an_error(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        open_data(small_coco(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1, "category_id": 1, "score": 0.5}], "looks like COCO's results"),
        ([{"data": {}, "annotations": []}], "Label Studio"),
        ([{"image": "a.jpg", "annotations": []}], "Create ML"),
        ({"shapes": [], "imagePath": "a.jpg"}, "LabelMe"),
        ({"_via_img_metadata": {}}, "VGG Image Annotator"),
        ({"image": {}, "annotations": []}, 'SA-1B; read its folder with format = "sa1b"'),
        ({"images": [], "annotations": [{"caption": "a cat"}]}, "captions"),
        ({"images": [], "annotations": [{"segments_info": []}], "categories": []}, "panoptic"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ([], "has an unknown format"),
        ("text", "has an unknown format"),
        (LVIS["annotations"], 'looks like LVIS; read it with format = "lvis"'),
    ],
)
def test_the_error_about_a_json_of_another_format_names_the_format(tmp_path, content, message):
    path = content if isinstance(content, Path) else tmp_path / "other.json"
    if path is not content:
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="must be a JSON file of COCO's instances .*" + message):
        open_data({"format": "coco", "annotations": path, "images": tmp_path})


def test_a_missing_file_and_other_content_raise_an_error(tmp_path):
    with pytest.raises(InputError, match="no JSON file of annotations at .*nowhere.json"):
        open_data({"format": "coco", "annotations": tmp_path / "nowhere.json"})
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(InputError, match="cut.json is not a JSON file"):
        open_data({"format": "coco", "annotations": tmp_path / "cut.json"})
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        open_data(COCO | {"images": tmp_path / "nowhere"})


# Pictures


def test_images_that_cannot_be_read_are_listed_before_training(tmp_path):
    config = small_coco(tmp_path, pictures=6)
    white_on_black(48, 32).save(tmp_path / "whole.jpg")
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "4.png").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])  # cut short: only decoding shows it
    white_on_black(32, 32).save(tmp_path / "5.png")
    data = open_data(config)
    assert data.pictures == data.instances == 1
    reasons = ("does not exist", "is empty", "is not an image", "cannot be read", "is 32x32 pixels, .* for 48x32")
    for number, reason in enumerate(reasons, start=1):
        with pytest.raises(AssertionError, match=rf"{number}\.png .*{reason}"):
            raise AssertionError(data.skipped[number - 1])
    assert "Images skipped: 5" in data.describe()
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match="None of the 6 images .* the first: .*1.png does not exist"):
        open_data(config)


def test_an_image_found_damaged_in_training_is_replaced_by_the_next(tmp_path, caplog):
    config = small_coco(tmp_path, pictures=3) | {"check": False}
    (tmp_path / "2.png").write_bytes(b"")
    data = open_data(config)
    assert data.pictures == 3  # nothing was opened
    assert torch.equal(data[1]["image"], data[2]["image"])
    assert "2.png is empty (0 bytes); it must be an image. The next image replaces it." in caplog.text
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="8 images in a row cannot be read; the last: .* is empty"):
        data[0]


def test_a_size_that_the_json_lacks_is_that_of_the_image(tmp_path):
    data = open_data(small_coco(tmp_path, edit("images", width=0, height=None)) | {"check": False})
    assert torch.equal(data[0]["masks"][0], box_mask(32, 8, 6, 20, 26))


@pytest.mark.parametrize("orientation", UNTURNED)
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_outlines_are_rotated_only_if_they_refer_to_the_stored_pixels(tmp_path, orientation, annotated):
    """The width and height in the json decide; if both are the same, outlines refer to the upright image."""
    sideways = orientation >= 5
    upright = white_on_black(48, 32, (12, 6, 30, 26))
    stored = upright.transpose(UNTURNED[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "1.jpg", quality=95, exif=exif)
    of = stored if annotated == "stored" and sideways else upright
    columns, rows = np.asarray(of)[..., 0].any(0).nonzero()[0], np.asarray(of)[..., 0].any(1).nonzero()[0]
    box = [int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
    picture = {"file_name": "1.jpg", "width": of.width, "height": of.height}
    for check in (True, False):
        data = open_data(small_coco(tmp_path, None, box=box, **picture) | {"check": check, "size": 96})
        assert data.skipped == []
        mask, bright = data[0]["masks"][0], data[0]["image"].float().mean(0) > 127
        assert alike(mask, 24, 18, 60, 78)
        assert (mask ^ bright).sum() < 60  # JPEG's own edges


def test_size_and_orientation_are_read_from_the_header(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    white_on_black(48, 32).save(tmp_path / "a.jpg", exif=exif)
    header = read_header(str(tmp_path / "a.jpg"))
    assert (header.width, header.height, header.orientation, header.upright) == (48, 32, 6, (32, 48))


def test_images_are_resized_as_by_the_processor():
    data = open_data(COCO | {"size": 80})
    side = {"height": 80, "width": 80}
    processor = Sam2ImageProcessor(size=side, mask_size=side, do_normalize=False, do_rescale=False)
    with Image.open(COCO["images"] / "000000000139.jpg") as picture:
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(data[0]["image"], expected)


def test_an_object_thinner_than_a_pixel_keeps_the_pixels_it_covers_most(tmp_path):
    data = open_data(small_coco(tmp_path, box=(0, 8, 48, 9)) | {"size": 8})
    assert torch.equal(data[0]["masks"][0], box_mask(8, 0, 2, 8, 3))


def test_a_polygon_may_reach_two_pixels_over_the_edge():
    check_outline([rectangle(-2, -2, 50, 34)], 32, 48)
    with pytest.raises(InputError):
        check_outline([rectangle(-2.1, 0, 40, 30)], 32, 48)


def test_compressed_run_lengths_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        mask = np.asfortranarray(rng.random((57, 83)) < density, dtype=np.uint8)
        lengths = _run_lengths(coco_mask.encode(mask)["counts"])
        assert lengths.sum() == mask.size and lengths[1::2].sum() == mask.sum()
        assert np.array_equal(np.repeat(np.arange(len(lengths)) % 2, lengths), mask.ravel(order="F"))


def test_crops_and_mirrors_move_masks_with_their_images(tmp_path):
    data = open_data(small_coco(tmp_path) | {"size": 96, "crop": 0.2, "flip": True, "draws": 40, "max_objects": 1})
    assert len(data) == 40
    areas, centres = set(), []
    for sample in data:
        mask, bright = sample["masks"][0], sample["image"][0] > 127
        assert mask.any() and (mask ^ bright).sum() <= 0.02 * mask.numel()
        areas.add(int(mask.sum()))
        centres.append(float(mask.float().mean(0) @ torch.arange(96.0) / mask.float().mean()))
    assert len(areas) > 20 and min(centres) < 30 * 96 and max(centres) > 60 * 96
    again = open_data(small_coco(tmp_path) | {"size": 96, "crop": 0.2, "flip": True, "draws": 40, "max_objects": 1})
    assert all(torch.equal(data[i][name], again[i][name]) for i in (0, 17, 39) for name in data[0])
    other = open_data(small_coco(tmp_path) | {"size": 96, "crop": 0.2, "flip": True, "draws": 40, "seed": 1})
    assert not all(torch.equal(data[i]["image"], other[i]["image"]) for i in range(5))
    with pytest.raises(IndexError):
        data[40]


def test_a_sample_has_some_of_too_many_objects_and_the_words_of_the_others_are_unknown(tmp_path):
    def many(content):
        for number in range(2, 9):
            outline = [rectangle(5 * number, 2, 5 * number + 4, 30)]
            thing = {"id": number, "image_id": 1, "category_id": 3, "segmentation": outline}
            content["annotations"].append(thing)

    data = open_data(small_coco(tmp_path, many) | {"max_objects": 3, "draws": 30})
    shown = [names(data, sample) for sample in data]
    assert {tuple(row) for row in shown} == {("cup", "pen", "pen"), ("pen", "pen", "pen")}
    for row, sample in zip(shown, data, strict=True):
        assert known(data, sample) == ({"cup"} if "cup" in row else set())
        assert sample["masks"].flatten(1).any(1).all()
    assert (
        torch.stack([sample["masks"].any(0) for sample in data]).any(0).sum()
        == torch.stack([sample["masks"].any(0) for sample in open_data(small_coco(tmp_path, many))]).any(0).sum()
    )


# LVIS


def test_lvis_values_and_known_words():
    data = open_data(LVIS | {"size": 64, "max_objects": 2})
    aerosol, bow, dog, speaker, monitor = (word.name for word in data.words)
    assert (aerosol, bow, dog) == ("aerosol can", "bow (weapon)", "dog")
    assert data.words[0].keywords == ("spray can",) and data.words[2].keywords == ()
    labels = Vocabulary("lvis").labels
    assert {aerosol, bow, dog, speaker, monitor} <= set(labels)  # two slips of the file mended as there
    first, second, third = data
    assert names(data, first) == [aerosol, dog] and names(data, second) == [bow, dog]
    assert torch.equal(first["masks"][1], box_mask(64, 40, 16, 60, 56))
    assert known(data, first) == {aerosol, speaker}  # dogs are not outlined exhaustively
    assert known(data, second) == {bow, dog, aerosol, monitor}
    assert known(data, third) == {dog}


def test_lvis_finds_coco_images_in_either_folder():
    assert open_data(LVIS | {"images": SETS / "coco/val2017"}).pictures == 3


def test_lvis_holds_out_rare_words():
    data = open_data(LVIS | {"rare_is_novel": True})
    assert [word.name for word in data.words if word.split == "novel"] == ["bow (weapon)"]
    assert names(data, data[1])[:2] == ["dog", None] and "bow (weapon)" not in known(data, data[1])


def test_a_coco_json_as_lvis_raises_an_error():
    with pytest.raises(InputError, match='JSON file of LVIS v1 .* looks like COCO; read it with format = "coco"'):
        open_data(COCO | {"format": "lvis"})


# SA-1B


def test_sa1b_values():
    data = open_data({"format": "sa1b", "folder": SETS / "sa1b", "size": 64, "max_objects": 4})
    first = data[0]
    assert first["word_ids"].tolist() == [-1] * 4 and first["known"].shape == (0,)
    assert torch.equal(first["masks"][2], box_mask(64, 12, 16, 20, 24))
    assert outlined(first["masks"]).tolist() == [True, True, True, False]


def test_sa1b_skips_incomplete_pairs_and_raises_an_error_for_masks_of_another_size(tmp_path):
    folder = shutil.copytree(SETS / "sa1b", tmp_path / "sa1b")
    (folder / "sa_2.jpg").unlink()
    (folder / "sa_3.json").write_text('{"image": ')
    data = open_data({"format": "sa1b", "folder": folder})
    assert (data.pictures, data.instances) == (1, 3)
    assert ["sa_3.json is not" in data.skipped[0], "sa_2.jpg does not" in data.skipped[1]] == [True, True]
    content = json.loads((folder / "sa_1.json").read_text())
    content["annotations"][1]["segmentation"]["size"] = [96, 64]
    (folder / "sa_1.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"annotations\[1\].segmentation.size of .*sa_1.json is \[96, 64\]; .* \[64, 96\]"
    ):
        open_data({"format": "sa1b", "folder": folder})
    (folder / "sa_1.json").write_text("[]")
    with pytest.raises(InputError, match="sa_1.json is not a JSON file of SA-1B"):
        open_data({"format": "sa1b", "folder": folder})
    with pytest.raises(InputError, match="There is no sa_.*json in"):
        open_data({"format": "sa1b", "folder": SETS / "coco"})
    with pytest.raises(InputError, match="There is no folder"):
        open_data({"format": "sa1b", "folder": tmp_path / "nowhere"})


# A folder per class


def test_imagenet_values():
    data = open_data({"format": "folders", "folder": SETS / "imagenet/train", "size": 32, "max_objects": 2})
    assert [word.keywords for word in data.words] == [("Tinca tinca",), (), ("crane",)]
    sample = data[2]
    assert sample["word_ids"].tolist() == [1, -1]
    assert sample["masks"][0].all() and not outlined(sample["masks"]).any()  # named, and without an outline
    assert sample["known"].all()
    data = open_data({"format": "folders", "folder": SETS / "imagenet/train", "exhaustive": False})
    assert data[2]["known"].tolist() == [False, True, False]


def test_names_of_imagenet_21k_are_those_of_the_vocabulary():
    table = wordnet()
    labels = Vocabulary("imagenet21k").labels
    assert len(labels) == len(set(labels)) == 21841 and set(labels) <= {name for name, _ in table.values()}
    assert table["n04399382"][0] == "teddy"  # of ImageNet-1k, and not in the longer list


def test_folders_of_other_names(tmp_path):
    for name in ("red_cup", "b", "empty"):
        (tmp_path / "set" / name).mkdir(parents=True)
    white_on_black(20, 20).save(tmp_path / "set/red_cup/1.PNG")
    white_on_black(20, 20).save(tmp_path / "set/b/1.jpg")
    (tmp_path / "set/b/2.jpg").write_bytes(b"")
    config = {"format": "folders", "folder": tmp_path / "set"}
    data = open_data(config | {"names": {"b": "blue box"}})
    assert [word.name for word in data.words] == ["blue box", "red cup"] and data.pictures == 2
    assert data.notes == ["Folders without images, skipped: 1."] and "2.jpg is empty" in data.skipped[0]
    with pytest.raises(InputError, match="`names` has a folder 'c' that is missing in"):
        open_data(config | {"names": {"c": "cup"}})
    with pytest.raises(InputError, match="Did you mean .*/train"):
        open_data({"format": "folders", "folder": SETS / "imagenet"})
    (tmp_path / "set/b").rename(tmp_path / "set/n99999999")
    with pytest.raises(InputError, match="n99999999 looks like a WordNet id"):
        open_data(config)


# Hugging Face


@pytest.fixture
def hub(tmp_path):
    """The keys that open one of the miniature sets as a repository of the Hub would be."""
    return lambda name: {
        "format": "huggingface",
        "dataset": str(SETS / "huggingface" / name),
        "cache_dir": str(tmp_path / "cache"),
        "size": 64,
        "max_objects": 3,
    }


def test_huggingface_polygons(hub):
    data = open_data(hub("detection"))
    first, second = data
    assert names(data, first) == ["gloves", "coverall", None] and names(data, second)[0] == "face shield"
    assert torch.equal(first["masks"][1], box_mask(64, 40, 16, 60, 56))
    assert torch.equal(second["masks"][0], box_mask(64, 8, 8, 40, 40))
    assert known(data, first) == {"face shield", "gloves"}  # one coverall has a box alone
    assert len(data.notes) == 2
    assert open_data(hub("detection") | {"keep_empty": True}).pictures == 3
    held_out = open_data(hub("detection") | {"novel": ["gloves"], "check": False})
    assert held_out.instances == 2 and names(held_out, held_out[0]) == ["coverall", None, None]


def test_huggingface_mask_images_and_names_as_text(hub):
    data = open_data(hub("masks"))
    assert [word.name for word in data.words] == ["red box", "yellow box"]
    assert torch.equal(data[0]["masks"][0], box_mask(64, 8, 8, 32, 40))


def test_huggingface_map_of_classes(hub):
    with pytest.raises(InputError, match="numbers without names; list the names, in order, as `names`"):
        open_data(hub("semantic"))
    data = open_data(hub("semantic") | {"names": ["", "sky", "sea", "boat"]})
    assert [word.name for word in data.words] == ["sky", "sea", "boat"] and data.instances is None
    assert names(data, data[0]) == ["sky", "boat", None] and data[0]["known"].all()
    assert torch.equal(data[0]["masks"][0], box_mask(64, 0, 0, 64, 32))
    assert torch.equal(data[0]["masks"][1], box_mask(64, 20, 40, 40, 64))


def test_huggingface_classes(hub):
    data = open_data(hub("classes"))
    assert [names(data, sample)[0] for sample in data] == ["dog", "cat"]
    assert data[0]["masks"][0].all()


def as_png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_rows(objects, category=None, picture=None, **columns):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {"category": datasets.List(category or datasets.Value("string"))} | columns,
        }
    )
    picture = {"bytes": b"", "path": None} if picture == "damaged" else as_png(white_on_black(48, 32))
    return datasets.Dataset.from_list([{"image": picture, "objects": objects}], features=features)


POLYGONS = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))


def test_invalid_rows_of_huggingface_raise_an_error(tmp_path):
    inside, outside = [[rectangle(2, 2, 9, 9)]], [[rectangle(2, 2, 90, 9)]]
    good = make_rows({"category": ["cup"], "segmentation": inside}, segmentation=POLYGONS)
    assert HuggingFace(good).pictures == 1

    def refused(rows, **keys):
        with pytest.raises(InputError) as caught:
            HuggingFace(rows, **keys)
        return str(caught.value)

    assert "have no outlines" in refused(make_rows({"category": ["cup"]}))
    assert "lies outside" in refused(make_rows({"category": ["cup"], "segmentation": outside}, segmentation=POLYGONS))
    assert "no instance" in refused(make_rows({"category": [], "segmentation": []}, segmentation=POLYGONS))
    assert "no instance" in refused(make_rows({"category": ["cup"], "segmentation": [[]]}, segmentation=POLYGONS))
    assert "has no name" in refused(make_rows({"category": [" "], "segmentation": inside}, segmentation=POLYGONS))
    damaged = make_rows({"category": ["cup"], "segmentation": inside}, picture="damaged", segmentation=POLYGONS)
    assert "is not an image in a supported format" in refused(damaged)
    numbers = make_rows({"category": [5], "segmentation": inside}, datasets.Value("int64"), segmentation=POLYGONS)
    assert "numbers without names" in refused(numbers)
    assert "of the class 5, which has no name" in refused(numbers, names=["cup"])
    assert "no column of images" in refused(good.remove_columns("image"))
    assert "must have objects" in refused(good.remove_columns("objects"))
    wrong = [as_png(Image.new("L", (20, 20), 255))]
    masks = make_rows({"category": ["cup"], "mask": wrong}, mask=datasets.List(datasets.Image()))
    assert "size [20, 20]" in refused(masks)
    assert "cannot be opened" in refused(str(tmp_path / "nowhere"))


# EmojiScenes, mixtures, recipes


SCENES = {"canvas": 64, "min_objects": 2, "max_objects": 3, "min_size": 20, "max_size": 40}


def test_emojiscenes_are_their_scenes():
    data = open_data({"length": 3, "seed": 5} | SCENES)
    scene = draw_scene(5, 2, data.word_ids, SceneConfig(**SCENES))
    sample = data[2]
    assert np.array_equal(sample["image"].permute(1, 2, 0), np.asarray(scene.image))
    for number, word in enumerate(scene.word_ids):
        assert np.array_equal(sample["masks"][number], scene.index_map == number + 1)
        assert sample["word_ids"][number] == word
    assert sample["known"].all()


def test_a_mixture_has_the_shares_words_and_known_words_of_its_sets():
    coco = {key: str(value) for key, value in COCO.items()} | {"share": 3}
    sets = [coco, {"format": "emojiscenes", "share": 1} | SCENES, {"format": "sa1b", "folder": str(SETS / "sa1b")}]
    config = {"format": "mixture", "size": 64, "max_objects": 5, "seed": 3, "length": 400, "sets": sets}
    config["sets"][1].pop("canvas")
    data = open_data(config)
    assert len(data) == 400 and data.max_objects == 5
    counts = np.bincount(data.which) / 400
    assert np.abs(counts - [0.6, 0.2, 0.2]).max() < 0.06
    word = {w.name: i for i, w in enumerate(data.words)}
    assert len(word) == len(data.words) and list(word)[:3] == ["person", "dog", "bottle"]
    kinds = set()
    for index in range(9):
        sample = data[index]
        kinds.add(int(data.which[index]))
        known_here = int(sample["known"].sum())
        if data.which[index] == 0:  # words of COCO are known, pictograms are not
            assert known_here in (2, 3) and sample["known"][:3].sum() == known_here
        elif data.which[index] == 1:
            scenes = data.sets[1].data
            shown = {scenes.words[i].name for i in scenes[int(data.orders[1][data.rank[index]])]["word_ids"] if i >= 0}
            assert set(names(data, sample)) - {None} == shown and known_here == len(scenes.words)
        else:
            assert known_here == 0 and set(names(data, sample)) == {None}
    assert kinds == {0, 1, 2}
    assert "60% of the samples: coco: 3 images" in data.describe()


def test_a_mixture_goes_through_each_set_before_it_repeats():
    sets = [open_data(COCO), open_data(LVIS)]
    data = Mixture(sets, [1, 1], length=24)
    for number in (0, 1):
        seen = [int(data.orders[number][rank % 3]) for rank in data.rank[data.which == number]]
        assert sorted(seen[:3]) == sorted(seen[3:6]) == [0, 1, 2]
    assert data.instances == 10 and sum(word.name == "dog" for word in data.words) == 1


def test_merged_words_keep_all_keywords_and_are_held_out_only_by_all():
    one = [Word("", "cup", ("mug",), "novel"), Word("", "pen", (), "novel")]
    other = [Word("☕", "cup", ("drink", "mug"), "base"), Word("", "ant", (), "base")]
    merged = merge_words(one, other)
    assert [(w.name, w.keywords, w.split) for w in merged] == [
        ("cup", ("mug", "drink"), "base"),
        ("pen", (), "novel"),
        ("ant", (), "base"),
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "yolo"}, "has the format 'yolo'; choose one of emojiscenes, coco, lvis"),
        (COCO | {"size": 0}, "size = 0; it must be at least 1"),
        (COCO | {"max_objects": 0}, "max_objects = 0"),
        (COCO | {"crop": 1.5}, "crop = 1.5; it must be a share"),
        ({"format": "mixture", "sets": []}, "needs data sets"),
        ({"format": "mixture", "sets": [COCO | {"share": 0}]}, "has the share 0"),
        (
            {"format": "mixture", "sets": [COCO, COCO | {"size": 64}]},
            "must have one size; these have coco 512, coco 64",
        ),
    ],
)
def test_an_invalid_recipe_raises_an_error(config, message):
    with pytest.raises(InputError, match=message):
        open_data(config)


def test_the_examples_of_the_documents_are_understood():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.S)]
    tables = [example["data"] for example in examples]
    tables += [
        {key: v for key, v in own.items() if key != "share"} for table in tables for own in table.get("sets", ())
    ]
    assert {table.get("format", "emojiscenes") for table in tables} == set(READERS)
    for table in tables:
        keys = reader_keys(table.get("format", "emojiscenes"))
        assert set(table) - {"format"} <= keys.keys()
        assert {key for key, needed in keys.items() if needed} <= set(table)
