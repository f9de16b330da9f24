"""`ovsam eval` of videos: J&F of objects that are given on their first frame, beside two baselines; and objects that
are found by their class names and followed."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import tee
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ovsam.evaluation.evaluate import RECORDS, fingerprint, mode, read_records, write_json
from ovsam.evaluation.metrics import concept_f1
from ovsam.evaluation.metrics_video import TrackOverlap, boundary_accuracy, region_similarity
from ovsam.evaluation.videos import Video, moving_videos, open_videos
from ovsam.inference.encoded import EncodedImage
from ovsam.inference.loading import load
from ovsam.inference.segmenter import Segmenter
from ovsam.inference.video import Prompt, VideoSegmenter
from ovsam.ops import rle
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.files import refused
from ovsam.processing.images import open_image

GIVEN = ("mask", "box")
BASELINES = ("copy the first mask", "detect in every frame")
WORDS = "words"
LEAST = 0.1  # IoU with the last mask from which on a detection continues it


def measure_videos(
    segmenter: Segmenter,
    videos: Sequence[Video],
    given: Sequence[str] = GIVEN,
    baselines: bool = True,
    tracker: str = "auto",
    words: bool = True,
    file: Path | None = None,
    asked: dict | None = None,
) -> list[dict]:
    """Measure every object of some videos.

    Args:
        given: what of the first frame is given: "mask", "box".
        words: whether to search for the class names of videos that have them.
        file: where the records of each video are written when it is measured; those of the same evaluation, `asked`,
            are read from it.

    Returns:
        records. With `method` one of `given` or a baseline: video, object, J and F. With `method` "words": video,
        object, whether it was found, its identity switches; and one record for each query, with `query` and the
        overlaps [tracks, objects] of its tracks.
    """
    done = {} if file is None else read_records(file, asked or {}, "video")
    for video in tqdm(videos, unit=" videos"):
        if video.name not in done:
            records = _measure(segmenter, video, given, baselines, tracker, words)
            done[video.name] = {"video": video.name, "records": records}
            if file is not None:
                with refused(file), file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(done[video.name]) + "\n")
    return [record for video in videos for record in done[video.name]["records"]]


def _measure(segmenter, video: Video, given, baselines: bool, tracker: str, words: bool) -> list[dict]:
    count = len(video.images)
    start = {}  # the first frame of each object
    for frame in range(count):
        for number, mask in (video.truth(frame) or {}).items():
            if mask.any():
                start.setdefault(number, (frame, mask))

    def encoded() -> Iterator[EncodedImage]:
        for frame in range(count):
            yield segmenter.encode_frame(open_image(video.images[frame]))

    words = words and bool(video.words)
    feeds = tee(encoded(), len(given) + words + 1)  # read in step, so that each frame is encoded once
    follower = VideoSegmenter(segmenter, tracker)
    runs = {}
    for kind, feed in zip(given, feeds, strict=False):
        prompts = [_prompt(kind, number, frame, mask) for number, (frame, mask) in start.items()]
        # Names are not measured: one word costs least.
        runs[f"{kind} given"] = iter(follower.track(feed, prompts=prompts, vocabulary=["object"]))
    queries = list(dict.fromkeys([*video.words.values(), *video.absent]))
    if words:
        runs[WORDS] = iter(follower.track(feeds[len(given)], words=queries))
    overlap = TrackOverlap()
    labels: dict[int, str] = {}  # of the tracks that were found by words

    def same_word(track: int, number: int) -> bool:
        return labels[track] == video.words.get(number)

    scores: dict[tuple[str, int], list[tuple[float, float]]] = {}
    last = {number: mask for number, (_, mask) in start.items()}
    for frame, image in enumerate(tqdm(feeds[-1], total=count, leave=False, unit=" frames")):
        found = {}
        for name, run in runs.items():
            results = next(run).results
            found[name] = {one.id: one.mask for one in results}
            if name == WORDS:
                labels |= {one.id: one.label for one in results}
        if baselines:
            found[BASELINES[0]] = {number: mask for number, (_, mask) in start.items()}
            detections = segmenter.everything(image, ["object"], objectness=0.1, refine=False).instances
            for number, (first, _) in start.items():
                if frame > first and detections:
                    ious = rle.iou([one.segmentation for one in detections], [rle.encode(last[number])])[:, 0]
                    if ious.max() >= LEAST:
                        last[number] = detections[int(ious.argmax())].mask
            found[BASELINES[1]] = dict(last)
        truth = video.truth(frame)
        if truth is None:
            continue
        if words:
            overlap.add(found.pop(WORDS), truth, same_word)
        if frame == count - 1:
            continue
        size = image.image.height, image.image.width
        empty = np.zeros(size, dtype=bool)
        for number, (first, _) in start.items():
            if frame > first:
                for name, masks in found.items():
                    mask, right = masks.get(number, empty), truth.get(number, empty)
                    both = region_similarity(mask, right), boundary_accuracy(mask, right)
                    scores.setdefault((name, number), []).append(both)
    records: list[dict] = []
    for (name, number), each in scores.items():
        j, f = np.mean(each, 0).tolist()
        records.append({"video": video.name, "object": number, "method": name, "J": j, "F": f})
    return records + (_word_records(video, queries, overlap, labels) if words else [])


def _word_records(video: Video, queries: list[str], overlap: TrackOverlap, labels: dict[int, str]) -> list[dict]:
    common = {"video": video.name, "method": WORDS}
    records: list[dict] = [
        common | {"object": number, "word": video.words.get(number), "found": followed, "switches": switches}
        for number, (followed, switches) in overlap.objects().items()
    ]
    for query in queries:
        tracks = [track for track, label in labels.items() if label == query]
        objects = [number for number, word in video.words.items() if word == query and number in overlap.truths]
        rows = overlap.iou(tracks, objects).tolist()
        records.append(common | {"query": query, "objects": len(objects), "overlap": rows})
    return records


def _prompt(kind: str, number: int, frame: int, mask: np.ndarray) -> Prompt:
    if kind == "mask":
        return Prompt(mask=mask, id=number, frame=frame, name="object")
    box = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
    return Prompt(box=box, id=number, frame=frame, name="object")


def summarise_videos(records: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Means over all objects: method -> J&F, J, F; and for words -> found, identity switches, cgF1, pmF1, IL_MCC."""
    figures = {}
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        if method == WORDS:
            objects = [record for record in own if "object" in record]
            queries = [record for record in own if "query" in record]
            overlaps = [np.reshape(one["overlap"], (len(one["overlap"]), one["objects"])) for one in queries]
            figures[method] = {
                "found": float(np.mean([record["found"] for record in objects])),
                "identity switches": float(np.mean([record["switches"] for record in objects])),
                **concept_f1(overlaps),
            }
        else:
            j, f = np.mean([(record["J"], record["F"]) for record in own], 0).tolist()
            figures[method] = {"J&F": (j + f) / 2, "J": j, "F": f}
    return figures


