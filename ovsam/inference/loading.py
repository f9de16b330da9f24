"""`ovsam.load(...)`: a preset, a folder or a Hub id -> Segmenter.

torch is imported with the model, and not for an exported one.
"""

import difflib
import os
from typing import TYPE_CHECKING

from ovsam.checkpoints.exported import is_exported
from ovsam.errors import InputError
from ovsam.processing import arguments

if TYPE_CHECKING:
    import torch

    from ovsam.inference.segmenter import Segmenter


def load(
    model: str | os.PathLike = "auto",
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    memory: bool = False,
) -> "Segmenter":
    """Load a Segmenter for a preset, a folder or a Hub id.

    Args:
        model: "photo" or "photo-large", composed of released models that are downloaded once;
            "ovsam-tiny", the small checkpoint inside the package, trained on photographs with COCO's names;
            "auto": the value of the environment variable OVSAM_MODEL, else `photo` where it is in the cache or the Hub
            answers, else `ovsam-tiny`; a folder; or a Hub id, "ORG/NAME" or "ORG/NAME@REVISION". A folder of `ovsam
            export` gives an OnnxSegmenter, which answers alike and imports no torch.
        device: "cpu", "cuda", ...; by default a GPU if there is one, and the CPU for an exported model.
        dtype: torch.bfloat16 or "bfloat16", "float16", "float32"; by default that of the checkpoint.
        memory: whether a preset keeps the memory of its SAM 2, with which it tracks through videos.

    Raises:
        InputError: unknown model, none available, or unknown device or dtype.
    """
    name = check_model(model)
    if is_exported(name):
        if dtype is not None and str(dtype).removeprefix("torch.") != "float32":
            raise InputError(f"The dtype is {dtype!r}; an exported model runs in float32.")
        from ovsam.inference.onnx import OnnxSegmenter

        return OnnxSegmenter(name, "cpu" if device is None else str(device))  # type: ignore[return-value]
    return _load_model(name, device, dtype, memory)


def check_model(model: str | os.PathLike) -> str:
    """Return the name of a model to load; needs no torch.

    Raises:
        InputError: it is no preset, no folder of a model, and no Hub id in the cache or within reach.
    """
    from ovsam.checkpoints.download import check_in_reach, split_revision
    from ovsam.checkpoints.presets import PRESETS

    if not isinstance(model, str | os.PathLike):
        raise InputError(f"The model is {arguments.short(model)}; it must be a preset, a folder or a Hub id.")
    name = os.fsdecode(model)
    if name == "auto":
        name = os.environ.get("OVSAM_MODEL") or name
    folder, _ = split_revision(name)
    if name == "auto" or name in PRESETS or is_exported(name):
        return name
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise InputError(f"{name!r} lacks config.json; a model folder is what `save_pretrained` writes.")
    elif "/" not in name and not os.path.exists(name):
        close = difflib.get_close_matches(name, PRESETS, n=1)
        meant = f"did you mean {close[0]!r}? Pass" if close else "pass"
        raise InputError(
            f"There is no model {arguments.short(name)}: {meant} {', '.join(PRESETS)}, a folder, or a Hub id, ORG/NAME."
        )
    else:
        check_in_reach(name)
    return name


def _load_model(name: str, device, dtype, memory: bool) -> "Segmenter":
    import torch

    from ovsam.checkpoints.compose import compose
    from ovsam.checkpoints.model_folder import load_folder
    from ovsam.checkpoints.presets import PRESETS, announce_download, choose_auto
    from ovsam.checkpoints.weight_files import fetch
    from ovsam.inference.options import check_device, check_dtype
    from ovsam.inference.segmenter import Segmenter

    name = choose_auto() if name == "auto" else name
    target, dtype = (
        check_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device),
        check_dtype(dtype),
    )
    if name in PRESETS and PRESETS[name].parts:
        announce_download(name)
        parts = PRESETS[name].parts
        whole, processor = compose(sam=parts["sam"], clip=parts["clip"], memory=memory)
        return Segmenter(whole.to(target, dtype), processor, name)
    folder = fetch(name)
    whole, processor = load_folder(folder, name)
    return Segmenter(whole.to(target, dtype), processor, name)
