"""The downloads: the instances that the page shows, in the formats of labelling and training tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ovsam import Results
from ovsam.results.formats import write_coco, write_yolo
from ovsam.results.formats.labelme import to_labelme
from ovsam.results.formats.masks import cutouts, write_id_map


def coco(results: Results, picture: Path, target: Path) -> Path:
    path = target / f"{stem(results)}.coco.json"
    write_coco([results], path)
    return path


def yolo(results: Results, picture: Path, target: Path) -> Path:
    folder = target / "yolo"
    labels = sorted({(one.label_id, one.label) for one in results})
    write_yolo([results], folder, [label for _, label in labels])
    (folder / "images").mkdir()
    shutil.copy(picture, folder / "images" / results.file_name)
    return pack(folder, target / f"{stem(results)}.yolo.zip")


def labelme(results: Results, picture: Path, target: Path) -> Path:
    path = target / f"{stem(results)}.json"  # LabelMe finds it by the name of the image
    path.write_text(json.dumps(to_labelme(results), ensure_ascii=False), encoding="utf-8")
    return path


def id_map(results: Results, picture: Path, target: Path) -> Path:
    path = target / f"{stem(results)}.ids.png"
    write_id_map(results, path)
    return path


def cut_outs(results: Results, picture: Path, target: Path) -> Path:
    folder = target / "cut-outs"
    folder.mkdir()
    whole = results.filter(min_area=1)
    for number, (one, image) in enumerate(zip(whole, cutouts(whole, picture), strict=True), 1):
        name = "".join(letter if letter.isalnum() else "-" for letter in one.label)[:40]
        image.save(folder / f"{number:03}-{name}.png")
    return pack(folder, target / f"{stem(results)}.cut-outs.zip")


FORMATS: dict[str, Callable[[Results, Path, Path], Path]] = {
    "COCO json": coco,
    "YOLO-seg": yolo,
    "LabelMe": labelme,
    "PNG id map": id_map,
    "Cut-outs": cut_outs,
}


def stem(results: Results) -> str:
    return Path(results.file_name or "picture").stem


def pack(folder: Path, path: Path) -> Path:
    archive = shutil.make_archive(str(path.with_suffix("")), "zip", folder)
    shutil.rmtree(folder)
    return Path(archive)
