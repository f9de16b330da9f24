"""Tracking that needs no training: labels of earlier frames follow the correspondence of image features.

Each cell of a frame takes the labels of the cells that it resembles most in reference frames, as self-supervised
features are evaluated (Jabri et al. 2020, section 4; Caron et al. 2021, section 4.2.1). Two levels make it cheap:
the best coarse cells are found first, and only their parts are compared finely. Correspondence is computed once a
frame, whatever the number of objects. The references are the frames with a prompt and the last few frames, so that what
is kept does not grow with the length of a video.

Features do not tell two objects of one look apart, so places count too: the cells of a reference are moved along with
their objects (`ovsam.modeling.sam.motion`), and apart where an object becomes larger; those that are near weigh more.

Shapes: P objects, R reference frames, L = h*w coarse cells, each of FINE*FINE parts, D channels.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsam.modeling.outputs import OVSamFeatures, TrackedMasks
from ovsam.modeling.sam.motion import FINE, PRESENT, TOO_LARGE, Motion

RECENT = 3  # frames before this one that are references
PROMPTED = 8  # frames with a prompt that are references, at most
CANDIDATES = 16  # coarse cells that are compared finely, at most one in eight of a frame
CHUNK = 256  # coarse cells whose candidates are gathered at a time
TEMPERATURE = 0.06
NEAR = {False: 4 / 32, True: 2 / 32}  # deviation of places, of recent and of prompted frames, as a share of the side
FARTHEST = 3.0  # deviations that a cell moves at most
OUT = 9.0  # what is beyond costs
BONUS = 0.2  # what likeness to a prompted frame counts more: it has no errors
BORDER = 2 / 32  # width around an object that moves with it in references, as a share of the side
ANYWHERE = 0.1  # the most that a place costs for an object that is absent
MEASURED = 12  # parts of an object from which on its size is measured
LEAST = 1e-4  # probabilities are kept this far from 0 and 1


@dataclass(frozen=True)
class Keys:
    """What cells of a frame are compared by, L2-normalised: coarse [L, D], fine [L, FINE*FINE, D]; side: cells of a
    row."""

    coarse: Tensor
    fine: Tensor
    side: int


@dataclass
class Reference:
    """A frame whose labels are known.

    Attributes:
        labels: for each object the share of each part that it covers, [L, FINE*FINE].
        motions: the motion of each object.
        drift: where the background has moved since the first frame, [2] in cells.
        prompted: the objects that were prompted on it.
    """

    keys: Keys
    labels: dict[int, Tensor] = field(default_factory=dict)
    motions: dict[int, Motion] = field(default_factory=dict)
    drift: Tensor = field(default_factory=lambda: torch.zeros(2))
    prompted: set[int] = field(default_factory=set)

    def prompt(self, number: int, label: Tensor) -> None:
        """Set the label [L, FINE*FINE] of an object that is prompted."""
        self.labels[number] = label
        size = self.motions[number].size if number in self.motions else 1.0
        self.motions[number] = Motion.of_mask(spread(label, self.keys.side), size)
        self.prompted.add(number)


@dataclass
class LabelMemory:
    """The reference frames of a session, by frame number."""

    frames: dict[int, Reference] = field(default_factory=dict)

    def store(self, frame: int, reference: Reference) -> None:
        """Keep a frame, and drop what is a reference no more."""
        self.frames[frame] = reference
        for number, kept in self.frames.items():
            if abs(frame - number) >= RECENT:  # what was tracked there may be wrong
                kept.labels = {one: label for one, label in kept.labels.items() if one in kept.prompted}
        for number in [n for n, kept in self.frames.items() if not kept.prompted and abs(frame - n) >= RECENT]:
            del self.frames[number]
        prompted = sorted(number for number, kept in self.frames.items() if kept.prompted)
        while len(prompted) > PROMPTED:
            # The earliest one of which no object has its only prompt, or else the earliest.
            alone = {n for n in prompted if any(self._prompts(one) == 1 for one in self.frames[n].prompted)}
            dropped = next((n for n in prompted if n not in alone), prompted[0])
            prompted.remove(dropped)
            del self.frames[dropped]

    def _prompts(self, number: int) -> int:
        return sum(number in kept.prompted for kept in self.frames.values())

    def forget(self, number: int) -> None:
        """Forget an object."""
        for frame, kept in list(self.frames.items()):
            kept.labels.pop(number, None)
            kept.motions.pop(number, None)
            kept.prompted.discard(number)
            if not kept.labels:
                del self.frames[frame]

    def nbytes(self) -> int:
        """Bytes of all tensors that are kept."""
        tensors = []
        for kept in self.frames.values():
            tensors += [kept.keys.coarse, kept.keys.fine, *kept.labels.values()]
            tensors += [motion.template for motion in kept.motions.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def propagate(self, frame: int, keys: Keys, numbers: list[int]) -> Reference:
        """The frame with the labels and motions of some objects; each needs a reference that has it."""
        near = [self.frames[n] for n in sorted(self.frames, key=lambda n: abs(frame - n)) if n != frame]
        drift = near[0].drift if near else keys.coarse.new_zeros(2)
        if not numbers:
            return Reference(keys, drift=drift)
        before = {number: next(kept.motions[number] for kept in near if number in kept.motions) for number in numbers}
        references = [kept for kept in near if kept.labels.keys() & before.keys()]
        labels, moved, errors = _read(keys, references, before, drift)
        masks = torch.stack(
            [motion.confine(spread(label, keys.side)) for motion, label in zip(before.values(), labels, strict=True)]
        )
        found = Reference(keys, drift=drift + moved)
        background = (1 - masks.sum(0)).clamp(min=0)
        for (number, motion), mask, error in zip(before.items(), masks, errors, strict=True):
            after = motion.follow(mask, background, error)
            found.motions[number] = after
            found.labels[number] = nest((mask * (not after.absent))[None])[..., 0]
        return found


def _read(
    keys: Keys, references: list[Reference], before: dict[int, Motion], drift: Tensor
) -> tuple[Tensor, Tensor, list[float]]:
    """The labels of P objects on a frame, [P, L, FINE*FINE], how far the background moves, [2], and how much larger
    each object is than expected, as a logarithm; from references and the motion of each object `before`."""
    cells, none = _cells(keys.side, keys.coarse.device), torch.zeros_like(keys.fine[..., 0])
    absent = torch.tensor([motion.absent > 0 for motion in before.values()], device=cells.device)
    labels = [torch.stack([kept.labels.get(number, none) for number in before], -1) for kept in references]  # [L, p, P]
    moved = [_moved(kept, label.mean(1), before, drift) for kept, label in zip(references, labels, strict=True)]
    gone = [(label.mean(1)[:, absent] > PRESENT).any(1) for label in labels]  # cells of absent objects, [L]
    scores = []
    for kept, (place, steep), free in zip(references, moved, gone, strict=True):
        # One product of matrices: likeness - steep * distance**2 + bonus
        bonus = BONUS * bool(kept.prompted)
        square, one = place.square().sum(1, keepdim=True), torch.ones_like(place[:, :1])
        query = torch.cat([keys.coarse, cells, one, cells.square().sum(1, keepdim=True)], 1)
        key = torch.cat([kept.keys.coarse, 2 * steep * place, bonus - steep * square, -steep * one], 1)
        score = query @ key.T
        score[:, free] = score[:, free].maximum(keys.coarse @ kept.keys.coarse[free].T - ANYWHERE)
        scores.append(score)
    best = torch.cat(scores, 1).topk(min(CANDIDATES, math.ceil(len(cells) / 8)), 1).indices  # [L, R*L] -> [L, m]
    label, place = torch.cat(labels), torch.cat([place for place, _ in moved])  # [R*L, p, P], [R*L, 2]
    owner = best // len(cells)  # the reference of each candidate, [L, m]
    steep = torch.cat([steep for _, steep in moved])[best, 0]
    cost = steep * (cells[:, None] - place[best]).square().sum(-1)  # [L, m]
    cost[cost > FARTHEST**2 * TEMPERATURE / 2] = OUT
    cost -= cells.new_tensor([BONUS * bool(kept.prompted) for kept in references])[owner]
    cost = torch.where(torch.cat(gone)[best], cost.clamp(max=ANYWHERE), cost)
    fine = torch.cat([kept.keys.fine for kept in references])  # [R*L, p, D]
    bare = 1 - label.sum(-1)  # [R*L, p]
    known = torch.tensor([[number in kept.labels for number in before] for kept in references], device=cells.device)
    shares, step, mass = [], cells.new_zeros(2), cells.new_tensor(LEAST)
    moments = cells.new_zeros(len(before), 7)
    for at in torch.arange(len(cells), device=cells.device).split(CHUNK):
        one, parts = best[at], none.shape[1]  # [l, m]
        alike = keys.fine[at] @ fine[one].flatten(1, 2).mT  # [l, p, D] @ [l, D, m*p]
        weight = ((alike - cost[at].repeat_interleave(parts, 1)[:, None]) / TEMPERATURE).softmax(-1)
        own = label[one].flatten(1, 2)  # [l, m*p, P]
        share = weight @ own  # [l, p, m*p] @ [l, m*p, P] -> [l, p, P]
        there = own[..., None] * place[one].repeat_interleave(parts, 1)[:, :, None]  # [l, m*p, P, 2]
        there = (weight @ there.flatten(2)).unflatten(2, (-1, 2)) / share.clamp(min=LEAST)[..., None]  # [l, p, P, 2]
        if not known.all():  # references from before an object was there do not count
            counted = known[owner[at]].float().repeat_interleave(parts, 1)  # [l, m, P] -> [l, m*p, P]
            share = share / (weight @ counted).clamp(min=LEAST)
        shares.append(share)
        moments += _moments(share * (share > PRESENT), cells[at, None, None].expand_as(there), there)
        behind = (weight.sum(1) * bare[one].flatten(1)).unflatten(1, (-1, parts)).sum(-1)  # [l, m*p] -> [l, m]
        step += (behind[..., None] * (cells[at, None] - place[one])).sum((0, 1))
        mass += behind.sum()
    found = torch.cat(shares).permute(2, 0, 1)
    measured = (found > PRESENT).sum((1, 2)) >= MEASURED
    errors = [
        _error(row) if sure else 0.0 for row, sure in zip(moments.tolist(), (measured & ~absent).tolist(), strict=True)
    ]
    return found, step / mass, errors


def _moments(share: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """Sums of the shares [l, p, P] of P objects, of where these parts are, [l, p, P, 2], and are expected by
    correspondence, and of the squares of both, [P, 7]."""
    one = torch.ones_like(share)[..., None]
    rows = torch.cat([one, here, here.square().sum(-1, keepdim=True), there, there.square().sum(-1, keepdim=True)], -1)
    return (share[..., None] * rows).sum((0, 1))


def _error(moments: list[float]) -> float:
    """How much larger an object is than expected, as a logarithm: by the spread of its parts around their mean, and the
    spread of the places where these are expected."""
    mass, y, x, square, expected_y, expected_x, expected_square = moments
    here = square / mass - (y**2 + x**2) / mass**2
    there = expected_square / mass - (expected_y**2 + expected_x**2) / mass**2
    return math.log(here / there) / 2 - TOO_LARGE if min(here, there) > LEAST else 0.0


def _moved(kept: Reference, label: Tensor, before: dict[int, Motion], drift: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cells of a reference are expected now, [L, 2], and what the square of a distance to it costs, [L, 1].

    The cells of objects, and of their border, have moved along with them, and apart where an object has become larger;
    all others have moved with the background. label: the share of each cell that P objects cover, [L, P].
    """
    side = kept.keys.side
    cells = _cells(side, label.device)
    image = label.T.unflatten(1, (side, side))  # [P, h, w]
    near = round(BORDER * side)
    border = F.max_pool2d(image, 2 * near + 1, 1, near).flatten(1).T
    border = border / border.sum(1, keepdim=True).clamp(min=1)
    share = torch.where(label.sum(1, keepdim=True) > PRESENT, label, border)
    place = cells + (1 - share.sum(1, keepdim=True)) * (drift - kept.drift)
    width = torch.full_like(share[:, :1], max(NEAR[bool(kept.prompted)] * side, 1.0))
    spacing = torch.ones_like(width)
    for (number, motion), own in zip(before.items(), share.T[..., None], strict=True):
        if number in kept.motions:
            earlier = kept.motions[number]
            more = motion.larger_than(earlier) - 1
            place += own * (motion.expected - earlier.centre + more * (cells - earlier.centre))
            spacing += own * more
    return place, TEMPERATURE / (2 * (width * spacing) ** 2)  # places have a normal distribution


