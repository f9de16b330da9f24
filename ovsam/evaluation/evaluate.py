"""`ovsam eval`: the figures of a model on a data set, as a table, a json and a page.

The definitions of the figures stand in `summary.py`, those of the metrics in `metrics.py` and `metrics_ap.py`.
"""

import json
import math
import platform
import resource
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pycocotools.coco import COCO
from tqdm import tqdm

from ovsam.errors import InputError
from ovsam.evaluation.datasets import ABSENT_WORDS, EvalSet, open_set
from ovsam.evaluation.report import COLUMNS, columns, write_report
from ovsam.evaluation.summary import Figures, summarise
from ovsam.evaluation.tasks import Examiner
from ovsam.evaluation.timing import measure_time
from ovsam.inference.segmenter import Segmenter, load
from ovsam.ops.files import write_text

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
    """Measure a model, print the table, and write what was asked for.

    Args:
        dataset: a COCO or LVIS json, or a folder with `annotations.json`.
        tasks: some of TASKS; "time" is not about the images but about the number of words.
        images: the folder of the pictures; default: that of the json.
        output: a folder for the records, the results and the page; an evaluation that was stopped goes on there.
        json_path: also write the results there.
        limit: only the first images.
        absent: how many absent words are asked of each image; None for all of them.
        baselines: also measure what needs no training: CLIP's names of masks and crops, and clip-dense.

    Raises:
        InputError: no such data set, picture or model, or a folder that holds another evaluation.
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
    print(f"\n{segmenter.name} on {dataset}, {len(records)} pictures; {results['mode']}\n")
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
    """The figures of a model that is loaded, on a json that is read."""
    examiner = Examiner(segmenter, EvalSet(coco, folder), baselines=baselines)
    records = list(_answers(examiner, sorted(coco.imgs)[:limit], tuple(tasks)))
    return summarise(records, examiner.data, segmenter.model.config.score_threshold)


def table(figures: Figures) -> str:
    """One row a figure: over all, over classes, by split and by size; what there is nothing to measure on is blank."""
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
    """How the seconds and the memory came about."""
    if segmenter.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of its memory at most"
        where = f"{torch.cuda.get_device_name(segmenter.device)}, {memory}"
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB resident at most"
        where = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {memory}"
    return f"{str(segmenter.dtype).removeprefix('torch.')}, one picture at a time, {where}"


def fingerprint(segmenter: Segmenter) -> float:
    """A number that changes with the weights."""
    return float(sum(one.detach().double().abs().mean() for one in segmenter.model.parameters()))


def _answers(
    examiner: Examiner, image_ids: Sequence[int], tasks: tuple[str, ...], file: Path | None = None, asked=None
) -> Iterator[dict]:
    """A record of each image, in order: read from the file if it is there, else asked and written to it."""
    done = {} if file is None else _read_records(file, asked)
    for image_id in tqdm(image_ids, desc="evaluating"):
        if image_id not in done:
            record = examiner.ask(image_id, tasks)
            if file is None:
                yield record
                continue
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
            done[image_id] = record
        yield done[image_id]


def _read_records(file: Path, asked: dict) -> dict[int, dict]:
    """The records of an evaluation that was stopped; begins the file if there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asked) + "\n")
        return {}
    first, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
    if first != json.dumps(asked):
        raise InputError(
            f"{file.parent} holds another evaluation (of another model, data set or options); pass another --output."
        )
    records = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written when it was stopped
            continue
        records[record["image_id"]] = record
    whole = "".join(f"{json.dumps(one)}\n" for one in [asked, *records.values()])
    write_text(file, whole)
    return records


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_text(path, text)
