"""Draws the pictures of the README with the shipped checkpoint: `python benchmarks/pictures.py`."""

from pathlib import Path

from PIL import Image

import ovsam
from ovsam.data.scenes.words import all_words

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "tests" / "data" / "emojiscenes-val" / "images"
WHERE = ("028.jpg", ["car", "saxophone", "dog face", "meat on bone"])
WHAT = ("000.jpg", [(333, 177), (381, 283), (109, 375), (206, 451)])
EVERYTHING = "056.jpg"


def main() -> None:
    segmenter = ovsam.load("ovsam-tiny")
    names = [word.name for word in all_words()]
    panels = []
    name, words = WHERE
    picture = segmenter.encode(SCENES / name)
    panels.append(segmenter.where(picture, words).overlay(picture.image))
    name, points = WHAT
    picture = segmenter.encode(SCENES / name)
    clicked = [segmenter.what(picture, points=[point], vocabulary=names)[0] for point in points]
    panels.append(ovsam.Results(clicked, picture.image.size[::-1]).overlay(picture.image))
    picture = segmenter.encode(SCENES / EVERYTHING)
    panels.append(segmenter.everything(picture, vocabulary=names).overlay(picture.image))

    sheet = Image.new("RGB", (3 * 512 + 2 * 8, 512), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel.convert("RGB"), (i * (512 + 8), 0))
    target = ROOT / "benchmarks" / "pictures" / "three_questions.jpg"
    target.parent.mkdir(exist_ok=True)
    sheet.save(target, quality=88)
    print(target)


if __name__ == "__main__":
    main()
