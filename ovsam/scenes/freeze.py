"""Draws the frozen test set once: `python -m ovsam.scenes.freeze FOLDER` -> images/*.jpg and annotations.json (COCO).

Seeds are far from any recipe's, so no background or arrangement was seen in training. A quarter of the objects are of
novel words, and every synonym's target appears in three scenes or more. Beside COCO's fields, each annotation carries
`point` (the pixel deepest inside the mask: the one-click prompt), each category its `split`, each image 20
`absent_words` to ask in vain, and the file the `synonyms`.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from .drawing import SceneConfig, draw_scene
from .words import all_words, synonyms

SEED = 900_001
SCENES = 100
ABSENT_WORDS = 20
MIN_PIXELS = 64


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel farthest from everything outside `mask` [H, W] bool (Euclidean distance transform)."""
    inside = np.pad(mask, 1)
    h, w = inside.shape
    # Distance to the nearest outside pixel in the same column, then over columns: d2 = min(dx^2 + column^2).
    column = np.zeros((h, w))
    for y in range(1, h):
        column[y] = np.where(inside[y], column[y - 1] + 1, 0)
    for y in range(h - 2, -1, -1):
        column[y] = np.minimum(column[y], np.where(inside[y], column[y + 1] + 1, 0))
    x = np.arange(w)
    dx2 = (x[:, None] - x[None]) ** 2  # [w, w]
    rows = np.flatnonzero(inside.any(1))
    distance = np.stack([(dx2 + column[y] ** 2).min(1) for y in rows])  # [rows, w]
    best = np.unravel_index(distance.argmax(), distance.shape)
    return int(best[1]) - 1, int(rows[best[0]]) - 1


def related(word, other) -> bool:
    """Could a person call one by the other's name? Then neither is a fair absent word beside the other."""
    own = set(re.findall(r"[a-z']+", " ".join([word.name, *word.keywords])))
    return bool(own & set(re.findall(r"[a-z']+", other.name)))


def required_words(rng: np.random.Generator) -> list[list[int]]:
    """Per scene, the word ids that must appear: two novel ones, and the targets of the synonyms in turn."""
    words = all_words()
    position = {word.name: i for i, word in enumerate(words)}
    novel = [i for i, word in enumerate(words) if word.split == "novel"]
    targets = [position[name] for name in synonyms().values()]
    novel_queue = np.concatenate([rng.permutation(novel) for _ in range(2)])[: 2 * SCENES].reshape(SCENES, 2)
    target_queue = np.concatenate([rng.permutation(targets) for _ in range(4)])[:SCENES]
    return [[*map(int, row), int(target)] for row, target in zip(novel_queue, target_queue, strict=True)]


def main(folder: Path) -> None:
    words = all_words()
    base = np.array([i for i, word in enumerate(words) if word.split == "base"])
    config = SceneConfig()
    images, annotations, present = [], [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, required in enumerate(required_words(np.random.default_rng(SEED))):
        scene = draw_scene(SEED, index, base, config, required)
        name = f"{index:03d}.jpg"
        scene.image.save(folder / "images" / name, quality=92)
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
    rng = np.random.default_rng(SEED + 1)
    shown = sorted(set.union(*present))
    for image, ids in zip(images, present, strict=True):
        here = [words[i] for i in ids]
        fair = [
            i for i in shown if i not in ids and not any(related(w, words[i]) or related(words[i], w) for w in here)
        ]
        image["absent_words"] = [words[i].name for i in rng.choice(fair, ABSENT_WORDS, replace=False)]
    data = {
        "info": {"description": "EmojiScenes, frozen held-out scenes", "seed": SEED},
        "images": images,
        "categories": [{"id": i + 1, "name": word.name, "split": word.split} for i, word in enumerate(words)],
        "annotations": annotations,
        "synonyms": synonyms(),
    }
    (folder / "annotations.json").write_text(json.dumps(data, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
