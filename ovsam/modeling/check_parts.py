"""Do the parts of a model fit each other? Asked once, when it is built, before anything runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ovsam.errors import InputError

if TYPE_CHECKING:
    from ovsam.modeling.modeling_ovsam import OVSamModel


def check_fit(model: "OVSamModel") -> None:
    """Compare what adapters read and give with what the two sides have.

    Raises:
        InputError: names the number that disagrees, and both its values.
    """
    sam, clip = model.sam, model.clip
    if model.config.composition == "sam":
        side, channels = "SAM", _channels_of_sam(sam.pyramid_channels)
    else:
        side, channels = "CLIP", tuple(clip.channels)
    for adapter in (model.sam2clip, model.clip2sam, model.concepts):
        if adapter is not None:  # at which strides maps are does not matter: adapters.common.maps_at_strides
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


def _channels_of_sam(pyramid: tuple[int, ...]) -> tuple[int, ...]:
    """Of the four maps that adapters read of a SAM (modeling_ovsam.encode_image)."""
    return (pyramid[0],) * (3 - len(pyramid)) + pyramid + pyramid[-1:]


def _agree(what: str, value: int | Sequence, other: str, found: int | Sequence) -> None:
    if _listed(value) != _listed(found):
        raise InputError(f"The parts do not fit: {what} {_listed(value)}, {other} {_listed(found)}.")


def _listed(value: int | Sequence) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ", ".join(f"{number:g}" for number in value)
