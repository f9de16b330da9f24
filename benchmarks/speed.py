"""Cost of text queries, everything and refinement relative to one encoding of the image, at the shapes of SAM 2-tiny.

Weights are random, since time does not depend on them. All runs take turns in one process, so that ratios are
reliable on a busy machine even if seconds are not. The ratios of ovsam-tiny are printed too.

    python benchmarks/speed.py [--threads 2] [--repeats 5] [--skip-pipeline]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers import Sam2Config, Sam2Model, Sam2Processor, pipeline
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor

import ovsam
from ovsam.checkpoints.text_tower import text_config
from ovsam.modeling.clip import DualEncoderConfig

WORD_COUNTS = (1, 100, 1203, 21841)
INSTANCES = 20  # a fixed number, since the cost of refinement is not that of the text queries
OBJECTS = 100


def random_model(sam_config: Sam2Config | None = None) -> ovsam.OVSamModel:
    """SAM 2.1-tiny's encoder and decoder, or those of another configuration, and adapters on its pyramid (composition
    "sam")."""
    torch.manual_seed(0)
    adapter = {"in_channels": [256] * 4, "embed_dim": 384, "width": 128}  # as wide as the text tower
    config = ovsam.OVSamConfig(
        composition="sam",
        sam_config=sam_config or Sam2Config(),
        clip_config=DualEncoderConfig(text_config=text_config(), embed_dim=384),
        clip2sam_config=ovsam.Clip2SamConfig(**adapter),
        concepts_config=ovsam.ConceptHeadConfig(**adapter),
        nms_threshold=1.0,  # random proposals overlap at random; none is suppressed
        mask_nms_threshold=1.0,
        max_detections=INSTANCES,
    )
    return ovsam.OVSamModel(config).eval()


def compare(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns, so that load of the machine affects all of them."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def report(times: dict[str, list[float]], base: str) -> None:
    """Median seconds, and the ratio to `base`, round by round: median, minimum and maximum."""
    for name, seconds in times.items():
        ratios = np.array(seconds) / np.array(times[base])
        spread = f"({ratios.min():.3f}-{ratios.max():.3f})"
        print(f"  {name:<48}{np.median(seconds):>9.3f} s  x {np.median(ratios):.3f}  {spread}")


@torch.no_grad()
def words(model: ovsam.OVSamModel, pixels: torch.Tensor, repeats: int) -> None:
    width = model.concepts.config.embed_dim
    vocabularies = {n: torch.nn.functional.normalize(torch.randn(n, width), dim=-1) for n in WORD_COUNTS}

    def asking(embeds: torch.Tensor) -> Callable[[], object]:
        return lambda: model(pixel_values=pixels, text_embeds=embeds, proposal_threshold=0.0)

    times = compare({f"{n:,} words": asking(embeds) for n, embeds in vocabularies.items()}, repeats)
    report(times, "1 words")


@torch.no_grad()
def everything(model: ovsam.OVSamModel, pixels: torch.Tensor, repeats: int) -> None:
    embeds = torch.nn.functional.normalize(torch.randn(1203, model.clip.embed_dim), dim=-1)
    model.config.max_detections = OBJECTS

    def asking(refine: bool) -> Callable[[], object]:
        def run():
            outputs = model(
                pixel_values=pixels, text_embeds=embeds, everything=True, refine=refine, proposal_threshold=0.0
            )
            assert outputs.pred_masks.shape[1] == OBJECTS

        return run

    times = compare(
        {
            "one image encoding": lambda: model.sam.encode(pixels),
            f"everything, {OBJECTS} objects, unrefined": asking(False),
            f"everything, {OBJECTS} objects, refined": asking(True),
        },
        repeats,
    )
    report(times, "one image encoding")


@torch.no_grad()
def fusing(repeats: int) -> None:
    """ovsam-tiny as it is loaded, and fused for inference (`Segmenter.fuse`): an encoding, and ten words."""
    plain, fused = ovsam.load("ovsam-tiny").model, ovsam.load("ovsam-tiny").fuse().model
    pixels = torch.randn(1, 3, plain.sam.image_size, plain.sam.image_size)
    embeds = torch.nn.functional.normalize(torch.randn(10, plain.clip.embed_dim), dim=-1)
    for model in (plain, fused):
        model.config.nms_threshold = model.config.mask_nms_threshold = 1.0
        model.config.max_detections = INSTANCES
    for question, ask in (
        ("encoding", lambda model: model.encode(pixels)),
        ("10 words", lambda model: model(pixel_values=pixels, text_embeds=embeds, proposal_threshold=0.0)),
    ):
        runs = {f"{question}, {name}": partial(ask, model) for name, model in (("plain", plain), ("fused", fused))}
        report(compare(runs, repeats), f"{question}, plain")


@torch.no_grad()
def against_pipeline(model: ovsam.OVSamModel, size: int) -> None:
    """transformers' mask-generation over its own Sam2Model with the same weights, once, since it takes minutes. Random
    masks do not pass its thresholds, so that its work after the decoder is not included."""
    stock = Sam2Model(model.config.sam_config).eval()
    stock.load_state_dict(model.sam.model.state_dict())
    processor = Sam2Processor(Sam2ImageProcessor(size={"height": size, "width": size}))
    generate = pipeline("mask-generation", model=stock, image_processor=processor.image_processor, processor=processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))
    start = time.perf_counter()
    generate(picture, points_per_batch=64, points_per_crop=32)
    stock_seconds = time.perf_counter() - start
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    embeds = torch.nn.functional.normalize(torch.randn(1203, model.clip.embed_dim), dim=-1)
    model.config.max_detections = OBJECTS
    start = time.perf_counter()
    model(pixel_values=pixels, text_embeds=embeds, everything=True, proposal_threshold=0.0)
    own = time.perf_counter() - start
    print(f"  mask-generation, 32 x 32 points: {stock_seconds:.1f} s")
    print(f"  everything, {OBJECTS} objects, refined and named: {own:.1f} s; x {stock_seconds / own:.1f} faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-pipeline", action="store_true", help="leave out the comparison that takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print("ovsam-tiny, fused for inference against as it is loaded")
    fusing(arguments.repeats)
    tiny = ovsam.load("ovsam-tiny").model
    tiny.config.nms_threshold = tiny.config.mask_nms_threshold = 1.0
    tiny.config.max_detections = INSTANCES
    for name, model in (("SAM 2-tiny, 1024 px, random weights", random_model()), ("ovsam-tiny, 512 px", tiny)):
        side = model.sam.image_size
        pixels = torch.randn(1, 3, side, side)
        print(f"{name}: words -> masks, {INSTANCES} instances, 300 locations, vocabulary cached")
        words(model, pixels, arguments.repeats)
        print(f"{name}: everything, named from 1,203 words")
        everything(model, pixels, arguments.repeats)
        if not arguments.skip_pipeline and model is not tiny:
            print(f"{name}: against transformers' mask-generation pipeline")
            against_pipeline(model, side)


if __name__ == "__main__":
    main()
