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
        from ovsam.errors import InputError
        from ovsam_cli import commands

        try:
            run = {
                "segment": commands.segment,
                "eval": commands.evaluate,
                "train": commands.train,
                "compare": commands.compare,
                "convert": commands.convert,
                "models": commands.models,
                "compose": commands.compose,
                "push": commands.push,
                "demo": commands.demo,
            }
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
        help="with --text or --everything: minimum score, 0 to 1 (default: the model's own with --text, none with "
        "--everything)",
    )
    question.add_argument(
        "--objectness",
        metavar="SHARE",
        type=_parse_share,
        help="with --everything: minimum objectness, 0 to 1 (default: the model's own)",
    )
    search = segment.add_argument_group("how to look, with --text or --everything")
    search.add_argument(
        "--proposer",
        metavar="NAME",
        help="where to look: concepts, clip-dense, grid, detector:ID or sam3:ID (default: the model's own way)",
    )
    search.add_argument(
        "--tile",
        metavar="PIXELS",
        type=_parse_count,
        help="look through overlapping tiles of this side as well, for small things in large pictures",
    )
    search.add_argument("--exclusive", action="store_true", help="give each pixel to one thing only")
    search.add_argument(
        "--no-refine", action="store_false", dest="refine", help="keep the quick masks, unrefined by the SAM decoder"
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
    evaluate.add_argument("--data", metavar="DIR", help="default: both frozen sets of tests/data")
    evaluate.add_argument("--json", metavar="OUT.json", help="write the figures there as well")
    evaluate.add_argument("--limit", metavar="N", type=_parse_count, help="only the first N pictures")

    commands.add_parser(
        "models", help="list the presets: parts, licences, size, and whether they are here", allow_abbrev=False
    )

    compose = commands.add_parser(
        "compose",
        help="make a whole model of a SAM, a CLIP and adapters",
        description="Each part is a folder, or a Hub id ORG/NAME or ORG/NAME@REVISION, also of a whole OVSam model "
        "(see docs/compose.md).",
        allow_abbrev=False,
    )
    compose.add_argument("--sam", metavar="PART", required=True, help="such as facebook/sam2.1-hiera-small")
    compose.add_argument("--clip", metavar="PART", required=True, help="such as google/owlv2-base-patch16-ensemble")
    compose.add_argument("--clip2sam", metavar="PART", help="an adapter that names prompted masks")
    compose.add_argument("--sam2clip", metavar="PART", help="an adapter that stands in for SAM's image encoder")
    compose.add_argument("--concepts", metavar="PART", help="an adapter that finds words and everything")
    compose.add_argument(
        "--composition",
        choices=["dual", "clip", "sam"],
        help="where image features come from (default: clip with --sam2clip, else dual, which is both encoders)",
    )
    compose.add_argument("-o", "--output", metavar="DIR", required=True, help="a folder that is new or empty")

    convert = commands.add_parser(
        "convert",
        help="make a checkpoint in its authors' layout a folder that transformers loads",
        description="Convert an official checkpoint of SAM, SAM 2, EdgeTAM or EfficientTAM (see docs/conversions.md).",
        allow_abbrev=False,
    )
    convert.add_argument("source", metavar="SOURCE", help="a .pt or .pth file, or the same tensors as .safetensors")
    convert.add_argument("-o", "--output", metavar="DIR", required=True, help="a folder that is new or empty")
    convert.add_argument("--kind", metavar="KIND", help="what SOURCE is (default: found from its tensors)")
    convert.add_argument(
        "--image-size",
        metavar="N",
        type=_parse_count,
        help="side of the images it was trained on, where that is not 1024 and its tensors do not tell",
    )

    compare = commands.add_parser(
        "compare", help="see whether a tuned model beats its base on a data set", allow_abbrev=False
    )
    compare.add_argument("base", metavar="BASE", help="a preset, a folder or a Hub id")
    compare.add_argument("tuned", metavar="TUNED", help="likewise; what `ovsam train` wrote, for one")
    compare.add_argument("--data", metavar="COCO.json", required=True, help="the annotations")
    compare.add_argument("--images", metavar="DIR", help="the folder of the pictures (default: that of the json)")
    compare.add_argument("--json", metavar="OUT.json", help="write the figures of both there as well")
    compare.add_argument("--limit", metavar="N", type=_parse_count, help="only the first N pictures")
    compare.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")

    push = commands.add_parser(
        "push",
        help="publish a model or an adapter on the Hugging Face Hub",
        description="Load the folder back in a clean process, compare its outputs, and only then upload it "
        "(see docs/publishing.md).",
        allow_abbrev=False,
    )
    push.add_argument("folder", metavar="DIR", help="what save_pretrained or `ovsam train` wrote")
    push.add_argument("repo", metavar="ORG/NAME", help="the repository; made if there is none")
    push.add_argument("--private", action="store_true", help="only for those who have access to the repository")
    push.add_argument("--revision", metavar="REV", help="a branch; made if there is none")
    push.add_argument("--create-pr", action="store_true", help="as a pull request")
    push.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")

    demo = commands.add_parser("demo", help="open the demo in a browser", allow_abbrev=False)
    demo.add_argument("--model", metavar="PRESET|PATH|ID", default="auto", help="default: auto")
    demo.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="default: %(default)s, this machine only")
    demo.add_argument("--port", metavar="N", type=_parse_count, default=7860, help="default: %(default)s")
    demo.add_argument("--share", action="store_true", help="also at a public address that Gradio lends")

    train = commands.add_parser("train", help="train what a recipe describes", allow_abbrev=False)
    train.add_argument("recipe", metavar="RECIPE", help="a recipe file, such as adapters/NAME/recipe.toml")
    train.add_argument("--data", metavar="COCO.json", help="instead of the recipe's data; goes with --images")
    train.add_argument("--images", metavar="DIR", help="the folder of the pictures of --data")
    train.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="instead of the recipe's, such as model.sam=facebook/sam2.1-hiera-large; may be repeated",
    )
    train.add_argument("--output", metavar="DIR", help="where the result goes (default: runs/ and the recipe's folder)")
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
