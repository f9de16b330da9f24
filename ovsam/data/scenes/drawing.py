"""EmojiScenes: images composed of colour pictograms, with exact masks. A scene is a function of (seed, index).

Sprites come in several drawing styles (styles.py); backgrounds are procedural. The mask of an object is its visible
part, so masks never overlap. Scenes are a pure function of their index, so that a training run can be resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ovsam.data.scenes.styles import sprites


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the drawing. Sizes are the longer side of the sprite in pixels of the image. Each object is drawn in
    one of `styles`; naming a style several times makes it more likely."""

    canvas: int = 512
    min_objects: int = 6
    max_objects: int = 14
    min_size: float = 36.0
    max_size: float = 220.0
    max_rotation: float = 30.0
    min_visible: float = 0.6
    repeat: float = 0.25  # probability that an object repeats a word of the scene
    styles: Sequence[str] = ("noto",)


@dataclass
class Scene:
    """A finished image. `word_ids[i]` is the word of the object whose pixels are i + 1 in `index_map` [H, W]."""

    image: Image.Image
    index_map: np.ndarray
    word_ids: list[int]


def draw_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A gradient, soft noise, stripes, blobs or a checkerboard, in random colours."""
    colors = rng.integers(0, 256, (4, 3)).astype(np.float32)
    kind = rng.integers(5)
    if kind == 0:  # gradient between four corners
        picture = Image.fromarray(colors.reshape(2, 2, 3).astype(np.uint8)).resize((size, size), Image.BILINEAR)
    elif kind == 1:  # soft colour noise
        cells = int(rng.integers(3, 24))
        noise = colors[0] * 0.5 + rng.integers(0, 128, (cells, cells, 3))
        picture = Image.fromarray(noise.astype(np.uint8)).resize((size, size), Image.BICUBIC)
    elif kind == 2:  # stripes at any angle
        y, x = np.mgrid[0:size, 0:size].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(12, 96)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period))[..., None] * 0.5 + 0.5
        picture = Image.fromarray((colors[0] * wave + colors[1] * (1 - wave)).astype(np.uint8))
    elif kind == 3:  # flat colour with blobs
        picture = Image.new("RGB", (size, size), tuple(int(c) for c in colors[0]))
        draw = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(3, 16))):
            x, y, rx, ry = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(4, 80), rng.uniform(4, 80)
            fill = tuple(int(c) for c in rng.integers(0, 256, 3))
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x - rx, y - ry, x + rx, y + ry), fill=fill)
    else:  # checkerboard
        cell = int(rng.integers(8, 64))
        y, x = np.mgrid[0:size, 0:size] // cell
        picture = Image.fromarray(np.where(((x + y) % 2)[..., None] > 0, colors[0], colors[1]).astype(np.uint8))
    grain = rng.integers(-128, 128, (size, size, 1), dtype=np.int16) // int(rng.integers(12, 128))
    return Image.fromarray(np.clip(np.asarray(picture, np.int16) + grain, 0, 255).astype(np.uint8))


def _sprite(rng: np.random.Generator, word_id: int, config: SceneConfig) -> Image.Image:
    """The drawing of a word, resized, rotated and slightly recoloured. [h, w] RGBA"""
    styles = [style for style in config.styles if sprites(style)[word_id]]
    picture = sprites(styles[rng.integers(len(styles))] if len(styles) > 1 else styles[0])[word_id]
    side = float(np.exp(rng.uniform(np.log(config.min_size), np.log(config.max_size))))
    scale = side / max(picture.size)
    stretch = float(rng.uniform(0.88, 1.14))
    size = (max(4, round(picture.width * scale * stretch)), max(4, round(picture.height * scale)))
    picture = picture.resize(size, Image.BILINEAR, reducing_gap=2.0)
    angle = float(rng.uniform(-config.max_rotation, config.max_rotation))
    picture = picture.rotate(angle, Image.BILINEAR, expand=True)
    # Brightness, contrast and a colour cast in one look-up: per channel value * gain + shift; alpha untouched.
    gain, cast, shift = rng.uniform(0.75, 1.2), rng.uniform(0.92, 1.08, 3), rng.uniform(-15, 25)
    levels = np.clip(np.arange(256) * gain * cast[:, None] + shift, 0, 255).astype(np.uint8)  # [3, 256]
    return picture.point([*levels.ravel().tolist(), *range(256)])


def draw_scene(seed: int, index: int, word_ids: np.ndarray, config: SceneConfig, required=()) -> Scene:
    """Draw scene number `index` of `seed` with objects of `word_ids`; those in `required` are placed first, and so are
    visible. Objects are not placed where they would leave an earlier one less than `min_visible` of its pixels."""
    rng = np.random.default_rng((seed, index))
    size = config.canvas
    image = draw_background(rng, size)
    index_map = np.zeros((size, size), np.uint8)
    placed: list[int] = []
    full_area: list[int] = []  # pixels of each object before anything covered it
    wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    queue = list(required)
    while len(queue) < wanted:
        repeat = queue and rng.random() < config.repeat
        queue.append(int(queue[rng.integers(len(queue))] if repeat else rng.choice(word_ids)))
    for word_id in queue:
        for _ in range(12):
            sprite = _sprite(rng, word_id, config)
            w, h = sprite.size
            if w >= size or h >= size:
                continue
            x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
            solid = np.asarray(sprite.getchannel("A")) > 127  # [h, w]
            under = index_map[y : y + h, x : x + w]
            covered = np.bincount(under[solid], minlength=len(placed) + 1)[1:]
            if len(placed) and covered.any():
                left = np.bincount(index_map.ravel(), minlength=len(placed) + 1)[1:] - covered
                if (left < config.min_visible * np.asarray(full_area)).any():
                    continue
            image.paste(sprite, (x, y), sprite)
            placed.append(word_id)
            full_area.append(int(solid.sum()))
            under[solid] = len(placed)
            break
    return Scene(image, index_map, placed)
