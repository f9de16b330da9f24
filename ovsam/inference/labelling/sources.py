"""The input images of a labelling job: files, folders, patterns, lists, archives and addresses.

This module does not import torch: items are sent to the processes that open them.
"""

import csv
import glob
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from PIL import Image

from ovsam.errors import InputError
from ovsam.processing.images import is_url, open_image
from ovsam.results.formats.base import PICTURES, load_json

ARCHIVES = (".zip", ".tar")
LISTS = (".txt", ".csv", ".json")
PATTERN = "*?["
COLUMNS = ("path", "image", "file_name", "filename", "file", "url")  # of a CSV list


@dataclass(frozen=True, slots=True)
class Item:
    """One image to label.

    `key` is its name in label files and in the journal: the path relative to the common folder of the inputs.
    `location` is a path, an address, or the archive that holds it as `member`; `span` is its first byte and its length
    in a tar.
    """

    key: str
    location: str
    member: str = ""
    span: tuple[int, int] | None = None

    def open(self) -> Image.Image:
        """Open the upright RGB image; raises InputError if it is missing, damaged or not an image."""
        if not self.member and ("://" not in self.location or is_url(self.location)):
            return open_image(self.location)
        try:
            content = self._read()
        except Exception as error:  # each archive and file system raises errors of its own
            raise InputError(f"{self.name} cannot be read ({error}).") from error
        try:
            return open_image(content)
        except InputError as error:
            raise InputError(str(error).replace("The image", self.name, 1)) from error

    @property
    def name(self) -> str:
        return f"{self.member} in {self.location}" if self.member else self.location

    def _read(self) -> bytes:
        if self.span is not None:
            with open(self.location, "rb") as archive:
                archive.seek(self.span[0])
                return archive.read(self.span[1])
        if self.member:
            zipped, lock = _open_zip(self.location)
            with lock:
                return zipped.read(self.member)
        import fsspec

        with fsspec.open(self.location, "rb") as file:
            return file.read()


@dataclass(frozen=True)
class Listing:
    """The items of a job, sorted by key; `root` is the folder that keys are relative to, if all are files in it."""

    items: list[Item]
    root: Path | None


def list_items(inputs: Sequence[str]) -> Listing:
    """List the images of files, folders, patterns, lists, archives and addresses.

    Folders are searched recursively, without hidden files. A .txt list has a path or an address a line, a .csv list a
    column called path, image, file_name, filename, file or url (or else the first), a COCO JSON file its images;
    relative paths in a list refer to its folder. Archives are .zip and uncompressed .tar files, as in WebDataset.
    Addresses are http(s) of one image each, and those of any file system that fsspec opens (s3://, gs://, ...): of an
    image, of a folder, or a pattern.

    Raises:
        InputError: an input does not exist, a list is invalid, an archive is damaged or compressed as a whole, there
            are no images, or two images have the same name.
    """
    roots = [root for one in inputs if (root := _root(one)) is not None]
    base = Path(os.path.commonpath(roots)) if roots else None
    found: dict[str, Item] = {}
    for one in inputs:
        for location, member, span in _find(one):
            item = Item(_key(location, member, base), location, member, span)
            if (other := found.setdefault(item.key, item)) != item:
                raise InputError(f"{other.name} and {item.name} have the same name, {item.key}; label them apart.")
    if not found:
        raise InputError(f"There is no image in {', '.join(inputs)}; images end in {', '.join(PICTURES)}.")
    items = [found[key] for key in sorted(found)]
    plain = base is not None and all(not item.member and "://" not in item.location for item in items)
    return Listing(items, base if plain else None)


Place = tuple[str, str, tuple[int, int] | None]  # location, member, span


def _root(given: str) -> str | None:
    """Return the folder that keys of an input are relative to; None for addresses."""
    if "://" in given:
        return None
    path = os.path.abspath(given)
    if os.path.isdir(path):
        return path
    parts = Path(path).parts
    fixed = next((i for i, part in enumerate(parts) if any(c in part for c in PATTERN)), len(parts) - 1)
    return str(Path(*parts[: min(fixed, len(parts) - 1)]))


