"""Text queries as the processor takes them: once for all images, or a list or mapping for each image."""

from collections.abc import Mapping
from typing import Any


def is_per_image(text_labels: Any) -> bool:
    """Whether text_labels are given per image (a list of lists or of mappings), not once for all images."""
    return (
        isinstance(text_labels, list | tuple)
        and bool(text_labels)
        and isinstance(text_labels[0], list | tuple | Mapping)
    )


def all_phrases(text_labels: Any) -> list[str]:
    """The phrases of all images, without repetition if they are given per image."""
    if is_per_image(text_labels):
        return list(dict.fromkeys(phrase for row in text_labels for phrase in row))
    return list(text_labels)
