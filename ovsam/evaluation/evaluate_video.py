"""`ovsam eval` of a folder of videos: J&F of objects that are given on their first frame, beside two baselines."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ovsam.errors import InputError
from ovsam.evaluation.evaluate import mode, write_json
from ovsam.evaluation.metrics_video import boundary_accuracy, region_similarity
from ovsam.inference.segmenter import EncodedImage, Segmenter, load
from ovsam.inference.video import Prompt, VideoSegmenter
from ovsam.ops import rle
from ovsam.ops.boxes import masks_to_boxes

GIVEN = ("mask", "box")
BASELINES = ("copy the first mask", "detect in every frame")
LEAST = 0.1  # IoU with the last mask from which on a detection continues it
PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Video:
    """A video with its true masks, read frame by frame."""

    name: str
    images: list[Path]
    masks: list[Path | None]
    tracks: dict[int, list[dict | None]] | None = None  # run lengths, in place of mask files

    def truth(self, frame: int) -> dict[int, np.ndarray] | None:
        """The masks [H, W] of the objects on a frame, by id; None where it is not annotated."""
        if self.tracks is not None:
            return {n: rle.decode(each[frame]) for n, each in self.tracks.items() if each[frame] is not None}
        path = self.masks[frame]
        if path is None:
            return None
        with Image.open(path) as image:
            values = np.asarray(image if image.mode in ("P", "L", "1") else image.convert("L"))
        ids = [int(value) for value in np.unique(values) if value]
        return {1: values > 0} if len(ids) == 1 else {number: values == number for number in ids}


def open_videos(path: Path, images: Path | None = None) -> list[Video]:
    """The sequences of a folder in DAVIS' layout (`JPEGImages/*/NAME`, `Annotations/*/NAME`), of a folder of folders
    with images and masks of one name (`NAME/00000.jpg`, `NAME/00000.png`), or of a json of YouTube-VIS.

    Raises:
        InputError: there is no video with masks.
    """
    if path.is_file():
        return _youtube_vis(path, images or path.parent)
    found = []
    official = sorted((path / "JPEGImages").glob("*/*/")) or sorted((path / "JPEGImages").glob("*/"))
    for folder in official or sorted(path.glob("*/")):
        masks_in = path / "Annotations" / folder.relative_to(path / "JPEGImages") if official else folder
        frames = sorted(folder.glob("*.jpg"))
        masks = [masks_in / f"{frame.stem}.png" for frame in frames]
        if frames and masks[0].is_file():
            found.append(Video(folder.name, frames, [mask if mask.is_file() else None for mask in masks]))
    if not found:
        raise InputError(
            f"There is no video with masks in {path}; it is DAVIS' JPEGImages and Annotations, or folders that hold "
            "00000.jpg and 00000.png and on."
        )
    return found


def _youtube_vis(path: Path, images: Path) -> list[Video]:
    content = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for video in content["videos"]:
        own = [one for one in content["annotations"] if one["video_id"] == video["id"]]
        tracks = {
            one["id"]: [None if s is None else _run_lengths(s, video) for s in one["segmentations"]] for one in own
        }
        frames = [images / name for name in video["file_names"]]
        found.append(Video(str(video["id"]), frames, [], tracks))
    return found


def _run_lengths(segmentation: dict, video: dict) -> dict:
    if isinstance(segmentation["counts"], list):
        from pycocotools import mask as coco

        return coco.frPyObjects(segmentation, video["height"], video["width"])
    return segmentation


def measure_videos(
    segmenter: Segmenter,
    videos: Sequence[Video],
    given: Sequence[str] = GIVEN,
    baselines: bool = True,
    tracker: str = "auto",
) -> list[dict]:
    """J and F of every object, one record each.

    Args:
        given: what of the first frame is given: "mask", "box".

    Returns:
        dicts of video, object, method, J and F.
    """
    records = []
    for video in tqdm(videos, unit=" videos"):
        records += _measure(segmenter, video, given, baselines, tracker)
    return records


def _measure(segmenter, video: Video, given, baselines: bool, tracker: str) -> list[dict]:
    count = len(video.images)
    start = {}  # the first frame of each object
    for frame in range(count):
        for number, mask in (video.truth(frame) or {}).items():
            if mask.any():
                start.setdefault(number, (frame, mask))

    def encoded() -> Iterator[EncodedImage]:
        for path in video.images[:count]:
            yield segmenter.encode(path)

    feeds = tee(encoded(), len(given) + 1)  # read in step, so that each frame is encoded once
    follower = VideoSegmenter(segmenter, tracker)
    runs = {}
    for kind, feed in zip(given, feeds, strict=False):
        prompts = [_prompt(kind, number, frame, mask) for number, (frame, mask) in start.items()]
        # Names are not measured: one word costs least.
        runs[f"{kind} given"] = iter(follower.track(feed, prompts=prompts, vocabulary=["object"]))
    scores: dict[tuple[str, int], list[tuple[float, float]]] = {}
    last = {number: mask for number, (_, mask) in start.items()}
    for frame, image in enumerate(tqdm(feeds[-1], total=count, leave=False, unit=" frames")):
        found = {name: {one.id: one.mask for one in next(run).results} for name, run in runs.items()}
        if baselines:
            found[BASELINES[0]] = {number: mask for number, (_, mask) in start.items()}
            detections = segmenter.everything(image, ["object"], objectness=0.1, refine=False).instances
            for number, (first, _) in start.items():
                if frame > first and detections:
                    overlap = rle.iou([one.segmentation for one in detections], [rle.encode(last[number])])[:, 0]
                    if overlap.max() >= LEAST:
                        last[number] = detections[int(overlap.argmax())].mask
            found[BASELINES[1]] = dict(last)
        truth = video.truth(frame)
        if truth is None or frame == count - 1:
            continue
        size = image.image.height, image.image.width
        empty = np.zeros(size, dtype=bool)
        for number, (first, _) in start.items():
            if frame > first:
                for name, masks in found.items():
                    mask, right = masks.get(number, empty), truth.get(number, empty)
                    both = region_similarity(mask, right), boundary_accuracy(mask, right)
                    scores.setdefault((name, number), []).append(both)
    records = []
    for (name, number), each in scores.items():
        j, f = np.mean(each, 0).tolist()
        records.append({"video": video.name, "object": number, "method": name, "J": j, "F": f})
    return records


def _prompt(kind: str, number: int, frame: int, mask: np.ndarray) -> Prompt:
    if kind == "mask":
        return Prompt(mask=mask, id=number, frame=frame, name="object")
    box = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
    return Prompt(box=box, id=number, frame=frame, name="object")


def summarise_videos(records: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Means over all objects: method -> J&F, J, F."""
    figures = {}
    for method in dict.fromkeys(record["method"] for record in records):
        own = [(record["J"], record["F"]) for record in records if record["method"] == method]
        j, f = np.mean(own, 0).tolist()
        figures[method] = {"J&F": (j + f) / 2, "J": j, "F": f}
    return figures


