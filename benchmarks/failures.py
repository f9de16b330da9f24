"""Draws the failures of the shipped checkpoint: `python benchmarks/failures.py`, for its card.

Each object of the frozen photographs boxed: the wrong names with the highest scores (first row) and the masks with the
lowest IoU (second row), at most one of each image; the selection is automatic.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from tqdm import tqdm

import ovsam

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos-val"
COLUMNS, SIDE = 5, 160


def main() -> None:
    segmenter = ovsam.load("ovsam-tiny")
    coco = COCO(str(PHOTOS / "annotations.json"))
    misnamed, misshapen = [], []
    for image in tqdm(coco.loadImgs(coco.getImgIds())):
        annotations = coco.loadAnns(coco.getAnnIds(image["id"], iscrowd=False))
        if not annotations:
            continue
        width, height = image["width"], image["height"]
        corners = [(x, y, min(x + w, width), min(y + h, height)) for x, y, w, h in (a["bbox"] for a in annotations)]
        boxes = [list(box) for box in corners]
        picture = segmenter.encode(PHOTOS / "images" / image["file_name"])
        found = segmenter.what(picture, boxes=boxes)
        wrong, rough = [], []
        for annotation, box, instance in zip(annotations, boxes, found, strict=True):
            truth, label = coco.annToMask(annotation).astype(bool), coco.cats[annotation["category_id"]]["name"]
            iou = (instance.mask & truth).sum() / (instance.mask | truth).sum()
            if instance.label != label:
                wrong.append((instance.score, f"{label}:\n{instance.label} {instance.score:.2f}", box, instance.mask))
            rough.append((1 - iou, f"{label}:\nIoU {iou:.2f}", box, instance.mask))
        for kept, candidates in ((misnamed, wrong), (misshapen, rough)):
            kept += [(*max(candidates, key=lambda each: each[0]), picture.image)] if candidates else []

    sheet = Image.new("RGB", (COLUMNS * SIDE, 2 * (SIDE + 28)), "white")
    for row, kept in enumerate((misnamed, misshapen)):
        for column, each in enumerate(sorted(kept, key=lambda each: -each[0])[:COLUMNS]):
            sheet.paste(panel(*each[1:]), (column * SIDE, row * (SIDE + 28)))
    target = ROOT / "benchmarks" / "pictures" / "failures.jpg"
    sheet.save(target, quality=88)
    print(target)


def panel(text: str, box: list[float], mask: np.ndarray, picture: Image.Image) -> Image.Image:
    """The surroundings of a box with the predicted mask over them, and two lines of text below."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array([255, 0, 120])
    x1, y1, x2, y2 = box
    half = 0.65 * max(x2 - x1, y2 - y1)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    crop = Image.fromarray(pixels.astype(np.uint8)).crop((int(x - half), int(y - half), int(x + half), int(y + half)))
    made = Image.new("RGB", (SIDE, SIDE + 28), "white")
    made.paste(crop.resize((SIDE - 4, SIDE - 4)), (2, 0))
    ImageDraw.Draw(made).multiline_text((4, SIDE - 2), text, fill="black", spacing=2)
    return made


if __name__ == "__main__":
    main()
