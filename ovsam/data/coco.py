"""COCO JSON files: instances with polygons or run lengths. Also reads the output of `ovsam segment --json`."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ovsam.data.base import make_words
from ovsam.data.pictures import PackedList, PictureData, Record, check_pictures
from ovsam.errors import InputError
from ovsam.ops.outlines import check_outline, is_outline


class Coco(PictureData):
    """A COCO JSON file of instances, and the folder of its images.

    Every category is a class name, and every image is annotated for all of them, unless it has `neg_category_ids` as in
    LVIS (Gupta et al. 2019, section 3): then the known class names are those of its instances and of that list, except
    those in its `not_exhaustive_category_ids`. One file may contain images of both kinds. Categories of the same name
    are one class. A crowd (iscrowd) is not an object, but its class is not `known` in that image; nor is a class with
    an annotation that is a box without an outline.

    Args:
        annotations: path of the JSON file.
        images: folder of the images; by default the folder of the JSON file.
        novel: held-out class names: their annotations are skipped, and they are never `known`.
        keep_empty: whether to use images without annotations.
        check: whether to read the header of every image beforehand, so that unreadable ones are listed before training
            starts.
        options: options of PictureData.

    Raises:
        InputError: the file is missing or has another format, an id is unknown or not unique, a category has no name,
            an outline does not fit its image, or there is no instance or no readable image.
    """

    format = "coco"

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path | None = None,
        novel: Collection[str] = (),
        keep_empty: bool = False,
        check: bool = True,
        **options,
    ):
        path = Path(annotations)
        folder = path.parent if images is None else Path(images)
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}; `images` must be the folder of the images.")
        content = read_json(path)
        self._check_format(path, content)
        categories = _by_id(path, "category", "categories", content)
        names = [self._name(path, category) for category in categories.values()]
        novel = self._novel(categories.values(), names, novel)
        words, places = make_words(names, [self._keywords(c) for c in categories.values()], novel)
        super().__init__(words, **options)
        for name, count in Counter(names).items():
            if count > 1:
                self.notes.append(f"Categories called {name!r}, read as one class: {count}.")

        word_ids = dict(zip(categories, places, strict=True))
        pictures = _by_id(path, "image", "images", content)
        objects, unknown = self._sort_annotations(path, content["annotations"], pictures, word_ids)
        used = {key: image for key, image in pictures.items() if keep_empty or objects[key]}
        if not any(objects.values()):
            raise InputError(f"{path} has no instances to train on. {' '.join(self.notes)}".rstrip())
        if len(used) < len(pictures):
            left_out = len(pictures) - len(used)
            self.notes.append(f"Images without objects, skipped (keep_empty = true keeps them): {left_out:,}.")
        files = {key: self._find_file(path, folder, image) for key, image in used.items()}
        sizes = self._measure(used, files, check)
        if not sizes:
            raise InputError(f"None of the {len(used):,} images of {path} can be read; the first: {self.skipped[0]}")

        def records() -> Iterator[Record]:
            for key in tqdm(sizes, desc="reading the outlines", unit="", disable=len(sizes) < 1000):
                width, height = sizes[key]
                for annotation, _ in objects[key]:
                    try:
                        check_outline(annotation["segmentation"], height, width)
                    except InputError as error:
                        name = f"The annotation {annotation.get('id')} of {path} (in {files[key]})"
                        raise InputError(f"{name} {error}.") from error
                yield Record(
                    picture=files[key],
                    outlines=[annotation["segmentation"] for annotation, _ in objects[key]],
                    word_ids=[word for _, word in objects[key]],
                    size=sizes[key],
                    known=self._known(used[key], {word for _, word in objects[key]}, word_ids),
                    unknown=sorted(unknown[key]),
                )

        self.records = PackedList(records())
        self.pictures = len(self.records)
        self.instances = sum(len(objects[key]) for key in sizes)

    def record(self, number: int) -> Record:
        return self.records[number]

    def _sort_annotations(
        self, path: Path, annotations: Sequence[dict], pictures: dict, word_ids: dict
    ) -> tuple[dict[Any, list[tuple[dict, int]]], dict[Any, set[int]]]:
        """Return the objects of each image, as annotation and word, and its words that are not annotated
        exhaustively."""
        objects: dict[Any, list[tuple[dict, int]]] = defaultdict(list)
        unknown: dict[Any, set[int]] = defaultdict(set)
        novel = {i for i, word in enumerate(self.words) if word.split == "novel"}
        crowds, boxes, held_out = 0, 0, 0
        for key in pictures:
            unknown[key] |= novel
        for annotation in annotations:
            key, category = annotation.get("image_id"), annotation.get("category_id")
            for kind, value, there in (("image", key, pictures), ("category", category, word_ids)):
                if value not in there:
                    raise InputError(
                        f"The annotation {annotation.get('id')} of {path} has the {kind} {value!r}, "
                        f"which is missing in the {kind} ids of the file."
                    )
            word = word_ids[category]
            if word in novel:
                held_out += 1
            elif annotation.get("iscrowd"):
                crowds += 1
                unknown[key].add(word)
            elif not is_outline(annotation.get("segmentation")):
                boxes += 1
                unknown[key].add(word)
            else:
                objects[key].append((annotation, word))
        if held_out:
            self.notes.append(f"Annotations of held-out classes, skipped: {held_out:,}.")
        if crowds:
            self.notes.append(f"Annotations of crowds (iscrowd), which are not objects: {crowds:,}.")
        if boxes:
            self.notes.append(f"Annotations with a box but no outline (segmentation), skipped: {boxes:,}.")
        return objects, unknown

    def _measure(self, used: dict, files: dict, check: bool) -> dict[Any, tuple[int, int]]:
        """Return the size for which each readable image is annotated; the others are listed in `skipped`."""
        sizes = {key: _size(image) for key, image in used.items()}
        to_check = [key for key in used if check or not all(sizes[key])]
        found = check_pictures((files[key] for key in to_check), len(to_check))
        for key, header in zip(to_check, found, strict=True):
            if not isinstance(header, str) and not all(sizes[key]):
                sizes[key] = header.upright
            if not self._accept(files[key], header, sizes[key]):
                del sizes[key]
        return sizes

    # Overridden for LVIS.

    def _check_format(self, path: Path, content: Any) -> None:
        partial = _format(content) == "LVIS" and all("file_name" in image for image in content["images"])
        check_format(path, content, "LVIS" if partial else "COCO", "COCO's instances")

    def _name(self, path: Path, category: dict) -> str:
        name = category.get("name")
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"The category {category['id']!r} of {path} has no name; every category needs one.")
        return name.strip()

    def _keywords(self, category: dict) -> Sequence[str]:
        return ()

    def _novel(self, categories: Collection[dict], names: Sequence[str], novel: Collection[str]) -> Collection[str]:
        return novel

    def _find_file(self, path: Path, folder: Path, image: dict) -> str:
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise InputError(f"The image {image['id']!r} of {path} has no file_name; it must name its image file.")
        name = image["file_name"].replace("\\", "/")
        return first_file(folder / name, folder / Path(name).name, Path(name))

    def _known(self, image: dict, present: set[int], word_ids: dict) -> list[int] | None:
        if "neg_category_ids" not in image:
            return None
        absent, doubtful = image["neg_category_ids"], image.get("not_exhaustive_category_ids", ())
        if unknown := [category for category in (*absent, *doubtful) if category not in word_ids]:
            raise InputError(
                f"The image {image['id']!r} names the category {unknown[0]!r} in neg_category_ids or "
                "not_exhaustive_category_ids, which is not among the category ids of the file."
            )
        words = present | {word_ids[category] for category in absent}
        return sorted(words - {word_ids[category] for category in doubtful})


def _size(image: dict) -> tuple[int, int]:
    """Return the width and height in the file, 0 if they are missing."""
    return int(image.get("width") or 0), int(image.get("height") or 0)


def first_file(*candidates: Path) -> str:
    """Return the first path that exists, else the first one."""
    return str(next((path for path in candidates if path.is_file()), candidates[0]))


def _by_id(path: Path, kind: str, table: str, content: dict) -> dict[Any, dict]:
    found: dict[Any, dict] = {}
    for entry in content[table]:
        if "id" not in entry:
            raise InputError(f"{path} has one of its {table} without an id; every {kind} needs a unique id.")
        if found.setdefault(entry["id"], entry) is not entry:
            raise InputError(f"{path} has the {kind} id {entry['id']!r} twice; every {kind} needs a unique id.")
    return found


def read_json(path: Path) -> Any:
    """Load a JSON file; raises InputError if it is missing or invalid."""
    if not path.is_file():
        raise InputError(f"There are no annotations at {path}; check the path.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}.") from error


def check_format(path: Path, content: Any, wanted: str, title: str) -> None:
    """Raise InputError, with the format it looks like, unless a JSON file has the tables of COCO and LVIS."""
    found = _format(content)
    if found != wanted:
        looks = f"looks like {found}" if found else "has an unknown format"
        remedy = '; read it with format = "lvis"' if found == "LVIS" else ""
        remedy = '; read it with format = "coco"' if found == "COCO" else remedy
        raise InputError(
            f"{path} must be a JSON file of {title} (images, annotations, categories); it {looks}{remedy}."
        )


def _format(content: Any) -> str:
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if {"image_id", "score"} <= first.keys():
            return "COCO's results, which have no images and no category names"
        if {"data", "annotations"} <= first.keys():
            return "an export of Label Studio (which can also export COCO)"
        if {"image", "annotations"} <= first.keys():
            return "Create ML's format"
        return ""
    if not isinstance(content, dict):
        return ""
    if all(isinstance(content.get(table), list) for table in ("images", "annotations", "categories")):
        annotations, images = content["annotations"], content["images"]
        if annotations and "segments_info" in annotations[0]:
            return "COCO's panoptic format"
        if images and "neg_category_ids" in images[0]:
            return "LVIS"
        return "COCO"
    for keys, name in (
        (
            ("shapes", "imagePath"),
            "LabelMe's format, one file for each image (`ovsam convert-labels` converts it to COCO)",
        ),
        (("_via_img_metadata",), "a project of the VGG Image Annotator (which can export COCO)"),
        (("image", "annotations"), 'an image of SA-1B; read its folder with format = "sa1b"'),
        (("features",), "GeoJSON"),
        (("images", "annotations"), "COCO's captions, or COCO without its categories"),
    ):
        if all(key in content for key in keys):
            return name
    return ""
