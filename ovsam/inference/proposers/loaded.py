"""The base of proposers that are models of transformers, loaded from a folder or the Hub."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import AutoProcessor

from ovsam.checkpoints.settings import check_configs
from ovsam.checkpoints.weight_files import check_weights, fetch
from ovsam.errors import InputError


@dataclass
class LoadedProposer:
    """A model and its processor. `least_score` is low, since the segmenter has its own threshold."""

    model_class: ClassVar[Any]
    kind: ClassVar[str]  # for the message about a model of another kind

    model: Any
    processor: Any
    least_score: float = 0.05

    @classmethod
    def from_pretrained(cls, model_id: str, device: str = "cpu") -> Self:
        """model_id: a folder, "ORG/NAME" or "ORG/NAME@REVISION". Raises InputError: the model cannot be loaded."""
        folder = fetch(model_id)
        check_configs(folder, model_id, part=True)
        check_weights(folder)
        try:
            model = cls.model_class.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
            return cls(model.to(device).eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=False))
        except Exception as error:  # classes of other libraries may raise anything over values they do not expect
            raise InputError(f"{model_id!r} cannot be loaded as {cls.kind}.") from error


def one_word_each(scores: Tensor, words: list[int], count: int) -> Tensor:
    """scores [n] of instances that were found for one word each -> [n, count], 0 for the other words."""
    table = scores.new_zeros(len(scores), count)
    table[torch.arange(len(scores)), torch.tensor(words, dtype=torch.long)] = scores
    return table
