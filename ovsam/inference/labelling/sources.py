"""The input images of a labelling job: files, folders, patterns, lists, archives and addresses.

This module does not import torch: items are sent to the processes that open them.
"""

import csv
import glob
import json
import os
import posixpath
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlparse

from PIL import Image

from ovsam.errors import InputError
from ovsam.processing.images import is_url, open_image
from ovsam.results.formats.base import PICTURES

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
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
        if not self.member and (is_url(self.location) or "://" not in self.location):
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
        if self.member and self.span is None:
            zipped, lock = _open_zip(self.location)
            with lock:
                return zipped.read(self.member)
        start, length = self.span or (0, -1)
        with _open_bytes(self.location) as file:
            file.seek(start)
            return file.read(length)


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
    An http(s) address is that of one image. All other inputs may be on any file system that fsspec supports (s3://,
    gs://, ...).

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
    if is_url(location):
        address = urlparse(location)
        key = f"{address.netloc}{address.path}" + (f"_{address.query}" if address.query else "")
    elif "://" in location:
        key = location.split("://", 1)[1].lstrip("/")
    else:
        key = Path(location).as_posix().lstrip("/")
        if base is not None and Path(location).is_relative_to(base):
            key = Path(location).relative_to(base).as_posix()
    return f"{key}/{member}" if member else key


def _find(given: str) -> Iterator[Place]:
    path = os.path.abspath(given)
    if is_url(given):
        yield given, "", None
    elif "://" in given:
        yield from _find_remote(given)
    elif os.path.isdir(path):
        yield from _find_in_folder(path)
    elif os.path.isfile(path):
        yield from _find_in_file(path)
    elif any(c in given for c in PATTERN):
        matches = sorted(one for one in glob.glob(path, recursive=True) if os.path.isfile(one))
        if not matches:
            raise InputError(f"No file matches {given}; check the pattern.")
        yield from _find_matches(matches)
    else:
        raise InputError(f"There is no {given}; name a file, a folder, a pattern, a list, an archive or an address.")


def _find_matches(locations: Iterable[str]) -> Iterator[Place]:
    for one in locations:
        if PurePosixPath(one).suffix.lower() in (*ARCHIVES, *PICTURES):
            yield from _find_in_file(one)


def _find_in_file(location: str) -> Iterator[Place]:
    """`location` is a path or the address of a file."""
    name = location.lower()
    if name.endswith(ARCHIVES):
        yield from _find_in_archive(location)
    elif name.endswith(LISTS):
        yield from _find_in_list(location)
    elif name.endswith(COMPRESSED):
        raise InputError(f"{location} is compressed as a whole, so its images cannot be read one by one; unpack it.")
    else:
        yield location, "", None


def _find_in_folder(folder: str) -> Iterator[Place]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURES:
                yield os.path.join(place, name), "", None


def _find_in_archive(location: str) -> Iterator[Place]:
    def wanted(name: str) -> bool:
        return Path(name).suffix.lower() in PICTURES and not PurePosixPath(name).name.startswith(".")

    try:
        with _open_bytes(location) as file:
            if location.lower().endswith(".zip"):
                with zipfile.ZipFile(file) as archive:
                    for name in archive.namelist():
                        if wanted(name):
                            yield location, name, None
            else:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        if member.isfile() and wanted(member.name):
                            yield location, member.name, (member.offset_data, member.size)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{location} is not a readable {location[-4:]} archive ({error}).") from error


def _find_in_list(location: str) -> Iterator[Place]:
    with _open_bytes(location) as file:
        text = file.read().decode("utf-8-sig", "replace")
    ending = PurePosixPath(location).suffix.lower()
    if ending == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{location} is not a JSON file: {error}.") from error
        images = content.get("images") if isinstance(content, dict) else None
        if not isinstance(images, list) or not all(
            isinstance(one, dict) and isinstance(one.get("file_name"), str) and one["file_name"] for one in images
        ):
            raise InputError(f"{location} is not a COCO JSON file: it must list its images, each with a file_name.")
        names = [one["file_name"] for one in images]
    elif ending == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if row]
        heads = [head.strip().lower() for head in rows[0]] if rows else []
        column = next((heads.index(name) for name in COLUMNS if name in heads), None)
        rows = rows if column is None else rows[1:]
        names = [row[column or 0].strip() for row in rows if len(row) > (column or 0)]
    else:
        names = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for name in names:
        yield _beside(location, name.replace("\\", "/")), "", None


def _beside(location: str, name: str) -> str:
    """Return the location of a file that a list names relative to its own folder."""
    if "://" in name:
        return name
    if "://" not in location:
        return os.path.normpath(os.path.join(os.path.dirname(location), name))
    scheme, path = location.split("://", 1)
    return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(path), name))}"


def _find_remote(address: str) -> Iterator[Place]:
    """List the images of a file, a folder or a pattern of a file system that fsspec supports."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        if system.isfile(path):
            yield from _find_in_file(address)
            return
        if any(c in path for c in PATTERN):
            found = list(_find_matches(map(system.unstrip_protocol, sorted(system.glob(path)))))
        else:
            found = [
                (system.unstrip_protocol(one), "", None)
                for one in sorted(system.find(path))
                if (name := PurePosixPath(one)).suffix.lower() in PICTURES and not name.name.startswith(".")
            ]
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{address} needs a further package: {error}.") from error
    except Exception as error:  # each file system raises errors of its own
        raise InputError(f"{address} cannot be listed ({error}).") from error
    if not found:
        raise InputError(f"There is no image at {address}; check the address.")
    yield from found


def _open_bytes(location: str) -> IO[bytes]:
    if "://" not in location:
        return open(location, "rb")
    import fsspec

    return fsspec.open(location, "rb").open()


@lru_cache(maxsize=64)
def _open_zip(location: str) -> tuple[zipfile.ZipFile, threading.Lock]:
    """Open a zip file and keep it open, since its table of contents may be long."""
    return zipfile.ZipFile(_open_bytes(location)), threading.Lock()
