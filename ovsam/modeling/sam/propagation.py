"""Tracking that needs no training: labels of earlier frames follow the correspondence of image features.

Each cell of a frame takes the labels of the cells that it resembles most in reference frames, as self-supervised
features are evaluated (Jabri et al. 2020, section 4; Caron et al. 2021, section 4.2.1). Two levels make it cheap:
the best coarse cells are found first, and only their parts are compared finely. Correspondence is computed once a
frame, whatever the number of objects, and once more if some are out of the image. The references are the frames with a
prompt and the last few frames, so that what is kept does not grow with the length of a video.

Shapes: P objects, R reference frames, L = h*w coarse cells, each of FINE*FINE parts, D channels.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsam.modeling.outputs import OVSamFeatures, TrackedMasks

FINE = 2  # parts of a coarse cell along each side: strides 16 and 8
RECENT = 3  # frames before this one that are references
PROMPTED = 8  # frames with a prompt that are references, at most
CANDIDATES = 16  # coarse cells that are compared finely, at most one in eight of a frame
CHUNK = 256  # coarse cells whose candidates are gathered at a time
TEMPERATURE = 0.05
NEAR, FAR = 6 / 32, 12 / 32  # how far labels move, from recent and from prompted frames, in parts of the image's side
PRESENT = 0.5  # share of a part from which on an object is in the image
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
    """A frame whose labels are known: `labels` holds for each object the share of each part that it covers,
    [L, FINE*FINE]; `prompted`, the objects that were prompted on it."""

    keys: Keys
    labels: dict[int, Tensor]
    prompted: set[int] = field(default_factory=set)


@dataclass
class LabelMemory:
    """The reference frames of a session, by frame number."""

    frames: dict[int, Reference] = field(default_factory=dict)

    def store(self, frame: int, reference: Reference) -> None:
        """Keep a frame, and drop what is a reference no more."""
        self.frames[frame] = reference
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
            kept.prompted.discard(number)
            if not kept.labels:
                del self.frames[frame]

    def nbytes(self) -> int:
        """Bytes of all tensors that are kept."""
        tensors = [
            t for kept in self.frames.values() for t in (kept.keys.coarse, kept.keys.fine, *kept.labels.values())
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def propagate(self, frame: int, keys: Keys, numbers: list[int]) -> Tensor:
        """The labels of some objects on a frame, [P, L, FINE*FINE]; an object needs a reference that has it.

        Objects that were in the image on the last frame are searched for near by, so that one alike does not take their
        label; all others in the whole image, by the frames on which they were prompted.
        """
        order = [n for n in sorted(self.frames) if n != frame and any(one in self.frames[n].labels for one in numbers)]
        references = [self.frames[number] for number in order]
        last = self.frames[min(order, key=lambda number: abs(frame - number))].labels
        here = [number for number in numbers if number in last and bool((last[number] > PRESENT).any())]
        alike = [keys.coarse @ kept.keys.coarse.T for kept in references]
        found: dict[int, Tensor] = {}
        for group, reach in ((here, FAR), ([number for number in numbers if number not in here], math.inf)):
            if group:
                found |= zip(group, _read(keys, references, alike, reach, group), strict=True)
        return torch.stack([found[number] for number in numbers])


def _read(keys: Keys, references: list[Reference], alike: list[Tensor], reach: float, numbers: list[int]) -> Tensor:
    """The labels of P objects on a frame, [P, L, FINE*FINE], from references that cells of it are `alike`, [L, L] each;
    reach: how far a label moves from a prompted frame."""
    near = [
        one
        if reach == math.inf and kept.prompted
        else one + _window(keys.side, reach if kept.prompted else NEAR, one.device)
        for kept, one in zip(references, alike, strict=True)
    ]
    best = torch.cat(near, 1).topk(min(CANDIDATES, math.ceil(len(keys.coarse) / 8)), 1).indices  # [L, R*L] -> [L, m]
    fine = torch.cat([kept.keys.fine for kept in references])  # [R*L, p, D]
    none = torch.zeros_like(fine[: len(best), :, 0])  # [L, p]
    labels = torch.cat(
        [torch.stack([kept.labels.get(number, none) for number in numbers], -1) for kept in references]
    )  # [R*L, p, P]
    known = torch.tensor([[number in kept.labels for number in numbers] for kept in references], device=best.device)
    shares = []
    for cells, part in zip(best.split(CHUNK), keys.fine.split(CHUNK), strict=True):  # [l, m], [l, p, D]
        weight = (part @ fine[cells].flatten(1, 2).mT / TEMPERATURE).softmax(-1)  # [l, p, D] @ [l, D, m*p]
        share = weight @ labels[cells].flatten(1, 2)  # [l, p, m*p] @ [l, m*p, P] -> [l, p, P]
        if not known.all():  # references from before an object was there do not count
            owner = cells // len(keys.coarse)  # the reference of each candidate, [l, m]
            counted = known[owner].float().repeat_interleave(none.shape[-1], 1)  # [l, m, P] -> [l, m*p, P]
            share = share / (weight @ counted).clamp(min=LEAST)
        shares.append(share)
    return torch.cat(shares).permute(2, 0, 1)


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


def to_masks(labels: Tensor, side: int, size: int) -> TrackedMasks:
    """Labels [P, L, FINE*FINE] -> logits [1, P, size, size], and whether any part is covered."""
    cells = labels.unflatten(2, (FINE, FINE)).unflatten(1, (side, side))  # [P, h, w, FINE, FINE]
    image = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # -> [P, h*FINE, w*FINE]
    image = F.interpolate(image[None], (size, size), mode="bilinear", align_corners=False).clamp(LEAST, 1 - LEAST)
    most = labels.flatten(1).amax(1).clamp(LEAST, 1 - LEAST)
    return TrackedMasks(masks=image.logit(), iou=most[None], object_logits=most.logit()[None, :, None])


@lru_cache(maxsize=2)
def _window(side: int, radius: float, device: torch.device) -> Tensor:
    """What is added to the likeness of two cells, [L, L]: nothing within the radius, and enough to rule out beyond."""
    line = torch.arange(side, device=device)
    places = torch.cartesian_prod(line, line).float()  # row, column
    return torch.where(torch.cdist(places, places) <= radius * side, 0.0, -9.0)
