"""`ovsam.load_video(...)` -> VideoSegmenter: text queries, points, boxes and masks in a video -> tracks, frame by
frame."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ovsam.errors import InputError
from ovsam.inference.encoded import EncodedImage
from ovsam.inference.frames import Frame, FrameSource
from ovsam.inference.loading import load
from ovsam.inference.options import check_negative, check_share
from ovsam.inference.questions import Words
from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.outputs import OVSamFeatures
from ovsam.modeling.sam.propagation import cover, frame_keys
from ovsam.modeling.tracking import OVSamVideoOutput, OVSamVideoSession, Tracker, VideoPrompt
from ovsam.ops import rle
from ovsam.processing import arguments
from ovsam.processing.vocabulary import Vocabulary, to_vocabulary
from ovsam.results.instance import Instance
from ovsam.results.results import Results
from ovsam.results.tracks import FrameResults

SAME = 0.5  # lowest mask IoU at which a detection and a track are one object
COVERED = 0.7  # lowest fraction of a detection inside a track at which it is no new object
ALIKE = 0.8  # lowest cosine of appearances at which an object is found again
LARGER = 3.0  # highest ratio of areas at which an object is found again
OBJECT = "object"  # the label without class names


def load_video(model: Any = "auto", device: Any = None, dtype: Any = None, tracker: str = "auto") -> "VideoSegmenter":
    """Load a VideoSegmenter for a preset, a folder or a Hub id; model, device and dtype are those of `ovsam.load`.
    Presets keep the memory of their SAM 2, unless `tracker` is "propagation"."""
    return VideoSegmenter(load(model, device, dtype, memory=tracker != "propagation"), tracker)


@dataclass(frozen=True)
class Prompt:
    """A prompt that selects one object on one frame of a video, in pixels of the frame.

    Attributes:
        points: points [[x, y], ...], with labels: 1 on the object, 0 beside it; all 1 by default.
        box: box [x1, y1, x2, y2].
        mask: mask [H, W], true on the object.
        frame: number of the frame.
        id: id of the object; by default a new one.
        name: its class name; by default that of the highest score in the vocabulary.
    """

    points: Sequence[Sequence[float]] | None = None
    labels: Sequence[int] | None = None
    box: Sequence[float] | None = None
    mask: Any = None
    frame: int = 0
    id: int | None = None
    name: str | None = None

    def checked(self) -> "Prompt":
        """Return the prompt with lists of numbers, and a mask [H, W] of bool.

        Raises:
            InputError: it has no content, content that cannot be combined, or values of a wrong type.
        """
        points, boxes = arguments.points(self.points), arguments.boxes(self.box, "box")
        if len(boxes) > 1:
            raise InputError(f"A prompt selects one object; pass one box with it, not {len(boxes)}.")
        if not points and not boxes and self.mask is None:
            raise InputError("A prompt needs points, a box or a mask.")
        if self.mask is not None and (points or boxes):
            raise InputError("A mask prompt cannot be combined; leave out its points and its box.")
        mask = None if self.mask is None else arguments.masks(self.mask)
        if mask is not None and len(mask) != 1:
            raise InputError(f"A prompt selects one object; pass one mask with it, not {len(mask)}.")
        if not (self.name is None or isinstance(self.name, str)):
            raise InputError(f"The name of a prompt is {arguments.short(self.name)}; it must be a string.")
        return Prompt(
            points or None,
            None if self.labels is None else arguments.point_labels(self.labels, len(points)),
            boxes[0] if boxes else None,
            None if mask is None else mask[0] > 0,
            arguments.whole("frame", self.frame, 0),
            arguments.optional(arguments.whole, "id of a prompt", self.id, 0),
            self.name,
        )


def _checked_prompts(prompts: Any) -> list[Prompt]:
    """The prompts, each checked; one may stand alone."""
    given = [prompts] if isinstance(prompts, Prompt) else prompts
    if not arguments.is_sequence(given) or not all(isinstance(one, Prompt) for one in given):
        raise InputError(f"The prompts are {arguments.short(prompts)}; they must be a list of ovsam.Prompt(...).")
    return [one.checked() for one in given]


@dataclass
class _Object:
    """State of an object besides its memory. `appearance`: mean features of its mask, L2-normalised; `named`: whether
    its class names of highest score are those of the vocabulary."""

    id: int
    label: str
    label_id: int
    source: str
    prompt: Any
    score: float
    topk: list[tuple[str, float]] = field(default_factory=list)
    appearance: Tensor | None = None
    area: int = 0
    seen: int = 0
    named: bool = False


class VideoSegmenter:
    """A Segmenter for videos, in which objects keep their identity.

    Args:
        segmenter: the Segmenter of single frames.
        tracker: "memory", that of the SAM side; "propagation", which needs no training; "auto": the former if the SAM
            side has one.
    """

    def __init__(self, segmenter: Segmenter, tracker: str = "auto"):
        OVSamVideoSession(tracker=tracker)  # raises an error for unknown trackers
        self.segmenter, self.tracker = segmenter, tracker

    def track(
        self,
        source: Any,
        words: Words | None = None,
        prompts: Sequence[Prompt] = (),
        *,
        negative: Vocabulary | Sequence[str] = (),
        threshold: float | None = None,
        vocabulary: Words | None = None,
        redetect_every: int = 10,
        patience: int = 30,
        exclusive: bool = True,
        every: int = 1,
        top_k: int = 5,
    ) -> "VideoStream":
        """Track objects through a video.

        Args:
            source: source as in `FrameSource`: a file, a camera, an address, a folder of images, or images.
            words: text queries; their instances are detected on the first frame and every `redetect_every` frames.
            prompts: prompts of selected objects; more can be added while it runs.
            negative, threshold: as in `Segmenter.where`.
            vocabulary: class names for selected objects, by default the checkpoint's own; if it is given, also those
                that are listed for objects of text queries.
            patience: number of frames after which an absent object is removed; found again, it gets its old id.
            exclusive: whether each pixel belongs to one object only.
            every: read only every `every`-th frame.
            top_k: number of class names listed for each object.

        Returns:
            an iterator over `FrameResults`; frames are read when they are requested.

        Raises:
            InputError: there is nothing to track, or the video cannot be read.
        """
        for name, value in (("redetect_every", redetect_every), ("patience", patience), ("every", every)):
            arguments.whole(name, value, 1)
        arguments.flag("exclusive", exclusive)
        arguments.whole("top_k", top_k, 0)
        prompts = _checked_prompts(prompts)
        words = None if words is None else to_vocabulary(words)
        if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary(vocabulary)
        unwanted, threshold = check_negative(negative), check_share("threshold", threshold)
        return VideoStream(
            self, FrameSource(source), words, prompts, unwanted, threshold, vocabulary,
            redetect_every, patience, exclusive, every, top_k,
        )  # fmt: skip


class VideoStream:
    """The frames of a video with their objects, computed one by one; from `VideoSegmenter.track`.

    Attributes:
        source: the FrameSource, with its rate and length.
        frame: the FrameResults that were yielded last, None before the first.
    """

    def __init__(
        self,
        video: VideoSegmenter,
        source: FrameSource,
        words: Words | None,
        prompts: Sequence[Prompt],
        negative: Vocabulary | None,
        threshold: float | None,
        vocabulary: Words | None,
        redetect_every: int,
        patience: int,
        exclusive: bool,
        every: int,
        top_k: int,
    ):
        self.segmenter, self.source = video.segmenter, source
        self.words, self.negative, self.threshold, self.vocabulary = words, negative, threshold, vocabulary
        self.redetect_every, self.patience, self.exclusive, self.every = redetect_every, patience, exclusive, every
        self.top_k = top_k
        self.frame: FrameResults | None = None
        self._tracker, self._session = Tracker(self.segmenter.model), OVSamVideoSession(tracker=video.tracker)
        self._pending = list(prompts)
        self._objects: dict[int, _Object] = {}
        self._lost: dict[int, _Object] = {}
        self._last_id = max([prompt.id or 0 for prompt in prompts], default=0)
        self._now: tuple[Frame, EncodedImage] | None = None

    def __iter__(self) -> Iterator[FrameResults]:
        detections = 0
        for frame in self.source:
            if frame.index % self.every:
                continue
            encoded = frame.encoded or self.segmenter.encode_frame(frame.image)
            self._now = frame, encoded
            self._prompt(frame, encoded)
            found = self._run(frame, encoded)
            if self.words is not None and detections % self.redetect_every == 0:
                if self._detect(frame, encoded, found):
                    found = self._run(frame, encoded)
            detections += 1
            self.frame = self._results(frame, encoded, found)
            yield self.frame

    def close(self) -> None:
        """Close the video."""
        self.source.close()

    @property
    def nbytes(self) -> int:
        """Size of the stored features of earlier frames in bytes."""
        return self._session.nbytes()

    # ---- while it runs ----------------------------------------------------------------------------------------------

    def add(self, prompt: Prompt) -> None:
        """Select an object on a later frame, or correct one by its id.

        Raises:
            InputError: the prompt is invalid, or its frame has passed.
        """
        (prompt,) = _checked_prompts([prompt])
        if self.frame is not None and prompt.frame <= self.frame.index:
            raise InputError(f"Frame {prompt.frame} has passed; `correct` changes frame {self.frame.index}.")
        self._pending.append(prompt)

    def correct(self, prompt: Prompt) -> FrameResults:
        """Select or correct an object on the last yielded frame, and return that frame again.

        Raises:
            InputError: there is no frame yet, or the prompt is invalid.
        """
        (prompt,) = _checked_prompts([prompt])
        if self._now is None or self.frame is None:
            raise InputError("There is no frame yet; pass the prompt to `track`, or request the first frame.")
        frame, encoded = self._now
        self._add(frame, encoded, prompt)
        self.frame = self._results(frame, encoded, self._run(frame, encoded))
        return self.frame

    def remove(self, number: int) -> None:
        """Stop tracking an object. Raises InputError if the id is unknown."""
        if arguments.whole("number of a track", number, 0) not in self._objects:
            raise InputError(f"There is no track {number}; current tracks: {sorted(self._objects) or 'none'}.")
        self._session.remove_object(number)
        del self._objects[number]

    def what(self, number: int, vocabulary: Words | None = None) -> list[tuple[str, float]]:
        """Return the class names of highest score for a track on the last yielded frame, from any vocabulary.

        Raises:
            InputError: the track is not in the frame.
        """
        arguments.whole("number of a track", number, 0)
        shown = [] if self.frame is None else [one for one in self.frame.results if one.id == number]
        if not shown or self._now is None:
            raise InputError(f"The track {number} is not in the frame.")
        masks = torch.from_numpy(shown[0].mask)[None]
        named = self.segmenter.what(self._now[1], masks=masks, vocabulary=vocabulary, top_k=self.top_k)
        return cast(Results, named)[0].topk

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _prompt(self, frame: Frame, encoded: EncodedImage) -> None:
        due = [prompt for prompt in self._pending if prompt.frame <= frame.index]
        self._pending = [prompt for prompt in self._pending if prompt.frame > frame.index]
        for prompt in due:
            self._add(frame, encoded, prompt)

    def _add(self, frame: Frame, encoded: EncodedImage, prompt: Prompt) -> None:
        """Pass a prompt to the session, and classify its object if it is new."""
        width, height = frame.image.size
        number = self._new_id() if prompt.id is None else prompt.id
        self._last_id = max(self._last_id, number)
        if prompt.mask is not None:
            mask = torch.as_tensor(prompt.mask)
            if tuple(mask.shape) != (height, width):
                got = "x".join(map(str, reversed(mask.shape)))
                raise InputError(f"The mask is {got} pixels and the frame {width}x{height}; they must be equal.")
            if not mask.any():
                raise InputError("The mask is empty; it needs at least one pixel of the object.")
            given = self.segmenter.processor.video_mask_prompt(mask)
        else:
            given = self._point_prompt(prompt, width, height)
        source = "mask" if prompt.mask is not None else "point" if prompt.box is None else "box"
        shown = {"mask": "mask", "point": prompt.points, "box": prompt.box}[source]
        self._session.add_prompt(number, frame.index, given)
        self._lost.pop(number, None)
        if number not in self._objects:
            name = prompt.name or ""
            self._objects[number] = _Object(number, name, -1, source, shown, 1.0, seen=frame.index)

    def _point_prompt(self, prompt: Prompt, width: int, height: int) -> VideoPrompt:
        points = [list(point) for point in prompt.points or ()]
        labels = list(prompt.labels or [1] * len(points))
        boxes = [] if prompt.box is None else [list(prompt.box)]
        arguments.check_inside((width, height), points, boxes, "the frame")
        for x1, y1, x2, y2 in boxes:
            points, labels = [[x1, y1], [x2, y2], *points], [2, 3, *labels]
        inputs = self.segmenter.processor(
            original_sizes=[(height, width)], input_points=[[points]], input_labels=[[labels]]
        )
        return VideoPrompt(inputs["input_points"][0, 0].float(), torch.tensor(labels))

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # ---- words ------------------------------------------------------------------------------------------------------

    def _detect(self, frame: Frame, encoded: EncodedImage, found: OVSamVideoOutput | None) -> bool:
        """Search for the text queries; match detections, add new objects and restore lost ones. Returns whether any
        were added."""
        size = frame.image.height, frame.image.width
        answer = self.segmenter.where(
            encoded, self.words, negative=self.negative, threshold=self.threshold, top_k=self.top_k
        )
        detected = cast(Results, answer).instances
        masks = {} if found is None else dict(zip(found.object_ids, self._full_masks(found, size), strict=True))
        live = [number for number in masks if masks[number].any()]
        tracks = [rle.encode(masks[number]) for number in live]
        overlap = rle.iou([one.segmentation for one in detected], tracks)  # [detections, tracks]
        same = np.array([[one.label == self._objects[n].label for n in live] for one in detected], dtype=bool)
        allowed = np.where(same.reshape(overlap.shape), overlap, 0.0)
        matched = {d: live[t] for d, t in zip(*linear_sum_assignment(-allowed), strict=True) if allowed[d, t] >= SAME}
        for place, number in matched.items():
            known = self._objects[number]
            known.score = detected[place].score
            if not known.named:
                known.topk = detected[place].topk
        inside = rle.covered([one.segmentation for one in detected], tracks)
        added, taken = False, list(tracks)
        for place, one in enumerate(detected):
            if place in matched or (inside.shape[1] and inside[place].max() > COVERED):
                continue
            if any(share > SAME for share in rle.iou([one.segmentation], taken[len(tracks) :])[0]):
                continue
            absent = [known for number, known in self._objects.items() if number not in live]
            live.append(self._enter(frame, encoded.features, one, [*self._lost.values(), *absent]))
            taken.append(one.segmentation)
            added = True
        return added

    def _enter(self, frame: Frame, features: OVSamFeatures, one: Instance, gone: Sequence[_Object]) -> int:
        """Add a detection without a track: the most similar object of those that are gone, or a new one. Returns its
        id."""
        mask = torch.from_numpy(one.mask)
        prompt = self.segmenter.processor.video_mask_prompt(mask)
        appearance = _appearance(features, prompt.mask)
        number, highest = None, ALIKE
        for known in gone:
            alike = float(appearance @ known.appearance) if known.appearance is not None else 0.0
            ratio = max(one.area, known.area) / max(1, min(one.area, known.area))
            if known.label == one.label and alike >= highest and ratio <= LARGER:
                number, highest = known.id, alike
        if number is None:
            number = self._new_id()
        self._lost.pop(number, None)
        self._session.add_prompt(number, frame.index, prompt)
        self._objects[number] = _Object(
            number, one.label, one.label_id, "text", one.prompt, one.score, one.topk, appearance, one.area, frame.index
        )
        return number

    # ---- frames -----------------------------------------------------------------------------------------------------

    def _run(self, frame: Frame, encoded: EncodedImage) -> OVSamVideoOutput | None:
        return self._tracker(self._session, frame.index, encoded.features) if self._objects else None

    def _full_masks(self, found: OVSamVideoOutput, size: tuple[int, int]) -> list[np.ndarray]:
        """Return the masks of all objects at the size of the frame, [H, W] bool each; empty for absent objects."""
        if not found.object_ids:
            return []
        across, down = self.segmenter.processor.picture_share(*size)
        height, width = found.pred_masks.shape[-2:]
        logits = found.pred_masks[..., : round(down * height), : round(across * width)].float()
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0]  # [P, 1, h, w] -> [P, H, W]
        logits = logits.masked_fill(found.object_score_logits[..., None] <= 0, -1.0)
        masks = logits > 0
        if self.exclusive and len(logits) > 1:
            masks &= logits == logits.amax(0, keepdim=True)
        return list(masks.cpu().numpy())

    def _results(self, frame: Frame, encoded: EncodedImage, found: OVSamVideoOutput | None) -> FrameResults:
        size = frame.image.height, frame.image.width
        instances = []
        masks = [] if found is None else self._full_masks(found, size)
        shown = {n: mask for n, mask in zip(found.object_ids, masks, strict=True) if mask.any()} if found else {}
        self._name(encoded, shown)
        for number, known in list(self._objects.items()):
            if number in shown:
                segmentation = rle.encode(shown[number])
                known.seen, known.area = frame.index, rle.area(segmentation)
                quality = found.iou_scores[found.object_ids.index(number)]
                instances.append(
                    Instance(
                        id=number,
                        label=known.label,
                        label_id=known.label_id,
                        score=known.score,
                        mask_score=float(quality.clamp(0, 1)),
                        prompt=known.prompt,
                        source=known.source,
                        bbox=rle.bbox(segmentation),
                        area=known.area,
                        segmentation=segmentation,
                        topk=known.topk,
                    )
                )
            elif frame.index - known.seen >= self.patience:
                self._session.remove_object(number)
                self._lost[number] = self._objects.pop(number)
        return FrameResults(frame.index, frame.time, Results(instances, size, self.segmenter.name), frame.image)

    def _name(self, encoded: EncodedImage, shown: dict[int, np.ndarray]) -> None:
        """Set class names and appearances of selected objects that have none yet; and, if there is a vocabulary, the
        class names of highest score of all objects."""
        objects = {number: self._objects[number] for number in shown}
        lists = self.vocabulary is not None
        new = [n for n, known in objects.items() if known.appearance is None or lists and not known.named]
        if not new:
            return
        masks = torch.from_numpy(np.stack([shown[number] for number in new]))
        named = self.segmenter.what(encoded, masks=masks, vocabulary=self.vocabulary, top_k=self.top_k)
        for number, mask, one in zip(new, masks, cast(Results, named).instances, strict=True):
            known = objects[number]
            known.topk, known.named = one.topk, True
            if known.appearance is None:
                known.appearance = _appearance(encoded.features, self.segmenter.processor.video_mask_prompt(mask).mask)
                known.score = one.score
            if not known.label:
                known.label, known.label_id = one.label, one.label_id


def _appearance(features: OVSamFeatures, mask: Tensor) -> Tensor:
    """Mean of an image's features over a mask [H, W] at the size of the model input, [D], L2-normalised."""
    keys = frame_keys(features)
    share = cover(mask[None].float().to(keys.fine.device), keys.side)[0]  # [L, parts]
    return F.normalize((keys.fine * share[..., None]).sum((0, 1)), dim=0)
