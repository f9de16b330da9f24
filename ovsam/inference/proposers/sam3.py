"""`sam3:ID`: instances of text queries by transformers' Sam3Model, whose masks are taken as they are."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoProcessor, Sam3Model

from ovsam.checkpoints.weight_files import fetch
from ovsam.errors import InputError
from ovsam.inference.proposers.base import Proposals, Question


@dataclass
class Sam3:
    """SAM 3 and its processor. One phrase per pass, over one encoding of the image."""

    model: Any
    processor: Any
    least_score: float = 0.05

    @classmethod
    def from_pretrained(cls, model_id: str, device: str = "cpu") -> Self:
        """model_id: a folder, "ORG/NAME" or "ORG/NAME@REVISION". Raises InputError: no such model in reach."""
        folder = fetch(model_id)
        try:
            return cls(Sam3Model.from_pretrained(folder).to(device).eval(), AutoProcessor.from_pretrained(folder))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{model_id!r} cannot be loaded as a SAM 3; facebook/sam3 is one, for users with access to it."
            ) from error

    @torch.no_grad()
    def __call__(self, question: Question) -> Proposals:
        if not question.words:
            raise InputError("SAM 3 needs text queries: pass some, or a vocabulary.")
        device, size = self.model.device, [(question.image.height, question.image.width)]
        pixels = self.processor(images=question.image, return_tensors="pt").to(device)["pixel_values"]
        vision = self.model.get_vision_features(pixel_values=pixels)
        masks, scores, words = [], [], []
        for index, word in enumerate(question.words):
            text = self.processor(text=word, original_sizes=size, return_tensors="pt").to(device)
            outputs = self.model(
                vision_embeds=vision, input_ids=text["input_ids"], attention_mask=text["attention_mask"]
            )
            found = self.processor.post_process_instance_segmentation(
                outputs, threshold=self.least_score, target_sizes=size
            )[0]
            masks.append(found["masks"].bool())
            scores.append(found["scores"].float())
            words += [index] * len(found["scores"])
        best = torch.cat(scores)
        word_scores = torch.zeros(len(best), len(question.words), device=device)
        word_scores[torch.arange(len(best)), torch.tensor(words, dtype=torch.long)] = best
        return Proposals(masks=torch.cat(masks), scores=best, word_scores=word_scores)
