"""The page of an evaluation: one HTML file without further files."""

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ovsam.evaluation import metrics_ap as ap
from ovsam.evaluation.datasets import EvalSet
from ovsam.evaluation.metrics import boundary, reliability
from ovsam.evaluation.summary import Figures, judge_words
from ovsam.ops import rle
from ovsam.ops.files import write_whole
from ovsam.processing.images import open_image

COLUMNS = ("class average", "base", "novel", "small", "medium", "large")
SHOWN = 6  # images in a row
SIDE = 190  # side of an image in pixels
CONTEXT = 0.7  # shown on each side of the centre, relative to the longer side of the object
OUTLINE = 2.0  # pixels
PREDICTED, TRUE = np.array([255, 0, 120]), np.array([0, 220, 90])
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } tr.first > * { border-top: 2px solid #999 }
code { background: #f2f2f2; padding: .1em .3em; overflow-wrap: anywhere } .note { color: #666 }
.wide { overflow-x: auto } .charts { display: flex; flex-wrap: wrap; gap: 1em }
.row { display: grid; gap: .8em; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)) }
figure { margin: 0 } figcaption { font-size: 13px }
figure img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f2f2f2 }
"""


def columns(figures: Figures) -> dict[str, dict[str, float]]:
    """Group figures by their name up to the comma; the rest is the column, '' for the average over all."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        title, _, column = name.rpartition(", ")
        title, column = (title, column) if column in COLUMNS else (name, "")
        rows.setdefault(title, {})[column] = value
    return rows


