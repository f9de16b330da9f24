"""Where the checkpoint that comes with the package lies."""

from pathlib import Path

from ovsam.errors import InputError

PACKAGE = Path(__file__).resolve().parent
TEXT_SHARD = "text_model.safetensors"  # the one file that git does not track: hatch_build.py makes it


def find_checkpoint(name: str = "ovsam-tiny") -> Path:
    """Return the folder of an embedded checkpoint: inside an installed package, else `hub/` of a checkout.

    Raises InputError if there is no such folder, or if its text tower was never built.
    """
    installed, checkout = PACKAGE / "_checkpoints" / name, PACKAGE.parent / "hub" / name
    if installed.is_dir():
        folder, remedy = installed, "pip install --force-reinstall --no-deps ovsam"
    elif checkout.is_dir():
        folder, remedy = checkout, f"pip install -e {PACKAGE.parent}"
    else:
        raise InputError(
            f"No checkpoint named {name!r} comes with ovsam, only ovsam-tiny; where that is missing, "
            "`pip install --force-reinstall --no-deps ovsam` brings it back."
        )
    if not (folder / TEXT_SHARD).is_file():
        raise InputError(f"{folder} lacks its text tower, {TEXT_SHARD}; run `{remedy}`, which puts it there.")
    return folder
