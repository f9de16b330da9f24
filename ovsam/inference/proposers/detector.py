"""`detector:ID`: boxes for text queries by any zero-shot object detector of transformers (OWLv2, Grounding DINO,
OmDet)."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from ovsam.checkpoints.weight_files import fetch
from ovsam.errors import InputError
from ovsam.inference.proposers.base import Proposals, Question

# Detectors whose text tower reads all words as one sentence: they run word by word, so that class names do not merge.
ONE_BY_ONE = ("grounding-dino", "mm-grounding-dino")


@dataclass
class Detector:
    """A detector and its processor; minimum score 0.05, since the segmenter has its own threshold."""

    model: Any
    processor: Any
    least_score: float = 0.05

    @classmethod
    def from_pretrained(cls, model_id: str, device: str = "cpu") -> Self:
        """model_id: a folder, "ORG/NAME" or "ORG/NAME@REVISION". Raises InputError: no such detector in reach."""
        folder = fetch(model_id)
        try:
            model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
            return cls(model.to(device).eval(), AutoProcessor.from_pretrained(folder))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{model_id!r} cannot be loaded as a zero-shot object detector; "
                "google/owlv2-base-patch16-ensemble is one."
            ) from error

    @torch.no_grad()
    def __call__(self, question: Question) -> Proposals:
        words = question.words
        if not words:
            raise InputError("A detector needs text queries: pass some, or a vocabulary.")
        alone = self.model.config.model_type in ONE_BY_ONE
        boxes, scores, labels = [], [], []
        for asked in [[word] for word in words] if alone else [words]:
            text = f"{asked[0].lower().rstrip('.')}." if alone else [asked]
            inputs = self.processor(images=question.image, text=text, return_tensors="pt").to(self.model.device)
            found = self.processor.post_process_grounded_object_detection(
                self.model(**inputs),
                threshold=self.least_score,
                target_sizes=[(question.image.height, question.image.width)],
                text_labels=[asked],
            )[0]
            boxes.append(found["boxes"])
            scores.append(found["scores"])
            labels += [words.index(asked[0] if alone else label) for label in found["text_labels"]]
        best = torch.cat(scores).float()
        word_scores = torch.zeros(len(best), len(words), device=best.device)
        word_scores[torch.arange(len(best)), torch.tensor(labels, dtype=torch.long)] = best
        limit = torch.tensor([question.image.width, question.image.height] * 2, device=best.device)
        places = torch.minimum(torch.cat(boxes).float().clamp(min=0), limit)
        real = (places[:, 2:] - places[:, :2] > 1).all(1)
        return Proposals(boxes=places[real], scores=best[real], word_scores=word_scores[real])
