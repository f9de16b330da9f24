"""Objects cut out of one image and pasted onto another: every mask has exactly the visible pixels of its object."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from ovsam.data import open_data
from ovsam.data.paste import cut_out, paste_at, paste_objects, transform
from ovsam.errors import InputError
from ovsam.ops.outlines import from_mask

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def disc(height, width, y, x, radius):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def paint(mask, color, ground=(0, 0, 0)):
    return Image.fromarray(np.where(mask[..., None], np.array(color), np.array(ground)).astype(np.uint8))


def shows(image, color):
    return (np.asarray(image) == np.array(color)).all(-1)


def test_a_cut_out_is_the_bounding_box_of_the_object():
    mask = disc(60, 80, 30, 50, 10)
    image, inside = cut_out(paint(mask, RED), from_mask(mask))
    assert image.size == (21, 21) and inside.sum() == mask.sum()
    assert (shows(image, RED) == inside).all()


def test_a_small_object_is_not_cut_out():
    mask = disc(60, 80, 30, 50, 4)
    assert cut_out(paint(mask, RED), from_mask(mask)) is None


def test_earlier_objects_lose_the_pixels_that_are_covered():
    behind, far, hidden = disc(60, 80, 30, 30, 12), disc(60, 80, 8, 70, 5), disc(60, 80, 30, 40, 2)
    image = paint(behind | far | hidden, GREEN)
    square = Image.new("RGB", (20, 16), RED), np.ones((16, 20), bool)
    result, rles = paste_at(image, [from_mask(m) for m in (behind, far, hidden)], square, 32, 24)
    masks = [coco.decode(rle).astype(bool) for rle in rles]
    assert (masks[3] == shows(result, RED)).all() and masks[3].sum() == 320
    assert (masks[0] == (behind & ~masks[3])).all() and 0 < masks[0].sum() < behind.sum()
    assert (masks[1] == far).all() and not masks[2].any()
    assert not shows(image, RED).any(), "the given picture is left as it was"


@pytest.mark.parametrize(
    "scale, room, size", [(2.0, (99, 99), (40, 20)), (0.5, (99, 99), (10, 5)), (9, (30, 30), (30, 15))]
)
def test_a_cut_out_is_scaled_to_the_free_space(scale, room, size):
    piece = Image.new("RGB", (20, 10), RED), np.ones((10, 20), bool)
    image, mask = transform(piece, scale, False, room)
    assert image.size == size and mask.shape == size[::-1] and mask.all()


def test_mirroring_moves_the_mask_with_the_image():
    mask = np.zeros((10, 20), bool)
    mask[:, :5] = True
    image, mirrored = transform((paint(mask, RED), mask), 1.0, True, (99, 99))
    assert (shows(image, RED) == mirrored).all() and mirrored[:, 15:].all()


@pytest.mark.parametrize("seed", range(8))
def test_masks_equal_the_visible_pixels(seed):
    behind = disc(60, 80, 30, 30, 12)
    pieces = [(Image.new("RGB", (21, 21), color), disc(21, 21, 10, 10, 10)) for color in (RED, BLUE)]
    rng = np.random.default_rng(seed)
    result, rles = paste_objects(paint(behind, GREEN), [from_mask(behind)], pieces, rng)
    for rle, color in zip(rles, (GREEN, RED, BLUE), strict=True):
        assert (coco.decode(rle).astype(bool) == shows(result, color)).all()


@pytest.fixture
def config(tmp_path):
    """Six images with a disc each, a red cup or a green pen."""
    images, annotations = [], []
    for number in range(6):
        mask = disc(64, 64, 20 + 4 * number, 32, 10)
        paint(mask, (RED, GREEN)[number % 2]).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        rle = from_mask(mask)
        outline = {"size": rle["size"], "counts": rle["counts"].decode()}
        annotations.append({"id": number, "image_id": number, "category_id": number % 2, "segmentation": outline})
    categories = [{"id": 0, "name": "cup"}, {"id": 1, "name": "pen"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return {"format": "coco", "annotations": tmp_path / "coco.json", "size": 64, "max_objects": 4}


def test_a_reader_pastes(config):
    data, plain = open_data(config | {"paste": 2, "draws": 10}), open_data(config)
    counts = []
    for index in range(len(data)):
        sample = data[index]
        counts.append(int((sample["word_ids"] >= 0).sum()))
        for mask, word in zip(sample["masks"], sample["word_ids"].tolist(), strict=True):
            if word >= 0:  # the color of a word, but for mixed pixels at a rim
                color = sample["image"][:, mask].float().mean(-1)
                assert mask.any() and color[word] > 180
        assert sample["known"].all()
    assert set(counts) == {1, 2} or set(counts) == {0, 1, 2}
    assert torch.equal(data[7]["image"], open_data(config | {"paste": 2, "draws": 10})[7]["image"])
    assert len(plain) == 6 and len(open_data(config | {"paste": 1})) == 600


def test_without_pasting_samples_are_as_before(config):
    for index in range(6):
        assert torch.equal(
            open_data(config | {"paste": 0, "draws": 1})[index]["masks"], open_data(config)[index]["masks"]
        )


def test_a_negative_number_raises_an_error(config):
    with pytest.raises(InputError, match="paste = -1"):
        open_data(config | {"paste": -1})
