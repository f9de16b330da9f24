"""The fuzz suite: what it counts, and how long it runs.

`pytest tests/fuzz` tries a fixed set of inputs in about a minute; `pytest tests/fuzz --long` a hundred times as
many, and `--long=N` N times, other ones at every run. An input is right if the call returns or raises InputError.
"""

import contextlib
import math
import signal
import sys
import time
import traceback
from collections import Counter

from hypothesis import HealthCheck, Phase, settings

from ovsam.errors import InputError

HANG = 60  # seconds
LONG = 100  # times as many inputs with --long
COUNTS: Counter[str] = Counter()
FAILURES: dict[tuple, str] = {}  # kind, type of the error and line -> traceback of the first
SLOWEST = [0.0]
TIMES = next((int(a.partition("=")[2] or LONG) for a in sys.argv if a == "--long" or a.startswith("--long=")), 0)


def examples(count: int) -> settings:
    """Settings of a test that tries `count` inputs, the same at every run unless it is a long one."""
    return settings(
        max_examples=count * max(TIMES, 1),
        derandomize=not TIMES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class NotAScore(Exception):
    """A score that is no number from 0 to 1."""


class Hang(BaseException):
    """A call that takes longer than HANG; no handler of the library catches it."""


def _fails(kind: str, error: BaseException) -> None:
    COUNTS[kind] += 1
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "/ovsam/" in f.filename), frames[-1])
    FAILURES.setdefault((kind, type(error), last.filename, last.lineno), "".join(traceback.format_exception(error)))


@contextlib.contextmanager
def counted(kind: str):
    """Count the call inside; what is no InputError is a failure."""
    COUNTS[kind] += 1
    COUNTS["inputs"] += 1
    start = time.perf_counter()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(HANG)
    try:
        yield
    except InputError as error:
        COUNTS["refused"] += 1
        if "\n" in str(error) or not str(error).strip():
            _fails("not one sentence", error)
    except NotAScore as error:
        _fails("NaN scores", error)
    except Hang as error:
        _fails("hangs", error)
    except Exception as error:
        _fails("other exceptions", error)
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        SLOWEST[0] = max(SLOWEST[0], time.perf_counter() - start)


def _hang(*_):
    raise Hang


def look_at(results) -> None:
    """Scores of results must be numbers from 0 to 1."""
    for one in results:
        if not (0 <= one.score <= 1 and 0 <= one.mask_score <= 1) or math.isnan(one.score):
            raise NotAScore(f"the score of {one.label!r} is {one.score}, that of its mask {one.mask_score}")
