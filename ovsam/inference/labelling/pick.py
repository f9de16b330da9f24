"""Which images are most worth correcting by hand."""

import heapq
from collections.abc import Callable, Iterable
from pathlib import Path

from ovsam.ops.files import write_whole
from ovsam.results.formats.base import Labelled


def expected_errors(result: Labelled) -> float:
    """How many labels of an image are expected to be wrong: the sum of 1 - score, if scores are calibrated
    probabilities (expected error, Roy and McCallum 2001). A correction of such an image mends the most labels."""
    return sum(1 - instance.score for instance in result)


def pick(results: Iterable[Labelled], count: int) -> list[tuple[str, float]]:
    """The file names of the images with the most expected errors, and these, highest first; images in which nothing was
    found have none."""
    rated = ((-expected_errors(result), result.file_name or "") for result in results)
    return [(name, -errors) for errors, name in heapq.nsmallest(count, (one for one in rated if one[0]))]


def write_pick(results: Iterable[Labelled], path: Path, count: int, locate: Callable[[str], str]) -> list[str]:
    """Write the locations of the images that `pick` chooses, one a line, which `ovsam label` and others read as a list;
    returns them."""
    chosen = [locate(name) for name, _ in pick(results, count)]
    write_whole(path, lambda temporary: temporary.write_text("".join(f"{one}\n" for one in chosen), encoding="utf-8"))
    return chosen