def _key(location: str, member: str, base: Path | None) -> str:
    if "://" in location:
        address = urlparse(location)
        key = f"{address.netloc}{address.path}" + (f"_{address.query}" if address.query else "")
    else:
        key = Path(location).as_posix().lstrip("/")
        if base is not None and Path(location).is_relative_to(base):
            key = Path(location).relative_to(base).as_posix()
    return f"{key}/{member}" if member else key


def _find(given: str) -> Iterator[Place]:
    if "://" in given:
        yield from _find_remote(given)
        return
    path = Path(os.path.abspath(given))
    if path.is_dir():
        yield from _find_in_folder(path)
    elif path.is_file():
        ending = path.suffix.lower()
        if ending in ARCHIVES:
            yield from _find_in_archive(path)
        elif ending in LISTS:
            yield from _find_in_list(path)
        elif path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
            raise InputError(f"{given} is compressed as a whole, so its images cannot be read one by one; unpack it.")
        else:
            yield str(path), "", None
    elif any(c in given for c in PATTERN):
        matches = sorted(one for one in glob.glob(str(path), recursive=True) if os.path.isfile(one))
        if not matches:
            raise InputError(f"No file matches {given}; check the pattern.")
        for one in matches:
            if Path(one).suffix.lower() in (*ARCHIVES, *PICTURES):
                yield from _find(one)
    else:
        raise InputError(f"There is no {given}; name a file, a folder, a pattern, a list, an archive or an address.")


def _find_in_folder(folder: Path) -> Iterator[Place]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURES:
                yield os.path.join(place, name), "", None


def _find_in_archive(path: Path) -> Iterator[Place]:
    def wanted(name: str) -> bool:
        return Path(name).suffix.lower() in PICTURES and not PurePosixPath(name).name.startswith(".")

    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if wanted(name):
                        yield str(path), name, None
        else:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile() and wanted(member.name):
                        yield str(path), member.name, (member.offset_data, member.size)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{path} is not a readable {path.suffix} archive ({error}).") from error


def _find_in_list(path: Path) -> Iterator[Place]:
    ending = path.suffix.lower()
    if ending == ".json":
        content = load_json(path)
        images = content.get("images") if isinstance(content, dict) else None
        if not isinstance(images, list) or not all(isinstance(one, dict) and one.get("file_name") for one in images):
            raise InputError(f"{path} is not a COCO JSON file: it must list its images, each with a file_name.")
        names = [one["file_name"] for one in images]
    else:
        text = path.read_text(encoding="utf-8-sig")
        names = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        if ending == ".csv":
            rows = [row for row in csv.reader(text.splitlines()) if row]
            heads = [head.strip().lower() for head in rows[0]] if rows else []
            column = next((heads.index(name) for name in COLUMNS if name in heads), None)
            rows = rows if column is None else rows[1:]
            names = [row[column or 0].strip() for row in rows if len(row) > (column or 0)]
    for name in names:
        yield (name if "://" in name else os.path.normpath(path.parent / name.replace("\\", "/"))), "", None


def _find_remote(address: str) -> Iterator[Place]:
    if is_url(address):
        yield address, "", None
        return
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"{address} needs fsspec; `pip install fsspec`, and its package for this system.") from error

    try:
        system, path = fsspec.core.url_to_fs(address)
        scheme = address.split("://")[0]
        if any(c in path for c in PATTERN):
            found = system.glob(path)
        else:
            found = [path] if system.isfile(path) else system.find(path)
    except Exception as error:  # each file system raises errors of its own
        raise InputError(f"{address} cannot be listed ({error}).") from error
    if not found:
        raise InputError(f"There is nothing at {address}; check the address.")
    for one in sorted(found):
        if Path(one).suffix.lower() in PICTURES:
            yield f"{scheme}://{one.removeprefix(f'{scheme}://')}", "", None


@lru_cache(maxsize=64)
def _open_zip(path: str) -> tuple[zipfile.ZipFile, threading.Lock]:
    """Open a zip file and keep it open, since its table of contents may be long."""
    return zipfile.ZipFile(path), threading.Lock()
