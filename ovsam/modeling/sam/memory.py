"""The memory of tracked objects: the tensors of earlier frames that memory attention reads, and nothing else.

transformers keeps a mask of image size, a memory and a position code for every object and every frame of a video.
Memory attention reads the conditioned frames (those with a prompt), the last `num_maskmem - 1` others, and the object
pointers of the last `max_object_pointers_in_encoder - 1`: `ObjectMemory` keeps only those, so that its size does not
grow with the length of the video.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class FrameMemory:
    """One object on one frame: spatial memory [T, 64], None once it is no longer read, and object pointer [C]."""

    spatial: Tensor | None
    pointer: Tensor


@dataclass(frozen=True)
class Recall:
    """Plan of the tokens of an object's memory, without the tokens: objects with equal plans are computed in one batch.

    `frames` are the offsets of the spatial memories in frames, 0 for conditioned ones; `pointers` are the offsets of
    the object pointers, and `longest` is their upper limit.
    """

    frames: tuple[int, ...]
    pointers: tuple[int, ...]
    longest: int


@dataclass
class ObjectMemory:
    """The memories of one object: conditioned frames, and those tracked since, by frame number."""

    conditioned: dict[int, FrameMemory] = field(default_factory=dict)
    tracked: dict[int, FrameMemory] = field(default_factory=dict)

    def store(self, frame: int, memory: FrameMemory, conditioned: bool, config: PreTrainedConfig) -> None:
        """Store the memory of a frame, and drop memories that are too far from it to be read."""
        (self.conditioned if conditioned else self.tracked)[frame] = memory
        for number, kept in list(self.tracked.items()):
            distance = abs(frame - number)
            if distance >= config.max_object_pointers_in_encoder - 1 and distance >= config.num_maskmem - 1:
                del self.tracked[number]
            elif distance >= config.num_maskmem - 1 and kept.spatial is not None:
                self.tracked[number] = FrameMemory(None, kept.pointer)

    def recall(
        self, frame: int, config: PreTrainedConfig, reverse: bool = False, num_frames: int | None = None
    ) -> tuple[Recall, list[Tensor], list[Tensor]]:
        """Return the plan, the spatial memories and the pointers for a frame, in the order of the plan.

        Args:
            num_frames: length of the video if it is known; it scales the position codes of pointers.
        """
        step = 1 if reverse else -1
        near, far = _closest(frame, self.conditioned, config.max_cond_frame_num)
        spatial = [(0, memory.spatial) for memory in near.values()]
        for offset in range(config.num_maskmem - 1, 0, -1):
            memory = self.tracked.get(frame + step * offset, far.get(frame + step * offset))
            if memory is not None:
                spatial.append((offset, memory.spatial))
        longest = config.max_object_pointers_in_encoder
        longest = longest if num_frames is None else min(num_frames, longest)
        past = {number: memory for number, memory in self.conditioned.items() if (frame - number) * step <= 0}
        pointers = [((number - frame) * step, memory.pointer) for number, memory in past.items()]
        for offset in range(1, longest):
            memory = self.tracked.get(frame + step * offset)
            if memory is not None:
                pointers.append((offset, memory.pointer))
        plan = Recall(tuple(offset for offset, _ in spatial), tuple(offset for offset, _ in pointers), longest)
        return plan, [one for _, one in spatial if one is not None], [one for _, one in pointers]

    def nbytes(self) -> int:
        """Size of all stored tensors in bytes."""
        kept = (*self.conditioned.values(), *self.tracked.values())
        tensors = [tensor for memory in kept for tensor in (memory.spatial, memory.pointer) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _closest(
    frame: int, conditioned: dict[int, FrameMemory], most: int
) -> tuple[dict[int, FrameMemory], dict[int, FrameMemory]]:
    """Divide the conditioned frames into those that are read, at most a given number (-1: all), and the others. Order:
    the last one before the frame, the first one after it, then the closest ones (SAM 2, section 4)."""
    if most == -1 or len(conditioned) <= most:
        return conditioned, {}
    before = max((number for number in conditioned if number < frame), default=None)
    after = min((number for number in conditioned if number >= frame), default=None)
    chosen = [number for number in (before, after) if number is not None]
    rest = sorted((number for number in conditioned if number not in chosen), key=lambda number: abs(number - frame))
    chosen += rest[: most - len(chosen)]
    return {n: conditioned[n] for n in chosen}, {n: m for n, m in conditioned.items() if n not in chosen}


def stack_memories(memories: Sequence[Sequence[Tensor]]) -> Tensor:
    """n tensors of each of P objects -> [P, n, ...]."""
    return torch.stack([torch.stack(list(each)) for each in memories])
