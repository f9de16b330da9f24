"""Files of other people, decoded and checked in one step against a type (with msgspec).

A schema is a TypedDict or a msgspec.Struct. Keys that a TypedDict does not list are dropped. Invalid content raises
`InputError` with one sentence that names the place: "The value annotations[3].segmentation of a.json is a whole number;
it must be a list, a table or null."
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ovsam.errors import InputError

Side = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]  # a width or height in pixels
Pixels = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]  # the same; 0 stands for a missing one
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Coordinate = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]  # nor is NaN within these
Point = Annotated[list[Coordinate], msgspec.Meta(min_length=2, max_length=2)]
NAMES = {
    "object": "a table of keys and values",
    "array": "a list",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}


def read_json(path: str | os.PathLike[str], schema: Any = Any, title: str = "file") -> Any:
    """Return the content of a JSON file as `schema`.

    title: the kind of file, for messages about a missing one.

    Raises:
        InputError: the file is missing, unreadable, not JSON, or its content does not match the schema.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"The path of a {title} must be a string or a Path; got {type(path).__name__}.")
    if not os.path.isfile(path):  # nor are pipes and devices opened, which would block
        raise InputError(f"There is no {title} at {path}; check the path.")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    with _sentences(str(path)):
        try:
            return _decoder(schema)(content)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # json is more lenient: NaN, a byte order mark, UTF-16
            return msgspec.convert(json.loads(content), schema)


def read_text(path: str | os.PathLike[str], title: str = "file") -> str:
    """Return a text file; raises InputError if it is missing, unreadable or not UTF-8."""
    if not os.path.isfile(path):
        raise InputError(f"There is no {title} at {path}; check the path.")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error}.") from error


def checked(content: Any, schema: Any, source: str, where: str = "", texts: bool = False) -> Any:
    """Return content that has already been decoded as `schema`.

    Args:
        source: name of the file, for messages.
        where: place of the content in the file, for messages.
        texts: whether numbers may be written as text, as in XML.
    """
    with _sentences(source, where):
        return msgspec.convert(content, schema, strict=not texts)


def place(where: str, source: str | os.PathLike[str]) -> str:
    """The subject of a message: a value of a file, such as annotations[3].segmentation."""
    name = os.fspath(source)
    return f"The value {where} of {name[:1].lower() + name[1:] if name.startswith(('The ', 'A ')) else name}"


@functools.cache
def _decoder(schema: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(schema).decode


@contextlib.contextmanager
def _sentences(source: str, where: str = "") -> Iterator[None]:
    """Turn errors of decoding into InputError with one sentence."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise InputError(_sentence(str(error), source, where)) from error
    except RecursionError as error:
        raise InputError(f"{source} is not valid: it is nested too deeply.") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(f"{source} is not a JSON file: {error}.") from error


def _sentence(message: str, source: str, root: str = "") -> str:
    """Rewrite a message of msgspec, such as "Expected `float`, got `str` - at `$.annotations[3].area`"."""
    problem, _, path = message.partition(" - at ")
    where = (root + path.strip("`").removeprefix("$").replace("[...]", "")).removeprefix(".")
    whole = source[:1].upper() + source[1:] if source.startswith(("the ", "a ")) else source
    subject = place(where, source) if where else whole
    if match := re.fullmatch(r"Expected `([^`]+)`, got `([^`]+)`", problem):
        *others, last = [NAMES.get(name, name) for name in match[1].split(" | ")]
        wanted = f"{', '.join(others)} or {last}" if others else last
        return f"{subject} is {NAMES.get(match[2], match[2])}; it must be {wanted}."
    if match := re.fullmatch(r"Object missing required field `([^`]+)`", problem):
        return f"{subject} lacks {match[1]}."
    if match := re.fullmatch(r"Object contains unknown field `([^`]+)`", problem):
        return f"{subject} has {match[1]}, which is not a key of it."
    if match := re.fullmatch(r"Expected `(\w+)` (.+)", problem):
        return f"{subject} must be {NAMES.get(match[1], match[1])} {match[2]}."
    return f"{subject} is invalid: {problem}."
