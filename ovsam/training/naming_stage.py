"""Stage `naming`: Clip2SamAdapter alone, on the masks that the trained SAM side gives for boxes and clicks.

True masks are tidier than predicted ones; this is the last step of the method's training (predicted box and mask in).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ovsam.boxes import masks_to_boxes
from ovsam.sam import EdgeTamSide

from .adapters_stage import AdaptersStage
from .sam_stage import edgetam_config
from .targets import jitter_boxes, object_masks, random_points


class NamingStage(AdaptersStage):
    def __init__(self, sam: dict, sam_weights: str, **arguments):
        super().__init__(**arguments)
        self.sam = EdgeTamSide(edgetam_config(**sam))
        self.sam.load_state_dict({n.removeprefix("sam."): t for n, t in load_file(Path(sam_weights)).items()})
        self.sam.requires_grad_(False)
        self.concepts.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.sam.eval()
        self.concepts.eval()
        return self

    def published_state(self) -> dict[str, Tensor]:
        return {f"clip2sam.{name}": tensor for name, tensor in self.clip2sam.state_dict().items()}

    def forward(self, image: Tensor, index_map: Tensor, word_ids: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            pixels = self.lit.pixels(image)  # both sides share one geometry and normalisation
            features, maps = self.sam.encode(pixels), self.clip.encode_image(pixels).maps
            masks = object_masks(index_map, word_ids.shape[1])  # [B, O, H, W]
            visible = (masks.flatten(2).sum(-1) >= 64) & (word_ids >= 0)
            boxed = bool(torch.rand(()) < 0.6)
            region = jitter_boxes(masks_to_boxes(masks), 0.02, float(image.shape[-1]))
            points = random_points(masks.flatten(0, 1)).view(*masks.shape[:2], 1, 2)
            prompts = {"input_boxes": region} if boxed else {"input_points": points}
            decoded = self.sam.select_masks(self.sam.decode(features, **prompts), multimask_output=False)
            predicted = decoded.masks[:, :, 0]  # [B, O, H/4, W/4]
            if not boxed:  # a person's box is the region itself, as in OVSamModel
                region = masks_to_boxes(predicted > 0) * (image.shape[-1] / predicted.shape[-1])
        embeds = self.clip2sam(maps, region, predicted.sigmoid(), decoded.tokens[:, :, 0])[visible]  # [n, D]
        ids = word_ids[visible]
        name_loss, top1 = self.name_loss(embeds, ids)
        word_loss = self.word_loss(self.clip2sam.logits(embeds[None], self.texts)[0], ids)
        loss = name_loss + self.word_weight * word_loss
        return {"loss": loss, "name": name_loss.detach(), "word": word_loss.detach(), "top1": top1}
