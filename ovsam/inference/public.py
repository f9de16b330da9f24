"""The public names of ovsam. Importing this module imports torch and registers the classes with transformers' Auto
classes; `ovsam/__init__.py` does so as soon as both are in use."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor

from ovsam.checkpoints.compose import from_parts
from ovsam.checkpoints.embedded import path
from ovsam.errors import InputError
from ovsam.inference.encoded import EncodedImage
from ovsam.inference.loading import load
from ovsam.inference.onnx import OnnxSegmenter
from ovsam.inference.pipeline import TASK, OpenVocabularySegmentationPipeline, register_pipeline
from ovsam.inference.segmenter import Segmenter
from ovsam.inference.video import Prompt, VideoSegmenter, VideoStream, load_video
from ovsam.modeling.adapters import (
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
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamMaskDecoder, OVSamModel, OVSamVisionModel
from ovsam.modeling.modeling_ovsam_video import OVSamVideoModel
from ovsam.modeling.outputs import OVSamFeatures, OVSamOutput
from ovsam.modeling.tracking import OVSamVideoOutput, OVSamVideoSession
from ovsam.processing.processing_ovsam import OVSamProcessor
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.instance import Instance
from ovsam.results.results import Results
from ovsam.results.tracks import FrameResults, Tracks

AutoConfig.register(OVSamConfig.model_type, OVSamConfig)
# Selected by `architectures` of config.json; the first one by default.
AutoModel.register(OVSamConfig, (OVSamModel, OVSamVideoModel))
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
    "EncodedImage",
    "FrameResults",
    "InputError",
    "Instance",
    "OVSamConfig",
    "OVSamFeatures",
    "OVSamMaskDecoder",
    "OVSamModel",
    "OVSamOutput",
    "OVSamProcessor",
    "OVSamVideoModel",
    "OVSamVideoOutput",
    "OVSamVideoSession",
    "OVSamVisionModel",
    "OnnxSegmenter",
    "OpenVocabularySegmentationPipeline",
    "Prompt",
    "Results",
    "Sam2ClipAdapter",
    "Sam2ClipConfig",
    "Sam2ClipVitAdapter",
    "Sam2ClipVitConfig",
    "Segmenter",
    "Tracks",
    "VideoSegmenter",
    "VideoStream",
    "Vocabulary",
    "from_parts",
    "load",
    "load_video",
    "path",
]
