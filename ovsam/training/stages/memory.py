"""Stage `memory`: memory attention and memory encoder of a tracker, on clips of moving scenes.

The memory of SAM 2 (Ravi et al. 2024, section 4) is trained as in its appendix D.2.2: an object is prompted on the
first frame, by its mask, its box or a click, and followed through the clip with the memories of the frames before.
Losses are focal loss, Dice loss and cross entropy of the object score. The rest of the model is frozen, so that its
output on images stays the same. A model without a memory gets a new one.

Gradients flow through the memories of all frames. transformers' own video forward is for inference only; this one calls
the same modules through `Sam2VideoSide`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.modeling_ovsam_video import with_memory
from ovsam.modeling.outputs import SamFeatures, TrackedMasks
from ovsam.modeling.sam.memory import FrameMemory, ObjectMemory, stack_memories
from ovsam.modeling.sam.video import Sam2VideoSide
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.stages.losses import dice_loss, focal_loss, mask_iou
from ovsam.training.stages.prompts import choose_objects, jitter_boxes, random_points
from ovsam.training.stages.towers import IMAGENET_MEAN, IMAGENET_STD, Pixels


class MemoryStage(nn.Module):
    """
    Args:
        model: a model with one input for SAM and CLIP.
        objects: number of objects that are followed in each clip.
        mask_share, box_share: shares of the steps in which objects are prompted by their mask and by their box; in the
            others by a click.
        layers, memories, pointers: layers of memory attention, number of spatial memories and of object pointers that
            it reads, where the model has no memory yet; dropout: that of memory attention.
        image_size: side of the images in pixels (default: the model's). The result is a model for images of that size.
        train_decoder: whether to train the mask decoder too; its object score is always trained.
        focal_weight, dice_weight, score_weight: weights of the losses.

    Raises:
        InputError: a share is out of range, or a memory cannot be added to the model.
    """

    def __init__(
        self,
        model: OVSamModel,
        objects: int = 3,
        mask_share: float = 0.6,
        box_share: float = 0.2,
        layers: int = 2,
        memories: int = 4,
        pointers: int = 8,
        dropout: float = 0.1,
        image_size: int | None = None,
        train_decoder: bool = False,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        score_weight: float = 1.0,
    ):
        super().__init__()
        if mask_share < 0 or box_share < 0 or mask_share + box_share > 1:
            raise InputError(
                f"mask_share {mask_share} and box_share {box_share} must be shares that add up to 1 or less."
            )
        image_size = image_size or model.sam.image_size
        if not isinstance(model.sam, Sam2VideoSide) or image_size != model.sam.image_size:
            model = with_memory(
                model,
                image_size,
                memory_attention_num_layers=layers,
                memory_attention_feed_forward_hidden_size=4 * model.sam.width,
                memory_fuser_intermediate_dim=4 * model.sam.width,
                num_maskmem=memories,
                max_object_pointers_in_encoder=pointers,
                memory_attention_dropout=dropout,
            )
        self.model = model.requires_grad_(False)
        self.objects, self.mask_share, self.box_share = objects, mask_share, box_share
        self.focal_weight, self.dice_weight, self.score_weight = focal_weight, dice_weight, score_weight
        for part in self._trained(train_decoder):
            part.requires_grad_(True)
        clip = model.clip if model.config.composition == "clip" else None  # whose pixels are the model's, as in compose
        mean, std = (clip.image_mean, clip.image_std) if clip is not None else (IMAGENET_MEAN, IMAGENET_STD)
        self.pixels = Pixels(mean, std)

    @property
    def sam(self) -> Sam2VideoSide:
        return self.model.sam

    def _trained(self, train_decoder: bool) -> list[nn.Module | nn.Parameter]:
        model, unread = self.sam.model, "no_memory_positional_encoding"
        memory = [getattr(model, name, None) for name in self.sam.memory_parts if name != unread]
        decoder = model.mask_decoder if train_decoder else model.mask_decoder.pred_obj_score_head
        return [part for part in (*memory, decoder) if part is not None]

    def train(self, mode: bool = True) -> "MemoryStage":
        """Only trained parts are in training mode: the image encoders stay as in inference."""
        super().train(mode)
        self.model.eval()
        self.sam.training = mode  # masks are not hidden, memories not rounded
        for name in self.sam.memory_parts:
            part = getattr(self.sam.model, name, None)
            if isinstance(part, nn.Module):
                part.train(mode)
        return self

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights that are trained, with the names of the whole model."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in trained}

    def load_published(self, state: dict[str, Tensor]) -> None:
        own = self.published_state().keys()
        self.model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        """image [B, T, 3, S, S], masks [B, O, T, S, S]."""
        frames, config, side = image.shape[1], self.sam.model.config, self.sam
        # 1. Choose objects that the first frame shows; if there are fewer, the rest has weight zero.
        first, valid, chosen = choose_objects(masks[:, :, 0], self.objects)  # [B, P, S, S], [B, P], [B, P]
        index = chosen[:, :, None, None, None].expand(-1, -1, *masks.shape[2:])
        truth = masks.gather(1, index) & valid[:, :, None, None, None]  # [B, P, T, S, S]
        # 2. The first frame, by a prompt; its memory is conditioned, all others are tracked.
        memory = ObjectMemory()
        losses, ious = [], []
        for frame in range(frames):
            with torch.no_grad():
                sam = self.model.encode(self.pixels(image[:, frame]), concepts=False).sam
            tracked = self._prompt(sam, first) if frame == 0 else self._follow(sam, memory, frame, frames)
            target = (F.avg_pool2d(truth[:, :, frame].float(), 4) > 0.5).float()  # [B, P, S/4, S/4]
            if frame:
                losses.append(self._loss(tracked, target, valid))
                shown = target.flatten(2).any(-1) & valid
                ious.append((mask_iou(tracked.masks, target) * shown).sum() / shown.sum().clamp(min=1))
            if frame < frames - 1:
                prompted = torch.full((first.shape[1],), frame == 0, device=image.device)
                spatial = side.memorise(sam, tracked, prompted)  # [B, P, T, 64]
                memory.store(frame, FrameMemory(spatial, tracked.pointers), frame == 0, config)
        return {"loss": torch.stack(losses).mean(), "iou": torch.stack(ious).mean(), "iou_last": ious[-1]}

    def _prompt(self, sam: SamFeatures, masks: Tensor) -> TrackedMasks:
        """Segment objects on their first frame; masks [B, P, S, S]."""
        b, p, size, _ = masks.shape
        kind = float(torch.rand(()))
        if kind < self.mask_share:
            return self.sam.adopt(sam, masks)
        if kind < self.mask_share + self.box_share:
            points = jitter_boxes(masks_to_boxes(masks), 0.05, float(size)).view(b, p, 2, 2)
            labels = torch.tensor([2, 3], device=masks.device).expand(b, p, 2)
        else:
            points = random_points(masks.flatten(0, 1)).view(b, p, 1, 2)
            labels = torch.ones(b, p, 1, dtype=torch.long, device=masks.device)
        recalled, best = self.sam.without_memory(sam, p), self.sam.takes_best(points.shape[2], True)
        return self.sam.segment(sam, recalled, points, labels, best)

    def _follow(self, sam: SamFeatures, memory: ObjectMemory, frame: int, frames: int) -> TrackedMasks:
        """Segment objects on a later frame, by their memory alone."""
        plan, spatial, pointers = memory.recall(frame, self.sam.model.config, num_frames=frames)
        # One entry stands for all objects here: n memories [B, P, T, 64] -> [B, P, n, T, 64].
        read = (stack_memories([each])[0].movedim(0, 2) for each in (spatial, pointers))
        return self.sam.segment(sam, self.sam.recall(sam, plan, *read), multimask=self.sam.takes_best(0, False))

    def _loss(self, tracked: TrackedMasks, target: Tensor, valid: Tensor) -> Tensor:
        """Losses of masks where the object is visible, and of the score everywhere."""
        shown = target.flatten(2).any(-1)  # [B, P]
        pixel = focal_loss(tracked.masks, target, 2.0, 0.25).mean((-1, -2))
        mask = self.focal_weight * pixel + self.dice_weight * dice_loss(tracked.masks, target)
        score = F.binary_cross_entropy_with_logits(tracked.object_logits[..., 0], shown.float(), reduction="none")
        each = mask * shown + self.score_weight * score
        return (each * valid).sum() / valid.sum().clamp(min=1)
