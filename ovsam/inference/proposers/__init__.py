"""Proposers: sources of candidate objects in an image. They replace the model's own ConceptHead.

A proposer is a function from a Question to Proposals; a user's own is one too: `segmenter.where(..., proposer=mine)`.
"""

from collections.abc import Callable

from ovsam.inference.options import check_proposer_name
from ovsam.inference.proposers.base import Proposals, Proposer, Question, decode_proposals, mask_boxes, text_inputs
from ovsam.inference.proposers.clip_dense import clip_dense
from ovsam.inference.proposers.detector import Detector
from ovsam.inference.proposers.grid import grid
from ovsam.inference.proposers.sam3 import Sam3

# Their names stand in `ovsam.inference.options`, which needs no torch.
FUNCTIONS: dict[str, Proposer] = {"clip-dense": clip_dense, "grid": grid}
LOADERS: dict[str, Callable[[str, str], Proposer]] = {
    "detector": Detector.from_pretrained,
    "sam3": Sam3.from_pretrained,
}


def get_proposer(name: str, device: str = "cpu") -> Proposer:
    """The proposer of a name, such as "grid" or "detector:google/owlv2-base-patch16-ensemble".

    Raises:
        InputError: no such proposer, or no such model.
    """
    check_proposer_name(name)
    kind, _, model_id = name.partition(":")
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    return LOADERS[kind](model_id, device)


__all__ = [
    "Proposals",
    "Proposer",
    "Question",
    "decode_proposals",
    "get_proposer",
    "mask_boxes",
    "text_inputs",
]
