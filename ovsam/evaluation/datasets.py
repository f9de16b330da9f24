"""Data sets to measure on: a COCO or LVIS json with the folder of its pictures, as questions are drawn from it."""

import contextlib
import io
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from ovsam.data.lvis import MENDED
from ovsam.errors import InputError
from ovsam.evaluation.metrics_ap import Truth
from ovsam.ops import rle

ABSENT_WORDS = 10  # asked of each image besides those that it shows

# The 48 base and 17 novel classes of open-vocabulary work on COCO (Bansal et al. 2018); the other 15 are in neither.
COCO_NOVEL = frozenset(
    "airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch, keyboard, "
    "sink, scissors".split(", ")
)
COCO_NEITHER = frozenset(
    "traffic light, fire hydrant, stop sign, parking meter, sports ball, baseball bat, baseball glove, tennis racket, "
    "wine glass, hot dog, potted plant, dining table, cell phone, teddy bear, hair drier".split(", ")
)

# The classes of COCO under the names that LVIS has for them; the others are called the same. LVIS has no hot dog and no
# potted plant: the nearest stand for them.
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


class EvalSet:
    """The images, objects and words of a data set.

    Args:
        coco: the json, as `open_coco` reads it.
        folder: where its pictures are: FILE, images/FILE, or, for LVIS, SPLIT/FILE.

    Attributes:
        words: the name of each class id; the underscores of LVIS are read as spaces.
        split: `base` or `novel` of each class id, or empty: from the json, from LVIS' frequency (rare ones are novel),
            or the usual split of COCO's 80 classes. It does not depend on what a model was trained on.
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
            return "novel" if self.frequency[class_id] == "r" else "base"
        word = self.words[class_id]
        if usual and "split" not in self.coco.cats[class_id]:
            return "" if word in COCO_NEITHER else "novel" if word in COCO_NOVEL else "base"
        return self.coco.cats[class_id].get("split", "base")

    def picture(self, image_id: int) -> Path:
        """Raises InputError if the file is not there."""
        image = self.coco.imgs[image_id]
        address = str(image.get("file_name") or image.get("coco_url") or "")
        name = Path(address).name
        tries = (address, f"images/{address}", name, "/".join(Path(address).parts[-2:]))
        found = next((self.folder / one for one in tries if one and (self.folder / one).is_file()), None)
        if found is None:
            raise InputError(
                f"There is no picture {name!r} in {self.folder}; --images names the folder of the pictures."
            )
        return found

    def objects(self, image_id: int) -> tuple[list[dict], np.ndarray]:
        """Annotations of single objects with pixels, and their masks [n, H, W] bool."""
        objects, masks = [], []
        for annotation in self.coco.loadAnns(self.coco.getAnnIds(image_id, iscrowd=False)):
            mask = self.coco.annToMask(annotation).astype(bool) if annotation.get("segmentation") else np.zeros((1, 1))
            if mask.any():
                objects.append(annotation)
                masks.append(mask)
        return objects, np.stack(masks) if masks else np.zeros((0, 1, 1), bool)

    def absent(self, image_id: int, count: int | None = ABSENT_WORDS) -> list[int]:
        """Class ids that the image was searched for and does not show, always the same ones; None for all of them. The
        frozen sets of drawn scenes bring their own."""
        image = self.coco.imgs[image_id]
        if "absent_words" in image and count == ABSENT_WORDS:
            ids = {word: i for i, word in self.words.items()}
            return [ids[word] for word in image["absent_words"]]
        here = {one["category_id"] for one in self.coco.imgToAnns[image_id]}
        absent = [i for i in (image["neg_category_ids"] if self.lvis else self.words) if i not in here]
        order = np.random.default_rng(image_id).permutation(len(absent))
        return [absent[i] for i in order[: len(absent) if count is None or self.lvis else count]]

    def truth(self, image_ids: list[int], classes: set[int] | None = None) -> Truth:
        """What average precision is measured against, of these classes or of all."""
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
    """A json, or a folder that holds `annotations.json`; the pictures are in `images`, else beside the json.

    Raises:
        InputError: no such file or folder, or another format.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "annotations.json").is_file():
            raise InputError(f"{path} is no test set: it has no annotations.json (tests/data/photos-val has).")
        path = path / "annotations.json"
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; --images names the folder of the pictures.")
    return EvalSet(open_coco(path), folder)


def open_coco(annotations: Path) -> COCO:
    """Raises InputError for what is missing or no COCO json."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(annotations))
    except FileNotFoundError as error:
        raise InputError(f"There is no file {annotations}; name a COCO json.") from error
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise InputError(f"{annotations} is no COCO json of instances: {error}.") from error
    if not coco.anns or not coco.cats:
        raise InputError(f"{annotations} has no annotation or no category, so there is nothing to measure.")
    for annotation in coco.anns.values():  # hand-made files often lack what pycocotools needs
        annotation.setdefault("iscrowd", 0)
        if annotation.get("segmentation") and not {"area", "bbox"} <= annotation.keys():
            code = coco.annToRLE(annotation)
            annotation.setdefault("area", float(rle.area(code)))
            annotation.setdefault("bbox", list(rle.bbox(code)))
    return coco
