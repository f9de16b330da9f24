"""The two stages of the paper's ablation that the library has no use for: CoOp's learned prompts, and CLIP2SAM as the
paper describes it, on SAM features made of CLIP's maps. `ovsam.training` drives them like its own."""

import copy

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ovsam.checkpoints.text_tower import text_tower
from ovsam.modeling.adapters import Clip2SamFpnAdapter, Clip2SamFpnConfig, Sam2ClipAdapter, Sam2ClipConfig
from ovsam.modeling.clip.base import boxes_to_masks
from ovsam.modeling.sam import SamSide
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.stages import STAGES
from ovsam.training.stages.clip2sam import answering_parts
from ovsam.training.stages.losses import mask_iou, point_mask_losses
from ovsam.training.stages.prompts import (
    LEAST,
    choose_objects,
    jitter_boxes,
    random_points,
    resize_masks,
    visible_objects,
)
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers
from ovsam.training.stages.word_losses import check_width

# Of all softmaxes over words. The paper has 100, which suits CLIP, whose names lie close together; those of MiniLM lie
# far apart, and at 100 a random start would be certain of its errors.
SCALE = 30.0


class LearnedPrompt(nn.Module):
    """Context vectors before the words of a name, and the frozen text tower (CoOp, Zhou et al. 2022)."""

    def __init__(self, length: int):
        super().__init__()
        self.tower, self.tokenizer = text_tower()
        width = self.tower.text_model.config.hidden_size
        self.context = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, names: list[str]) -> Tensor:
        """K names -> [K, D], L2-normalised."""
        tokens = self.tokenizer(names, padding=True, return_tensors="pt").to(self.context.device)
        words = self.tower.text_model.embeddings.word_embeddings(tokens["input_ids"])  # [K, T, C]
        mask = tokens["attention_mask"]
        context = self.context.expand(len(names), -1, -1)
        words = torch.cat([words[:, :1], context, words[:, 1:]], 1)  # the first token is [CLS]
        mask = torch.cat([mask[:, :1], mask.new_ones(context.shape[:2]), mask[:, 1:]], 1)
        hidden = self.tower.text_model(inputs_embeds=words, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class CoopStage(nn.Module):
    """The context vectors alone learn: cross entropy among the base names, of base objects under the SAM side's masks.

    Args:
        towers: both frozen.
        length: how many context vectors.
    """

    def __init__(self, towers: Towers, length: int = 8):
        super().__init__()
        self.towers, self.prompt, self.names = towers, LearnedPrompt(length), []

    def prepare(self, data: Dataset, folder, data_key: str) -> Dataset:
        self.names = [word.name for word in data.words]
        return data

    def published_state(self) -> dict[str, Tensor]:
        return {"context": self.prompt.context}

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        visible = visible_objects(masks, word_ids)
        with torch.no_grad():
            decoded = self.towers.sam.decode(self.towers.encode_sam(image), input_boxes=masks_to_boxes(masks))
            seen = self.towers.sam.select_masks(decoded, multimask_output=False).masks[:, :, 0].sigmoid()
            embeds = self.towers.clip.pool(self.towers.encode_clip(image), masks=seen)[visible]  # [n, D]
        return name_loss(embeds, self.prompt(self.names), word_ids[visible])


class TokenStage(nn.Module):
    """The first half of CLIP2SAM, on SAM2CLIP's features (Yuan et al. 2024, §3.2-3.3): the mask decoder learns, with a
    label token in the place of its IoU token. 2 x cross entropy of what becomes of the token among the base names, 5 x
    cross entropy and 5 x Dice of the masks. Without the background class: there are no prompts beside objects here.

    Args:
        words: the base words.
        towers: CLIP's maps are read; of the SAM side, the prompt encoder and the mask decoder.
        sam2clip_weights: of the Sam2ClipAdapter over the same CLIP tower.
        prompts: objects of each picture that are prompted.
        box_share: share of the steps with boxes; the others have clicks.
        box_noise: deviation of a box's sides, in parts of its size.
        points: where the masks are compared.
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        sam2clip_weights: str,
        prompts: int = 5,
        box_share: float = 0.5,
        box_noise: float = 0.05,
        points: int = 4096,
    ):
        super().__init__()
        check_width(words, towers.embed_dim)
        self.towers = towers
        self.sam2clip = load_sam2clip(towers, sam2clip_weights)
        self.sam = with_label_token(towers.sam, towers.embed_dim)
        self.register_buffer("names", words.names, persistent=False)  # [V, D]
        self.prompts, self.box_share, self.box_noise, self.points = prompts, box_share, box_noise, points

    def published_state(self) -> dict[str, Tensor]:
        return dict(self.sam.model.mask_decoder.state_dict())

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            features = self.sam2clip(self.towers.maps(image))
            masks, valid, keep = choose_objects(masks, self.prompts, masks.flatten(2).sum(-1) >= LEAST)
            if torch.rand(()) < self.box_share:
                boxes = jitter_boxes(masks_to_boxes(masks), self.box_noise, float(image.shape[-1]))
                prompts = {"input_boxes": boxes}
            else:
                prompts = {"input_points": random_points(masks.flatten(0, 1)).view(*valid.shape, 1, 2)}
        decoded = self.sam.decode(features, **prompts)
        named = name_loss(class_embeds(decoded)[valid], self.names, word_ids.gather(1, keep)[valid])
        got = decoded.masks[:, :, 0][valid].float()
        truth = resize_masks(masks, got.shape[-1])[valid].float()
        pixel, dice = point_mask_losses(got, truth, self.points)
        mask_loss = 5 * (pixel + dice).mean()
        metrics = {"mask": mask_loss.detach(), "iou": mask_iou(got.detach(), truth).mean(), "top1": named["top1"]}
        return {"loss": 2 * named["loss"] + mask_loss, **metrics}


class RoiStage(nn.Module):
    """The second half: FPN + RoIAlign over CLIP's maps, cross entropy among the base names. Clip2SamFpnAdapter reads no
    more of a mask than the box around it, so here it is given boxes as wrong as predicted masks are, of all objects.

    Args:
        words: the base words.
        towers: CLIP's maps are read.
        width, roi_size, finest_size: of Clip2SamFpnAdapter.
        box_noise: deviation of a box's sides, in parts of its size.
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        width: int = 64,
        roi_size: int = 7,
        finest_size: int = 28,
        box_noise: float = 0.1,
    ):
        super().__init__()
        check_width(words, towers.embed_dim)
        self.towers, self.box_noise = towers, box_noise
        size = {"in_channels": towers.channels, "embed_dim": towers.embed_dim, "width": width}
        self.clip2sam = Clip2SamFpnAdapter(Clip2SamFpnConfig(**size, roi_size=roi_size, finest_size=finest_size))
        self.register_buffer("names", words.names, persistent=False)  # [V, D]

    def published_state(self) -> dict[str, Tensor]:
        return dict(self.clip2sam.state_dict())

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        visible, size = visible_objects(masks, word_ids), image.shape[-1]
        with torch.no_grad():
            maps = self.towers.maps(image)
        boxes = jitter_boxes(masks_to_boxes(masks), self.box_noise, float(size))
        filled = (boxes_to_masks(boxes, (size // 4, size // 4), 4) > 0.5).float()
        return name_loss(self.clip2sam(maps, filled)[visible], self.names, word_ids[visible])


def name_loss(embeds: Tensor, names: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Cross entropy and top-1 of embeds [n, D] among names [V, D], both L2-normalised; ids [n]."""
    logits = SCALE * embeds.float() @ names.T
    return {"loss": F.cross_entropy(logits, ids), "top1": (logits.argmax(-1) == ids).float().mean()}


def with_label_token(sam: SamSide, embed_dim: int) -> SamSide:
    """A copy without an image encoder, whose mask decoder learns; where it had an IoU token is a label token, and where
    it predicted IoU, a class embedding (`class_embeds`)."""
    own = copy.deepcopy(sam)
    for name in own.encoder_parts:
        setattr(own.model, name, None)
    decoder, width = own.model.mask_decoder, own.width
    decoder.iou_prediction_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embed_dim))
    answering_parts(own).requires_grad_(True)
    decoder.iou_prediction_head.requires_grad_(True)
    return own


def class_embeds(decoded) -> Tensor:
    """What the label token has become, [B, P, D], L2-normalised: it comes out where the predicted IoU would."""
    return F.normalize(decoded.iou.float(), dim=-1)


def load_sam2clip(towers: Towers, weights: str) -> Sam2ClipAdapter:
    """A frozen Sam2ClipAdapter, as the stage sam2clip published it."""
    state = {name.removeprefix("sam2clip."): tensor for name, tensor in load_file(weights).items()}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("layers.layers."))
    config = Sam2ClipConfig(in_channels=towers.channels, width=towers.sam.width, num_layers=layers)
    adapter = Sam2ClipAdapter(config)
    adapter.load_state_dict(state)
    return adapter.eval().requires_grad_(False)


STAGES |= {"coop": CoopStage, "token": TokenStage, "roi": RoiStage}  # so that recipes can name them
