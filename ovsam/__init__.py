"""Open-vocabulary segmentation for transformers. Importing it registers the classes with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor

from .adapters import (
    Clip2SamAdapter,
    Clip2SamConfig,
    Clip2SamFpnAdapter,
    Clip2SamFpnConfig,
    ConceptHead,
    ConceptHeadConfig,
    ConceptOutput,
    Sam2ClipAdapter,
    Sam2ClipConfig,
    Sam2ClipVitAdapter,
    Sam2ClipVitConfig,
)
from .configuration_ovsam import OVSamConfig
from .errors import InputError
from .modeling_ovsam import OVSamFeatures, OVSamMaskDecoder, OVSamModel, OVSamOutput, OVSamVisionModel
from .pipeline import TASK, OpenVocabularySegmentationPipeline, register_pipeline
from .processing_ovsam import OVSamProcessor
from .results import Instance, Results
from .segmenter import Segmenter, load
from .vocabulary import Vocabulary

__version__ = "0.1.0"

AutoConfig.register(OVSamConfig.model_type, OVSamConfig)
AutoModel.register(OVSamConfig, OVSamModel)
AutoModelForMaskGeneration.register(OVSamConfig, OVSamModel)
AutoProcessor.register(OVSamConfig, OVSamProcessor)
for _config, _adapter in (
    (Clip2SamConfig, Clip2SamAdapter),
    (Clip2SamFpnConfig, Clip2SamFpnAdapter),
    (ConceptHeadConfig, ConceptHead),
    (Sam2ClipConfig, Sam2ClipAdapter),
    (Sam2ClipVitConfig, Sam2ClipVitAdapter),
):
    AutoModel.register(_config, _adapter)
register_pipeline()

__all__ = [
    "TASK",
    "Clip2SamAdapter",
    "Clip2SamConfig",
    "Clip2SamFpnAdapter",
    "Clip2SamFpnConfig",
    "ConceptHead",
    "ConceptHeadConfig",
    "ConceptOutput",
    "InputError",
    "Instance",
    "OVSamConfig",
    "OVSamFeatures",
    "OVSamMaskDecoder",
    "OVSamModel",
    "OVSamOutput",
    "OVSamProcessor",
    "OVSamVisionModel",
    "OpenVocabularySegmentationPipeline",
    "Results",
    "Sam2ClipAdapter",
    "Sam2ClipConfig",
    "Sam2ClipVitAdapter",
    "Sam2ClipVitConfig",
    "Segmenter",
    "Vocabulary",
    "load",
]
