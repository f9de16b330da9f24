"""Selection of images for manual correction."""

import heapq
from collections.abc import Callable, Iterable
from pathlib import Path

from ovsam.ops.files import write_whole
from ovsam.results.formats.base import Labelled


def expected_errors(result: Labelled) -> float:
    """Expected number of wrong labels of an image: the sum of 1 - score, if scores are calibrated probabilities
    (expected error, Roy and McCallum 2001). Correcting the images with the highest numbers corrects the most labels."""
    return sum(1 - instance.score for instance in result)


def pick(results: Iterable[Labelled], count: int) -> list[tuple[str, float]]:
    """Return the file names of the images with the highest numbers of expected errors, and these numbers, highest
    first; 0 for images without instances."""
    rated = ((-expected_errors(result), result.file_name or "") for result in results)
    return [(name, -errors) for errors, name in heapq.nsmallest(count, (one for one in rated if one[0]))]


def write_pick(results: Iterable[Labelled], path: Path, count: int, locate: Callable[[str], str]) -> list[str]:
    """Write the locations of the images that `pick` selects, one a line, a list that `ovsam label` and others read;
    returns them."""
    chosen = [locate(name) for name, _ in pick(results, count)]
    write_whole(path, lambda temporary: temporary.write_text("".join(f"{one}\n" for one in chosen), encoding="utf-8"))
    return chosen
