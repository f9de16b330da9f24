"""EncodedImage: an image with its features, which `Segmenter` takes in place of an image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ovsam.processing.images import Picture


@dataclass(frozen=True)
class EncodedImage:
    """An upright RGB image and its features; `Segmenter` takes it in place of an image.

    features: those of the model, OVSamFeatures.
    """

    image: Image.Image
    features: Any

    def to(self, device: Any) -> "EncodedImage":
        """Return a copy with its features, which are tensors, on another device."""
        return EncodedImage(self.image, map_tensors(lambda tensor: tensor.to(device), self.features))


OneImage = Picture | EncodedImage


def map_tensors(function: Callable[[Any], Any], features: Any) -> Any:
    from torch import Tensor
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, features)
