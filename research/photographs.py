"""Rows of Tables 1 and 7 of Open-Vocabulary SAM (Yuan et al., ECCV 2024) on photographs, 17 class names held out.

    python adapters/photographs/fetch.py        the photographs, from COCO
    python research/photographs.py [--steps 1000] [--output runs/research]

Every row names the objects of the frozen photographs among COCO's 80 class names, over the same frozen image tower,
text tower and masks, those of ovsam-tiny:

- image-crop: the tower on the image in the box (ConSE, no training);
- feature-crop: the tower's features under the mask (ConSE, no training);
- feature-crop + learned prompts: the same against names with learned context vectors (CoOp, Zhou et al. 2022);
- adapter: Clip2SamAdapter, a light FPN and RoIAlign;
- adapter + fusion: p = p_adapter^(1 - a) * p_clip^a, a = 0.1 for the 63 trained names, 0.9 for the 17 held out.

Learned prompts and the adapter are trained here, on the photographs of ovsam-tiny, without any object of the 17 names.
A prompt is the box of an object or the pixel farthest from its boundary. IoU is the mean over the instances of base and
of novel names, Acc the share of instances with the right name. The tower's maps of all photographs (3 GB) and the
trained weights are kept in the output folder; what is there is not made again.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ovsam
from ovsam.checkpoints.text_tower import text_tower
from ovsam.data.words import Word
from ovsam.evaluation.datasets import COCO_NOVEL, open_set
from ovsam.evaluation.tasks import Examiner
from ovsam.modeling.clip.base import ClipFeatures
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.files import write_whole
from ovsam.ops.masks import deepest_point
from ovsam.ops.scores import word_shares
from ovsam.training.order import TrainingOrder, collate, read_data
from ovsam.training.recipe import read_recipe
from ovsam.training.stages.adapters import AdaptersStage
from ovsam.training.stages.prompts import visible_objects
from ovsam.training.stages.text_embeddings import word_table
from ovsam.training.stages.towers import Towers

ROOT = Path(__file__).resolve().parents[1]
FROZEN = ROOT / "tests" / "data" / "photos-val"
RECIPE = ROOT / "adapters" / "concepts-tiny" / "recipe.toml"
RESULTS = Path(__file__).with_name("photographs.json")
ROWS = ("image-crop", "feature-crop", "feature-crop + learned prompts", "adapter", "adapter + fusion")
BATCH, LEARNING_RATE, WARMUP = 5, 6e-4, 50
CONTEXT, CONTEXT_STEPS = 8, 400  # context vectors of the learned prompts
CROP = 260  # side of image crops in pixels, that of the training of the tower
# Scale of the softmax of CLIP's cosines in the fusion: of 10, 20, 30, 50 and 100, that of the highest harmonic mean of
# base and novel Acc on the 60 photographs for calibration.
CLIP_SCALE = 50.0
COST_PROMPTS = 9  # boxes of the image whose cost is measured: the mean number of objects of a frozen photograph


class LearnedPrompt(nn.Module):
    """Context vectors before the words of a class name, read by the frozen text tower."""

    def __init__(self, length: int = CONTEXT):
        super().__init__()
        tower, self.tokenizer = text_tower()
        self.text_model = tower.text_model.requires_grad_(False)
        self.context = nn.Parameter(torch.randn(length, self.text_model.config.hidden_size) * 0.02)

    def forward(self, names: list[str]) -> Tensor:
        """K names -> [K, D], L2-normalised."""
        tokens = self.tokenizer(names, padding=True, return_tensors="pt")
        words = self.text_model.embeddings.word_embeddings(tokens["input_ids"])  # [K, T, C]
        mask = tokens["attention_mask"]
        context = self.context.expand(len(names), -1, -1)
        words = torch.cat([words[:, :1], context, words[:, 1:]], 1)  # the first token is [CLS]
        mask = torch.cat([mask[:, :1], mask.new_ones(context.shape[:2]), mask[:, 1:]], 1)
        hidden = self.text_model(inputs_embeds=words, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


# ---- training -----------------------------------------------------------------------------------------------------


class HeldOut(torch.utils.data.Dataset):
    """Samples of photographs in which objects of the novel names have no name."""

    def __init__(self, data, words: list[Word]):
        self.data, self.words = data, words
        self.base = torch.tensor([word.split == "base" for word in words])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.data[index]
        ids = sample["word_ids"]
        named = (ids >= 0) & self.base[ids]
        return sample | {"word_ids": torch.where(named, ids, -1), "known": sample["known"] & self.base}


def training_set(towers: Towers, output: Path) -> HeldOut:
    """The photographs of the recipe of ovsam-tiny, each once, with the maps of the tower."""
    section = read_recipe(RECIPE)["data"]
    photographs = [one | {"draws": 1} for one in section["sets"] if one["format"] == "coco"]
    data = read_data(section | {"sets": photographs, "length": 1685}, seed=0, length=1685)
    words = [replace(word, split="novel" if word.name in COCO_NOVEL else "base") for word in data.words]
    return HeldOut(towers.keep_maps(data, output / "maps", "photographs"), words)


def train_adapter(data: HeldOut, towers: Towers, steps: int) -> dict[str, Tensor]:
    """The naming losses of the stage `adapters` alone: weights of the adapter and the scale of its softmax."""
    torch.manual_seed(0)
    stage = AdaptersStage(word_table(data.words), towers, prompts=20, width=128, label_smoothing=0.05)
    learned = [*stage.clip2sam.parameters(), stage.word_losses.scale]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=0.05)

    def factor(step: int) -> float:
        return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = TrainingOrder(data, steps * BATCH, seed=0)
    progress = tqdm(DataLoader(order, BATCH, collate_fn=collate), desc="adapter")
    for batch in progress:
        maps = towers.maps(batch["image"], kept={k: v for k, v in batch.items() if k.startswith("map_")})
        maps = (*maps[:2], *(F.dropout2d(feature, 0.1) for feature in maps[2:]))
        if not visible_objects(batch["masks"], batch["word_ids"]).any():
            continue
        losses, top1 = stage.naming_losses(maps, batch["masks"], batch["word_ids"], batch["known"], None)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{float(losses['mask_name']):.2f}", top1=f"{float(top1):.2f}", refresh=False)
    return stage.clip2sam.state_dict() | {"softmax_scale": stage.word_losses.scale.detach().exp()}


def train_prompts(data: HeldOut, towers: Towers) -> dict[str, Tensor]:
    """Context vectors, trained with the ConSE embeddings of the objects."""
    torch.manual_seed(0)
    embeds, ids = [], []
    with torch.no_grad():
        for index in tqdm(range(len(data)), desc="embeddings of objects"):
            sample = collate([data[index]])
            maps = towers.maps(sample["image"], kept={k: v for k, v in sample.items() if k.startswith("map_")})
            visible = visible_objects(sample["masks"], sample["word_ids"])
            masks = F.avg_pool2d(sample["masks"].float(), 4)
            embeds.append(towers.clip.pool(ClipFeatures(maps=maps, pool_map=maps[-1]), masks=masks)[visible])
            ids.append(sample["word_ids"][visible])
    rows = torch.tensor([word.split == "base" for word in data.words]).cumsum(0) - 1  # rank among base names
    image, target = torch.cat(embeds), rows[torch.cat(ids)]
    names = [word.name for word in data.words if word.split == "base"]
    prompt, scale = LearnedPrompt(), nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([{"params": [prompt.context], "lr": 2e-3}, {"params": [scale], "lr": 2e-2}])
    for _ in tqdm(range(CONTEXT_STEPS), desc="learned prompts"):
        some = torch.randint(len(image), (512,))
        loss = F.cross_entropy(scale.exp() * image[some] @ prompt(names).T, target[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"context": prompt.context.detach()}


def kept(path: Path, make) -> dict[str, Tensor]:
    """The tensors of a file, which are made if there is none."""
    if not path.is_file():
        tensors = {name: tensor.contiguous() for name, tensor in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, partial(save_file, tensors))
    return load_file(path)


# ---- measuring ----------------------------------------------------------------------------------------------------


class Rows:
    """The rows over one model.

    Args:
        adapter, prompts: tensors of `train_adapter` and `train_prompts`.
    """

    def __init__(self, segmenter, adapter: dict[str, Tensor], prompts: dict[str, Tensor]):
        self.examiner = Examiner(segmenter, open_set(FROZEN))
        self.model, self.names = segmenter.model, self.examiner.names
        adapter = dict(adapter)
        self.adapter_scale = adapter.pop("softmax_scale")
        self.adapter = type(self.model.clip2sam)(self.model.clip2sam.config).eval()
        self.adapter.load_state_dict(adapter)
        self.model.requires_grad_(False)  # FlopCounterMode requires it
        self.adapter.requires_grad_(False)
        trained = {word for word in self.names.words if word not in COCO_NOVEL}
        self.share = torch.tensor(word_shares(self.names.words, trained))  # [K]
        learned = LearnedPrompt(len(prompts["context"]))
        learned.context.data = prompts["context"]
        with torch.no_grad():
            self.prompted = learned(self.names.words)  # [K, D]

    def seen(self, output) -> Tensor:
        """Probabilities of the masks [1, P, H/4, W/4] that the adapter and the tower read."""
        masks, quarter = output.pred_masks[:, :, 0], self.model.sam.image_size // 4
        return F.adaptive_avg_pool2d(masks, quarter).sigmoid()

    def feature_crop(self, features, masks: Tensor) -> Tensor:
        return self.model.clip.pool(features.clip, masks=masks)[0]  # [P, D]

    def adapted(self, features, masks: Tensor, boxes: Tensor) -> Tensor:
        return self.adapter(features.maps, boxes, masks)[0]  # [P, D]

    def fused(self, adapted: Tensor, plain: Tensor) -> Tensor:
        """Logarithms of the fused probabilities, [P, K]."""
        words = self.names.embeds
        own = (self.adapter_scale * adapted @ words.T).log_softmax(-1)
        return (1 - self.share) * own + self.share * (CLIP_SCALE * plain @ words.T).log_softmax(-1)

    def scores(self, picture, output, boxes: Tensor) -> dict[str, Tensor]:
        """Scores [P, K] of each row. boxes: those of the regions, [P, 4] in pixels of the image."""
        features, words, masks = picture.features, self.names.embeds, self.seen(output)
        size = self.model.sam.image_size / max(picture.image.size)
        plain, adapted = self.feature_crop(features, masks), self.adapted(features, masks, boxes[None] * size)
        return {
            "image-crop": self.examiner.image_crops(picture, boxes.tolist(), CROP) @ words.T,
            "feature-crop": plain @ words.T,
            "feature-crop + learned prompts": plain @ self.prompted.T,
            "adapter": adapted @ words.T,
            "adapter + fusion": self.fused(adapted, plain),
        }


@torch.no_grad()
def measure(rows: Rows) -> dict:
    """{prompt: {row: figures}} of the frozen photographs, in percent."""
    examiner, data = rows.examiner, rows.examiner.data
    found: dict[tuple[str, str], list[Tensor]] = {(p, row): [] for p in ("box", "point") for row in ROWS}
    for image_id in tqdm(data.coco.getImgIds(), desc="measuring"):
        objects, truth = data.objects(image_id)
        if not objects:
            continue
        picture = examiner.segmenter.encode(data.picture(image_id))
        target = torch.tensor([rows.names.column[one["category_id"]] for one in objects])
        novel = torch.tensor([rows.names.words[int(column)] in COCO_NOVEL for column in target])
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in objects)]
        points = [[list(deepest_point(mask))] for mask in truth]
        for kind, prompts in {
            "box": {"input_boxes": [boxes]},
            "point": {"input_points": [points], "input_labels": [[[1]] * len(points)]},
        }.items():
            output = examiner.prompt(picture, None, **prompts)
            masks = examiner.masks(picture, output)
            iou = torch.from_numpy((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)))
            regions = torch.tensor(boxes) if kind == "box" else torch.from_numpy(masks_to_boxes(masks)).float()
            for row, scores in rows.scores(picture, output, regions).items():
                found[kind, row].append(torch.stack([iou, scores.argmax(-1) == target, novel], 1))
    return {kind: {row: figures(torch.cat(found[kind, row])) for row in ROWS} for kind in ("box", "point")}


def figures(instances: Tensor) -> dict[str, float]:
    """instances [n, 3]: IoU, right name, novel name."""
    iou, right, novel = instances.double().unbind(1)
    split = {"base": novel == 0, "novel": novel == 1}
    values = {"Acc": right.mean()} | {f"IoU {k}": iou[own].mean() for k, own in split.items()}
    values |= {f"Acc {k}": right[own].mean() for k, own in split.items()}
    return {k: round(100 * float(v), 1) for k, v in values.items()} | {
        f"instances {k}": int(own.sum()) for k, own in split.items()
    }


@torch.no_grad()
def costs(rows: Rows, repeats: int = 5) -> dict:
    """Parameters (M), GFLOPs (two for a multiplication and an addition) and milliseconds of this thread's CPU time
    (median) to encode an image, decode nine boxes and name their masks. Class names are embedded before."""
    examiner, model = rows.examiner, rows.model
    path = examiner.data.picture(examiner.data.coco.getImgIds()[0])
    boxes = torch.tensor([[20.0 * i, 10.0 * i, 20.0 * i + 150, 10.0 * i + 120] for i in range(COST_PROMPTS)])
    parts = [model.sam, model.clip.vision_model, model.sam2clip, model.concepts]
    size = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    own = {"feature-crop + learned prompts": CONTEXT * rows.prompted.shape[1] / 1e6}
    own |= dict.fromkeys(("adapter", "adapter + fusion"), sum(p.numel() for p in rows.adapter.parameters()) / 1e6)
    naming = model.clip2sam
    model.clip2sam = None  # the model would name by its own adapter as well
    try:
        return {row: cost(partial(answer, rows, row, path, boxes), size + own.get(row, 0), repeats) for row in ROWS}
    finally:
        model.clip2sam = naming


def answer(rows: Rows, row: str, path: Path, boxes: Tensor) -> Tensor:
    """One row alone, from the file to the scores of nine boxes."""
    picture = rows.examiner.segmenter.encode(path)
    output = rows.examiner.prompt(picture, None, input_boxes=[boxes.tolist()])
    features, words, masks = picture.features, rows.names.embeds, rows.seen(output)
    if row == "image-crop":
        return rows.examiner.image_crops(picture, boxes.tolist(), CROP) @ words.T
    if row.startswith("feature-crop"):
        return rows.feature_crop(features, masks) @ (rows.prompted if "learned" in row else words).T
    adapted = rows.adapted(features, masks, boxes[None])
    return adapted @ words.T if row == "adapter" else rows.fused(adapted, rows.feature_crop(features, masks))


def cost(run, parameters: float, repeats: int) -> dict[str, float]:
    run()
    with FlopCounterMode(display=False) as counter:
        run()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    middle = sorted(times)[repeats // 2]
    return {
        "M": round(parameters, 2),
        "GFLOPs": round(counter.get_total_flops() / 1e9, 1),
        "ms": round(1000 * middle),
    }


def table(results: dict) -> str:
    """The results in Markdown."""
    lines = [
        "| | box: IoU base / novel | box: Acc base / novel / all | point: IoU base / novel | point: Acc base / novel"
    ]
    lines[0] += " / all | M | GFLOPs | ms |"
    lines.append("|" + "---|" * 8)
    for row in ROWS:
        cells = [row]
        for kind in ("box", "point"):
            one = results[kind][row]
            cells.append(f"{one['IoU base']} / {one['IoU novel']}")
            cells.append(f"{one['Acc base']} / {one['Acc novel']} / {one['Acc']}")
        cells += [str(results["costs"][row][name]) for name in ("M", "GFLOPs", "ms")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the adapter, of 5 images each")
    parser.add_argument("--output", type=Path, default=Path("runs/research"), help="folder of maps and weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    segmenter = ovsam.load("ovsam-tiny", device="cpu")
    towers = Towers(clip=segmenter.model.clip, composition="clip")
    data = None

    def training() -> HeldOut:
        global data
        data = data or training_set(towers, args.output)
        return data

    adapter = kept(args.output / "adapter.safetensors", lambda: train_adapter(training(), towers, args.steps))
    prompts = kept(args.output / "prompts.safetensors", lambda: train_prompts(training(), towers))
    rows = Rows(segmenter, adapter, prompts)
    results = measure(rows) | {"costs": costs(rows), "steps": args.steps}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
