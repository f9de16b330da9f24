"""Stage `calibrate`: temperature, shift and thresholds of a trained model, from held-out images.

Temperature and shift turn logits into probabilities: they are fitted on the class name of each object and on class
names that were annotated and are absent, with equal weight (Platt 1999, with the shift inside the cosine). They are
stored in the parameters of the adapters. The scores of text queries and of the class names of prompted masks are then
calibrated (Platt 1999 again); these numbers are stored in the configuration and change no ranking. The score threshold
is the one with the highest F1 of instances, and high enough that at most a given share of absent class names returns
instances; the objectness threshold (everything mode) is the one with the highest F1 of boxes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from ovsam.data import SceneDataset, SegmentationData
from ovsam.data.words import related
from ovsam.errors import InputError
from ovsam.evaluation.metrics import are_right, calibration_error
from ovsam.evaluation.tasks import AP_FLOOR, ask
from ovsam.inference.encoded import EncodedImage
from ovsam.inference.loading import load
from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.adapters.clip2sam import Clip2SamAdapter
from ovsam.modeling.adapters.concepts import ConceptHead
from ovsam.modeling.locations import boxed_locations
from ovsam.ops import rle
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.files import write_text
from ovsam.ops.scores import calibrated
from ovsam.training.checkpoint import write_model
from ovsam.training.order import read_data
from ovsam.training.stages.prompts import LEAST

THRESHOLDS = "thresholds.json"
ABSENT_WORDS = 20  # absent class names queried per image
LIMIT = 2.5  # maximum logarithm of the scale of a calibration


@dataclass
class Held:
    """One held-out image: `encoded` as returned by Segmenter; masks, boxes and word ids of its objects; words to
    query."""

    encoded: EncodedImage
    masks: Tensor  # [n, S, S] bool
    boxes: Tensor  # [n, 4]
    word_ids: Tensor  # [n], -1 without a name
    present: list[int]
    absent: list[int]


@dataclass
class Pairs:
    """Cosines of objects and words with their scale and shift, and whether the word is the object's class name."""

    cosine: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    shift: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)

    def add(self, embeds: Tensor, scale: Tensor, shift: Tensor, words: Tensor, own: Tensor) -> None:
        """embeds [n, D], scale and shift [n, 1] or single, words [K, D], own [n, K] bool"""
        cosine = embeds.float() @ words.float().T
        for kept, value in ((self.cosine, cosine), (self.scale, scale), (self.shift, shift), (self.own, own)):
            kept.append(value.float().expand_as(cosine).flatten().cpu())


def calibrate_recipe(recipe: dict, folder: Path, device: str | None) -> Path:
    """Calibrate the model `[model] base` on the recipe's [data] and write it as a whole model, with thresholds.json."""
    if (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} already holds a model; pass another --output.")
    options = dict(recipe["stage_args"])
    segmenter = load(recipe["model"]["base"], device=device)
    data = read_data(recipe["data"], recipe["seed"], options["pictures"], segmenter.model.sam.image_size)
    if novel := options.pop("novel"):
        if not isinstance(data, SceneDataset) or len(data.novel_ids) < novel:
            raise InputError("novel is for emojiscenes with all their words; leave it out for other data.")
        data.novel = novel
    print(f"calibrating {recipe['model']['base']} on up to {options['pictures']} of\n{data.describe()}", flush=True)
    found = calibrate(segmenter, data, recipe["seed"], **options)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(segmenter, folder)
    write_text(folder / THRESHOLDS, json.dumps(found, indent=1) + "\n")
    return folder


