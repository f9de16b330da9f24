"""`ovsam segment`: segment objects in images, by text queries, points or boxes, or all of them."""

import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image

from ovsam.errors import InputError
from ovsam.ops.files import check_target, write_whole
from ovsam.processing.images import open_image
from ovsam.processing.vocabulary import Vocabulary
from ovsam_cli import arguments

if TYPE_CHECKING:
    from ovsam.inference.segmenter import Segmenter
    from ovsam.results.results import Results


EXAMPLES = """\
one question at a time:
  ovsam segment photo.jpg --text dog "red ball" -o found.png      where are these objects?
  ovsam segment photo.jpg --point 210,140 --vocabulary lvis       what is this object?
  ovsam segment photo.jpg --box 40,60,300,280 --vocabulary my_words.txt
  ovsam segment *.jpg --everything --vocabulary coco -o overlays/ --json all.json

Coordinates are pixels from the top left corner. Images come before the options.
"""
PARSER = {
    "usage": "ovsam segment IMAGE... (--text WORD... | --point X,Y | --box X1,Y1,X2,Y2 | --everything) [options]",
    "description": "Print the instances of each image: label, score, mask score, box (x1,y1,x2,y2) and area.",
    "epilog": EXAMPLES,
}
MAX_PHRASE = 64  # words; the limit of all text towers; each checks its own


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file")
    question = parser.add_argument_group("the question")
    question.add_argument(
        "--text", metavar="WORD", nargs="+", action="extend", default=[], help="text queries to search for"
    )
    question.add_argument(
        "--not",
        metavar="WORD",
        nargs="+",
        action="extend",
        default=[],
        dest="negative",
        help="with --text: drop instances that match these negative queries better",
    )
    question.add_argument(
        "--point",
        metavar="X,Y[,0|1]",
        type=arguments.point,
        action="append",
        default=[],
        dest="points",
        help="segment and classify this object; repeat for more points of the same object, 1 on it, 0 beside it",
    )
    question.add_argument(
        "--box",
        metavar="X1,Y1,X2,Y2",
        type=arguments.box,
        action="append",
        default=[],
        dest="boxes",
        help="segment and classify the object in this box; repeat for more objects; points correct a single one",
    )
    question.add_argument("--everything", action="store_true", help="segment and classify all objects")
    question.add_argument(
        "--vocabulary",
        metavar="NAME|FILE",
        help="class names: coco, lvis, imagenet21k or a file with one a line (default: the model's own)",
    )
    question.add_argument(
        "--threshold",
        metavar="SCORE",
        type=arguments.share,
        help="with --text or --everything: lowest score, 0 to 1 (default: the model's own with --text, none with "
        "--everything)",
    )
    question.add_argument(
        "--objectness",
        metavar="SHARE",
        type=arguments.share,
        help="with --everything: lowest objectness, 0 to 1 (default: the model's own)",
    )
    search = parser.add_argument_group("search, with --text or --everything")
    search.add_argument(
        "--proposer",
        metavar="NAME",
        help="proposer: concepts, clip-dense, grid, detector:ID or sam3:ID (default: the model's own)",
    )
    search.add_argument(
        "--tile",
        metavar="PIXELS",
        type=arguments.count,
        help="also search overlapping tiles of this side, for small objects in large images",
    )
    search.add_argument("--exclusive", action="store_true", help="assign each pixel to one instance only")
    search.add_argument(
        "--no-refine", action="store_false", dest="refine", help="keep the prototype masks, without the SAM decoder"
    )
    model = parser.add_argument_group("the model")
    model.add_argument("--model", metavar="PRESET|PATH|ID", default="auto", help="default: auto")
    arguments.add_device(model)
    output = parser.add_argument_group("the output")
    output.add_argument(
        "-o",
        "--output",
        metavar="OUT.png",
        help="draw masks and class names over the image; for several images a folder, with NAME-ovsam.png of each",
    )
    output.add_argument("--json", metavar="OUT.json", help="write all images as one COCO data set")


def check(args: Namespace) -> None:
    """Raise InputError for invalid questions and targets, and report the images that cannot be read.

    Sets `args.words`, the vocabulary or None, `args.overlays`, the file of each overlay, and `args.readable`.
    """
    args.words = _check_question(args)
    args.overlays = _plan_overlays(args.output, args.images) if args.output else {}
    if args.json:
        _check_json(Path(args.json))
    # Opened here for the check and again below: many images would not fit into memory.
    args.readable = [path for path in args.images if _try_to_open(path, args)]
    if not args.readable:
        raise SystemExit(2)


def run(args: Namespace) -> int:
    """Segment and classify, print a table for each image, write overlays and the COCO file.

    Images that cannot be read are reported on stderr and skipped. Returns 2 if there are any, else 0.
    """
    import ovsam
    from ovsam.results.formats import write_coco

    segmenter = ovsam.load(args.model, device=args.device)
    found = []
    for path in args.readable:
        image = _try_to_open(path, args)
        if image is None:
            continue
        results = _ask(segmenter, image, args)
        results.file_name = path
        found.append(results)
        print(f"{path}: {len(results)} found ({results.model})")
        if results:
            print(results.table())
        if path in args.overlays:
            zoom = max(1, round(256 / math.sqrt(image.width * image.height)))  # room for class names on small images
            overlay = results.overlay(image, zoom)
            write_whole(args.overlays[path], overlay.save)
            print(f"overlay: {args.overlays[path]}")
    if args.json:
        write_coco(found, args.json, labels=args.words.labels if args.words else ())
        print(f"json: {args.json}")
    return 0 if len(found) == len(args.images) else 2


