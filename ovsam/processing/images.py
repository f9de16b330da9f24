"""Opening pictures of any kind as upright RGB, refusing with one clear sentence those that cannot be."""

import os

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ovsam.errors import InputError
from ovsam.ops.outlines import UPRIGHT

MIN_SIDE = 8  # px; below this there is nothing to segment


Picture = str | os.PathLike[str] | Image.Image | np.ndarray


def open_image(picture: Picture) -> Image.Image:
    """Return the picture as RGB with its EXIF orientation applied; sizes and coordinates are of the upright picture.

    Palette, grey, 16-bit and CMYK pictures are converted, and transparent ones are laid on white. An array is
    [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA) of uint8.

    Raises InputError for a file that is missing, empty, damaged or no picture, for more pixels than Pillow opens
    safely (`PIL.Image.MAX_IMAGE_PIXELS`, checked before any is decoded), for a side under `MIN_SIDE`, and for an array
    of another shape or type.
    """
    if isinstance(picture, np.ndarray):
        name, image = "The array", _from_array(picture)
    elif isinstance(picture, Image.Image):
        name, image = "The picture", picture
    else:
        name, image = str(picture), _read(picture)
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise InputError(f"{name} is {width}x{height} pixels; each side must have at least {MIN_SIDE}.")
    try:
        return _turn_upright(image, _to_rgb(image))
    except (OSError, ValueError) as error:  # a picture in memory may still be undecoded; some modes have no RGB
        raise InputError(f"{name} cannot be converted to RGB ({error}); save it as 8-bit RGB.") from error


def _read(path: str | os.PathLike[str]) -> Image.Image:
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name the pictures inside it.")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path of the picture.")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty (0 bytes); it must be a picture.")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large to be opened safely, make it smaller first: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} is not a picture that can be read; JPEG, PNG, WebP, TIFF, BMP and GIF files can."
        ) from error
    except Exception as error:  # each decoder has errors of its own
        raise InputError(f"{path} cannot be read ({error}); it is damaged, cut short or protected.") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError(
            f"The array is {list(array.shape)} of {array.dtype}; a picture is [H, W], [H, W, 3] or [H, W, 4] of uint8."
        )
    return Image.fromarray(array)


def _turn_upright(original: Image.Image, rgb: Image.Image) -> Image.Image:
    """Turn as the original's EXIF says; `ImageOps.exif_transpose` also rewrites the EXIF, and fails where it is odd."""
    orientation = original.getexif().get(ExifTags.Base.Orientation)
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    rgb.info = {}  # or opening the result again would turn it again
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip instead of scale
        return Image.fromarray(np.uint8(np.clip(np.asarray(image) / 257, 0, 255).round())).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
