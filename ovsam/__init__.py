"""Open-vocabulary segmentation for transformers. Importing it registers the classes with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor

from .adapters.clip2sam import Clip2SamAdapter, Clip2SamConfig
from .adapters.concepts import ConceptHead, ConceptHeadConfig, ConceptOutput
from .adapters.sam2clip import Sam2ClipAdapter, Sam2ClipConfig
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
    (ConceptHeadConfig, ConceptHead),
    (Sam2ClipConfig, Sam2ClipAdapter),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _adapter)
register_pipeline()

__all__ = [
    "TASK",
    "Clip2SamAdapter",
    "Clip2SamConfig",
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
    "Segmenter",
    "Vocabulary",
    "load",
]
