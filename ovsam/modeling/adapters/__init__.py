"""The adapters between the sides: modules that are trained over released towers, each a model of its own."""

from ovsam.modeling.adapters.clip2sam import Clip2SamAdapter, Clip2SamConfig
from ovsam.modeling.adapters.clip2sam_fpn import Clip2SamFpnAdapter, Clip2SamFpnConfig
from ovsam.modeling.adapters.concepts import ConceptHead, ConceptHeadConfig
from ovsam.modeling.adapters.sam2clip import Sam2ClipAdapter, Sam2ClipConfig
from ovsam.modeling.adapters.sam2clip_vit import Sam2ClipVitAdapter, Sam2ClipVitConfig
from ovsam.modeling.outputs import ConceptOutput

ADAPTERS = ("clip2sam", "sam2clip", "concepts")  # their names in a model and its configuration
SAM2CLIP_ADAPTERS = {"ovsam_sam2clip": Sam2ClipAdapter, "ovsam_sam2clip_vit": Sam2ClipVitAdapter}
CLIP2SAM_ADAPTERS = {"ovsam_clip2sam": Clip2SamAdapter, "ovsam_clip2sam_fpn": Clip2SamFpnAdapter}

__all__ = [
    "ADAPTERS",
    "CLIP2SAM_ADAPTERS",
    "SAM2CLIP_ADAPTERS",
    "Clip2SamAdapter",
    "Clip2SamConfig",
    "Clip2SamFpnAdapter",
    "Clip2SamFpnConfig",
    "ConceptHead",
    "ConceptHeadConfig",
    "ConceptOutput",
    "Sam2ClipAdapter",
    "Sam2ClipConfig",
    "Sam2ClipVitAdapter",
    "Sam2ClipVitConfig",
]
