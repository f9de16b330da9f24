"""Folders of the checkpoints that come with the package, and of cached files."""

import os
from pathlib import Path

from ovsam.errors import InputError

CACHE = Path(os.environ.get("OVSAM_CACHE") or Path.home() / ".cache" / "ovsam")
PACKAGE = Path(__file__).resolve().parents[1]
TEXT_SHARD = "text_model.safetensors"  # the one file of ovsam-tiny that git does not track; made by hatch_build.py
EMBEDDED = "ovsam-tiny"


def path(name: str = EMBEDDED) -> str:
    """The folder of a checkpoint that comes with ovsam, for `AutoModel.from_pretrained(ovsam.path("ovsam-tiny"))`.

    Raises InputError for a name that does not come with it, or a folder that is not whole.
    """
    if not isinstance(name, str) or name != EMBEDDED:
        raise InputError(f"There is no checkpoint {name!r} in the package, only {EMBEDDED}.")
    return str(find_checkpoint(name))


def find_checkpoint(name: str = EMBEDDED) -> Path:
    """Return the folder of a checkpoint of this project: inside an installed package, else `hub/` of a checkout.

    Raises InputError if there is no such folder, or if its files that git does not track have not been built.
    """
    installed, checkout = PACKAGE / "_checkpoints" / name, PACKAGE.parent / "hub" / name
    if installed.is_dir():
        folder, remedy = installed, "pip install --force-reinstall --no-deps ovsam"
    elif checkout.is_dir():
        folder, remedy = checkout, f"pip install -e {PACKAGE.parent}"
    else:
        raise InputError(
            f"No checkpoint named {name!r} comes with ovsam, only {EMBEDDED}; where that is missing, "
            "`pip install --force-reinstall --no-deps ovsam` restores it."
        )
    if not (folder / TEXT_SHARD).is_file():
        raise InputError(f"{folder} lacks its text tower, {TEXT_SHARD}; run `{remedy}`, which makes it.")
    return folder
