"""Frames of a video from any source, one at a time, and a file to write frames to. PyAV decodes and encodes."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.inference.encoded import EncodedImage
from ovsam.ops.files import only_files, refused, temporary_beside
from ovsam.processing.images import open_image

DEFAULT_RATE = Fraction(25)  # frames a second of sources without a rate
TICKS = 90_000  # time units a second of written files
MISSING = 2  # number of frames that a header may count too many
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".avi")  # endings of written files
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Frame:
    """One upright RGB image of a video; `time` in seconds from its beginning; its features, where they were given."""

    index: int
    time: float
    image: Image.Image
    encoded: EncodedImage | None = None


class FrameSource:
    """Frames of a video, which are read when they are requested.

    Args:
        source: a video file, the number of a camera, an RTSP or HTTP address, a folder of images (in the order of
            their names), or an iterable of images of any kind that `Segmenter` takes, an EncodedImage among them.

    Attributes:
        rate: frames a second.
        length: number of frames, None if it is unknown.

    Raises:
        InputError: the source does not exist or cannot be read; or, while frames are read, the video is incomplete.
    """

    def __init__(self, source: Any):
        self.source, self.rate, self.length = source, DEFAULT_RATE, None
        self._container: Any = None
        if isinstance(source, str | os.PathLike) and os.path.isdir(source):
            self._files = only_files(
                sorted(path for path in Path(source).iterdir() if path.suffix.lower() in PICTURES), source
            )
            if not self._files:
                raise InputError(f"There are no images in {source}; it must have one image for each frame.")
            self.length = len(self._files)
        elif isinstance(source, int | str | os.PathLike):
            self._open()
        elif not isinstance(source, Iterable) or getattr(source, "ndim", 1) == 0:
            raise InputError(
                "A video must be a file, the number of a camera, an address, a folder of images or an iterable of "
                f"images; got {type(source).__name__}."
            )
        elif isinstance(source, Sized):
            self.length = len(source)

    def __iter__(self) -> Iterator[Frame]:
        if self._container is not None:
            yield from self._decode()
            return
        images = self._files if isinstance(self.source, str | os.PathLike) else self.source
        for index, image in enumerate(images):
            time = float(index / self.rate)
            if isinstance(image, EncodedImage):
                yield Frame(index, time, image.image, image)
            else:
                yield Frame(index, time, open_image(image))

    def close(self) -> None:
        """Close the file or the camera; further calls do nothing."""
        if self._container is not None:
            self._container.close()

    def _open(self) -> None:
        av = import_av()
        name, options = str(self.source), {}
        if isinstance(self.source, int):
            if not 0 <= self.source < 1000:
                raise InputError("A camera is a number from 0 to 999; pass that, or the path of a video.")
            name, options = f"/dev/video{self.source}", {"format": "v4l2"}
        elif "://" not in name and not os.path.isfile(name):
            raise InputError(f"There is no video {name}; pass a file, a folder of images, a camera or an address.")
        try:
            self._container = av.open(name, **options)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise InputError(f"{name} cannot be read as a video: {error}.") from error
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or self._stream.guessed_rate or DEFAULT_RATE
        self.length = self._stream.frames or None

    def _decode(self) -> Iterator[Frame]:
        av, index, start, damaged = import_av(), 0, None, 0
        try:
            for frame in self._container.decode(self._stream):
                time = float(index / self.rate) if frame.time is None else frame.time
                start = time if start is None else start
                if frame.is_corrupt:  # a part of it was lost, and the decoder made it up
                    index, damaged = index + 1, damaged + 1
                    continue
                pixels = frame.to_ndarray(format="rgb24")
                if frame.rotation:  # degrees counterclockwise, as stored by phones
                    pixels = np.rot90(pixels, round(frame.rotation / 90))
                yield Frame(index, time - start, Image.fromarray(np.ascontiguousarray(pixels)))
                index += 1
        except av.FFmpegError as error:
            raise InputError(f"The video {self.source} is damaged after {index:,} frames: {error}.") from error
        if self.length and index < self.length - MISSING:
            raise InputError(
                f"The video {self.source} is incomplete: it ends after {index - damaged:,} of {self.length:,} frames."
            )
        if self.length and damaged:
            raise InputError(f"The video {self.source} is damaged: {damaged:,} of its {index:,} frames are left out.")


class VideoWriter:
    """Writer of a video file with frames of one size, H.264 in mp4 if PyAV supports it.

    The file gets its name when it is closed; after an error of the disk nothing is left of it, and an older file stays.

    Args:
        path: path of the file; its ending, one of `VIDEOS`, selects the container.
        rate: frames a second.
        size: width and height in pixels; odd numbers are supported.
    """

    def __init__(self, path: str | os.PathLike, rate: Fraction, size: tuple[int, int]):
        av = import_av()
        self._av, self.size = av, size
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self.path = Path(os.path.realpath(path))
        self._temporary = temporary_beside(self.path)
        with refused(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self._temporary), "w")
        self._stream = self._container.add_stream(codec, rate=rate)
        self._stream.width, self._stream.height = size
        # Chroma subsampling, which every player supports, needs even sides.
        even = codec != "libx264" or not (size[0] % 2 or size[1] % 2)
        self._stream.pix_fmt = "yuv420p" if even else "yuv444p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)
        self._last = -1

    def write(self, image: Image.Image, time: float) -> None:
        """Add a frame that is shown from `time` on, in seconds, in ascending order."""
        frame = self._av.VideoFrame.from_image(image)
        self._last = max(self._last + 1, round(time * TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        with self._abandoned_on_error():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file, which cannot be played otherwise, and give it its name; further calls do nothing."""
        if self._container is not None:
            with self._abandoned_on_error():
                self._container.mux(self._stream.encode(None))
                self._container.close()
                self._container = None
                self._temporary.replace(self.path)

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Remove the file, and raise InputError, where it cannot be written."""
        try:
            with refused(self.path):
                yield
        except InputError:
            if self._container is not None:
                with contextlib.suppress(OSError):
                    self._container.close()
            self._container = None
            self._temporary.unlink(missing_ok=True)
            raise


def import_av() -> Any:
    """Import PyAV; raises InputError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise InputError('Videos need PyAV: pip install "ovsam[video]".') from error
    return av
