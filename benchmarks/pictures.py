"""Draws the pictures of the README with the shipped checkpoint: `python benchmarks/pictures.py`.

The photographs are of the frozen set (tests/data/photos-val, whose ATTRIBUTION.md names the photographers).
"""

from pathlib import Path

from PIL import Image

import ovsam

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos-val" / "images"
WHAT = ("000000208901.jpg", [(265, 175)])
WHERE = ("000000352257.jpg", ["person", "tennis racket"])
EVERYTHING = "000000001993.jpg"
HEIGHT = 320


def main() -> None:
    segmenter = ovsam.load("ovsam-tiny")
    name, points = WHAT
    image = segmenter.encode(PHOTOS / name)
    clicked = [segmenter.what(image, points=[point])[0] for point in points]
    panels = [ovsam.Results(clicked, image.image.size[::-1]).overlay(image.image)]
    name, words = WHERE
    image = segmenter.encode(PHOTOS / name)
    panels.append(segmenter.where(image, words).overlay(image.image))
    image = segmenter.encode(PHOTOS / EVERYTHING)
    panels.append(segmenter.everything(image).overlay(image.image))

    panels = [panel.convert("RGB").resize((round(HEIGHT * panel.width / panel.height), HEIGHT)) for panel in panels]
    sheet = Image.new("RGB", (sum(panel.width for panel in panels) + 8 * (len(panels) - 1), HEIGHT), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + 8
    target = ROOT / "benchmarks" / "pictures" / "three_questions.jpg"
    target.parent.mkdir(exist_ok=True)
    sheet.save(target, quality=88)
    print(target)


if __name__ == "__main__":
    main()
