"""`ovsam video`: track objects through a video, found by text queries or selected by prompts."""

import contextlib
import json
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovsam.errors import InputError
from ovsam.inference.frames import VIDEOS, FrameSource
from ovsam.ops.files import STDOUT, check_output_folder, check_target, write_text
from ovsam.processing.arguments import check_inside
from ovsam.processing.images import open_file
from ovsam.processing.vocabulary import Vocabulary
from ovsam_cli import arguments

if TYPE_CHECKING:
    from ovsam.inference.video import Prompt, VideoStream

EXAMPLES = """\
frames count from 0, and coordinates are pixels from the top left corner:
  ovsam video clip.mp4 --text dog "red ball" -o found.mp4 --json found.json
  ovsam video clip.mp4 --point 0:210,140 --box 30:40,60,300,280 -o found.mp4
  ovsam video frames/ --mask 0:first.png --masks out/
"""
PARSER = {
    "usage": "ovsam video IN [--text WORD...] [--point FRAME:X,Y] [--box FRAME:X1,Y1,X2,Y2] [--mask FRAME:FILE] "
    "[options]",
    "description": "Track objects through a video; each keeps its number, its colour and its class name.",
    "epilog": EXAMPLES,
}
LESS_MEMORY = "use a smaller video, fewer objects, a smaller --model, or --device cpu in place of a GPU"


def on_frame(read: Callable[[str], Any]) -> Callable[[str], tuple[int, Any]]:
    """Return a parser of `FRAME:VALUE` into the number of the frame and `read(VALUE)`."""

    def parse(text: str) -> tuple[int, Any]:
        frame, colon, value = text.partition(":")
        if not colon or not re.fullmatch(r"\d{1,9}", frame):
            raise ArgumentTypeError(f"{text!r} must begin with the number of a frame and a colon, such as 0:")
        return int(frame), read(value)

    return parse


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("video", metavar="IN", help="video file, folder of images, number of a camera or address")
    what = parser.add_argument_group("objects to track")
    arguments.add(what, "--text", "--not")
    arguments.add(
        what,
        "--point",
        metavar="FRAME:X,Y",
        type=on_frame(arguments.point),
        help="object at this point; repeat for more objects",
    )
    arguments.add(
        what,
        "--box",
        metavar="FRAME:X1,Y1,X2,Y2",
        type=on_frame(arguments.box),
        help="object in this box; repeat for more objects",
    )
    what.add_argument(
        "--mask",
        metavar="FRAME:FILE",
        type=on_frame(Path),
        action="append",
        default=[],
        dest="given",
        help="objects of a mask file: one for a binary image, one for each value except 0 for an id map, with that id",
    )
    arguments.add(
        what,
        "--vocabulary",
        help="class names of selected objects: coco, lvis, imagenet21k or a file with one a line "
        "(default: the model's own)",
    )
    arguments.add(what, "--threshold", help="with --text: lowest score, 0 to 1")
    how = parser.add_argument_group("tracking")
    how.add_argument(
        "--redetect-every",
        metavar="N",
        type=arguments.count,
        default=10,
        help="with --text: search again every N frames (default: 10)",
    )
    how.add_argument(
        "--patience",
        metavar="N",
        type=arguments.count,
        default=30,
        help="remove an object after N frames without it (default: 30)",
    )
    how.add_argument("--every", metavar="N", type=arguments.count, default=1, help="read every Nth frame (default: 1)")
    arguments.add(how, "--tracker")
    model = parser.add_argument_group("the model")
    arguments.add(model, "--model", "--device")
    output = parser.add_argument_group("the output")
    output.add_argument(
        "-o", "--output", metavar="OUT.mp4", help="video with masks, class names and numbers drawn over it"
    )
    output.add_argument("--json", metavar="OUT.json", help="all tracks, in the format of YouTube-VIS")
    output.add_argument(
        "--masks", metavar="DIR", help="folder for an 8-bit id map of each frame, 00000.png and on; 0 is background"
    )


def check(args: Namespace) -> None:
    """Raise InputError for invalid questions, missing videos and invalid targets.

    Sets `args.words`, the vocabulary of --text or None, `args.source`, and in `args.given` (frame, path, masks).
    """
    if not (args.text or args.points or args.boxes or args.given):
        raise InputError("There is nothing to track; give --text WORD..., --point, --box or --mask.")
    if args.negative and not args.text:
        raise InputError("--not needs --text; add the text queries to search for.")
    if args.threshold is not None and not args.text:
        raise InputError("--threshold needs --text; selected objects are always tracked.")
    if not (args.output or args.json or args.masks):
        raise InputError("There is no output; give -o OUT.mp4, --json OUT.json or --masks DIR.")
    args.words = Vocabulary(args.text) if args.text else None
    if args.vocabulary:
        args.vocabulary = Vocabulary(args.vocabulary)
    if both := set(args.words.prompts if args.words else ()) & set(args.negative):
        raise InputError(f"{min(both)!r} is in --text and in --not; remove it from one of them.")
    if args.output and Path(args.output).suffix.lower() not in VIDEOS:
        raise InputError(f"-o {args.output} is no video file; its name must end in {', '.join(VIDEOS)}.")
    for option, target in (("-o", args.output), ("--json", args.json)):
        if target:
            check_target(target, option)
    if args.output and os.path.exists(args.output) and Path(args.output).resolve() == Path(args.video).resolve():
        raise InputError(f"-o {args.output} is the video itself; write to another file.")
    args.source = int(args.video) if re.fullmatch(r"\d{1,4}", args.video) else args.video
    args.given = [(frame, path, read_masks(path)) for frame, path in args.given]
    if isinstance(args.source, str) and "://" not in args.source:
        _check_frame(args)
    if args.masks:
        check_output_folder(args.masks, "--masks")


