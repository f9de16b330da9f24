"""The drawing styles of EmojiScenes: one drawing for each word and style.

`noto` is the font Noto Color Emoji of the system. The others are npm packages of vector drawings, downloaded once with
`npm pack`, verified by their hash, and stored as pixels in the cache folder; their licences allow publishing a model
trained on them (see model_card.md). `openmoji` is never trained on: it is the held-out style.
"""

import base64
import functools
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ovsam.checkpoints.embedded import CACHE
from ovsam.data.scenes.words import all_words
from ovsam.data.words import Word
from ovsam.errors import InputError
from ovsam.ops.files import write_whole

FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
FONT_SIZE = 109  # the only bitmap size in Noto Color Emoji
SIDE = 136  # side of a rasterised drawing in pixels, as in the font


@dataclass(frozen=True)
class IconPackage:
    """An Iconify package: `icons.json` (SVG bodies by name) and, in some, `chars.json` (names by code points)."""

    name: str
    version: str
    sha512: str
    licence: str


PACKAGES = {
    "twemoji": IconPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
    ),
    "fluent-flat": IconPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
    ),
    "noto-v1": IconPackage(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
    ),
    "emojione": IconPackage(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
    ),
    "openmoji": IconPackage(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
    ),
}
STYLES = ("noto", *PACKAGES)
HELD_OUT = ("openmoji",)  # for testing only


@functools.cache
def sprites(style: str = "noto") -> tuple[Image.Image | None, ...]:
    """Return one cropped RGBA image for each word, in the order of `all_words()`; None if the style has no drawing.

    Raises:
        InputError: the style is unknown, or its drawings are not available.
    """
    if style not in STYLES:
        raise InputError(f"There is no drawing style {style!r}; choose one of {', '.join(STYLES)}.")
    pictures = _draw_font() if style == "noto" else _load_package(style)
    return tuple(picture and picture.crop(picture.getchannel("A").getbbox()) for picture in pictures)


def drawable(styles: Sequence[str]) -> list[int]:
    """Return the words with a drawing in at least one of the styles."""
    return [i for i, drawings in enumerate(zip(*map(sprites, styles), strict=True)) if any(drawings)]


def find_font() -> str:
    for path in FONT_PATHS:
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(
        "EmojiScenes draws with the font Noto Color Emoji, which is not installed: "
        "run `apt-get install fonts-noto-color-emoji` (Debian, Ubuntu) or install NotoColorEmoji.ttf."
    )


def _draw_font() -> list[Image.Image | None]:
    font = ImageFont.truetype(find_font(), FONT_SIZE)
    pictures = []
    for word in all_words():
        picture = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(picture).text((12, 12), word.char, font=font, embedded_color=True)
        # Without a layout engine for ligatures, or with an older font, a sequence is drawn as its parts, side by side.
        whole = len(word.char) == 1 or font.getlength(word.char) < 1.5 * font.getlength("\U0001f600")
        pictures.append(picture if whole and picture.getbbox() else None)
    return pictures


def _load_package(style: str) -> list[Image.Image | None]:
    words, package = all_words(), PACKAGES[style]
    listed = hashlib.sha256("\n".join(word.char for word in words).encode()).hexdigest()[:8]
    path = CACHE / "sprites" / f"{style}-{package.version}-{SIDE}-{listed}.npz"
    if not os.path.isfile(path):
        drawn = [_rasterise(svg) if svg else None for svg in read_package(package, words)]
        pixels = np.stack([np.asarray(p) if p else np.zeros((SIDE, SIDE, 4), np.uint8) for p in drawn])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: np.savez_compressed(temporary, pixels=pixels))
    pixels = np.load(path)["pixels"]  # [W, SIDE, SIDE, 4]
    return [Image.fromarray(p) if p[..., 3].any() else None for p in pixels]


def read_package(package: IconPackage, words: tuple[Word, ...]) -> list[str | None]:
    """Return the drawing of every word in the package, as SVG."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = f"{package.name}@{package.version}"
        try:
            subprocess.run(["npm", "pack", wanted], cwd=scratch, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"The drawings of {wanted} cannot be fetched with `npm pack`; install npm, or train without that style."
            ) from error
        content = next(Path(scratch).glob("*.tgz")).read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != package.sha512:
        raise InputError(f"The package {wanted} from npm has an unexpected hash; it must be the published one.")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        icons = json.load(archive.extractfile("package/icons.json"))
        chars = json.load(archive.extractfile("package/chars.json"))
    return [_svg(icons, chars, word) for word in words]


def _svg(icons: dict, chars: dict[str, str], word: Word) -> str | None:
    code = "-".join(f"{ord(char):x}" for char in word.char)
    keys = (code, code.replace("-fe0f", ""), f"{code}-fe0f")
    slug = word.name.lower().replace(" ", "-").replace("’", "").replace("'", "")
    name = next((chars[key] for key in keys if key in chars), slug)
    icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
    if icon is None:
        return None
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return (
        f'<svg {spaces} viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def _rasterise(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise InputError('Drawing styles other than noto need resvg-py: pip install "ovsam[train]".') from error
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE))))
    whole = Image.new("RGBA", (SIDE, SIDE))
    whole.paste(picture.convert("RGBA"))
    return whole
