"""The effect of fine-tuning ovsam-tiny on 50 images of new class names, on these and on other class names.

`python benchmarks/finetune_proof.py` draws two small COCO sets of pictograms on which ovsam-tiny was not trained (novel
words of EmojiScenes, with other seeds): one for training, one held out. It fine-tunes as `ovsam train
adapters/finetune/recipe.toml --data coco.json --images DIR` does, and prints figures before and after on both sets and
on the frozen one. An interrupted run continues when it is called again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

import ovsam
from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.scenes.words import all_words
from ovsam.evaluation.compare import COMPARED
from ovsam.evaluation.datasets import open_coco
from ovsam.evaluation.evaluate import measure
from ovsam.training.engine import train_recipe

ROOT = Path(__file__).resolve().parents[1]
SEEDS = {"train": 700_001, "held-out": 700_002}  # used by no recipe and not by the frozen set
SCENE = SceneConfig(min_objects=4, max_objects=8, min_size=48.0)
FROZEN = ROOT / "tests" / "data" / "emojiscenes-val"
ALSO_FROZEN = ("name (box): top-1, base", "words -> masks: AP50, base", "words -> masks: AP50, novel")


def draw_set(folder: Path, pictures: int, seed: int, word_ids: list[int]) -> Path:
    """Write a COCO json of scenes of these words, and its images beside it; returns the path of the json."""
    words, images, annotations = all_words(), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(pictures):
        scene = draw_scene(seed, index, np.array(word_ids), SCENE)
        name = f"{index:03d}.jpg"
        scene.image.save(folder / name, quality=92)
        images.append({"id": index + 1, "file_name": name, "width": SCENE.canvas, "height": SCENE.canvas})
        for i, word_id in enumerate(scene.word_ids):
            mask = scene.index_map == i + 1
            code = coco_mask.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": word_ids.index(word_id) + 1,
                    "bbox": coco_mask.toBbox(code).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(code["size"]), "counts": code["counts"].decode()},
                }
            )
    categories = [{"id": i + 1, "name": words[word_id].name} for i, word_id in enumerate(word_ids)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content, ensure_ascii=False))
    return folder / "coco.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=50, help="number of annotated training images")
    parser.add_argument("--held-out", type=int, default=25, help="number of held-out images of the same words")
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--steps", type=int, help="number of steps, instead of the recipe's")
    parser.add_argument("--limit", type=int, help="measure only the first N images of each set")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "finetune-proof")
    arguments = parser.parse_args()

    novel = [i for i, word in enumerate(all_words()) if word.split == "novel"]
    word_ids = sorted(np.random.default_rng(SEEDS["train"]).choice(novel, arguments.words, replace=False).tolist())
    print("new words: " + ", ".join(all_words()[i].name for i in word_ids))
    counts = {"train": arguments.pictures, "held-out": arguments.held_out}
    sets = {name: draw_set(arguments.output / name, counts[name], seed, word_ids) for name, seed in SEEDS.items()}
    tuned = train_recipe(
        ROOT / "adapters" / "finetune" / "recipe.toml",
        output=arguments.output / "model",
        resume=True,
        steps=arguments.steps,
        data=sets["train"],
        images=sets["train"].parent,
    )

    lines = ["| set | figure | before | after |", "|---|---|---|---|"]
    models = [ovsam.load("ovsam-tiny"), ovsam.load(tuned)]
    titles = {"train": "the training images", "held-out": "new class names, other images", "frozen": "frozen scenes"}
    for name, path in {**sets, "frozen": FROZEN / "annotations.json"}.items():
        coco = open_coco(path)
        before, after = (measure(model, coco, path.parent, arguments.limit) for model in models)
        figures = (*COMPARED, *ALSO_FROZEN) if name == "frozen" else COMPARED
        lines += [f"| {titles[name]} | {figure} | {before[figure]:.3f} | {after[figure]:.3f} |" for figure in figures]
    table = "\n".join(lines)
    print("\n" + table)
    (arguments.output / "table.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
