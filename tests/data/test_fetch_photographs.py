"""adapters/photographs/fetch.py against a local server with the files of COCO's."""

import importlib.util
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from web import serve

from ovsam.data.coco import Coco

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "adapters" / "photographs" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "coco"
    categories = [{"id": 3, "name": "car"}]
    with zipfile.ZipFile(_made(folder / "annotations" / "annotations_trainval2017.zip"), "w") as archive:
        for split, number in (("train2017", 7), ("val2017", 9)):
            image = {"id": number, "width": 1024, "height": 512, "file_name": f"{number:012d}.jpg"}
            square = {"segmentation": [[100, 100, 300, 100, 300, 300, 100, 300]], "bbox": [100, 100, 200, 200]}
            one = square | {"id": number, "image_id": number, "category_id": 3, "iscrowd": 0, "area": 40000.0}
            other = image | {"id": 1000}  # an image that is not in the list
            table = {"images": [image, other], "annotations": [one], "categories": categories}
            archive.writestr(f"annotations/instances_{split}.json", json.dumps(table))
            content = io.BytesIO()
            Image.new("RGB", (1024, 512), "grey").save(content, "JPEG")
            _made(folder / split / image["file_name"]).write_bytes(content.getvalue())
    with serve(folder) as address_and_requests:
        yield address_and_requests


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_exactly_the_listed_photographs_are_fetched_once(server, tmp_path):
    script, folder, listed = load_script(), tmp_path / "photographs", tmp_path / "list.txt"
    address, requests = server
    listed.write_text("# role, split, id\ntrain train2017 7\ncalibration val2017 9\n")
    script.main(folder, address, listed)
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["000000000007.jpg", "000000000009.jpg"]
    assert Image.open(folder / "images" / "000000000007.jpg").size == (512, 256)
    data = Coco(folder / "train.json", folder / "images", size=64)
    assert len(data) == 1 and [word.name for word in data.words] == ["car"]
    mask = data[0]["masks"][0]  # the square of 100 to 300 pixels of 1024 x 512, on a grid of 64 x 64
    assert mask.any(0).nonzero().flatten().tolist() == pytest.approx(range(6, 19), abs=1)
    assert mask.any(1).nonzero().flatten().tolist() == pytest.approx(range(12, 38), abs=1)
    asked = len(requests)
    script.main(folder, address, listed)
    assert len(requests) == asked == 3


def test_the_list_names_the_photographs_of_ovsam_tiny():
    roles = load_script().read_list()
    counts = {role: sum(map(len, splits.values())) for role, splits in roles.items()}
    assert counts == {"train": 455, "calibration": 60, "more": 1170}
    frozen = json.loads((ROOT / "tests" / "data" / "photos-val" / "annotations.json").read_text())["images"]
    used = {number for splits in roles.values() for ids in splits.values() for number in ids}
    assert not used & {image.get("coco_id", image["id"]) for image in frozen}
