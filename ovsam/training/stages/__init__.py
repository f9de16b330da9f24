"""The training stages by their names in recipes.

A stage is a module whose `forward(image, masks, word_ids, known)` takes a batch of a SegmentationData and returns
{"loss": ..., metric: ...}; `predict`, with the same arguments, returns the predictions for each image. A stage of clips
(`memory`) has no `predict`.
"""

from ovsam.training.stages.adapters import AdaptersStage
from ovsam.training.stages.clip import ClipStage
from ovsam.training.stages.clip2sam import Clip2SamStage
from ovsam.training.stages.concepts import ConceptsStage
from ovsam.training.stages.finetune import FinetuneStage
from ovsam.training.stages.mae import MaeStage
from ovsam.training.stages.memory import MemoryStage
from ovsam.training.stages.sam import SamStage
from ovsam.training.stages.sam2clip import Sam2ClipStage

STAGES = {
    "clip": ClipStage,
    "sam": SamStage,
    "sam2clip": Sam2ClipStage,
    "clip2sam": Clip2SamStage,
    "concepts": ConceptsStage,
    "adapters": AdaptersStage,
    "mae": MaeStage,
    "finetune": FinetuneStage,
    "memory": MemoryStage,
}
