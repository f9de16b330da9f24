"""The session calls of the processor, as transformers' processors for video have them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsam.errors import InputError
from ovsam.modeling.tracking import OVSamVideoSession, VideoPrompt, VideoText
from ovsam.processing import arguments
from ovsam.processing.images import open_image
from ovsam.processing.inputs import check_sizes
from ovsam.processing.vocabulary import to_vocabulary


class VideoSessions:
    """What a processor adds to make and prompt sessions of `OVSamVideoModel`."""

    def init_video_session(
        self, video: Sequence[Any] | None = None, tracker: str = "auto", **unused: Any
    ) -> OVSamVideoSession:
        """A session of a video, or of a stream whose frames are passed to the model one by one.

        Args:
            video: frames, images of any kind that the processor takes; each is processed when it is needed.
            tracker: as in OVSamVideoSession.
            unused: devices and dtypes, which transformers' sessions take; here they are the model's own.
        """
        if video is None:
            return OVSamVideoSession(tracker=tracker)
        listed = arguments.is_sequence(video) or hasattr(video, "ndim") and video.ndim > 0
        if not listed:
            raise InputError(f"The video is {arguments.short(video)}; it must be a list of frames.")
        if not len(video):
            raise InputError("The video has no frames.")
        first = open_image(video[0])
        return OVSamVideoSession(video, self._prepare_frame, first.height, first.width, tracker)

    def add_inputs_to_inference_session(
        self,
        inference_session: OVSamVideoSession,
        frame_idx: int,
        obj_ids: Sequence[int] | int,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        original_size: tuple[int, int] | None = None,
    ) -> OVSamVideoSession:
        """Prompt objects on a frame; a new prompt replaces an older one of the same object and frame.

        Args:
            obj_ids: the n objects, new or known.
            input_points: [1, n, N, 2] in pixels of the frame, with input_labels [1, n, N]: 1 inside, 0 outside.
            input_boxes: [1, n, 4].
            input_masks: n masks [H, W].
            original_size: height and width of the frames, for a stream.

        Raises:
            InputError: no prompt, the counts differ, or the size of the frames is not known.
        """
        session, numbers = inference_session, _object_ids(obj_ids)
        frame_idx = arguments.whole("frame_idx", frame_idx, 0, session.num_frames and session.num_frames - 1)
        if original_size is not None:
            sizes = check_sizes(original_size) or []
            if len(sizes) != 1:
                raise InputError(f"The original_size is {arguments.short(original_size)}; it must be (height, width).")
            session.video_height, session.video_width = sizes[0]
        if input_points is None and input_boxes is None and input_masks is None:
            raise InputError("There is no prompt; pass input_points, input_boxes or input_masks.")
        if input_masks is not None:
            masks = arguments.masks(input_masks) > 0
            _check_count("input_masks", len(masks), numbers)
            for number, mask in zip(numbers, masks, strict=True):
                session.add_prompt(number, frame_idx, self.video_mask_prompt(torch.from_numpy(mask)))
            return session
        if session.video_height is None or session.video_width is None:
            raise InputError("The size of the frames is not known; pass original_size, height and width.")
        size = session.video_height, session.video_width
        form = "[1][object][point]"
        points = _of_objects("input_points", input_points, numbers, 3, 2, f"{form}[x, y]")
        labels = _of_objects("input_labels", input_labels, numbers, 3, None, f"{form}, 1 or 0 each")
        boxes = _of_objects("input_boxes", input_boxes, numbers, 2, 4, "[1][object][x1, y1, x2, y2]")
        for number, own, kinds, box in zip(numbers, points, labels, boxes, strict=True):
            own, kinds = list(own), arguments.point_labels(kinds, len(own)) if kinds else [1] * len(own)
            if box:  # its two corners, labelled 2 and 3
                own, kinds = [box[:2], box[2:], *own], [2, 3, *kinds]
            if not own:
                raise InputError(f"The object {number} has no prompt; give it at least a point or a box.")
            given = self._normalize_coordinates(self.target_size, torch.tensor(own), size)  # type: ignore[attr-defined]
            session.add_prompt(number, frame_idx, VideoPrompt(given, torch.tensor(kinds)))
        return session

    def add_text_prompt(
        self, inference_session: OVSamVideoSession, text: str | Sequence[str], redetect_every: int = 10
    ) -> OVSamVideoSession:
        """Search for text queries in a session, as the processor of SAM 3 does for one: on the first frame and every
        `redetect_every` frames; the objects get ids in the order in which they are found.

        Raises:
            InputError: a text query is empty or too long for the text tower.
        """
        redetect_every = arguments.whole("redetect_every", redetect_every, 1)
        labels = to_vocabulary(text).prompts
        tokens = self(text=labels, original_sizes=[(1, 1)])  # type: ignore[operator]
        inference_session.text = VideoText(labels, tokens["input_ids"], tokens.get("attention_mask"), redetect_every)
        return inference_session

    def video_mask_prompt(self, mask: Tensor) -> VideoPrompt:
        """A mask [H, W] of a frame as the model input shows it."""
        size = self.target_size  # type: ignore[attr-defined]
        logits = self.mask_prompts(mask[None], size)  # type: ignore[attr-defined]  # [1, 1, size / 4, size / 4]
        whole = F.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
        return VideoPrompt(mask=whole[0, 0] > 0)

    def _prepare_frame(self, frame: Any) -> Any:
        return self(images=[open_image(frame)])  # type: ignore[operator]


def _object_ids(given: Any) -> list[int]:
    found = arguments.plain(given)
    found = found if arguments.is_sequence(found) else [found]
    numbers = [arguments.whole("obj_ids", one, 0) for one in found]
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"The obj_ids are {arguments.short(given)}; they must be different numbers, at least one.")
    return numbers


def _of_objects(name: str, value: Any, numbers: Sequence[int], depth: int, width: int | None, form: str) -> list:
    """The prompts of each object, from those of the one frame; empty without any."""
    frames = arguments.prompts(name, value, depth, width, form)
    if frames is None:
        return [[]] * len(numbers)
    if len(frames) != 1:
        raise InputError(f"The {name} are for {len(frames)} frames; they must be for one, {form}.")
    _check_count(name, len(frames[0]), numbers)
    return frames[0]


def _check_count(name: str, count: int, numbers: Sequence[int]) -> None:
    if count != len(numbers):
        raise InputError(f"There are {count} {name} for {len(numbers)} objects; each object takes one.")
