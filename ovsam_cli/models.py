"""`ovsam models`: list the presets: parts, licences, size, and whether they are here."""

from argparse import ArgumentParser, Namespace

from ovsam.checkpoints.presets import table

LIGHT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Nothing is asked."""


def run(args: Namespace) -> int:
    """Print the presets."""
    print(table())
    return 0
