"""SAM 3's tracker (Carion et al. 2025), prompted on images: SAM 2's decoder on SAM 3's vision encoder."""

from torch import Tensor
from transformers import PreTrainedConfig, Sam3ImageProcessor, Sam3TrackerModel

from ovsam.errors import InputError
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.sam2 import Sam2Side


class Sam3TrackerSide(Sam2Side):
    """A `Sam3TrackerModel`; takes a `Sam3TrackerConfig`. Patches have 14 pixels: strides are 3.5, 7 and 14."""

    model_class = Sam3TrackerModel
    trackers = ("sam3_tracker_video", "sam3_video")
    image_processor = Sam3ImageProcessor

    def _pyramid(self, config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        scales = list(config.vision_config.scale_factors)
        if scales[:3] != [4, 2, 1]:
            raise InputError(f"scale_factors of SAM 3's vision encoder must begin with 4, 2, 1; got {scales}.")
        return super()._pyramid(config)

    def _encode(self, pixel_values: Tensor) -> SamFeatures:
        features = super()._encode(pixel_values)
        if len(self.model.config.vision_config.scale_factors) > 3:
            # transformers adds no_memory_embedding to the coarsest map, which is not the map of the mask decoder.
            features.embedding = features.pyramid[2]
        return features
