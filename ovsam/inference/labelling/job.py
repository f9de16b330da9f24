"""A labelling job: images -> journal -> label files. Decoding, model and writing overlap.

Images are taken in batches that are cut from the sorted list of all images. A batch that is not whole in the journal is
asked again as a whole, since an image's scores depend in their last bits on what it was batched with; so a job that was
killed, one in shards and one on many machines end in the same bytes.
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

from ovsam.errors import InputError
from ovsam.inference.labelling.journal import Journal, Journals
from ovsam.inference.labelling.sources import Item
from ovsam.ops.files import remove_leftovers, write_whole
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats import FORMATS, write_labels
from ovsam.results.formats.base import LabelledImage, Numbers, Stems

if TYPE_CHECKING:  # without a model nothing here needs torch
    from ovsam.inference.segmenter import Segmenter

logger = logging.getLogger(__name__)

TILES = (1024, 512)  # px; tried on an image that alone does not fit the memory
AHEAD = 2  # batches that are decoded while one is in the model


@dataclass(frozen=True)
class Question:
    """What is asked of every image.

    words: phrases and the labels they stand for, None for the model's own vocabulary; everything: name whatever is
    found, instead of looking for the words; options: of `Segmenter.where` or `Segmenter.everything`.
    """

    words: dict[str, str] | None = None
    everything: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def prepare(self, segmenter: "Segmenter") -> None:
        """Embed the words, which the Segmenter then keeps; raises InputError for what the text tower cannot read."""
        for words in (self.words, self.options.get("negative")):
            if words:
                segmenter.embed(words)

    def ask(self, segmenter: "Segmenter", images: list[Image.Image], **options: Any) -> list[Any]:
        """The results of a batch of images, which are encoded in one pass."""
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
    """Asks about batches of images, and finds a way where one is too much: half the batch, then tiles of the image.

    Args:
        ask: images, and further options -> their results; `Question.ask` of a Segmenter.
    """

    def __init__(self, ask: Ask):
        self.ask = ask
        self.limit = sys.maxsize  # images that fit the memory at a time, as far as was tried

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
        if len(images) > (size := self.limit):  # which may fall meanwhile
            return [one for i in range(0, len(images), size) for one in self._ask(images[i : i + size])]
        if not images:
            return []
        try:
            return list(self.ask(images))
        except Exception as error:
            if len(images) == 1:
                return [self._ask_in_tiles(images[0], error) if _is_memory(error) else _reason(error)]
            if not _is_memory(error):  # one image's fault: the others go on
                return [one for image in images for one in self._ask([image])]
        _free_memory()
        self.limit = (len(images) + 1) // 2
        logger.warning("The memory does not hold %d images at a time; going on with %d.", len(images), self.limit)
        return self._ask(images)

    def _ask_in_tiles(self, image: Image.Image, error: Exception) -> Outcome:
        for tile in TILES:
            _free_memory()
            try:
                return self.ask([image], tile=tile)[0]
            except Exception as again:
                error = again
                if not _is_memory(error):
                    break
        return f"{image.width}x{image.height} pixels do not fit the memory, not even in tiles ({_reason(error)})."


@dataclass
class Summary:
    """What a job did. `failed` are the keys of images without labels, with the reason."""

    labelled: int = 0
    before: int = 0
    objects: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def batches(items: Sequence[Item], size: int, shard: tuple[int, int] = (1, 1)) -> list[list[Item]]:
    """The batches of a shard (number from 1 on, count): every count-th of all."""
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
    except Exception as error:  # a MemoryError, or what no decoder should raise
        return InputError(f"{item.name} cannot be opened ({_reason(error)}).")


def record(
    outcomes: Iterable[tuple[Sequence[Item], list[Outcome]]],
    journal: Journal,
    total: int,
    progress: bool = True,
) -> Summary:
    """Write outcomes to the journal while the next ones are made, and show the progress.

    Raises OSError if the journal cannot be written, such as on a full disk; it holds all that came before.
    """
    summary = Summary(before=len(journal.done))
    bar = tqdm(total=total, initial=len(journal.done), unit=" images", disable=not progress, mininterval=0.5)
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
    """The batches of which an image is missing in the journal."""
    return [batch for batch in todo if any(item.key not in done for item in batch)]


def check_names(items: Iterable[Item], formats: Iterable[str]) -> None:
    """Raise InputError where two images would have one label file."""
    if any(not FORMATS[name] for name in formats):
        stems = Stems()
        for item in items:
            stems.of(LabelledImage((1, 1), item.key))


def export(
    images: Journals, output: Path, formats: Iterable[str], labels: Sequence[str] = (), root: Path | None = None
) -> dict[str, str]:
    """Write the label files of a job, in the order of the images' keys.

    Args:
        labels: in their order; found in the journals where there are none.
        root: the folder of the images, where keys are paths below it.

    Returns:
        the formats that could not be written, with the reason; the others are whole.
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
    """Where a job's labels in this format go."""
    return output / f"{format}{FORMATS[format]}"


def write_errors(path: Path, failed: dict[str, str]) -> None:
    """Write a json line an image without labels, sorted; no file where there is none."""
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


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


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
