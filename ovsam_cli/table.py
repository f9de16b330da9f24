"""The table of instances that `ovsam segment` prints."""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ovsam.ops.files import STDOUT

if TYPE_CHECKING:
    from ovsam.results.results import Results

COLUMNS = ("image", "label", "score", "mask_score", "x1", "y1", "x2", "y2", "area")


class Printer:
    """The table: aligned on a terminal, with tabs in a pipe."""

    def __init__(self, args: Namespace):
        used = STDOUT in (args.json, args.output)
        self.quiet, self.out = args.quiet, sys.stderr if used else sys.stdout
        self.people = args.format != "tsv" and self.out.isatty() or used
        if not self.people and not self.quiet and not (args.format == "tsv" and args.output):
            print(header(), end="", file=self.out)
        self.rows = not (args.format == "tsv" and args.output)

    def add(self, results: "Results") -> None:
        if self.quiet:
            return
        line = f"{results.file_name}: {len(results)} found ({results.model})"
        print(line, file=self.out if self.people else sys.stderr)
        if self.people and results:
            print(results.table(), file=self.out)
        elif self.rows and not self.people:
            print(rows(results), end="", file=self.out)

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=self.out if self.people else sys.stderr)


def header() -> str:
    return "\t".join(COLUMNS) + "\n"


def rows(results: "Results") -> str:
    lines = []
    for one in results:
        place = [f"{value:g}" for value in one.box]
        cells = [results.file_name, one.label, f"{one.score:.4f}", f"{one.mask_score:.4f}", *place, str(one.area)]
        lines.append("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
    return "".join(lines)
