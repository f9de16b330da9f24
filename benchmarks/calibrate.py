"""Chooses the default thresholds of a checkpoint on fresh scenes: `python benchmarks/calibrate.py hub/ovsam-tiny`.

The scenes come from a seed that neither training nor the frozen set uses, and hold base words only. The score
threshold is the lowest at which at most `--absent` of the absent words return anything; the objectness threshold
(everything mode) the one with the best F1 of boxes found. Prints both with what they cost, and writes them to --output
for hub/build.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou
from tqdm import tqdm

import ovsam
from ovsam.boxes import masks_to_boxes
from ovsam.evaluation import AP_FLOOR, ask
from ovsam.scenes.drawing import SceneConfig, draw_scene
from ovsam.scenes.freeze import related
from ovsam.scenes.words import all_words

SEED = 800_001


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--absent", type=float, default=0.03, help="share of absent words that may return something")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    segmenter = ovsam.load(arguments.model)
    words = all_words()
    base = np.array([i for i, word in enumerate(words) if word.split == "base"])
    _, embeds = segmenter.embed([word.name for word in words])
    present_scores, absent_scores, objects, locations = [], [], 0, []
    for index in tqdm(range(arguments.scenes), desc="calibrating"):
        scene = draw_scene(SEED, index, base, SceneConfig())
        picture = segmenter.encode(scene.image)
        present = sorted(set(scene.word_ids))
        here = [words[i] for i in present]
        rng = np.random.default_rng((SEED, index))
        absent = []
        while len(absent) < 20:
            i = int(rng.integers(len(words)))
            if i not in present and not any(related(w, words[i]) or related(words[i], w) for w in here):
                absent.append(i)
        names = [words[i].name for i in present + absent]
        found = ask(segmenter, picture, embeds[torch.tensor(present + absent)], names, AP_FLOOR)
        best = dict.fromkeys(names, 0.0)
        for name, score in zip(found["text_labels"], found["scores"].tolist(), strict=True):
            best[name] = max(best[name], score)
        present_scores += [best[words[i].name] for i in present]
        absent_scores += [best[words[i].name] for i in absent]

        masks = torch.from_numpy(np.stack([scene.index_map == i + 1 for i in range(len(scene.word_ids))]))
        truth = masks_to_boxes(masks[masks.flatten(1).sum(1) >= 64])
        outputs = segmenter.model(features=picture[1], everything=True, proposal_threshold=AP_FLOOR)
        taken = box_iou(outputs.pred_boxes[0], truth) > 0.5  # [I, objects], best proposal first
        for score, hits in zip(outputs.objectness[0].tolist(), taken, strict=True):
            locations.append((score, bool(hits.any())))
            taken = taken & ~hits  # an object is found once
        objects += len(truth)

    score = float(np.quantile(absent_scores, 1 - arguments.absent))
    found_share = float(np.mean(np.array(present_scores) >= score))
    grid = np.arange(0.05, 0.9, 0.01)
    f1 = [2 * sum(h for s, h in locations if s >= t) / (sum(s >= t for s, _ in locations) + objects) for t in grid]
    thresholds = {
        "score_threshold": round(score, 3),
        "proposal_threshold": round(0.65 * score, 3),  # the adapter's half may still lift a location
        "objectness_threshold": round(float(grid[int(np.argmax(f1))]), 3),
    }
    print(
        f"score >= {score:.3f}: {found_share:.3f} of present words return something, {arguments.absent} of absent ones"
    )
    print(f"objectness >= {thresholds['objectness_threshold']}: F1 of boxes {max(f1):.3f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(thresholds, indent=1) + "\n")


if __name__ == "__main__":
    main()
