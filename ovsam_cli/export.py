"""`ovsam export`: write a model in a format that runs without torch."""

from argparse import ArgumentParser, Namespace

from ovsam.inference.loading import check_model
from ovsam.ops.files import check_new_folder

PARSER = {
    "description": "Write a model as ONNX graphs (see docs/onnx.md). `--model DIR` of the other commands and "
    "ovsam.load(DIR) then run it with onnxruntime, without torch."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="ovsam-tiny", help="preset, folder or Hub id (default: ovsam-tiny)"
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="of the files (default: onnx)")
    parser.add_argument("--int8", action="store_true", help="store the weights of the text tower as 8-bit integers")


def check(args: Namespace) -> None:
    """Raise InputError for a model that does not exist, and an output folder that cannot be written."""
    check_model(args.model)
    check_new_folder(args.output, "-o")


def run(args: Namespace) -> int:
    """Export a model and list the files."""
    import ovsam
    from ovsam.checkpoints.onnx_export import export_onnx

    segmenter = ovsam.load(args.model, device="cpu", dtype="float32")
    files = export_onnx(segmenter.model, segmenter.processor, args.output, segmenter.name, args.int8)
    for file in files:
        print(f"{file.stat().st_size / 1e6:8.1f} MB  {file.name}")
    print(f"{args.output}: ovsam.load({args.output!r}) runs it with onnxruntime")
    return 0
