"""Fetches the photographs that ovsam-tiny was trained on from COCO: `python adapters/photographs/fetch.py`.

pictures.txt lists them. They belong to their photographers, under the licences that COCO's annotations state, and many
may not be redistributed, so that they are not part of this repository. Into the folder data/photographs it writes
images/ (the longer side at most 512 pixels) and, for each role in the list, ROLE.json in COCO's format, scaled along.
What is there already is not fetched again.
"""

import argparse
import io
import json
import urllib.request
import zipfile
from collections import defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image

LIST = Path(__file__).with_name("pictures.txt")
SOURCE = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
SIDE = 512


def read_list(path: Path = LIST) -> dict[str, dict[str, list[int]]]:
    """Return the ids of the images by role and by split of COCO."""
    roles: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            role, split, number = line.split()
            roles[role][split].append(int(number))
    return roles


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def fetch_image(source: str, split: str, number: int, folder: Path) -> None:
    """Write the image as images/NUMBER.jpg, its longer side at most 512 pixels."""
    target = folder / "images" / f"{number:012d}.jpg"
    if target.is_file():
        return
    image = Image.open(io.BytesIO(fetch(f"{source}/{split}/{number:012d}.jpg"))).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    partial = target.with_suffix(".partial")
    image.save(partial, "JPEG", quality=90)
    partial.replace(target)


def scaled(annotation: dict, factor: float) -> dict:
    """Return an annotation whose coordinates are multiplied by `factor`; run lengths (crowds) are dropped to a box."""
    outline = annotation["segmentation"]
    if isinstance(outline, list):
        outline = [[round(value * factor, 2) for value in ring] for ring in outline]
    else:
        outline = []
    box = [round(value * factor, 2) for value in annotation["bbox"]]
    return annotation | {"segmentation": outline, "bbox": box, "area": annotation["area"] * factor**2}


def annotations_of(tables: dict[str, dict], wanted: dict[str, list[int]]) -> dict:
    """Return COCO's annotations of some images, by split, as one table at our size."""
    images, annotations, categories = [], [], []
    for split, numbers in wanted.items():
        table, factors = tables[split], {}
        categories = table["categories"]
        for image in table["images"]:
            if image["id"] in set(numbers):
                factor = min(1.0, SIDE / max(image["width"], image["height"]))
                factors[image["id"]] = factor
                size = {side: round(image[side] * factor) for side in ("width", "height")}
                images.append(image | size | {"file_name": f"{image['id']:012d}.jpg"})
        for one in table["annotations"]:
            if one["image_id"] in factors:
                annotations.append(scaled(one, factors[one["image_id"]]))
    return {"images": images, "annotations": annotations, "categories": categories}


def main(folder: Path, source: str, path: Path = LIST) -> None:
    roles = read_list(path)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    wanted = [(source, split, n, folder) for splits in roles.values() for split, ids in splits.items() for n in ids]
    with ThreadPool(8) as pool:
        pool.starmap(fetch_image, wanted)
    if missing := [role for role in roles if not (folder / f"{role}.json").is_file()]:
        with zipfile.ZipFile(io.BytesIO(fetch(f"{source}/{ARCHIVE}"))) as archive:
            splits = {split for splits in roles.values() for split in splits}
            tables = {split: json.loads(archive.read(f"annotations/instances_{split}.json")) for split in splits}
        for role in missing:
            (folder / f"{role}.json").write_text(json.dumps(annotations_of(tables, roles[role])))
    print(f"{len(wanted):,} photographs in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/photographs"))
    parser.add_argument("--source", default=SOURCE, help="the server to fetch from")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.source)
