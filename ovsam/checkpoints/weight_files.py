"""Validation of weight folders: shards, headers and, for downloads, hashes."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from ovsam.checkpoints.download import cached_folder, check_in_reach, hub_answers, out_of_reach, split_revision
from ovsam.checkpoints.embedded import EMBEDDED, find_checkpoint
from ovsam.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPEN_CLIP = "open_clip_model.safetensors"  # in folders with open_clip_config.json and without a model of transformers
# Configuration, tokenizer and index, which determine further files to download; and the card.
BESIDE = ["*.json", "*.txt", "*.model", "README.md"]


def shards_of(folder: Path) -> dict[str, list[str] | None]:
    """Return the names of the weight files of a folder, with the tensors that the index lists for each; None if there
    is only one file. They need not exist. Raises InputError for an unreadable index."""
    if is_open_clip(folder):
        return {OPEN_CLIP: None}
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return {WHOLE: None}
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
        shards = {shard: [name for name in where if where[name] == shard] for shard in sorted(set(where.values()))}
        if not shards or any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
            raise ValueError("it must list names of safetensors files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX} is not an index of safetensors files: save the model again.") from error
    return shards


def is_open_clip(folder: Path) -> bool:
    """Whether a folder has the layout of open_clip without a model of transformers. (timm adds a config.json without
    `model_type`.)"""
    config = folder / "config.json"
    if not (folder / "open_clip_config.json").is_file():
        return False
    return not config.is_file() or "model_type" not in json.loads(config.read_text())


def check_weights(folder: Path, finite: bool = False) -> None:
    """Check that the weights of a folder can be loaded; only headers are read, unless `finite` asks for all values.

    Raises:
        InputError: a shard is missing, a header does not fit its file, or a tensor is not in the file of the index;
            with `finite`, weights are NaN or infinite.
    """
    for shard, names in shards_of(folder).items():
        path = folder / shard
        if not path.is_file():
            raise InputError(f"{folder} lacks the weight file {shard}: copy or download it again.")
        try:
            # Opening compares the header with the size of the file, and maps no memory for the rest.
            with safe_open(path, framework="pt") as file:
                if names is not None and set(names) != set(file.keys()):
                    raise InputError(f"{path} does not have the tensors that {INDEX} lists: save the model again.")
                for name in file.keys() if finite else ():
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise InputError(f"{path} has weights that are NaN or infinite, such as {name}.")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a complete safetensors file ({error}): its header and its size do not match; "
                "copy or download it again."
            ) from error


def fetch(name: str) -> Path:
    """Return the folder of a model: itself, that of the embedded checkpoint, or the cached snapshot of a Hub repository
    ("ORG/NAME" or "ORG/NAME@REVISION").

    Missing files are downloaded. The Hub client checks only the size of a download over plain HTTP, so new weights are
    hashed and compared with the sha256 of the Hub.

    Raises:
        InputError: the model cannot be downloaded, the download was interrupted (complete files are kept and the next
            call resumes), or the hash differs from the Hub's (the file is deleted).
    """
    repo, revision = split_revision(name)
    if os.path.isdir(repo):
        return Path(repo)
    if name == EMBEDDED:
        return find_checkpoint(name)
    check_in_reach(name)
    if not hub_answers():
        folder = cached_folder(name)
        if folder is None or not all((folder / shard).is_file() for shard in shards_of(folder)):
            raise out_of_reach(name)
        return folder
    with hub_errors(f"{name!r} could not be downloaded ({{}}); complete files are kept, so try again."):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=BESIDE))
        missing = [shard for shard in shards_of(folder) if not (folder / shard).is_file()]
        if missing:
            # The folder of a snapshot is named after its commit, so a push in between cannot mix two versions.
            snapshot_download(repo, revision=folder.name, allow_patterns=missing)
            _check_arrived(repo, folder, missing)
    return folder


@contextmanager
def hub_errors(sentence: str) -> Iterator[None]:
    """Raise errors of the Hub's client as InputError; `sentence` has {} in place of the reason."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the client's own errors and those of its HTTP library have no common base
        raise InputError(sentence.replace("{}", reason(error))) from error


def hub_hashes(repo: str, names: list[str], revision: str | None, api: HfApi | None = None) -> dict[str, str]:
    """Return the Hub's hashes of files: sha256 for large ones, git's hash for small ones."""
    found = (api or HfApi()).get_paths_info(repo, names, revision=revision)
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found}


def file_hash(path: Path, like: str = "") -> str:
    """Return the sha256 of a file, or git's hash if `like` is one."""
    if len(like) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Describe the error of a call to the Hub in a few words."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the Hub responds {error.response.status_code} {error.server_message or ''}".strip()
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _check_arrived(repo: str, folder: Path, names: list[str]) -> None:
    expected = hub_hashes(repo, names, revision=folder.name)
    for name in names:
        path = folder / name
        if not path.is_file() or name not in expected:
            raise InputError(f"{repo} lacks the weight file {name}.")
        if file_hash(path, expected[name]) != expected[name]:
            path.resolve().unlink()  # the file itself: files of a snapshot are links if links are possible
            path.unlink(missing_ok=True)
            raise InputError(
                f"{name} of {repo} was damaged in the download (another sha256); it was deleted, so try again."
            )
