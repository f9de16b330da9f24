"""Opening images of any kind as upright RGB, with one clear sentence for those that cannot be opened."""

import io
import os
import stat
import time
import warnings
from typing import IO, TYPE_CHECKING, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ovsam.errors import InputError
from ovsam.ops.outlines import UPRIGHT
from ovsam.processing.arguments import is_tensor, to_numpy

if TYPE_CHECKING:
    import torch

MIN_SIDE = 8  # px; smaller images cannot be segmented
# Other formats are never tried: Pillow passes PostScript to Ghostscript, whatever the name of the file.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO")
URLS = ("http://", "https://")
TIFF_WIDTH, TIFF_HEIGHT = 256, 257  # tags
MAX_DOWNLOAD = 256 * 2**20  # bytes of an image behind a URL
DOWNLOAD_SECONDS = 30.0  # without a response
DOWNLOAD_AT_MOST = 300.0  # seconds of a whole download, since a server may send a byte from time to time

Picture = Union[str, os.PathLike[str], bytes, IO[bytes], Image.Image, np.ndarray, "torch.Tensor"]


def open_image(picture: Picture) -> Image.Image:
    """Return the image as RGB with its EXIF orientation applied; sizes and coordinates refer to the upright image.

    An image is a path, a URL (http or https), the bytes of a file, an open file, a PIL image, an array [H, W], [H, W,
    3] (RGB) or [H, W, 4] (RGBA), or a tensor [3, H, W] or [1, H, W]; arrays and tensors are uint8, or floats in [0, 1].
    Palette, grey, 16-bit and CMYK images are converted, and transparent ones are placed on white. Only the first frame
    of an animation is opened.

    Raises InputError for other types, for a file that is missing, empty, damaged or not an image, for more pixels than
    Pillow opens safely (`PIL.Image.MAX_IMAGE_PIXELS`, checked before any is decoded) and for a side under `MIN_SIDE`.
    """
    name, image = _open(picture)
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise InputError(f"{name} is {width}x{height} pixels; each side must have at least {MIN_SIDE} pixels.")
    try:
        return _turn_upright(image, _to_rgb(image))
    except MemoryError as error:
        raise InputError(f"{name} does not fit into memory; make it smaller.") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
    ) as error:  # an image in memory may not be decoded yet; some modes have no RGB
        raise InputError(f"{name} cannot be converted to RGB ({error}); save it as 8-bit RGB.") from error


