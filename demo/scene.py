"""The state of one page: an image, its instances and prompts, and the corrections of the user.

A `Scene` is immutable, so that undo is the previous scene. This module has no model and does not import Gradio.
"""

import hashlib
import math
import secrets
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contours import to_path
from engine import Upload

from ovsam import InputError, Results
from ovsam.ops import rle
from ovsam.results.instance import Instance
from ovsam.results.overlay import PALETTE

SESSIONS = 200  # open at a time; the longest idle one is closed first
GRACE = 60.0  # seconds for which a closed page is kept, so that reloading it loses nothing
UNDO = 50
MOST_OVERLAP = 0.6  # IoU; the model suppresses masks that overlap by more
SAME = MOST_OVERLAP  # IoU over which an object of a new answer is a chosen or deleted one
NEAR = 0.15  # fraction of the longer side of a box: clicks this far outside still belong to its object
ABSENT = 20  # listed words without an object
LOWERED = 5  # objects that the button for a lower confidence adds, if there are as many


@dataclass(frozen=True)
class Sliders:
    """The filter of the shown instances; `overlap` is the highest IoU of two masks."""

    score: float = 0.0
    mask_score: float = 0.0
    overlap: float = MOST_OVERLAP
    min_area: float = 0


@dataclass(frozen=True)
class Answer:
    """Instances of one question about the whole image, down to a low score."""

    results: Results
    kind: str  # "words", "alike" or "everything"
    turn: int
    words: tuple[str, ...] = ()  # the text queries

    def items(self) -> Iterable[tuple[str, Instance]]:
        return ((f"found {self.turn}.{one.id}", one) for one in self.results)


