"""The command line `ovsam`: it only reads arguments here, so that help and mistakes are answered before torch loads."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

SEGMENT_EXAMPLES = """\
ask one question at a time:
  ovsam segment photo.jpg --text dog "red ball" -o found.png      where are these?
  ovsam segment photo.jpg --point 210,140 --vocabulary lvis       what is at this place?
  ovsam segment photo.jpg --box 40,60,300,280 --vocabulary my_words.txt
  ovsam segment *.jpg --everything --vocabulary coco -o overlays/ --json all.json

Coordinates are pixels from the top left corner. Pictures stand before the options.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ovsam: error: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 if something that was passed cannot work."""
    arguments = _build_parser().parse_args(_join_coordinates(sys.argv[1:] if argv is None else argv))
    try:
        from ovsam import commands
        from ovsam.errors import InputError

        try:
            run = {"segment": commands.segment, "eval": commands.evaluate, "train": commands.train}
            return run[arguments.command](arguments)
        except InputError as error:
            print(f"ovsam: error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ovsam", description="Open-vocabulary segmentation.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ovsam {_read_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    segment = commands.add_parser(
        "segment",
        help="find things in pictures by words, clicks, boxes or all at once",
        usage="ovsam segment IMAGE... (--text WORD... | --point X,Y | --box X1,Y1,X2,Y2 | --everything) [options]",
        description="Print what is found in each picture: label, score, mask score, box (x1,y1,x2,y2) and area.",
        epilog=SEGMENT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    segment.add_argument("images", metavar="IMAGE", nargs="+", help="a picture file")
    question = segment.add_argument_group("the question")
    question.add_argument("--text", metavar="WORD", nargs="+", action="extend", default=[], help="find these words")
    question.add_argument(
        "--not",
        metavar="WORD",
        nargs="+",
        action="extend",
        default=[],
        dest="negative",
        help="with --text: leave out what these words describe better",
    )
    question.add_argument(
        "--point",
        metavar="X,Y[,0|1]",
        type=_parse_point,
        action="append",
        default=[],
        dest="points",
        help="segment and name what was clicked; repeat it for more clicks on the same object, 1 on it, 0 beside it",
    )
    question.add_argument(
        "--box",
        metavar="X1,Y1,X2,Y2",
        type=_parse_box,
        action="append",
        default=[],
        dest="boxes",
        help="segment and name what is in the box; repeat it for more objects; clicks correct a single one",
    )
    question.add_argument("--everything", action="store_true", help="segment and name all there is")
    question.add_argument(
        "--vocabulary",
        metavar="NAME|FILE",
        help="the names to choose from: coco, lvis, imagenet21k or a file with one word a line "
        "(default: the model's own)",
    )
    question.add_argument(
        "--threshold",
        metavar="SCORE",
        type=_parse_share,
        help="with --text or --everything: the least score, 0 to 1 (default: the model's own)",
    )
    model = segment.add_argument_group("the model")
    model.add_argument("--model", metavar="PRESET|PATH|ID", default="auto", help="default: auto")
    model.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: a GPU if there is one)")
    output = segment.add_argument_group("the output")
    output.add_argument(
        "-o",
        "--output",
        metavar="OUT.png",
        help="draw masks and names over the picture; a folder takes NAME-ovsam.png of each of several pictures",
    )
    output.add_argument("--json", metavar="OUT.json", help="write all pictures as one COCO data set")

    evaluate = commands.add_parser("eval", help="measure a model on a frozen test set", allow_abbrev=False)
    evaluate.add_argument("--model", metavar="PRESET|PATH|ID", default="ovsam-tiny", help="default: %(default)s")
    evaluate.add_argument("--data", metavar="DIR", default="tests/data/emojiscenes-val", help="default: %(default)s")
    evaluate.add_argument("--json", metavar="OUT.json", help="write the figures there as well")
    evaluate.add_argument("--limit", metavar="N", type=_parse_count, help="only the first N pictures")

    train = commands.add_parser("train", help="train what a recipe describes", allow_abbrev=False)
    train.add_argument("recipe", metavar="RECIPE", help="a recipe file, such as adapters/NAME/recipe.toml")
    train.add_argument("--output", metavar="DIR", help="where the result goes (default: what the recipe says)")
    train.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    train.add_argument("--steps", metavar="N", type=_parse_count, help="instead of the recipe's number of steps")
    train.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")
    return parser


def _read_version() -> str:
    try:
        return metadata.version("ovsam")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _join_coordinates(argv: Sequence[str]) -> list[str]:
    """Write `--point -5,3` as `--point=-5,3`, which argparse would otherwise take for an option -5."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--point", "--box"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _parse_point(text: str) -> tuple[float, float, int]:
    try:
        x, y, *label = text.split(",")
        if label not in ([], ["0"], ["1"]):
            raise ValueError
        return float(x), float(y), int(label[0]) if label else 1
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y or X,Y,1 (on the object) or X,Y,0 (beside it)") from None


def _parse_box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X1,Y1,X2,Y2 (left, top, right, bottom)") from None
    return x1, y1, x2, y2


def _parse_share(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def _parse_count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


if __name__ == "__main__":
    sys.exit(main())