def frame_keys(features: OVSamFeatures) -> Keys:
    """The keys of one image: of the maps at strides 8 and 16 that adapters read, or else of the SAM side's."""
    assert features.sam is not None
    if features.maps and features.clip_frame is None:
        maps = features.maps[:3]
    else:
        assert features.sam.pyramid is not None
        maps = features.sam.pyramid
    coarse = F.normalize(maps[-1].float(), dim=1)  # [1, D, h, w]
    parts = [F.interpolate(coarse, scale_factor=FINE, mode="bilinear", align_corners=False)]
    whole = [coarse]
    if len(maps) > 1:
        finer = F.normalize(maps[-2].float(), dim=1)
        parts.append(finer)
        whole.append(F.normalize(F.avg_pool2d(finer, FINE), dim=1))
    fine = F.normalize(torch.cat(parts, 1), dim=1)
    coarse = F.normalize(torch.cat(whole, 1), dim=1)
    return Keys(coarse[0].flatten(1).T.contiguous(), nest(fine[0]), coarse.shape[-1])


def nest(maps: Tensor) -> Tensor:
    """[D, h*FINE, w*FINE] -> [h*w, FINE*FINE, D]"""
    cells = maps.unflatten(2, (-1, FINE)).unflatten(1, (-1, FINE))  # [D, h, FINE, w, FINE]
    return cells.permute(1, 3, 2, 4, 0).flatten(2, 3).flatten(0, 1).contiguous()


