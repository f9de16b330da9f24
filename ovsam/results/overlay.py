"""Drawing masks and class names over an image, readable for people."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ovsam.ops import rle
from ovsam.results.instance import Instance

Colour = tuple[int, int, int]

# Distant in hue or in lightness, the first ones most.
PALETTE: list[Colour] = [
    (230, 25, 75), (0, 130, 200), (255, 225, 25), (60, 180, 75), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (0, 0, 160), (250, 190, 212), (0, 128, 128),
    (170, 110, 40), (220, 190, 255), (128, 0, 0), (170, 255, 195), (128, 128, 0), (255, 150, 120),
]  # fmt: skip
FILL = 0.4  # opacity of a mask
MIN_FONT = 10  # px; smaller letters are not legible


def draw_overlay(image: Image.Image, instances: Sequence[Instance], zoom: int = 1) -> Image.Image:
    """Return a copy of the RGB image, enlarged by `zoom`, with each mask filled, outlined and tagged.

    A label has one colour, if possible the same one in every image. Large masks are drawn first, so that small ones
    stay visible. Tags stay inside the image and, if there is room, do not cover each other or small objects. Letters
    outside the Latin alphabet are missing in the font of Pillow, and appear as boxes.
    """
    if zoom > 1:
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
        instances = [_enlarge(instance, zoom) for instance in instances]
    colours = _choose_colours(instances)
    large_first = sorted((instance for instance in instances if instance.area), key=lambda instance: -instance.area)
    canvas = np.array(image)
    line = max(1.0, math.sqrt(image.width * image.height) / 400)
    for instance in large_first:
        _paint_mask(canvas, instance, colours[instance.label], line)
    picture = Image.fromarray(canvas)
    if large_first:
        _draw_tags(picture, large_first, colours, line)
    return picture


def _enlarge(instance: Instance, zoom: int) -> Instance:
    segmentation = rle.encode(instance.mask.repeat(zoom, axis=0).repeat(zoom, axis=1))
    x, y, width, height = instance.bbox
    return replace(instance, bbox=(x * zoom, y * zoom, width * zoom, height * zoom), segmentation=segmentation)


def _choose_colours(instances: Sequence[Instance]) -> dict[str, Colour]:
    """Assign to each label the colour of its index in the vocabulary, or the next unused one of this image."""
    colours: dict[str, Colour] = {}
    free: list[Colour] = []
    for label_id, label in sorted({(instance.label_id, instance.label) for instance in instances}):
        free = free or PALETTE.copy()
        start = label_id % len(PALETTE)
        colours[label] = next(colour for colour in PALETTE[start:] + PALETTE[:start] if colour in free)
        free.remove(colours[label])
    return colours


def _contrast(colour: Colour) -> Colour:
    """Return black for light colours, white for dark ones."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _paint_mask(canvas: np.ndarray, instance: Instance, colour: Colour, line: float) -> None:
    """Fill and outline one mask on the canvas [H, W, 3], in place; `line` is half the width of the outline."""
    margin = 4 * line
    x1, y1, x2, y2 = instance.box
    window = np.s_[max(0, int(y1 - margin)) : int(y2 + margin) + 1, max(0, int(x1 - margin)) : int(x2 + margin) + 1]
    inside = instance.mask[window]
    # The blurred mask is 0.5 at the edge: values near 0.5 form a line with soft borders.
    blurred = Image.fromarray(np.uint8(inside) * 255).filter(ImageFilter.GaussianBlur(line))
    edge = np.asarray(blurred, np.float32) / 255
    outline = np.clip((0.4 - abs(edge - 0.5)) * 5, 0, 1)
    halo = np.clip(edge * 20, 0, 1) * ~inside * 0.5  # separates the outline from a background of the same colour

    pixels = canvas[window].astype(np.float32)
    for paint, opacity in ((colour, FILL * inside), (_contrast(colour), halo), (colour, outline)):
        pixels += (np.array(paint, np.float32) - pixels) * opacity[..., None]
    canvas[window] = pixels.round()


def _draw_tags(picture: Image.Image, instances: list[Instance], colours: dict[str, Colour], line: float) -> None:
    """Draw all tags in place: the smallest objects, which have the least room, come first."""
    draw = ImageDraw.Draw(picture)
    crowd = min(1.0, (20 / len(instances)) ** 0.25)
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(max(MIN_FONT, 10 * line * crowd)))
    pad = max(2, round(font.size / 5))
    ascent, descent = font.getmetrics()
    height = ascent + descent + pad

    things = np.array([instance.box for instance in instances])
    tags = np.empty((0, 4))
    texts = []
    for instance in reversed(instances):
        text = _fit_text(instance, font, picture.width - 2 * pad)
        size = np.array([min(font.getlength(text) + 2 * pad, picture.width), height])
        tags = np.vstack([tags, _place_tag(size, instance, picture.size, things, tags)])
        texts.append(text)

    for instance, (x1, y1, x2, y2), text in zip(reversed(instances), tags, texts, strict=True):
        colour = colours[instance.label]
        draw.rounded_rectangle((x1, y1, x2, y2), radius=pad, fill=colour, outline=_contrast(colour))
        draw.text(((x1 + x2) / 2, (y1 + y2) / 2), text, fill=_contrast(colour), font=font, anchor="mm")


def _fit_text(instance: Instance, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Label and score; without the score or with a shortened label if the image is too narrow."""
    text = f"{instance.label} {instance.score:.2f}"
    if font.getlength(text) > width:
        text = instance.label
    while font.getlength(text) > width and len(text) > 3:
        text = text.removesuffix("...")[:-1] + "..."
    return text


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas of intersection [n, m] of boxes [n, 4] and [m, 4]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(0).prod(axis=-1)


def _place_tag(
    size: np.ndarray, instance: Instance, limits: tuple[int, int], things: np.ndarray, tags: np.ndarray
) -> np.ndarray:
    """Choose the corners [4] of a tag of this size near its mask, away from other tags and small objects."""
    width, height = size
    mask = instance.mask
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    sites = np.array(  # centres of the tag in order of preference: above, below, right, left of the mask, in its middle
        [
            (np.flatnonzero(mask[rows[0]]).mean(), rows[0] - height / 2),
            (np.flatnonzero(mask[rows[-1]]).mean(), rows[-1] + height / 2),
            (columns[-1] + width / 2, np.flatnonzero(mask[:, columns[-1]]).mean()),
            (columns[0] - width / 2, np.flatnonzero(mask[:, columns[0]]).mean()),
            (columns.mean(), rows.mean()),
        ]
    )
    steps = np.stack(np.meshgrid(np.arange(-1, 1.01, 0.25), np.arange(-3, 3.01, 0.5)), axis=-1).reshape(-1, 2)
    centres = (sites[:, None] + steps * size).reshape(-1, 2)  # [5, 117, 2] -> [585, 2]
    centres = centres.clip(size / 2, np.array(limits) - 1 - size / 2)
    places = np.hstack([centres - size / 2, centres + size / 2])

    moved = np.linalg.norm(centres - sites.repeat(len(steps), axis=0), axis=1) / height
    moved += 0.5 * np.arange(len(sites)).repeat(len(steps))
    over_things = _overlap(places, things)
    hidden = (over_things / (things[:, 2:] - things[:, :2]).prod(axis=1)).sum(axis=1)  # hidden fractions of the objects
    misleading = over_things.sum(axis=1) / size.prod()  # a tag on another object would seem to name it
    covered = _overlap(places, tags).sum(axis=1) / size.prod()
    return places[np.argmin(moved + misleading + 8 * hidden + 50 * covered)].round()
