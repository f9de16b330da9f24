"""A folder of weights, looked at before anything trusts it: all shards are there, each header tells the truth about its
file, and what came from the Hub is what the Hub says it is."""

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from ovsam.checkpoints.download import cached_folder, check_in_reach, hub_answers, out_of_reach, split_revision
from ovsam.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPEN_CLIP = "open_clip_model.safetensors"  # where there is an open_clip_config.json and no model of transformers
# Configuration, tokenizer and index, which say what else to download; and the card.
BESIDE = ["*.json", "*.txt", "*.model", "README.md"]


def shards_of(folder: Path) -> dict[str, list[str] | None]:
    """The names of the files that hold a folder's weights, and the tensors that the index says are in each; None where
    one file holds all. They need not be there. Raises InputError for an index that cannot be read."""
    if is_open_clip(folder):
        return {OPEN_CLIP: None}
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return {WHOLE: None}
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
        shards = {shard: [name for name in where if where[name] == shard] for shard in sorted(set(where.values()))}
        if not shards or any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
            raise ValueError("no plain names of safetensors files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX} is no index of safetensors files: save the model again.") from error
    return shards


def is_open_clip(folder: Path) -> bool:
    """Whether a folder has the layout in which open_clip publishes, and not transformers' beside it. (timm puts a
    config.json of its own there, which has no `model_type`.)"""
    config = folder / "config.json"
    if not (folder / "open_clip_config.json").is_file():
        return False
    return not config.is_file() or "model_type" not in json.loads(config.read_text())


def check_weights(folder: Path, finite: bool = False) -> None:
    """See that a folder's weights can be loaded; only headers are read, unless all values are to be `finite`.

    Raises:
        InputError: a missing shard, a header that does not fit its file, a tensor that is not where the index says;
            with `finite`, NaN or infinite weights.
    """
    for shard, names in shards_of(folder).items():
        path = folder / shard
        if not path.is_file():
            raise InputError(f"{folder} lacks {shard}, which holds weights: copy or download it again.")
        try:
            # Opening compares what the header promises with the size of the file, and maps no memory for the rest.
            with safe_open(path, framework="pt") as file:
                if names is not None and set(names) != set(file.keys()):
                    raise InputError(f"{path} does not hold the tensors that {INDEX} says: save the model again.")
                for name in file.keys() if finite else ():
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise InputError(f"{path} holds weights that are NaN or infinite, such as {name}.")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is no whole safetensors file ({error}): its header and its size contradict each other; "
                "copy or download it again."
            ) from error


def fetch(name: str) -> Path:
    """The folder of a model: itself, or the cached snapshot of a Hub repository ("ORG/NAME" or "ORG/NAME@REVISION").

    What is not in the cache is downloaded. A download over plain HTTP is compared by the Hub client with nothing but
    its size, so weights that arrived just now are hashed and compared with the sha256 the Hub has for them.

    Raises:
        InputError: not in reach, the download broke off (what arrived is kept and goes on next time), or the bytes are
            not those of the Hub (they are deleted).
    """
    repo, revision = split_revision(name)
    if Path(repo).is_dir():
        return Path(repo)
    check_in_reach(name)
    if not hub_answers():
        folder = cached_folder(name)
        if folder is None or not all((folder / shard).is_file() for shard in shards_of(folder)):
            raise out_of_reach(name)
        return folder
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=BESIDE))
        missing = [shard for shard in shards_of(folder) if not (folder / shard).is_file()]
        if missing:
            # The name of a snapshot's folder is its commit, so a push in between mixes no two versions.
            snapshot_download(repo, revision=folder.name, allow_patterns=missing)
            _check_arrived(repo, folder, missing)
    except InputError:
        raise
    except Exception as error:  # the client's own errors and those of its HTTP library have no common base
        raise InputError(
            f"{name!r} could not be downloaded ({reason(error)}); what arrived is kept, so try again."
        ) from error
    return folder


def hub_hashes(repo: str, names: list[str], revision: str | None, api: HfApi | None = None) -> dict[str, str]:
    """What the Hub has for files: the sha256 of large ones, git's hash of small ones."""
    found = (api or HfApi()).get_paths_info(repo, names, revision=revision)
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found}


def file_hash(path: Path, like: str = "") -> str:
    """The sha256 of a file; or git's hash of it where `like` is one."""
    if len(like) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Why a call to the Hub failed, in a few words."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the Hub answers {error.response.status_code} {error.server_message or ''}".strip()
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _check_arrived(repo: str, folder: Path, names: list[str]) -> None:
    expected = hub_hashes(repo, names, revision=folder.name)
    for name in names:
        path = folder / name
        if not path.is_file() or name not in expected:
            raise InputError(f"{repo} lacks {name}, which holds weights.")
        if file_hash(path, expected[name]) != expected[name]:
            path.resolve().unlink()  # the bytes themselves: a snapshot's files are links where there can be links
            path.unlink(missing_ok=True)
            raise InputError(
                f"{name} of {repo} did not arrive as the Hub has it (another sha256); it was deleted, so try again."
            )
