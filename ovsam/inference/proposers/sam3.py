"""`sam3:ID`: instances of text queries by transformers' Sam3Model, whose masks are taken as they are."""

import torch
from transformers import Sam3Model

from ovsam.errors import InputError
from ovsam.inference.proposers.base import Proposals, Question
from ovsam.inference.proposers.loaded import LoadedProposer, one_word_each


class Sam3(LoadedProposer):
    """One phrase per pass, over one encoding of the image."""

    model_class = Sam3Model
    kind = "a SAM 3; facebook/sam3 is one, for users with access to it"

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
        word_scores = one_word_each(best, words, len(question.words))
        return Proposals(masks=torch.cat(masks), scores=best, word_scores=word_scores)
