"""OVSamVideoModel: an OVSamModel whose SAM side remembers; sessions as transformers' SAM 2 has them for video.

`forward(session, frame_idx)` tracks every object of a session on one frame: objects whose memories have the same shape
go through memory attention, mask decoder and memory encoder as one batch. What a session holds does not grow with the
number of frames (see `ovsam.modeling.sam.memory`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from ovsam.errors import InputError
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.outputs import OVSamFeatures, OVSamOutput, SamFeatures, TrackedMasks
from ovsam.modeling.sam.memory import FrameMemory, ObjectMemory, stack_memories
from ovsam.modeling.sam.video import Sam2VideoSide


@dataclass(frozen=True)
class VideoPrompt:
    """What selects one object on one frame: points, or a mask.

    Attributes:
        points: [N, 2] as x, y in pixels of the model input.
        labels: [N]: 1 inside, 0 outside, 2 and 3 the two corners of a box.
        mask: [H, W] bool at the size of the model input.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class OVSamVideoOutput(ModelOutput):
    """One frame: P objects. Objects whose first prompt lies on another frame are not among them.

    Attributes:
        object_ids: the P ids.
        pred_masks: logits [P, 1, H/4, W/4].
        object_score_logits: is the object in the picture, [P, 1].
        iou_scores: predicted IoU of the masks, [P].
        frame_idx: number of the frame.
        features: of the frame, to ask further questions about it without encoding it again.
    """

    object_ids: list[int] | None = None
    pred_masks: Tensor | None = None
    object_score_logits: Tensor | None = None
    iou_scores: Tensor | None = None
    frame_idx: int | None = None
    features: OVSamFeatures | None = None


class OVSamVideoSession:
    """A video and the objects that are tracked in it.

    Args:
        video: the frames, as images; None where they come one by one. Any sequence: a frame is read when it is needed.
        prepare: what makes model inputs of a frame, a mapping with `pixel_values` and whatever else `encode` takes.
        video_height, video_width: size of the frames in pixels.
    """

    def __init__(
        self,
        video: Sequence[Any] | None = None,
        prepare: Callable[[Any], Mapping[str, Tensor]] | None = None,
        video_height: int | None = None,
        video_width: int | None = None,
    ):
        self.video, self.prepare = video, prepare
        self.video_height, self.video_width = video_height, video_width
        self.objects: dict[int, ObjectMemory] = {}
        self.prompts: dict[int, dict[int, VideoPrompt]] = {}
        self.next_frame = 0  # of a stream
        self._encoded: tuple[int, OVSamFeatures] | None = None  # the last frame's features
        # Masks that were answered to prompts, so that they are not decoded again when tracking passes by.
        self._answers: dict[tuple[int, int], TrackedMasks] = {}

    @property
    def num_frames(self) -> int | None:
        return None if self.video is None else len(self.video)

    @property
    def obj_ids(self) -> list[int]:
        return list(self.objects)

    def add_prompt(self, object_id: int, frame_idx: int, prompt: VideoPrompt) -> None:
        """Prompt an object, a new one or a known one; it takes effect when the model is next given that frame."""
        self.objects.setdefault(object_id, ObjectMemory())
        self.prompts.setdefault(object_id, {})[frame_idx] = prompt

    def remove_object(self, object_id: int) -> None:
        """Forget an object; other ids stay as they are. Raises InputError: there is no such object."""
        if object_id not in self.objects:
            raise InputError(f"There is no object {object_id}; there are {self.obj_ids or 'none'}.")
        del self.objects[object_id]
        self.prompts.pop(object_id, None)
        self._answers = {key: answer for key, answer in self._answers.items() if key[0] != object_id}

    def reset_tracking_data(self) -> None:
        """Forget all objects."""
        self.objects.clear()
        self.prompts.clear()
        self._answers.clear()

    def nbytes(self) -> int:
        """Bytes of the memories of all objects."""
        return sum(memory.nbytes() for memory in self.objects.values())


