"""Does the method do what Open-Vocabulary SAM (Yuan et al. 2024) says? Its Tables 1 and 7, in small.

`python benchmarks/reproduce_paper.py` trains what is missing (into runs/paper; killed, it goes on when it is called
again), measures, and prints Markdown. The words are 65 pictograms, 48 base and 17 novel as in the paper's split of
COCO; pictures are EmojiScenes of 512 px in one drawing style. It does so over two CLIP towers: one trained here on
captions of whole pictures (the paper's setting: CLIP has seen no crop, and was never told where anything is), and
ovsam-tiny's own, which was trained under the masks of objects. The SAM side is ovsam-tiny's in both.

Metrics are the paper's: a prompt is the box of a true mask or the pixel deepest inside it, and is answered by one
mask; IoU is per instance at the picture's resolution, averaged over the instances of base and of novel words; Acc is
the share of all instances whose best of the 65 words is right. Adapters and CoOp see base words only, CLIP towers all.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import resized_crop
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "research"))
from paper.stages import SCALE, LearnedPrompt, RoiStage, TokenStage, class_embeds, load_sam2clip  # noqa: E402

from ovsam.checkpoints.text_tower import embed_texts  # noqa: E402
from ovsam.data import SceneDataset  # noqa: E402
from ovsam.data.scenes.drawing import SceneConfig  # noqa: E402
from ovsam.data.scenes.styles import STYLES, drawable  # noqa: E402
from ovsam.data.scenes.words import all_words  # noqa: E402
from ovsam.modeling.clip.base import boxes_to_masks  # noqa: E402
from ovsam.modeling.sam import DecodedMasks, SamFeatures  # noqa: E402
from ovsam.modeling.scoring import FusedNaming  # noqa: E402
from ovsam.ops.boxes import masks_to_boxes  # noqa: E402
from ovsam.ops.masks import deepest_point  # noqa: E402
from ovsam.training.engine import train_recipe  # noqa: E402
from ovsam.training.recipe import read_recipe  # noqa: E402
from ovsam.training.stages.text_embeddings import word_table  # noqa: E402
from ovsam.training.stages.towers import build_towers  # noqa: E402

RECIPES = ROOT / "research" / "paper"
WORDS, NOVEL = 65, 17  # as COCO in the paper
TEST_SEED = 800_001  # no recipe's
SCENE = SceneConfig(min_objects=6, max_objects=10, max_size=150.0)
CROP, CONTEXT = 128, 1.25  # pixels of a crop; its side in parts of the mask's longer side
PROMPTS = ("box", "point")
TOWERS = {
    "captions": "CLIP tower trained on captions of whole pictures (the paper's setting)",
    "crops": "ovsam-tiny's CLIP tower, trained under the masks of objects",
}
DOCUMENT, START, END = ROOT / "adapters" / "README.md", "<!-- paper -->\n", "<!-- end of paper -->\n"

# The paper's Table 1 (COCO; * Table 7: both IoUs as one): IoU base / novel and Acc by box and by point, M, GFLOPs.
PAPER = """
| | box: IoU base / novel | box: Acc | point: IoU base / novel | point: Acc | M | GFLOPs |
|---|---|---|---|---|---|---|
| image-crop | 78.1 / 81.4 | 46.2 | 60.7 / 66.7 | 24.5 | 808 | 3,748 |
| feature-crop | 78.1 / 81.4 | 55.1 | 60.7 / 66.7 | 32.1 | 808 | 3,545 |
| feature-crop + CoOp | 79.6 / 82.1 | 70.9 | 64.7 / 66.7 | 35.1 | 808 | 3,545 |
| SAM2CLIP only * | 78.1 | 54.2 | | | | |
| + class token * | 81.3 | 79.3 | | | | |
| + FPN and RoIAlign | 81.5 / 84.0 | 84.3 | 68.4 / 65.2 | 76.7 | 304 | 1,180 |
""".strip()
PAPER_LEAD = {"box": 84.3 - 55.1, "point": 76.7 - 32.1}
PAPER_GFLOPS = (3545, 1180)  # feature-crop, and the whole model


# ---- words --------------------------------------------------------------------------------------------------------


def choose_words() -> tuple[list[str], list[str]]:
    """All 65 names and the novel ones: evenly spaced, in code-point order, among the base words of EmojiScenes that
    every style draws and whose names are of one word or two; and evenly spaced among those."""
    drawn = set.intersection(*(set(drawable([style])) for style in STYLES))
    fit = [w.name for i, w in enumerate(all_words()) if w.split == "base" and i in drawn and len(w.name.split()) < 3]
    words = [fit[k * len(fit) // WORDS] for k in range(WORDS)]
    return words, [words[k * WORDS // NOVEL] for k in range(NOVEL)]


def read_words() -> tuple[list[str], list[str]]:
    """What `choose_words` chose: all names, and the base ones, as the recipes read them."""
    words, base = ((RECIPES / name).read_text().split("\n") for name in ("words.txt", "base_words.txt"))
    return [word for word in words if word], [word for word in base if word]


# ---- training -----------------------------------------------------------------------------------------------------


def train(base: Path, runs: Path) -> None:
    """Whatever is not in `runs` yet; `base` is a folder with the weights of an ovsam-tiny.

    Raises:
        SystemExit: `runs` holds parts trained over other weights.
    """
    record, weights = runs / "base.txt", weights_name(base)
    runs.mkdir(parents=True, exist_ok=True)
    if record.is_file() and record.read_text().strip() != weights:
        raise SystemExit(f"{runs} was trained over other weights than those of {base}; name another folder as --runs.")
    record.write_text(weights + "\n")
    train_part(runs, "clip", "clip", [])
    for stage in ("sam2clip", "coop", "token", "roi"):
        for tower in TOWERS:
            weights_of_side = weights_of(base, runs, tower)
            if stage == "roi":
                del weights_of_side["sam"]
            settings = [f"model.{side}.weights={path}" for side, path in weights_of_side.items()]
            if stage == "token":
                settings.append(f"stage_args.sam2clip_weights={runs / f'sam2clip-{tower}' / 'model.safetensors'}")
            train_part(runs, stage, f"{stage}-{tower}", settings)


def train_part(runs: Path, recipe: str, name: str, settings: list[str]) -> None:
    if not (runs / name / "model.safetensors").is_file():
        train_recipe(RECIPES / f"{recipe}.toml", output=runs / name, resume=True, settings=settings)


def weights_name(base: Path) -> str:
    return hashlib.sha256((base / "vision_model.safetensors").read_bytes()).hexdigest()[:12]


def weights_of(base: Path, runs: Path, tower: str) -> dict[str, Path]:
    released = base / "vision_model.safetensors"
    return {"sam": released, "clip": released if tower == "crops" else runs / "clip" / "model.safetensors"}


# ---- the rows -----------------------------------------------------------------------------------------------------


class Setting(nn.Module):
    """All trained parts over one CLIP tower.

    Args:
        base, runs, tower: where they lie, and which tower.
        words: embeddings of all names [K, D].
        names, trained: all names, and the base ones among them.
    """

    def __init__(self, base: Path, runs: Path, tower: str, words: Tensor, names: list[str], trained: list[str]):
        super().__init__()
        recipe = read_recipe(RECIPES / "sam2clip.toml")
        for side, path in weights_of(base, runs, tower).items():
            recipe["model"][side]["weights"] = str(path)
        self.towers = build_towers(recipe["model"])
        sam2clip = str(runs / f"sam2clip-{tower}" / "model.safetensors")
        self.sam2clip = load_sam2clip(self.towers, sam2clip)
        table = word_table([], lambda texts: words[:0])
        self.decoder = TokenStage(table, self.towers, sam2clip).sam
        self.decoder.model.mask_decoder.load_state_dict(load_file(runs / f"token-{tower}" / "model.safetensors"))
        self.clip2sam = RoiStage(table, self.towers).clip2sam
        self.clip2sam.load_state_dict(load_file(runs / f"roi-{tower}" / "model.safetensors"))
        context = load_file(runs / f"coop-{tower}" / "model.safetensors")["context"]
        prompt = LearnedPrompt(len(context))
        prompt.load_state_dict({"context": context}, strict=False)
        self.context = prompt.context
        self.words, self.names, self.trained = words, names, frozenset(name.lower() for name in trained)
        with torch.no_grad():
            self.prompted_words = prompt(names)
        self.requires_grad_(False).eval()


class Picture:
    """A picture [3, S, S] uint8 and prompts on it (`decode`'s arguments), as a setting sees them; what several rows
    need is computed once. Masks are logits [P, S/4, S/4]; `truth`, [P, S, S] bool, is for CHECKS alone."""

    def __init__(self, setting: Setting, image: Tensor, prompts: dict[str, Tensor], truth: Tensor | None = None):
        self.setting, self.image, self.prompts, self.truth = setting, image, prompts, truth

    @cached_property
    def clip(self):
        return self.setting.towers.encode_clip(self.image[None])

    @cached_property
    def sam_masks(self) -> Tensor:
        return self._one_mask(self.setting.towers.encode_sam(self.image[None]))

    @cached_property
    def student(self) -> SamFeatures:
        return self.setting.sam2clip(self.clip.maps)

    @cached_property
    def student_masks(self) -> Tensor:
        return self._one_mask(self.student)

    @cached_property
    def tuned(self) -> DecodedMasks:
        """By the decoder with the label token."""
        return self.setting.decoder.decode(self.student, **self.prompts)

    @property
    def roi_embeds(self) -> Tensor:
        """Of FPN and RoIAlign [P, D]. As in the paper, the region is the box that was given, else that of the mask."""
        masks = self.tuned.masks[:, :, 0].sigmoid()
        if "input_boxes" in self.prompts:
            masks = (boxes_to_masks(self.prompts["input_boxes"], masks.shape[-2:], 4) > 0.5).float()
        return self.setting.clip2sam(self.clip.maps, masks)[0]

    def _one_mask(self, features: SamFeatures) -> Tensor:
        sam = self.setting.towers.sam
        return sam.select_masks(sam.decode(features, **self.prompts), multimask_output=False).masks[0, :, 0]

    def pooled(self, masks: Tensor) -> Tensor:
        """CLIP's features under masks [P, h, w] -> [P, D]."""
        return self.setting.towers.clip.pool(self.clip, masks=masks.sigmoid()[None])[0]

    def cropped(self, masks: Tensor) -> Tensor:
        """CLIP's embeddings of crops around masks [P, h, w] -> [P, D]."""
        size = self.image.shape[-1]
        boxes = crop_boxes(masks_to_boxes(masks > 0) * (size / masks.shape[-1]), size)
        crops = [resized_crop(self.image, y, x, side, side, [CROP, CROP]) for x, y, side in boxes.tolist()]
        towers = self.setting.towers
        embeds = towers.clip.encode_image(towers.clip_pixels(torch.stack(crops))).pool_map.mean((2, 3))
        return F.normalize(embeds, dim=-1)

    def fused(self, embeds: Tensor, masks: Tensor) -> Tensor:
        """p = p_adapter^(1-a) p_clip^a of every word, as logits [P, K]; embeds [P, D]."""
        setting = self.setting
        sees = torch.ones(1, len(masks), dtype=torch.bool)
        naming = FusedNaming(embeds[None], self.pooled(masks)[None], sees, SCALE, setting.trained)
        return naming.logits(setting.words, labels=setting.names)[0]


def crop_boxes(boxes: Tensor, size: int) -> Tensor:
    """Squares around boxes [P, 4] with some context, whole pixels inside a picture of `size`: x, y, side [P, 3]."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    side = (torch.maximum(width, height) * CONTEXT).ceil().clamp(8, size)
    corner = ((boxes[:, :2] + boxes[:, 2:] - side[:, None]) / 2).round()
    corner = torch.minimum(corner.clamp(min=0), size - side[:, None])
    return torch.cat([corner, side[:, None]], 1).long()


Answer = Callable[[Picture], tuple[Tensor, Tensor]]  # -> masks [P, h, w], scores of all words [P, K]

ROWS: dict[str, Answer] = {
    "image-crop": lambda p: (p.sam_masks, p.cropped(p.sam_masks) @ p.setting.words.T),
    "feature-crop": lambda p: (p.sam_masks, p.pooled(p.sam_masks) @ p.setting.words.T),
    "feature-crop + CoOp": lambda p: (p.sam_masks, p.pooled(p.sam_masks) @ p.setting.prompted_words.T),
    "SAM2CLIP only": lambda p: (p.student_masks, p.pooled(p.student_masks) @ p.setting.words.T),
    "+ class token": lambda p: (p.tuned.masks[0, :, 0], p.fused(class_embeds(p.tuned)[0], p.tuned.masks[0, :, 0])),
    "+ FPN and RoIAlign": lambda p: (p.tuned.masks[0, :, 0], p.fused(p.roi_embeds, p.tuned.masks[0, :, 0])),
}

# Where a row's Acc comes from.
CHECKS: dict[str, Answer] = {
    "feature-crop under the true masks": lambda p: (
        p.truth.float() * 40 - 20,
        p.pooled(p.truth.float() * 40 - 20) @ p.setting.words.T,
    ),
    "FPN and RoIAlign without CLIP's share": lambda p: (p.tuned.masks[0, :, 0], p.roi_embeds @ p.setting.words.T),
}


def parts_of(row: str, setting: Setting) -> list[nn.Module | nn.Parameter]:
    """What a row keeps in memory; the words are embedded before."""
    towers = setting.towers
    if row in ("image-crop", "feature-crop"):
        return [towers.sam, towers.clip]
    if row == "feature-crop + CoOp":
        return [towers.sam, towers.clip, setting.context]
    if row == "SAM2CLIP only":
        return [towers.clip, setting.sam2clip, towers.sam.model.prompt_encoder, towers.sam.model.mask_decoder]
    decoder = [setting.decoder.model.prompt_encoder, setting.decoder.model.mask_decoder]
    return [towers.clip, setting.sam2clip, *decoder, *([setting.clip2sam] if "FPN" in row else [])]


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(setting: Setting, pictures: int, seed: int = TEST_SEED) -> dict[str, dict[str, dict[str, float]]]:
    """{prompt: {row or check: figures}} on scenes that no recipe draws."""
    rows = ROWS | CHECKS
    data = SceneDataset(pictures, seed, SCENE, setting.names)
    novel = torch.tensor([name.lower() not in setting.trained for name in setting.names])
    seen: dict[tuple[str, str], list[Tensor]] = {(prompt, row): [] for prompt in PROMPTS for row in rows}
    for index in tqdm(range(pictures), desc="measuring"):
        sample = data[index]
        truth = sample["masks"][sample["masks"].flatten(1).any(1)]
        ids = sample["word_ids"][: len(truth)]
        for prompt, given in true_prompts(truth).items():
            picture = Picture(setting, sample["image"], given, truth)
            for row, answer in rows.items():
                masks, scores = answer(picture)
                right = scores.argmax(-1) == ids
                seen[prompt, row].append(torch.stack([instance_iou(masks, truth), right, novel[ids]], 1))
    return {prompt: {row: figures(torch.cat(seen[prompt, row])) for row in rows} for prompt in PROMPTS}


def true_prompts(masks: Tensor) -> dict[str, dict[str, Tensor]]:
    """masks [P, S, S] bool -> `decode`'s arguments by kind of prompt."""
    boxes = masks_to_boxes(masks)
    points = []
    for mask, (x, y, right, bottom) in zip(masks.numpy(), boxes.long().tolist(), strict=True):
        inside = deepest_point(mask[y : bottom + 1, x : right + 1])  # nothing of the mask lies outside its box
        points.append([x + inside[0], y + inside[1]])
    return {"box": {"input_boxes": boxes[None]}, "point": {"input_points": torch.tensor(points).float()[None, :, None]}}


def instance_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """IoU [P] of mask logits [P, h, w] with masks [P, S, S], at the size of the latter."""
    whole = F.interpolate(masks[None].float(), truth.shape[-2:], mode="bilinear", align_corners=False)[0] > 0
    return (whole & truth).flatten(1).sum(1) / (whole | truth).flatten(1).sum(1)


def figures(rows: Tensor) -> dict[str, float]:
    """rows [n, 3] of IoU, right, novel -> means in percent, and how many instances there are."""
    iou, right, novel = rows.double().unbind(1)
    split = {"base": novel == 0, "novel": novel == 1}
    found = {"acc": right.mean()}
    for name, own in split.items():
        found |= {f"iou_{name}": iou[own].mean(), f"acc_{name}": right[own].mean()}
    return {name: round(100 * float(value), 2) for name, value in found.items()} | {"instances": len(rows)}


def costs(setting: Setting, repeats: int) -> dict[str, dict[str, float]]:
    """{row: parameters (M), GFLOPs and milliseconds} of one picture with one box. A multiplication and an addition are
    two FLOPs; attention is counted; time is the median of this thread's CPU time, so that other work does not count."""
    sample = SceneDataset(1, TEST_SEED, SCENE, setting.names)[0]
    prompts = true_prompts(sample["masks"][:1])["box"]
    found = {}
    for row, answer in ROWS.items():
        parts = [p if isinstance(p, nn.Parameter) else list(p.parameters()) for p in parts_of(row, setting)]
        unique = {id(t): t.numel() for part in parts for t in ([part] if isinstance(part, nn.Parameter) else part)}
        # Fused attention kernels are opaque to the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            answer(Picture(setting, sample["image"], prompts))
        torch.backends.mha.set_fastpath_enabled(True)
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            start = time.thread_time()
            answer(Picture(setting, sample["image"], prompts))
            times.append(1000 * (time.thread_time() - start))
        found[row] = {
            "parameters": round(sum(unique.values()) / 1e6, 2),
            "gflops": round(counter.get_total_flops() / 1e9, 2),
            "ms": round(statistics.median(times[1:]), 1),
        }
    return found


# ---- the tables ---------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """One setting: {"box": {row: figures}, "point": ..., "costs": ...} -> Markdown."""
    lines = [
        "| | box: IoU base / novel | box: Acc (base / novel) | point: IoU base / novel | point: Acc (base / novel) "
        "| M | GFLOPs | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, cost in result["costs"].items():
        cells = []
        for prompt in PROMPTS:
            f = result[prompt][row]
            cells.append(f"{f['iou_base']:.1f} / {f['iou_novel']:.1f}")
            cells.append(f"{f['acc']:.1f} ({f['acc_base']:.1f} / {f['acc_novel']:.1f})")
        numbers = [f"{cost['parameters']:.1f}", f"{cost['gflops']:.1f}", f"{cost['ms']:.0f}"]
        lines.append(f"| {row} | {' | '.join(cells + numbers)} |")
    return "\n".join(lines)


def leads(result: dict) -> dict[str, float]:
    """Points of Acc by which the whole model is ahead of feature-crop."""
    return {p: result[p]["+ FPN and RoIAlign"]["acc"] - result[p]["feature-crop"]["acc"] for p in PROMPTS}


def report(results: dict) -> str:
    lines = []
    for tower, title in TOWERS.items():
        result = results[tower]
        ahead = " and ".join(f"{value:+.1f} by {prompt}" for prompt, value in leads(result).items())
        ratio = result["costs"]["feature-crop"]["gflops"] / result["costs"]["+ FPN and RoIAlign"]["gflops"]
        lines += [f"**{title}**", "", table(result), ""]
        lines += [
            f"The whole model over feature-crop, points of Acc: {ahead}. FLOPs of feature-crop / whole: {ratio:.2f}."
        ]
        found = {check: [result[prompt][check] for prompt in PROMPTS] for check in CHECKS}
        cells = {check: " and ".join(f"{f['acc']:.1f}" for f in each) for check, each in found.items()}
        lines += ["Acc by box and by point of " + ", of ".join(f"{c}: {v}" for c, v in cells.items()) + ".", ""]
    ahead = " and ".join(f"{value:+.1f} by {prompt}" for prompt, value in PAPER_LEAD.items())
    ratio = PAPER_GFLOPS[0] / PAPER_GFLOPS[1]
    lines += ["**The paper's own (COCO, its Tables 1 and 7; \\* of Table 7)**", "", PAPER, ""]
    lines += [f"There the lead is {ahead}, and the ratio of FLOPs {ratio:.2f}.", ""]
    n = results["captions"]["box"]["feature-crop"]["instances"]
    lines += [f"{results['pictures']} scenes, {n} instances; ovsam-tiny's weights {results['weights']}."]
    return "\n".join(lines)


def write(text: str, path: Path = DOCUMENT) -> None:
    """The report into its place in a document."""
    before = path.read_text()
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.S)
    if not pattern.search(before):
        raise SystemExit(f"{path} has no place for the table: {START.strip()} ... {END.strip()}")
    path.write_text(pattern.sub(lambda _: f"{START}\n{text}\n\n{END}", before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=Path, default=ROOT / "hub" / "ovsam-tiny", help="ovsam-tiny whose parts are taken"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paper", help="where the trained parts are kept")
    parser.add_argument("--pictures", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--seed", type=int, default=TEST_SEED, help="of those scenes")
    parser.add_argument("--repeats", type=int, default=15, help="of each timing")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", action="store_true", help="write the tables into adapters/README.md")
    arguments = parser.parse_args()
    base, runs = arguments.base.resolve(), arguments.runs.resolve()
    os.chdir(ROOT)  # recipes name files from here
    torch.set_num_threads(1)
    train(base, runs)
    names, trained = read_words()
    words = embed_texts(names)
    results: dict = {"pictures": arguments.pictures, "weights": weights_name(base)}
    with torch.no_grad():
        for tower in TOWERS:
            setting = Setting(base, runs, tower, words, names, trained)
            results[tower] = measure(setting, arguments.pictures, arguments.seed) | {
                "costs": costs(setting, arguments.repeats)
            }
    text = report(results)
    print("\n" + text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
