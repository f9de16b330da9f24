"""COCO JSON files: instances with polygons or run lengths. Also reads the output of `ovsam segment --json`."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ovsam.data.base import make_words
from ovsam.data.pictures import PackedList, PictureData, Record, check_pictures
from ovsam.errors import InputError
from ovsam.ops.outlines import check_outline, is_outline
from ovsam.ops.schema import place
from ovsam.results.formats.coco_tables import CocoFile, guess_format, other_format, read_tables


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
    schema: Any = CocoFile

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
        if not os.path.isdir(folder):
            raise InputError(f"There is no folder {folder}; `images` must be the folder of the images.")
        content = self._read(path)
        categories = _by_id(path, "category", "categories", content)
        names = [self._name(path, i, category) for i, category in enumerate(categories.values())]
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
        number = {key: i for i, key in enumerate(pictures)}
        files = {key: self._find_file(path, number[key], folder, image) for key, image in used.items()}
        sizes = self._measure(used, files, check)
        if not sizes:
            raise InputError(f"None of the {len(used):,} images of {path} can be read; the first: {self.skipped[0]}")

        def records() -> Iterator[Record]:
            for key in tqdm(sizes, desc="reading the outlines", unit="", disable=len(sizes) < 1000):
                width, height = sizes[key]
                outlines = [content["annotations"][i]["segmentation"] for i, _ in objects[key]]
                for (i, _), outline in zip(objects[key], outlines, strict=True):
                    try:
                        check_outline(outline, height, width)
                    except InputError as error:
                        where = place(f"annotations[{i}].segmentation", path)
                        raise InputError(f"{where} (in {files[key]}) {error}.") from error
                yield Record(
                    picture=files[key],
                    outlines=outlines,
                    word_ids=[word for _, word in objects[key]],
                    size=sizes[key],
                    known=self._known(path, number[key], used[key], {word for _, word in objects[key]}, word_ids),
                    unknown=sorted(unknown[key]),
                )

        self.records = PackedList(records())
        self.pictures = len(self.records)
        self.instances = sum(len(objects[key]) for key in sizes)

    def record(self, number: int) -> Record:
        return self.records[number]

    def _sort_annotations(
        self, path: Path, annotations: Sequence[dict], pictures: dict, word_ids: dict
    ) -> tuple[dict[Any, list[tuple[int, int]]], dict[Any, set[int]]]:
        """Return the objects of each image, as index of the annotation and word, and its words that are not annotated
        exhaustively."""
        objects: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        unknown: dict[Any, set[int]] = defaultdict(set)
        novel = {i for i, word in enumerate(self.words) if word.split == "novel"}
        crowds, boxes, held_out = 0, 0, 0
        for key in pictures:
            unknown[key] |= novel
        for number, annotation in enumerate(annotations):
            key, category = annotation["image_id"], annotation["category_id"]
            for kind, value, there in (("image", key, pictures), ("category", category, word_ids)):
                if value not in there:
                    where = place(f"annotations[{number}].{kind}_id", path)
                    raise InputError(f"{where} is {value!r}, which is missing in the {kind} ids of the file.")
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
                objects[key].append((number, word))
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

    def _read(self, path: Path) -> dict:
        content = read_tables(path, self.schema, ("COCO", "LVIS"), "COCO's instances")
        partial = all("file_name" in image for image in content["images"])  # images of both kinds in one file
        if guess_format(content) == "LVIS" and not partial:
            raise other_format(path, content, "COCO's instances")
        return content

    def _name(self, path: Path, number: int, category: dict) -> str:
        if not (name := category["name"].strip()):
            raise InputError(f"{place(f'categories[{number}].name', path)} is empty; every category needs a name.")
        return name

    def _keywords(self, category: dict) -> Sequence[str]:
        return ()

    def _novel(self, categories: Collection[dict], names: Sequence[str], novel: Collection[str]) -> Collection[str]:
        return novel

    def _find_file(self, path: Path, number: int, folder: Path, image: dict) -> str:
        if not image.get("file_name"):
            raise InputError(f"{place(f'images[{number}]', path)} has no file_name; it must name its image file.")
        name = image["file_name"].replace("\\", "/")
        return first_file(folder / name, folder / Path(name).name, Path(name))

    def _known(self, path: Path, number: int, image: dict, present: set[int], word_ids: dict) -> list[int] | None:
        if "neg_category_ids" not in image:
            return None
        absent, doubtful = image["neg_category_ids"], image.get("not_exhaustive_category_ids", ())
        if unknown := [category for category in (*absent, *doubtful) if category not in word_ids]:
            raise InputError(
                f"{place(f'images[{number}]', path)} has the category {unknown[0]!r} in neg_category_ids or "
                "not_exhaustive_category_ids, which is not among the category ids of the file."
            )
        words = present | {word_ids[category] for category in absent}
        return sorted(words - {word_ids[category] for category in doubtful})


def _size(image: dict) -> tuple[int, int]:
    """Return the width and height in the file, 0 if they are missing."""
    return image.get("width") or 0, image.get("height") or 0


def first_file(*candidates: Path) -> str:
    """Return the first path that exists, else the first one."""
    return str(next((path for path in candidates if os.path.isfile(path)), candidates[0]))


def _by_id(path: Path, kind: str, table: str, content: dict) -> dict[Any, dict]:
    found: dict[Any, dict] = {}
    for number, entry in enumerate(content[table]):
        if found.setdefault(entry["id"], entry) is not entry:
            where = place(f"{table}[{number}].id", path)
            raise InputError(f"{where} is {entry['id']!r}, as that of another {kind}; every {kind} needs its own.")
    return found
