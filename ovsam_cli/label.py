"""`ovsam label`: many images -> label files, resumable."""

import importlib.util
import os
import re
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ovsam.errors import InputError, one_line
from ovsam.inference.labelling.journal import Journal, Journals, read_header
from ovsam.inference.labelling.sources import Item, list_items
from ovsam.ops.files import check_output_folder, check_target
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats import FORMATS, check_format
from ovsam_cli import arguments

if TYPE_CHECKING:
    from ovsam.inference.labelling.job import Ask, Question

PARSER = {
    "usage": "ovsam label INPUT... (--text WORD... | --vocabulary NAME|FILE) -o OUT [options]\n"
    "       ovsam label --merge OUT... -o OUT [--format ...]",
    "description": "Label many images and write the files of labelling and training tools (see docs/labels.md).\n"
    "An interrupted command continues when it is run again.",
    "epilog": """\
  ovsam label photos/ --text dog "red ball" -o labels/ --format coco,yolo
  ovsam label list.txt archive.zip 's3://bucket/*.jpg' --vocabulary lvis -o labels/ --threshold 0.4
  ovsam label photos/ --vocabulary coco -o labels/ --shard 1/2       on one machine, and 2/2 on another; then
  ovsam label --merge labels/ -o labels/ --format coco,labelme

Exit code: 0, 1 if images could not be labelled (OUT/errors.jsonl lists them), 2 if the command is invalid.
""",
}
LESS_MEMORY = "use a smaller --batch, fewer --workers, a smaller --model, or --device cpu in place of a GPU"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="an image, a folder, a pattern, a .txt, .csv or COCO .json list, a .zip or .tar, or an address",
    )
    question = parser.add_argument_group("the question")
    arguments.add(question, "--text")
    arguments.add(
        question,
        "--vocabulary",
        help="search for these class names: coco, lvis, imagenet21k or a file with one a line",
    )
    arguments.add(question, "--everything", help="label all objects with these class names (or the model's own)")
    arguments.add(question, "--not", help="drop instances that match these negative queries better")
    arguments.add(question, "--threshold", "--objectness", "--proposer", "--tile", "--exclusive", "--refine")
    model = parser.add_argument_group("the model")
    arguments.add(model, "--model", "--device")
    output = parser.add_argument_group("the output")
    output.add_argument("-o", "--output", metavar="OUT", required=True, help="folder, created if it does not exist")
    output.add_argument(
        "--format",
        metavar="NAME,...",
        type=_formats,
        default=["coco"],
        help=f"any of {', '.join(FORMATS)} (default: coco)",
    )
    output.add_argument("--report", metavar="OUT.html", help="a page of thumbnails with masks to review")
    output.add_argument(
        "--pick", metavar="N", type=arguments.count, help="list the N images most worth correcting, in OUT/pick.txt"
    )
    work = parser.add_argument_group("the work")
    work.add_argument("--batch", metavar="N", type=arguments.count, default=4, help="images in one pass (default: 4)")
    work.add_argument(
        "--workers", metavar="N", type=arguments.count, default=2, help="threads that decode images (default: 2)"
    )
    work.add_argument("--shard", metavar="I/N", type=_shard, default=(1, 1), help="only part I of N, from 1")
    work.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="ray: on all machines of a Ray cluster"
    )
    work.add_argument(
        "--merge", action="store_true", help="INPUT are output folders of shards: write their common label files"
    )


def check(args: Namespace) -> None:
    """Raise InputError for invalid input, before a model is loaded.

    Sets `args.listing`, the images, `args.words`, the Vocabulary or None, and `args.job`, which identifies the job.
    """
    output = Path(args.output)
    if args.report:
        check_target(args.report, "--report")
    if "://" in args.output:
        raise InputError(f"-o {args.output} is an address; it must be a folder of this machine.")
    if os.path.isfile(output):
        raise InputError(f"-o {output} is a file; it must be a folder.")
    check_output_folder(output, "-o")
    if args.merge:
        if args.text or args.vocabulary or args.everything or args.shard != (1, 1):
            raise InputError("--merge takes output folders and formats only; the journals have the other options.")
        args.journals = _find_journals(args.inputs)
        return
    if args.text and args.vocabulary:
        raise InputError("--text and --vocabulary exclude each other; use one of them.")
    if not (args.text or args.vocabulary or args.everything):
        raise InputError("There is nothing to search for; give --text WORD..., --vocabulary NAME|FILE or --everything.")
    if args.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError('--engine ray needs Ray, which `pip install "ovsam[ray]"` brings.')
    if args.negative and args.everything:
        raise InputError("--not needs --text or --vocabulary; remove --everything.")
    if args.objectness is not None and not args.everything:
        raise InputError("--objectness needs --everything; with text queries, use --threshold.")
    args.words = Vocabulary(args.text or args.vocabulary) if args.text or args.vocabulary else None
    below = os.path.join(os.path.abspath(output), "")
    listing = list_items(args.inputs)  # an output folder inside the input is left out
    listing.items[:] = [item for item in listing.items if not item.location.startswith(below)]
    if not listing.items:
        raise InputError(f"There is no image in {', '.join(args.inputs)}; check the path.")
    args.listing = listing
    if args.model == "auto":  # a resumed job keeps its model
        from ovsam.checkpoints.presets import choose_auto

        header = read_header(_journal(args)) if _journal(args).is_file() else None
        args.model = header["job"]["model"] if header else os.environ.get("OVSAM_MODEL") or choose_auto()
    options = {name: getattr(args, name) for name in ("threshold", "proposer", "refine", "tile", "exclusive")}
    options |= {"objectness": args.objectness} if args.everything else {"negative": args.negative}
    args.question = {
        "words": args.words.as_mapping() if args.words else None,
        "everything": args.everything,
        "options": options,
    }
    args.job = {"model": args.model, "inputs": args.inputs, **args.question}


