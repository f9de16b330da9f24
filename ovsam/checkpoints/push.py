"""Publishing a model or an adapter on the Hub: built in a folder of its own, loaded back, compared, then uploaded."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, constants, get_token
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

from ovsam.checkpoints.cards import check_card, default_card
from ovsam.checkpoints.download import check_repository
from ovsam.checkpoints.embedded import PACKAGE
from ovsam.checkpoints.settings import check_configs
from ovsam.checkpoints.weight_files import INDEX, check_weights, file_hash, hub_errors, hub_hashes, reason, shards_of
from ovsam.errors import InputError
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.remote_code import SHIM, RemoteCodeConfig, auto_map, write_shim
from ovsam.processing.processing_ovsam import OVSamProcessor

CARD, PROCESSOR = "README.md", "processor_config.json"
# Files that a folder may have besides weights, configuration, card and images of the card. Nothing else is uploaded:
# the folder of a training run also has optimiser states and logs.
BESIDE = (
    "added_tokens.json",
    "merges.txt",
    "preprocessor_config.json",
    PROCESSOR,
    "recipe.toml",
    "results.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE",
)
MAX_FILE = constants.MAX_HTTP_DOWNLOAD_SIZE  # bytes; larger files cannot be downloaded by all clients
MAX_PICTURE = 2_000_000  # bytes
# Weights of an earlier push that are not replaced are deleted, since transformers would load them with the new ones.
OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
TOLERANCE = 1e-4
REFERENCE = "reference.safetensors"

# Runs in a process that has only the built folder: first without ovsam imported, then with it.
LOAD_BACK = """
import sys
from transformers import AutoModel, AutoProcessor
folder, reference, whole, package = sys.argv[1:]
sys.path.append(package)  # for a checkout that is not installed
trusted = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True) if whole else None
from ovsam.checkpoints.push import compare
compare(trusted, processor, reference, "with trust_remote_code")
del trusted
plain = AutoModel.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder) if whole else None
compare(plain, processor, reference, "with ovsam imported")
"""


@dataclass
class HubFolder:
    """A folder ready for upload. `left_out` are files of the source that are not in it; `notes` are for the user."""

    folder: Path
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def files(self) -> dict[str, int]:
        """Files of the upload, with sizes in bytes."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


