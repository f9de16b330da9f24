"""Stage `adapters`: ConceptHead and Clip2SamAdapter trained together on the same images.

Clip2SamAdapter is trained on perturbed true masks; `clip2sam` continues on masks that the SAM side predicts. The towers
are frozen; with `train_clip` a small tower of this project is trained too, by its own LiT loss and through the
adapters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.modeling.adapters.clip2sam import Clip2SamAdapter, Clip2SamConfig
from ovsam.modeling.clip.base import mask_pool
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.stages.concepts import ConceptsStage
from ovsam.training.stages.prompts import choose_objects, resize_masks, visible_objects
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers, start_region
from ovsam.training.stages.word_losses import LitLosses


class AdaptersStage(ConceptsStage):
    """
    Args:
        prompts: number of objects of each image that Clip2SamAdapter classifies.
        train_clip: whether to train the image tower of the CLIP side too.
        keyword_weight: weight of its loss against keywords.
        mlp_dim: hidden width of the MLP of Clip2SamAdapter, 0 for none.
        arguments: arguments of ConceptsStage.
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        prompts: int = 16,
        train_clip: bool = False,
        keyword_weight: float = 0.3,
        mlp_dim: int = 0,
        **arguments,
    ):
        super().__init__(words, towers, **arguments)
        self.clip2sam = start_region(Clip2SamAdapter(Clip2SamConfig(**self.size, mlp_dim=mlp_dim)), towers)
        self.prompts, self.train_clip = prompts, train_clip
        if train_clip and self.cache:
            raise InputError("The maps of an image tower that learns cannot be kept: leave out cache or train_clip.")
        self.lit = None
        if train_clip:
            towers.clip.requires_grad_(True)
            self.lit = LitLosses(words, self.word_losses.label_smoothing, keyword_weight)
            nn.init.constant_(self.lit.log_scale, 4.0)  # the value at the end of the clip stage

    def parts(self) -> dict[str, nn.Module]:
        return {"concepts": self.concepts, "clip2sam": self.clip2sam} | ({"clip": self.towers.clip} if self.lit else {})

    def published_state(self) -> dict[str, Tensor]:
        parts = self.parts().items()
        return {f"{part}.{name}": t for part, module in parts for name, t in module.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        for part, module in {"clip": self.towers.clip, **self.parts()}.items():
            own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            if own:  # a run with a frozen CLIP side publishes no weights of it
                module.load_state_dict(own)

    def forward(
        self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor, **kept: Tensor
    ) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.train_clip and torch.is_grad_enabled()):
            features = self.towers.encode_clip(image) if self.train_clip else None
            maps = self.drop(self.towers.maps(image, kept=kept) if features is None else features.maps)
        with torch.no_grad():
            taught = self.teach(image, masks)
        masks = resize_masks(masks, self.towers.frame(image))
        losses, metrics = self.concept_losses(self.concepts(maps), masks, word_ids, known, taught)
        name_losses, metrics["mask_top1"] = self.naming_losses(maps, masks, word_ids, known, taught)
        losses |= name_losses
        if features is not None:
            visible = visible_objects(masks, word_ids)
            embeds = F.normalize(mask_pool(features.pool_map, masks)[visible].float(), dim=-1)
            lit = self.lit(embeds, word_ids[visible])
            losses["lit"], metrics["lit_top1"] = lit["loss"], lit["top1"]
        metrics |= {name: value.detach() for name, value in losses.items()}
        return {"loss": sum(losses.values()), **metrics}

    def naming_losses(
        self, maps: tuple[Tensor, ...], masks: Tensor, word_ids: Tensor, known: Tensor, taught: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of Clip2SamAdapter on perturbed true masks, which resemble those of the decoder."""
        masks, visible, keep = choose_objects(masks, self.prompts, visible_objects(masks, word_ids))
        boxes, word_ids = masks_to_boxes(masks), word_ids.gather(1, keep)
        soft = F.avg_pool2d(masks.float(), 4)  # [B, P, H/4, W/4]
        noise = F.interpolate(
            torch.randn(*soft.shape[:2], 8, 8, device=soft.device), size=soft.shape[-2:], mode="bilinear"
        )
        grown = F.max_pool2d(soft, 3, 1, 1)
        shrunk = -F.max_pool2d(-soft, 3, 1, 1)
        soft = torch.where(noise > 0.6, grown, torch.where(noise < -0.6, shrunk, soft))
        size = boxes[..., 2:] - boxes[..., :2]
        jittered = boxes + torch.randn_like(boxes) * 0.04 * torch.cat([size, size], -1)
        embeds = self.clip2sam(maps, jittered, soft)[visible]  # [n, D]
        ids = word_ids[visible]
        name_loss, top1 = self.word_losses.classify(embeds, ids)
        asked = self.word_losses.known_texts(known)[visible.nonzero()[:, 0]]  # [n, V + Kw]
        logits = self.clip2sam.logits(embeds[None], self.word_losses.texts)[0]
        losses = {"mask_name": name_loss}
        losses["mask_word"] = self.word_weight * self.word_losses.word_loss(logits, ids, asked)
        if taught is not None:
            distance = 1 - (embeds.float() * taught.take_along_dim(keep[..., None], 1)[visible].float()).sum(-1)
            losses["mask_teacher"] = self.teacher_weight * distance.sum() / max(len(distance), 1)
        return losses, top1
