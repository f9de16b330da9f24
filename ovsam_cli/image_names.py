"""The images that the arguments of `ovsam segment` stand for."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from ovsam.errors import InputError
from ovsam.ops.files import STDOUT, only_files
from ovsam.ops.schema import read_text
from ovsam.processing.images import is_url
from ovsam.results.formats.base import PICTURES


def list_images(given: list[str], depth: int = 0) -> Iterator[str]:
    """Yield the names of images: files, URLs and -, and those of folders, patterns and @lists."""
    for name in given:
        if name == STDOUT or is_url(name) or os.path.isfile(name):
            yield name
        elif name.startswith("@") and depth == 0:
            yield from list_images(_read_list(name[1:]), depth + 1)
        elif os.path.isdir(name):
            named = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in PICTURES)
            inside = [str(path) for path in only_files(named, name)]
            if not inside:
                raise InputError(f"{name} is a folder without images; they end in {', '.join(PICTURES)}.")
            yield from inside
        elif glob.has_magic(name):
            matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not matches:
                raise InputError(f"There is no file like {name}; check the pattern.")
            yield from matches
        else:
            yield name  # reported when it is opened


def _read_list(path: str) -> list[str]:
    """The lines of a text file; relative paths start from its folder."""
    lines = read_text(path, "list of images").splitlines()
    named = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not named:
        raise InputError(f"The list {path} is empty; it must be a text file with one image a line.")
    return [line if is_url(line) else os.path.join(os.path.dirname(path), line) for line in named]
