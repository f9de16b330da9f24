"""`ovsam compare`: compare a fine-tuned model with its base on a data set."""

from argparse import ArgumentParser, Namespace

from ovsam.inference.loading import check_model
from ovsam.ops.files import check_target
from ovsam_cli import arguments

LESS_MEMORY = "use smaller models, or --device cpu in place of a GPU"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="a preset, a folder or a Hub id")
    parser.add_argument("tuned", metavar="TUNED", help="likewise, such as the output of `ovsam train`")
    parser.add_argument("--data", metavar="COCO.json", required=True, help="the annotations")
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: that of the JSON file)")
    parser.add_argument("--json", metavar="OUT.json", help="also write the results of both models to this file")
    parser.add_argument("--limit", metavar="N", type=arguments.count, help="use only the first N images")
    arguments.add(parser, "--device")


def check(args: Namespace) -> None:
    """Raise InputError for models, files and folders that do not exist, and for an invalid target."""
    for model in (args.base, args.tuned):
        check_model(model)
    arguments.check_dataset(args.data, args.images)
    if args.json:
        check_target(args.json, "--json")


def run(args: Namespace) -> int:
    """Print the results of two models side by side. Returns 0 if the second is better, else 1."""
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
