"""Arguments of functions and constructors."""

import inspect
from collections.abc import Callable, Iterable


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
