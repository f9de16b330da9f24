"""EdgeTAM (Zhou et al. 2025): SAM 2's decoder on a convolutional trunk of timm."""

from transformers import EdgeTamModel

from .base import SamSide


class EdgeTamSide(SamSide):
    """An `EdgeTamModel`; takes an `EdgeTamConfig`, whose trunk may be any of timm's with maps at strides 4 to 32."""

    model_class = EdgeTamModel
