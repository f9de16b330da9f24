"""Comparison of non-maximum suppression: each kind of `ovsam.ops.nms.NMS` on the same proposals.

    python benchmarks/nms.py [--model ovsam-tiny] [--data tests/data/emojiscenes-val] [--crowded 25] [--loose 0.9]

Every image is queried for its words and its absent words, as in `ovsam eval`, and the kinds are compared by mask AP.
`--crowded N` takes only the N most crowded images, by the mean over their objects of the highest box IoU with another
object. The model suppresses proposals before it refines them, by its own thresholds; further rows have both thresholds
at `--loose`, so that more overlapping objects, and more duplicates, reach post-processing.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou
from tqdm import tqdm

import ovsam
from ovsam.evaluation.datasets import open_set
from ovsam.evaluation.metrics_ap import average_precision
from ovsam.evaluation.tasks import ap_floor
from ovsam.ops import rle
from ovsam.ops.nms import NMS
from ovsam.processing.vocabulary import Vocabulary


def crowding(boxes: list[list[float]]) -> float:
    """Boxes xywh of the objects of an image -> the mean of their highest IoU with another one."""
    corners = box_convert(torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), "xywh", "xyxy")
    return float(box_iou(corners, corners).fill_diagonal_(0).amax(1).mean()) if boxes else 0.0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ovsam-tiny")
    parser.add_argument("--data", type=Path, default=Path("tests/data/emojiscenes-val"))
    parser.add_argument("--crowded", type=int, help="number of images, the most crowded ones (default: all images)")
    parser.add_argument("--loose", type=float, default=0.9)
    arguments = parser.parse_args()

    segmenter, data = ovsam.load(arguments.model), open_set(arguments.data)
    config, floor = segmenter.model.config, ap_floor(segmenter)
    own = config.nms_threshold, config.mask_nms_threshold
    class_of = {word: i for i, word in data.words.items()}
    _, embeds = segmenter.embed(Vocabulary(list(class_of)))
    row = {class_id: i for i, class_id in enumerate(class_of.values())}

    objects = {i: data.objects(i)[0] for i in data.coco.imgs}
    crowded = {i: crowding([a["bbox"] for a in found]) for i, found in objects.items() if found}
    chosen = sorted(crowded, key=crowded.__getitem__, reverse=True)[: arguments.crowded]
    detections: dict[tuple, list[dict]] = defaultdict(list)
    for image_id in tqdm(chosen):
        asked = list(dict.fromkeys(a["category_id"] for a in objects[image_id])) + data.absent(image_id)
        image = segmenter.encode(data.picture(image_id))
        for proposals, thresholds in (("own", own), ("loose", (arguments.loose,) * 2)):
            config.nms_threshold, config.mask_nms_threshold = thresholds
            outputs = segmenter.model(
                features=image.features,
                text_embeds=embeds[[row[i] for i in asked]],
                text_labels=[data.words[i] for i in asked],
                proposal_threshold=min(floor, config.proposal_threshold),
            )
            found = segmenter.processor.post_process_instance_segmentation(
                outputs, threshold=floor, target_sizes=[image.image.size[::-1]], nms=None, return_coco_annotation=True
            )[0]
            overlap = torch.from_numpy(rle.iou(found["masks"], found["masks"]))
            for kind in (*NMS, None):
                left = found["scores"] if kind is None else NMS[kind](overlap, found["scores"], own[1])
                rows = zip(found["text_labels"], left.tolist(), found["masks"], strict=True)
                detections[proposals, kind] += [
                    {"image_id": image_id, "category_id": class_of[label], "score": score, "segmentation": mask}
                    for label, score, mask in rows
                    if score >= floor
                ]
    truth = data.truth(chosen)
    density = np.mean([crowded[i] for i in chosen])
    print(f"\n{segmenter.name} on {len(chosen)} images of {arguments.data}")
    print(f"mean of the highest box IoU of an object with another: {density:.2f}\n")
    print(f"{'proposals':<11}{'NMS':<10}{'AP':>7}{'AP50':>7}{'instances':>11}")
    for (proposals, kind), found in detections.items():
        figures = average_precision(truth, found)
        print(f"{proposals:<11}{kind or 'none':<10}{figures['AP']:>7.3f}{figures['AP50']:>7.3f}{len(found):>11}")


if __name__ == "__main__":
    main()