def _check_frame(args: Namespace) -> None:
    """Raise InputError if a file or folder is no video, or if prompts do not fit its first frame."""
    with contextlib.closing(FrameSource(args.source)) as source:
        first = next(iter(source), None)
    if first is None:
        raise InputError(f"The video {args.video} has no frames.")
    boxes, points = [box for _, box in args.boxes], [point[:2] for _, point in args.points]
    check_inside(first.image.size, points, boxes, "the frame")
    for _, path, found in args.given:
        for _, mask in found:
            if mask.shape != (first.image.height, first.image.width):
                raise InputError(
                    f"The mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels and the frame "
                    f"{first.image.width}x{first.image.height}; they must be equal."
                )
    named = [frame for frame, *_ in [*args.points, *args.boxes, *args.given]]
    if source.length and max(named, default=0) >= source.length:
        raise InputError(f"There is no frame {max(named)}; the video has {source.length}, counted from 0.")


def run(args: Namespace) -> int:
    """Track, and write outputs frame by frame; they stay valid if the command is interrupted."""
    import ovsam
    from ovsam.inference.frames import VideoWriter

    prompts, out = make_prompts(args), sys.stderr if args.json == STDOUT else sys.stdout
    video = ovsam.load_video(args.model, device=args.device, tracker=args.tracker)
    stream = video.track(
        args.source,
        args.words,
        prompts,
        negative=args.negative,
        threshold=args.threshold,
        vocabulary=args.vocabulary,
        redetect_every=args.redetect_every,
        patience=args.patience,
        every=args.every,
    )
    if args.masks:
        Path(args.masks).mkdir(parents=True, exist_ok=True)
    tracks, writer, failed = ovsam.Tracks(), None, False
    progress = Progress(stream)
    try:
        for frame in stream:
            tracks.add(frame)
            if args.output:
                writer = writer or VideoWriter(args.output, stream.source.rate / args.every, frame.image.size)
                writer.write(frame.overlay(), frame.time)
            if args.masks:
                frame.save_id_map(Path(args.masks))
            progress.show(len(frame.results))
    except InputError as error:  # a damaged video: the frames before are kept
        failed = True
        print(f"ovsam: error: {error}", file=sys.stderr)
    finally:
        progress.close()
        stream.close()
        try:
            if writer is not None:
                writer.close()
        finally:
            if args.json and tracks.length:
                names = args.words.labels if args.words else ()
                write_text(args.json, json.dumps(tracks.to_youtube_vis(args.video, names)))
    for track in tracks.tracks.values():
        frames = sorted(track.frames)
        print(
            f"{track.id:4}  {track.label:24} {track.score:.2f}  frames {frames[0]}-{frames[-1]} ({len(frames)})",
            file=out,
        )
    for option, path in (("video", args.output), ("json", args.json), ("masks", args.masks)):
        if path:
            print(f"{option}: {path}", file=out)
    return 2 if failed else 0


def make_prompts(args: Namespace) -> list["Prompt"]:
    """Return the prompts of --point, --box and --mask, in this order."""
    from ovsam.inference.video import Prompt

    prompts = [Prompt(points=[(x, y)], labels=[label], frame=frame) for frame, (x, y, label) in args.points]
    prompts += [Prompt(box=box, frame=frame) for frame, box in args.boxes]
    for frame, _, found in args.given:
        prompts += [Prompt(mask=mask, id=number, frame=frame) for number, mask in found]
    taken = {prompt.id for prompt in prompts if prompt.id is not None}
    free = (number for number in range(1, 10**6) if number not in taken)
    return [prompt if prompt.id is not None else _numbered(prompt, next(free)) for prompt in prompts]


def _numbered(prompt: "Prompt", number: int) -> "Prompt":
    from dataclasses import replace

    return replace(prompt, id=number)


def read_masks(path: Path) -> list[tuple[int | None, np.ndarray]]:
    """Return the objects of a mask file: one without an id for a binary image, one for each value except 0 for an id
    map."""
    if not os.path.isfile(path):
        raise InputError(f"There is no mask {path}; check the path.")
    try:
        with open_file(path) as image:
            values = np.asarray(image if image.mode in ("L", "P", "I", "I;16", "1") else image.convert("L"))
    except Exception as error:  # each decoder raises errors of its own
        raise InputError(f"{path} cannot be read as a mask: {error}.") from error
    ids = [int(value) for value in np.unique(values) if value]
    if not ids:
        raise InputError(f"The mask {path} is empty; it needs at least one pixel of an object.")
    if len(ids) == 1 or values.dtype == bool:
        return [(None, values > 0)]
    return [(number, values == number) for number in ids]


class Progress:
    """A line on stderr: frames, frames a second, objects, memory of the tracker."""

    def __init__(self, stream: "VideoStream"):
        from tqdm import tqdm

        length = stream.source.length
        self.stream = stream
        total = None if length is None else -(-length // stream.every)
        self.bar = tqdm(total=total, unit=" frames", disable=None)  # none in a pipe

    def show(self, objects: int) -> None:
        self.bar.set_postfix_str(f"{objects} objects, {self.stream.nbytes / 2**20:.0f} MB of memory", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
