"""Cost of text queries, everything and refinement relative to one encoding of the image, at the shapes of SAM 2-tiny.

Weights are random, since time does not depend on them. All runs take turns in one process, so that ratios are
reliable on a busy machine even if seconds are not. The ratios of ovsam-tiny are printed too.

    python benchmarks/speed.py [--threads 2] [--repeats 5] [--skip-pipeline] [--only-tiny] [--onnx DIR] [--compile]
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Sam2Config, Sam2Model, Sam2Processor, pipeline
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor

import ovsam
from ovsam.checkpoints.onnx_export import export_onnx
from ovsam.checkpoints.onnx_int8 import quantise
from ovsam.checkpoints.text_tower import text_config
from ovsam.inference.onnx import OnnxSegmenter
from ovsam.inference.questions import Questions
from ovsam.modeling.clip import DualEncoderConfig
from ovsam.processing.vocabulary import Vocabulary

WORD_COUNTS = (1, 100, 1203, 21841)
INSTANCES = 20  # a fixed number, since the cost of refinement is not that of the text queries
OBJECTS = 100
PHOTO = Path(__file__).resolve().parents[1] / "tests" / "data" / "photos-val" / "images" / "000000000086.jpg"
TEN_WORDS = ["person", "dog", "car", "chair", "bottle", "tennis racket", "bird", "cup", "boat", "clock"]


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
    """CPU seconds of each run, which other work on the machine changes little, taken in turns."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def report(times: dict[str, list[float]], base: str) -> None:
    """Median CPU seconds, and the ratio to `base`, round by round: median, minimum and maximum."""
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


def runtimes(threads: int, repeats: int, compiled: bool, folder: Path | None) -> None:
    """ovsam-tiny as it is loaded, with its masks refined, fused for inference (`Segmenter.fuse`), and exported (`ovsam
    export`): an encoding, and the whole call with ten words, from the photograph to the results."""
    image = Image.open(PHOTO).convert("RGB")
    eager, fused = (ovsam.load("ovsam-tiny", device="cpu") for _ in range(2))
    fused.fuse()
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "onnx"
            export_onnx(eager.model, eager.processor, folder, "ONNX")
        small = Path(shutil.copytree(folder, Path(scratch) / "int8"))
        quantise(small / "text.onnx")
        onnx, int8 = (OnnxSegmenter(each, threads=threads) for each in (folder, small))
        models: dict[str, Questions] = {"eager": eager, "fused": fused, "ONNX": onnx}
        if compiled:
            whole = ovsam.load("ovsam-tiny", device="cpu").fuse()
            whole.model.encode = torch.compile(whole.model.encode, dynamic=False)
            start = time.perf_counter()
            whole.encode(image)
            print(f"  torch.compile of the encoding: {time.perf_counter() - start:.0f} s")
            models["fused and compiled"] = whole
        runs = {f"encoding, {name}": partial(model.encode, image) for name, model in models.items()}
        report(compare(runs, repeats), "encoding, eager")
        runs = {"10 words, eager, refined": partial(eager.where, image, TEN_WORDS, refine=True)}
        runs |= {f"10 words, {name}": partial(model.where, image, TEN_WORDS) for name, model in models.items()}
        report(compare(runs, repeats), "10 words, eager, refined")
        text_towers({"eager": eager, "ONNX": onnx, "ONNX, int8": int8}, repeats)


def text_towers(models: dict[str, Questions], repeats: int) -> None:
    """The 80 names of COCO through the text tower, one of them alone, and the cosine to the embeddings of the eager
    one."""
    names = Vocabulary("coco").prompts
    wanted = models["eager"].encode_words(names)
    for name, model in models.items():
        cosine = (model.encode_words(names) * wanted).sum(-1)
        print(f"  80 names, {name}: lowest cosine to eager {cosine.min():.5f}, mean {cosine.mean():.5f}")
    for count in (80, 1):
        runs = {f"{count} names, {name}": partial(model.encode_words, names[:count]) for name, model in models.items()}
        report(compare(runs, repeats), f"{count} names, eager")


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
    parser.add_argument("--only-tiny", action="store_true", help="only compare the ways to run ovsam-tiny")
    parser.add_argument("--onnx", metavar="DIR", type=Path, help="ovsam-tiny as `ovsam export` wrote it (default: now)")
    parser.add_argument("--compile", action="store_true", help="add torch.compile to them, which takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print("ovsam-tiny: eager, fused, exported to ONNX")
    runtimes(arguments.threads, arguments.repeats, arguments.compile, arguments.onnx)
    if arguments.only_tiny:
        return
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
