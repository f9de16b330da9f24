"""EdgeTAM (Zhou et al. 2025): SAM 2's decoder on a convolutional trunk of timm."""

from typing import ClassVar

from transformers import EdgeTamModel

from ovsam.modeling.sam.sam2 import Sam2Side


class EdgeTamSide(Sam2Side):
    """An `EdgeTamModel`; takes an `EdgeTamConfig`, whose trunk is any model of timm with maps at strides 4 to 32."""

    model_class = EdgeTamModel
    trackers: ClassVar[tuple[str, ...]] = ("edgetam_video",)
