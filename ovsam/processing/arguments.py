"""Checks of user input, which bring it into one form before a model runs.

The Segmenter, the processor, `Results`, the demo and the command line share these checks. Invalid input raises
`InputError` with one sentence. Arrays and tensors are accepted in place of lists.
"""

import contextlib
import difflib
import math
import numbers
import os
from collections.abc import Collection, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

import numpy as np

from ovsam.errors import InputError, one_line

MIN_TILE = 64  # px; smaller tiles show too little, and are very many

# Names of arguments in other libraries -> ours.
HABITS = {
    "conf": "threshold",
    "confidence": "threshold",
    "score": "threshold",
    "score_threshold": "threshold",
    "box_threshold": "threshold",
    "iou": "nms",
    "text": "words",
    "prompts": "words",
    "classes": "words",
    "candidate_labels": "words",
    "point": "points",
    "input_points": "points",
    "point_coords": "points",
    "point_labels": "labels",
    "input_labels": "labels",
    "box": "boxes",
    "bboxes": "boxes",
    "input_boxes": "boxes",
    "mask": "masks",
    "names": "vocabulary",
}


def no_others(call: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise InputError for unknown keywords; the message suggests the closest known one."""
    for name in given:
        meant = HABITS.get(name) if HABITS.get(name) in known else None
        close = [meant] if meant else difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}."
        raise InputError(f"{call} takes no argument {name!r}; {hint}")


def number(name: str, value: Any, low: float, high: float, inside: bool = False) -> float:
    """A real number from `low` to `high`; `inside`: both limits excluded."""
    if is_number(value):
        found = float(value)
        if low < found < high if inside else low <= found <= high:
            return found
    between = f"between {low:g} and {high:g}" if high < math.inf else f"a number of {low:g} or more"
    raise InputError(f"The {name} is {short(value)}; it must be {between}.")


def optional(check, name: str, value: Any, *how, **named):
    """Return the checked value, or None for None."""
    return None if value is None else check(name, value, *how, **named)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number of at least `least` and at most `most`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_) and int(value) >= least:
        if most is None or int(value) <= most:
            return int(value)
    limit = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise InputError(f"The {name} is {short(value)}; it must be a whole number {limit}.")


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InputError(f"The argument {name} is {short(value)}; it must be True or False.")


def optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else flag(name, value)


def choice(name: str, value: Any, options: Collection[str]) -> str:
    if isinstance(value, str) and value in options:
        return value
    close = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(options)}."
    raise InputError(f"There is no {name} {short(value)}; {hint}")


def path(name: str, value: Any) -> str:
    """The path of a file or a folder, which need not exist."""
    if isinstance(value, str | os.PathLike):
        with contextlib.suppress(TypeError):  # a PathLike without a path
            return os.fsdecode(value)
    raise InputError(f"The {name} is {short(value)}; it must be the path of a file or a folder.")


def strings(name: str, value: Any) -> list[str]:
    """A list of strings, or one; None means none."""
    given = [value] if isinstance(value, str) else plain(value)
    listable = is_stream(given) or isinstance(given, Set | KeysView | ValuesView)
    given = [] if given is None else list(given) if listable else given
    if not is_sequence(given) or not all(isinstance(one, str) for one in given):
        raise InputError(f"The {name} are {short(value)}; they must be a list of strings.")
    return list(given)


def whole_numbers(name: str, value: Any) -> list[int]:
    """A list or a set of whole numbers; None means none."""
    given = plain(value)
    given = [] if given is None else list(given) if isinstance(given, Set) else given
    if not is_sequence(given) or not all(isinstance(one, numbers.Integral) for one in given):
        raise InputError(f"The {name} are {short(value)}; they must be a list of whole numbers.")
    return [int(one) for one in given]


def points(value: Any, name: str = "points") -> list[list[float]]:
    """Points [[x, y], ...], or one, [x, y]."""
    return rows(name, value, 2, "[x, y] in pixels, or a list of these")


def boxes(value: Any, name: str = "boxes") -> list[list[float]]:
    """Boxes [[x1, y1, x2, y2], ...], or one, [x1, y1, x2, y2]."""
    return rows(name, value, 4, "[x1, y1, x2, y2] in pixels (left, top, right, bottom), or a list of these")


def rows(name: str, value: Any, width: int, form: str) -> list[list[float]]:
    """Rows of `width` finite numbers, or one row; None means no rows."""
    if value is None:
        return []
    given = plain(value)
    if is_sequence(given) and len(given) and all(is_number(one) for one in given):
        given = [given]
    if not is_sequence(given):
        raise InputError(f"The {name} are {short(value)}; they must be {form}.")
    found = []
    for row in given:
        row = plain(row)
        if not is_sequence(row) or len(row) != width or not all(is_number(one) and math.isfinite(one) for one in row):
            raise InputError(f"The {name} hold {short(row)}; each must be {width} numbers: {form}.")
        found.append([float(one) for one in row])
    return found


def point_labels(value: Any, count: int) -> list[int]:
    """One label for each point: 1 on the object, 0 beside it; one number for a single point. None: all are 1."""
    if value is None:
        return [1] * count
    given = plain(value)
    given = [given] if is_number(given) else given
    if not is_sequence(given) or not all(is_number(one) and one in (0, 1) for one in given):
        raise InputError(f"The labels are {short(value)}; each is 1 (on the object) or 0 (beside it).")
    if len(given) != count:
        raise InputError(f"There are {len(given)} labels for {count} points; each point takes one.")
    return [int(one) for one in given]


def masks(value: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """Masks [n, H, W], or one, [H, W], over an image of `size` (height, width): bool, zeros and ones (or 255) as
    integers, which become bool, or logits as floats."""
    try:
        array = np.asarray(to_numpy(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The masks are {short(value)}; they must be an array [n, H, W] of bool.") from error
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.dtype.kind not in "buif":
        raise InputError(
            f"The masks are {list(array.shape)} of {array.dtype}; they must be [n, H, W] of bool, one for each object."
        )
    if size is not None and array.shape[1:] != tuple(size):
        (height, width), (h, w) = size, array.shape[1:]
        raise InputError(f"The masks are {w}x{h} pixels and the image is {width}x{height}; they must be of one size.")
    if array.dtype.kind in "ui":
        if not np.isin(array, (0, 1)).all() and not np.isin(array, (0, 255)).all():
            raise InputError("The masks are integers other than 0 and 1; they must be bool.")
        return array.astype(bool)
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("The masks hold NaN or infinite values; they must be bool, or finite logits.")
        if low >= 0 and high <= 1:
            raise InputError("The masks are floats from 0 to 1; pass `masks > 0.5`, since floats are read as logits.")
        return array.astype(np.float32)
    return array


def plain_masks(value: Any) -> np.ndarray:
    """Masks [n, H, W] of any numbers as an array; 0 is background."""
    try:
        array = np.asarray(to_numpy(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"The masks are {short(value)}; they must be an array [n, H, W].") from error
    if array.ndim != 3 or array.dtype.kind not in "buif":
        raise InputError(f"The masks are {list(array.shape)} of {array.dtype}; they must be [n, H, W].")
    return array


def column(name: str, values: Any, count: int, kind: type | None = None) -> None:
    """Raise InputError unless there are `count` values of a kind; None stands for finite numbers."""
    found = plain(values)
    if not is_sequence(found) or len(found) != count:
        raise InputError(f"The {name} are {short(values)}; they must be {count}, one for each mask.")
    for value in found:
        if not (isinstance(value, kind) if kind else is_number(plain(value)) and math.isfinite(plain(value))):
            raise InputError(f"The {name} hold {short(value)}; each must be a {'string' if kind else 'finite number'}.")


def check_inside(
    size: tuple[int, int], points: Sequence[Sequence[float]] = (), boxes: Sequence = (), image: str = "the image"
) -> None:
    """Raise InputError unless points and boxes lie inside an image of `size` (width, height)."""
    width, height = size
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"The point {x:g},{y:g} is outside {image}, which is {width}x{height} pixels.")
    for x1, y1, x2, y2 in boxes:
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise InputError(
                f"The box {x1:g},{y1:g},{x2:g},{y2:g} is not inside {image}, which is "
                f"{width}x{height} pixels; it must be left,top,right,bottom."
            )


def prompts(name: str, value: Any, depth: int, width: int | None, form: str) -> Any:
    """Prompts per image as transformers' processors take them, as nested lists: `depth` levels of lists around rows of
    `width` finite numbers (None: plain numbers). None in place of the list of an image means no prompt.

    Levels may be left out: that of the objects, as in SAM's processor, and those of one image.
    """
    if value is None:
        return None
    value = _nested(plain(value), depth + (width is not None), between=depth == 3)

    def look(level: Any, left: int) -> Any:
        level = plain(level)
        if level is None and left == depth - 1:
            return []
        if left == 0 and width is None:
            if is_number(level) and math.isfinite(level):
                return level
        elif left == 0:
            if is_sequence(level) and len(level) == width and all(is_number(n) and math.isfinite(n) for n in level):
                return [float(one) for one in level]
        elif is_sequence(level):
            return [look(one, left - 1) for one in level]
        raise InputError(f"The {name} hold {short(level)}; they must be {form}.")

    return look(value, depth)


def _nested(value: Any, levels: int, between: bool) -> Any:
    """Lists with the levels that are missing above their numbers; `between`: the first one is that of the objects,
    inside of each image."""
    first, found = value, 0
    while is_sequence(first):
        found += 1
        first = next((one for one in map(plain, first) if one is not None and not (is_sequence(one) and not one)), None)
    if not is_number(first) or found >= levels:
        return value
    if between and found == levels - 1:
        return [None if row is None else [row] for row in value]
    for _ in range(levels - found):
        value = [value]
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a real number that fits into a float and not a bool; NaN and infinity are numbers."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
        return False
    try:
        float(value)
    except (OverflowError, TypeError, ValueError):
        return False
    return True


def is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def length(value: Any) -> int | None:
    """The length of a list, an array or a tensor; None for anything else."""
    listed = getattr(value, "ndim", 0) > 0 if is_tensor(value) or isinstance(value, np.ndarray) else is_sequence(value)
    return len(value) if listed else None


def is_stream(value: Any) -> bool:
    """Whether a value is a generator or another iterator, but not an open file."""
    return isinstance(value, Iterator) and not hasattr(value, "read")


def plain(value: Any) -> Any:
    """Arrays and tensors as nested lists of numbers; other values unchanged."""
    value = to_numpy(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def short(value: Any) -> str:
    """A value in the short form of messages."""
    if isinstance(value, np.ndarray) or is_tensor(value):
        return f"an array of shape {list(value.shape)}"
    try:
        text = repr(value).replace("\n", " ")
    except Exception:  # a class of the user, or too deeply nested
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of torch, recognised without importing torch."""
    return hasattr(value, "detach") and hasattr(value, "numpy")


def to_numpy(value: Any) -> Any:
    """A tensor as an array; other values unchanged. Raises InputError for a tensor that no array can hold."""
    if not is_tensor(value):
        return value
    try:
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    except (TypeError, RuntimeError, AttributeError) as error:  # on the device meta, sparse, quantised
        raise InputError(
            f"The tensor of shape {list(value.shape)} cannot be read ({one_line(error)}); pass a dense one."
        ) from error
