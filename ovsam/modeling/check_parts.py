"""Checks the dimensions of the parts of a model when it is built."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from ovsam.errors import InputError
from ovsam.modeling.features import sam_channels


def check_fit(model: PreTrainedModel) -> None:
    """Compare the dimensions of the adapters with those of the SAM side and the CLIP side of an OVSamModel.

    Raises:
        InputError: names the number that disagrees, and both its values.
    """
    sam, clip = model.sam, model.clip
    if model.config.composition == "sam":
        side, channels = "SAM", sam_channels(sam.pyramid_channels)
    else:
        side, channels = "CLIP", tuple(clip.channels)
    for adapter in (model.sam2clip, model.clip2sam, model.concepts):
        if adapter is not None:  # strides may differ: maps_at_strides resamples
            name, wanted = type(adapter).__name__, adapter.config.in_channels
            _agree(f"{name}'s maps are", len(wanted), f"the {side} side's", len(channels))
            _agree(f"{name}'s in_channels are", wanted, f"the {side} side's channels", channels)
    for adapter in (model.clip2sam, model.concepts):
        if adapter is not None:
            wanted = adapter.config.embed_dim
            _agree(f"{type(adapter).__name__}'s embed_dim is", wanted, "the CLIP side's", clip.embed_dim)
    token_dim = getattr(model.clip2sam and model.clip2sam.config, "token_dim", 0)
    if token_dim:
        _agree("Clip2SamAdapter's token_dim is", token_dim, "the width of the SAM side's tokens", sam.width)
    if model.sam2clip is not None:
        name, config = type(model.sam2clip).__name__, model.sam2clip.config
        _agree(f"{name}'s width is", config.width, "the SAM side's", sam.width)
        _agree(f"{name}'s grid is", getattr(config, "grid", sam.grid), "the SAM side's", sam.grid)
        _agree(f"{name}'s finer maps are", model.sam2clip.finer_maps, "the SAM side's decoder reads", sam.finer_maps)


def _agree(what: str, value: int | Sequence, other: str, found: int | Sequence) -> None:
    if _listed(value) != _listed(found):
        raise InputError(f"The parts do not fit: {what} {_listed(value)}, {other} {_listed(found)}.")


def _listed(value: int | Sequence) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ", ".join(f"{number:g}" for number in value)
