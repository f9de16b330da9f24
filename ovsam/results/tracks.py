"""Objects that are followed through a video: the instances of each frame, and each object over all frames."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops.files import write_whole
from ovsam.processing.arguments import is_sequence, plain, short
from ovsam.results.results import Results

MOST_IDS = 255  # of an id map of 8 bits


@dataclass(frozen=True)
class FrameResults:
    """What one frame of a video shows.

    Attributes:
        index: number of the frame, from 0.
        time: seconds from the beginning.
        results: the instances; the `id` of each is that of its track.
        image: the frame.
    """

    index: int
    time: float
    results: Results
    image: Image.Image

    def overlay(self) -> Image.Image:
        """The frame with masks and names; a track keeps its colour and shows its id."""
        numbered = [replace(one, label=f"{one.label} {one.id}", label_id=one.id) for one in self.results]
        return Results(numbered, self.results.size).overlay(self.image)

    def id_map(self) -> np.ndarray:
        """Track ids [H, W] as uint8, 0 for the background. Raises InputError: an id above 255."""
        ids = np.zeros(self.results.size, dtype=np.uint8)
        for one in self.results:
            if one.id > MOST_IDS:
                raise InputError(f"The track {one.id} does not fit into an id map of 8 bits, which holds {MOST_IDS}.")
            ids[one.mask] = one.id
        return ids

    def save_id_map(self, folder: Path) -> None:
        """Write `id_map` as NNNNN.png."""
        image = Image.fromarray(self.id_map())
        write_whole(folder / f"{self.index:05d}.png", lambda temporary: image.save(temporary, format="PNG"))


@dataclass
class Track:
    """One object over the frames that show it.

    Attributes:
        id: the number that it keeps, also when it leaves and comes back.
        label: class name; topk: the likeliest class names with their scores, highest first.
        frames: number of the frame -> score and mask as COCO's run lengths.
    """

    id: int
    label: str
    label_id: int
    topk: list[tuple[str, float]]
    frames: dict[int, tuple[float, dict[str, Any]]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean score over its frames."""
        return float(np.mean([score for score, _ in self.frames.values()]))


class Tracks:
    """The tracks of a video, collected from its frames; images are not kept."""

    def __init__(self, frames: Iterable[FrameResults] = ()):
        self.tracks: dict[int, Track] = {}
        self.length, self.size = 0, (0, 0)
        frames = plain(frames)
        if not isinstance(frames, Iterable):
            raise InputError(f"Tracks are collected from FrameResults, those of a VideoStream; got {short(frames)}.")
        for frame in frames:
            self.add(frame)

    def add(self, frame: FrameResults) -> None:
        """Take over the instances of a frame."""
        if not isinstance(frame, FrameResults):
            raise InputError(f"Tracks are collected from FrameResults, those of a VideoStream; got {short(frame)}.")
        self.length, self.size = max(self.length, frame.index + 1), frame.results.size
        for one in frame.results:
            track = self.tracks.setdefault(one.id, Track(one.id, one.label, one.label_id, one.topk))
            track.frames[frame.index] = one.score, one.segmentation

    def to_youtube_vis(self, file_name: str = "", names: Iterable[str] = ()) -> dict[str, Any]:
        """A data set in the format of YouTube-VIS (Yang et al. 2019): an annotation a track, with one run-length mask a
        frame and None where it is not shown.

        Args:
            file_name: of the video.
            names: class names that come first in the list of categories.
        """
        given = [names] if isinstance(names, str) else plain(names)
        if not is_sequence(given) or not all(isinstance(name, str) for name in given):
            raise InputError(f"The names are {short(names)}; they must be a list of class names.")
        if not isinstance(file_name, str):
            raise InputError(f"The file_name is {short(file_name)}; it must be a string.")
        labels = list(dict.fromkeys([*given, *(track.label for track in self.tracks.values())]))
        height, width = self.size
        annotations = []
        for track in self.tracks.values():
            shown = [track.frames.get(frame) for frame in range(self.length)]
            annotations.append(
                {
                    "id": track.id,
                    "video_id": 1,
                    "category_id": labels.index(track.label) + 1,
                    "score": round(track.score, 4),
                    "scores": [None if one is None else round(one[0], 4) for one in shown],
                    "segmentations": [None if one is None else one[1] for one in shown],
                    "topk": [[name, round(score, 4)] for name, score in track.topk],
                    "iscrowd": 0,
                }
            )
        video = {"id": 1, "file_name": file_name, "length": self.length, "height": height, "width": width}
        categories = [{"id": number, "name": label} for number, label in enumerate(labels, 1)]
        return {"videos": [video], "categories": categories, "annotations": annotations}
