"""Each format read by the tool that it is for; a tool that is not installed is skipped.

`pip install -e ".[label-tools]"` brings them, best into an environment of their own: some want an older numpy. The
versions that passed are in docs/labels.md.
"""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ovsam.results.formats import write_labels
from ovsam.results.formats.label_studio import decode_rle, encode_rle
from ovsam.results.results import Results

SIZE = (240, 320)


def shapes():
    """A ring, two far parts, a disc and a thin star: a hole, several parts, curves."""
    drawn = []
    for draw in (
        lambda d: (d.rectangle((20, 20, 199, 179), fill=1), d.rectangle((60, 60, 139, 129), fill=0)),
        lambda d: (d.rectangle((0, 0, 69, 79), fill=1), d.rectangle((220, 150, 319, 239), fill=1)),
        lambda d: d.ellipse((90, 30, 270, 210), fill=1),
        lambda d: d.polygon([(160, 5), (190, 90), (310, 110), (200, 150), (210, 235), (150, 170), (20, 200)], fill=1),
    ):
        image = Image.new("1", SIZE[::-1])
        draw(ImageDraw.Draw(image))
        drawn.append(np.asarray(image))
    return np.stack(drawn)


LABELS = ["ring & hole", "two parts", "disc"]


@pytest.fixture
def results():
    labels = [LABELS[0], LABELS[1], LABELS[2], LABELS[2]]
    scores = [0.9, 0.8, 0.7, 0.6]
    ids = [0, 1, 2, 2]
    return Results.from_arrays(
        shapes(), labels, ids, scores, scores, labels, "text", model="fake", file_name="in/pets.png"
    )


