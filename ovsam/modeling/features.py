"""Image -> features: the image encoders of the model, and the four maps of a SAM side that adapters read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsam.modeling.adapters.common import maps_at_strides
from ovsam.modeling.geometry import clip_frame
from ovsam.modeling.outputs import OVSamFeatures


def sam_channels(pyramid_channels: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels of the four maps of `sam_maps`."""
    return (pyramid_channels[0],) * (3 - len(pyramid_channels)) + tuple(pyramid_channels) + (pyramid_channels[-1],)


def sam_maps(pyramid: tuple[Tensor, ...], image_size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four maps that adapters read from a SAM, at strides 4, 8, 16 and 32.

    The pyramid of SAM 2 ends at stride 16; its stride-16 map, halved, is the fourth map. SAM 1 has the stride-16 map
    alone, which is also resampled to strides 4 and 8.

    Args:
        pyramid: one to three maps [B, Ci, h, w], high resolution first.
        image_size: height and width of the model input in pixels.
    """
    finer = (pyramid[0],) * (3 - len(pyramid))
    return maps_at_strides((*finer, *pyramid, F.avg_pool2d(pyramid[-1], 2)), image_size)


def encode_image(
    model, pixel_values: Tensor, clip_pixel_values: Tensor | None = None, clip_window: Tensor | None = None
) -> OVSamFeatures:
    """Run the image encoders of an OVSamModel or an OVSamVisionModel."""
    pixel_values = pixel_values.to(model.dtype)
    if model.config.composition == "sam":
        sam = model.sam.encode(pixel_values)
        return OVSamFeatures(sam=sam, maps=sam_maps(sam.pyramid, tuple(pixel_values.shape[-2:])))
    frame, clip_size = None, tuple(pixel_values.shape[-2:])
    if clip_pixel_values is None:
        clip_pixel_values = pixel_values
    elif clip_window is not None or clip_pixel_values.shape[-2:] != pixel_values.shape[-2:]:
        clip_size = tuple(clip_pixel_values.shape[-2:])
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=pixel_values.device).expand(len(pixel_values), -1)
        frame = clip_frame(whole if clip_window is None else clip_window, pixel_values.shape[-1], clip_size)
    clip = model.clip.encode_image(clip_pixel_values.to(model.dtype))
    maps, config = clip.maps, model.config
    if config.sam2clip_config or config.clip2sam_config or config.concepts_config:  # an adapter reads the maps
        maps = maps_at_strides(maps, clip_size)
    sam = model.sam2clip(maps) if config.composition == "clip" else model.sam.encode(pixel_values)
    return OVSamFeatures(sam=sam, clip=clip, maps=maps, clip_frame=frame, clip_size=clip_size)
