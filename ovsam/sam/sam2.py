"""SAM 2 and 2.1 (Ravi et al. 2024)."""

from transformers import Sam2Model

from .base import SamSide


class Sam2Side(SamSide):
    """A `Sam2Model`; takes a `Sam2Config`."""

    model_class = Sam2Model
