"""Time of the whole model, and its dependence on the number of text queries."""

import numpy as np
import torch

from ovsam.evaluation.datasets import EvalSet
from ovsam.evaluation.tasks import timed
from ovsam.inference.segmenter import Segmenter
from ovsam.processing.images import open_image

PIXELS = ("pixel_values", "clip_pixel_values", "clip_window")


@torch.no_grad()
def measure_time(segmenter: Segmenter, data: EvalSet, repeats: int = 7) -> dict[str, float]:
    """Median seconds of the whole model on the first image of the set with ten text queries (image encoder, text
    encoder, proposals and refinement), and the time of 20,000 queries relative to one."""
    model, processor = segmenter.model, segmenter.processor
    first = next(image_id for image_id in sorted(data.coco.imgs) if data.objects(image_id)[0])
    present = dict.fromkeys(one["category_id"] for one in data.objects(first)[0])
    words = [data.words[i] for i in [*present, *data.absent(first)]][:10]
    inputs = processor(images=open_image(data.picture(first)), text=words)
    inputs = {
        name: inputs[name].to(model.device) for name in (*PIXELS, "input_ids", "attention_mask") if name in inputs
    }
    pixels = {name: inputs.pop(name) for name in PIXELS if name in inputs}
    # 20,000 cached embeddings: that of the first word, and random directions.
    one = model.get_text_features(**inputs)[:1]
    noise = torch.randn(19_999, one.shape[1], generator=torch.Generator().manual_seed(0)).to(one)
    many = torch.cat([one, torch.nn.functional.normalize(noise, dim=-1)])

    def seconds(**question) -> float:
        times = []
        for _ in range(repeats + 1):  # the first one is a warm-up
            times.append(timed(lambda: model(**pixels, **question), segmenter)[1])
        return float(np.median(times[1:]))

    return {
        "seconds per picture with 10 words": seconds(**inputs),
        # More queries find more instances to refine; in everything mode the number of instances is the same.
        "20,000 words / 1 word, model time": seconds(text_embeds=many) / seconds(text_embeds=one),
        "20,000 words / 1 word, naming everything": seconds(text_embeds=many, everything=True)
        / seconds(text_embeds=one, everything=True),
        "threads": float(torch.get_num_threads()),
    }
