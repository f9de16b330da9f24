"""Names of models on the Hub, and whether they are in reach."""

import contextlib
import functools
import threading
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

from ovsam.errors import InputError

PROBE_SECONDS = 2.0
CONFIGS = ("config.json", "open_clip_config.json")  # a repository holds one of them
REFUSALS = (403, 407, 502, 503, 504)  # what a proxy answers that does not let the Hub be asked


def split_revision(name: str) -> tuple[str, str | None]:
    """ "ORG/NAME@REVISION" -> ("ORG/NAME", "REVISION"); a folder may have an @ in its name."""
    if "@" not in name or Path(name).exists():
        return name, None
    repo, _, revision = name.rpartition("@")
    return repo, revision


def cached_folder(name: str) -> Path | None:
    """The snapshot of a Hub repository (or of one revision of it) that was downloaded before, by whatever program:
    configuration and weights are there. The network is not asked."""
    repo, revision = split_revision(name)
    try:
        configs = [try_to_load_from_cache(repo, file, revision=revision) for file in CONFIGS]
    except HFValidationError:
        return None
    folders = {Path(path).parent for path in configs if isinstance(path, str)}
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def hub_answers() -> bool:
    """Whether the Hub can be asked at all: asked once a process, for two seconds at most, not with HF_HUB_OFFLINE."""
    return not constants.HF_HUB_OFFLINE and _status(constants.ENDPOINT) not in (None, *REFUSALS)


def hub_has(repo: str) -> bool:
    """Whether the Hub has a model, and would send it; asked like `hub_answers`."""
    status = None if constants.HF_HUB_OFFLINE else _status(f"{constants.ENDPOINT}/{repo}/resolve/main/config.json")
    return status is not None and status < 400


@functools.cache
def _status(url: str) -> int | None:
    """What is answered to a HEAD request; None where nobody answers in time."""
    answers: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of the HTTP library, which is not the same in every huggingface_hub
            answers.append(get_session().head(url, timeout=PROBE_SECONDS).status_code)

    # In a thread, since no timeout of an HTTP library covers the look-up of the host's name.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return answers[0] if answers else None


def check_in_reach(name: str) -> None:
    """Raises InputError, within seconds, where a model is no folder, not in the cache, and cannot be downloaded."""
    if Path(name).is_dir():
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
        f"{name!r} is no folder and not (wholly) in the cache, and the Hub does not answer: run "
        f"`hf download {repo}{pinned}` where there is a network and HF_HUB_OFFLINE is not set, or pass a folder."
    )
