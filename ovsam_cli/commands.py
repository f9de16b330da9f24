"""What the commands of `ovsam_cli` do. All that the user passed is checked before a model is loaded."""

import importlib.util
import math
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image

from ovsam.errors import InputError
from ovsam.ops.files import check_folder, write_whole
from ovsam.processing.images import open_image
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.results import Results, write_coco

if TYPE_CHECKING:
    from ovsam.inference.segmenter import Segmenter

MAX_PHRASE = 64  # words; no text tower reads more, and each says itself if it reads less


def segment(arguments: Namespace) -> int:
    """Segment and name, print a table a picture, write overlays and the COCO file.

    A picture that cannot be read is reported on stderr, and the others go on. Returns 2 if there was one, else 0.
    """
    words = _check_question(arguments)
    overlays = _plan_overlays(arguments.output, arguments.images) if arguments.output else {}
    if arguments.json:
        _check_json(Path(arguments.json))
    # Opened here to be checked and again below to be segmented: many pictures would not fit into memory.
    readable = [path for path in arguments.images if _try_to_open(path, arguments)]
    if not readable:
        return 2

    import ovsam

    segmenter = ovsam.load(arguments.model, device=arguments.device)
    found = []
    for path in readable:
        image = _try_to_open(path, arguments)
        if image is None:
            continue
        results = _ask(segmenter, image, words, arguments)
        results.file_name = path
        found.append(results)
        print(f"{path}: {len(results)} found ({results.model})")
        if results:
            print(results.table())
        if path in overlays:
            zoom = max(1, round(256 / math.sqrt(image.width * image.height)))  # room for names on small pictures
            overlay = results.overlay(image, zoom)
            write_whole(overlays[path], overlay.save)
            print(f"overlay: {overlays[path]}")
    if arguments.json:
        write_coco(found, arguments.json, labels=words.labels if words else ())
        print(f"json: {arguments.json}")
    return 0 if len(found) == len(arguments.images) else 2


def evaluate(arguments: Namespace) -> int:
    """Print the figures of a model on a test set."""
    from ovsam.evaluation.evaluate import run_eval

    run_eval(model=arguments.model, data=arguments.data, json_path=arguments.json, limit=arguments.limit)
    return 0


def train(arguments: Namespace) -> int:
    """Train what a recipe describes."""
    from ovsam.training.engine import train_recipe

    train_recipe(
        arguments.recipe,
        output=arguments.output,
        resume=arguments.resume,
        steps=arguments.steps,
        device=arguments.device,
        data=arguments.data,
        images=arguments.images,
        settings=arguments.settings,
    )
    return 0


def compare(arguments: Namespace) -> int:
    """Print the figures of two models side by side. Returns 1 if the second is not the better one, else 0."""
    from ovsam.evaluation.evaluate import run_compare

    better = run_compare(
        arguments.base,
        arguments.tuned,
        data=arguments.data,
        images=arguments.images,
        json_path=arguments.json,
        limit=arguments.limit,
        device=arguments.device,
    )
    return 0 if better else 1


def models(arguments: Namespace) -> int:
    """Print the presets."""
    from ovsam.checkpoints.presets import table

    print(table())
    return 0


def compose(arguments: Namespace) -> int:
    """Write a whole model made of parts, and say what it can do and under which licences its parts are."""
    from transformers.utils import logging

    from ovsam.checkpoints import compose as parts
    from ovsam.checkpoints.convert.base import new_folder

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = ("sam", "clip", *parts.ADAPTERS)
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    with new_folder(arguments.output) as folder:
        model, found = parts.compose_model(**chosen, composition=arguments.composition)
        processor = parts.build_processor(model, found["sam"], found["clip"])
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{arguments.output}: {parts.describe(model)}")
    for name, part in found.items():
        print(f"  {name}: {part.name} ({type(getattr(model, name)).__name__}, licence: {parts.licence(part)})")
    return 0


def convert(arguments: Namespace) -> int:
    """Convert a foreign checkpoint and say what became of its tensors."""
    from transformers.utils import logging

    from ovsam.checkpoints.convert import convert_checkpoint

    logging.set_verbosity_error()  # it would warn that a tracker's folder is opened as an image model, as is meant
    logging.disable_progress_bar()
    report = convert_checkpoint(arguments.source, arguments.output, arguments.kind, arguments.image_size)
    print(f"{arguments.source}: {report.size}, {report.used} tensors used, {len(report.unused)} not")
    for key, reason in report.unused.items():
        print(f"  not used: {key} ({reason})")
    print(f"{arguments.output}: loads with the same weights as {' and as '.join(report.classes)}")
    return 0


def push(arguments: Namespace) -> int:
    """Publish a folder and print its address."""
    from transformers.utils import logging

    from ovsam.checkpoints.push import push as push_folder

    logging.disable_progress_bar()
    address = push_folder(
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        dry_run=arguments.dry_run,
    )
    if address:
        print(address)
    return 0


def demo(arguments: Namespace) -> int:
    """Serve the demo until it is interrupted."""
    package = Path(__file__).parents[1] / "ovsam"
    # A wheel carries the folder; a checkout has it beside the package.
    folder = next((one for one in (package / "_demo", package.parent / "demo") if (one / "app.py").is_file()), None)
    if folder is None:
        raise InputError(
            "The demo is not in this installation; `pip install --force-reinstall --no-deps ovsam` has it."
        )
    if importlib.util.find_spec("gradio") is None:
        raise InputError('The demo needs Gradio, which `pip install "ovsam[demo]"` brings.')
    sys.path.insert(0, str(folder))  # its modules lie flat, as on a Space
    from app import main

    try:
        main(arguments.model, arguments.host, arguments.port, arguments.share)
    except OSError as error:
        raise InputError(
            f"The demo cannot be served at {arguments.host}:{arguments.port}; try another --port."
        ) from error
    return 0


