"""Data sets for evaluation: a COCO or LVIS JSON file with the folder of its images, and queries drawn from it."""

import contextlib
import io
import os
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from pycocotools.coco import COCO

from ovsam.data.lvis import MENDED
from ovsam.errors import InputError
from ovsam.evaluation.metrics_ap import Truth
from ovsam.ops import outlines, rle
from ovsam.ops.schema import place
from ovsam.results.formats.coco import CocoAnnotation, CocoCategory
from ovsam.results.formats.coco_tables import PartialImage, read_tables

ABSENT_WORDS = 10  # absent class names queried per image besides the present ones

# The 48 base and 17 novel classes of open-vocabulary COCO (Bansal et al. 2018); the other 15 are in neither.
COCO_NOVEL = frozenset(
    "airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch, keyboard, "
    "sink, scissors".split(", ")
)
COCO_NEITHER = frozenset(
    "traffic light, fire hydrant, stop sign, parking meter, sports ball, baseball bat, baseball glove, tennis racket, "
    "wine glass, hot dog, potted plant, dining table, cell phone, teddy bear, hair drier".split(", ")
)

# Classes of COCO -> their names in LVIS; the others have the same name. LVIS has no hot dog and no potted plant: the
# closest names are used.
COCO_IN_LVIS = {
    "bus": "bus (vehicle)",
    "car": "car (automobile)",
    "cell phone": "cellular telephone",
    "couch": "sofa",
    "donut": "doughnut",
    "fire hydrant": "fireplug",
    "hair drier": "hair dryer",
    "hot dog": "sausage",
    "keyboard": "computer keyboard",
    "laptop": "laptop computer",
    "microwave": "microwave oven",
    "mouse": "mouse (computer equipment)",
    "orange": "orange (fruit)",
    "potted plant": "flowerpot",
    "remote": "remote control",
    "skis": "ski",
    "sports ball": "ball",
    "tie": "necktie",
    "train": "train (railroad vehicle)",
    "tv": "television set",
    "wine glass": "wineglass",
}


class EvalImage(PartialImage, total=False):
    absent_words: list[str]


class EvalCategory(CocoCategory, total=False):
    frequency: str
    split: str


class EvalAnnotation(CocoAnnotation, total=False):
    area: float
    bbox: list[float]


class EvalFile(TypedDict):
    images: list[EvalImage]
    categories: list[EvalCategory]
    annotations: list[EvalAnnotation]
    synonyms: NotRequired[dict[str, str]]


class EvalSet:
    """The images, objects and class names of a data set.

    Args:
        coco: the annotations, from `open_coco`.
        folder: folder of the images: FILE, images/FILE, or, for LVIS, SPLIT/FILE.

    Attributes:
        words: class name of each class id; underscores of LVIS are read as spaces.
        split: `base` or `novel` of each class id, or empty: from the JSON file, from the frequency in LVIS (rare is
            novel), or the usual split of COCO's 80 classes. It does not depend on the training data of a model.
        lvis: whether images are annotated for some classes only, as in LVIS.
    """

    def __init__(self, coco: COCO, folder: Path):
        self.coco, self.folder = coco, folder
        names = {i: coco.cats[i]["name"].replace("_", " ").strip() for i in sorted(coco.cats)}
        self.words = {i: MENDED.get(name, name) for i, name in names.items()}
        self.frequency = {i: one["frequency"] for i, one in coco.cats.items() if "frequency" in one}
        self.lvis = all("neg_category_ids" in image for image in coco.imgs.values())
        usual = COCO_NOVEL | COCO_NEITHER <= set(self.words.values())
        self.split = {i: self._split(i, usual) for i in self.words}
        self.synonyms: dict[str, str] = coco.dataset.get("synonyms", {})

    def _split(self, class_id: int, usual: bool) -> str:
        if self.frequency:
            return "novel" if self.frequency.get(class_id) == "r" else "base"
        word = self.words[class_id]
        if usual and "split" not in self.coco.cats[class_id]:
            return "" if word in COCO_NEITHER else "novel" if word in COCO_NOVEL else "base"
        return self.coco.cats[class_id].get("split", "base")

    def picture(self, image_id: int) -> Path:
        """Return the path of an image; raises InputError if it does not exist."""
        image = self.coco.imgs[image_id]
        address = str(image.get("file_name") or image.get("coco_url") or "")
        name = Path(address).name
        tries = (address, f"images/{address}", name, "/".join(Path(address).parts[-2:]))
        found = next((self.folder / one for one in tries if one and os.path.isfile(self.folder / one)), None)
        if found is None:
            raise InputError(f"There is no image {name!r} in {self.folder}; set --images to the folder of the images.")
        return found

    def objects(self, image_id: int) -> tuple[list[dict], np.ndarray]:
        """Return the annotations of single non-empty objects, and their masks [n, H, W] bool."""
        objects, masks = [], []
        for annotation in self.coco.loadAnns(self.coco.getAnnIds(image_id, iscrowd=False)):
            mask = self.coco.annToMask(annotation).astype(bool) if annotation.get("segmentation") else np.zeros((1, 1))
            if mask.any():
                objects.append(annotation)
                masks.append(mask)
        return objects, np.stack(masks) if masks else np.zeros((0, 1, 1), bool)

    def absent(self, image_id: int, count: int | None = ABSENT_WORDS) -> list[int]:
        """Return class ids that were annotated in the image and are absent, always the same ones; all of them if
        `count` is None. The frozen sets of drawn scenes have their own."""
        image = self.coco.imgs[image_id]
        if "absent_words" in image and count == ABSENT_WORDS:
            ids = {word: i for i, word in self.words.items()}
            return [ids[word] for word in image["absent_words"]]
        here = {one["category_id"] for one in self.coco.imgToAnns[image_id]}
        absent = [i for i in (image["neg_category_ids"] if self.lvis else self.words) if i not in here]
        order = np.random.default_rng(image_id).permutation(len(absent))
        return [absent[i] for i in order[: len(absent) if count is None or self.lvis else count]]

    def truth(self, image_ids: list[int], classes: set[int] | None = None) -> Truth:
        """Return the ground truth of average precision, for some classes or all."""
        objects = []
        for annotation in self.coco.loadAnns(self.coco.getAnnIds(image_ids)):
            if annotation.get("segmentation") and (classes is None or annotation["category_id"] in classes):
                objects.append({**annotation, "segmentation": self.coco.annToRLE(annotation)})
        if not self.lvis:
            return Truth(objects)
        searched, lenient = {}, {}
        for image_id in image_ids:
            image = self.coco.imgs[image_id]
            shown = {one["category_id"] for one in self.coco.imgToAnns[image_id]}
            searched[image_id] = shown | set(image["neg_category_ids"])
            lenient[image_id] = set(image.get("not_exhaustive_category_ids", ()))
        return Truth(objects, searched, lenient)


