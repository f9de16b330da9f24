"""`ovsam convert`: make a checkpoint in its authors' layout a folder that transformers loads."""

from argparse import ArgumentParser, Namespace

from ovsam_cli import arguments

PARSER = {
    "description": "Convert an official checkpoint of SAM, SAM 2, EdgeTAM or EfficientTAM (see docs/conversions.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a .pt or .pth file, or the same tensors as .safetensors")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="a folder that is new or empty")
    parser.add_argument("--kind", metavar="KIND", help="what SOURCE is (default: found from its tensors)")
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=arguments.count,
        help="side of the images it was trained on, where that is not 1024 and its tensors do not tell",
    )


def run(args: Namespace) -> int:
    """Convert a foreign checkpoint and say what became of its tensors."""
    from transformers.utils import logging

    from ovsam.checkpoints.convert import convert_checkpoint

    logging.set_verbosity_error()  # it would warn that a tracker's folder is opened as an image model, as is meant
    logging.disable_progress_bar()
    report = convert_checkpoint(args.source, args.output, args.kind, args.image_size)
    print(f"{args.source}: {report.size}, {report.used} tensors used, {len(report.unused)} not")
    for key, reason in report.unused.items():
        print(f"  not used: {key} ({reason})")
    print(f"{args.output}: loads with the same weights as {' and as '.join(report.classes)}")
    return 0
