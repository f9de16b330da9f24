"""Class embeddings and words -> logits and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovsam.errors import InputError

SOFTMAX_SHIFT = -0.25
CHUNK = 4096  # words that many locations are compared with at a time
TRAINED, UNTRAINED = 0.1, 0.9  # CLIP's share in the name of a mask, Open-Vocabulary SAM


@dataclass
class Naming:
    """Class embeddings [B, I, D] with the scale and shift that turn a cosine into a logit (broadcast to [B, I, 1])."""

    embeds: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def best_logit(self, words: Tensor, asked: Tensor | None = None) -> Tensor:
        """The largest of `logits`, [B, I], in memory that does not grow with K: scale and shift are the same for all
        words and keep their order, so that they come after the maximum."""
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
        """words [K, D] -> [B, I, K]: (cosine + shift) * scale, each word by itself; asked [B, K] bool, all if None.
        What the words are called, their K `labels`, does not matter here."""
        if words is None or self.embeds is None:
            return None
        logits = (self.embeds @ words.to(self.embeds.dtype).T + self.shift) * self.scale
        return logits if asked is None else logits.masked_fill(~asked[:, None], torch.finfo(logits.dtype).min)


@dataclass
class FusedNaming:
    """Class embeddings of an adapter and of CLIP itself, both [B, I, D], and the rule of Open-Vocabulary SAM (Yuan et
    al. 2024): p = p_adapter^(1 - a) * p_clip^a.

    Each p is a softmax over all words asked about and a background whose cosine is zero, with `scale` times the cosine;
    of synonyms the best counts. a is 0.1 for `trained_words`, which the adapter has seen, and 0.9 for others; 0 where
    `clip_sees` [B, I] says that CLIP's last map is too coarse for the mask.
    """

    embeds: Tensor
    clip_embeds: Tensor
    clip_sees: Tensor
    scale: float
    trained_words: frozenset[str]

    def logits(
        self, words: Tensor | None, asked: Tensor | None = None, labels: Sequence[str] | None = None
    ) -> Tensor | None:
        """words [K, D] -> [B, I, K], whose sigmoid is p; asked [B, K] bool, all if None. `labels` are the K names that
        the words stand for: synonyms share one, and all of them get its logit; without labels no word was trained."""
        if words is None:
            return None
        labels = [str(k) for k in range(len(words))] if labels is None else list(labels)
        if len(labels) != len(words):
            raise InputError(f"text_labels are one for each word, of which there are {len(words)}; got {len(labels)}.")
        names = list(dict.fromkeys(labels))
        place = {name: index for index, name in enumerate(names)}
        name_of = torch.tensor([place[label] for label in labels], device=words.device)  # [K]
        weight = torch.tensor([TRAINED if _plain(name) in self.trained_words else UNTRAINED for name in names])
        weight = weight.to(words.device) * self.clip_sees[..., None]  # [B, I, N]
        log_p = (1 - weight) * self._log_p(self.embeds, words, asked, name_of)
        log_p = log_p + weight * self._log_p(self.clip_embeds, words, asked, name_of)
        log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
        logits = (log_p - torch.log(-torch.expm1(log_p)))[..., name_of]  # [B, I, N] -> [B, I, K]
        return logits if asked is None else logits.masked_fill(~asked[:, None], torch.finfo(logits.dtype).min)

    def _log_p(self, embeds: Tensor, words: Tensor, asked: Tensor | None, name_of: Tensor) -> Tensor:
        """log p of each name, [B, I, N]; name_of [K] says which name each word belongs to."""
        cosine = embeds.float() @ words.float().T  # [B, I, K]
        if asked is not None:
            cosine = cosine.masked_fill(~asked[:, None], -1e4)
        best = cosine.new_zeros(*cosine.shape[:2], int(name_of.max()) + 2)  # the last one is the background
        best = best.scatter_reduce(-1, name_of.expand_as(cosine), cosine, "amax", include_self=False)
        return (self.scale * best).log_softmax(-1)[..., :-1]


def _plain(word: str) -> str:
    return word.lower().replace("_", " ")


@dataclass
class TextQuery:
    """The words of a call.

    embeds [K, D] and negatives [K', D], L2-normalised, None without any; mask [B, K] bool, the words that each image is
    asked about, None for all; labels: the K class names, None where only embeddings were given.
    """

    embeds: Tensor | None
    negatives: Tensor | None
    mask: Tensor | None
    labels: list[str] | None

    @classmethod
    def of(cls, embeds: Tensor | None, text_labels: Any, negative_labels: Sequence[str] | None) -> "TextQuery":
        """Divide the rows of `embeds` [K + K', D] into words and, last, negative words.

        Raises:
            InputError: there are fewer rows than negative words, or not one row for each word.
        """
        if embeds is None:
            return cls(None, None, None, None)
        labels, count = row_labels(text_labels), len(embeds) - len(negative_labels or ())
        if count < 0 or (labels is not None and len(labels) != count):
            raise InputError(
                f"There are {len(embeds)} text embeddings for {len(labels or ())} words in text_labels and "
                f"{len(negative_labels or ())} in negative_labels; pass one row for each, negative words last."
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
    """Words per image, as the processor takes them -> [B, K] bool, the words of the union that each image is asked
    about; None where all images are asked about the same words."""
    if not text_labels or isinstance(text_labels, Mapping) or isinstance(text_labels[0], str):
        return None
    union = list(dict.fromkeys(phrase for words in text_labels for phrase in words))
    return torch.tensor([[phrase in words for phrase in union] for words in text_labels])


def row_labels(text_labels: Sequence | Mapping[str, str] | None) -> list[str] | None:
    """Return the class name of each of the K texts, from `text_labels` as the processor takes them: labels, a mapping
    of phrases to labels, or one of these for each image, of which the union is tokenised."""
    if not text_labels:
        return None
    if isinstance(text_labels, Mapping):
        return list(text_labels.values())
    if isinstance(text_labels[0], str):
        return list(text_labels)
    union: dict[str, str] = {}
    for words in text_labels:
        for phrase in words:
            union.setdefault(phrase, words[phrase] if isinstance(words, Mapping) else phrase)
    return list(union.values())


def clip_scale_shift(clip) -> tuple[Tensor | float, Tensor | float]:
    """Scale and shift of a CLIP side's own cosines. A tower that was trained by a softmax over words says only which
    word is better, not whether it is right; its cosines are read as if a quarter were the even chance, which lies
    between those of right and wrong words for released CLIPs (ranks do not depend on it)."""
    return clip.logit_scale, SOFTMAX_SHIFT if clip.softmax else clip.logit_shift


def mean_logits(
    namings: Sequence[Naming | FusedNaming],
    words: Tensor | None,
    asked: Tensor | None = None,
    labels: Sequence[str] | None = None,
) -> Tensor | None:
    """The mean of what several namings of the same instances say, [B, I, K]."""
    if words is None:
        return None
    return torch.stack([naming.logits(words, asked, labels) for naming in namings]).mean(0)


def instance_scores(logits: Tensor, objectness: Tensor | None, weight: float = 0.5) -> Tensor:
    """How likely an instance is what the word says: for a proposal, the weighted geometric mean of "is it this word"
    and "is it a thing, and is this box its box". Any shape, each in [0, 1]."""
    score = logits.sigmoid()
    return score if objectness is None or weight == 0 else score ** (1 - weight) * objectness**weight


def calibrated(scores: Tensor, calibration: Sequence[float]) -> Tensor:
    """Scores in [0, 1] of any shape, their logits times the first number of the calibration plus the second (Platt
    1999): their order stays, 0 and 1 stay, and no score depends on another."""
    scale, shift = calibration
    return scores if (scale, shift) == (1, 0) else torch.sigmoid(scale * torch.logit(scores) + shift)
