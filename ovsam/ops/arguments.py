"""Arguments of functions and constructors."""

import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ovsam.ops.schema import checked


def accepted_arguments(chain: Iterable[Callable]) -> dict[str, inspect.Parameter]:
    """The parameters by name that the first of a chain takes by name, and, as far as each passes `**others` on, those
    of the next. For a class the chain is `cls.__mro__`."""
    accepted: dict[str, inspect.Parameter] = {}
    for link in chain:
        own = inspect.signature(link).parameters
        accepted = dict(own) | accepted
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return {n: p for n, p in accepted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_arguments(given: Mapping[str, Any], chain: Iterable[Callable], source: str) -> None:
    """Raise InputError for values of a file that have another type than the annotations of these parameters (see
    `accepted_arguments`), and for numbers that are not finite; `source` names the table in messages."""
    hints: dict[str, Any] = {}
    for link in chain:
        function: Any = vars(link).get("__init__", object.__init__) if isinstance(link, type) else link
        hints = typing.get_type_hints(function) | hints
    for name, value in given.items():
        kind = _plain(hints.get(name, Any))
        if kind is not Any and not isinstance(value, os.PathLike):
            checked(value, kind, source, name)


def _plain(hint: Any) -> Any:
    """The type of a value of a TOML file for an annotation: Any for a class that no file holds."""
    parts = typing.get_args(hint)
    if hint in (str, bool, type(None)):
        return hint
    if hint is Path:
        return str
    if hint is int:
        return Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
    if hint is float:
        return Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        found = [_plain(part) for part in parts]
        return Any if Any in found else typing.Union[tuple(found)]  # noqa: UP007, of a computed tuple
    origin = typing.get_origin(hint)
    if origin in (list, tuple, dict) or isinstance(origin, type) and issubclass(origin, typing.Collection):
        found = [part if part is ... else _plain(part) for part in parts]
        return dict if origin in (dict, Mapping) else tuple[*found] if origin is tuple else list[found[0]]
    return Any