def table(records: Sequence[dict]) -> str:
    """The figures as text: J&F of each object, then the means."""
    figures = summarise_videos(records)
    followed = {name: row for name, row in figures.items() if name != WORDS}
    objects = dict.fromkeys((record["video"], record["object"]) for record in records if "J" in record)
    value = {(r["video"], r["object"], r["method"]): (r["J"] + r["F"]) / 2 for r in records if "J" in r}
    lines = ["J&F of each object: " + ", ".join(followed)]
    for video, number in objects:
        row = "  ".join(f"{value[video, number, name]:.3f}" for name in followed)
        lines.append(f"  {row}  {video} {number}")
    lines += ["", f"{'mean over objects':24}  J&F    J      F"]
    lines += [f"{name:24}  " + "  ".join(f"{number:.3f}" for number in row.values()) for name, row in followed.items()]
    if WORDS in figures:
        each = ", ".join(f"{name} {value:.3f}" for name, value in figures[WORDS].items())
        lines += ["", f"class names as text queries: {each}"]
    return "\n".join(lines)


def run_video_eval(
    dataset: str | Path,
    model: str = "ovsam-tiny",
    images: str | Path | None = None,
    output: str | Path | None = None,
    json_path: str | Path | None = None,
    limit: int | None = None,
    baselines: bool = True,
    tracker: str = "auto",
    device: str | None = None,
    moving: bool = False,
    seed: int | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a model on videos, print the table, and write what was asked for.

    Args:
        dataset: as `open_videos` reads it; images: the folder of the frames of a json.
        output: folder for the records; an interrupted evaluation continues there.
        json_path: where the results go.
        limit: only the first videos.
        moving: whether to draw moving scenes of the objects of `dataset`, a COCO file, instead; `seed` draws other
            scenes than the frozen ones.

    Raises:
        InputError: no such data set or model.
    """
    folder = None if images is None else Path(images)
    if moving:
        videos = moving_videos(Path(dataset), folder, *(() if seed is None else (seed,)))[:limit]
    else:
        videos = open_videos(Path(dataset), folder)[:limit]
    segmenter = load(model, device=device, memory=tracker != "propagation")
    asked = {"model": str(model), "dataset": str(dataset), "moving": moving, "seed": seed, "baselines": baselines}
    asked |= {"tracker": tracker, "weights": fingerprint(segmenter)}
    file = None if output is None else Path(output) / RECORDS
    records = measure_videos(segmenter, videos, baselines=baselines, tracker=tracker, file=file, asked=asked)
    figures = summarise_videos(records)
    print(f"\n{segmenter.name} on {dataset}, {len(videos)} videos; {mode(segmenter)}\n")
    print(table(records))
    if json_path:
        command = shlex.join(["ovsam", *sys.argv[1:]])
        write_json(Path(json_path), {"command": command, "figures": figures, "records": records})
    return figures
