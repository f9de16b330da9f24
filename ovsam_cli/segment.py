"""`ovsam segment`: segment objects in images, by text queries, points or boxes, or all of them."""

import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ovsam.errors import InputError
from ovsam.ops.files import STDOUT, check_output_folder, check_target, write_text, write_whole
from ovsam.processing.arguments import check_inside
from ovsam.processing.images import is_url, open_image
from ovsam.processing.vocabulary import Vocabulary, split_words
from ovsam.results.formats import FORMATS
from ovsam_cli import arguments
from ovsam_cli.image_names import list_images
from ovsam_cli.table import Printer, header, rows

if TYPE_CHECKING:
    from ovsam.inference.segmenter import Segmenter
    from ovsam.results.results import Results


EXAMPLES = """\
one question at a time:
  ovsam segment photo.jpg --text dog "red ball" -o found.png      where are these objects?
  ovsam segment photo.jpg --point 210,140 --vocabulary lvis       what is this object?
  ovsam segment photo.jpg --box 40,60,300,280 --vocabulary my_words.txt
  ovsam segment photo.jpg --exemplar 40,60,120,160                where are similar objects?
  ovsam segment photos/ --everything --vocabulary coco -o overlays/ --json all.json
  ovsam segment 'photos/*.jpg' https://example.org/cat.jpg @list.txt --text cat -o labels/ --format yolo

IMAGE is a file, a folder, a pattern, a URL, - (stdin), or @FILE, a text file with one of these a line. Coordinates are
pixels from the top left corner. Images come before the options. Commas separate text queries, unless they are quoted:
--text '"salt, pepper"'. In a pipe the table has tabs and one header.
Exit code: 0; 1 if some images failed; 2 if all failed or the command is invalid.
"""
PARSER = {
    "usage": "ovsam segment IMAGE... (--text WORD... | --exemplar X1,Y1,X2,Y2 | --point X,Y | --box X1,Y1,X2,Y2 | "
    "--everything) [options]",
    "description": "Print the instances in each image: class name, score, mask score, box (x1,y1,x2,y2) and area.",
    "epilog": EXAMPLES,
}
MAX_PHRASE = 64  # words, more than any text tower takes; towers with a lower limit check it themselves
OUTPUTS = ("overlay", "cutouts", "tsv", *FORMATS)

LESS_MEMORY = "use smaller images, a smaller --batch, --half, a smaller --model, or --device cpu in place of a GPU"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="an image; see below")
    question = parser.add_argument_group("the question")
    arguments.add(question, "--text", "--not")
    arguments.add(
        question,
        "--point",
        help="segment and classify this object; repeat for more points of the same object, 1 on it, 0 beside it",
    )
    arguments.add(
        question,
        "--box",
        help="segment and classify the object in this box; repeat for more objects; points correct a single one",
    )
    question.add_argument(
        "--exemplar",
        metavar="X1,Y1,X2,Y2",
        type=arguments.box,
        action="append",
        default=[],
        dest="exemplars",
        help="find objects similar to the one in this box, alone or besides --text; may be repeated",
    )
    arguments.add(question, "--everything", "--vocabulary")
    arguments.add(
        question,
        "--threshold",
        help="with --text or --everything: lowest score, 0 to 1 (default: the model's own with --text, none with "
        "--everything)",
    )
    arguments.add(question, "--objectness")
    search = parser.add_argument_group("search, with --text or --everything")
    arguments.add(search, "--proposer", "--tile")
    search.add_argument(
        "--max", metavar="N", type=arguments.count, help="keep the N instances of highest score in each image"
    )
    search.add_argument(
        "--iou",
        metavar="SHARE",
        type=arguments.share,
        help="keep the highest score among instances with a higher mask IoU",
    )
    arguments.add(search, "--exclusive", "--refine")
    model = parser.add_argument_group("the model")
    arguments.add(model, "--model", "--device")
    model.add_argument("--half", action="store_true", help="16-bit weights: half the memory")
    model.add_argument("--batch", metavar="N", type=arguments.count, default=1, help="images in one pass (default: 1)")
    output = parser.add_argument_group("the output")
    output.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="output of --format: a file, or a folder (created if missing) for several images; - is stdout",
    )
    output.add_argument(
        "--format",
        choices=OUTPUTS,
        default="overlay",
        help="format of -o: masks and class names drawn over the image (overlay, the default), each instance cut out, "
        "the table with tabs (tsv, also without -o), or the label files of a tool",
    )
    output.add_argument(
        "--json", metavar="OUT.json", help="write the instances of all images as one COCO data set; - is stdout"
    )
    output.add_argument("-q", "--quiet", action="store_true", help="print errors only, no table")
    output.add_argument("-v", "--verbose", action="store_true", help="also print messages of the libraries")


