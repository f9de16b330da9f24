"""Moving scenes: short videos of cut-outs of photographs and pictograms, with exact masks. A scene is a function of
(seed, index).

Objects move, scale and sway over a moving background. They occlude each other; in half of the scenes two look-alikes
cross, and in half of them one object leaves the frame and enters again. The mask of an object is its visible part.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy.interpolate import PchipInterpolator

from ovsam.data.coco import Coco
from ovsam.data.paste import cut_out
from ovsam.data.pictures import PictureData, open_picture, upright_outlines
from ovsam.data.scenes.drawing import draw_background
from ovsam.data.scenes.styles import drawable, sprites
from ovsam.data.scenes.words import all_words
from ovsam.data.words import related
from ovsam.errors import InputError
from ovsam.ops.outlines import Rle

SEED = 900_201  # seed of the frozen scenes, which no recipe uses
SCENES = 20
TRIES = 30  # arrangements that are tried for a first frame on which every object can be recognised


@dataclass(frozen=True)
class MovingConfig:
    """Settings of moving scenes. Sizes are the longer side of an object as a share of the height of the frame."""

    width: int = 320
    height: int = 240
    frames: int = 60
    min_objects: int = 3
    max_objects: int = 5
    min_size: float = 0.3
    max_size: float = 0.6
    pictograms: float = 0.3  # share of objects that are pictograms
    look_alikes: float = 0.5  # share of scenes in which two copies of one object cross
    leaving: float = 0.5  # share of scenes in which an object leaves and enters again
    visible: float = 0.6  # lowest visible share of each object on the first frame
    absent: int = 3  # class names of a scene that none of its objects has
    styles: Sequence[str] = ("noto",)


@dataclass(frozen=True)
class Piece:
    """An object that can be drawn: RGBA image and class name."""

    image: Image.Image
    word: str


class Pieces:
    """The objects and backgrounds of a COCO data set, and the pictograms.

    Args:
        data: images with outlines and class names, every image annotated for all of them.
        styles: drawing styles of the pictograms.

    Raises:
        InputError: no object can be cut out: all are small or touch the border of their image.
    """

    def __init__(self, data: PictureData, styles: Sequence[str] = ("noto",), min_area: int = 40**2):
        self.data, self.styles = data, styles
        self.by_word: dict[int, list[tuple[int, int]]] = {}
        self.shown: list[set[int]] = []  # class names in each image
        for number in range(data.pictures):
            record = data.record(number)
            self.shown.append({*record.word_ids, *record.unknown})
            width, height = record.size or (0, 0)
            for place, (rle, word) in enumerate(
                zip(upright_outlines(record, (width, height)), record.word_ids, strict=True)
            ):
                if rle is not None and word >= 0 and _whole(rle, min_area):
                    self.by_word.setdefault(word, []).append((number, place))
        if not self.by_word:
            raise InputError(
                "The data have no object to cut out; it must be larger and lie inside its image. Use another data set."
            )
        self.pictograms = [i for i in drawable(styles) if all_words()[i].split == "base"]

    def draw(self, rng: np.random.Generator, pictograms: float) -> Piece:
        """A random object: a class name first, so that frequent ones do not dominate, then one of its objects."""
        if rng.random() < pictograms:
            index = int(rng.choice(self.pictograms))
            styles = [style for style in self.styles if sprites(style)[index]]
            picture = sprites(styles[int(rng.integers(len(styles)))])[index]
            assert picture is not None
            return Piece(picture, all_words()[index].name)
        word = int(rng.choice(sorted(self.by_word)))
        number, place = self.by_word[word][int(rng.integers(len(self.by_word[word])))]
        record = self.data.record(number)
        photograph = open_picture(record.picture)
        outline = upright_outlines(record, photograph.size)[place]
        piece = None if outline is None else cut_out(photograph, outline)
        assert piece is not None  # larger than the least area
        image, mask = piece
        image.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
        return Piece(image, self.data.words[word].name)

    def background(self, rng: np.random.Generator, words: Sequence[str], size: int) -> Image.Image:
        """An image that shows none of the words, at least `size` pixels on each side: a photograph, or a pattern."""
        taken = {i for i, word in enumerate(self.data.words) if word.name in words}
        free = [number for number, shown in enumerate(self.shown) if not shown & taken]
        if rng.random() < 0.3 or not free:
            return draw_background(rng, size)
        photograph = open_picture(self.data.record(int(rng.choice(free))).picture)
        scale = size / min(photograph.size)
        return photograph.resize((math.ceil(photograph.width * scale), math.ceil(photograph.height * scale)))

    def absent(self, rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
        """Class names for queries that nothing in a scene answers."""
        return [str(word) for word in rng.permutation(sorted({w.name for w in self.data.words} - {*words}))[:count]]


def _whole(rle: Rle, min_area: int) -> bool:
    """Whether an object is large enough, is no thin frame, and lies inside its image."""
    height, width = rle["size"]
    x, y, w, h = coco.toBbox(rle)
    area = coco.area(rle)
    inside = x > 1 and y > 1 and x + w < width - 1 and y + h < height - 1
    return bool(area >= max(min_area, 0.35 * w * h) and inside)


@dataclass(frozen=True)
class _Mover:
    """One object over time: centre in pixels [T, 2], scale [T] and angle in degrees [T]."""

    image: Image.Image
    centre: np.ndarray
    scale: np.ndarray
    angle: np.ndarray

    def at(self, frame: int) -> tuple[Image.Image, int, int]:
        """Its image on a frame, and where its upper left corner is."""
        size = [max(2, round(side * self.scale[frame])) for side in self.image.size]
        image = self.image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        image = image.rotate(float(self.angle[frame]), Image.Resampling.BILINEAR, expand=True)
        x, y = self.centre[frame]
        return image, round(x - image.width / 2), round(y - image.height / 2)


class MovingScene:
    """A video of one scene; frames are drawn when they are requested.

    Attributes:
        words: class name of each object; object i has the number i + 1 in the index maps.
        absent: class names that no object has and the background does not show.
    """

    def __init__(self, pieces: Pieces, seed: int, index: int, config: MovingConfig = MovingConfig()):
        rng = np.random.default_rng((seed, index))
        self.config = config
        alike, leaves = rng.random() < config.look_alikes, rng.random() < config.leaving
        drawn = self._choose(rng, pieces, alike)
        self.words = [piece.word for piece in drawn]
        self.absent = pieces.absent(rng, self.words, config.absent)
        margin = 1.0 + 2 * rng.uniform(0.05, 0.2)
        side = math.ceil(max(config.width, config.height) * margin)
        self._background = pieces.background(rng, [*self.words, *self.absent], side)
        room = np.array(self._background.size) - (config.width, config.height)
        self._corner = _smooth(rng.uniform(0, 1, (4, 2)), config.frames) * np.minimum(room, 0.4 * config.width)
        for _ in range(TRIES):
            self._movers = [self._mover(rng, piece.image) for piece in drawn]
            if alike:
                self._cross(rng)
            if leaves:
                self._leave(rng, len(drawn) - 1)
            if self._recognisable():
                break

    def __len__(self) -> int:
        return self.config.frames

    def __iter__(self) -> Iterator[tuple[Image.Image, np.ndarray]]:
        return (self.draw(frame) for frame in range(len(self)))

    def draw(self, frame: int) -> tuple[Image.Image, np.ndarray]:
        """Draw a frame: RGB image, and the number of the visible object of each pixel, [H, W] uint8, 0 for none."""
        width, height = self.config.width, self.config.height
        left, top = (int(place) for place in self._corner[frame])
        image = self._background.crop((left, top, left + width, top + height))
        numbers = Image.new("L", image.size)
        for number, mover in enumerate(self._movers, 1):
            sprite, x, y = mover.at(frame)
            solid = sprite.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
            image.paste(sprite, (x, y), sprite)
            numbers.paste(number, (x, y), solid)
        return image, np.asarray(numbers)

    def _choose(self, rng: np.random.Generator, pieces: Pieces, alike: bool) -> list[Piece]:
        """Draw objects whose class names are not related, except for the look-alikes, which come first."""
        config = self.config
        count = int(rng.integers(config.min_objects, config.max_objects + 1))
        by_name = {word.name: word for word in (*all_words(), *pieces.data.words)}
        drawn: list[Piece] = []
        for _ in range(20 * count):
            piece = pieces.draw(rng, config.pictograms)
            own = by_name[piece.word]
            others = [by_name[one.word] for one in drawn]
            if not any(related(own, one) or related(one, own) for one in others):
                drawn += [piece, piece] if alike and not drawn else [piece]
            if len(drawn) >= count:
                break
        return drawn

    def _mover(self, rng: np.random.Generator, image: Image.Image) -> _Mover:
        config = self.config
        frames, size = config.frames, np.array([config.width, config.height])
        largest = float(rng.uniform(config.min_size, config.max_size)) * config.height / max(image.size)
        centre = _smooth(rng.uniform(0.15, 0.85, (int(rng.integers(3, 6)), 2)), frames) * size
        scale = largest * np.exp(_smooth(rng.uniform(-0.25, 0.25, (4, 1)), frames)[:, 0])
        angle = _smooth(rng.uniform(-20, 20, (4, 1)), frames)[:, 0]
        return _Mover(image, centre, scale, angle)

    def _cross(self, rng: np.random.Generator) -> None:
        """Let the first two objects pass each other, one from the left and one from the right."""
        config = self.config
        along, level = np.linspace(0, 1, config.frames), rng.uniform(0.3, 0.7)
        for place, direction in ((0, 1), (1, -1)):
            mover = self._movers[place]
            x = 0.5 + direction * (along - rng.uniform(0.4, 0.6)) * rng.uniform(0.55, 0.8)
            y = level + _smooth(rng.uniform(-0.12, 0.12, (4, 1)), config.frames)[:, 0]
            centre = np.stack([x * config.width, y * config.height], 1)
            scale = mover.scale * (self._movers[0].scale[0] / mover.scale[0])  # of one size
            self._movers[place] = _Mover(mover.image, centre, scale, mover.angle)

    def _leave(self, rng: np.random.Generator, place: int) -> None:
        """Let an object leave through one side and enter again, out of the frame for 8 to 20 frames."""
        config, mover = self.config, self._movers[place]
        frames, size = config.frames, np.array([config.width, config.height])
        away = int(rng.integers(8, 21))
        out = int(rng.integers(frames // 4, max(frames // 4 + 1, 3 * frames // 4 - away)))
        radius = float(np.hypot(*mover.image.size) * mover.scale.max() / 2)
        sides = [rng.integers(4), rng.integers(4)]
        exits = []
        for side in sides:
            point = rng.uniform(0.25, 0.75, 2) * size
            axis = int(side) % 2
            point[axis] = -radius if side < 2 else size[axis] + radius
            exits.append(point)
        first, last = rng.uniform(0.25, 0.75, (2, 2)) * size
        centre = np.empty((frames, 2))
        centre[: out + 1] = _between(first, exits[0], out + 1)
        centre[out : out + away] = exits[0]
        centre[out + away :] = _between(exits[1], last, frames - out - away)
        self._movers[place] = _Mover(mover.image, centre, mover.scale, mover.angle)

    def _recognisable(self) -> bool:
        """Whether enough of each object is visible on the first frame."""
        _, numbers = self.draw(0)
        for number, mover in enumerate(self._movers, 1):
            sprite, _, _ = mover.at(0)
            whole = int((np.asarray(sprite.getchannel("A")) > 127).sum())
            if (numbers == number).sum() < self.config.visible * whole:
                return False
        return True


def _smooth(points: np.ndarray, frames: int) -> np.ndarray:
    """Points [n, d] -> a curve [frames, d] through them, at rest in none but the first and the last."""
    return PchipInterpolator(np.linspace(0, 1, len(points)), points)(np.linspace(0, 1, frames))


def _between(start: np.ndarray, end: np.ndarray, frames: int) -> np.ndarray:
    return start + (end - start) * np.linspace(0, 1, frames)[:, None]


def open_moving(
    annotations: str | Path, images: str | Path | None = None, seed: int = SEED, count: int = SCENES
) -> list[MovingScene]:
    """Return scenes of the objects and images of a COCO file; `images` as in Coco."""
    pieces = Pieces(Coco(annotations, images))
    return [MovingScene(pieces, seed, index) for index in range(count)]
