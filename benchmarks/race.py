"""The race: this library against the public packages that people use for the same, as ratios of CPU time.

    python benchmarks/race.py                       # every part; what the file already has is not measured again
    python benchmarks/race.py --only words small    # some parts
    python benchmarks/race.py --table               # the table of the file alone
    python benchmarks/race.py --picture docs/race.svg

Everything runs in one process on one picture, in float32 with the same number of threads. A pair is ours and one peer
in turns, after one call of each that warms up, so that the load of the machine meets both; the ratio is the median over
the rounds, with the least and the most. Seconds are CPU time of the process, which other work changes little. Weights
are random, since time does not depend on them, except for `ovsam-tiny`; so are pixels and embeddings of words.
Suppression is off, so that exactly as many instances are decoded as a row states. Each row is stored as soon as it is
measured, and a run that was stopped goes on. YOLOE is AGPL and so only an extra of its own, `pip install
ovsam[bench]`; without it its rows are left out.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from speed import random_model
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Sam2Config,
    Sam2Model,
    Sam2Processor,
    Sam3Config,
    Sam3Model,
    pipeline,
)
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor

import ovsam
from ovsam.ops.files import write_text

SIDE = 1024
INSTANCES = 20
OBJECTS = 100
AT_ONCE = 4  # prompts that transformers' decoder takes in a call
TOKENS = 4  # of a word, with those that begin and end it
SLOW = 20.0  # CPU seconds of a call of the peer from which one round is enough
Call = Callable[[], object]
Rows = Iterator[tuple[str, str, str, Callable[[], tuple[Call, Call]]]]  # point, ours, peer, what builds both


# ---- ours and the peers, each as a call without arguments ---------------------------------------------------------


def boxes_of(count: int, side: int = SIDE, images: int = 1) -> torch.Tensor:
    """[images, count, 4] xyxy in pixels, the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    corner, size = (torch.rand(count, 2, generator=generator) for _ in range(2))
    corner, size = corner * 0.7 * side, (0.04 + 0.26 * size) * side
    return torch.cat([corner, corner + size], 1).expand(images, -1, -1)


