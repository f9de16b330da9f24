"""`ovsam convert-labels`: convert label files between formats."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ovsam.errors import InputError
from ovsam.ops.files import check_output_folder, check_target
from ovsam.results.formats import FORMATS, read_labels, recognise, write_labels

LIGHT = True
PARSER = {
    "description": "Convert labels between COCO, YOLO-seg, LabelMe, CVAT, Label Studio, GeoJSON and id maps "
    "(see docs/labels.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="label file, or folder of label files")
    parser.add_argument("target", metavar="OUT", help="file for coco, cvat and label-studio, else folder")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of OUT")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="format of IN (default: recognised)")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images; yolo needs it for image sizes, if they are not beside IN"
    )


def check(args: Namespace) -> None:
    """Raise InputError for paths that cannot be read or written; sets `args.source_format`."""
    args.source_format = args.source_format or recognise(args.source)
    if not FORMATS[args.format]:
        check_output_folder(args.target)
    elif os.path.isdir(args.target):
        raise InputError(
            f"{args.target} is a folder; {args.format} needs a file, such as {Path(args.target) / 'labels'}."
        )
    else:
        check_target(args.target)


def run(args: Namespace) -> int:
    """Convert, and print the numbers of images, objects and labels."""
    found = read_labels(args.source, args.source_format, args.images)
    numbers = {one.label: one.label_id for image in found for one in image}
    labels = sorted(numbers, key=lambda label: numbers[label])
    write_labels(found, args.target, args.format, labels, args.images)
    objects = sum(len(image.instances) for image in found)
    print(f"{args.target}: {len(found)} images, {objects} objects, {len(labels)} labels")
    return 0
