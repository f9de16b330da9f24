"""`ovsam eval`: measure a model on a frozen test set."""

from argparse import ArgumentParser, Namespace

from ovsam_cli import arguments


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PRESET|PATH|ID", default="ovsam-tiny", help="default: %(default)s")
    parser.add_argument("--data", metavar="DIR", help="default: both frozen sets of tests/data")
    parser.add_argument("--json", metavar="OUT.json", help="write the figures there as well")
    parser.add_argument("--limit", metavar="N", type=arguments.count, help="only the first N pictures")


def run(args: Namespace) -> int:
    """Print the figures of a model on a test set."""
    from ovsam.evaluation.evaluate import run_eval

    run_eval(model=args.model, data=args.data, json_path=args.json, limit=args.limit)
    return 0