def table(records: Sequence[dict]) -> str:
    """The figures as text: J&F of each object, then the means."""
    figures = summarise_videos(records)
    objects = dict.fromkeys((record["video"], record["object"]) for record in records)
    value = {(r["video"], r["object"], r["method"]): (r["J"] + r["F"]) / 2 for r in records}
    lines = ["J&F of each object: " + ", ".join(figures)]
    for video, number in objects:
        row = "  ".join(f"{value[video, number, name]:.3f}" for name in figures)
        lines.append(f"  {row}  {video} {number}")
    lines += ["", f"{'mean over objects':24}  J&F    J      F"]
    lines += [f"{name:24}  " + "  ".join(f"{number:.3f}" for number in row.values()) for name, row in figures.items()]
    return "\n".join(lines)


def run_video_eval(
    dataset: str | Path,
    model: str = "ovsam-tiny",
    images: str | Path | None = None,
    json_path: str | Path | None = None,
    limit: int | None = None,
    baselines: bool = True,
    tracker: str = "auto",
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a model on videos, print the table, and write what was asked for.

    Args:
        dataset: as `open_videos` reads it; images: the folder of the frames of a json.
        json_path: where the results go.
        limit: only the first videos.

    Raises:
        InputError: no such data set or model.
    """
    videos = open_videos(Path(dataset), None if images is None else Path(images))[:limit]
    segmenter = load(model, device=device)
    records = measure_videos(segmenter, videos, baselines=baselines, tracker=tracker)
    figures = summarise_videos(records)
    print(f"\n{segmenter.name} on {dataset}, {len(videos)} videos; {mode(segmenter)}\n")
    print(table(records))
    if json_path:
        command = shlex.join(["ovsam", *sys.argv[1:]])
        write_json(Path(json_path), {"command": command, "figures": figures, "records": records})
    return figures
