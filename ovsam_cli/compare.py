"""`ovsam compare`: see whether a tuned model beats its base on a data set."""

from argparse import ArgumentParser, Namespace

from ovsam_cli import arguments


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="a preset, a folder or a Hub id")
    parser.add_argument("tuned", metavar="TUNED", help="likewise; what `ovsam train` wrote, for one")
    parser.add_argument("--data", metavar="COCO.json", required=True, help="the annotations")
    parser.add_argument("--images", metavar="DIR", help="the folder of the pictures (default: that of the json)")
    parser.add_argument("--json", metavar="OUT.json", help="write the figures of both there as well")
    parser.add_argument("--limit", metavar="N", type=arguments.count, help="only the first N pictures")
    arguments.add_device(parser)


def run(args: Namespace) -> int:
    """Print the figures of two models side by side. Returns 1 if the second is not the better one, else 0."""
    from ovsam.evaluation.compare import run_compare

    better = run_compare(
        args.base,
        args.tuned,
        data=args.data,
        images=args.images,
        json_path=args.json,
        limit=args.limit,
        device=args.device,
    )
    return 0 if better else 1
