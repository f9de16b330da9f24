"""`detector:ID`: boxes for text queries by any zero-shot object detector of transformers (OWLv2, Grounding DINO,
OmDet)."""

import torch
from transformers import AutoModelForZeroShotObjectDetection

from ovsam.errors import InputError
from ovsam.inference.proposers.base import Proposals, Question
from ovsam.inference.proposers.loaded import LoadedProposer, one_word_each

# Detectors whose text tower reads all words as one sentence: they run word by word, so that class names do not merge.
ONE_BY_ONE = ("grounding-dino", "mm-grounding-dino")


class Detector(LoadedProposer):
    model_class = AutoModelForZeroShotObjectDetection
    kind = "a zero-shot object detector; google/owlv2-base-patch16-ensemble is one"

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
        word_scores = one_word_each(best, labels, len(words))
        limit = torch.tensor([question.image.width, question.image.height] * 2, device=best.device)
        inside = torch.minimum(torch.cat(boxes).float().clamp(min=0), limit)
        real = (inside[:, 2:] - inside[:, :2] > 1).all(1)
        return Proposals(boxes=inside[real], scores=best[real], word_scores=word_scores[real])
