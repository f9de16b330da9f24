import numpy as np
import pytest
from pycocotools.coco import COCO

from ovsam.ops import rle


@pytest.fixture
def coco():
    """Two images; word 1 in both, word 2 in the second only, word 3 in none; and the masks of the three objects."""
    dataset, codes = COCO(), []
    annotations = []
    for i, (image, word, x) in enumerate([(1, 1, 0), (2, 1, 5), (2, 2, 20)]):
        mask = np.zeros((40, 40), bool)
        mask[5:30, x : x + 15] = True
        codes.append(rle.encode(mask))
        fixed = {"id": i + 1, "image_id": image, "category_id": word, "iscrowd": 0, "area": int(mask.sum())}
        annotations.append({**fixed, "segmentation": codes[-1], "bbox": list(rle.bbox(codes[-1]))})
    dataset.dataset = {
        "info": {},
        "images": [{"id": i, "width": 40, "height": 40} for i in (1, 2)],
        "categories": [{"id": i, "name": str(i), "split": "novel" if i == 2 else "base"} for i in (1, 2, 3)],
        "annotations": annotations,
    }
    dataset.createIndex()
    return dataset, codes
