"""Arguments of Results and of post-processing: whatever is given, an answer or one sentence."""

import inspect
import math

import numpy as np
import pytest
import torch
from common import picture, tiny_model, tiny_processor
from PIL import Image

from ovsam.errors import InputError
from ovsam.results.formats import check_format
from ovsam.results.results import Results

WRONG = [None, 5, -1, 1.5, math.nan, 10**400, "x", "", b"x", [], [[]], [None], {}, {"a": 1}, {1}, object(), int, 1j]
WRONG += [np.array([]), np.array(math.nan), np.array([[1, 2]]), torch.tensor(2), torch.zeros(2, device="meta")]
WRONG += [[math.nan, math.nan], [[1, 2], [3]], [["cat"]], ["cat", 5], {"cat": "dog"}, range(3), "\ud800"]
MASKS = np.zeros((2, 32, 48), bool)
MASKS[0, 4:20, 6:30] = MASKS[1, 20:30, 30:40] = True
ARRAYS = {"masks": MASKS, "labels": ["cup", "cat"], "label_ids": [0, 1], "scores": [0.5, 0.4]}
ARRAYS |= {"mask_scores": [0.6, 0.7], "prompts": ["cup", "cat"], "source": "text", "file_name": "a.png"}


def answered(ask):
    """Nothing but InputError, of one line, is raised."""
    try:
        ask()
    except InputError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 500


def results():
    found = Results.from_arrays(**ARRAYS)
    found.picture = Image.new("RGB", (48, 32))
    return found


CALLS = ["filter", "overlay", "plot", "to_coco", "to_yolo", "to_labelme", "to_label_studio", "to_geojson"]
CALLS += ["to_panoptic", "to_cutouts", "read", "from_coco", "from_yolo", "from_labelme", "from_cvat"]
CALLS += ["from_label_studio", "from_geojson", "from_arrays", "save"]
NEEDED = {"overlay": {"image": Image.new("RGB", (48, 32))}, "from_arrays": ARRAYS}


@pytest.mark.parametrize("name", CALLS)
def test_methods_of_results(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    needed = NEEDED.get(name, {"folder": tmp_path} if name == "from_yolo" else {"source": tmp_path})
    for argument in inspect.signature(getattr(Results, name)).parameters:
        if argument in ("self", "model", "file_name", "source") and name == "from_arrays" or argument == "self":
            continue
        for value in WRONG:
            given = (needed if name in ("overlay", "from_arrays", "from_yolo", "read") else {}) | {argument: value}
            if name == "save":
                given = {"path": tmp_path / "a.png"} | given
            answered(lambda given=given: getattr(results(), name)(**given))
    assert [path.name for path in tmp_path.iterdir()] in ([], ["a.png"])


def test_the_records_themselves():
    for value in WRONG:
        answered(lambda value=value: Results(value, (3, 3)))
        answered(lambda value=value: Results([], value))
        answered(lambda value=value: check_format(value))


@pytest.fixture(scope="module")
def asked():
    processor = tiny_processor()
    with torch.no_grad():
        return processor, tiny_model()(**processor(images=[picture(1), picture(2)], text=["cat", "dog"]))


@pytest.mark.parametrize("kind", ["instance_segmentation", "semantic_segmentation", "panoptic_segmentation"])
def test_post_processing(asked, kind):
    processor, outputs = asked
    call = getattr(processor, f"post_process_{kind}")
    for argument in inspect.signature(call).parameters:
        for value in WRONG:
            answered(lambda argument=argument, value=value: call(**{"outputs": outputs} | {argument: value}))


def test_one_target_size_may_stand_alone():
    processor = tiny_processor()
    with torch.no_grad():
        outputs = tiny_model()(**processor(images=picture(1), text=["cat"]))
    flat, nested = (processor.post_process_semantic_segmentation(outputs, size) for size in ([40, 50], [[40, 50]]))
    assert flat[0].shape == (40, 50) and torch.equal(flat[0], nested[0])
