"""Arguments and argument types that several commands share; errors state the right form."""

import argparse
import math
import os
import re
from collections.abc import Callable
from typing import Any

from ovsam.errors import InputError
from ovsam.inference.loading import check_model
from ovsam.inference.options import check_proposer_name, is_absent
from ovsam.processing.arguments import MIN_TILE
from ovsam.results.formats.coco_tables import check_tables

DEVICES = "cpu|cuda|mps|xpu|hpu|mtia|npu|xla"


def checked(check: Callable[[str], Any]) -> Callable[[str], str]:
    """Return an argument type that accepts the texts for which `check` raises no InputError."""

    def parse(text: str) -> str:
        try:
            check(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return text

    return parse


def check_proposer(text: str) -> None:
    """Raise InputError for a name that no proposer has, and for a model that is not here and cannot be downloaded."""
    _, _, model_id = check_proposer_name(text).partition(":")
    if model_id:
        from ovsam.checkpoints.download import check_in_reach

        check_in_reach(model_id)


def device(text: str) -> str:
    """The name of a device; whether it is here is checked by torch, where that is not certain without it."""
    if not (match := re.fullmatch(rf"({DEVICES})(:\d{{1,3}})?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device, such as cpu, cuda or cuda:1")
    if is_absent(match[1]):
        raise argparse.ArgumentTypeError(f"The device {text!r} cannot be used here; `cpu` always works")
    return text


def point(text: str) -> tuple[float, float, int]:
    """`X,Y` or `X,Y,LABEL` -> x, y and the label: 1 on the object, 0 beside it."""
    try:
        x, y, *label = text.split(",")
        if label not in ([], ["0"], ["1"]):
            raise ValueError
        if not (math.isfinite(float(x)) and math.isfinite(float(y))):
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
    if not (x1 < x2 and y1 < y2):  # also for NaN
        raise argparse.ArgumentTypeError(
            f"The box {text} is reversed or empty; it must be left,top,right,bottom, with left < right and top < bottom"
        )
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
    if re.fullmatch(r"\d{1,9}", text) and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def tile(text: str) -> int:
    side = count(text)
    if side < MIN_TILE:
        raise argparse.ArgumentTypeError(f"{text} is too small; take {MIN_TILE} pixels or more")
    return side


def check_dataset(path: str, images: str | None, videos: bool = False) -> None:
    """Raise InputError unless a data set is a JSON file, or a folder with annotations.json, with the tables of COCO
    (`videos`: any folder or JSON file)."""
    inside = os.path.join(path, "annotations.json") if os.path.isdir(path) else path
    if not os.path.isfile(inside) and not (videos and os.path.isdir(path)):
        raise InputError(f"There is no data set {path}; name a JSON file, or a folder with annotations.json.")
    if images and not os.path.isdir(images):
        raise InputError(f"There is no folder {images}; --images must be the folder of the images.")
    if not videos:
        check_tables(inside, images)


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
        "type": checked(check_proposer),
        "help": "proposer: concepts, clip-dense, grid, detector:ID or sam3:ID (default: the model's own)",
    },
    "--tile": {
        "metavar": "PIXELS",
        "type": tile,
        "help": "also search overlapping tiles of this side, for small objects in large images",
    },
    "--exclusive": {"action": "store_true", "help": "assign each pixel to one instance only"},
    "--refine": {
        "action": argparse.BooleanOptionalAction,
        "help": "refine the masks of the ConceptHead by the mask decoder, which is slower (default: that of the model)",
    },
    "--model": {
        "metavar": "PRESET|PATH|ID",
        "type": checked(check_model),
        "default": "auto",
        "help": "default: %(default)s",
    },
    "--device": {"type": device, "help": "such as cpu, cuda or cuda:1 (default: a GPU if there is one)"},
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