def _ask(segmenter: "Segmenter", image: Image.Image, args: Namespace) -> "Results":
    how = {name: getattr(args, name) for name in ("threshold", "proposer", "refine", "tile", "exclusive")}
    if args.text:
        return cast("Results", segmenter.where(image, args.words, negative=args.negative, **how))
    if args.everything:
        return cast("Results", segmenter.everything(image, vocabulary=args.words, objectness=args.objectness, **how))
    found = segmenter.what(
        image,
        points=[[x, y] for x, y, _ in args.points] or None,
        labels=[label for _, _, label in args.points] or None,
        boxes=[list(box) for box in args.boxes] or None,
        vocabulary=args.words,
    )
    return cast("Results", found)


def _check_question(args: Namespace) -> Vocabulary | None:
    """Return the text queries or the vocabulary, None for the model's own; raises InputError for invalid questions."""
    text, prompts = bool(args.text), bool(args.points or args.boxes)
    if text + prompts + args.everything == 0:
        raise InputError(
            "There is nothing to segment; give --text WORD..., --point X,Y, --box X1,Y1,X2,Y2 or --everything."
        )
    if text + prompts + args.everything > 1:
        raise InputError(
            "--text, --point or --box, and --everything are three questions; give one of them; "
            "the class names for points, boxes and everything are set by --vocabulary."
        )
    for option in ("proposer", "tile", "exclusive"):
        if prompts and getattr(args, option):
            raise InputError(f"--{option} needs --text or --everything.")
    if text and args.vocabulary:
        raise InputError("--text already gives the text queries; use --vocabulary with --point, --box or --everything.")
    if args.negative and not text:
        raise InputError("--not needs --text; add the text queries to search for.")
    if args.threshold is not None and prompts:
        raise InputError("--threshold needs --text or --everything; points and boxes always give a mask.")
    if args.objectness is not None and not args.everything:
        raise InputError("--objectness needs --everything; with --text, use --threshold.")
    if args.points and len(args.boxes) > 1:
        raise InputError("All points belong to one object; give at most one --box with --point.")
    if args.points and not args.boxes and not any(label for _, _, label in args.points):
        raise InputError("All points are beside the object (X,Y,0); at least one must be on it (X,Y,1).")
    for x1, y1, x2, y2 in args.boxes:
        if not (x1 < x2 and y1 < y2):
            raise InputError(
                f"The box {x1:g},{y1:g},{x2:g},{y2:g} is reversed or empty; it must be left,top,right,bottom, "
                "with left < right and top < bottom."
            )
    if not text:
        return Vocabulary(args.vocabulary) if args.vocabulary else None

    words = Vocabulary(args.text)
    excluded = Vocabulary(args.negative).prompts if args.negative else []
    for word in words.prompts + excluded:
        if (length := len(word.split())) > MAX_PHRASE:
            raise InputError(f"The phrase {word[:30]!r}... has {length} words; use at most {MAX_PHRASE}.")
    if both := set(words.prompts) & set(excluded):
        raise InputError(f"{min(both)!r} is in --text and in --not; remove it from one of them.")
    return words


def _plan_overlays(output: str, images: list[str]) -> dict[str, Path]:
    """Return the path of each overlay; raises InputError if it cannot be written."""
    target = Path(output)
    if os.path.isdir(target):
        plan, times = {}, Counter[str]()
        for image in dict.fromkeys(images):
            stem = Path(image).stem
            times[stem] += 1  # images of the same name may come from several folders
            plan[image] = target / (f"{stem}-ovsam-{times[stem]}.png" if times[stem] > 1 else f"{stem}-ovsam.png")
        return plan
    if len(images) > 1:
        raise InputError(f"-o {output} is not an existing folder; it must be one for several images.")
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise InputError(f"-o {output} is not valid; it must be an image file such as out.png or an existing folder.")
    check_target(target, "-o")
    if target.exists() and Path(images[0]).exists() and target.samefile(images[0]):
        raise InputError(f"-o {output} is the image itself; write the overlay to another file.")
    return {images[0]: target}


def _check_json(path: Path) -> None:
    check_target(path, "--json")


def _try_to_open(path: str, args: Namespace) -> Image.Image | None:
    """Open an image and check that points and boxes are inside it; if not, print the error on stderr and return
    None."""
    try:
        image = open_image(path)
        width, height = image.size
        for x, y, _ in args.points:
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(f"The point {x:g},{y:g} is outside {path}, which is {width}x{height} pixels.")
        for x1, y1, x2, y2 in args.boxes:
            if not (0 <= x1 and 0 <= y1 and x2 <= width and y2 <= height):
                raise InputError(
                    f"The box {x1:g},{y1:g},{x2:g},{y2:g} is not inside {path}, which is {width}x{height} pixels."
                )
    except InputError as error:
        print(f"ovsam: error: {error}", file=sys.stderr)
        return None
    return image