def run(args: Namespace) -> int:
    """Label, and write the label files. Returns 1 if there are images without labels or formats not written, else 0."""
    from ovsam.inference.labelling import job
    from ovsam.inference.labelling.ray_engine import run_ray

    output = Path(args.output)
    if args.merge:
        return _merge(args)
    items = args.listing.items
    job.check_names(items, args.format)
    number, count = args.shard
    every = job.batches(items, args.batch, args.shard)
    root = args.listing.root
    facts = {"shard": [number, count], "root": str(root) if root else None}
    start = time.monotonic()
    with Journal(_journal(args), args.job, facts) as journal:
        before = len(journal.done)
        todo = job.pending(every, journal.done)
        summary = job.Summary()
        if todo:
            load = _Load(args.model, args.device, job.Question(**args.question))
            if args.engine == "ray":
                outcomes = run_ray(todo, load)
            else:
                outcomes = job.run_local(todo, load(), args.workers, frozenset(journal.done))
            summary = job.record(outcomes, journal, sum(map(len, every)))
        journal.finish(len(summary.failed))
    job.write_errors(_errors(args), summary.failed)
    seconds = time.monotonic() - start
    print(
        f"{output}: {before + summary.labelled} images ({before} of them before), {summary.objects} new objects, "
        f"{len(summary.failed)} errors, {summary.labelled / seconds:.2f} images/s"
    )
    for key, reason in list(summary.failed.items())[:5]:
        print(f"  {one_line(key)}: {one_line(reason)}", file=sys.stderr)
    if summary.failed:
        print(f"  all of them: {_errors(args)}", file=sys.stderr)
    if count > 1:
        print(f"when all {count} shards are done: ovsam label --merge {output} -o {output} --format ...")
        return 1 if summary.failed else 0
    opened = {item.key: item for item in items}
    return max(_export(args, Journals([_journal(args)]), opened), 1 if summary.failed else 0)


class _Load:
    """Loads a model in the process that segments, this one or an actor of Ray, and returns a function that asks it.

    Args:
        model, device: arguments of `ovsam.load`.
        question: the question for every image.
    """

    def __init__(self, model: str, device: str | None, question: "Question"):
        self.model, self.device, self.question = model, device, question
        self.folder = os.getcwd()  # relative paths refer to it, in an actor too

    def __call__(self) -> "Ask":
        import ovsam

        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        segmenter = ovsam.load(self.model, device=self.device)
        self.question.prepare(segmenter)
        return lambda images, **options: self.question.ask(segmenter, images, **options)


def _export(args: Namespace, images: Journals, items: dict[str, Item]) -> int:
    """Write label files from the journals. `items` are the images; others are searched in their folder."""
    from ovsam.inference.labelling import job
    from ovsam.inference.labelling.pick import write_pick
    from ovsam.results.report import write_report

    output, root = Path(args.output), images.header.get("root")
    words = images.header["job"]["words"]
    labels = list(dict.fromkeys(words.values())) if words else ()
    failed = job.export(images, output, args.format, labels, Path(root) if root else None)
    for name in args.format:
        done = name not in failed
        print(f"{name}: {job.target_of(output, name)}" if done else f"{name} was not written: {failed[name]}")

    def find(key: str) -> Item:
        return items.get(key) or Item(key, str(Path(root) / key) if root else key)

    if args.report:
        write_report(images, args.report, lambda key: find(key).open())
        print(f"report: {args.report}")
    if args.pick:
        chosen = write_pick(images, output / "pick.txt", args.pick, lambda key: find(key).location)
        print(f"{len(chosen)} images most worth correcting: {output / 'pick.txt'}")
    return 1 if failed else 0


def _merge(args: Namespace) -> int:
    """Write the common label files of shards."""
    from ovsam.inference.labelling import job

    output, journals = Path(args.output), args.journals
    images = Journals(journals)
    output.mkdir(parents=True, exist_ok=True)
    for path in images.unfinished:
        print(f"{path} is not finished: run its command again to continue.", file=sys.stderr)
    beside = [one.with_name(one.name.replace("journal", "errors")) for one in journals]
    failed = job.read_errors(path for path in beside if path.is_file())
    job.write_errors(output / "errors.jsonl", failed)
    print(f"{output}: {len(images)} images of {len(journals)} journals, {len(failed)} errors")
    return max(_export(args, images, {}), 1 if failed or images.unfinished else 0)


def _find_journals(inputs: list[str]) -> list[Path]:
    named = [Path(one) for one in inputs]
    journals = [path for one in named for path in ([one] if one.is_file() else sorted(one.glob("journal*.jsonl")))]
    if not journals:
        raise InputError(f"There is no journal in {', '.join(inputs)}; name output folders of `ovsam label`.")
    return journals


def _journal(args: Namespace) -> Path:
    number, count = args.shard
    return Path(args.output) / ("journal.jsonl" if count == 1 else f"journal-{number}of{count}.jsonl")


def _errors(args: Namespace) -> Path:
    return _journal(args).with_name(_journal(args).name.replace("journal", "errors"))


def _formats(text: str) -> list[str]:
    try:
        return [check_format(name) for name in dict.fromkeys(text.split(","))]
    except InputError as error:
        raise ArgumentTypeError(str(error)) from None


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise ArgumentTypeError(f"{text!r} is not I/N, such as 1/4 to 4/4")