@pytest.fixture
def images(tmp_path, results):
    (tmp_path / "images/in").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1], "white").save(tmp_path / "images" / results.file_name)
    return tmp_path / "images"


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def test_pycocotools(results, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    write_labels([results], tmp_path / "coco.json", "coco", LABELS)
    truth = COCO(tmp_path / "coco.json")
    for number, mask in enumerate(shapes(), start=1):
        assert iou(truth.annToMask(truth.anns[number]).astype(bool), mask) == 1
    found = truth.loadRes([dict(one) for one in truth.dataset["annotations"]])
    evaluation = COCOeval(truth, found, "segm")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert evaluation.stats[0] == 1  # nothing is ignored as a crowd


def test_supervision_reads_coco_and_yolo(results, images, tmp_path):
    supervision = pytest.importorskip("supervision")
    write_labels([results], tmp_path / "coco.json", "coco", LABELS)
    data = supervision.DetectionDataset.from_coco(str(images), str(tmp_path / "coco.json"), force_masks=True)
    ((_, _, found),) = list(data)
    assert data.classes == LABELS and [iou(*pair) for pair in zip(found.mask, shapes(), strict=True)] == [1] * 4

    write_labels([results], tmp_path / "yolo", "yolo", LABELS)
    folder = tmp_path / "yolo"  # supervision looks for labels of images that lie in one folder
    data = supervision.DetectionDataset.from_yolo(
        str(images / "in"), str(folder / "labels/in"), str(folder / "data.yaml"), force_masks=True
    )
    ((_, _, found),) = list(data)
    assert [data.classes[i] for i in found.class_id] == results.labels
    assert min(iou(np.asarray(one, bool), mask) for one, mask in zip(found.mask, shapes(), strict=True)) >= 0.97


def test_supervision_there_and_back(results):
    supervision = pytest.importorskip("supervision")
    detections = results.to_supervision()
    assert isinstance(detections, supervision.Detections)
    again = Results.from_supervision(detections, file_name="in/pets.png")
    assert again.labels == results.labels and [one.label_id for one in again] == [0, 1, 2, 2]
    np.testing.assert_array_equal(again.masks, shapes())
    np.testing.assert_allclose(again.scores, results.scores)


@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_labelme(results, images, tmp_path, shape):
    pytest.importorskip("labelme")
    from labelme._label_file import LabelFile

    from ovsam.results.formats.labelme import write_labelme

    write_labelme([results], tmp_path / "out", shape, images)
    read = LabelFile(str(tmp_path / "out/in/pets.json"))
    assert len(read.image_data) and read.image_path == os.path.join("..", "..", "images", "in", "pets.png")
    for one, mask, label in zip(read.shapes, shapes(), results.labels, strict=True):
        assert one["label"] == label and one["shape_type"] == shape
        drawn = Image.new("1", SIZE[::-1])
        if shape == "polygon":  # as labelme.utils draws it
            ImageDraw.Draw(drawn).polygon([tuple(point) for point in one["points"]], outline=1, fill=1)
            assert iou(np.asarray(drawn), mask) >= 0.97
        else:
            (x1, y1), (x2, y2) = np.array(one["points"], int)
            whole = np.zeros(SIZE, bool)
            whole[y1 : y2 + 1, x1 : x2 + 1] = one["mask"]
            assert iou(whole, mask) == 1


def test_label_studio(results, tmp_path):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    noise = np.random.default_rng(0).random((50, 71)) < 0.5
    for mask in (*shapes(), noise, np.ones((400, 400), bool), np.zeros((40, 40), bool)):
        ours, theirs = encode_rle(mask), brush.mask2rle(np.uint8(mask) * 255)
        assert ours == theirs
        np.testing.assert_array_equal(brush.decode_rle(ours).reshape(*mask.shape, 4)[..., 3] > 0, mask)
        np.testing.assert_array_equal(decode_rle(theirs, *mask.shape), mask)

    from label_studio_sdk.label_interface import LabelInterface

    write_labels([results], tmp_path / "tasks.json", "label-studio", LABELS)
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    interface = LabelInterface((tmp_path / "tasks.xml").read_text())
    for region in task["predictions"][0]["result"]:
        assert interface.validate_region(region), region["id"]


def test_datumaro_reads_cvat(results, images, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    (tmp_path / "cvat").mkdir()
    (tmp_path / "cvat/images").symlink_to(images)
    empty = Results([], SIZE, "fake", "in/none.png")
    Image.new("RGB", SIZE[::-1]).save(images / "in/none.png")
    write_labels([results, empty], tmp_path / "cvat/default.xml", "cvat", LABELS)
    data = datumaro.Dataset.import_from(str(tmp_path / "cvat"), "cvat")
    names = [one.name for one in data.categories()[datumaro.AnnotationType.label]]
    assert names == LABELS
    items = {item.media.path.rsplit("/", 1)[-1]: item for item in data}
    assert items.keys() == {"pets.png", "none.png"} and not items["none.png"].annotations
    for one, mask, label in zip(items["pets.png"].annotations, shapes(), results.labels, strict=True):
        assert names[one.label] == label and iou(np.asarray(one.image, bool), mask) == 1


def test_cvat_sdk_decodes_the_masks(results, tmp_path):
    masks = pytest.importorskip("cvat_sdk.masks")
    from xml.etree import ElementTree

    for one, mask in zip(ElementTree.fromstring(results.to_cvat()), shapes(), strict=True):
        left, top, width, height = (int(one.get(key)) for key in ("left", "top", "width", "height"))
        counts = [int(count) for count in one.get("rle").split(",")]
        points = [*counts, left, top, left + width - 1, top + height - 1]
        np.testing.assert_array_equal(masks.decode_mask(points, image_width=SIZE[1], image_height=SIZE[0]), mask)
        assert points == masks.encode_mask(mask)


def test_rasterio_and_shapely_read_geojson(results, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    features = pytest.importorskip("rasterio.features")
    geometry = pytest.importorskip("shapely.geometry")
    transform = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000)
    path = tmp_path / "images/in/field.tif"
    path.parent.mkdir(parents=True)
    facts = {"driver": "GTiff", "height": SIZE[0], "width": SIZE[1], "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=transform, **facts) as file:
        file.write(np.zeros((3, *SIZE), np.uint8))
    results.file_name = "in/field.tif"
    write_labels([results], tmp_path / "out", "geojson", LABELS, tmp_path / "images")
    content = json.loads((tmp_path / "out/in/field.geojson").read_text())
    assert content["crs"]["properties"]["name"].endswith("32633")
    for feature, mask in zip(content["features"], shapes(), strict=True):
        shape = geometry.shape(feature["geometry"])
        assert shape.is_valid and shape.area == mask.sum() / 4
        drawn = features.rasterize([feature["geometry"]], SIZE, transform=transform).astype(bool)
        assert iou(drawn, mask) == 1
    again = Results.read(tmp_path / "out")[0]
    np.testing.assert_array_equal(again.masks, shapes())


def test_fiftyone(results):
    fiftyone = pytest.importorskip("fiftyone")
    found = results.to_fiftyone()
    assert isinstance(found, fiftyone.Detections)
    x, y, width, height = found.detections[0].bounding_box
    np.testing.assert_allclose([x, y, width, height], [20 / 320, 20 / 240, 180 / 320, 160 / 240])
    assert found.detections[0].mask.shape == (160, 180)  # the box's, not the image's
    for one, mask in zip(found.detections, shapes(), strict=True):
        np.testing.assert_array_equal(one.to_segmentation(frame_size=SIZE[::-1]).mask > 0, mask)
    again = Results.from_fiftyone(found, SIZE)
    np.testing.assert_array_equal(again.masks, shapes())
    assert again.labels == results.labels
