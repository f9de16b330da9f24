"""The journal of a labelling job: one record for each image, appended when it is done, so that jobs can be resumed.

A line is the CRC-32 of its JSON in hexadecimal, a space, and the JSON. The first line describes the job: only the same
job can continue it. An incomplete record of a killed process is dropped at the next start, and its image is labelled
again.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from ovsam.errors import InputError
from ovsam.results.formats.base import Labelled, LabelledImage
from ovsam.results.instance import Instance

VERSION = 1
NAMES = tuple(field.name for field in fields(Instance))


class Journal:
    """A journal that is opened for appending; use it as a context manager.

    Args:
        path: path of its file, created if it does not exist.
        job: description of the job as plain JSON: the question, the model, the inputs.
        facts: further content of the first line, such as the shard.

    Attributes:
        done: keys of the images with a record.

    Raises:
        InputError: the journal belongs to another job or is written by another process, or the folder is not writable.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], facts: Mapping[str, Any] | None = None):
        self.path = path
        described: dict[str, Any] = json.loads(json.dumps(job))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{path}.lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise InputError(f"Another process is writing {path}; wait for it, or label into another folder.") from None
        except OSError as error:
            raise InputError(
                f"{path.parent} cannot be written to ({error.strerror or error}); choose another folder."
            ) from error
        try:
            self._open(described, facts or {})
        except BaseException:
            self._lock.release()
            raise

    def _open(self, job: dict[str, Any], facts: Mapping[str, Any]) -> None:
        self.done: set[str] = set()
        end = 0
        if self.path.exists() and self.path.stat().st_size:
            old = read_header(self.path)
            if old is not None:
                if difference := _difference(old["job"], job):
                    raise InputError(
                        f"{self.path} is the journal of another command ({difference}); repeat that command to "
                        "continue, or label into another folder."
                    )
                lines = [(key, stop) for key, _, stop in _scan(self.path)]
                self.done = {key for key, _ in lines if key is not None}
                end = lines[-1][1]
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.truncate(self._file, end)  # the rest is an incomplete record
        except OSError as error:
            raise InputError(f"{self.path} cannot be written to ({error.strerror or error}).") from error
        self._end = end
        if not end:
            self._write([{"ovsam_journal": VERSION, "job": job, **facts}])

    def append(self, results: Iterable[Labelled]) -> None:
        """Write one record for each image, synced to the disk; raises InputError if the disk is full."""
        results = [result for result in results if result.file_name not in self.done]
        if results:
            self._write([to_record(result) for result in results])
            self.done |= {str(result.file_name) for result in results}

    def finish(self, failed: int) -> None:
        """Record that all images have been tried."""
        self._write([{"finished": len(self.done), "failed": failed}])

    def _write(self, records: Sequence[Any]) -> None:
        content = b"".join(_line(record) for record in records)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            os.truncate(self._file, self._end)  # remove an incomplete record
            raise InputError(
                f"{self.path} cannot be written ({error.strerror or error}); its records of {len(self.done)} images "
                "are kept: free some space, and run the same command again."
            ) from error
        self._end += len(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)
        self._lock.release()


class Journals:
    """One or more journals of a job for reading; iteration yields the images, sorted by key, one at a time.

    Raises InputError for journals of different jobs, other files, or missing shards.
    """

    def __init__(self, paths: Sequence[Path]):
        self.unfinished: list[Path] = []
        self._places: dict[str, tuple[Path, int, int]] = {}
        self.header: dict[str, Any] = {}
        shards = set()
        for path in paths:
            header = read_header(path)
            if header is None:
                raise InputError(f"{path} is not a journal of `ovsam label`.")
            if self.header and (difference := _difference(self.header["job"], header["job"])):
                raise InputError(
                    f"{path} belongs to another command than {paths[0]} ({difference}); merge journals of one command."
                )
            self.header = self.header or header
            shards.add(tuple(header.get("shard", (1, 1))))
            finished = False
            for key, start, end in _scan(path):
                finished = key is None and start > 0
                if key is not None:
                    self._places.setdefault(key, (path, start, end))
            if not finished:
                self.unfinished.append(path)
        counts = {count for _, count in shards}
        if len(counts) > 1:
            raise InputError("These journals have different numbers of shards; label with the same number.")
        missing = sorted(set(range(1, max(counts, default=0) + 1)) - {number for number, _ in shards})
        if missing:
            raise InputError(
                f"The journals of shard {', '.join(map(str, missing))} of {max(counts)} are missing; "
                "label these shards first."
            )
        self.keys = sorted(self._places)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[LabelledImage]:
        files = {path: open(path, "rb") for path in {path for path, _, _ in self._places.values()}}
        try:
            for key in self.keys:
                path, start, end = self._places[key]
                files[path].seek(start)
                yield from_record(_parse(files[path].read(end - start)))
        finally:
            for file in files.values():
                file.close()


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the first line; None if it is incomplete. Raises InputError if the file is not a journal."""
    if not os.path.isfile(path):
        raise InputError(f"There is no journal {path}; check the path.")
    with open(path, "rb") as file:
        line = file.readline()
    header = _parse(line)
    if header is None and not line.endswith(b"\n"):
        return None
    if not isinstance(header, dict) or "ovsam_journal" not in header:
        raise InputError(f"{path} is not a journal of `ovsam label`.")
    if header["ovsam_journal"] != VERSION:
        raise InputError(f"{path} is a journal of version {header['ovsam_journal']}; this ovsam reads {VERSION}.")
    return header


def to_record(result: Labelled) -> dict[str, Any]:
    """Convert an image with its instances to plain JSON."""
    instances = [{name: getattr(instance, name) for name in NAMES} for instance in result]
    return {"key": result.file_name, "size": list(result.size), "model": result.model, "instances": instances}


def from_record(record: Mapping[str, Any]) -> LabelledImage:
    instances = [
        Instance(**one | {"bbox": tuple(one["bbox"]), "topk": [(name, score) for name, score in one["topk"]]})
        for one in record["instances"]
    ]
    return LabelledImage(tuple(record["size"]), record["key"], instances, record["model"])


def _line(record: Any) -> bytes:
    content = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _parse(line: bytes) -> Any:
    """Return the record of a line; None if it is incomplete."""
    checksum, content = line[:8], line[9:-1]
    if not line.endswith(b"\n") or b"%08x" % zlib.crc32(content) != checksum:
        return None
    return json.loads(content)


def _scan(path: Path) -> Iterator[tuple[str | None, int, int]]:
    """Yield key, first byte and end of each complete line; the key is None for lines about the job. Damaged lines are
    left out, so that their images are labelled again."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            end = start + len(line)
            record = _parse(line)
            if record is not None:
                yield record.get("key"), start, end
            start = end


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the first difference between two jobs, "" if they are equal."""
    for name in (*new, *old):
        if old.get(name) != new.get(name):
            return f"its {name} is {_short(old.get(name))}, not {_short(new.get(name))}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
