"""`ovsam convert`: convert an official checkpoint to a folder that transformers loads."""

from argparse import ArgumentParser, Namespace

from ovsam_cli import arguments

PARSER = {
    "description": "Convert an official checkpoint of SAM, SAM 2, EdgeTAM or EfficientTAM (see docs/conversions.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=".pt or .pth file, or the same tensors as .safetensors")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument("--kind", metavar="KIND", help="kind of SOURCE (default: recognised from its tensors)")
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=arguments.count,
        help="side of the training images in pixels, if it is not 1024 and its tensors do not determine it",
    )


def run(args: Namespace) -> int:
    """Convert an official checkpoint and print the use of its tensors."""
    from transformers.utils import logging

    from ovsam.checkpoints.convert import convert_checkpoint

    logging.set_verbosity_error()  # it would warn that a tracker is opened as an image model, as intended
    logging.disable_progress_bar()
    report = convert_checkpoint(args.source, args.output, args.kind, args.image_size)
    print(f"{args.source}: {report.size}, {report.used} tensors used, {len(report.unused)} not")
    for key, reason in report.unused.items():
        print(f"  not used: {key} ({reason})")
    print(f"{args.output}: loads with the same weights as {' and as '.join(report.classes)}")
    return 0
