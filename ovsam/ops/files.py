"""Writing files: a file is written completely or not at all; devices, pipes and stdout are supported."""

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ovsam.errors import InputError, one_line

logger = logging.getLogger(__name__)

STDOUT = "-"
READER_SECONDS = 5.0  # how long to wait for a reader of a pipe
REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is exceeded; free some space or write elsewhere",
    errno.EFBIG: "files may not be larger here; write elsewhere",
    errno.EROFS: "the disk is read-only; write elsewhere",
    errno.EACCES: "permission is denied; write elsewhere",
    errno.EPERM: "permission is denied; write elsewhere",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENXIO: "the pipe has no reader; start the reader first",
    errno.EPIPE: "its reader has closed the pipe; keep the reader running",
    errno.EISDIR: "it is a folder; name a file in it",
    errno.ENOTDIR: "a part of the path is a file, not a folder; write elsewhere",
    errno.EILSEQ: "the name is not allowed for a file; choose another one",
}


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file with the same ending, then move it to `path`, which never holds half a file.

    Symbolic links are followed and missing folders are created. "-" is stdout. Devices, pipes and other special files
    are written into and never replaced.

    Raises:
        InputError: the path cannot be written; an existing file is left unchanged.
    """
    with refused(path):
        if os.fspath(path) == STDOUT:
            with _scratch(write) as temporary, temporary.open("rb") as content:
                sys.stdout.flush()
                shutil.copyfileobj(content, sys.stdout.buffer)
                sys.stdout.buffer.flush()
            return
        target = Path(os.path.realpath(path))
        kind = _kind(target)
        if kind is not None and stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if kind is not None and not stat.S_ISREG(kind):
            with (
                _scratch(write, target.suffix) as temporary,
                temporary.open("rb") as content,
                _open_sink(target) as sink,
            ):
                shutil.copyfileobj(content, sink)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            write(temporary)
            if kind is not None:
                shutil.copymode(target, temporary)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def temporary_beside(target: Path) -> Path:
    """A hidden name in the folder of a file, with its ending, that no other process or thread uses."""
    return target.with_name(f".{secrets.token_hex(8)}{target.suffix[-40:]}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_whole` for text in UTF-8; characters that UTF-8 cannot encode become question marks."""
    content = text.encode("utf-8", "replace")
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def only_files(paths: Iterable[Path], folder: str | os.PathLike[str]) -> list[Path]:
    """The files among the paths found in a folder; a warning counts the pipes, devices and folders, which are
    skipped."""
    named = list(paths)
    found = [path for path in named if path.is_file()]
    if len(found) < len(named):
        logger.warning("%s: %d skipped, which are not files.", one_line(folder), len(named) - len(found))
    return found


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files that `write_whole` left behind when it was killed: with this file's ending beside it,
    or anywhere in this folder. No other process may write there at the same time."""
    found = target.rglob(".*") if target.is_dir() else target.parent.glob(f".*{target.suffix}")
    for path in list(found):
        if re.fullmatch(r"\.[0-9a-f]{16}(\.\w+)?", path.name):
            path.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str], option: str = "") -> None:
    """Raise InputError if a file evidently cannot be written, before anything is computed for it.

    option: name of the command-line option, for the message.
    """
    if os.fspath(path) == STDOUT:
        return
    with refused(path, option):
        target = Path(os.path.realpath(path))
        kind = _kind(target)
        if kind is not None and stat.S_ISDIR(kind):
            raise InputError(f"{_called(path, option)} is a folder; name a file in it.")
        if kind is None or stat.S_ISREG(kind):
            _check_folder(target.parent)
            if len(os.fsencode(target.name)) > 255:
                raise OSError(errno.ENAMETOOLONG, "")
        elif not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, "")


def check_output_folder(path: str | os.PathLike[str], option: str = "") -> None:
    """Raise InputError if files evidently cannot be written into this folder, which need not exist yet."""
    if os.fspath(path) == STDOUT:
        raise InputError(f"{_called(path, option)} takes no several files; name a folder.")
    with refused(path, option):
        _check_folder(Path(os.path.realpath(path)))


def check_new_folder(path: str | os.PathLike[str], option: str = "") -> None:
    """`check_output_folder` for a folder that must not exist yet or be empty."""
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(f"{_called(path, option)} exists already; give the name of a new or empty folder.")
    check_output_folder(path, option)


def _check_folder(folder: Path) -> None:
    while (kind := _kind(folder)) is None:
        if len(os.fsencode(folder.name)) > 255:
            raise OSError(errno.ENAMETOOLONG, "")
        folder = folder.parent
    if not stat.S_ISDIR(kind):
        raise OSError(errno.ENOTDIR, "")
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & getattr(os, "ST_RDONLY", 0)
        raise OSError(errno.EROFS if read_only else errno.EACCES, "")
    with tempfile.TemporaryFile(dir=folder):  # root has every permission, and folders such as /proc take no files
        pass


def _open_sink(target: Path) -> IO[bytes]:
    """Open a device or a pipe for writing, with a time limit for pipes without a reader."""
    deadline = time.monotonic() + READER_SECONDS
    while True:
        try:
            number = os.open(target, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            os.set_blocking(number, True)
            return os.fdopen(number, "wb")


def _kind(path: Path) -> int | None:
    """Return the mode of the file at a path, None if there is none."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _scratch(write: Callable[[Path], Any], suffix: str = "") -> Iterator[Path]:
    """Yield the file that `write` filled, in a folder for temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / f"output{suffix[-40:]}"
        write(temporary)
        yield temporary


@contextlib.contextmanager
def refused(path: str | os.PathLike[str], option: str = "") -> Iterator[None]:
    """Turn errors of the operating system into InputError with a sentence that names the path."""
    try:
        yield
    except OSError as error:
        what = REMEDIES.get(error.errno) or f"{error.strerror or error}; write elsewhere"
        raise InputError(f"{_called(path, option)} cannot be written: {what}.") from error
    except ValueError as error:
        if isinstance(error, InputError) or "null" not in str(error):  # a zero byte in the path
            raise
        raise InputError(
            f"{_called(path, option)} cannot be written: the name is not allowed for a file; choose another one."
        ) from error


def _called(path: str | os.PathLike[str], option: str) -> str:
    name = os.fspath(path)
    shown = "stdout" if name == STDOUT else name if len(name) <= 120 else f"{name[:60]}...{name[-40:]}"
    return f"{option} {shown}".strip()
