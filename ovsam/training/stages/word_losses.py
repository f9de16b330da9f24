"""Classification losses that the stages share: embeddings against the words of a data set.

Words are trained by two losses: cross entropy among all names, which separates them (an annotator chose one of all
words for an object), and a focal sigmoid loss for each text, which makes the score of one word meaningful on its own.
In the second one a word is a negative only if the image was annotated for it (`known`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.training.stages.losses import focal_loss
from ovsam.training.stages.text_embeddings import WordTable


def check_width(words: WordTable, width: int) -> None:
    """Raise InputError unless the text embeddings are as wide as those of the image tower."""
    if words.names.shape[1] != width:
        raise InputError(
            f"The embeddings of the image tower have {width} numbers, those of the text tower {words.names.shape[1]}; "
            "take both from one model, or give a new tower embed_dim = 384, that of the text tower inside ovsam-tiny."
        )


class WordLosses(nn.Module):
    """V base names, Kw keywords, W words of a data set.

    Args:
        words: embedded words of the data set.
        label_smoothing: label smoothing of the cross entropy.
        background_weight: weight of a background class in the cross entropy, whose embedding is the zero vector
            (Open-Vocabulary SAM: 0.1); 0 for no background class.
    """

    def __init__(self, words: WordTable, label_smoothing: float = 0.0, background_weight: float = 0.0):
        super().__init__()
        self.label_smoothing, self.background_weight = label_smoothing, background_weight
        self.scale = nn.Parameter(torch.tensor(4.0))  # the value at the end of the clip stage
        self.count = int(words.is_base.sum())  # V
        texts = torch.cat([words.names[words.is_base], words.keywords])
        self.register_buffer("texts", texts, persistent=False)  # [V + Kw, D]
        self.register_buffer("targets", text_targets(words), persistent=False)  # [W, V + Kw] of 1, 0, -1
        self.register_buffer("is_base", words.is_base, persistent=False)  # [W]
        self.register_buffer("base_ids", words.is_base.nonzero()[:, 0], persistent=False)  # [V]
        self.register_buffer("has_keyword", words.has_keyword.float(), persistent=False)  # [W, Kw]
        # Classes are the base words; the class of a base word is its rank among them, novel words have none.
        rank = words.is_base.long().cumsum(0) - 1
        self.register_buffer("class_of", torch.where(words.is_base, rank, -1), persistent=False)  # [W]

    def known_texts(self, known: Tensor) -> Tensor:
        """known [B, W] -> [B, V + Kw] bool: the texts that can be negatives in an image. A keyword can if all of its
        words can."""
        keyword_open = (~known).float() @ self.has_keyword > 0  # [B, Kw]
        return torch.cat([known[:, self.is_base], ~keyword_open], 1)

    def classify(self, embeds: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of embeds [n, D] among all names, and top-1 of the named ones; ids [n], -1: background."""
        names = self.texts[: self.count]
        logits = self.scale.clamp(max=4.6).exp() * embeds.float() @ names.T  # [n, V]
        named = ids >= 0
        classes = torch.where(named, self.class_of[ids], self.count)
        right = (logits.argmax(-1) == classes)[named].float()
        top1 = right.sum() / max(len(right), 1)
        if not self.background_weight:
            logits, classes = logits[named], classes[named]
            weight = None
        else:
            logits = F.pad(logits, (0, 1))  # logit of the zero vector
            weight = logits.new_ones(self.count + 1)
            weight[-1] = self.background_weight
        if not len(classes):
            return logits.sum() * 0, top1
        return F.cross_entropy(logits, classes, weight=weight, label_smoothing=self.label_smoothing), top1

    def word_loss(self, logits: Tensor, ids: Tensor, asked: Tensor) -> Tensor:
        """Focal sigmoid loss per text. The first len(ids) rows are objects, the rest background; `asked` selects the
        negatives. logits, asked [n, V + Kw], ids [<= n]"""
        target = logits.new_zeros(logits.shape)
        target[: len(ids)] = self.targets[ids].to(logits.dtype)
        loss = focal_loss(logits, target.clamp(min=0)) * ((target > 0) | (target == 0) & asked)
        # Names have a higher weight than keywords: an object has one name and several keywords.
        names, keywords = loss[:, : self.count].sum(), loss[:, self.count :].sum()
        return (names + 0.25 * keywords) / max(len(ids), 1)


class LitLosses(nn.Module):
    """LiT (Zhai et al. 2022) with the locked text tower's names as a classifier, and keywords as soft targets."""

    def __init__(self, words: WordTable, label_smoothing: float, keyword_weight: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.label_smoothing, self.keyword_weight = label_smoothing, keyword_weight
        # Classes are the base words; the class of a base word is its rank among them.
        self.register_buffer("names", words.names[words.is_base], persistent=False)  # [V, D]
        self.register_buffer("keywords", words.keywords, persistent=False)  # [Kw, D]
        share = words.has_keyword.float() / words.has_keyword.sum(1, keepdim=True).clamp(min=1)
        self.register_buffer("keyword_share", share, persistent=False)  # [W, Kw], rows sum to 1 or 0
        self.register_buffer("class_of", words.is_base.long().cumsum(0) - 1, persistent=False)  # [W]
        self.register_buffer("base_ids", words.is_base.nonzero()[:, 0], persistent=False)  # [V]

    def logits(self, embeds: Tensor) -> Tensor:
        """embeds [..., D], L2-normalised -> [..., V]"""
        return self.log_scale.clamp(max=4.6).exp() * embeds @ self.names.T

    def forward(self, embeds: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """embeds [n, D], L2-normalised, of the words ids [n]"""
        logits, classes = self.logits(embeds), self.class_of[ids]
        if not len(ids):
            return {"loss": logits.sum(), "top1": logits.sum().detach()}
        name_loss = F.cross_entropy(logits, classes, label_smoothing=self.label_smoothing)
        loss = name_loss
        if len(self.keywords):
            keyword_logits = self.log_scale.clamp(max=4.6).exp() * embeds @ self.keywords.T  # [n, Kw]
            keyword_loss = -(self.keyword_share[ids] * keyword_logits.log_softmax(-1)).sum(-1).mean()
            loss = loss + self.keyword_weight * keyword_loss
        top1 = (logits.argmax(-1) == classes).float().mean()
        return {"loss": loss, "top1": top1, "name_loss": name_loss.detach(), "scale": self.log_scale.detach().exp()}


def text_targets(words: WordTable) -> Tensor:
    """Targets [W, V + Kw]: 1 for a word's own name and keywords, 0 for others, -1 (ignored) for names that also fit."""
    own = torch.eye(len(words.names))[:, words.is_base]  # [W, V]
    shared = words.has_keyword.float() @ words.has_keyword.float().T  # [W, W] keywords in common
    count = words.has_keyword.sum(1).float()
    alike = shared / torch.minimum(count[:, None], count[None]).clamp(min=1) >= 0.5
    own = torch.where(alike[:, words.is_base] & (own == 0), -1.0, own)
    return torch.cat([own, words.has_keyword.float()], 1)
