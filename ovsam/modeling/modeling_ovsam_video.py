"""OVSamVideoModel: an OVSamModel whose SAM side has a memory, with sessions like those of SAM 2 video in transformers.

`forward(session, frame_idx)` tracks every object of a session on one frame: objects whose memories have the same shape
go through memory attention, mask decoder and memory encoder as one batch. The size of a session does not grow with the
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
class OVSamVideoOutput(ModelOutput):
    """Output for one frame with P objects. Objects without a prompt on this frame or on a tracked one are left out.

    Attributes:
        object_ids: ids of the P objects.
        pred_masks: logits [P, 1, H/4, W/4].
        object_score_logits: logits that the object is in the image, [P, 1].
        iou_scores: predicted IoU of the masks, [P].
        frame_idx: number of the frame.
        features: features of the frame, which can be reused without encoding it again.
    """

    object_ids: list[int] | None = None
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
        self.prompts.pop(object_id, None)
        self._answers = {key: answer for key, answer in self._answers.items() if key[0] != object_id}

    def reset_tracking_data(self) -> None:
        """Remove all objects."""
        self.objects.clear()
        self.prompts.clear()
        self._answers.clear()

    def nbytes(self) -> int:
        """Size of the memories of all objects in bytes."""
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
        """Track the objects of a session on one frame. Without a session this is the forward of OVSamModel, for images.

        Args:
            inference_session: from `OVSamProcessor.init_video_session`.
            frame_idx: number of the frame (default for a stream: the next one).
            frame: the frame of a stream: pixel_values [1, 3, H, W] or [3, H, W], or the output of the processor.
            features: output of `encode` for the frame, in place of `frame`.
            reverse: whether frames are tracked from the last to the first.

        Raises:
            InputError: there is no frame or no object to track.
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
        """Track through the video of a session; yields one output for each frame.

        Args:
            start_frame_idx: the first frame (default: the earliest one with a prompt).
            max_frame_num_to_track: number of frames after the first one (default: all).
            reverse: whether to track towards the beginning of the video.

        Raises:
            InputError: the session has no video or no object.
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
        """Segment objects that have the same number of points."""
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
