"""Scores from logits and objectness, for numpy arrays and tensors alike."""

from collections.abc import Collection, Sequence

from ovsam.ops.arrays import Array, logit, sigmoid

TRAINED, UNTRAINED = 0.1, 0.9  # weight of CLIP's probability in Open-Vocabulary SAM


def instance_scores(logits: Array, objectness: Array | None, weight: float = 0.5) -> Array:
    """Probability that an instance has the class name: for a proposal, the weighted geometric mean of the probability
    of the class name and the objectness. Any shape, each in [0, 1]."""
    score = sigmoid(logits)
    return score if objectness is None or weight == 0 else score ** (1 - weight) * objectness**weight


def calibrated(scores: Array, calibration: Sequence[float]) -> Array:
    """Platt scaling (Platt 1999) of scores in [0, 1] of any shape: the logit of each score is multiplied by the first
    number of the calibration and the second is added. Order is preserved, and 0 and 1 stay."""
    scale, shift = calibration
    return scores if (scale, shift) == (1, 0) else sigmoid(scale * logit(scores) + shift)


def plain_name(word: str) -> str:
    """A class name as `trained_words` lists it."""
    return word.lower().replace("_", " ")


def word_shares(labels: Sequence[str], trained_words: Collection[str]) -> list[float]:
    """The share of CLIP in the logit of each class name, in Open-Vocabulary SAM: 0.1 for the names on which the adapter
    was trained, 0.9 for others."""
    return [TRAINED if plain_name(label) in trained_words else UNTRAINED for label in labels]