@dataclass(frozen=True)
class Chosen:
    """An object that the user prompted or changed; later questions keep it.

    Attributes:
        points: clicks x, y, 1 (on it) or 0 (beside it).
        box: the box x1, y1, x2, y2 that was drawn around it.
        found: its box in the answer to a question; clicks refine the object in it.
    """

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, ...] | None = None
    instance: Instance | None = None
    found: tuple[float, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of Segmenter.what."""
        box = self.box or self.found
        return {
            "points": [[x, y] for x, y, _ in self.points] or None,
            "labels": [label for *_, label in self.points] or None,
            "boxes": [list(box)] if box else None,
        }


@dataclass(frozen=True)
class Edit:
    """A correction of an object."""

    label: str | None = None
    hidden: bool = False


@dataclass(frozen=True)
class Scene:
    answers: tuple[Answer, ...] = ()  # the last one of words or everything, and similar objects
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    edits: Mapping[str, Edit] = field(default_factory=dict)
    deleted: Mapping[str, Instance] = field(default_factory=dict)
    active: str = ""  # the object whose names are open, and that clicks go on with
    turn: int = 0  # makes keys that were never used before

    @property
    def kind(self) -> str:
        """The kind of the answer that is shown, "" before any."""
        return self.answers[0].kind if self.answers else ""

    def find(self, found: Results, kind: str, words: Iterable[str] = ()) -> "Scene":
        """A new answer replaces the last one, or is added to it if it is "alike". Chosen, renamed, hidden and deleted
        objects are kept."""
        turn = self.turn + 1
        before = self.answers if kind == "alike" else ()
        return replace(self, answers=(*before, Answer(found, kind, turn, tuple(words))), active="", turn=turn)

    def click(self, x: float, y: float, label: int, sliders: Sliders, add: bool = False) -> tuple[str, Chosen | None]:
        """The object of a click, and its prompts; None if the click only selects it.

        A click beside the object (label 0), one with `add` and one near the active object refine it; one on another
        object selects that; any other starts a new object.
        """
        objects = {key: one for key, one in self.objects(sliders).items() if not self.edit_of(key).hidden}
        active = objects.get(self.active)
        if active is None and not label:
            raise InputError("Choose an object first; a background click then marks what is not part of it.")
        under = [key for key, one in objects.items() if covers(one, x, y)]
        if active is not None:
            own = self.active in under and bool(self._prompts(self.active).points)
            if not label or add or own or (not under and is_near(active, x, y)):
                old = self._prompts(self.active)
                return self.active, replace(old, points=(*old.points, (x, y, label)))
        if under:
            return min(under, key=lambda key: objects[key].area), None
        return f"drawn {self.turn + 1}", Chosen(points=((x, y, label),))

    def box(self, corners: tuple[float, ...]) -> tuple[str, Chosen]:
        return f"drawn {self.turn + 1}", Chosen(box=corners)

    def keep(self, key: str, chosen: Chosen) -> "Scene":
        return replace(self, chosen={**self.chosen, key: chosen}, active=key, turn=self.turn + 1)

    def edit(self, key: str, **change) -> "Scene":
        """Rename or hide an object; it becomes a chosen one."""
        chosen = {**self.chosen, key: self._prompts(key)}
        return replace(self, chosen=chosen, edits={**self.edits, key: replace(self.edit_of(key), **change)})

    def delete(self, key: str) -> "Scene":
        """Remove an object; the same one is not shown again under the same name."""
        gone = self._named(key, self._prompts(key).instance)
        chosen = {other: one for other, one in self.chosen.items() if other != key}
        return replace(self, chosen=chosen, deleted={**self.deleted, key: gone}, active="")

    def objects(self, sliders: Sliders) -> dict[str, Instance]:
        """Key -> instance under the names of the user: prompted objects, the last one first, then instances that pass
        the sliders or are chosen, highest score first. Instances that equal a chosen or deleted object, or one of an
        earlier answer, are left out."""
        found = [key for answer in self.answers for key, _ in answer.items()]
        objects = {key: one.instance for key, one in reversed(self.chosen.items()) if key not in found}
        for answer in self.answers:
            passed = {one.id for one in sift(answer.results, sliders)}
            others = [one.instance for key, one in self.chosen.items() if key not in dict(answer.items())]
            others += [] if answer is self.answers[0] else [one for key, one in objects.items() if key in found]
            new = {
                key: one
                for key, one in answer.items()
                if key not in self.deleted and (key in self.chosen or one.id in passed)
            }
            known = _same(new.values(), others)
            for (key, one), is_known in zip(new.items(), known, strict=True):
                if key in self.chosen:
                    objects[key] = self.chosen[key].instance
                elif not is_known and not self._was_deleted(one, answer):
                    objects[key] = one
        return {key: self._named(key, one) for key, one in objects.items()}

    def edit_of(self, key: str) -> Edit:
        return self.edits.get(key, Edit())

    def _named(self, key: str, one: Instance) -> Instance:
        label = self.edit_of(key).label
        return one if label is None else replace(one, label=label, score=1.0)  # named by the user

    def _prompts(self, key: str) -> Chosen:
        """The prompts of an object; raises InputError if it is gone."""
        if key in self.chosen:
            return self.chosen[key]
        for answer in self.answers:
            for other, one in answer.items():
                if other == key and key not in self.deleted:
                    return Chosen(instance=one, found=one.box)
        raise InputError("That object is gone; choose another one.")

    def _was_deleted(self, one: Instance, answer: Answer) -> bool:
        """Whether the user has deleted this object of an earlier answer; other words may find it again."""
        here = dict(answer.items())
        return any(
            _same(
                [one],
                [
                    gone
                    for key, gone in self.deleted.items()
                    if key not in here and (answer.kind == "everything" or gone.label == one.label)
                ],
            )
        )


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


def _same(some: Iterable[Instance], others: list[Instance]) -> list[bool]:
    """For each instance, whether it is one of the others."""
    masks = [one.segmentation for one in some]
    if not masks or not others:
        return [False] * len(masks)
    return (rle.iou(masks, [one.segmentation for one in others]).max(1) > SAME).tolist()


def covers(one: Instance, x: float, y: float) -> bool:
    x1, y1, x2, y2 = one.box
    return x1 <= x < x2 and y1 <= y < y2 and bool(one.mask[int(y), int(x)])


def is_near(one: Instance, x: float, y: float) -> bool:
    x1, y1, x2, y2 = one.box
    room = NEAR * max(x2 - x1, y2 - y1)
    return x1 - room <= x < x2 + room and y1 - room <= y < y2 + room


class Session:
    """One open page. Its folder has a copy of its image and its downloads, and is deleted with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.token = folder.name  # identifies it for a reloaded page
        self.question = ("", "")  # words and excluded words
        self.picture: Upload | None = None
        self.model = ""  # of the last answer
        self.video: Any = None  # the VideoScene of the tab Video
        self.scene = Scene()
        self.history: list[Scene] = []
        self.labels: list[str] = []  # all labels of this image in order, for their numbers and colours

    def receive(self, upload: Path) -> Upload:
        """Copy an uploaded image, and start anew with it."""
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
        self.question = ("", "")
        return picture

    def given(self) -> Upload:
        if self.picture is None:
            raise InputError("There is no image yet; choose one, or take an example.")
        return self.picture

    def change(self, scene: Scene) -> None:
        self.history = [*self.history[1 - UNDO :], self.scene]
        self.scene = scene

    def answer(self, picture: Upload, model: str, to_scene: Callable[[Scene], Scene]) -> None:
        """Add the answer about an image, unless another image has replaced it."""
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
        """The visible instances, for downloads, with the same numbers of labels in all of them."""
        objects = self.scene.objects(sliders)
        seen = [one for key, one in objects.items() if not self.scene.edit_of(key).hidden]
        width, height = self.given().size
        numbered = [replace(one, id=i, label_id=self.number(one.label)) for i, one in enumerate(seen, 1)]
        return Results(numbered, (height, width), self.model, self.picture.name)

    def view(self, sliders: Sliders) -> dict[str, dict[str, Any]]:
        """The content of the canvas and of the list of objects."""
        scene, shapes, rows = self.scene, [], []
        objects = scene.objects(sliders)
        for key, one in objects.items():
            colour = "#{:02x}{:02x}{:02x}".format(*PALETTE[self.number(one.label) % len(PALETTE)])
            common = {"key": key, "label": one.label, "colour": colour, "hidden": scene.edit_of(key).hidden}
            common["score"] = round(one.score, 3)
            shapes.append(common | {"path": to_path(one), "box": list(one.box), "area": one.area})
            names = [[name, round(score, 3)] for name, score in one.topk]
            rows.append(common | {"names": names, "maskScore": round(one.mask_score, 3), "area": one.area})
        counts = Counter(row["label"] for row in rows if not row["hidden"])
        chosen = scene.chosen.get(scene.active, Chosen())
        prompts = {"points": [list(point) for point in chosen.points], "box": chosen.box and list(chosen.box)}
        canvas = {"shapes": shapes, "prompts": prompts, "active": scene.active, "undo": bool(self.history)}
        canvas["names"] = next((row["names"] for row in rows if row["key"] == scene.active), [])
        canvas["token"] = self.token
        if self.picture:
            canvas["size"] = list(self.picture.size)
        listing = {"rows": rows, "active": scene.active, "counts": counts.most_common(), "asked": bool(scene.answers)}
        listing |= {"absent": self._absent(set(counts)), **self._below(sliders)}
        return {"canvas": canvas, "listing": listing}

    def _absent(self, shown: set[str]) -> list[str]:
        """A line for each text query without a shown object."""
        lines = []
        for answer in self.scene.answers:
            instead = {one["text_label"]: one["negative"] for one in answer.results.dropped}
            for word in answer.words:
                if word in shown:
                    continue
                if word in instead:
                    lines.append(f"{word}: excluded, more like {instead[word]}")
                else:
                    lines.append(f"{word}: none (best {answer.results.presence.get(word, 0.0):.2f})")
        more = len(lines) - ABSENT
        return [*lines[:ABSENT], *([f"and {more:,} more words"] if more > 0 else [])]

    def _below(self, sliders: Sliders) -> dict[str, Any]:
        """The number of instances that the sliders leave out, and the confidence that shows the best of them."""
        below = 0
        scores: list[float] = []
        for answer in self.scene.answers:
            passed = {one.id for one in sift(answer.results, sliders)}
            others = [one for one in answer.results if one.id not in passed]
            below += len(others)
            scores += [one.score for one in others if one.score < sliders.score]
        best = sorted(scores, reverse=True)[:LOWERED]
        return {"below": below, "lower": math.floor(best[-1] * 100) / 100 if best else None}


class Sessions:
    """The open pages by the hash that Gradio gives each. A reloaded page has another hash, and the same session."""

    def __init__(self, folder: Callable[[], str], most: int = SESSIONS):
        self._folder, self._most = folder, most
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, new: bool = False) -> Session:
        with self._lock:
            if name not in self._open:
                if not new:
                    raise InputError("This page was idle for too long; choose the image again.")
                # Its name is secret; it is the only protection from other visitors.
                self._open[name] = Session(Path(self._folder()) / f"session-{secrets.token_hex(16)}")
                while len(self._open) > self._most:
                    self._close(next(iter(self._open)))
            self._open.move_to_end(name)
            return self._open[name]

    def restore(self, name: str, token: str) -> Session | None:
        """Return the session of a page that was reloaded."""
        with self._lock:
            known = next((one for one in self._open.values() if one.token == token), None)
            if known is not None:
                self._open[name] = known
            return known

    def close(self, name: str) -> Session | None:
        """Close a page; returns its session if no page has it any more."""
        with self._lock:
            return self._close(name) if name in self._open else None

    def _close(self, name: str) -> Session | None:
        session = self._open.pop(name)
        if session in self._open.values():
            return None
        shutil.rmtree(session.folder, ignore_errors=True)
        return session

    def __len__(self) -> int:
        return len(self._open)
