"""Options and the summary of the fuzz suite (see `harness`)."""

import pytest
from fuzz import harness


def pytest_addoption(parser):
    described = f"fuzz: N times as many inputs (default: {harness.LONG}), at random"
    parser.addoption("--long", metavar="N", nargs="?", const=harness.LONG, type=int, help=described)


@pytest.fixture(autouse=True)
def no_new_kind_of_failure():
    """A test tries all of its inputs, and fails afterwards with one traceback for each kind of failure."""
    before = len(harness.FAILURES)
    yield
    assert not (new := list(harness.FAILURES.values())[before:]), "\n".join(new)


def pytest_terminal_summary(terminalreporter):
    if not harness.COUNTS["inputs"]:
        return
    failures = ("other exceptions", "not one sentence", "hangs", "NaN scores")
    terminalreporter.section("fuzz")
    kinds = {kind: n for kind, n in harness.COUNTS.items() if kind not in (*failures, "inputs", "refused")}
    terminalreporter.line(", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items())))
    terminalreporter.line(
        f"inputs tried: {harness.COUNTS['inputs']:,}; answered with InputError: {harness.COUNTS['refused']:,}; "
        f"other exceptions: {harness.COUNTS['other exceptions']}; answers of more than one line: "
        f"{harness.COUNTS['not one sentence']}; hangs over {harness.HANG} s: {harness.COUNTS['hangs']}; "
        f"NaN scores: {harness.COUNTS['NaN scores']}; "
        f"slowest: {harness.SLOWEST[0]:.1f} s"
    )
