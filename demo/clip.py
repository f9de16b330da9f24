"""What one visitor has in the tab Video: a clip as frames, the objects that were pointed at, and the tracks. No model
and no Gradio in here."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contours import to_path
from scene import covers, is_near

import ovsam
from ovsam import InputError
from ovsam.inference.frames import FrameSource, VideoWriter
from ovsam.results.instance import Instance
from ovsam.results.overlay import PALETTE
from ovsam.results.tracks import FrameResults

# What one visitor's clip may hold; the page names these limits before a clip is chosen.
MAX_MEGABYTES, MAX_FRAMES, MAX_SIDE = 50, 300, 640
MAX_OBJECTS, MAX_WORDS = 10, 10


@dataclass
class Clip:
    """The frames of a video as JPEG files, at most MAX_SIDE pixels wide or high."""

    folder: Path
    name: str
    rate: Any
    size: tuple[int, int] = (0, 0)
    times: list[float] = field(default_factory=list)
    note: str = ""  # what was wrong with the end of the file

    @classmethod
    def read(cls, path: Path, name: str, folder: Path, show: Callable = lambda *state: None) -> "Clip":
        """Decode a video. Raises InputError for one that is no video or exceeds the limits."""
        if path.stat().st_size > MAX_MEGABYTES * 1e6:
            raise InputError(f"{name} has more than {MAX_MEGABYTES} MB; cut it or save it smaller.")
        too_long = f"{name} has more than {MAX_FRAMES} frames, which is {MAX_FRAMES // 30} s at 30 a second; cut it."
        try:
            source = FrameSource(path)
            if (source.length or 0) > MAX_FRAMES:
                raise InputError(too_long)
            clip = cls(folder, name, source.rate)
            folder.mkdir(parents=True)
            for frame in source:
                if frame.index >= MAX_FRAMES:
                    raise InputError(too_long)
                frame.image.thumbnail((MAX_SIDE, MAX_SIDE))
                frame.image.save(clip.frame(frame.index), quality=90)
                clip.size = frame.image.size
                clip.times.append(frame.time)
                show(f"Frame {len(clip.times)}" + (f" of {source.length}" if source.length else ""), None)
            source.close()
        except InputError as error:
            message = str(error).replace(str(path), name)  # where the file lies on this machine is nobody's business
            if message == too_long or not folder.exists() or not clip.times:
                shutil.rmtree(folder, ignore_errors=True)
                raise InputError(message) from error
            clip.note = message
        return clip

    def frame(self, index: int) -> Path:
        return self.folder / f"{index:05d}.jpg"

    def __len__(self) -> int:
        return len(self.times)


@dataclass
class Pointed:
    """Where a person pointed at an object on one frame: clicks x, y, 1 (on it) or 0 (beside it), or a box."""

    points: list[tuple[float, float, int]] = field(default_factory=list)
    box: tuple[float, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """What Segmenter.what is asked."""
        return {
            "points": [[x, y] for x, y, _ in self.points] or None,
            "labels": [label for *_, label in self.points] or None,
            "boxes": [list(self.box)] if self.box else None,
        }


class VideoScene:
    """A clip with the objects that were pointed at, by id and frame, and what is shown on each frame."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self.pointed: dict[int, dict[int, Pointed]] = {}
        self.labels: dict[int, str] = {}  # class names of the objects that were pointed at
        self.shown: dict[int, dict[int, Instance]] = {}
        self.tracks = ovsam.Tracks()
        self.video: Path | None = None
        self.active = 0

    def point(self, frame: int, x: float, y: float, label: int) -> tuple[int, bool]:
        """The object that a click is about, and whether it is more than a selection of that object."""
        shown = self.shown.get(frame, {})
        under = [number for number, one in shown.items() if covers(one, x, y)]
        if not label and not self.active:
            raise InputError("Choose an object first; a background click then marks what is not part of it.")
        active = shown.get(self.active)
        near = active is not None and not under and is_near(active, x, y)
        if not label or self.active in under or near or (self.active and active is None and not under):
            number = self.active
        elif under:
            self.active = min(under, key=lambda one: shown[one].area)
            return self.active, False
        else:
            number = self.new()
        if number not in self.pointed:
            self.pointed[number] = self._found(number)
        given = self.pointed[number].setdefault(frame, Pointed())
        given.points.append((x, y, label))
        self.active = number
        return number, True

    def box(self, frame: int, corners: tuple[float, ...]) -> int:
        self.active = self.new()
        self.pointed[self.active] = {frame: Pointed(box=corners)}
        return self.active

    def new(self) -> int:
        if len(self.pointed) >= MAX_OBJECTS:
            raise InputError(f"There are {MAX_OBJECTS} objects already, the most here; remove one.")
        known = [*self.pointed, *(number for shown in self.shown.values() for number in shown)]
        return max(known, default=0) + 1

    def keep(self, frame: int, number: int, found: Instance) -> None:
        """Show what was segmented where a person pointed; its first class name stays."""
        self.labels.setdefault(number, found.label)
        self.shown.setdefault(frame, {})[number] = replace(found, label=self.labels[number])

    def _found(self, number: int) -> dict[int, Pointed]:
        """An object that words found, as if a person had drawn its box where it is seen first."""
        for frame, shown in sorted(self.shown.items()):
            if number in shown:
                self.labels[number] = shown[number].label
                return {frame: Pointed(box=shown[number].box)}
        return {}

    def remove(self, number: int) -> None:
        self.pointed.pop(number, None)
        self.labels.pop(number, None)
        self.tracks.tracks.pop(number, None)
        for shown in self.shown.values():
            shown.pop(number, None)
        self.active = 0

    def prompts(self) -> list[ovsam.Prompt]:
        """All that was pointed at, as VideoSegmenter.track takes it."""
        return [
            ovsam.Prompt(
                points=[[x, y] for x, y, _ in given.points] or None,
                labels=[label for *_, label in given.points] or None,
                box=given.box,
                frame=frame,
                id=number,
                name=self.labels.get(number),
            )
            for number, frames in self.pointed.items()
            for frame, given in sorted(frames.items())
        ]

    def results(self, stream: Iterator[FrameResults], target: Path) -> Iterator[FrameResults]:
        """Take in the frames of a stream one by one, and write them as a video, whose file is whole whenever this
        ends."""
        self.shown, self.tracks, self.video = {}, ovsam.Tracks(), None
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = VideoWriter(target, self.clip.rate, self.clip.size)
        try:
            for frame in stream:
                self.tracks.add(frame)
                self.shown[frame.index] = {one.id: one for one in frame.results}
                writer.write(frame.overlay(), self.clip.times[frame.index])
                yield frame
        finally:
            writer.close()
            self.video = target

    def save_json(self, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.tracks.to_youtube_vis(self.clip.name)), encoding="utf-8")
        return target

    # ---- what the browser draws -------------------------------------------------------------------------------------

    def frame_view(self, frame: int) -> dict[str, list[dict[str, Any]]]:
        """The objects of one frame, under its number."""
        shapes = [
            {
                "id": number,
                "label": one.label,
                "score": round(one.score, 3),
                "colour": colour(number),
                "box": list(one.box),
            }
            | {"path": to_path(one)}
            for number, one in self.shown.get(frame, {}).items()
        ]
        return {str(frame): shapes}

    def view(self) -> dict[str, Any]:
        """Everything but the frames themselves."""
        frames: dict[str, list] = {}
        for frame in self.shown:
            frames |= self.frame_view(frame)
        found = {number: one for shown in self.shown.values() for number, one in shown.items()}
        objects = []
        for number in sorted({*found, *self.pointed}):
            on = [frame for frame, shown in self.shown.items() if number in shown]
            label = found[number].label if number in found else "object"
            objects.append({"id": number, "label": label, "colour": colour(number), "frames": len(on)})
        points = {
            str(frame): [list(point) for point in given.points]
            for frame, given in self.pointed.get(self.active, {}).items()
        }
        return {"frames": frames, "objects": objects, "active": self.active, "points": points, "whole": True}


def colour(number: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[number % len(PALETTE)])
