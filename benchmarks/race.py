"""Words -> masks against the models that people use for it, as they come in transformers: CPU seconds and ratios.

    python benchmarks/race.py [--peers grounding-dino owlv2 clipseg sam3] [--words 16] [--instances 20] [--repeats 3]

All run in this one process, in turns, on one picture, in float32 on one thread; weights are random, since time does not
depend on them, and so is the picture. Each call encodes the picture and the words, finds, and decodes the masks of
`--instances` boxes. Seconds are CPU time of this process, which other work on the machine changes little.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from speed import random_model
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Sam2Config,
    Sam2Model,
    Sam3Config,
    Sam3Model,
)

SIDE = 1024
TOKENS = 4  # of a word, with those that begin and end it


def boxes_of(count: int) -> torch.Tensor:
    """[1, count, 4] xyxy in pixels, the same for everybody: what is found does not change the time."""
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(count, 2, generator=generator) * 700, 40 + torch.rand(count, 2, generator=generator) * 280
    return torch.cat([corner, corner + size], 1)[None]


def random_ids(words: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(1000, min(vocabulary, 20_000), (words, TOKENS))


def sam2(instances: int) -> Callable[[], object]:
    """transformers' SAM 2-tiny alone: one encoding, and the masks of the boxes."""
    model, pixels, boxes = Sam2Model(Sam2Config()).eval(), torch.randn(1, 3, SIDE, SIDE), boxes_of(instances)
    return lambda: model(pixel_values=pixels, input_boxes=boxes, multimask_output=False)


def ours(words: int, instances: int) -> Callable[[], object]:
    model = random_model()
    model.config.max_detections = instances
    pixels, ids = torch.randn(1, 3, SIDE, SIDE), random_ids(words, model.config.clip_config.text_config.vocab_size)

    def run():
        outputs = model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), proposal_threshold=0.0)
        assert outputs.pred_masks.shape[1] == instances

    return run


def grounding_dino(words: int, instances: int) -> Callable[[], object]:
    """Grounding DINO-T reads all words as one sentence; SAM 2-tiny decodes its boxes."""
    detector, segment = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval(), sam2(instances)
    pixels = torch.randn(1, 3, 800, 800)  # the shorter side of its processor
    parts = random_ids(words, 30_522)[:, : TOKENS - 2].tolist()
    ids = torch.tensor([[101, *(token for part in parts for token in (*part, 1012)), 102]])  # [CLS] word . word . [SEP]

    def run():
        detector(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        segment()

    return run


def owlv2(words: int, instances: int) -> Callable[[], object]:
    """OWLv2 base, patches of 16, at its 960 px; SAM 2-tiny decodes its boxes."""
    detector, segment = Owlv2ForObjectDetection(Owlv2Config(vision_config={"image_size": 960})).eval(), sam2(instances)
    pixels, ids = torch.randn(1, 3, 960, 960), random_ids(words, 49_408)

    def run():
        detector(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        segment()

    return run


def clipseg(words: int, instances: int) -> Callable[[], object]:
    """CLIPSeg of patches of 16 at its 352 px: one map a word, no instances; the picture goes in once a word."""
    model = CLIPSegForImageSegmentation(CLIPSegConfig(vision_config={"patch_size": 16})).eval()
    pixels, ids = torch.randn(1, 3, 352, 352).expand(words, -1, -1, -1), random_ids(words, 49_408)
    return lambda: model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))


def sam3(words: int, instances: int) -> Callable[[], object]:
    """SAM 3 at its 1,008 px: one encoding of the picture, one pass of the rest a word."""
    model = Sam3Model(Sam3Config()).eval()
    pixels, ids = torch.randn(1, 3, 1008, 1008), torch.randint(1000, 20_000, (words, 32))

    def run():
        features = model.get_vision_features(pixel_values=pixels)
        for word in ids:
            model(vision_embeds=features, input_ids=word[None], attention_mask=torch.ones_like(word[None]))

    return run


PEERS = {
    "grounding-dino": ("Grounding DINO-T + SAM 2-tiny", grounding_dino),
    "owlv2": ("OWLv2-base + SAM 2-tiny", owlv2),
    "clipseg": ("CLIPSeg (no instances)", clipseg),
    "sam3": ("SAM 3", sam3),
}


@torch.no_grad()
def race(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each run, taken in turns after one that warms up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    asked = arguments.words, arguments.instances
    encoder, pixels = random_model().sam, torch.randn(1, 3, SIDE, SIDE)
    ovsam = "ovsam, SAM 2-tiny shapes"
    runs = {ovsam: ours(*asked), "one encoding of SAM 2-tiny": lambda: encoder.encode(pixels)}
    runs["SAM 2-tiny alone, boxes given"] = sam2(arguments.instances)
    runs |= {PEERS[name][0]: PEERS[name][1](*asked) for name in arguments.peers}
    times = race(runs, arguments.repeats)
    print(
        f"{asked[0]} words -> {asked[1]} masks; CPU seconds of one thread, random weights, {arguments.repeats} rounds"
    )
    for name, seconds in times.items():
        ratios = np.array(seconds) / np.array(times[ovsam])
        spread = f"({ratios.min():.2f}-{ratios.max():.2f})"
        print(f"  {name:<34}{np.median(seconds):>8.2f} s   x {np.median(ratios):.2f}  {spread}")


if __name__ == "__main__":
    main()
