"""Draws a frozen test set: `python -m ovsam.data.scenes.freeze FOLDER` -> images/*.jpg, annotations.json (COCO).

Its seeds differ from those of all recipes, so backgrounds and arrangements are not in the training data. A quarter of
the objects have novel words, and the target of every synonym is in three scenes or more (of a hundred). In addition to
COCO's fields, each annotation has `point` (the pixel farthest from the boundary of the mask: the one-click prompt),
each category its `split`, each image 20 `absent_words` as negative queries, and the file the `synonyms`.

tests/data/emojiscenes-val has the first 60 scenes that were drawn with the defaults; tests/data/openmoji-val, in a
style that is not trained on, the first 24 of `--style openmoji --scenes 40 --seed 900101 --quality 90`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.scenes.styles import STYLES, drawable
from ovsam.data.scenes.words import all_words, synonyms
from ovsam.data.words import Word, related
from ovsam.ops.masks import deepest_point

SEED = 900_001
SCENES = 100
QUALITY = 92  # quality of the JPEG files
WORDS = 1373  # number of words in the frozen sets; later sequences are not in them
ABSENT_WORDS = 20
MIN_PIXELS = 64


def required_words(rng: np.random.Generator, words: Sequence[Word], drawn: set[int], scenes: int) -> list[list[int]]:
    """Return the required word ids of each scene: two novel ones, and the targets of the synonyms in turn."""
    position = {word.name: i for i, word in enumerate(words)}
    novel = [i for i, word in enumerate(words) if word.split == "novel" and i in drawn]
    targets = [i for i in (position[name] for name in synonyms().values()) if i in drawn]
    novel_queue = _in_turn(rng, novel, 2 * scenes).reshape(scenes, 2)
    target_queue = _in_turn(rng, targets, scenes)
    return [[*map(int, row), int(target)] for row, target in zip(novel_queue, target_queue, strict=True)]


def _in_turn(rng: np.random.Generator, ids: list[int], count: int) -> np.ndarray:
    """Repeat the ids, in a new random order each time, up to `count`."""
    return np.concatenate([rng.permutation(ids) for _ in range(-(-count // len(ids)))])[:count]


def freeze(folder: Path, style: str = "noto", scenes: int = SCENES, seed: int = SEED, quality: int = QUALITY) -> None:
    """Draw a set of scenes into the folder, in one of styles.STYLES, as JPEG files of the given quality."""
    words = all_words()[:WORDS]
    drawn = {i for i in drawable([style]) if i < WORDS}
    base = np.array([i for i, word in enumerate(words) if word.split == "base" and i in drawn])
    config = SceneConfig(styles=(style,))
    images, annotations, present = [], [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, required in enumerate(required_words(np.random.default_rng(seed), words, drawn, scenes)):
        scene = draw_scene(seed, index, base, config, required)
        name = f"{index:03d}.jpg"
        scene.image.save(folder / "images" / name, quality=quality)
        images.append({"id": index + 1, "file_name": f"images/{name}", "width": config.canvas, "height": config.canvas})
        ids = set()
        for i, word_id in enumerate(scene.word_ids):
            mask = scene.index_map == i + 1
            if mask.sum() < MIN_PIXELS:
                continue
            ids.add(word_id)
            rle = coco_mask.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": word_id + 1,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
                    "point": list(deepest_point(mask)),
                }
            )
        present.append(ids)
    rng = np.random.default_rng(seed + 1)
    shown = sorted(set.union(*present))
    for image, ids in zip(images, present, strict=True):
        here = [words[i] for i in ids]
        fair = [
            i for i in shown if i not in ids and not any(related(w, words[i]) or related(words[i], w) for w in here)
        ]
        image["absent_words"] = [words[i].name for i in rng.choice(fair, ABSENT_WORDS, replace=False)]
    data = {
        "info": {"description": "EmojiScenes, frozen held-out scenes", "seed": seed, "style": style},
        "images": images,
        "categories": [{"id": i + 1, "name": word.name, "split": word.split} for i, word in enumerate(words)],
        "annotations": annotations,
        "synonyms": synonyms(),
    }
    (folder / "annotations.json").write_text(json.dumps(data, ensure_ascii=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws a frozen test set once.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--style", choices=STYLES, default="noto")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--quality", type=int, default=QUALITY, help="quality of the JPEG files")
    arguments = parser.parse_args()
    freeze(arguments.folder, arguments.style, arguments.scenes, arguments.seed, arguments.quality)