def check(args: Namespace) -> None:
    """Raise InputError for invalid questions and targets, and report the images that cannot be read.

    Sets `args.words`, the vocabulary or None, `args.negative`, `args.readable`, the images that can be read, and
    `args.failed`, the number of the others.
    """
    args.words = _check_question(args)
    if args.half and args.proposer:
        raise InputError("--half is for the model's own proposals; leave out --proposer.")
    named = list(dict.fromkeys(list_images(args.images)))
    _check_output(args, named)
    if args.json:
        check_target(args.json, "--json")
    if args.json == STDOUT and args.output == STDOUT:
        raise InputError("--json - and -o - would both write to stdout; name a file for one of them.")
    if STDOUT in named:
        args.stdin = sys.stdin.buffer.read()
    # Opened here for the checks and again for segmentation, since many images would not fit into memory.
    args.readable = [name for name in named if _try_to_open(name, args)]
    args.failed = len(named) - len(args.readable)
    if not args.readable:
        raise SystemExit(2)


def run(args: Namespace) -> int:
    """Segment and classify, print a table, write the output files.

    Images that cannot be read are reported on stderr. Returns 1 if there were any, 2 if there were no others, else 0.
    """
    import ovsam
    from ovsam.results.formats import write_coco, write_labels

    half = "float16" if (args.device or _default_device()).startswith("cuda") else "bfloat16"
    segmenter = ovsam.load(args.model, device=args.device, dtype=half if args.half else None)
    printer, found, places = Printer(args), [], _names(args)
    for name, image, results in _answers(segmenter, args):
        results.file_name = "stdin" if name == STDOUT else name
        results = _thin(results, args)
        found.append(results)
        printer.add(results)
        if args.output and args.format == "overlay":
            zoom = max(1, round(256 / math.sqrt(image.width * image.height)))  # room for class names on small images
            drawn = results.overlay(image, zoom)
            _save(drawn, places[name])
            printer.say(f"overlay: {places[name]}")
        elif args.output and args.format == "cutouts":
            for path in _write_cutouts(results, image, places[name]):
                printer.say(f"cut-out: {path}")
    labels = list(args.words.labels) if args.words else list(dict.fromkeys(one.label for r in found for one in r))
    if args.output and args.format in FORMATS:
        write_labels(found, args.output, args.format, labels)
        printer.say(f"{args.format}: {args.output}")
    elif args.output and args.format == "tsv":
        write_text(args.output, header() + "".join(map(rows, found)))
        printer.say(f"tsv: {args.output}")
    if args.json:
        write_coco(found, args.json, labels=args.words.labels if args.words else ())
        printer.say(f"json: {args.json}")
    return 0 if not args.failed else 1 if found else 2


def _answers(segmenter: "Segmenter", args: Namespace) -> Iterator[tuple[str, Image.Image, "Results"]]:
    """Yield the name, the image and the results of each image that can still be read."""
    for start in range(0, len(args.readable), args.batch):
        names = args.readable[start : start + args.batch]
        opened = [(name, image) for name in names if (image := _try_to_open(name, args)) is not None]
        args.failed += len(names) - len(opened)
        images: list[Any] = [image for _, image in opened]
        if len(images) > 1 and not args.tile:
            images = segmenter.encode(images, batch_size=args.batch)
        for (name, picture), image in zip(opened, images, strict=True):
            yield name, picture, _ask(segmenter, image, args)


def _ask(segmenter: "Segmenter", image: Any, args: Namespace) -> Any:
    how: dict[str, Any] = {
        name: getattr(args, name) for name in ("threshold", "proposer", "refine", "tile", "exclusive")
    }
    if args.text or args.exemplars:
        if args.exemplars:
            how["exemplars"] = [list(box) for box in args.exemplars]
        return segmenter.where(image, args.words, negative=args.negative, **how)
    if args.everything:
        return segmenter.everything(image, vocabulary=args.words, objectness=args.objectness, **how)
    return segmenter.what(
        image,
        points=[[x, y] for x, y, _ in args.points] or None,
        labels=[label for _, _, label in args.points] or None,
        boxes=[list(box) for box in args.boxes] or None,
        vocabulary=args.words,
    )


def _thin(results: "Results", args: Namespace) -> "Results":
    """Apply --iou and --max."""
    if args.iou is not None:
        results = results.filter(nms="fast", nms_threshold=args.iou)
    return results[: args.max] if args.max else results


def _save(image: Image.Image, path: Path) -> None:
    write_whole(path, lambda temporary: image.save(temporary, format=_kind(path)))


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_cutouts(results: "Results", image: Image.Image, folder: Path) -> Iterator[Path]:
    from ovsam.results.formats.masks import cutouts

    for number, (one, cut) in enumerate(zip(results.filter(min_area=1), cutouts(results, image), strict=True), 1):
        label = "".join(letter if letter.isalnum() else "-" for letter in one.label)[:40]
        path = folder / f"{number:03}-{label}.png"
        _save(cut, path)
        yield path


