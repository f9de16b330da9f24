"""What one visitor has on the page: a picture, what was found and drawn in it, and what the person made of that.

A `Scene` is never changed, only replaced, so that undo is the scene before. No model and no Gradio in here.
"""

import hashlib
import math
import secrets
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine import Upload

from ovsam import InputError, Results
from ovsam.ops.polygons import outlines
from ovsam.results.instance import Instance
from ovsam.results.overlay import PALETTE

SESSIONS = 200  # open at a time; the one that has been idle for longest goes first
UNDO = 50
MOST_OVERLAP = 0.6  # IoU; the model itself lets no two masks overlap by more
DRAWN_SIDE = 1024  # px; outlines go to the browser as fine as in a picture of this size


@dataclass(frozen=True)
class Sliders:
    """What is shown of what was found; `overlap` is the largest IoU that two masks may have."""

    score: float = 0.0
    mask_score: float = 0.0
    overlap: float = MOST_OVERLAP
    min_area: float = 0


@dataclass(frozen=True)
class Drawn:
    """An object that was pointed at: clicks x, y, 1 (on it) or 0 (beside it); a box x1, y1, x2, y2; or both."""

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, ...] | None = None
    instance: Instance | None = None

    def arguments(self) -> dict[str, Any]:
        """What Segmenter.what is asked."""
        return {
            "points": [[x, y] for x, y, _ in self.points] or None,
            "labels": [label for *_, label in self.points] or None,
            "boxes": [list(self.box)] if self.box else None,
        }


@dataclass(frozen=True)
class Edit:
    """A person's word on an object."""

    label: str | None = None
    hidden: bool = False
    deleted: bool = False


@dataclass(frozen=True)
class Scene:
    found: Results | None = None  # the answer about the whole picture, down to a low score
    kind: str = ""  # of that answer: "words", "alike" or "everything"
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    edits: Mapping[str, Edit] = field(default_factory=dict)
    active: str = ""  # the object whose names are open; if it was drawn, clicks go on with it
    turn: int = 0  # makes keys that were never used before

    def find(self, found: Results, kind: str) -> "Scene":
        """A new answer takes the place of the last one; what was drawn stays."""
        edits = {key: edit for key, edit in self.edits.items() if key in self.drawn}
        return replace(self, found=found, kind=kind, edits=edits, active="", turn=self.turn + 1)

    def point(self, x: float, y: float, label: int) -> tuple[str, Drawn]:
        """The object that a click goes on with, or begins, and its key."""
        if self.active in self.drawn:
            old = self.drawn[self.active]
            return self.active, replace(old, points=(*old.points, (x, y, label)))
        if not label:
            raise InputError("Click on the object first; a click beside it then says where it ends.")
        return f"drawn {self.turn + 1}", Drawn(points=((x, y, label),))

    def box(self, corners: tuple[float, ...]) -> tuple[str, Drawn]:
        return f"drawn {self.turn + 1}", Drawn(box=corners)

    def keep(self, key: str, drawn: Drawn) -> "Scene":
        return replace(self, drawn={**self.drawn, key: drawn}, active=key, turn=self.turn + 1)

    def edit(self, key: str, **change) -> "Scene":
        edit = replace(self.edit_of(key), **change)
        return replace(self, edits={**self.edits, key: edit}, active="" if edit.deleted else self.active)

    def objects(self, sliders: Sliders) -> dict[str, Instance]:
        """Key -> instance under the person's names: what was drawn, the last one first, then what was found and passes
        the sliders or was named by the person, best first."""
        objects = {key: drawn.instance for key, drawn in reversed(self.drawn.items())}
        passed = {one.id for one in sift(self.found, sliders)} if self.found is not None else set()
        for one in self.found or ():
            if one.id in passed or self.edit_of(f"found {one.id}").label:
                objects[f"found {one.id}"] = one
        edits = {key: self.edit_of(key) for key in objects}
        return {
            # A person said so: that is sure.
            key: replace(one, label=edits[key].label, score=1.0) if edits[key].label else one
            for key, one in objects.items()
            if not edits[key].deleted
        }

    def edit_of(self, key: str) -> Edit:
        return self.edits.get(key, Edit())


def sift(found: Results, sliders: Sliders) -> Results:
    """Apply the sliders to an answer; no model runs."""
    nms = "fast" if sliders.overlap < MOST_OVERLAP else None
    return found.filter(
        sliders.score,
        mask_score=sliders.mask_score,
        min_area=int(sliders.min_area),
        nms=nms,
        nms_threshold=sliders.overlap,
    )