def push(
    folder: str | os.PathLike,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> str:
    """Publish the folder of an OVSam model (with its processor) or of an adapter, and return its address.

    Args:
        repo: "ORG/NAME"; created if it does not exist.
        private: whether only users with access see the repository; an error if it exists and is public.
        revision: branch, created if it does not exist; None for the default branch.
        create_pr: whether to open a pull request instead of committing.
        dry_run: whether to stop before anything is uploaded; returns "" then.

    Prints the files of the upload.

    Raises:
        InputError: the folder cannot be published, found before anything is uploaded; or the upload failed.
    """
    folder = Path(folder)
    check_repository(repo, revision, create_pr)
    check_folder(folder)
    if not dry_run and not get_token():
        raise InputError(
            "There is no token for the Hub: run `hf auth login`, or set HF_TOKEN, to a token with write permission."
        )
    with tempfile.TemporaryDirectory(prefix="ovsam-push-") as scratch:
        built = build(folder, repo, Path(scratch))
        where = f"a pull request to {repo}" if create_pr else repo + (f", branch {revision}" if revision else "")
        print(f"{where} ({'private' if private else 'as visible as it is, public if new'}):")
        for name, size in built.files().items():
            print(f"  {name:<34} {size:>14,} bytes")
        for note in built.notes + ([f"not sent: {', '.join(built.left_out)}"] if built.left_out else []):
            print(f"  {note}")
        if dry_run:
            print("loaded back with equal outputs; nothing was sent (--dry-run)")
            return ""
        return upload(built, repo, private, revision, create_pr)


def check_folder(folder: Path) -> RemoteCodeConfig:
    """Return the configuration of a folder that can be published; raises InputError for any other folder."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; pass the folder of a model.")
    check_configs(folder, str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration class may raise anything over values it does not expect
        raise InputError(f"{folder} is not an OVSam model or adapter: its config.json is of another kind.") from error
    if not isinstance(config, RemoteCodeConfig) or "AutoModel" not in config.auto_classes:
        raise InputError(f"{folder} is a {config.model_type}; it must be an OVSam model or one of its adapters.")
    check_weights(folder, finite=True)
    for path in [folder / shard for shard in shards_of(folder)]:
        if path.stat().st_size > MAX_FILE:
            raise InputError(
                f"{path} has {path.stat().st_size:,} bytes, more than the {MAX_FILE:,} that can be downloaded: save "
                "the model in more shards (max_shard_size)."
            )
    return config


def build(folder: Path, repo: str, scratch: Path) -> HubFolder:
    """Build the folder to upload from a checked one, and load it back in a clean process, with and without ovsam
    imported before. Raises InputError if its outputs differ from those of the source."""
    model, processor = open_source(folder)
    built = HubFolder(scratch / "built")
    built.folder.mkdir()

    config = full_precision(json.loads((folder / "config.json").read_text()))
    config["architectures"] = [type(model).__name__]
    config["auto_map"] = auto_map(AutoConfig=type(model.config).__name__, **model.config.auto_classes)
    write_json(built.folder / "config.json", config)
    write_shim(built.folder)
    if processor is not None:
        own = json.loads((folder / PROCESSOR).read_text())
        write_json(built.folder / PROCESSOR, own | {"auto_map": auto_map(AutoProcessor=type(processor).__name__)})
    shards = shards_of(folder)
    weights = [*shards, INDEX] if None not in shards.values() else [*shards]
    taken = ["config.json", SHIM, *weights, *(name for name in BESIDE if (folder / name).is_file())]

    if (folder / CARD).is_file():
        card = (folder / CARD).read_text()
        pictures = check_card(card, folder)
        for name in pictures:
            if name not in taken and (folder / name).stat().st_size > MAX_PICTURE:
                raise InputError(f"README.md shows {name}, which has more than {MAX_PICTURE:,} bytes: make it smaller.")
        taken += [CARD, *pictures]
    else:
        card = default_card(repo, model)
        built.notes.append(f"{folder} has no {CARD}: a card with the facts of the model is uploaded")
    if not ModelCard(card).data.license:
        built.notes.append(f"the card has no licence; state one in the front matter of {folder / CARD}")
    (built.folder / CARD).write_text(card)

    for name in dict.fromkeys(taken):
        target = built.folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(folder / name, target)
    known = {Path(name).parts[0] for name in taken}
    built.left_out = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in known)
    save_file(answers(model, processor), scratch / REFERENCE)
    load_back(built.folder, scratch / REFERENCE, whole=processor is not None)
    return built


def open_source(folder: Path) -> tuple[PreTrainedModel, OVSamProcessor | None]:
    """Load the model of a folder, and the processor of a whole model; raises InputError if files are missing."""
    try:
        model, report = AutoModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # likewise
        raise InputError(f"{folder} cannot be loaded: {reason(error)}.") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{folder} lacks {len(missing)} of its model's weights, such as {missing[0]}.")
    if not isinstance(model, OVSamModel):
        return model.eval(), None
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # likewise
        raise InputError(f"{folder} has no processor: add one with processor.save_pretrained().") from error
    if not isinstance(processor, OVSamProcessor):
        raise InputError(f"{folder} has no OVSamProcessor: add one with processor.save_pretrained().")
    return model.eval(), processor


@torch.no_grad()
def answers(model: PreTrainedModel, processor: OVSamProcessor | None = None) -> dict[str, Tensor]:
    """Return the outputs of a model for a fixed random input: an image with a box and two text queries for a whole
    model, maps for an adapter."""
    generator = torch.Generator().manual_seed(0)
    if processor is not None:
        picture = torch.randint(0, 256, (240, 320, 3), generator=generator, dtype=torch.uint8).numpy()
        inputs = processor(images=picture, text=["dog", "red ball"], input_boxes=[[[40, 30, 200, 180]]])
        outputs = model(**inputs)
        concepts = outputs.features.concepts
        return dict(_tensors({"answer": {**outputs, "features": None}, "concepts": concepts}))
    config = model.config
    side = 16 * getattr(config, "grid", 8)
    cells = {"generator": generator}
    given = {
        "maps": tuple(
            torch.randn(1, channels, side // stride, side // stride, **cells)
            for channels, stride in zip(config.in_channels, (4, 8, 16, 32), strict=True)
        ),
        "boxes": torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0]]]) * side,
        "masks": torch.rand(1, 2, side // 4, side // 4, **cells),
        "tokens": torch.randn(1, 2, config.token_dim, **cells) if getattr(config, "token_dim", 0) else None,
    }
    wanted = inspect.signature(model.forward).parameters
    return dict(_tensors({"answer": model(**{name: value for name, value in given.items() if name in wanted})}))


def compare(model: PreTrainedModel, processor: OVSamProcessor | None, reference: str, how: str) -> None:
    """Exit with a sentence if a model is not float32 or its outputs differ from the reference."""
    if model.dtype != torch.float32:
        raise SystemExit(f"loaded {how}, it is {model.dtype}, not torch.float32")
    expected, found = load_file(reference), answers(model.eval(), processor)
    if expected.keys() != found.keys():
        raise SystemExit(f"loaded {how}, it has other outputs")
    for name, value in expected.items():
        if found[name].shape != value.shape or not torch.allclose(
            found[name].float(), value.float(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
        ):
            raise SystemExit(f"loaded {how}, its {name} differs from that of the source")


def load_back(folder: Path, reference: Path, whole: bool) -> None:
    """Load a folder in a process without other files, offline and with an empty cache, and compare its outputs. Raises
    InputError if they differ."""
    with tempfile.TemporaryDirectory(prefix="ovsam-cache-") as empty:
        environment = os.environ | {"HF_HOME": empty, "HF_HUB_OFFLINE": "1"}
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)
        arguments = [str(folder), str(reference), "whole" if whole else "", str(PACKAGE.parent)]
        command = [sys.executable, "-c", LOAD_BACK, *arguments]
        done = subprocess.run(command, env=environment, cwd=empty, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "it ended without a message").splitlines()[-1]
        raise InputError(f"The built folder does not work like its source, and was not uploaded: {last}.")


def upload(
    built: HubFolder, repo: str, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Upload a built folder in one commit and return its address.

    Files are compared with the Hub's afterwards. The visibility of an existing repository is checked before the upload
    if it must be private. Raises InputError if anything fails; the same call then resumes the upload.
    """
    api = HfApi()
    failed = f"{repo} was not published ({{}}); run the same command again to upload the missing files."
    with hub_errors(failed):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise InputError(f"{repo} exists and is public: make it private on the Hub first, or leave out --private.")
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=built.folder,
            revision=revision,
            create_pr=create_pr,
            commit_message="Upload with ovsam push",
            delete_patterns=OLD_WEIGHTS,
        )
        names = list(built.files())
        there = hub_hashes(repo, names, commit.oid, api)
    for name in names:
        if name not in there or file_hash(built.folder / name, there[name]) != there[name]:
            raise InputError(f"The {name} of {repo} on the Hub differs from the uploaded file: push again.")
    return commit.pr_url or f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def full_precision(config: dict) -> dict:
    """Set `"dtype": "float32"` at every level: weights may be stored in half precision, but a config with half
    precision would also load as such, which is slow on CPUs."""
    return {k: full_precision(v) if isinstance(v, dict) else v for k, v in config.items()} | (
        {"dtype": "float32"} if "model_type" in config else {}
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:  # on systems where links need a permission
        shutil.copyfile(source, target)


def _tensors(value, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested outputs with their paths."""
    if isinstance(value, Tensor):
        yield name, value.contiguous().clone()
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(each, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _tensors(each, f"{name}.{index}")