def _check_question(args: Namespace) -> Vocabulary | None:
    """Return the text queries or the vocabulary, or None; raises InputError for an invalid question."""
    if not args.images:
        swallowed = [word for word in args.text + args.negative if os.path.isfile(word) or is_url(word)]
        if swallowed:
            raise InputError(f"--text took {swallowed[0]} for a text query; put the images before --text.")
        raise InputError("The following arguments are required: IMAGE; images come before the options.")
    args.text = [word for text in args.text for word in split_words(text) or [text]]
    args.negative = [word for text in args.negative for word in split_words(text) or [text]]
    text, prompts = bool(args.text or args.exemplars), bool(args.points or args.boxes)
    if text + prompts + args.everything == 0:
        raise InputError(
            "There is no question; give --text WORD..., --exemplar X1,Y1,X2,Y2, --point X,Y, --box X1,Y1,X2,Y2 or "
            "--everything."
        )
    if text + prompts + args.everything > 1:
        raise InputError(
            "--text, --point or --box, and --everything exclude each other; give one of them; "
            "--vocabulary sets the class names for points, boxes and everything."
        )
    for option in ("proposer", "tile", "exclusive", "max", "iou"):
        if prompts and getattr(args, option):
            raise InputError(f"--{option} needs --text or --everything.")
    if text and args.vocabulary:
        raise InputError("--text already gives the text queries; use --vocabulary with --point, --box or --everything.")
    if args.threshold is not None and prompts:
        raise InputError("--threshold needs --text or --everything; points and boxes always give a mask.")
    if args.objectness is not None and not args.everything:
        raise InputError("--objectness needs --everything; with --text, use --threshold.")
    if args.points and len(args.boxes) > 1:
        raise InputError("All points belong to one object; give at most one --box with --point.")
    if args.points and not args.boxes and not any(label for _, _, label in args.points):
        raise InputError("All points are beside the object (X,Y,0); at least one must be on it (X,Y,1).")
    if not args.text:
        if args.negative:
            raise InputError("--not needs --text; add the text queries to search for.")
        return Vocabulary(args.vocabulary) if args.vocabulary else None

    words = Vocabulary(args.text)
    excluded = Vocabulary(args.negative).prompts if args.negative else []
    for word in words.prompts + excluded:
        if (length := len(word.split())) > MAX_PHRASE:
            raise InputError(f"The phrase {word[:30]!r}... has {length} words; use at most {MAX_PHRASE}.")
    if both := set(words.prompts) & set(excluded):
        raise InputError(f"{min(both)!r} is in --text and in --not; remove it from one of them.")
    return words


def _check_output(args: Namespace, named: list[str]) -> None:
    """Raise InputError if -o does not fit --format and the number of images."""
    output, kind = args.output, args.format
    if not output:
        if kind not in ("overlay", "tsv"):
            raise InputError(f"--format {kind} needs -o, the output {'file' if FORMATS.get(kind) else 'folder'}.")
        return
    if kind == "tsv" or FORMATS.get(kind):
        check_target(output, "-o")
    elif kind != "overlay":
        if output == STDOUT:
            raise InputError(f"--format {kind} writes several files; name a folder with -o.")
        check_output_folder(output, "-o")
    elif _is_folder(output, named):
        check_output_folder(output, "-o")
    else:
        if output != STDOUT and _kind(output) is None:
            raise InputError(f"-o {output} is neither an image file such as out.png nor a folder such as {output}/.")
        check_target(output, "-o")
        if os.path.exists(output) and os.path.isfile(named[0]) and os.path.samefile(output, named[0]):
            raise InputError(f"-o {output} is the image itself; write the overlay to another file.")


def _is_folder(output: str, named: list[str]) -> bool:
    """Whether -o is a folder of overlays rather than the one overlay."""
    return output != STDOUT and (len(named) > 1 or output.endswith(("/", os.sep)) or os.path.isdir(output))


def _kind(output: str | os.PathLike[str]) -> str | None:
    """Return Pillow's format for the ending of a file; PNG for stdout and devices, which have none."""
    suffix = Path(output).suffix.lower()
    if os.fspath(output) == STDOUT or not suffix and os.path.exists(output) and not os.path.isfile(output):
        return "PNG"
    found = Image.registered_extensions().get(suffix)
    return found if found in Image.SAVE else None


def _names(args: Namespace) -> dict[str, Path]:
    """Return the path of the overlay, or of the folder of cut-outs, of each image."""
    if not args.output or args.format not in ("overlay", "cutouts"):
        return {}
    if args.format == "overlay" and not _is_folder(args.output, args.readable + ["another"] * bool(args.failed)):
        return {args.readable[0]: Path(args.output)}
    places, times = {}, Counter[str]()
    for name in args.readable:
        stem = "stdin" if name == STDOUT else Path(name).stem
        times[stem] += 1  # images of one name may be in several folders
        stem = f"{stem}-ovsam-{times[stem]}" if times[stem] > 1 else f"{stem}-ovsam"
        places[name] = Path(args.output) / (f"{stem}.png" if args.format == "overlay" else stem)
    return places


def _try_to_open(path: str, args: Namespace) -> Image.Image | None:
    """Open an image and check that points and boxes are inside it; if not, print the error on stderr and return
    None."""
    try:
        image = open_image(args.stdin if path == STDOUT else path)
        check_inside(image.size, [point[:2] for point in args.points], args.boxes + args.exemplars, path)
    except InputError as error:
        print(f"ovsam: error: {error}", file=sys.stderr)
        return None
    return image
