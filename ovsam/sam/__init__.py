"""SAM sides: image -> features, prompts -> masks. One wrapper for each `model_type` of transformers."""

from .base import DecodedMasks, SamFeatures, SamSide
from .edgetam import EdgeTamSide
from .sam2 import Sam2Side

SAM_SIDES = {"sam2": Sam2Side, "edgetam": EdgeTamSide}

__all__ = ["SAM_SIDES", "DecodedMasks", "EdgeTamSide", "Sam2Side", "SamFeatures", "SamSide"]
