"""The training stages by the name that a recipe gives them.

A stage is a module whose `forward(image, masks, word_ids, known)` takes a batch of a SegmentationData and returns
{"loss": ..., metric: ...}; `predict`, of the same arguments, returns what it finds in each picture.
"""

from .adapters_stage import AdaptersStage
from .clip2sam_stage import Clip2SamStage
from .clip_stage import ClipStage
from .concepts_stage import ConceptsStage
from .finetune_stage import FinetuneStage
from .mae_stage import MaeStage
from .sam2clip_stage import Sam2ClipStage
from .sam_stage import SamStage

STAGES = {
    "clip": ClipStage,
    "sam": SamStage,
    "sam2clip": Sam2ClipStage,
    "clip2sam": Clip2SamStage,
    "concepts": ConceptsStage,
    "adapters": AdaptersStage,
    "mae": MaeStage,
    "finetune": FinetuneStage,
}
