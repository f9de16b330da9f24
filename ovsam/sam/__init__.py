"""SAM sides: image -> features, prompts -> masks. One wrapper for each `model_type` of transformers."""

from .base import DecodedMasks, SamFeatures, SamSide
from .edgetam import EdgeTamSide
from .efficienttam import EfficientTamConfig, EfficientTamSide, EfficientTamVisionConfig
from .encoders import SamTrunk, SamTrunkConfig
from .label_token import LabelTokenSamConfig, LabelTokenSamSide
from .sam1 import Sam1Side
from .sam2 import Sam2Side
from .sam3_tracker import Sam3TrackerSide
from .sam_hq import SamHqSide

SAM_SIDES: dict[str, type[SamSide]] = {
    "sam": Sam1Side,
    "sam_hq": SamHqSide,
    "sam2": Sam2Side,
    "edgetam": EdgeTamSide,
    "efficienttam": EfficientTamSide,
    "sam3_tracker": Sam3TrackerSide,
    "ovsam_label_token_sam": LabelTokenSamSide,
}

__all__ = [
    "SAM_SIDES",
    "DecodedMasks",
    "EdgeTamSide",
    "EfficientTamConfig",
    "EfficientTamSide",
    "EfficientTamVisionConfig",
    "LabelTokenSamConfig",
    "LabelTokenSamSide",
    "Sam1Side",
    "Sam2Side",
    "Sam3TrackerSide",
    "SamFeatures",
    "SamHqSide",
    "SamSide",
    "SamTrunk",
    "SamTrunkConfig",
]
