"""Argument types that several commands share; errors state the right form."""

import argparse


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


def add_device(parser) -> None:
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: a GPU if there is one)")
