"""Where tracked objects are, from their labels: a template of each object's mask is registered on every frame.

Positions are rows and columns of coarse cells; the middle of the first cell is 0. Templates have the resolution of
labels, S = h*FINE parts a side.
"""

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


@dataclass(frozen=True)
class Motion:
    """An object on a frame.

    Attributes:
        template: the share of each part that it covers when nothing hides it, [S, S], with its centre at `home`.
        home, centre: centres in the template and on this frame, [2].
        speed: change of the centre in a frame, [2].
        absent: frames since it was in the image.
    """

    template: Tensor
    home: Tensor
    centre: Tensor
    speed: Tensor
    absent: int = 0

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Motion":
        """The motion of an object at rest, from its mask [S, S]."""
        centre = (mask[..., None] * _places(mask)).sum((0, 1)) / mask.sum().clamp(min=1e-6)
        return cls(mask, centre, centre, torch.zeros_like(centre))

    @property
    def expected(self) -> Tensor:
        """The centre on the next frame."""
        return self.centre + self.speed

    def confine(self, mask: Tensor) -> Tensor:
        """A mask [S, S] on the next frame without what an object that leaves the image would leave behind."""
        now, template = (shift(self.template, centre - self.home) for centre in (self.centre, self.expected))
        if self.absent or not template.sum() < min(now.sum(), INSIDE * self.template.sum()):
            return mask
        near = F.max_pool2d(template[None], 2 * MARGIN + 1, 1, MARGIN)[0]
        return mask * near

    def follow(self, mask: Tensor, background: Tensor) -> "Motion":
        """The motion on the next frame, where the object has a mask [S, S] and no object covers `background` [S, S].

        An object of which too little is visible moves on at its speed.
        """
        lost = self.absent > GONE
        if not (mask > PRESENT).any():
            return replace(self, centre=self.expected, absent=self.absent + 1)
        if not lost and mask.sum() < VISIBLE * self.template.sum():
            return replace(self, centre=self.expected, absent=0)
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
        return Motion(template, self.home, centre, speed)

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
