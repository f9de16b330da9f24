"""The CLIP side: an image tower and a text tower that share an embedding space."""

from ovsam.modeling.clip.base import ClipSide
from ovsam.modeling.clip.dual_encoder import DualEncoderConfig, DualEncoderSide
from ovsam.modeling.clip.imagenet import ImageNetConfig, ImageNetSide
from ovsam.modeling.clip.open_clip import OpenClipConfig, OpenClipSide
from ovsam.modeling.clip.owlv2 import Owlv2Side
from ovsam.modeling.clip.transformers_clip import TransformersClipSide, TransformersSiglip2Side, TransformersSiglipSide
from ovsam.modeling.outputs import ClipFeatures

CLIP_SIDES: dict[str, type[ClipSide]] = {
    "ovsam_dual_encoder": DualEncoderSide,
    "ovsam_imagenet": ImageNetSide,
    "ovsam_open_clip": OpenClipSide,
    "clip": TransformersClipSide,
    "siglip": TransformersSiglipSide,
    "siglip2": TransformersSiglip2Side,
    "owlv2": Owlv2Side,
}

__all__ = [
    "CLIP_SIDES",
    "ClipFeatures",
    "ClipSide",
    "DualEncoderConfig",
    "DualEncoderSide",
    "ImageNetConfig",
    "ImageNetSide",
    "OpenClipConfig",
    "OpenClipSide",
    "Owlv2Side",
    "TransformersClipSide",
    "TransformersSiglip2Side",
    "TransformersSiglipSide",
]
