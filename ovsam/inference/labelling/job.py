"""A labelling job: images -> journal -> label files. Decoding, model and writing overlap.

The sorted list of images is divided into batches. A batch that is incomplete in the journal is computed again as a
whole, since the last bits of scores depend on the batch; so interrupted jobs, shards and jobs on many machines give the
same bytes.
"""

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

from ovsam.errors import InputError, is_out_of_memory
from ovsam.inference.labelling.journal import Journal, Journals
from ovsam.inference.labelling.sources import Item
from ovsam.ops.files import remove_leftovers, write_whole
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats import FORMATS, write_labels
from ovsam.results.formats.base import LabelledImage, Numbers, Stems

if TYPE_CHECKING:  # torch is needed only with a model
    from ovsam.inference.segmenter import Segmenter

logger = logging.getLogger(__name__)

TILES = (1024, 512)  # px; tried for an image that alone does not fit into memory
AHEAD = 2  # number of batches that are decoded while one is in the model


@dataclass(frozen=True)
class Question:
    """The question for every image of a job.

    words: phrases and their labels, None for the model's own vocabulary; everything: classify all objects instead of
    searching for the words; options: options of `Segmenter.where` or `Segmenter.everything`.
    """

    words: dict[str, str] | None = None
    everything: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def prepare(self, segmenter: "Segmenter") -> None:
        """Embed the words, which the Segmenter caches; raises InputError if the text tower does not support them."""
        for words in (self.words, self.options.get("negative")):
            if words:
                segmenter.embed(words)

    def ask(self, segmenter: "Segmenter", images: list[Image.Image], **options: Any) -> list[Any]:
        """Return the results of a batch of images, which are encoded in one pass."""
        words = None if self.words is None else Vocabulary(self.words)
        options = self.options | options
        batch: list = list(images)
        if not options.get("tile"):
            batch = segmenter.encode(batch, batch_size=len(batch))
        find = segmenter.everything if self.everything else segmenter.where
        return list(find(batch, words, **options))


Found = Any  # Results, or another `Labelled` image
Ask = Callable[..., list[Found]]  # images, and further options of the question -> what is found in each
Outcome = Found | str  # what was found, or why nothing could be


class Asker:
    """Segments batches of images; if memory runs out, half the batch at a time, then tiles of the image.

    Args:
        ask: function from images and options to results: `Question.ask` of a Segmenter.
    """

    def __init__(self, ask: Ask):
        self.ask = ask
        self.limit = sys.maxsize  # number of images that fit into memory, as far as known

    def __call__(self, items: Sequence[Item], images: Sequence[Image.Image | InputError]) -> list[Outcome]:
        outcomes: list[Outcome] = [str(image) for image in images]
        readable = [place for place, image in enumerate(images) if isinstance(image, Image.Image)]
        found = self._ask([images[place] for place in readable])
        for place, outcome in zip(readable, found, strict=True):
            if not isinstance(outcome, str):
                outcome.file_name = items[place].key
            outcomes[place] = outcome
        return outcomes

    def _ask(self, images: list[Any]) -> list[Outcome]:
        if len(images) > (size := self.limit):  # which may decrease meanwhile
            return [one for i in range(0, len(images), size) for one in self._ask(images[i : i + size])]
        if not images:
            return []
        try:
            return list(self.ask(images))
        except Exception as error:
            if len(images) == 1:
                return [self._ask_in_tiles(images[0], error) if is_out_of_memory(error) else _reason(error)]
            if not is_out_of_memory(error):  # an error of one image: the others continue
                return [one for image in images for one in self._ask([image])]
        _free_memory()
        self.limit = (len(images) + 1) // 2
        logger.warning("%d images do not fit into memory; continuing with %d at a time.", len(images), self.limit)
        return self._ask(images)

    def _ask_in_tiles(self, image: Image.Image, error: Exception) -> Outcome:
        for tile in TILES:
            _free_memory()
            try:
                return self.ask([image], tile=tile)[0]
            except Exception as again:
                error = again
                if not is_out_of_memory(error):
                    break
        return f"{image.width}x{image.height} pixels do not fit into memory, not even in tiles ({_reason(error)})."


@dataclass
class Summary:
    """Summary of a job. `failed` maps the keys of images without labels to the reason."""

    labelled: int = 0
    before: int = 0
    objects: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def batches(items: Sequence[Item], size: int, shard: tuple[int, int] = (1, 1)) -> list[list[Item]]:
    """Return the batches of a shard (number from 1, count): every count-th of all."""
    number, count = shard
    return [list(items[start : start + size]) for start in range((number - 1) * size, len(items), count * size)]


