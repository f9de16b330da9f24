"""Images on disk as samples: read, cropped and resized to the square of the model, as a function of (seed, index)."""

import io
import logging
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm

from ovsam.data.base import Sample, SegmentationData, pad_objects
from ovsam.data.paste import cut_out, paste_objects
from ovsam.data.words import Word
from ovsam.errors import InputError
from ovsam.ops.outlines import Rle, to_rle, turn
from ovsam.processing.images import MIN_SIDE, open_file, open_image, orientation_of, stored_size

logger = logging.getLogger(__name__)

FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # a file without these bytes is incomplete
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
CROP_TRIES = 10
REPLACEMENTS = 8  # number of following images that are tried if an image is damaged
DRAWS = 100

PictureSource = str | bytes  # a path, or the content of a file


@dataclass
class Record:
    """The annotations of one image.

    Attributes:
        image: file of the image.
        outlines: polygons or run lengths, as in COCO; None stands for the whole image.
        word_ids: word id of each outline; -1 without a name.
        size: width and height that the outlines refer to; None for those of the upright image.
        known: words that were annotated exhaustively; None for all.
        unknown: words of `known` that were not annotated exhaustively in this image.
    """

    picture: PictureSource
    outlines: Sequence[Any]
    word_ids: Sequence[int]
    size: tuple[int, int] | None = None
    known: Sequence[int] | None = None
    unknown: Sequence[int] = field(default_factory=tuple)


class PackedList:
    """A list of records in one buffer, shared by data-loader workers. A list of objects would soon be copied by each
    worker, since reference counts are written to."""

    def __init__(self, records: Iterable[Any]):
        pieces = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in records]
        self.ends = np.cumsum([0, *map(len, pieces)])
        self.buffer = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.buffer[self.ends[index] : self.ends[index + 1]])


