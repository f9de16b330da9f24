"""LVIS v1: COCO's layout, but no image is annotated for all 1,203 class names (Gupta et al. 2019, section 3)."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict
from urllib.parse import urlparse

from ovsam.data.coco import Coco, first_file
from ovsam.errors import InputError
from ovsam.ops.schema import place
from ovsam.results.formats.coco import CocoAnnotation, CocoCategory
from ovsam.results.formats.coco_tables import PartialImage, read_tables

# Two errors of the file, corrected as in the vocabulary "lvis".
MENDED = {
    "speaker (stero equipment)": "speaker (stereo equipment)",
    "monitor (computer equipment) computer monitor": "monitor (computer equipment)",
}


class LvisCategory(CocoCategory):
    frequency: str
    synonyms: NotRequired[list[str]]


class LvisFile(TypedDict):
    images: list[PartialImage]
    categories: list[LvisCategory]
    annotations: list[CocoAnnotation]


class Lvis(Coco):
    """An LVIS v1 JSON file, and the folder of COCO's images: the parent of train2017 and val2017, or one of those.

    The known class names of an image are those of its instances and those without any instance (neg_category_ids),
    except those that were not annotated exhaustively (not_exhaustive_category_ids). Underscores are read as spaces;
    synonyms become keywords.

    Args:
        rare_is_novel: whether to hold out the classes of frequency "r" (337 of the 1,203), as open-vocabulary LVIS
            does.
        annotations, images, novel, keep_empty, check, options: as in Coco.
    """

    format = "lvis"
    schema: Any = LvisFile

    def __init__(
        self, annotations: str | Path, images: str | Path | None = None, rare_is_novel: bool = False, **options
    ):
        self.rare_is_novel = rare_is_novel
        super().__init__(annotations, images, **options)

    def _read(self, path: Path) -> dict:
        return read_tables(path, self.schema, ("LVIS",), "LVIS v1")

    def _name(self, path: Path, number: int, category: dict) -> str:
        name = _spaced(super()._name(path, number, category))
        return MENDED.get(name, name)

    def _keywords(self, category: dict) -> Sequence[str]:
        return [_spaced(synonym) for synonym in category.get("synonyms", ())]

    def _novel(self, categories: Collection[dict], names: Sequence[str], novel: Collection[str]) -> Collection[str]:
        pairs = zip(categories, names, strict=True)
        rare = [name for category, name in pairs if self.rare_is_novel and category["frequency"] == "r"]
        return [*novel, *rare]

    def _find_file(self, path: Path, number: int, folder: Path, image: dict) -> str:
        address = image.get("coco_url") or image.get("file_name")
        if not address:
            raise InputError(f"{place(f'images[{number}]', path)} has neither a coco_url nor a file_name.")
        *_, split, name = "", *Path(urlparse(address).path).parts
        return first_file(folder / split / name, folder / name)


def _spaced(name: str) -> str:
    return name.replace("_", " ").strip()
