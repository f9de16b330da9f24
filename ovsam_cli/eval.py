"""`ovsam eval`: evaluate a model on a data set."""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from ovsam.errors import InputError
from ovsam.ops.files import check_output_folder, check_target
from ovsam_cli import arguments

PHOTOS = "tests/data/photos-val"
TASKS = ("prompts", "words", "everything", "time")
VIDEO, MOVING = "video", "moving"
PARSER = {
    "description": "Measure masks, class names, text queries and everything; docs/evaluation.md defines the metrics.",
    "epilog": "examples:\n"
    "  ovsam eval                                                    the 60 photographs of a checkout, ovsam-tiny\n"
    "  ovsam eval instances_val2017.json --images val2017 --absent all --output runs/coco\n"
    "  ovsam eval lvis_v1_val.json --images coco --model photo --task words --limit 500 --json lvis.json",
}
LESS_MEMORY = "use a smaller --model, or --device cpu in place of a GPU"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="?",
        default=PHOTOS,
        help="COCO or LVIS JSON file, or folder with annotations.json (default: %(default)s, in a checkout)",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: that of the JSON file)")
    arguments.add(parser, "--model", default="ovsam-tiny")
    parser.add_argument(
        "--task",
        nargs="+",
        choices=(*TASKS, VIDEO, MOVING),
        default=list(TASKS),
        dest="tasks",
        help="what to measure (default: all of a data set of images); video is for a folder in the layout of DAVIS or "
        "a json of YouTube-VIS, moving for 20 scenes in which the objects of DATASET move",
    )
    arguments.add(parser, "--tracker", help="with --task video or moving: kind of tracker (default: auto)")
    parser.add_argument(
        "--seed", metavar="N", type=int, help="with --task moving: draw other scenes than the frozen ones"
    )
    parser.add_argument(
        "--absent",
        metavar="N|all",
        type=_absent,
        default=10,
        help="number of absent class names queried per image besides the present ones; all as in published AP "
        "(default: %(default)s; for LVIS, all classes that are annotated in the image)",
    )
    parser.add_argument(
        "--no-baselines", action="store_false", dest="baselines", help="leave out the training-free baselines"
    )
    parser.add_argument("--limit", metavar="N", type=arguments.count, help="use only the first N images")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for records, results and a page; an interrupted evaluation continues"
    )
    parser.add_argument("--json", metavar="OUT.json", help="also write the results to this file")
    arguments.add(parser, "--device")


def check(args: Namespace) -> None:
    """Raise InputError for an invalid data set or target, before torch is imported."""
    arguments.check_dataset(args.dataset, args.images, videos=VIDEO in args.tasks)
    if args.output:
        check_output_folder(args.output, "--output")
    if args.json:
        check_target(args.json, "--json")
    videos = {VIDEO, MOVING} & {*args.tasks}
    if videos and len(args.tasks) > 1:
        raise InputError("Videos are measured alone; give --task video or --task moving without other tasks.")
    if args.tracker != "auto" and not videos:
        raise InputError("--tracker needs --task video or --task moving.")
    if args.seed is not None and MOVING not in args.tasks:
        raise InputError("--seed needs --task moving.")


def run(args: Namespace) -> int:
    """Print the figures of a model on a data set."""
    if VIDEO in args.tasks or MOVING in args.tasks:
        from ovsam.evaluation.evaluate_video import run_video_eval

        run_video_eval(
            args.dataset,
            model=args.model,
            images=args.images,
            output=args.output,
            json_path=args.json,
            limit=args.limit,
            baselines=args.baselines,
            tracker=args.tracker,
            device=args.device,
            moving=MOVING in args.tasks,
            seed=args.seed,
        )
        return 0
    from ovsam.evaluation.evaluate import run_eval

    run_eval(
        args.dataset,
        model=args.model,
        tasks=args.tasks,
        images=args.images,
        output=args.output,
        json_path=args.json,
        limit=args.limit,
        absent=args.absent,
        baselines=args.baselines,
        device=args.device,
    )
    return 0


def _absent(text: str) -> int | None:
    if text == "all":
        return None
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    raise ArgumentTypeError(f"{text!r} must be a whole number or all")