class PictureData(SegmentationData):
    """Samples of the images of a reader, which provides `record`, `pictures` and `instances`.

    Args:
        words: words of the data set.
        size: S, the side of the square that images are resized to.
        max_objects: O. If an image has more objects, each sample has a random choice; the words of the others are not
            `known` in it.
        seed: seed of all random choices.
        crop: lowest share of the image area that a random crop keeps (with an aspect ratio of 3/4 to 4/3 of the image's
            own, as in Inception training); 1 for no crops. Crops without objects are drawn again.
        flip: whether to mirror half of the samples.
        draws: number of samples of each image, each cropped and mirrored in its own way: sample i shows image i modulo
            `pictures`. By default 1, and 100 if samples are cropped, mirrored or pasted onto.
        paste: maximum number of objects that are cut out of another image and pasted onto each sample, before it is
            cropped (Ghiasi et al., CVPR 2021); number, choice and position are random. 0 for none.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self,
        words: list[Word],
        size: int = 512,
        max_objects: int = 20,
        seed: int = 0,
        crop: float = 1.0,
        flip: bool = False,
        draws: int | None = None,
        paste: int = 0,
    ):
        draws = (DRAWS if flip or crop < 1 or paste else 1) if draws is None else draws
        for name, value in (("size", size), ("max_objects", max_objects), ("draws", draws)):
            if value < 1:
                raise InputError(f"[data] has {name} = {value}; it must be at least 1.")
        if not 0 < crop <= 1:
            raise InputError(f"[data] has crop = {crop}; it must be a share of the image area, over 0 and at most 1.")
        if paste < 0:
            raise InputError(f"[data] has paste = {paste}; it must be at least 0.")
        self.words, self.size, self.max_objects, self.paste = words, size, max_objects, paste
        self.seed, self.crop, self.flip, self.draws = seed, crop, flip, draws
        self.skipped, self.notes = [], []

    def record(self, number: int) -> Record:
        """Return the annotations of image `number`; raises InputError if they cannot be read."""
        raise NotImplementedError

    def _accept(self, name: str, header: "Header | str", size: tuple[int, int] | None) -> bool:
        """Whether an image can be read and has the `size` of its annotations; if not, it is added to `skipped`."""
        try:
            if isinstance(header, str):
                raise InputError(header)
            if size is not None:
                turned(name, size, header)
        except InputError as error:
            self.skipped.append(str(error))
            return False
        return True

    def __len__(self) -> int:
        return self.pictures * self.draws

    def __getitem__(self, index: int) -> Sample:
        """Return the sample; if its image is damaged, that of the next image, with a warning.

        Raises InputError after 8 unreadable images in a row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} samples")
        for number in range(index, index + REPLACEMENTS):
            try:
                record = self.record(number % self.pictures)
                return self._sample(record, np.random.default_rng((self.seed, index)), index)
            except InputError as error:
                damage = error
                logger.warning("%s The next image replaces it.", error)
        raise InputError(f"{REPLACEMENTS} images in a row cannot be read; the last: {damage}")

    def _sample(self, record: Record, rng: np.random.Generator, index: int) -> Sample:
        image = open_picture(record.picture)
        rles, named = upright_outlines(record, image.size), list(record.word_ids)
        if self.paste:
            image, rles, named = self._paste(image, rles, named, np.random.default_rng((self.seed, index, 1)))
        mirrored = rng.random() < 0.5
        box, visible = self._choose_crop(rng, image.size, rles)
        chosen = visible
        if len(visible) > self.max_objects:
            chosen = sorted(rng.choice(visible, self.max_objects, replace=False).tolist())
        squashed = squash(image.crop(box), self.size)
        masks = torch.stack([squash_mask(rles[i], box, self.size) for i in chosen]) if chosen else _no_masks(self.size)
        if self.flip and mirrored:
            squashed, masks = squashed.flip(-1), masks.flip(-1)
        known = np.full(len(self.words), record.known is None)
        known[list(record.known or ())] = True
        left_out = {named[i] for i in set(visible) - set(chosen)} - {-1}
        known[[*record.unknown, *left_out]] = False
        word_ids = torch.tensor([named[i] for i in chosen], dtype=torch.int64)
        masks, word_ids = pad_objects(masks, word_ids, self.max_objects)
        return {"image": squashed, "masks": masks, "word_ids": word_ids, "known": torch.from_numpy(known)}

    def _paste(
        self, image: Image.Image, rles: list[Rle | None], word_ids: list[int], rng: np.random.Generator
    ) -> tuple[Image.Image, list[Rle | None], list[int]]:
        """Return the image with up to `paste` objects of another one, its outlines and their word ids."""
        source = self.record(int(rng.integers(self.pictures)))
        picture = open_picture(source.picture)
        outlines = upright_outlines(source, picture.size)
        if any(rle is None for rle in (*rles, *outlines)):  # a whole image cannot be cut out
            return image, rles, word_ids
        count = min(len(outlines), int(rng.integers(self.paste + 1)))
        chosen = sorted(rng.choice(len(outlines), count, replace=False).tolist()) if count else []
        pieces = {i: piece for i in chosen if (piece := cut_out(picture, outlines[i])) is not None}
        image, rles = paste_objects(image, rles, list(pieces.values()), rng)
        return image, rles, word_ids + [source.word_ids[i] for i in pieces]

    def _choose_crop(
        self, rng: np.random.Generator, size: tuple[int, int], rles: list[Rle | None]
    ) -> tuple[tuple[int, int, int, int], list[int]]:
        """Return a crop (left, top, right, bottom) and the outlines that have pixels in it."""
        width, height = size
        for _ in range(CROP_TRIES if self.crop < 1 else 0):
            area, aspect = rng.uniform(self.crop, 1), np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
            w = max(1, min(width, round(width * np.sqrt(area * aspect))))
            h = max(1, min(height, round(height * np.sqrt(area / aspect))))
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            frame = np.zeros((height, width), dtype=np.uint8, order="F")
            frame[y : y + h, x : x + w] = 1
            window = coco.encode(frame)
            visible = [i for i, rle in enumerate(rles) if rle is None or _area(coco.merge([rle, window], True))]
            if visible or not rles:
                return (x, y, x + w, y + h), visible
        return (0, 0, width, height), [i for i, rle in enumerate(rles) if rle is None or _area(rle)]


def _area(rle: Rle) -> int:
    return int(coco.area(rle))


def _no_masks(size: int) -> Tensor:
    return torch.zeros(0, size, size, dtype=torch.bool)


