"""Sessions of a video, and the tracker that takes one from frame to frame.

Where the SAM side has a memory, objects whose memories have the same shape go through memory attention, mask decoder
and memory encoder as one batch; any other SAM side tracks without training, by `ovsam.modeling.sam.propagation`.
Sessions do not grow with the length of a video.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ovsam.errors import InputError
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.outputs import OVSamFeatures, SamFeatures, TrackedMasks
from ovsam.modeling.sam.memory import FrameMemory, ObjectMemory, stack_memories
from ovsam.modeling.sam.propagation import LabelMemory, cover, frame_keys, to_masks
from ovsam.modeling.sam.video import Sam2VideoSide

TRACKERS = ("auto", "memory", "propagation")


@dataclass(frozen=True)
class VideoPrompt:
    """Points or a mask that select one object on one frame.

    Attributes:
        points: [N, 2] as x, y in pixels of the model input.
        labels: [N]: 1 inside, 0 outside, 2 and 3 the two corners of a box.
        mask: [H, W] bool at the size of the model input.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class VideoText:
    """Text queries of a session: new objects are searched for on the first frame and every `redetect_every` frames.

    Attributes:
        labels: the K text queries.
        input_ids, attention_mask: their tokens [K, T].
        searched: the last frame that was searched.
    """

    labels: list[str]
    input_ids: Tensor
    attention_mask: Tensor | None = None
    redetect_every: int = 10
    searched: int | None = None

    def is_due(self, frame: int) -> bool:
        return self.searched is None or abs(frame - self.searched) >= self.redetect_every


@dataclass
class OVSamVideoOutput(ModelOutput):
    """Output for one frame with P objects. Objects without a prompt on this frame or on a tracked one are left out.

    Attributes:
        object_ids: ids of the P objects.
        text_labels: the text query of each object, None for prompted ones.
        pred_masks: logits [P, 1, H/4, W/4].
        object_score_logits: logits that the object is in the image, [P, 1].
        iou_scores: predicted IoU of the masks, [P].
        frame_idx: number of the frame.
        features: features of the frame, which can be reused without encoding it again.
    """

    object_ids: list[int] | None = None
    text_labels: list[str | None] | None = None
    pred_masks: Tensor | None = None
    object_score_logits: Tensor | None = None
    iou_scores: Tensor | None = None
    frame_idx: int | None = None
    features: OVSamFeatures | None = None


class OVSamVideoSession:
    """A video and its tracked objects.

    Args:
        video: frames as images, in any sequence (a frame is read when it is needed); None for a stream.
        prepare: function from a frame to model inputs: a mapping with `pixel_values` and other arguments of `encode`.
        video_height, video_width: size of the frames in pixels.
        tracker: "memory", the SAM side's own; "propagation", which needs no training; "auto": the former where the SAM
            side has a memory.

    Raises:
        InputError: there is no such tracker.
    """

    def __init__(
        self,
        video: Sequence[Any] | None = None,
        prepare: Callable[[Any], Mapping[str, Tensor]] | None = None,
        video_height: int | None = None,
        video_width: int | None = None,
        tracker: str = "auto",
    ):
        if not isinstance(tracker, str) or tracker not in TRACKERS:
            raise InputError(f"There is no tracker {tracker!r}; tracker is {', '.join(TRACKERS)}.")
        self.tracker = tracker
        self.video, self.prepare = video, prepare
        self.video_height, self.video_width = video_height, video_width
        self.objects: dict[int, ObjectMemory] = {}
        self.labels = LabelMemory()
        self.prompts: dict[int, dict[int, VideoPrompt]] = {}
        self.text: VideoText | None = None
        self.names: dict[int, str] = {}  # object -> its text query
        self.next_frame = 0  # of a stream
        self._encoded: tuple[int, OVSamFeatures] | None = None  # the last frame's features
        # Masks returned for prompts; tracking reuses them instead of decoding them again.
        self._answers: dict[tuple[int, int], TrackedMasks] = {}

    @property
    def num_frames(self) -> int | None:
        return None if self.video is None else len(self.video)

    @property
    def obj_ids(self) -> list[int]:
        return list(self.objects)

    def add_prompt(self, object_id: int, frame_idx: int, prompt: VideoPrompt) -> None:
        """Prompt a new or an existing object; takes effect the next time the model is called with that frame."""
        self.objects.setdefault(object_id, ObjectMemory())
        self.prompts.setdefault(object_id, {})[frame_idx] = prompt

    def remove_object(self, object_id: int) -> None:
        """Remove an object; other ids do not change. Raises InputError: there is no such object."""
        if object_id not in self.objects:
            raise InputError(f"There is no object {object_id}; objects of this session: {self.obj_ids or 'none'}.")
        del self.objects[object_id]
        self.labels.forget(object_id)
        self.prompts.pop(object_id, None)
        self.names.pop(object_id, None)
        self._answers = {key: answer for key, answer in self._answers.items() if key[0] != object_id}

    def reset_tracking_data(self) -> None:
        """Remove all objects; text queries are searched for again."""
        self.names.clear()
        if self.text is not None:
            self.text.searched = None
        self.objects.clear()
        self.labels = LabelMemory()
        self.prompts.clear()
        self._answers.clear()

    def nbytes(self) -> int:
        """Size of the memories of all objects in bytes."""
        return self.labels.nbytes() + sum(memory.nbytes() for memory in self.objects.values())


