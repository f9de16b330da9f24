"""Arguments and argument types that several commands share; errors state the right form."""

import argparse
from typing import Any

from ovsam.errors import InputError


def point(text: str) -> tuple[float, float, int]:
    """`X,Y` or `X,Y,LABEL` -> x, y and the label: 1 on the object, 0 beside it."""
    try:
        x, y, *label = text.split(",")
        if label not in ([], ["0"], ["1"]):
            raise ValueError
        return float(x), float(y), int(label[0]) if label else 1
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y or X,Y,1 (on the object) or X,Y,0 (beside it)") from None


def box(text: str) -> tuple[float, float, float, float]:
    """`X1,Y1,X2,Y2` -> left, top, right, bottom."""
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X1,Y1,X2,Y2 (left, top, right, bottom)") from None
    return x1, y1, x2, y2


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def count(text: str) -> int:
    """A whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


WORDS: dict[str, Any] = {"metavar": "WORD", "nargs": "+", "action": "extend", "default": []}
SHARED: dict[str, dict[str, Any]] = {
    "--text": WORDS | {"help": "text queries to search for"},
    "--not": WORDS
    | {"dest": "negative", "help": "with --text: drop instances that match these negative queries better"},
    "--point": {"metavar": "X,Y[,0|1]", "type": point, "action": "append", "default": [], "dest": "points"},
    "--box": {"metavar": "X1,Y1,X2,Y2", "type": box, "action": "append", "default": [], "dest": "boxes"},
    "--everything": {"action": "store_true", "help": "segment and classify all objects"},
    "--vocabulary": {
        "metavar": "NAME|FILE",
        "help": "class names: coco, lvis, imagenet21k or a file with one a line (default: the model's own)",
    },
    "--threshold": {"metavar": "SCORE", "type": share, "help": "lowest score, 0 to 1 (default: the model's own)"},
    "--objectness": {
        "metavar": "SHARE",
        "type": share,
        "help": "with --everything: lowest objectness, 0 to 1 (default: the model's own)",
    },
    "--proposer": {
        "metavar": "NAME",
        "help": "proposer: concepts, clip-dense, grid, detector:ID or sam3:ID (default: the model's own)",
    },
    "--tile": {
        "metavar": "PIXELS",
        "type": count,
        "help": "also search overlapping tiles of this side, for small objects in large images",
    },
    "--exclusive": {"action": "store_true", "help": "assign each pixel to one instance only"},
    "--refine": {
        "action": argparse.BooleanOptionalAction,
        "help": "refine the masks of the ConceptHead by the mask decoder, which is slower (default: that of the model)",
    },
    "--model": {"metavar": "PRESET|PATH|ID", "default": "auto", "help": "default: %(default)s"},
    "--device": {"help": "such as cpu, cuda or cuda:1 (default: a GPU if there is one)"},
    "--tracker": {
        "choices": ("auto", "memory", "propagation"),
        "default": "auto",
        "help": "kind of tracker (default: auto)",
    },
}


def add(parser: argparse._ActionsContainer, *options: str, **changes: Any) -> None:
    """Add options of `SHARED` to a parser or a group of it; `changes` replace keywords of `add_argument`."""
    for option in options:
        parser.add_argument(option, **SHARED[option] | changes)


def add_address(parser, port: int) -> None:
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="default: %(default)s, this machine only"
    )
    parser.add_argument("--port", metavar="N", type=count, default=port, help="default: %(default)s")


def check_port(port: int) -> None:
    if port > 65535:
        raise InputError(f"The port {port} does not exist; it must be a number from 1 to 65535.")