@torch.no_grad()
def calibrate(
    segmenter: Segmenter,
    data: SegmentationData,
    seed: int,
    pictures: int = 60,
    absent: float = 0.03,
    temperature: bool = True,
) -> dict[str, float | list[float]]:
    """Set temperature, shift and thresholds of the segmenter's model in place.

    Args:
        data: held-out images.
        seed: seed of the absent class names.
        images: number of images.
        absent: share of the absent class names that may return instances.
        temperature: whether to fit temperature and shift as well.

    Returns:
        the thresholds and the calibrations of scores, under their names in the configuration.
    """
    model = segmenter.model
    model.config.score_calibration = model.config.name_calibration = (1.0, 0.0)
    _, embeds = segmenter.embed([word.name for word in data.words])
    if temperature:
        naming, finding = Pairs(), Pairs()
        for held in _pictures(segmenter, data, seed, pictures, "temperature"):
            words = torch.tensor(held.present + held.absent, device=embeds.device)
            named = held.word_ids >= 0
            own = held.word_ids[named][:, None].to(words.device) == words
            boxes = held.boxes[named][None].to(embeds.device)
            if isinstance(model.clip2sam, Clip2SamAdapter) and len(own):
                seen = model(features=held.encoded.features, input_boxes=boxes).class_embeds[0]
                naming.add(seen, model.clip2sam.log_scale.exp(), model.clip2sam.logit_shift, embeds[words], own)
            if isinstance(model.concepts, ConceptHead) and len(own):
                out = held.encoded.features.concepts
                best = boxed_locations(out, boxes, trust=1.0)[0]  # the location of each object
                where = (out.embeds[0, best], out.logit_scale[0, best], out.logit_shift[0, best])
                finding.add(*where, embeds[words], own)
        if naming.own:
            factor, shift = _fit(naming, "names of masks")
            model.clip2sam.log_scale += float(np.log(factor))
            model.clip2sam.logit_shift += shift
        if finding.own:
            factor, shift = _fit(finding, "text queries of locations")
            head = model.concepts.scale_shift  # a location's scale is elu(x) + 1, in practice x + 1
            head.weight[0] *= factor
            head.bias[0] = factor * head.bias[0] + factor - 1
            head.bias[1] += shift
    chosen = _calibrations_and_thresholds(segmenter, data, embeds, seed, pictures, absent)
    for name, value in chosen.items():
        setattr(model.config, name, value)
    return chosen


def _pictures(segmenter: Segmenter, data: SegmentationData, seed: int, pictures: int, title: str):
    for index in tqdm(range(min(pictures, len(data))), desc=title):
        sample = data[index]
        image = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())  # [3, S, S] -> [S, S, 3]
        large = sample["masks"].flatten(1).sum(1) >= LEAST
        ids = sample["word_ids"][large]
        present = sorted(set(sample["word_ids"].tolist()) - {-1})
        absent = _absent(data.words, present, sample["known"], np.random.default_rng((seed, index)))
        masks = sample["masks"][large]
        if len(masks):
            yield Held(segmenter.encode(image), masks, masks_to_boxes(masks), ids, present, absent)


def _absent(words: list, present: list[int], known: Tensor, rng: np.random.Generator) -> list[int]:
    """Return known class names that are absent in the image and share no keyword with those present."""
    here, chosen = [words[i] for i in present], []
    for i in rng.permutation(len(words)).tolist():
        fair = known[i] and i not in present
        if fair and not any(related(word, words[i]) or related(words[i], word) for word in here):
            chosen.append(i)
        if len(chosen) == ABSENT_WORDS:
            break
    return chosen


def _fit(pairs: Pairs, title: str) -> tuple[float, float]:
    """Fit a factor for the scale and an addition to the shift by the cross entropy."""
    cosine, scale, shift = (torch.cat(part).double() for part in (pairs.cosine, pairs.scale, pairs.shift))
    own = torch.cat(pairs.own).double()
    weight = torch.where(own > 0, 0.5 / own.sum().clamp(min=1), 0.5 / (1 - own).sum().clamp(min=1))
    change = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # log of the factor, and the shift

    def loss() -> Tensor:
        logits = change[0].clamp(-1.5, 1.5).exp() * scale * (cosine + shift + change[1])
        return F.binary_cross_entropy_with_logits(logits, own, weight, reduction="sum")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser = torch.optim.LBFGS([change], max_iter=100, line_search_fn="strong_wolfe")
        before = loss().item()
        optimiser.step(closure)
    factor, moved = float(change[0].detach().clamp(-1.5, 1.5).exp()), change[1].item()
    after = loss().item()
    print(f"{title}: scale x {factor:.3f}, shift {moved:+.3f}; cross entropy {before:.3f} -> {after:.3f}")
    return factor, moved