def open_file(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """`PIL.Image.open` limited to `FORMATS`; only the header is read."""
    Image.preinit()
    known = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error at twice its limit
        try:
            return Image.open(source, formats=known)
        except UnidentifiedImageError:
            Image.init()
            others = [name for name in FORMATS if name in Image.OPEN and name not in known]
            if not others:
                raise
            if hasattr(source, "seek"):
                source.seek(0)
            return Image.open(source, formats=others)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, 1 for none; a broken EXIF block counts as none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # each decoder raises errors of its own
        return 1
    return orientation if orientation in UPRIGHT else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before the orientation is applied; of a TIFF that was not decoded Pillow gives those after."""
    tags = getattr(image, "tag_v2", {})
    return (tags[TIFF_WIDTH], tags[TIFF_HEIGHT]) if image.format == "TIFF" else image.size


def is_url(picture: object) -> bool:
    return isinstance(picture, str) and picture.lower().startswith(URLS)


def _open(picture: Picture) -> tuple[str, Image.Image]:
    """Return the name of an image for messages, and the decoded image."""
    if isinstance(picture, np.ndarray):
        return "The array", _from_array(picture)
    if isinstance(picture, Image.Image):
        return "The image", picture
    if isinstance(picture, bytes | bytearray | memoryview):
        return "The image", _decode("The image", io.BytesIO(picture))
    if is_url(picture):
        return _shown(picture), _decode(_shown(picture), io.BytesIO(_download(str(picture))))
    if isinstance(picture, str | os.PathLike):
        return _shown(picture), _read(picture)
    if is_tensor(picture):
        return "The tensor", _from_tensor(picture)
    if hasattr(picture, "read"):
        try:
            content = picture.read()
        except Exception as error:  # a closed file, one for writing, or anything else that has a `read`
            raise InputError(f"The image cannot be read from the open file ({error}).") from error
        if not isinstance(content, bytes):
            raise InputError("The file is open in text mode; open the image in binary mode, open(path, 'rb').")
        return "The image", _decode("The image", io.BytesIO(content))
    raise InputError(
        "An image must be a path, a URL, bytes, an open file, a PIL image, an array or a tensor, or a list of these; "
        f"got {type(picture).__name__}."
    )


def _shown(path: object) -> str:
    """A path or an address in messages."""
    name = " ".join(str(path).splitlines())
    return name if len(name) <= 300 else f"{name[:200]}..."


def _read(path: str | os.PathLike[str]) -> Image.Image:
    shown = _shown(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a PathLike without a path
        if isinstance(error, PermissionError):
            raise InputError(f"{shown} cannot be read: permission is denied; allow reading it.") from error
        raise InputError(f"{shown} does not exist; check the path of the image.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{shown} is a folder; name the images inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{shown} is a device or a pipe, not a file; save the image first.")
    if status.st_size == 0:
        raise InputError(f"{shown} is empty (0 bytes); it must be an image.")
    return _decode(shown, path)


def _decode(name: str, source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    try:
        with open_file(source) as image:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large to be opened safely, make it smaller first: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not an image in a supported format; JPEG, PNG, WebP, TIFF, BMP and GIF are supported."
        ) from error
    except MemoryError as error:
        raise InputError(f"{name} does not fit into memory; make it smaller.") from error
    except Exception as error:  # each decoder raises errors of its own
        raise InputError(f"{name} cannot be read ({error}); it is damaged, incomplete or protected.") from error


def _download(url: str) -> bytes:
    import httpx

    shown, end = _shown(url), time.monotonic() + DOWNLOAD_AT_MOST
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_SECONDS) as answer:
            answer.raise_for_status()
            content = bytearray()
            for chunk in answer.iter_bytes():
                content += chunk
                if time.monotonic() > end:
                    raise InputError(f"{shown} takes more than {DOWNLOAD_AT_MOST:.0f} s; download it first.")
                if len(content) > MAX_DOWNLOAD:
                    raise InputError(f"{shown} has more than {MAX_DOWNLOAD // 2**20} MB; download and shrink it first.")
    except httpx.HTTPStatusError as error:
        raise InputError(f"{shown} cannot be downloaded: the server answers {error.response.status_code}.") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown} cannot be downloaded ({str(error).strip() or type(error).__name__}).") from error
    if not content:
        raise InputError(f"{shown} is empty (0 bytes); it must be an image.")
    return bytes(content)


def _from_array(array: np.ndarray) -> Image.Image:
    shape_fits = array.size and (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4))
    real = array.dtype.kind == "f"
    if not shape_fits or not (
        real or array.dtype in (np.uint8, np.bool_) or array.dtype == np.uint16 and array.ndim == 2
    ):
        raise InputError(
            f"The array is {list(array.shape)} of {array.dtype}; an image must be [H, W], [H, W, 3] or [H, W, 4] of "
            "uint8, or of floats in [0, 1]."
        )
    if array.dtype == np.uint16:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    if real:
        array = unit_to_uint8(array, "The array")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _from_tensor(tensor: "torch.Tensor") -> Image.Image:
    """A tensor [3, H, W] or [1, H, W], uint8 or float in [0, 1]."""
    array = to_numpy(tensor)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not array.size or array.dtype not in (np.uint8, np.float32):
        raise InputError(
            f"The tensor is {list(array.shape)} of {tensor.dtype}; an image must be [3, H, W], uint8 or in [0, 1]."
        )
    if array.dtype != np.uint8:
        array = unit_to_uint8(array, "The tensor")
    array = array.transpose(1, 2, 0)  # [3, H, W] -> [H, W, 3]
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


def unit_to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Floats in [0, 1] -> uint8."""
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # also for NaN
        raise InputError(
            f"{name} has values from {low:g} to {high:g}; floats of an image must be in [0, 1], before normalisation."
        )
    return (array * 255).round().astype(np.uint8)


def _turn_upright(original: Image.Image, rgb: Image.Image) -> Image.Image:
    """Rotate by the EXIF of the original; `ImageOps.exif_transpose` also rewrites the EXIF, and fails on broken
    ones."""
    orientation = orientation_of(original)
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    rgb.info = {}  # else opening the result would rotate it again
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
        return Image.fromarray(np.uint8(np.clip(np.asarray(image) / 257, 0, 255).round())).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
