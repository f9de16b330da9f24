"""`ovsam eval`: the results of a model on a data set, as a table, a JSON file and a page.

The figures are defined in `summary.py`, the metrics in `metrics.py` and `metrics_ap.py`.
"""

import json
import math
import platform
import resource
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from tqdm import tqdm

from ovsam.errors import InputError
from ovsam.evaluation.datasets import ABSENT_WORDS, EvalSet, open_set
from ovsam.evaluation.report import COLUMNS, columns, write_report
from ovsam.evaluation.summary import Figures, summarise
from ovsam.evaluation.tasks import Examiner
from ovsam.evaluation.timing import measure_time
from ovsam.inference.loading import load
from ovsam.inference.segmenter import Segmenter
from ovsam.ops.files import refused, write_text

QUESTIONS = ("prompts", "words", "everything")
TASKS = (*QUESTIONS, "time")
RECORDS, RESULTS, REPORT = "records.jsonl", "results.json", "report.html"


def run_eval(
    dataset: str | Path,
    model: str = "ovsam-tiny",
    tasks: Sequence[str] = TASKS,
    images: str | Path | None = None,
    output: str | Path | None = None,
    json_path: str | Path | None = None,
    limit: int | None = None,
    absent: int | None = ABSENT_WORDS,
    baselines: bool = True,
    device: str | None = None,
) -> Figures:
    """Evaluate a model, print the table, and write the outputs.

    Args:
        dataset: COCO or LVIS JSON file, or folder with `annotations.json`.
        tasks: some of TASKS; "time" measures the dependence on the number of text queries.
        images: folder of the images; by default that of the JSON file.
        output: folder for the records, the results and the page; an interrupted evaluation continues there.
        json_path: file that the results are also written to.
        limit: number of images.
        absent: number of absent class names queried per image; None for all of them.
        baselines: whether to measure the training-free baselines: CLIP on masks and crops, and clip-dense.

    Raises:
        InputError: the data set, an image or the model does not exist, or the folder has another evaluation.
    """
    data = open_set(dataset, images)
    segmenter = load(model, device=device)
    asked = {
        "model": str(model),
        "dataset": str(dataset),
        "tasks": list(tasks),
        "absent": absent,
        "baselines": baselines,
        "score_threshold": segmenter.model.config.score_threshold,
        "weights": fingerprint(segmenter),
    }
    image_ids = sorted(data.coco.imgs)[:limit]
    file = None if output is None else Path(output) / RECORDS
    examiner = Examiner(segmenter, data, absent, baselines)
    questions = tuple(task for task in tasks if task in QUESTIONS)
    records = list(_answers(examiner, image_ids, questions, file, asked))
    figures = summarise(records, data, segmenter.model.config.score_threshold)
    if "time" in tasks:
        figures |= measure_time(segmenter, data)
    results = {
        "command": shlex.join(["ovsam", *sys.argv[1:]]),
        **asked,
        "pictures": len(records),
        "mode": mode(segmenter),
        "figures": {name: round(value, 4) for name, value in figures.items() if not math.isnan(value)},
    }
    print(f"\n{segmenter.name} on {dataset}, {len(records)} images; {results['mode']}\n")
    print(table(figures))
    if output is not None:
        write_json(Path(output) / RESULTS, results)
        write_report(Path(output) / REPORT, results, records, data)
        print(f"\nreport: {Path(output) / REPORT}")
    if json_path:
        write_json(Path(json_path), results)
    return figures


def measure(
    segmenter: Segmenter,
    coco: COCO,
    folder: Path,
    limit: int | None = None,
    tasks: Sequence[str] = ("prompts", "words"),
    baselines: bool = True,
) -> Figures:
    """Return the figures of a loaded model on a loaded data set."""
    examiner = Examiner(segmenter, EvalSet(coco, folder), baselines=baselines)
    records = list(_answers(examiner, sorted(coco.imgs)[:limit], tuple(tasks)))
    return summarise(records, examiner.data, segmenter.model.config.score_threshold)


def table(figures: Figures) -> str:
    """Return a table with one row for each figure: over all, over classes, by split and by size; blank without data."""
    rows = columns({name: value for name, value in figures.items() if not math.isnan(value)})
    width = max(map(len, rows), default=0)
    shown = [one for one in ("", *COLUMNS) if any(one in row for row in rows.values())]
    lines = [" " * width + "".join(f"{(one or 'all'):>{max(9, len(one) + 2)}}" for one in shown)]
    for title, row in rows.items():
        cells = (f"{round(row[one], 3) + 0.0:.3f}" if one in row else "" for one in shown)
        each = (f"{cell:>{max(9, len(one) + 2)}}" for one, cell in zip(shown, cells, strict=True))
        lines.append((f"{title:<{width}}" + "".join(each)).rstrip())
    return "\n".join(lines)


def mode(segmenter: Segmenter) -> str:
    """Describe the conditions of the measured time and memory."""
    if segmenter.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of its memory at most"
        where = f"{torch.cuda.get_device_name(segmenter.device)}, {memory}"
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB resident at most"
        where = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {memory}"
    return f"{str(segmenter.dtype).removeprefix('torch.')}, one image at a time, {where}"


def fingerprint(segmenter: Segmenter) -> float:
    """Return a number that changes with the weights."""
    return float(sum(one.detach().double().abs().mean() for one in segmenter.model.parameters()))


def _answers(
    examiner: Examiner, image_ids: Sequence[int], tasks: tuple[str, ...], file: Path | None = None, asked=None
) -> Iterator[dict]:
    """Return the record of each image, in order: from the file if it is there, else computed and written to it."""
    done = {} if file is None else read_records(file, asked)
    for image_id in tqdm(image_ids, desc="evaluating"):
        if image_id not in done:
            record = examiner.ask(image_id, tasks)
            if file is None:
                yield record
                continue
            with refused(file), file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
            done[image_id] = record
        yield done[image_id]


def read_records(file: Path, asked: dict, key: str = "image_id") -> dict[Any, dict]:
    """Return the records of an interrupted evaluation; starts the file if there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asked) + "\n")
        return {}
    first, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
    if first != json.dumps(asked):
        raise InputError(
            f"{file.parent} has another evaluation (of another model, data set or options); pass another --output."
        )
    records = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # an incomplete last line
            continue
        records[record[key]] = record
    whole = "".join(f"{json.dumps(one)}\n" for one in [asked, *records.values()])
    write_text(file, whole)
    return records


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_text(path, text)