def _platt(pairs: list[tuple[float, bool]], title: str) -> list[float]:
    """Fit the scale and shift of the logits of scores by the cross entropy. Targets lie slightly inside 0 and 1, so
    that few or separable scores do not lead to extreme values (Platt 1999, §2.2)."""
    if not pairs:
        return [1.0, 0.0]
    scores, right = [score for score, _ in pairs], [hit for _, hit in pairs]
    logits = torch.tensor(scores, dtype=torch.float64).logit(eps=1e-6)
    hit = torch.tensor(right, dtype=torch.float64)
    target = torch.where(hit > 0, (hit.sum() + 1) / (hit.sum() + 2), 1 / ((1 - hit).sum() + 2))
    log_scale, shift = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.LBFGS([log_scale, shift], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        moved = log_scale.clamp(-LIMIT, LIMIT).exp() * logits + shift
        loss = F.binary_cross_entropy_with_logits(moved, target)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    found = [round(float(log_scale.detach().clamp(-LIMIT, LIMIT).exp()), 4), round(shift.item(), 4)]
    after = calibrated(torch.tensor(scores), found).tolist()
    errors = f"{calibration_error(scores, right):.3f} -> {calibration_error(after, right):.3f}"
    print(f"{title}: scale {found[0]}, shift {found[1]}; calibration error {errors}, {len(scores)} scores")
    return found


def _calibrations_and_thresholds(
    segmenter: Segmenter, data: SegmentationData, embeds: Tensor, seed: int, pictures: int, share: float
) -> dict[str, float | list[float]]:
    shown, fired, objects, own_objects, locations = [], [], 0, 0, []
    returned: list[tuple[float, bool]] = []  # score of the instances of text queries, and whether it is right
    named: list[tuple[float, bool]] = []  # highest score of masks of box prompts, and whether it is right
    for held in _pictures(segmenter, data, seed, pictures, "scores"):
        asked = held.present + held.absent
        names = [data.words[i].name for i in asked]
        found = ask(segmenter, held.encoded, embeds[torch.tensor(asked, device=embeds.device)], names, AP_FLOOR)
        scores, labels = found["scores"].tolist(), found["text_labels"]
        best = dict.fromkeys(names, 0.0)
        for name, score in zip(labels, scores, strict=True):
            best[name] = max(best[name], score)
        shown += [best[data.words[i].name] for i in held.present]
        fired += [best[data.words[i].name] for i in held.absent]
        own = held.word_ids >= 0
        own_objects += int(own.sum())
        true_names = [data.words[i].name for i in held.word_ids[own].tolist()]
        right = are_right(_codes(found["masks"]), labels, _codes(held.masks[own]), true_names)
        returned += zip(scores, right, strict=True)
        if own.any():
            boxes = held.boxes[own][None].to(embeds.device)
            class_names = [word.name for word in data.words]
            words_asked = {"text_embeds": embeds, "text_labels": class_names}
            prompted = segmenter.model(features=held.encoded.features, **words_asked, input_boxes=boxes).scores[0]
            surest, name = prompted.max(-1)
            named += zip(surest.tolist(), (name.cpu() == held.word_ids[own]).tolist(), strict=True)

        features = held.encoded.features
        refine = features.concepts.mask_features is None  # only boxes are used here, which refinement does not change
        outputs = segmenter.model(features=features, everything=True, refine=refine, proposal_threshold=AP_FLOOR)
        taken = box_iou(outputs.pred_boxes[0].cpu().float(), held.boxes) > 0.5  # [I, objects], highest score first
        for score, hits in zip(outputs.objectness[0].tolist(), taken, strict=True):
            locations.append((score, bool(hits.any())))
            taken = taken & ~hits  # each object is matched once
        objects += len(held.boxes)
    if not fired or not shown:
        raise InputError("No image of [data] has both an object and a known class name that is absent; use other data.")
    f1, balanced = best_f1(returned, own_objects)
    score = max(float(np.quantile(fired, 1 - share)), balanced)
    reached, wrong = (float(np.mean(np.array(scores) >= score)) for scores in (shown, fired))
    print(f"{reached:.3f} of present class names return instances, {wrong:.3f} of absent ones; F1 {f1:.3f}")
    words = _platt(returned, "scores of text queries")
    # The adapter's half of the score may still raise a location that is slightly below the threshold.
    score, proposal = calibrated(torch.tensor([score, 0.65 * score]), words).tolist()
    f1, objectness = best_f1(locations, objects)
    print(f"score >= {score:.3f}; objectness >= {objectness:.3f}: F1 of boxes {f1:.3f}")
    return {
        "score_calibration": words,
        "name_calibration": _platt(named, "scores of names"),
        "score_threshold": float(f"{score:.3g}"),
        "proposal_threshold": float(f"{proposal:.3g}"),
        "objectness_threshold": float(f"{objectness:.3g}"),
    }


def best_f1(found: list[tuple[float, bool]], objects: int) -> tuple[float, float]:
    """Return the highest F1 of a list of findings, and the score at which it is reached.

    Args:
        found: scores, and whether each finding is right; an object is found once.
        objects: the number of objects.
    """
    if not found:
        return 0.0, 0.0
    scores, hits = (np.array(part) for part in zip(*sorted(found, reverse=True), strict=True))
    f1 = 2 * np.cumsum(hits) / (np.arange(1, len(hits) + 1) + objects)
    place = int(np.argmax(f1))
    return float(f1[place]), float(scores[place])


def _codes(masks: Tensor) -> list:
    """masks [n, H, W] bool -> COCO run lengths"""
    return [rle.encode(mask.cpu().numpy()) for mask in masks]
