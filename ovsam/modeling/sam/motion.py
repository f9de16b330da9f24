"""Where tracked objects are, from their labels: a template of each object's mask is registered on every frame.
How much larger an object becomes is measured by correspondence (`ovsam.modeling.sam.propagation`) and filtered here.

Positions are rows and columns of coarse cells; the middle of the first cell is 0. Templates have the resolution of
labels, S = h*FINE parts a side.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

FINE = 2  # parts of a coarse cell along each side: strides 16 and 8
PRESENT = 0.5  # share of a part from which on an object is in the image
REACH = 4  # parts that a template moves at most from where it is expected, along each axis
SHARP = 0.01  # temperature of the mean over positions
VISIBLE = 0.15  # share of the template below which an object moves on at its speed
INSIDE = 0.7  # share of the template in the image below which an object leaves it
MARGIN = 2  # parts around the template
FASTEST = 2.5  # cells a frame
RENEWED = 0.1  # share of the template that is replaced a frame
SMOOTH = 0.25  # share of the speed that is replaced a frame
GONE = 3  # frames after which an absent object may be anywhere
CORRECTED = 0.2  # share of the error of the size that is corrected a frame
STEADY = 0.1  # share of that correction by which growth changes
TOO_LARGE = 0.03  # how much larger objects that keep their size are measured on average, as a logarithm
FASTEST_GROWTH = 0.07  # change of the logarithm of the size a frame, at most
LARGEST = 4.0  # size, as a multiple of that on the first frame, at most


@dataclass(frozen=True)
class Motion:
    """An object on a frame.

    Attributes:
        template: the share of each part that it covers when nothing hides it, [S, S], with its centre at `home`.
        home, centre: centres in the template and on this frame, [2].
        speed: change of the centre in a frame, [2].
        absent: frames since it was in the image.
        size: size as a multiple of that on its first frame, between 1 and LARGEST.
        growth: change of the logarithm of the size in a frame.
    """

    template: Tensor
    home: Tensor
    centre: Tensor
    speed: Tensor
    absent: int = 0
    size: float = 1.0
    growth: float = 0.0

    @classmethod
    def of_mask(cls, mask: Tensor, size: float = 1.0) -> "Motion":
        """The motion of an object at rest, from its mask [S, S] and its size."""
        centre = (mask[..., None] * _places(mask)).sum((0, 1)) / mask.sum().clamp(min=1e-6)
        return cls(mask, centre, centre, torch.zeros_like(centre), size=size)

    @property
    def expected(self) -> Tensor:
        """The centre on the next frame."""
        return self.centre + self.speed

    @property
    def expected_size(self) -> float:
        """The size on the next frame."""
        return min(max(self.size * math.exp(self.growth), 1.0), LARGEST)

    def larger_than(self, reference: "Motion") -> float:
        """How many times larger the object is on the next frame than in a reference, at least 1: the cells of a larger
        picture of it remain useful where they are, and moved together they would be mixed with the background."""
        return max(self.expected_size / reference.size, 1.0)

    def confine(self, mask: Tensor) -> Tensor:
        """A mask [S, S] on the next frame without what an object that leaves the image would leave behind."""
        now, template = (shift(self.template, centre - self.home) for centre in (self.centre, self.expected))
        if self.absent or not template.sum() < min(now.sum(), INSIDE * self.template.sum()):
            return mask
        near = F.max_pool2d(template[None], 2 * MARGIN + 1, 1, MARGIN)[0]
        return mask * near

    def follow(self, mask: Tensor, background: Tensor, error: float = 0.0) -> "Motion":
        """The motion on the next frame, where the object has a mask [S, S] and no object covers `background` [S, S].

        An object of which too little is visible moves on at its speed.

        Args:
            error: logarithm of the size that is measured there, as a multiple of the expected one.
        """
        lost = self.absent > GONE
        if not (mask > PRESENT).any():
            return replace(self, centre=self.expected, absent=self.absent + 1, growth=0.0)
        if not lost and mask.sum() < VISIBLE * self.template.sum():
            return replace(self, centre=self.expected, absent=0, size=self.expected_size)
        if lost:
            centre = self._register(mask, background, _places(mask)[mask > PRESENT].mean(0), 3 * REACH)
        else:
            centre = self._register(mask, background, self.expected, REACH)
        step = (centre - self.centre).clamp(-FASTEST, FASTEST)
        speed = torch.zeros_like(step) if self.absent else self.speed + SMOOTH * (step - self.speed)
        # What other objects hide keeps its place in the template.
        back = self.home - centre
        visible = RENEWED * shift((mask + background).clamp(0, 1), back)
        template = self.template + visible * (shift(mask, back) - self.template)
        change = min(max(CORRECTED * error, -FASTEST_GROWTH), FASTEST_GROWTH)
        growth = min(max(self.growth + STEADY * change, -FASTEST_GROWTH), FASTEST_GROWTH)
        size = min(self.expected_size * math.exp(change), LARGEST)
        if size < 1:  # references are not made smaller, so the error of a smaller size would never end
            size, growth = 1.0, max(growth, 0.0)
        return Motion(template, self.home, centre, speed, 0, size, growth)

    def _register(self, mask: Tensor, background: Tensor, near: Tensor, reach: int) -> Tensor:
        """The centre, near another one, at which the template agrees best with the mask: by the Dice coefficient over
        what no other object hides."""
        template = shift(self.template, near - self.home)
        images = F.pad(torch.stack([mask, mask + background]), (reach,) * 4)[:, None]
        inside, visible = F.conv2d(images, template[None, None]).flatten(1)  # of each position
        score = 2 * inside / (visible + mask.sum()).clamp(min=1)
        line = torch.arange(-reach, reach + 1, device=mask.device) / FINE
        return near + (score / SHARP).softmax(0) @ torch.cartesian_prod(line, line)


def shift(image: Tensor, by: Tensor) -> Tensor:
    """An image [S, S], moved by rows and columns of cells."""
    source = _places(image) - by
    grid = ((2 * source + 1) * FINE / len(image) - 1).flip(-1)  # to x, y in [-1, 1]
    return F.grid_sample(image[None, None], grid[None], align_corners=False)[0, 0]


def _places(image: Tensor) -> Tensor:
    """Positions of the parts of an image [S, S], [S, S, 2]."""
    line = (torch.arange(len(image), device=image.device) + 0.5) / FINE - 0.5
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