class Tracker:
    """What takes the objects of a session from frame to frame.

    Args:
        model: any OVSamModel with a SAM side.
    """

    def __init__(self, model: OVSamModel):
        self.model, self.sam = model, model.sam

    def __call__(
        self, session: OVSamVideoSession, frame_idx: int, features: OVSamFeatures, reverse: bool = False
    ) -> OVSamVideoOutput:
        """Track all objects of a session on one frame, whose features `encode` made.

        Args:
            reverse: the frames come last first.

        Raises:
            InputError: the session asks for a memory that the SAM side does not have.
        """
        with torch.inference_mode():
            if self._remembers(session):
                return self._track(session, frame_idx, features, reverse)
            return self._propagate(session, frame_idx, features)

    def _remembers(self, session: OVSamVideoSession) -> bool:
        """Whether the SAM side's memory tracks, not propagation."""
        has_memory = isinstance(self.sam, Sam2VideoSide)
        if session.tracker == "memory" and not has_memory:
            raise InputError(
                f"The SAM side is {self.model.config.sam_config.model_type!r}, which has no memory; pass "
                'tracker="propagation", or a model of sam2_video or edgetam_video.'
            )
        return has_memory and session.tracker != "propagation"

    def _propagate(self, session: OVSamVideoSession, frame: int, features: OVSamFeatures) -> OVSamVideoOutput:
        assert features.sam is not None
        keys, memory, size = frame_keys(features), session.labels, self.sam.image_size // 4
        known = {number for at, kept in memory.frames.items() if at != frame for number in kept.labels}
        answered = memory.frames.get(frame)  # a prompted frame that tracking passes by once more
        found = memory.propagate(frame, keys, [number for number in session.objects if number in known])
        if answered is not None:
            for number in answered.prompted & session.objects.keys():
                found.prompt(number, answered.labels[number])
        for number in session.objects:
            prompt = session.prompts.get(number, {}).pop(frame, None)
            if prompt is not None:
                mask = prompt.mask
                if mask is None:
                    before = found.labels.get(number)
                    corrected = None if before is None else to_masks(before[None], keys.side, size).masks
                    mask = self._prompted_mask(features, prompt, corrected)
                found.prompt(number, cover(mask[None].to(self.model.device).float(), keys.side)[0])
        memory.store(frame, found)
        labels = found.labels
        order = [number for number in session.objects if number in labels]
        if not order:
            return OVSamVideoOutput(object_ids=[], frame_idx=frame, features=features)
        shown = to_masks(torch.stack([labels[number] for number in order]), keys.side, size)
        return OVSamVideoOutput(
            object_ids=order,
            pred_masks=shown.masks.transpose(0, 1),
            object_score_logits=shown.object_logits[0],
            iou_scores=shown.iou[0],
            frame_idx=frame,
            features=features,
        )

    def _prompted_mask(self, features: OVSamFeatures, prompt: VideoPrompt, before: Tensor | None) -> Tensor:
        """Return the SAM side's mask of points, or of a box and points, [H/4, W/4] bool. Points alone correct the mask
        `before`, logits [1, 1, H/4, W/4]."""
        assert prompt.points is not None and prompt.labels is not None
        points, labels = prompt.points.to(self.model.device), prompt.labels.to(self.model.device)
        corners = labels >= 2
        box = points[corners].reshape(1, 1, 4) if corners.any() else None
        clicks = None if corners.all() else points[~corners][None, None]
        decoded = self.model(
            features=features,
            input_boxes=box,
            input_points=clicks,
            input_labels=None if clicks is None else labels[~corners][None, None],
            input_masks=before if box is None else None,
        )
        return decoded.pred_masks[0, 0, 0] > 0

    def _track(
        self, session: OVSamVideoSession, frame: int, features: OVSamFeatures, reverse: bool
    ) -> OVSamVideoOutput:
        found: dict[int, TrackedMasks] = {}
        masks, first, later = [], [], []  # objects with a mask; with points as first prompt; all others
        for number, memory in session.objects.items():
            prompt = session.prompts.get(number, {}).get(frame)
            if prompt is None and (number, frame) in session._answers:
                found[number] = session._answers[number, frame]
            elif prompt is not None and prompt.mask is not None:
                masks.append(number)
            elif prompt is not None and frame not in memory.tracked:
                first.append(number)
            elif memory.conditioned:
                later.append(number)
        fresh: dict[int, TrackedMasks] = {}
        assert features.sam is not None
        sam = features.sam
        if masks:
            given = torch.stack([session.prompts[number][frame].mask.to(self.model.device) for number in masks])
            fresh |= _each(masks, self.sam.adopt(sam, given[None]))
        for group in _alike(first, lambda number: _points(session, number, frame)):
            recalled = self.sam.without_memory(sam, len(group))
            fresh |= self._segment(session, group, frame, sam, recalled, True)
        config, frames = self.sam.model.config, session.num_frames
        read = {number: session.objects[number].recall(frame, config, reverse, frames) for number in later}
        for group in _alike(later, lambda number: (read[number][0], _points(session, number, frame))):
            spatial = stack_memories([read[number][1] for number in group])[None]  # [1, P, n, T, 64]
            pointers = stack_memories([read[number][2] for number in group])[None]  # [1, P, m, C]
            recalled = self.sam.recall(sam, read[group[0]][0], spatial, pointers)
            fresh |= self._segment(session, group, frame, sam, recalled, False)
        self._remember(session, frame, sam, fresh, masks + first)
        found |= fresh
        order = [number for number in session.objects if number in found]
        shown = [found[number] for number in order]
        return OVSamVideoOutput(
            object_ids=order,
            pred_masks=torch.cat([one.masks for one in shown], 1).transpose(0, 1) if shown else None,
            object_score_logits=torch.cat([one.object_logits[0] for one in shown]) if shown else None,
            iou_scores=torch.cat([one.iou[0] for one in shown]) if shown else None,
            frame_idx=frame,
            features=features,
        )

    def _segment(self, session, group, frame, sam, recalled, first: bool) -> dict[int, TrackedMasks]:
        """Segment objects that have the same number of points."""
        points, labels = None, None
        count = _points(session, group[0], frame)
        if count:
            given = [session.prompts[number][frame] for number in group]
            points = torch.stack([one.points.to(self.model.device) for one in given])[None]
            labels = torch.stack([one.labels.to(self.model.device) for one in given])[None]
        best = self.sam.takes_best(count, first)
        return _each(group, self.sam.segment(sam, recalled, points, labels, best))

    def _remember(
        self, session, frame: int, sam: SamFeatures, fresh: dict[int, TrackedMasks], conditioned: Iterable[int]
    ) -> None:
        conditioned = set(conditioned)
        whole = {number for number in fresh if fresh[number].full is not None}
        for group in (sorted(whole), [number for number in fresh if number not in whole]):
            if not group:
                continue
            together = TrackedMasks(
                masks=torch.cat([fresh[number].masks for number in group], 1),
                object_logits=torch.cat([fresh[number].object_logits for number in group], 1),
                full=torch.cat([fresh[number].full for number in group], 1) if group[0] in whole else None,
            )
            prompted = [session.prompts.get(number, {}).pop(frame, None) is not None for number in group]
            spatial = self.sam.memorise(sam, together, torch.tensor(prompted, device=self.model.device))[
                0
            ]  # [P, T, 64]
            for place, number in enumerate(group):
                # Clone: a view would keep the memories of the whole batch in memory.
                memory = FrameMemory(spatial[place].clone(), fresh[number].pointers[0, 0].clone())
                kept, new = session.objects[number], number in conditioned
                kept.store(frame, memory, new, self.sam.model.config)
                if new:
                    fresh[number].full = None
                    session._answers[number, frame] = fresh[number]


def _points(session: OVSamVideoSession, number: int, frame: int) -> int:
    """Number of points in the prompt of an object on a frame."""
    prompt = session.prompts.get(number, {}).get(frame)
    return 0 if prompt is None or prompt.labels is None else len(prompt.labels)


def _alike(numbers: Iterable[int], key: Callable[[int], Any]) -> list[list[int]]:
    """Group objects by key."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number in numbers:
        groups[key(number)].append(number)
    return list(groups.values())


def _each(numbers: Sequence[int], tracked: TrackedMasks) -> dict[int, TrackedMasks]:
    """Split the masks of P objects on one image into one TrackedMasks each, [1, 1, ...]."""
    return {
        number: TrackedMasks(**{name: tensor[:, place : place + 1] for name, tensor in tracked.items()})
        for place, number in enumerate(numbers)
    }
