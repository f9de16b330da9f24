"""`ovsam compare`: the results of two models on a COCO JSON file, side by side."""

from pathlib import Path

from ovsam.evaluation.datasets import open_set
from ovsam.evaluation.evaluate import measure, write_json
from ovsam.inference.loading import load

COMPARED = (
    "box: mean IoU",
    "click: mean IoU",
    "name (box): top-1",
    "name (box): top-5",
    "words -> masks: AP50",
    "words -> masks: AP",
    "absent words that return anything",
)
DECISIVE = ("name (box): top-1", "words -> masks: AP50")
MARGIN = 0.01  # smaller differences are ignored


def run_compare(base, tuned, data, images=None, json_path=None, limit=None, device=None) -> bool:
    """Evaluate two models on a COCO JSON file and print their results side by side.

    Returns:
        whether the second beats the first: it is better in classifying masks or in text queries, and worse in neither.

    Raises:
        InputError: the model, the JSON file or the folder does not exist.
    """
    opened = open_set(data, images)
    figures = []
    for name in (base, tuned):
        segmenter = load(name, device=device)
        figures.append(measure(segmenter, opened.coco, opened.folder, limit, baselines=False))
    before, after = figures
    print(f"\n{min(limit or 10**9, len(opened.coco.imgs))} images of {data}\nbase: {base}\ntuned: {tuned}\n")
    print(f"{'':<40}{'base':>9}{'tuned':>9}{'change':>9}")
    for name in COMPARED:
        print(f"{name:<40}{before[name]:>9.3f}{after[name]:>9.3f}{after[name] - before[name]:>+9.3f}")
    changes = {name: after[name] - before[name] for name in DECISIVE}
    gained = [name for name, change in changes.items() if change >= MARGIN]
    lost = [name for name, change in changes.items() if change <= -MARGIN]
    better = bool(gained) and not lost
    print(f"\nThe tuned model {'beats' if better else 'does not beat'} the base: of {' and '.join(DECISIVE)},")
    print(f"better is {', '.join(gained) or 'neither'}, worse is {', '.join(lost) or 'neither'} (by {MARGIN} or more).")
    if json_path:
        write_json(Path(json_path), {str(base): before, str(tuned): after})
    return better