class Session:
    """One open page. Its folder holds a copy of its picture and its downloads, and goes with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.picture: Upload | None = None
        self.model = ""  # that answered last
        self.scene = Scene()
        self.history: list[Scene] = []
        self.labels: list[str] = []  # every label of this picture, as it came: numbers them and gives them colours

    def receive(self, upload: Path) -> Upload:
        """Take a copy of an uploaded picture, and begin anew with it."""
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        try:
            copy = Path(shutil.copy(upload, folder))
            picture = Upload(copy, upload.name, hashlib.sha256(copy.read_bytes()).hexdigest())
        except (InputError, OSError):
            shutil.rmtree(folder)
            raise
        if self.picture is not None:
            shutil.rmtree(self.picture.path.parent, ignore_errors=True)
        self.picture, self.scene, self.history, self.labels = picture, Scene(), [], []
        return picture

    def given(self) -> Upload:
        if self.picture is None:
            raise InputError("There is no picture yet: choose one, or take an example.")
        return self.picture

    def change(self, scene: Scene) -> None:
        self.history = [*self.history[1 - UNDO :], self.scene]
        self.scene = scene

    def answer(self, picture: Upload, model: str, to_scene: Callable[[Scene], Scene]) -> None:
        """Take in what a model answered about a picture, unless there is another one by now."""
        if picture is self.picture:
            self.model = model
            self.change(to_scene(self.scene))

    def undo(self) -> None:
        if self.history:
            self.scene = self.history.pop()

    def number(self, label: str) -> int:
        if label not in self.labels:
            self.labels.append(label)
        return self.labels.index(label)

    def shown(self, sliders: Sliders) -> Results:
        """What every download holds: all that can be seen, with labels numbered alike in all of them."""
        objects = self.scene.objects(sliders)
        seen = [one for key, one in objects.items() if not self.scene.edit_of(key).hidden]
        width, height = self.given().size
        numbered = [replace(one, id=i, label_id=self.number(one.label)) for i, one in enumerate(seen, 1)]
        return Results(numbered, (height, width), self.model, self.picture.name)

    def view(self, sliders: Sliders) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the browser draws: on the canvas, and in the list of objects."""
        scene, shapes, rows = self.scene, [], []
        for key, one in scene.objects(sliders).items():
            colour = "#{:02x}{:02x}{:02x}".format(*PALETTE[self.number(one.label) % len(PALETTE)])
            edit = scene.edit_of(key)
            common = {"key": key, "label": one.label, "colour": colour, "hidden": edit.hidden}
            common["score"] = round(one.score, 3)
            shapes.append(common | {"path": to_path(one), "box": list(one.box), "area": one.area})
            names = [[name, round(score, 3)] for name, score in one.topk]
            rows.append(common | {"names": names, "maskScore": round(one.mask_score, 3), "area": one.area})
        counts = Counter(row["label"] for row in rows if not row["hidden"])
        colours = {row["label"]: row["colour"] for row in rows}
        drawn = scene.drawn.get(scene.active, Drawn())
        prompts = {"points": [list(point) for point in drawn.points], "box": drawn.box and list(drawn.box)}
        canvas = {"shapes": shapes, "prompts": prompts, "active": scene.active, "undo": bool(self.history)}
        canvas["names"] = next((row["names"] for row in rows if row["key"] == scene.active), [])
        if self.picture:
            canvas["size"] = list(self.picture.size)
        table = [[label, count, colours[label]] for label, count in counts.most_common()]
        return canvas, {"rows": rows, "active": scene.active, "counts": table, "left": self._left_out(rows)}

    def _left_out(self, rows: list) -> str:
        """Why the list is shorter than the answer."""
        if self.picture is None or self.scene.found is None:
            return ""
        if not self.scene.found:
            return "Nothing was found."
        hidden = len(self.scene.found) - sum(row["key"].startswith("found") for row in rows)
        return f"{hidden} more below the sliders, or deleted." if hidden else ""


def to_path(instance: Instance) -> str:
    """A mask as the path of an SVG: along the edges of its pixels, so that steps alternate between across and down."""
    x1, y1, x2, y2 = (int(value) for value in instance.box)
    step = max(1, math.ceil(max(instance.segmentation["size"]) / DRAWN_SIDE))
    parts = []
    for ring in outlines(instance.mask[y1:y2:step, x1:x2:step]):
        x, y = ring[0] * step
        moves = (ring[1:] - ring[:-1]) * step
        parts.append(f"M{x + x1} {y + y1}" + "".join(f"h{dx}" if dx else f"v{dy}" for dx, dy in moves.tolist()) + "z")
    return "".join(parts)


class Sessions:
    """The open pages by the hash that Gradio gives each."""

    def __init__(self, folder: Callable[[], str], most: int = SESSIONS):
        self._folder, self._most = folder, most
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, new: bool = False) -> Session:
        with self._lock:
            if name not in self._open:
                if not new:
                    raise InputError("This page has rested for too long; choose the picture again.")
                # Its name is the only thing that keeps others out.
                self._open[name] = Session(Path(self._folder()) / f"session-{secrets.token_hex(16)}")
                while len(self._open) > self._most:
                    self._close(next(iter(self._open)))
            self._open.move_to_end(name)
            return self._open[name]

    def close(self, name: str) -> None:
        with self._lock:
            if name in self._open:
                self._close(name)

    def _close(self, name: str) -> None:
        shutil.rmtree(self._open.pop(name).folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._open)