def cover(masks: Tensor, side: int) -> Tensor:
    """Masks [P, H, W] in [0, 1] -> the share of each part that they cover, [P, L, FINE*FINE]."""
    size = side * FINE
    small = F.interpolate(masks[:, None].float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return torch.stack([nest(one)[..., 0] for one in small])


def spread(label: Tensor, side: int) -> Tensor:
    """A label [L, FINE*FINE] -> image [h*FINE, w*FINE]"""
    cells = label.unflatten(1, (FINE, FINE)).unflatten(0, (side, side))  # [h, w, FINE, FINE]
    return cells.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def to_masks(labels: Tensor, side: int, size: int) -> TrackedMasks:
    """Labels [P, L, FINE*FINE] -> logits [1, P, size, size], and whether any part is covered."""
    image = torch.stack([spread(label, side) for label in labels])
    image = F.interpolate(image[None], (size, size), mode="bilinear", align_corners=False).clamp(LEAST, 1 - LEAST)
    most = labels.flatten(1).amax(1).clamp(LEAST, 1 - LEAST)
    return TrackedMasks(masks=image.logit(), iou=most[None], object_logits=most.logit()[None, :, None])


@lru_cache(maxsize=2)
def _cells(side: int, device: torch.device) -> Tensor:
    """Row and column of each cell, [L, 2]."""
    line = torch.arange(side, device=device)
    return torch.cartesian_prod(line, line).float()
