"""Videos with true masks for evaluation: folders in the layout of DAVIS, a json of YouTube-VIS, moving scenes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import numpy as np
from PIL import Image

from ovsam.data.scenes.moving import SCENES, SEED, MovingScene, open_moving
from ovsam.errors import InputError
from ovsam.ops import outlines, rle
from ovsam.ops.schema import Side, place, read_json

ABSENT = 3  # absent class names that are queried in a video of YouTube-VIS

Masks = dict[int, np.ndarray]


class VideoFacts(TypedDict):
    id: Annotated[int, msgspec.Meta(ge=0)]
    width: Side
    height: Side
    file_names: list[str]


class VideoTrack(TypedDict):
    id: int
    video_id: int
    segmentations: list[outlines.Segmentation | None]
    category_id: NotRequired[int | None]


class VideoCategory(TypedDict):
    id: int
    name: str


class VideoFile(TypedDict):
    """A JSON file of YouTube-VIS."""

    videos: list[VideoFacts]
    annotations: list[VideoTrack]
    categories: NotRequired[list[VideoCategory]]


@dataclass(frozen=True)
class Video:
    """A video with its true masks, read or drawn frame by frame.

    Attributes:
        images: one image for each frame, of any kind that `Segmenter` takes.
        truth: function from the number of a frame to the masks [H, W] of its objects by id; None where the frame is not
            annotated.
        words: class name of each object, where the data set has names.
        absent: class names of no object.
    """

    name: str
    images: Sequence[Any]
    truth: Callable[[int], Masks | None]
    words: dict[int, str] = field(default_factory=dict)
    absent: Sequence[str] = ()


def open_videos(path: Path, images: Path | None = None) -> list[Video]:
    """Return the sequences of a folder in DAVIS' layout (`JPEGImages/*/NAME`, `Annotations/*/NAME`), of a folder of
    folders with images and masks of one name (`NAME/00000.jpg`, `NAME/00000.png`), or of a json of YouTube-VIS.

    Raises:
        InputError: there is no video with masks.
    """
    if os.path.isfile(path):
        return _youtube_vis(path, images or path.parent)
    if not os.path.isdir(path):
        raise InputError(f"There is no file or folder {path}; check the path.")
    found = []
    official = sorted((path / "JPEGImages").glob("*/*/")) or sorted((path / "JPEGImages").glob("*/"))
    for folder in official or sorted(path.glob("*/")):
        masks_in = path / "Annotations" / folder.relative_to(path / "JPEGImages") if official else folder
        frames = sorted(folder.glob("*.jpg"))
        masks = [masks_in / f"{frame.stem}.png" for frame in frames]
        if frames and masks[0].is_file():
            found.append(Video(folder.name, frames, partial(_read_masks, masks)))
    if not found:
        raise InputError(
            f"There is no video with masks in {path}; it must be DAVIS' JPEGImages and Annotations, or folders that "
            "hold 00000.jpg and 00000.png and on."
        )
    return found


def moving_videos(annotations: Path, images: Path | None = None, seed: int = SEED, count: int = SCENES) -> list[Video]:
    """Return moving scenes of the objects of a COCO file, or of a folder with annotations.json."""
    folder = annotations.parent if images is None else images
    if os.path.isdir(annotations):
        folder, annotations = annotations if images is None else images, annotations / "annotations.json"
        folder = folder / "images" if (folder / "images").is_dir() else folder
    scenes = open_moving(annotations, folder, seed, count)
    return [_moving(f"scene {number}", scene) for number, scene in enumerate(scenes)]


def _moving(name: str, scene: MovingScene) -> Video:
    def truth(frame: int) -> Masks:
        numbers = scene.draw(frame)[1]
        return {number: numbers == number for number in words if (numbers == number).any()}

    words = dict(enumerate(scene.words, 1))
    return Video(name, _Drawn(scene), truth, words, scene.absent)


class _Drawn(Sequence):
    """The images of a moving scene, each drawn when it is needed."""

    def __init__(self, scene: MovingScene):
        self.scene = scene

    def __len__(self) -> int:
        return len(self.scene)

    def __getitem__(self, frame: Any) -> Any:
        return self.scene.draw(range(len(self.scene))[frame])[0]


def _read_masks(paths: Sequence[Path], frame: int) -> Masks | None:
    if not os.path.isfile(paths[frame]):
        return None
    with Image.open(paths[frame]) as image:
        values = np.asarray(image if image.mode in ("P", "L", "1") else image.convert("L"))
    ids = [int(value) for value in np.unique(values) if value]
    return {1: values > 0} if len(ids) == 1 else {number: values == number for number in ids}


def _youtube_vis(path: Path, images: Path) -> list[Video]:
    content = read_json(path, VideoFile)
    names = {one["id"]: one["name"] for one in content.get("categories", ())}
    found = []
    for video in content["videos"]:
        tracks, words = {}, {}
        for number, one in enumerate(content["annotations"]):
            if one["video_id"] != video["id"]:
                continue
            where = place(f"annotations[{number}].segmentations", path)
            if len(one["segmentations"]) != len(video["file_names"]):
                raise InputError(f"{where} has {len(one['segmentations'])} frames of {len(video['file_names'])}.")
            tracks[one["id"]] = [_run_lengths(s, video, where) for s in one["segmentations"]]
            if one.get("category_id") in names:
                words[one["id"]] = names[one["category_id"]]
        others = sorted({*names.values()} - {*words.values()})
        absent = np.random.default_rng(video["id"]).permutation(others)[:ABSENT].tolist() if words else []
        frames = [images / name for name in video["file_names"]]
        found.append(Video(str(video["id"]), frames, partial(_decode, tracks), words, absent))
    return found


def _decode(tracks: dict[int, list[dict | None]], frame: int) -> Masks:
    return {number: rle.decode(each[frame]) for number, each in tracks.items() if each[frame] is not None}


def _run_lengths(segmentation: outlines.Segmentation | None, video: dict, where: str) -> dict | None:
    if segmentation is None:
        return None
    try:
        return outlines.to_rle(segmentation, video["height"], video["width"])
    except InputError as error:
        raise InputError(f"{where} {error}.") from error
