"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovsam.errors import InputError


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file of the same ending, then rename it: the path never holds half a file.

    Raises InputError if the folder does not exist.
    """
    path = Path(path)
    check_folder(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raise InputError unless the folder of this file exists."""
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} does not exist; create it, or write {path.name} elsewhere.")
