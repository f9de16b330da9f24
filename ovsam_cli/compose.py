"""`ovsam compose`: compose a model from a SAM, a CLIP and adapters."""

from argparse import ArgumentParser, Namespace

from ovsam.checkpoints.download import check_in_reach
from ovsam.checkpoints.embedded import EMBEDDED
from ovsam.ops.files import check_new_folder

PARSER = {
    "description": "Each part is a folder, or a Hub id ORG/NAME or ORG/NAME@REVISION, "
    "or a whole OVSam model that has the part (see docs/compose.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--sam", metavar="PART", required=True, help="SAM, such as facebook/sam2.1-hiera-small")
    parser.add_argument(
        "--clip", metavar="PART", required=True, help="CLIP, such as google/owlv2-base-patch16-ensemble"
    )
    parser.add_argument("--clip2sam", metavar="PART", help="adapter that classifies prompted masks")
    parser.add_argument("--sam2clip", metavar="PART", help="adapter that replaces SAM's image encoder")
    parser.add_argument("--concepts", metavar="PART", help="adapter that finds text queries and everything")
    parser.add_argument(
        "--composition",
        choices=["dual", "clip", "sam"],
        help="source of image features (default: clip with --sam2clip, else dual, which has both encoders)",
    )
    parser.add_argument(
        "--memory", action="store_true", help="keep the memory of a tracker, SAM 2's or EdgeTAM's, for video"
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty folder")


def check(args: Namespace) -> None:
    """Raise InputError for parts that do not exist, and an output folder that cannot be written."""
    for name in ("sam", "clip", "clip2sam", "sam2clip", "concepts"):
        part = getattr(args, name)
        if part and not part.startswith("imagenet:") and part != EMBEDDED:
            check_in_reach(part)
    check_new_folder(args.output, "-o")


def run(args: Namespace) -> int:
    """Write a model composed of parts, and print its abilities and the licences of its parts."""
    from ovsam.checkpoints import compose as parts
    from ovsam.checkpoints.convert.base import new_folder
    from ovsam.modeling.adapters import ADAPTERS

    names = ("sam", "clip", *ADAPTERS)
    chosen = {name: getattr(args, name) for name in names if getattr(args, name)}
    with new_folder(args.output) as folder:
        model, found = parts.compose_model(**chosen, composition=args.composition, memory=args.memory)
        processor = parts.build_processor(model, found["sam"], found["clip"])
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{args.output}: {parts.describe(model)}")
    for name, part in found.items():
        print(f"  {name}: {part.name} ({type(getattr(model, name)).__name__}, licence: {parts.licence(part)})")
    return 0