def write_report(path: Path, results: dict, records: Sequence[dict], data: EvalSet) -> None:
    """results: as `run_eval` writes them; records: of all images."""
    parts = [
        f"<h1>{escape(results['model'])} on {escape(results['dataset'])}</h1>",
        f"<p><code>{escape(results['command'])}</code><br>{results['pictures']} images; {escape(results['mode'])}; "
        "definitions: docs/evaluation.md</p>",
        _table(results["figures"]),
    ]
    rows = [(record["image_id"], row) for record in records for row in record.get("prompts", {}).get("objects", ())]
    charts = []
    if rows:
        scores, right = [row["score"] for _, row in rows], [row["rank"]["box"] < 1 for _, row in rows]
        charts.append(_reliability(scores, right, "Class names of box prompts"))
    if words := [record for record in records if "words" in record]:
        scores, right, _, _ = judge_words(words, data, results["score_threshold"])
        charts.append(_reliability(scores, right, "Text queries: returned instances"))
        charts.append(_precision(words, data))
    if charts:
        parts += ["<h2>Calibration, precision and recall</h2>", f'<div class="charts">{"".join(charts)}</div>']
    if rows:
        by_iou = sorted(rows, key=lambda one: one[1]["iou"]["box"])
        wrong = sorted((one for one in rows if one[1]["rank"]["box"]), key=lambda one: -one[1]["score"])
        parts.append('<p class="note">Predicted mask: pink. Outline of the ground truth: green.</p>')
        for title, chosen in (
            ("Lowest IoU of box prompts", by_iou),
            ("Highest IoU of box prompts", by_iou[::-1]),
            ("Wrong class names with the highest scores", wrong),
        ):
            shown = "".join(_picture(data, *one) for one in _one_an_image(chosen))
            parts += [f"<h2>{title}</h2>", f'<div class="row">{shown or "None."}</div>']
    title = escape(f"{results['model']} on {results['dataset']}")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
    page = f"<!doctype html><html lang=en>{head}<title>{title}</title><style>{STYLE}</style>" + "\n".join(parts)
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _table(figures: Figures) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("figure", "all", *COLUMNS))
    lines, last = [], ""
    for title, row in columns(figures).items():
        task = re.split(r"[:,(]", title)[0].strip()  # a line above the first row of each task
        first, last = " class=first" * (task != last), task
        cells = (f"{round(row[name], 3) + 0.0:.3f}" if name in row else "" for name in ("", *COLUMNS))
        lines.append(f"<tr{first}><td>{escape(title)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _one_an_image(rows: Sequence[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """Return the first rows, at most one for each image."""
    first: dict[int, dict] = {}
    for image_id, row in rows:
        first.setdefault(image_id, row)
    return list(first.items())[:SHOWN]


def _picture(data: EvalSet, image_id: int, row: dict) -> str:
    """The surroundings of an object, with the predicted mask and the outline of the true one."""
    whole = open_image(data.picture(image_id))
    x, y, width, height = data.coco.anns[row["id"]]["bbox"]
    half, cx, cy = max(16.0, CONTEXT * max(width, height)), x + width / 2, y + height / 2
    window = (
        max(0, int(cx - half)),
        max(0, int(cy - half)),
        min(whole.width, int(cx + half)),
        min(whole.height, int(cy + half)),
    )
    scale = 2 * SIDE / max(window[2] - window[0], window[3] - window[1])  # twice the pixels, for fine screens
    size = [max(1, round(scale * (window[i + 2] - window[i]))) for i in (0, 1)]
    masks = rle.decode(row["mask"]), data.coco.annToMask(data.coco.anns[row["id"]]).astype(bool)
    mask, truth = (np.asarray(Image.fromarray(one).crop(window).resize(size)) for one in masks)
    image = np.asarray(whole.crop(window).resize(size)).astype(float)
    image[mask] = 0.5 * image[mask] + 0.5 * PREDICTED
    image[boundary(truth, 2 * OUTLINE / math.hypot(*size))] = TRUE
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=85)
    source = base64.b64encode(buffer.getvalue()).decode()
    told = escape(f"{data.words[row['class']]}: IoU {row['iou']['box']:.2f}; named {row['name']} ({row['score']:.2f})")
    return f'<figure><img src="data:image/jpeg;base64,{source}" alt=""><figcaption>{told}</figcaption></figure>'


def _reliability(scores: Sequence[float], right: Sequence[bool], title: str) -> str:
    """Accuracy against the mean score of each bin; the area of a dot grows with its count."""
    mean, share, count = reliability(scores, right)
    dots = [
        (x, y, 2 + 10 * float(np.sqrt(n / max(len(scores), 1)))) for x, y, n in zip(mean, share, count, strict=True)
    ]
    return _chart(f"{title} ({len(scores)})", "score", "accuracy", [("#bbb", [(0, 0), (1, 1)])], dots)


def _precision(records: Sequence[dict], data: EvalSet) -> str:
    """Precision at each recall at IoU 0.5 and 0.75, averaged over the classes that are present in some image."""
    found = [one for record in records for one in record["words"]["found"]]
    matched = ap.match(ap.compare(data.truth([record["image_id"] for record in records]), found))
    curves = np.mean([ap.precision_curve(one) for one in matched.values()] or [np.zeros((10, 101))], 0)
    lines = [(colour, list(zip(ap.RECALLS, curves[t], strict=True))) for colour, t in (("#07c", 0), ("#e70", 5))]
    return _chart("Text queries: IoU 0.5 blue, 0.75 orange", "recall", "precision", lines)


def _chart(title: str, x: str, y: str, lines, dots=()) -> str:
    """Lines [(colour, points)] and dots [(x, y, radius)] over the unit square."""
    side, margin = 260, 40

    def place(px: float, py: float) -> str:
        return f"{margin + side * px:.1f},{margin + side * (1 - py):.1f}"

    shapes = [f'<rect x={margin} y={margin} width={side} height={side} fill=none stroke="#999"/>']
    for colour, points in lines:
        path = " ".join(place(*point) for point in points)
        shapes.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=2 />')
    for px, py, radius in dots:
        cx, cy = place(px, py).split(",")
        shapes.append(f'<circle cx={cx} cy={cy} r={radius:.1f} fill="#07c" fill-opacity=0.6 />')
    text = 'font-size=12 text-anchor=middle fill="#444"'
    middle, whole = margin + side / 2, side + 2 * margin
    for tick in (0, 0.5, 1):
        across, down = place(tick, 0).split(",")[0], place(0, tick).split(",")[1]
        shapes.append(f"<text x={across} y={margin + side + 16} {text}>{tick:g}</text>")
        shapes.append(f"<text x={margin - 12} y={down} {text} dominant-baseline=middle>{tick:g}</text>")
    shapes += [
        f"<text x={middle} y=24 {text}>{escape(title)}</text>",
        f"<text x={middle} y={whole - 6} {text}>{x}</text>",
        f'<text transform="translate(14 {middle}) rotate(-90)" {text}>{y}</text>',
    ]
    return f"<svg width={whole} height={whole}>{''.join(shapes)}</svg>"
