"""Names of models on the Hub, and whether they can be downloaded."""

import contextlib
import functools
import os
import threading
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

from ovsam.errors import InputError

PROBE_SECONDS = 2.0
CONFIGS = ("config.json", "open_clip_config.json")  # a repository has one of them
REFUSALS = (403, 407, 502, 503, 504)  # responses of a proxy that blocks the Hub


def split_revision(name: str) -> tuple[str, str | None]:
    """ "ORG/NAME@REVISION" -> ("ORG/NAME", "REVISION"); the name of a folder may contain an @."""
    if "@" not in name or os.path.exists(name):
        return name, None
    repo, _, revision = name.rpartition("@")
    return repo, revision


def cached_folder(name: str) -> Path | None:
    """Return the snapshot of a Hub repository (or of one revision) in the cache, from any program, if it has
    configuration and weights. Does not use the network."""
    repo, revision = split_revision(name)
    try:
        configs = [try_to_load_from_cache(repo, file, revision=revision) for file in CONFIGS]
    except HFValidationError:
        return None
    folders = {Path(path).parent for path in configs if isinstance(path, str)}
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def hub_answers() -> bool:
    """Whether the Hub responds: tried once a process, for at most two seconds; False with HF_HUB_OFFLINE."""
    return not constants.HF_HUB_OFFLINE and _status(constants.ENDPOINT) not in (None, *REFUSALS)


def hub_has(repo: str) -> bool:
    """Whether a model can be downloaded from the Hub; tried like `hub_answers`."""
    status = None if constants.HF_HUB_OFFLINE else _status(f"{constants.ENDPOINT}/{repo}/resolve/main/config.json")
    return status is not None and status < 400


@functools.cache
def _status(url: str) -> int | None:
    """Status of a HEAD request; None without a response in time."""
    answers: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # the HTTP library depends on the version of huggingface_hub
            answers.append(get_session().head(url, timeout=PROBE_SECONDS).status_code)

    # In a thread, since the timeouts of HTTP libraries do not include the look-up of the host name.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return answers[0] if answers else None


def check_in_reach(name: str) -> None:
    """Raise InputError, within seconds, if a model is not a folder, not in the cache, and cannot be downloaded."""
    if os.path.isdir(name):
        return
    repo, _ = split_revision(name)
    try:
        validate_repo_id(repo)
        known = repo.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise InputError(f"{name!r} is neither a folder nor the id of a model on the Hub, ORG/NAME[@REVISION].")
    if cached_folder(name) is None and not hub_answers():
        raise out_of_reach(name)


def out_of_reach(name: str) -> InputError:
    repo, revision = split_revision(name)
    pinned = f" --revision {revision}" if revision else ""
    return InputError(
        f"{name!r} is not a folder and not (completely) in the cache, and the Hub does not respond: run "
        f"`hf download {repo}{pinned}` with a network and without HF_HUB_OFFLINE, or pass a folder."
    )


def check_repository(repo: str, revision: str | None = None, create_pr: bool = False) -> None:
    """Raises InputError for a name that is not ORG/NAME, and for a pull request together with a branch."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(
            f"{repo!r} is not the name of a repository; it must be ORG/NAME of letters and digits, -, _ and ."
        ) from None
    if repo.count("/") != 1:
        raise InputError(f"{repo!r} lacks the user or organisation; it must be ORG/NAME.")
    if create_pr and revision:
        raise InputError("A pull request is opened against the default branch: leave out --revision or --create-pr.")