class OVSamVideoModel(OVSamModel):
    """An OVSamModel that also tracks. Needs a SAM side with a memory: `sam_config` of type sam2_video or edgetam_video.

    Raises:
        InputError: the SAM side has no memory.
    """

    sam: Sam2VideoSide

    def __init__(self, config: OVSamConfig):
        super().__init__(config)
        if not isinstance(self.sam, Sam2VideoSide):
            raise InputError(
                f"The SAM side is {config.sam_config.model_type!r}, which has no memory; video needs sam2_video or "
                "edgetam_video."
            )

    def forward(
        self,
        inference_session: OVSamVideoSession | None = None,
        frame_idx: int | None = None,
        frame: Tensor | Mapping[str, Tensor] | None = None,
        features: OVSamFeatures | None = None,
        reverse: bool = False,
        **image_inputs: Any,
    ) -> OVSamVideoOutput | OVSamOutput:
        """Track the objects of a session on one frame. Without a session it answers about images, as OVSamModel does.

        Args:
            inference_session: from `OVSamProcessor.init_video_session`.
            frame_idx: number of the frame; of a stream, the next one if it is not given.
            frame: the frame itself, of a stream: pixel_values [1, 3, H, W] or [3, H, W], or all that the processor made
                of it.
            features: what `encode` made of the frame, in place of `frame`.
            reverse: the frames come last first.

        Raises:
            InputError: no frame, or no object to track.
        """
        if inference_session is None:
            return super().forward(features=features, **image_inputs)
        session = inference_session
        if not session.objects:
            raise InputError("There is no object to track; add a prompt to the session first.")
        if frame_idx is None:
            frame_idx = session.next_frame
        with torch.inference_mode():
            features = self._frame_features(session, frame_idx, frame, features)
            session.next_frame = frame_idx + 1
            return self._track(session, frame_idx, features, reverse)

    def propagate_in_video_iterator(
        self,
        inference_session: OVSamVideoSession,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[OVSamVideoOutput]:
        """Track through a session's video, one output a frame.

        Args:
            start_frame_idx: the first frame; by default the earliest one with a prompt.
            max_frame_num_to_track: how many frames after it; by default all.
            reverse: towards the beginning.

        Raises:
            InputError: the session has no video, or no object.
        """
        session, frames = inference_session, inference_session.num_frames
        if frames is None:
            raise InputError("The session has no video; pass one to init_video_session, or each frame to the model.")
        prompted = [number for by_frame in session.prompts.values() for number in by_frame]
        prompted += [number for memory in session.objects.values() for number in memory.conditioned]
        if start_frame_idx is None:
            if not prompted:
                raise InputError("There is no object to track; add a prompt to the session first.")
            start_frame_idx = min(prompted)
        most = frames if max_frame_num_to_track is None else max_frame_num_to_track
        if reverse:
            numbers = range(start_frame_idx, max(start_frame_idx - most, 0) - 1, -1) if start_frame_idx else range(0)
        else:
            numbers = range(start_frame_idx, min(start_frame_idx + most, frames - 1) + 1)
        for number in tqdm(numbers, desc="propagate in video", disable=not show_progress_bar):
            yield self(session, frame_idx=number, reverse=reverse)

    # ---- one frame ------------------------------------------------------------------------------------------------

    def _frame_features(self, session, frame_idx, frame, features) -> OVSamFeatures:
        if features is not None:
            return features
        if session._encoded is not None and session._encoded[0] == frame_idx and frame is None:
            return session._encoded[1]
        if frame is None:
            if session.video is None or session.prepare is None:
                raise InputError(f"Pass frame {frame_idx}, or a video to init_video_session.")
            frame = session.prepare(session.video[frame_idx])
        if isinstance(frame, Tensor):
            frame = {"pixel_values": frame if frame.ndim == 4 else frame[None]}
        names = ("pixel_values", "clip_pixel_values", "clip_window")
        pixels = [frame[name].to(self.device) if frame.get(name) is not None else None for name in names]
        features = self.encode(*pixels)
        session._encoded = frame_idx, features
        return features

    def _track(
        self, session: OVSamVideoSession, frame: int, features: OVSamFeatures, reverse: bool
    ) -> OVSamVideoOutput:
        found: dict[int, TrackedMasks] = {}
        masks, first, later = [], [], []  # objects with a mask, with a first prompt of points, and all others
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
            given = torch.stack([session.prompts[number][frame].mask.to(self.device) for number in masks])
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
        """Objects with equally many points."""
        config, points, labels = self.sam.model.config, None, None
        count = _points(session, group[0], frame)
        if count:
            given = [session.prompts[number][frame] for number in group]
            points = torch.stack([one.points.to(self.device) for one in given])[None]
            labels = torch.stack([one.labels.to(self.device) for one in given])[None]
        multimask = config.multimask_output_in_sam and (first or config.multimask_output_for_tracking)
        multimask &= config.multimask_min_pt_num <= count <= config.multimask_max_pt_num
        return _each(group, self.sam.segment(sam, recalled, points, labels, multimask))

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
            spatial = self.sam.memorise(sam, together, torch.tensor(prompted, device=self.device))[0]  # [P, T, 64]
            for place, number in enumerate(group):
                # Clones: a view would keep the memories of the whole batch alive.
                memory = FrameMemory(spatial[place].clone(), fresh[number].pointers[0, 0].clone())
                kept, new = session.objects[number], number in conditioned
                kept.store(frame, memory, new, self.sam.model.config)
                if new:
                    fresh[number].full = None
                    session._answers[number, frame] = fresh[number]


def _points(session: OVSamVideoSession, number: int, frame: int) -> int:
    """How many points an object's prompt on a frame has."""
    prompt = session.prompts.get(number, {}).get(frame)
    return 0 if prompt is None or prompt.labels is None else len(prompt.labels)


def _alike(numbers: Iterable[int], key: Callable[[int], Any]) -> list[list[int]]:
    """Objects in groups of one key."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number in numbers:
        groups[key(number)].append(number)
    return list(groups.values())


def _each(numbers: Sequence[int], tracked: TrackedMasks) -> dict[int, TrackedMasks]:
    """The masks of P objects on one image, each for itself [1, 1, ...]."""
    return {
        number: TrackedMasks(**{name: tensor[:, place : place + 1] for name, tensor in tracked.items()})
        for place, number in enumerate(numbers)
    }