def run_local(
    todo: Sequence[Sequence[Item]], ask: Ask, workers: int, done: Collection[str] = ()
) -> Iterator[tuple[Sequence[Item], list[Outcome]]]:
    """Each batch with its outcomes, in order. Images are decoded by `workers` threads, `AHEAD` batches in advance.

    Batches of which only images in `done` can be opened are not asked.
    """
    asker = Asker(ask)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Sequence[Item], list[Future]]] = deque()
        left = iter(todo)
        try:
            while True:
                while len(waiting) <= AHEAD and (batch := next(left, None)) is not None:
                    waiting.append((batch, [pool.submit(open_item, item) for item in batch]))
                if not waiting:
                    return
                batch, opening = waiting.popleft()
                images = [one.result() for one in opening]
                fresh = [image for item, image in zip(batch, images, strict=True) if item.key not in done]
                asked = any(isinstance(image, Image.Image) for image in fresh)
                yield batch, asker(batch, images) if asked else [str(image) for image in images]
        finally:
            pool.shutdown(cancel_futures=True)


def open_item(item: Item) -> Image.Image | InputError:
    try:
        return item.open()
    except InputError as error:
        return error
    except Exception as error:  # a MemoryError, or an unexpected error of a decoder
        return InputError(f"{item.name} cannot be opened ({_reason(error)}).")


def record(
    outcomes: Iterable[tuple[Sequence[Item], list[Outcome]]],
    journal: Journal,
    total: int,
    progress: bool = True,
) -> Summary:
    """Write outcomes to the journal while the next ones are computed, and show the progress.

    Raises InputError if the journal cannot be written, such as on a full disk; it has all outcomes before.
    """
    summary = Summary(before=len(journal.done))
    bar = tqdm(total=total, initial=len(journal.done), unit=" images", disable=not progress or None, mininterval=0.5)
    with bar, ThreadPoolExecutor(1, thread_name_prefix="journal") as writer:
        writing: deque[Future] = deque()
        for batch, found in outcomes:
            while len(writing) > 1:
                writing.popleft().result()
            fresh = []
            for item, outcome in zip(batch, found, strict=True):
                if item.key in journal.done:
                    continue
                bar.update()
                if isinstance(outcome, str):
                    summary.failed[item.key] = outcome
                else:
                    fresh.append(outcome)
                    summary.objects += sum(1 for _ in outcome)
            writing.append(writer.submit(journal.append, fresh))
            bar.set_postfix(objects=summary.objects, errors=len(summary.failed))
        for one in writing:
            one.result()
    summary.labelled = len(journal.done) - summary.before
    return summary


def pending(todo: Iterable[Sequence[Item]], done: set[str]) -> list[Sequence[Item]]:
    """Return the batches with an image that is missing in the journal."""
    return [batch for batch in todo if any(item.key not in done for item in batch)]


def check_names(items: Iterable[Item], formats: Iterable[str]) -> None:
    """Raise InputError if two images would have the same label file."""
    if any(not FORMATS[name] for name in formats):
        stems = Stems()
        for item in items:
            stems.of(LabelledImage((1, 1), item.key))


def export(
    images: Journals, output: Path, formats: Iterable[str], labels: Sequence[str] = (), root: Path | None = None
) -> dict[str, str]:
    """Write the label files of a job, in the order of the images' keys.

    Args:
        labels: labels in order; by default those in the journals.
        root: folder of the images, if keys are paths below it.

    Returns:
        the formats that could not be written, with the reason; the others are complete.
    """
    if not labels:
        numbers = Numbers()
        for image in images:
            for instance in image:
                numbers.of(instance.label)
        labels = sorted(numbers)
    failed = {}
    for name in formats:
        target = target_of(output, name)
        remove_leftovers(target)
        try:
            write_labels(images, target, name, labels, root)
        except (OSError, InputError) as error:
            failed[name] = _reason(error)
    return failed


def target_of(output: Path, format: str) -> Path:
    """Return the path of a job's labels in this format."""
    return output / f"{format}{FORMATS[format]}"


def write_errors(path: Path, failed: dict[str, str]) -> None:
    """Write one JSON line for each image without labels, sorted; no file if there are none."""
    if not failed:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"image": key, "error": failed[key]}, ensure_ascii=False) + "\n" for key in sorted(failed)]
    write_whole(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))


def read_errors(paths: Iterable[Path]) -> dict[str, str]:
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            found[one["image"]] = one["error"]
    return found


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if error.errno else error.strerror
    return f"{type(error).__name__}: {error}".strip(": ")
