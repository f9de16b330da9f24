"""Puts measured figures into the documents: `python benchmarks/figures.py RESULTS.json`, from `ovsam eval --json`.

model_card.md has a `<!-- figures -->` line; the table after it is replaced. The model-index in its front matter and in
that of the adapters' cards, which the Hub reads, is replaced as well. `python hub/build.py --cards` then writes the
cards that are published.
"""

import json
import re
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("model_card.md",)
SIZES = ("small", "medium", "large")
# Rows: text, names of the figures in the results, format, targets.
ROWS = (
    ("box prompt: mean IoU of the mask", "box: mean IoU", "share", ">= 0.62, aim 0.75"),
    ("... small / medium / large", tuple(f"box: mean IoU, {s}" for s in SIZES), "share", ""),
    ("... mean boundary IoU", "box: boundary IoU", "share", ">= 0.50, aim 0.62"),
    ("one click: mean IoU", "click: mean IoU", "share", ">= 0.42, aim 0.52"),
    ("three clicks: mean IoU", "three clicks: mean IoU", "share", ">= 0.55, aim 0.66"),
    (
        "name of a boxed object among 80: top-1 / top-5",
        ("name (box): top-1", "name (box): top-5"),
        "share",
        ">= 0.58 / 0.82, aim 0.68 / 0.90",
    ),
    ("... top-1, averaged over classes", "name (box): top-1, class average", "share", ">= 0.48, aim 0.58"),
    ("... top-1, small / medium / large", tuple(f"name (box): top-1, {s}" for s in SIZES), "share", ""),
    (
        "... training-free, feature-crop / image-crop: top-1",
        ("name (feature-crop): top-1", "name (image-crop): top-1"),
        "share",
        "",
    ),
    (
        "name of a boxed object among 1,203: top-1 / top-5",
        ("name (box), 1,203 words: top-1", "name (box), 1,203 words: top-5"),
        "share",
        "",
    ),
    (
        "words -> masks, ten absent words asked as well: AP50 / AP",
        ("words -> masks: AP50", "words -> masks: AP"),
        "share",
        ">= 0.18 / 0.09, aim 0.32 / 0.18",
    ),
    ("... boundary AP", "words -> masks: boundary AP", "share", ""),
    ("... training-free, clip-dense: AP50", "words -> masks (clip-dense): AP50", "share", ""),
    ("absent words that return anything", "absent words that return anything", "percent", "<= 6 %, aim 3 %"),
    ("everything: recall at IoU 0.5 with 100 masks", "everything: recall", "share", ">= 0.40, aim 0.55"),
    ("... small / medium / large", tuple(f"everything: recall, {s}" for s in SIZES), "share", ""),
    (
        "calibration error of scores: words -> masks / names of boxed objects",
        ("words -> masks: calibration error", "name (box): calibration error"),
        "error",
        "<= 0.06, aim 0.04",
    ),
    ("a picture with 10 words, two CPU cores", "seconds per picture with 10 words", "seconds", "<= 0.5 s, aim 0.3 s"),
    ("20,000 cached words / 1 word, model time", "20,000 words / 1 word, model time", "ratio", "<= 1.5, aim 1.1"),
)
TABLE = re.compile(r"(<!-- figures -->\n)(\n?\|.*\n)*")  # the line that marks it, and the table after it
FORMATS = {"share": "{:.2f}", "error": "{:.3f}", "percent": "{:.1%}", "seconds": "{:.2f} s", "ratio": "{:.2f} x"}

# The figures of each published card's model-index, by the Hub's names of metrics.
MASKS = {"box: mean IoU": "mean_iou", "click: mean IoU": "mean_iou"}
NAMES = {"name (box): top-1, base": "accuracy", "name (box): top-5, novel": "accuracy"}
WORDS = {"words -> masks: AP50": "mean_average_precision", "words -> masks: AP": "mean_average_precision"}
CARDS = {
    "model_card.md": ("ovsam-tiny", MASKS | NAMES | WORDS),
    "adapters/clip2sam-tiny/README.md": ("clip2sam-tiny", NAMES),
    "adapters/concepts-tiny/README.md": ("concepts-tiny", WORDS),
}


def read(results: Path) -> dict[str, float]:
    """The figures that `ovsam eval --json` wrote."""
    content = json.loads(results.read_text())
    return content.get("figures", content)


def table(figures: dict[str, float]) -> str:
    """The table of the figures that were measured."""
    lines = ["| figure | measured | target |", "|---|---|---|"]
    for text, names, kind, target in ROWS:
        names = (names,) if isinstance(names, str) else names
        if not set(names) <= figures.keys():
            continue
        values = " / ".join(FORMATS[kind].format(figures[name]) for name in names)
        lines.append(f"| {text} | {values} | {target} |")
    return "\n".join(lines)


def with_index(card: str, name: str, metrics: dict[str, str], figures: dict[str, float]) -> str:
    """A card with these figures as the model-index of its front matter."""
    made = ModelCard(card)
    made.data.model_name = name
    made.data.metrics = sorted(set(metrics.values()))
    made.data.eval_results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type="coco",
            dataset_name="60 photographs of COCO",
            dataset_split="test",
            metric_type=metric,
            metric_name=figure,
            metric_value=figures[figure],
        )
        for figure, metric in metrics.items()
        if figure in figures
    ]
    return str(made)


def main(results: Path) -> None:
    figures = read(results)
    rows = table(figures)
    for name in DOCUMENTS:
        path = ROOT / name
        text = TABLE.sub(lambda found: f"{found.group(1)}\n{rows}\n", path.read_text())
        path.write_text(text)
    for name, (model, metrics) in CARDS.items():
        path = ROOT / name
        path.write_text(with_index(path.read_text(), model, metrics, figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
