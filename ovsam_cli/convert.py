"""`ovsam convert`: convert an official checkpoint to a folder that transformers loads."""

import os
from argparse import ArgumentParser, Namespace

from ovsam.errors import InputError
from ovsam.ops.files import check_new_folder
from ovsam_cli import arguments

KINDS = ("sam", "sam2", "edgetam", "efficienttam")
PARSER = {
    "description": "Convert an official checkpoint of SAM, SAM 2, EdgeTAM or EfficientTAM (see docs/conversions.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=".pt or .pth file, or the same tensors as .safetensors")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument("--kind", choices=KINDS, help="kind of SOURCE (default: recognised from its tensors)")
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=arguments.count,
        help="side of the training images in pixels, if it is not 1024 and its tensors do not determine it",
    )


def check(args: Namespace) -> None:
    """Raise InputError for a source that does not exist, and an output folder that cannot be written."""
    if not os.path.isfile(args.source) and not os.path.isdir(args.source):
        raise InputError(f"{args.source} is not a file; give a checkpoint such as sam2.1_hiera_tiny.pt.")
    check_new_folder(args.output, "-o")


def run(args: Namespace) -> int:
    """Convert an official checkpoint and print the use of its tensors."""
    from ovsam.checkpoints.convert import convert_checkpoint

    report = convert_checkpoint(args.source, args.output, args.kind, args.image_size)
    print(f"{args.source}: {report.size}, {report.used} tensors used, {len(report.unused)} not")
    for key, reason in report.unused.items():
        print(f"  not used: {key} ({reason})")
    print(f"{args.output}: loads with the same weights as {' and as '.join(report.classes)}")
    return 0