def _ask(segmenter: "Segmenter", image: Image.Image, words: Vocabulary | None, arguments: Namespace) -> Results:
    how = {name: getattr(arguments, name) for name in ("threshold", "proposer", "refine", "tile", "exclusive")}
    if arguments.text:
        return cast(Results, segmenter.where(image, words, negative=arguments.negative, **how))
    if arguments.everything:
        return cast(Results, segmenter.everything(image, vocabulary=words, objectness=arguments.objectness, **how))
    found = segmenter.what(
        image,
        points=[[x, y] for x, y, _ in arguments.points] or None,
        labels=[label for _, _, label in arguments.points] or None,
        boxes=[list(box) for box in arguments.boxes] or None,
        vocabulary=words,
    )
    return cast(Results, found)


def _check_question(arguments: Namespace) -> Vocabulary | None:
    """Return the words to find or to name with, None for the model's own; raises InputError for an unclear question."""
    text, prompts = bool(arguments.text), bool(arguments.points or arguments.boxes)
    if text + prompts + arguments.everything == 0:
        raise InputError("Nothing was asked; give --text WORD..., --point X,Y, --box X1,Y1,X2,Y2 or --everything.")
    if text + prompts + arguments.everything > 1:
        raise InputError(
            "--text, --point or --box, and --everything are three questions, ask one at a time; "
            "the names for clicks, boxes and everything are chosen with --vocabulary."
        )
    for option in ("proposer", "tile", "exclusive"):
        if prompts and getattr(arguments, option):
            raise InputError(f"--{option} goes with --text or --everything, which look for things.")
    if text and arguments.vocabulary:
        raise InputError("--text already gives the words; use --vocabulary with --point, --box or --everything.")
    if arguments.negative and not text:
        raise InputError("--not goes with --text, which says what to find.")
    if arguments.threshold is not None and prompts:
        raise InputError("--threshold goes with --text or --everything; a click or a box always gives its mask.")
    if arguments.objectness is not None and not arguments.everything:
        raise InputError("--objectness goes with --everything; with --text, use --threshold.")
    if arguments.points and len(arguments.boxes) > 1:
        raise InputError("Clicks are on one object, so --point goes with at most one --box.")
    if arguments.points and not arguments.boxes and not any(label for _, _, label in arguments.points):
        raise InputError("All clicks are beside the object (X,Y,0); at least one must be on it (X,Y,1).")
    for x1, y1, x2, y2 in arguments.boxes:
        if not (x1 < x2 and y1 < y2):
            raise InputError(
                f"The box {x1:g},{y1:g},{x2:g},{y2:g} is reversed or empty; it is left,top,right,bottom, "
                "with left < right and top < bottom."
            )
    if not text:
        return Vocabulary(arguments.vocabulary) if arguments.vocabulary else None

    words = Vocabulary(arguments.text)
    excluded = Vocabulary(arguments.negative).prompts if arguments.negative else []
    for word in words.prompts + excluded:
        if (length := len(word.split())) > MAX_PHRASE:
            raise InputError(f"The phrase {word[:30]!r}... has {length} words; use a few, {MAX_PHRASE} at most.")
    if both := set(words.prompts) & set(excluded):
        raise InputError(f"{min(both)!r} is after --text and after --not; leave it in one of them.")
    return words


def _plan_overlays(output: str, images: list[str]) -> dict[str, Path]:
    """Where the overlay of each picture goes; raises InputError if it cannot go there."""
    target = Path(output)
    if target.is_dir():
        plan, times = {}, Counter[str]()
        for image in dict.fromkeys(images):
            stem = Path(image).stem
            times[stem] += 1  # pictures of one name may come from several folders
            plan[image] = target / (f"{stem}-ovsam-{times[stem]}.png" if times[stem] > 1 else f"{stem}-ovsam.png")
        return plan
    if len(images) > 1:
        raise InputError(f"-o {output} is not a folder that exists; for several pictures it must be one.")
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise InputError(f"-o {output} is neither a picture file such as out.png nor a folder that exists.")
    check_folder(target)
    if target.exists() and Path(images[0]).exists() and target.samefile(images[0]):
        raise InputError(f"-o {output} is the picture itself; write the overlay to another file.")
    return {images[0]: target}


def _check_json(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"--json {path} is a folder; name a file in it, such as {path / 'found.json'}.")
    check_folder(path)


def _try_to_open(path: str, arguments: Namespace) -> Image.Image | None:
    """Open a picture and see that clicks and boxes are inside it; if not, say so on stderr and return None."""
    try:
        image = open_image(path)
        width, height = image.size
        for x, y, _ in arguments.points:
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(f"The point {x:g},{y:g} is outside {path}, which is {width}x{height} pixels.")
        for x1, y1, x2, y2 in arguments.boxes:
            if not (0 <= x1 and 0 <= y1 and x2 <= width and y2 <= height):
                raise InputError(
                    f"The box {x1:g},{y1:g},{x2:g},{y2:g} is not inside {path}, which is {width}x{height} pixels."
                )
    except InputError as error:
        print(f"ovsam: error: {error}", file=sys.stderr)
        return None
    return image
