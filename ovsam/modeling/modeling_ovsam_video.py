"""OVSamVideoModel: an OVSamModel that tracks, called as transformers' own video models are."""

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, Sam2VideoConfig

from ovsam.errors import InputError
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.outputs import OVSamFeatures, OVSamOutput
from ovsam.modeling.tracking import OVSamVideoOutput, OVSamVideoSession, Tracker, VideoPrompt, VideoText
from ovsam.ops.masks import mask_overlap

TRACKERS = ("sam2_video", "edgetam_video")
SAME = 0.5  # highest IoU of a new object with a tracked one


class OVSamVideoModel(OVSamModel):
    """An OVSamModel that also tracks. `sam_config` of type sam2_video or edgetam_video brings a memory; with any other,
    labels are propagated along the correspondence of image features."""

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
        if not session.objects and session.text is None:
            raise InputError("There is no object to track; add a prompt to the session first.")
        if frame_idx is None:
            frame_idx = session.next_frame
        with torch.inference_mode():
            features = self._frame_features(session, frame_idx, frame, features)
        session.next_frame = frame_idx + 1
        tracker = Tracker(self)
        output = tracker(session, frame_idx, features, reverse)
        if session.text is not None and session.text.is_due(frame_idx):
            session.text.searched = frame_idx
            if self._search(session, session.text, frame_idx, features, output):
                output = tracker(session, frame_idx, features, reverse)
        output.text_labels = [session.names.get(number) for number in output.object_ids or ()]
        return output

    @torch.inference_mode()
    def _search(
        self,
        session: OVSamVideoSession,
        text: VideoText,
        frame: int,
        features: OVSamFeatures,
        tracked: OVSamVideoOutput,
    ) -> bool:
        """Prompt the instances of the text queries on a frame that no track covers; returns whether there are any."""
        ids, mask = text.input_ids.to(self.device), text.attention_mask
        mask = None if mask is None else mask.to(self.device)
        found = super().forward(features=features, input_ids=ids, attention_mask=mask, text_labels=text.labels)
        scores, words = found.scores[0].max(-1)  # [I, K] -> [I]
        logits = found.pred_masks[0, :, 0].float()  # [I, H/4, W/4]
        taken = [] if tracked.pred_masks is None else list(tracked.pred_masks[:, 0] > 0)
        live = len(taken)
        for place in scores.argsort(descending=True).tolist():
            if not found.valid[0, place] or scores[place] < found.score_threshold or not (logits[place] > 0).any():
                continue
            own = logits[place] > 0
            if taken and mask_overlap(own[None], torch.stack(taken)).max() > SAME:
                continue
            taken.append(own)
            number = max(session.objects, default=0) + 1
            size = (self.sam.image_size, self.sam.image_size)
            whole = F.interpolate(logits[place][None, None], size, mode="bilinear", align_corners=False)[0, 0] > 0
            session.add_prompt(number, frame, VideoPrompt(mask=whole))
            session.names[number] = text.labels[int(words[place])]
        return len(taken) > live

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
        prompted += [number for number, kept in session.labels.frames.items() if kept.prompted]
        start_frame_idx = _number("start_frame_idx", start_frame_idx, frames - 1)
        max_frame_num_to_track = _number("max_frame_num_to_track", max_frame_num_to_track)
        if start_frame_idx is None and session.text is not None:
            start_frame_idx = 0
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
        features = self.encode(*pixels, concepts=False)
        session._encoded = frame_idx, features
        return features


def _number(name: str, value: Any, most: int | None = None) -> int | None:
    """None, or a whole number from 0 to `most`; raises InputError for others."""
    if value is None or isinstance(value, Integral) and 0 <= int(value) and (most is None or int(value) <= most):
        return value if value is None else int(value)
    raise InputError(f"{name} must be a whole number from 0{'' if most is None else f' to {most}'}; got {value!r:.60}.")


def with_memory(model: OVSamModel, image_size: int | None = None, **memory: Any) -> OVSamVideoModel:
    """Return a copy of a model whose SAM side has the memory of SAM 2: for training it.

    Args:
        model: a model whose SAM side is SAM 2 or EdgeTAM. One for images gets a memory with new weights.
        image_size: side of the images of the copy in pixels (default: as before). All weights fit any size; training
            on small images first is faster.
        memory: fields of Sam2VideoConfig, such as num_maskmem; widths are those of the SAM side.

    Raises:
        InputError: the mask decoder of the SAM side is not SAM 2's, or the size is no multiple of the stride.
    """
    side, config = model.sam, OVSamConfig.from_dict(model.config.to_dict())
    if config.sam_config.model_type not in TRACKERS:
        if not any(kind in TRACKERS for kind in side.trackers):
            raise InputError(
                f"The SAM side is {config.sam_config.model_type!r}; a memory is added to sam2 and edgetam only."
            )
        image = config.sam_config.to_dict()
        parts = {name: part for name, part in image.items() if name.endswith("_config")}
        for name in ("prompt_encoder_config", "mask_decoder_config"):
            parts[name].pop("model_type")  # the image model's
        widths = ("memory_attention_hidden_size", "memory_encoder_hidden_size", "mask_downsampler_embed_dim")
        settings = dict.fromkeys((*widths, "memory_fuser_embed_dim"), side.width)
        settings["multimask_output_for_tracking"] = False  # a memory is no ambiguous prompt
        config.sam_config = Sam2VideoConfig(**parts, **settings | memory)
    _set_image_size(config.sam_config, image_size or side.image_size)
    whole = OVSamVideoModel(config)
    missing, _ = whole.load_state_dict(model.state_dict(), strict=False)
    whole.to(model.device, model.dtype).train(model.training)
    if missing:
        _scale_recalled(whole)
    return whole


@torch.no_grad()
def _scale_recalled(model: OVSamVideoModel) -> None:
    """Scale the output of new memory attention as the image features that it replaces; the mask decoder was trained for
    those, and their standard deviation is far from the 1 of a new layer normalisation."""
    side = model.sam
    noise = torch.randn(1, 3, side.image_size, side.image_size, device=model.device, dtype=model.dtype)
    side.model.memory_attention.layer_norm.weight.mul_(model.encode(noise, concepts=False).sam.pyramid[2].std())


def _set_image_size(config: PreTrainedConfig, size: int) -> None:
    """Set every size that follows from the side of the square input."""
    prompts, vision = config.prompt_encoder_config, config.vision_config
    if size < 1 or size % (2 * prompts.patch_size):
        raise InputError(f"image_size must be a multiple of {2 * prompts.patch_size}; got {size}.")
    scale = size / prompts.image_size
    vision.backbone_feature_sizes = [[round(side * scale) for side in one] for one in vision.backbone_feature_sizes]
    prompts.image_size = config.image_size = size
    config.memory_attention_rope_feat_sizes = [size // prompts.patch_size] * 2
