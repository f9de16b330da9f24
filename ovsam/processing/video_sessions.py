"""The session calls of the processor, as transformers' processors for video have them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovsam.errors import InputError
from ovsam.modeling.tracking import OVSamVideoSession, VideoPrompt, VideoText
from ovsam.processing.images import open_image


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
        session, numbers = inference_session, [obj_ids] if isinstance(obj_ids, int) else list(obj_ids)
        if original_size is not None:
            session.video_height, session.video_width = original_size
        if input_points is None and input_boxes is None and input_masks is None:
            raise InputError("There is no prompt; pass input_points, input_boxes or input_masks.")
        if input_masks is not None:
            masks = [torch.as_tensor(np.asarray(mask)).bool() for mask in input_masks]
            _check_count("input_masks", len(masks), numbers)
            for number, mask in zip(numbers, masks, strict=True):
                session.add_prompt(number, frame_idx, self.video_mask_prompt(mask))
            return session
        if session.video_height is None or session.video_width is None:
            raise InputError("The size of the frames is not known; pass original_size, height and width.")
        size = session.video_height, session.video_width
        count = len(numbers)
        points, labels = torch.zeros(count, 0, 2), torch.zeros(count, 0, dtype=torch.long)
        if input_points is not None:
            points = torch.as_tensor(np.asarray(input_points, dtype=np.float32))[0]
            labels = torch.ones(points.shape[:2]) if input_labels is None else torch.as_tensor(input_labels)[0]
            _check_count("input_points", len(points), numbers)
        if input_boxes is not None:
            boxes = torch.as_tensor(np.asarray(input_boxes, dtype=np.float32))[0]
            _check_count("input_boxes", len(boxes), numbers)
            points = torch.cat([boxes.view(count, 2, 2), points], 1)  # a box is its two corners, labelled 2 and 3
            labels = torch.cat([torch.tensor([[2, 3]]).expand(count, -1), labels.long()], 1)
        points = self._normalize_coordinates(self.target_size, points, size)  # type: ignore[attr-defined]
        for number, own, kinds in zip(numbers, points, labels.long(), strict=True):
            session.add_prompt(number, frame_idx, VideoPrompt(own, kinds))
        return session

    def add_text_prompt(
        self, inference_session: OVSamVideoSession, text: str | Sequence[str], redetect_every: int = 10
    ) -> OVSamVideoSession:
        """Search for text queries in a session, as the processor of SAM 3 does for one: on the first frame and every
        `redetect_every` frames; the objects get ids in the order in which they are found.

        Raises:
            InputError: a text query is empty or too long for the text tower.
        """
        if redetect_every < 1:
            raise InputError(f"redetect_every is {redetect_every}; it must be 1 or more.")
        labels = [text] if isinstance(text, str) else list(text)
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


def _check_count(name: str, count: int, numbers: Sequence[int]) -> None:
    if count != len(numbers):
        raise InputError(f"There are {count} {name} for {len(numbers)} objects; each object takes one.")