def open_set(path: str | Path, images: str | Path | None = None) -> EvalSet:
    """Open a JSON file, or a folder with `annotations.json`; the images are in `images`, else beside the JSON file.

    Raises:
        InputError: the file or folder does not exist, or has another format.
    """
    path = Path(path)
    if os.path.isdir(path):
        if not (path / "annotations.json").is_file():
            raise InputError(f"{path} is not a test set: it must have annotations.json, like tests/data/photos-val.")
        path = path / "annotations.json"
    folder = path.parent if images is None else Path(images)
    if not os.path.isdir(folder):
        raise InputError(f"There is no folder {folder}; set --images to the folder of the images.")
    return EvalSet(open_coco(path), folder)


def open_coco(annotations: Path) -> COCO:
    """Open a COCO JSON file; raises InputError if it is missing or invalid."""
    content = read_tables(annotations, EvalFile, ("COCO", "LVIS"), "COCO's instances")
    if not content["annotations"] or not content["categories"]:
        raise InputError(f"{annotations} has no annotations or no categories; it must have both.")
    _check(annotations, content)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _check(path: Path, content: dict) -> None:
    """Check what a schema cannot: references and outlines. Adds keys that pycocotools needs and hand-made files
    lack."""
    for table in ("images", "categories"):
        for number, entry in enumerate(content[table]):
            if not isinstance(entry["id"], int) or entry["id"] < 0:
                where = place(f"{table}[{number}].id", path)
                raise InputError(f"{where} is {entry['id']!r}; for an evaluation it must be a whole number, 0 or more.")
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    words = {category["name"].replace("_", " ").strip() for category in content["categories"]}
    for number, image in enumerate(content["images"]):
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if unknown := set(image.get(key, ())) - categories:
                where = place(f"images[{number}].{key}", path)
                raise InputError(f"{where} has {min(unknown, key=str)!r}, which is missing in the category ids.")
        if unknown := set(image.get("absent_words", ())) - words:
            where = place(f"images[{number}].absent_words", path)
            raise InputError(f"{where} has {min(unknown)!r}, which is missing in the categories.")
    for number, annotation in enumerate(content["annotations"]):
        where = f"annotations[{number}]"
        for kind, there in (("image", sizes), ("category", categories)):
            if annotation[f"{kind}_id"] not in there:
                found = annotation[f"{kind}_id"]
                raise InputError(
                    f"{place(f'{where}.{kind}_id', path)} is {found!r}, which is missing in the {kind} ids."
                )
        annotation.setdefault("iscrowd", 0)
        annotation["id"] = number + 1 if annotation.get("id") is None else annotation["id"]
        if not outlines.is_outline(annotation.get("segmentation")):
            annotation.pop("segmentation", None)
            continue
        height, width = sizes[annotation["image_id"]]
        if not height or not width:
            raise InputError(f"{place(f'{where}.image_id', path)} is an image without width and height; add them.")
        try:
            outlines.check_outline(annotation["segmentation"], height, width)
        except InputError as error:
            raise InputError(f"{place(f'{where}.segmentation', path)} {error}.") from error
        if "area" not in annotation or len(annotation.get("bbox") or ()) != 4:
            code = outlines.to_rle(annotation["segmentation"], height, width)
            annotation.setdefault("area", float(rle.area(code)))
            annotation["bbox"] = list(rle.bbox(code))
        if isinstance(annotation["segmentation"], list):  # pycocotools takes four numbers for a box
            annotation["segmentation"] = outlines.polygons(annotation["segmentation"])
