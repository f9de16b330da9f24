"""Class embeddings and text embeddings -> logits and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovsam.errors import InputError
from ovsam.ops.scores import word_shares
from ovsam.ops.text_labels import all_phrases, is_per_image

SOFTMAX_SHIFT = -0.25
CHUNK = 4096  # text queries that are compared with all locations at a time


@dataclass
class Naming:
    """Class embeddings [B, I, D] with the scale and shift that turn a cosine into a logit (broadcast to [B, I, 1])."""

    embeds: Tensor | None
    scale: Tensor | float | None
    shift: Tensor | float | None

    def best_logit(self, words: Tensor, asked: Tensor | None = None) -> Tensor:
        """Highest value of `logits`, [B, I], in memory that does not grow with K: scale and shift are the same for all
        queries and preserve their order, so they are applied after the maximum."""
        best = self.embeds.new_full((*self.embeds.shape[:2], 1), torch.finfo(self.embeds.dtype).min)
        for start in range(0, len(words), CHUNK):
            some = slice(start, start + CHUNK)
            cosine = self.embeds @ words[some].to(self.embeds.dtype).T  # [B, I, CHUNK]
            if asked is not None:
                cosine = cosine.masked_fill(~asked[:, None, some], torch.finfo(cosine.dtype).min)
            best = torch.maximum(best, cosine.amax(-1, keepdim=True))
        return ((best + self.shift) * self.scale)[..., 0]

    def logits(
        self, words: Tensor | None, asked: Tensor | None = None, labels: Sequence[str] | None = None
    ) -> Tensor | None:
        """words [K, D] -> [B, I, K]: (cosine + shift) * scale, independently for each query; asked [B, K] bool selects
        the queries of each image, all if None. `labels` are ignored here."""
        if words is None or self.embeds is None:
            return None
        logits = (self.embeds @ words.to(self.embeds.dtype).T + self.shift) * self.scale
        return logits if asked is None else logits.masked_fill(~asked[:, None], torch.finfo(logits.dtype).min)


@dataclass
class BlendedNaming:
    """Class embeddings of an adapter and of CLIP itself, and the shares of Open-Vocabulary SAM (Yuan et al. 2024) as a
    blend of logits, so that the score of a word does not depend on the other words.

    A word's logit is (1 - a) * adapter + a * CLIP. a is 0.1 for `trained_words`, on which the adapter was trained, and
    0.9 for others, and for words without a label.
    """

    adapter: Naming
    clip: Naming
    trained_words: frozenset[str]

    @property
    def embeds(self) -> Tensor | None:
        return self.adapter.embeds

    def logits(
        self, words: Tensor | None, asked: Tensor | None = None, labels: Sequence[str] | None = None
    ) -> Tensor | None:
        """words [K, D] -> [B, I, K]; asked [B, K] bool, all if None; labels: the K class names."""
        if words is None:
            return None
        share = word_shares([""] * len(words) if labels is None else labels, self.trained_words)
        logits = self.blend(words, torch.tensor(share, device=words.device))
        return logits if asked is None else logits.masked_fill(~asked[:, None], torch.finfo(logits.dtype).min)

    def blend(self, words: Tensor, share: Tensor) -> Tensor:
        """words [K, D], share [K] of CLIP in the logit of each word -> [B, I, K]"""
        return (1 - share) * self.adapter.logits(words) + share * self.clip.logits(words)


@dataclass
class FusedNaming:
    """Class embeddings of an adapter and of CLIP itself, both [B, I, D], fused by the rule of Open-Vocabulary SAM (Yuan
    et al. 2024): p = p_adapter^(1 - a) * p_clip^a.

    Each p is a softmax of `scale` times the cosine over all queried class names and a background of cosine zero; the
    highest cosine of several queries for one class name counts. a is 0.1 for `trained_words`, the class names of the
    adapter's training, and 0.9 for others; 0 where `clip_sees` [B, I] is False: CLIP's last map is too coarse for the
    mask.
    """

    embeds: Tensor
    clip_embeds: Tensor
    clip_sees: Tensor
    scale: float
    trained_words: frozenset[str]

    def logits(
        self, words: Tensor | None, asked: Tensor | None = None, labels: Sequence[str] | None = None
    ) -> Tensor | None:
        """words [K, D] -> [B, I, K], whose sigmoid is p; asked [B, K] bool selects the queries of each image, all if
        None. `labels` are the K class names; queries for the same class name get the same logit. Without labels all
        class names count as untrained."""
        if words is None:
            return None
        labels = [str(k) for k in range(len(words))] if labels is None else list(labels)
        names = list(dict.fromkeys(labels))
        place = {name: index for index, name in enumerate(names)}
        name_of = torch.tensor([place[label] for label in labels], device=words.device)  # [K]
        weight = torch.tensor(word_shares(names, self.trained_words))
        weight = weight.to(words.device) * self.clip_sees[..., None]  # [B, I, N]
        log_p = (1 - weight) * self._log_p(self.embeds, words, asked, name_of)
        log_p = log_p + weight * self._log_p(self.clip_embeds, words, asked, name_of)
        log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
        logits = (log_p - torch.log(-torch.expm1(log_p)))[..., name_of]  # [B, I, N] -> [B, I, K]
        return logits if asked is None else logits.masked_fill(~asked[:, None], torch.finfo(logits.dtype).min)

    def _log_p(self, embeds: Tensor, words: Tensor, asked: Tensor | None, name_of: Tensor) -> Tensor:
        """log p of each class name, [B, I, N]; name_of [K] is the index of the class name of each query."""
        cosine = embeds.float() @ words.float().T  # [B, I, K]
        if asked is not None:
            cosine = cosine.masked_fill(~asked[:, None], -1e4)
        best = cosine.new_zeros(*cosine.shape[:2], int(name_of.max()) + 2)  # the last one is the background
        best = best.scatter_reduce(-1, name_of.expand_as(cosine), cosine, "amax", include_self=False)
        return (self.scale * best).log_softmax(-1)[..., :-1]


AnyNaming = Naming | BlendedNaming | FusedNaming


@dataclass
class TextQuery:
    """The text queries of a call.

    embeds [K, D] and negatives [K', D], L2-normalised, None without any; mask [B, K] bool: the queries of each image,
    None if all images have the same; labels: the K class names, None if only embeddings were given.
    """

    embeds: Tensor | None
    negatives: Tensor | None
    mask: Tensor | None
    labels: list[str] | None

    @classmethod
    def of(cls, embeds: Tensor | None, text_labels: Any, negative_labels: Sequence[str] | None) -> "TextQuery":
        """Divide the rows of `embeds` [K + K', D] into queries and, last, negative queries.

        Raises:
            InputError: the number of rows is not the number of queries plus that of negative queries.
        """
        if embeds is None:
            return cls(None, None, None, None)
        labels, count = row_labels(text_labels), len(embeds) - len(negative_labels or ())
        if count < 0 or (labels is not None and len(labels) != count):
            raise InputError(
                f"There are {len(embeds)} text embeddings for {len(labels or ())} entries of text_labels and "
                f"{len(negative_labels or ())} in negative_labels; pass one row for each, negative queries last."
            )
        words, negatives = embeds.split([count, len(embeds) - count])
        mask = word_mask(text_labels)
        return cls(
            words if count else None,
            negatives if len(negatives) else None,
            None if mask is None else mask.to(embeds.device),
            labels,
        )


def word_mask(text_labels: Any) -> Tensor | None:
    """text_labels -> [B, K] bool: which text queries of the union over all images belong to each image; None if all
    images have the same."""
    if not is_per_image(text_labels):
        return None
    union = all_phrases(text_labels)
    return torch.tensor([[phrase in words for phrase in union] for words in text_labels])


def row_labels(text_labels: Sequence | Mapping[str, str] | None) -> list[str] | None:
    """Return the class names of the K text queries, given `text_labels` as the processor takes them: class names, a
    mapping of phrases to class names, or one of these for each image, of which the union is tokenised."""
    if not text_labels:
        return None
    if isinstance(text_labels, Mapping):
        return list(text_labels.values())
    if not is_per_image(text_labels):
        return list(text_labels)
    union: dict[str, str] = {}
    for words in text_labels:
        for phrase in words:
            union.setdefault(phrase, words[phrase] if isinstance(words, Mapping) else phrase)
    return list(union.values())


def clip_scale_shift(clip) -> tuple[Tensor | float, Tensor | float]:
    """Scale and shift of a CLIP side's own cosines. The logits of a tower trained with a softmax over texts are
    comparable with each other only; the shift maps cosine 0.25 to probability 0.5, which lies between the cosines of
    right and wrong class names for released CLIPs (ranks do not depend on it)."""
    return clip.logit_scale, SOFTMAX_SHIFT if clip.softmax else clip.logit_shift


def mean_logits(
    namings: Sequence[AnyNaming],
    words: Tensor | None,
    asked: Tensor | None = None,
    labels: Sequence[str] | None = None,
) -> Tensor | None:
    """Mean of the logits of several namings of the same instances, [B, I, K]."""
    if words is None:
        return None
    return torch.stack([naming.logits(words, asked, labels) for naming in namings]).mean(0)
