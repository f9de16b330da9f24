"""`ovsam models`: list the presets: parts, licences, sizes, and whether they are downloaded."""

from argparse import ArgumentParser, Namespace

from ovsam.checkpoints.presets import table

LIGHT = True


def add_arguments(parser: ArgumentParser) -> None:
    """This command has no arguments."""


def run(args: Namespace) -> int:
    """Print the presets."""
    print(table())
    return 0