def random_ids(words: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(1000, 20_000, (words, tokens))


def unit(count: int, width: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=-1)


def sam2_config(side: int) -> Sam2Config:
    """SAM 2-tiny for square images of another side."""
    config = Sam2Config()
    config.vision_config.backbone_config.image_size = [side, side]
    config.vision_config.backbone_feature_sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
    config.prompt_encoder_config.image_size = side
    return config


def sam2(instances: int = INSTANCES, side: int = SIDE, images: int = 1) -> Call:
    """transformers' SAM 2-tiny: one encoding, and the masks of given boxes, a few at a time, which is fastest for it
    (`decode_speed.py`)."""
    model, pixels = Sam2Model(sam2_config(side)).eval(), torch.randn(images, 3, side, side)
    boxes = boxes_of(instances, side, images)

    def run():
        maps = model.get_image_embeddings(pixels)
        for some in boxes.split(AT_ONCE, dim=1):
            model(image_embeddings=maps, input_boxes=some, multimask_output=False)

    return run


def own_words(words: int, instances: int = INSTANCES, side: int = SIDE, images: int = 1, cached: bool = False) -> Call:
    """Words -> masks. A vocabulary is embedded once and kept (`cached`); else each call embeds its words."""
    model = random_model(sam2_config(side))
    model.config.max_detections = instances
    pixels, ids = torch.randn(images, 3, side, side), random_ids(words)
    named: dict[str, Any] = {"text_embeds": unit(words, model.clip.embed_dim)}
    if not cached:
        named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run():
        outputs = model(pixel_values=pixels, proposal_threshold=0.0, **named)
        assert outputs.pred_masks.shape[:2] == (images, instances)

    return run


def own_boxes(count: int, images: int = 1) -> Call:
    """Boxes -> masks without names: the same work as `sam2`."""
    model, pixels, boxes = random_model().sam, torch.randn(images, 3, SIDE, SIDE), boxes_of(count, SIDE, images)
    return lambda: model.select_masks(model.decode(model.encode(pixels), input_boxes=boxes), False)


def own_everything(refine: bool = True) -> Call:
    model, pixels = random_model(), torch.randn(1, 3, SIDE, SIDE)
    model.config.max_detections = OBJECTS
    embeds = unit(1203, model.clip.embed_dim)

    def run():
        asked = {"everything": True, "refine": refine, "proposal_threshold": 0.0}
        assert model(pixel_values=pixels, text_embeds=embeds, **asked).pred_masks.shape[1] == OBJECTS

    return run


def own_tiny(words: int, fused: bool) -> Call:
    segmenter = ovsam.load("ovsam-tiny", device="cpu")
    model = (segmenter.fuse() if fused else segmenter).model
    model.config.max_detections, model.config.nms_threshold, model.config.mask_nms_threshold = INSTANCES, 1.0, 1.0
    pixels, embeds = torch.randn(1, 3, model.sam.image_size, model.sam.image_size), unit(words, model.clip.embed_dim)
    return lambda: model(pixel_values=pixels, text_embeds=embeds, proposal_threshold=0.0)


def encoding(model: ovsam.OVSamModel | None = None) -> Call:
    side, pixels = (model or random_model()).sam, torch.randn(1, 3, SIDE, SIDE)
    return lambda: side.encode(pixels)


def grounding_dino(words: int) -> Call:
    """All words as one sentence, as many as its 256 tokens take in a pass; SAM 2-tiny decodes its boxes."""
    detector, segment = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval(), sam2()
    pixels = torch.randn(1, 3, 800, 800)  # the shorter side of its processor
    sentences = []
    for some in random_ids(words, TOKENS - 2).split((256 - 2) // (TOKENS - 1)):
        ids = [101, *(token for word in some.tolist() for token in (*word, 1012)), 102]  # [CLS] word . word . [SEP]
        sentences.append(torch.tensor([ids]))

    def run():
        for ids in sentences:
            detector(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        segment()

    return run


def owlv2(words: int) -> Call:
    """OWLv2 base, patches of 16, at its 960 px; SAM 2-tiny decodes its boxes."""
    config = Owlv2Config(vision_config={"image_size": 960, "patch_size": 16})
    detector, segment = Owlv2ForObjectDetection(config).eval(), sam2()
    pixels, ids = torch.randn(1, 3, 960, 960), random_ids(words)

    def run():
        detector(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        segment()

    return run


def clipseg(words: int) -> Call:
    """CLIPSeg, patches of 16, at its 352 px: one map a word and no instances; the picture goes in once a word."""
    model = CLIPSegForImageSegmentation(CLIPSegConfig(vision_config={"patch_size": 16})).eval()
    pixels, ids = torch.randn(1, 3, 352, 352).expand(words, -1, -1, -1), random_ids(words)
    return lambda: model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))


def sam3(words: int) -> Call:
    """SAM 3 at its 1,008 px: one encoding of the picture, one pass of the rest a word."""
    model = Sam3Model(Sam3Config()).eval()
    pixels, ids = torch.randn(1, 3, 1008, 1008), random_ids(words, 32)

    def run():
        seen = model.get_vision_features(pixel_values=pixels)
        for word in ids:
            model(vision_embeds=seen, input_ids=word[None], attention_mask=torch.ones_like(word[None]))

    return run


def mask_generation() -> Call:
    """transformers' pipeline over SAM 2-tiny, 32 x 32 points. Random masks do not pass its thresholds, which spares it
    the work after the decoder."""
    model = Sam2Model(Sam2Config()).eval()
    processor = Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}))
    generate = pipeline("mask-generation", model=model, image_processor=processor.image_processor, processor=processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
    return lambda: generate(picture, points_per_batch=16, points_per_crop=32)


def crops(count: int, whole: bool) -> Call:
    """The baselines of Open-Vocabulary SAM: masks of SAM 2-tiny, named by CLIP ViT-B/16 from each crop (image-crop), or
    from its features of the whole picture at 512 px under each mask (feature-crop). Texts are cached."""
    size, segment = 512 if whole else 224, sam2(count)
    model = CLIPModel(CLIPConfig(vision_config={"patch_size": 16, "image_size": size})).eval()
    pixels, texts = torch.randn(1 if whole else count, 3, size, size), unit(1203, 512)
    masks = torch.rand(count, (size // 16) ** 2).softmax(-1)

    def run():
        segment()
        seen = model.vision_model(pixel_values=pixels)
        pooled = masks @ seen.last_hidden_state[0, 1:] if whole else seen.pooler_output
        F.normalize(model.visual_projection(pooled), dim=-1) @ texts.T

    return run


def own_names(count: int) -> Call:
    """Boxes -> masks with names from 1,203 words."""
    model, pixels, boxes = random_model(), torch.randn(1, 3, SIDE, SIDE), boxes_of(count)
    embeds = unit(1203, model.clip.embed_dim)
    return lambda: model(pixel_values=pixels, input_boxes=boxes, text_embeds=embeds)


def yoloe(scale: str, words: int) -> Call:
    """YOLOE-26 at 640 px, built from its yaml, with random class embeddings, fused as it is for prediction."""
    from ultralytics import YOLOE

    model = YOLOE(f"yoloe-26{scale}-seg.yaml").model.eval()
    model.set_classes([str(number) for number in range(words)], unit(words, 512)[None])
    model.fuse(verbose=False)
    pixels = torch.rand(1, 3, 640, 640)
    return lambda: model(pixels)


def stock_encoding() -> Call:
    model, pixels = Sam2Model(Sam2Config()).eval(), torch.randn(1, 3, SIDE, SIDE)
    return lambda: model.get_image_embeddings(pixels)


# ---- the parts: rows of (point, ours, peer, build) -----------------------------------------------------------------


def words() -> Rows:
    mine = f"words -> {INSTANCES} masks"
    for count in (16, 1, 64):
        for name, peer in {"Grounding DINO-T + SAM 2-tiny": grounding_dino, "OWLv2-base + SAM 2-tiny": owlv2}.items():
            yield f"{count} words", mine, name, lambda count=count, peer=peer: (own_words(count), peer(count))
    for count in (1203, 21841):
        built = lambda count=count: (own_words(1, cached=True), own_words(count, cached=True))  # noqa: E731
        yield f"{count} words", f"{mine}, 1 word, cached", "ours with these words, cached", built
    for count in (16, 1):
        yield f"{count} words", mine, "SAM 3", lambda count=count: (own_words(count), sam3(count))
        yield f"{count} words", mine, "CLIPSeg (no instances)", lambda count=count: (own_words(count), clipseg(count))


def calls() -> Rows:
    yield "16 words", "one encoding", "ours, whole call", lambda: (encoding(), own_words(16, cached=True))
    mine = "one encoding"
    yield f"{OBJECTS} objects, refined", mine, "everything, named", lambda: (encoding(), own_everything())
    yield f"{OBJECTS} objects, unrefined", mine, "everything, named", lambda: (encoding(), own_everything(refine=False))
    stock = "one encoding by Sam2Model"
    yield "16 words, stock", stock, "ours, whole call", lambda: (stock_encoding(), own_words(16, cached=True))
    yield f"{OBJECTS} refined, stock", stock, "everything, named", lambda: (stock_encoding(), own_everything())


def prompts() -> Rows:
    for count in (64, 1, 16, 256):
        built = lambda count=count: (own_boxes(count), sam2(count))  # noqa: E731
        yield f"{count} boxes", "picture and boxes -> masks", f"Sam2Model, {AT_ONCE} boxes a call", built


def sides() -> Rows:
    for side in (512, 1024, 2048):
        built = lambda side=side: (own_words(16, side=side, cached=True), sam2(side=side))  # noqa: E731
        yield f"{side} px", f"16 words -> {INSTANCES} masks", f"Sam2Model alone, {INSTANCES} boxes given", built


def batch() -> Rows:
    for images in (1, 8):
        built = lambda images=images: (  # noqa: E731
            own_words(16, side=512, images=images, cached=True),
            sam2(side=512, images=images),
        )
        yield f"{images} at 512 px", f"16 words -> {INSTANCES} masks", "Sam2Model alone, boxes given", built


def everything() -> Rows:
    mine = f"everything, {OBJECTS} refined and named"
    yield "32 x 32 points", mine, "mask-generation", lambda: (own_everything(), mask_generation())


def naming() -> Rows:
    mine = f"{INSTANCES} boxes -> masks, 1,203 names"
    yield f"{INSTANCES} boxes", mine, "image-crop", lambda: (own_names(INSTANCES), crops(INSTANCES, whole=False))
    yield f"{INSTANCES} boxes", mine, "feature-crop", lambda: (own_names(INSTANCES), crops(INSTANCES, whole=True))


def small() -> Rows:
    for scale in "sl":
        name = f"YOLOE-26-{scale.upper()}, 640 px"
        yield "80 words", "ovsam-tiny, 512 px, fused", name, lambda scale=scale: (own_tiny(80, True), yoloe(scale, 80))
    yield "10 words", "ovsam-tiny, fused", "ovsam-tiny as loaded", lambda: (own_tiny(10, True), own_tiny(10, False))


PARTS = {each.__name__: each for each in (words, calls, prompts, small, everything, naming, sides, batch)}


# ---- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(ours: Call, peer: Call, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of both in turns, after one call of each. A slow peer runs twice, the first to warm up."""
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(rounds + 1):
        for name, run in (("ours", ours), ("peer", peer)):
            start = time.process_time()
            run()
            if number:
                taken[name].append(time.process_time() - start)
            elif name == "peer" and time.process_time() - start > SLOW:
                rounds = 1
        if number and number >= rounds:
            break
    return taken


def run(parts: list[str], path: Path, rounds: int) -> dict[str, Any]:
    """Measure what the file lacks, and store it row by row."""
    stored = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "rows": {}}
    for part in parts:
        for point, ours, peer, build in PARTS[part]():
            key = " | ".join((part, point, peer))
            if key in stored["rows"]:
                continue
            torch.manual_seed(0)
            try:
                taken = measure(*build(), rounds)
            except ImportError as missing:
                print(f"left out: {key} ({missing})", flush=True)
                continue
            stored["rows"][key] = {"part": part, "point": point, "ours": ours, "peer": peer, "seconds": taken}
            write_text(path, json.dumps(stored, indent=1))
            print(line(stored["rows"][key]), flush=True)
    return stored


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "dtype": "float32",
    }


def ratios(row: dict[str, Any]) -> list[float]:
    return [theirs / own for theirs, own in zip(row["seconds"]["peer"], row["seconds"]["ours"], strict=True)]


HEADER = """| part | point | ours | s | beside | s | beside / ours | spread | rounds |
|---|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    each, seconds = ratios(row), {name: statistics.median(taken) for name, taken in row["seconds"].items()}
    cells = (row["part"], row["point"], row["ours"], f"{seconds['ours']:.2f}", row["peer"], f"{seconds['peer']:.2f}",
             f"**{statistics.median(each):.2f}**", f"{min(each):.2f}-{max(each):.2f}", len(each))  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def table(stored: dict[str, Any]) -> str:
    order = list(PARTS)
    rows = sorted(stored["rows"].values(), key=lambda row: order.index(row["part"]))
    about = ", ".join(f"{name} {value}" for name, value in stored["machine"].items())
    return "\n".join([f"CPU seconds, random weights; {about}", "", HEADER, *map(line, rows)])


def picture(stored: dict[str, Any], path: Path) -> None:
    """The ratios over the axes, as curves; the range over the rounds as bars."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ovsam", "font.family": "sans-serif"})
    import matplotlib.pyplot as plt

    axes = {"words": "words", "prompts": "boxes on one picture", "sides": "side of the picture, px"}
    figure, panels = plt.subplots(1, len(axes), figsize=(11, 3.4), layout="constrained")
    for panel, (part, label) in zip(panels, axes.items(), strict=True):
        curves: dict[str, list[tuple[int, list[float]]]] = {}
        for row in stored["rows"].values():
            if row["part"] == part:
                curves.setdefault(row["peer"], []).append((int(row["point"].split()[0]), ratios(row)))
        for name, points in curves.items():
            x, each = zip(*sorted(points), strict=True)
            middle = np.array([statistics.median(one) for one in each])
            spread = [middle - [min(one) for one in each], [max(one) for one in each] - middle]
            panel.errorbar(x, middle, spread, marker="o", markersize=4, capsize=2, label=name)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel=label)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        low, high = min(0.8, panel.get_ylim()[0]), max(4, panel.get_ylim()[1])  # no small difference fills a panel
        panel.set_ylim(low, high)
        marks = [mark for mark in (0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= mark <= high]
        panel.set_yticks(marks, labels=[f"{mark:g} x" for mark in marks])
        panel.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("CPU time of the other / ours")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path("runs/race.json"), help="where rows are stored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table of the stored rows")
    parser.add_argument("--picture", type=Path, help="measure nothing; draw the curves of the stored rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.table or arguments.picture:
        stored = json.loads(arguments.json.read_text())
    else:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        stored = run(arguments.only, arguments.json, arguments.rounds)
    if arguments.picture:
        picture(stored, arguments.picture)
    else:
        print(table(stored))


if __name__ == "__main__":
    main()