def squash(image: Image.Image, size: int) -> Tensor:
    """Resize to uint8 [3, size, size], with the same pixels as the model's processor (bilinear, antialiased)."""
    return transforms.resize(transforms.pil_to_tensor(image), [size, size], antialias=True)


def squash_mask(rle: Rle | None, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Resize to bool [size, size]: the pixels that are more than half covered, by the same resampling as the image. For
    a very thin object, the pixels of the highest coverage."""
    if rle is None:
        return torch.ones(size, size, dtype=torch.bool)
    left, top, right, bottom = box
    mask = np.ascontiguousarray(coco.decode(rle)[top:bottom, left:right]) * 255  # [h, w]
    covered = transforms.resize(torch.from_numpy(mask)[None], [size, size], antialias=True)[0]
    return covered >= max(1, min(128, int(covered.max())))


def open_picture(picture: PictureSource) -> Image.Image:
    """Open an image as upright RGB; raises InputError if it cannot be read."""
    try:
        return open_image(picture)
    except InputError as error:
        if isinstance(picture, str):
            raise
        raise InputError(str(error).replace("The image", "An image of the data set", 1)) from error


def upright_outlines(record: Record, size: tuple[int, int]) -> list[Rle | None]:
    """Return the outlines as run lengths over the upright image, whose width and height are `size`.

    Raises InputError if the outlines are for an image of another size, or invalid.
    """
    width, height = record.size or size
    orientation = 1
    if (width, height) != size:
        orientation = turned(name_of(record.picture), (width, height), read_header(record.picture))
    try:
        rles = [None if outline is None else to_rle(outline, height, width) for outline in record.outlines]
    except InputError as error:
        raise InputError(f"An annotation of {name_of(record.picture)} {error}.") from error
    return rles if orientation == 1 else [rle and turn(rle, orientation) for rle in rles]


def name_of(picture: PictureSource) -> str:
    return picture if isinstance(picture, str) else "an image of the data set"


@dataclass(frozen=True)
class Header:
    """Width and height of the stored pixels, and the EXIF orientation that rotates them upright (1: none)."""

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation in SIDEWAYS else (self.width, self.height)


def turned(name: str, size: tuple[int, int], header: Header) -> int:
    """Return the EXIF orientation by which outlines for an image of `size` must be rotated; 1 for none.

    Annotations refer to the upright image, as in nearly all tools. If the file has the size of the stored pixels
    instead, they refer to those. Raises InputError if it is neither.
    """
    if size == header.upright:
        return 1
    if size == (header.width, header.height):
        return header.orientation
    (w, h), (width, height) = header.upright, size
    raise InputError(f"{name} is {w}x{h} pixels, and its annotations are for {width}x{height}.")


def read_header(picture: PictureSource) -> Header:
    """Return size and orientation without decoding the pixels, except for files with a suspicious header.

    Raises InputError if the image cannot be read.
    """
    header, sound = None, False
    try:
        if isinstance(picture, str) and not os.path.isfile(picture):  # opening a pipe would block
            raise InputError(f"{picture} is not a file; it must be an image file.")
        with open_file(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            header = Header(*stored_size(image), orientation_of(image))
            sound = min(image.size) >= MIN_SIDE and FILE_ENDS.get(image.format, b"") in _tail(picture)
    except Exception:  # each decoder raises errors of its own; open_picture describes the error
        sound = False
    if not sound:
        upright = open_picture(picture)
        header = header or Header(upright.width, upright.height, 1)
    return header


def _tail(picture: PictureSource) -> bytes:
    if isinstance(picture, bytes):
        return picture[-16:]
    with open(picture, "rb") as file:
        file.seek(-16, os.SEEK_END)
        return file.read()


def check_pictures(pictures: Iterable[PictureSource], count: int) -> list[Header | str]:
    """Return the header of each image, or a sentence why it cannot be read."""

    def look(picture: PictureSource) -> Header | str:
        try:
            return read_header(picture)
        except InputError as error:
            return str(error)

    iterator, found = iter(pictures), []
    with ThreadPool(8) as pool, tqdm(total=count, desc="checking images", unit="", disable=count < 1000) as bar:
        while batch := list(islice(iterator, 256)):  # in batches: some are whole files in memory
            found += pool.map(look, batch)
            bar.update(len(batch))
    return found
