"""Pictures of a run that goes on: its curves, and predictions beside the truth."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ovsam.ops.files import write_whole
from ovsam.results.results import Results
from ovsam.training.stages.predictions import Found

CURVES, SAMPLES = "curves.png", "samples.png"
UNTOLD = {"step", "epoch"}  # of a log line, what is no curve


def draw_curves(folder: Path, history: Sequence[dict]) -> bool:
    """curves.png from the Trainer's `log_history`: one panel a metric, held-out data beside the training batches. False
    if it cannot be drawn, because matplotlib is not installed or nothing was logged yet."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in history:
        if "train_runtime" in line:  # the summary at the end
            continue
        for name, value in line.items():
            if name not in UNTOLD and isinstance(value, int | float) and math.isfinite(value):
                kind = "held out" if name.startswith("eval_") else "training"
                points = curves.setdefault(name.removeprefix("eval_"), {}).setdefault(kind, [])
                points.append((line["step"], value))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not curves:
        return False
    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, kinds) in zip(panels, curves.items(), strict=False):
        for kind, points in sorted(kinds.items(), reverse=True):  # "training" first, so that it is always blue
            marker = "o" if kind == "held out" or len(points) == 1 else None
            colour = "tab:orange" if kind == "held out" else "tab:blue"
            panel.plot(*zip(*points, strict=True), label=kind, marker=marker, markersize=3, color=colour)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        if len(kinds) > 1:
            panel.legend(fontsize=7)
    for panel in panels[len(curves) :]:
        panel.axis("off")
    figure.supxlabel("step", fontsize=9)
    write_whole(folder / CURVES, lambda path: figure.savefig(path, dpi=110))
    return True


def draw_samples(folder: Path, rows: Sequence[tuple[dict, Found]], words: Sequence[str]) -> None:
    """Draw samples.png: images with the ground truth, each beside the predictions of the stage; two pairs a row.

    Args:
        rows: (a sample, (masks bool [n, h, w], word ids [n], scores [n])) for each image.
        words: class names by word id.
    """
    pairs = []
    for sample, found in rows:
        image = Image.fromarray(sample["image"].permute(1, 2, 0).cpu().numpy())  # [3, S, S] -> [S, S, 3]
        there = sample["masks"].flatten(1).any(1)
        true = (sample["masks"][there], sample["word_ids"][there], torch.ones(int(there.sum())))
        pairs.append((_overlay(image, true, words, "truth"), _overlay(image, found, words, "prediction")))
    side, gap, columns = pairs[0][0].width, 6, min(2, len(pairs))
    lines = math.ceil(len(pairs) / columns)
    pair_width = 2 * side + gap
    size = (columns * pair_width + 3 * gap * (columns - 1), lines * side + gap * (lines - 1))
    sheet = Image.new("RGB", size, "white")
    for i, pair in enumerate(pairs):
        x, y = (i % columns) * (pair_width + 3 * gap), (i // columns) * (side + gap)
        sheet.paste(pair[0], (x, y))
        sheet.paste(pair[1], (x + side + gap, y))
    write_whole(folder / SAMPLES, sheet.save)


def _overlay(image: Image.Image, found: Found, words: Sequence[str], title: str) -> Image.Image:
    side = max(384, image.width)  # room for names
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    masks, ids, scores = found
    seen = masks.flatten(1).any(1).cpu()
    masks, ids, scores = masks.cpu()[seen].numpy(), ids.cpu()[seen].tolist(), scores.cpu()[seen].tolist()
    if masks.size:
        large = [np.asarray(Image.fromarray(m).resize((side, side), Image.Resampling.NEAREST)) for m in masks]
        names = [words[i] if i >= 0 else "object" for i in ids]
        image = Results.from_arrays(large, names, ids, scores, scores, names, "auto").overlay(image)
    ImageDraw.Draw(image).text((6, 4), title, fill="white", stroke_width=2, stroke_fill="black", font_size=16)
    return image
