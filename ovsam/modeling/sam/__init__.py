"""SAM sides: image -> features, prompts -> masks. One wrapper for each `model_type` of transformers."""

from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.backbone import SamTrunk, SamTrunkConfig
from ovsam.modeling.sam.base import DecodedMasks, SamSide
from ovsam.modeling.sam.edgetam import EdgeTamSide
from ovsam.modeling.sam.efficienttam import EfficientTamConfig, EfficientTamSide, EfficientTamVisionConfig
from ovsam.modeling.sam.label_token import LabelTokenSamConfig, LabelTokenSamSide
from ovsam.modeling.sam.sam1 import Sam1Side
from ovsam.modeling.sam.sam2 import Sam2Side
from ovsam.modeling.sam.sam3_tracker import Sam3TrackerSide
from ovsam.modeling.sam.sam_hq import SamHqSide
from ovsam.modeling.sam.video import EdgeTamVideoSide, Sam2VideoSide

SAM_SIDES: dict[str, type[SamSide]] = {
    "sam": Sam1Side,
    "sam_hq": SamHqSide,
    "sam2": Sam2Side,
    "sam2_video": Sam2VideoSide,
    "edgetam": EdgeTamSide,
    "edgetam_video": EdgeTamVideoSide,
    "efficienttam": EfficientTamSide,
    "sam3_tracker": Sam3TrackerSide,
    "ovsam_label_token_sam": LabelTokenSamSide,
}

__all__ = [
    "SAM_SIDES",
    "DecodedMasks",
    "EdgeTamSide",
    "EdgeTamVideoSide",
    "EfficientTamConfig",
    "EfficientTamSide",
    "EfficientTamVisionConfig",
    "LabelTokenSamConfig",
    "LabelTokenSamSide",
    "Sam1Side",
    "Sam2Side",
    "Sam2VideoSide",
    "Sam3TrackerSide",
    "SamFeatures",
    "SamHqSide",
    "SamSide",
    "SamTrunk",
    "SamTrunkConfig",
]
