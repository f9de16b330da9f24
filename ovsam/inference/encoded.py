"""EncodedImage: an image with its features, which `Segmenter` takes in place of an image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map

from ovsam.modeling.outputs import OVSamFeatures
from ovsam.processing.images import Picture


@dataclass(frozen=True)
class EncodedImage:
    """An upright RGB image and its features; `Segmenter` takes it in place of an image."""

    image: Image.Image
    features: OVSamFeatures

    def to(self, device: str | torch.device) -> "EncodedImage":
        """Return a copy with its features on another device."""
        return EncodedImage(self.image, map_tensors(lambda tensor: tensor.to(device), self.features))


OneImage = Picture | EncodedImage


def map_tensors(function: Callable[[Tensor], Tensor], features: OVSamFeatures) -> OVSamFeatures:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, features)
