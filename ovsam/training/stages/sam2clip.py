"""Stage `sam2clip`: Sam2ClipAdapter is distilled from the SAM side's image encoder (Open-Vocabulary SAM, Yuan et al.
2024, §3.2): the per-pixel squared error of its features, whose targets are computed once and stored on disk.

Optionally with EdgeSAM's prompts in the loop (Zhou et al. 2023, §3.3): masks decoded from the features of the adapter
must equal those decoded from the features of the teacher, for a first prompt and for clicks where the two differ. If
the masks of the data are exact, they can replace those of the teacher, which are worse and need a decoding.

Optionally the adapter does not start at random, but as the linear map from CLIP's maps to SAM's pyramid with the lowest
squared error, with its layers as the identity. On the towers of ovsam-tiny (November 2026) this start alone decoded
boxes at a mean IoU of 0.61, the teacher at 0.76 and a random adapter at 0.10.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset

from ovsam.errors import InputError
from ovsam.modeling.adapters.common import upsample
from ovsam.modeling.adapters.sam2clip import Sam2ClipAdapter, Sam2ClipConfig
from ovsam.modeling.sam import DecodedMasks, SamFeatures
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.feature_cache import FeatureCache
from ovsam.training.stages.losses import dice_loss, mask_iou
from ovsam.training.stages.predictions import Found, prompted
from ovsam.training.stages.prompts import choose_objects, corrective_clicks, jitter_boxes, random_points
from ovsam.training.stages.towers import Towers

STRIDE = 4  # stride of the decoder's masks
TEACHER = "teacher_"  # prefix of cached features in a sample: teacher_0 is the embedding, then the finer maps


class Sam2ClipStage(nn.Module):
    """
    Args:
        towers: towers with the CLIP side whose maps the adapter reads, and the SAM side as the teacher.
        layers, heads: sizes of the adapter's transformer.
        cache: whether to store the teacher's features on disk (2 bytes a number: 8.4 MB for each image for SAM 2 at
            1024 px), instead of encoding every image again in every epoch.
        loops: number of prompts in the loop; 0 for none; EdgeSAM found 1 to be enough.
        prompts: number of prompted objects of each image.
        mask_weight: weight of the mask losses (Dice + cross entropy, as in EdgeSAM) relative to those of the features.
        true_masks: whether the masks of the loop are those of the data instead of the teacher's; then the best of the
            decoder's three masks and its predicted IoU are trained too, at half the weight.
        start: number of images for the linear start; 0 for a random start.
    """

    def __init__(
        self,
        towers: Towers,
        layers: int = 3,
        heads: int = 8,
        cache: bool = True,
        loops: int = 0,
        prompts: int = 8,
        mask_weight: float = 1.0,
        true_masks: bool = False,
        start: int = 0,
    ):
        super().__init__()
        self.towers = towers
        if towers.clip_size not in (None, towers.sam.image_size):
            raise InputError("sam2clip needs the same input for SAM and CLIP: leave model.clip_size out.")
        size = {"in_channels": towers.channels, "width": towers.sam.width}
        self.sam2clip = Sam2ClipAdapter(Sam2ClipConfig(**size, num_layers=layers, num_heads=heads))
        if start and towers.sam.finer_maps != self.sam2clip.finer_maps:
            raise InputError(
                "The linear start is for SAM 2 and EdgeTAM, whose decoder reads maps at strides 4 and 8 too."
            )
        self.cache, self.loops, self.prompts, self.mask_weight = cache, loops, prompts, mask_weight
        self.true_masks, self.start = true_masks, start

    def published_state(self) -> dict[str, Tensor]:
        return {f"sam2clip.{name}": tensor for name, tensor in self.sam2clip.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        self.sam2clip.load_state_dict({name.removeprefix("sam2clip."): tensor for name, tensor in state.items()})

    def prepare(self, data: Dataset, folder: Path, data_key: str) -> Dataset:
        """Return the training set with the teacher's features of each image. `folder` is the parent of the cache,
        `data_key` identifies the data set and its seed. Also fits the linear start."""
        if self.start:
            self.to(PartialState().device).fit_start([data[i]["image"] for i in range(min(self.start, len(data)))])
        if not self.cache:
            return data
        return FeatureCache.of(data, folder, data_key, self.towers.sam, self.teach, TEACHER)

    @torch.no_grad()
    def fit_start(self, images: list[Tensor]) -> None:
        """Initialise the adapter with the linear map of lowest squared error on these images [3, S, S]."""
        self.towers.eval()
        device = next(self.sam2clip.parameters()).device
        batches = [image[None].to(device) for image in images]
        maps, features = [self.towers.maps(b) for b in batches], [self.towers.encode_sam(b) for b in batches]
        start_linear(self.sam2clip, maps, features)
        decoder = self.towers.sam.model.mask_decoder
        for own, of_sam in zip(self.sam2clip.high_res, (decoder.conv_s0, decoder.conv_s1), strict=True):
            own.load_state_dict(of_sam.state_dict())  # the layers of the finer maps of the pyramid

    @torch.no_grad()
    def teach(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features of the SAM side for images [B, 3, S, S]."""
        self.towers.sam.eval()
        pixels = self.towers.sam_pixels(image).to(next(self.towers.sam.parameters()).device)
        features = self.towers.sam.encode(pixels)
        return {f"{TEACHER}{i}": feature for i, feature in enumerate((features.embedding, *(features.high_res or ())))}

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor, **teacher) -> dict[str, Tensor]:
        with torch.no_grad():
            maps = self.towers.maps(image)
            teacher = teacher or self.teach(image)
        embedding, *high_res = [teacher[name].float() for name in sorted(teacher)]
        want = SamFeatures(embedding=embedding, high_res=tuple(high_res))
        got = self.sam2clip(maps)
        # SAM 1 has no finer maps, and its decoder reads none.
        got = SamFeatures(embedding=got.embedding, high_res=got.high_res[: len(high_res)])
        error = F.mse_loss(got.embedding.float(), embedding)
        errors = [F.mse_loss(g.float(), w) for g, w in zip(got.high_res, high_res, strict=True)]
        loss = error + sum(errors)
        metrics = {"embedding_mse": error.detach(), "high_res_mse": loss.detach() - error.detach()}
        if self.loops:
            distilled, metrics["mask_iou"] = self.prompt_in_the_loop(got, want, masks)
            metrics["mask_loss"] = distilled.detach()
            loss = loss + self.mask_weight * distilled
        return {"loss": loss, **metrics}

    def prompt_in_the_loop(self, student: SamFeatures, teacher: SamFeatures, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the same prompts with both: first a box or a click, then clicks where their masks differ."""
        sam = self.towers.sam
        masks, valid, _ = choose_objects(masks, self.prompts)  # [B, P, H, W], [B, P]
        b, p = valid.shape
        size = masks.shape[-1]
        points = labels = boxes = previous = None
        if torch.rand(()) < 0.5:
            boxes = jitter_boxes(masks_to_boxes(masks), 0.1, float(size))
        else:
            points = random_points(masks.flatten(0, 1)).view(b, p, 1, 2)
            labels = torch.ones(b, p, 1, dtype=torch.long, device=masks.device)
        truth = (F.avg_pool2d(masks.float(), STRIDE) > 0.5).float()  # [B, P, H/4, W/4], as the decoder's masks
        loss, weight = 0.0, valid.float() / valid.sum().clamp(min=1)
        for loop in range(1 + self.loops):
            prompts = {"input_points": points, "input_labels": labels, "input_boxes": boxes, "input_masks": previous}
            if self.true_masks:
                target = truth
            else:
                with torch.no_grad():
                    target = (sam.decode(teacher, **prompts).masks[:, :, 0] > 0).float()  # [B, P, h, w]
            out = sam.decode(student, **prompts)
            each = self.mask_losses(out, target)
            loss = loss + (each * weight).sum() / (1 + self.loops)
            got = out.masks[:, :, 0].detach()
            if loop < self.loops:
                clicks, found = corrective_clicks(got > 0, target > 0, size)
                points = clicks if points is None else torch.cat([points, clicks], 2)
                labels = found if labels is None else torch.cat([labels, found], 2)
                previous = got if self.true_masks else None  # as in inference, where clicks correct the previous mask
        return loss, (mask_iou(got, target) * weight).sum()

    def mask_losses(self, out: DecodedMasks, target: Tensor) -> Tensor:
        """Mask losses of each prompt [B, P], for targets [B, P, h, w]."""
        masks = out.masks.float() if self.true_masks else out.masks[:, :, :1].float()  # [B, P, M, h, w]
        target = target[:, :, None].expand_as(masks)
        pixel = F.binary_cross_entropy_with_logits(masks, target, reduction="none").mean((-1, -2))
        each = pixel + dice_loss(masks, target)  # [B, P, M]
        if not self.true_masks:
            return each[..., 0]
        quality = (out.iou - mask_iou(masks.detach(), target)).square().mean(-1)
        return each[..., 0] + 0.5 * each[..., 1:].amin(-1) + quality

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return the masks that are decoded from the adapter's features for the true boxes."""
        features = self.sam2clip(self.towers.maps(image))
        return prompted(self.towers.sam.decode(features, input_boxes=masks_to_boxes(masks)), masks, word_ids)


@torch.no_grad()
def start_linear(adapter: Sam2ClipAdapter, maps: list[tuple[Tensor, ...]], features: list[SamFeatures]) -> None:
    """Set the adapter to the linear map from CLIP's maps to SAM's pyramid of lowest squared error, level by level from
    the coarsest; each corrects the levels above it. Its layers and its local convolution start as the identity.

    Args:
        maps: four maps [1, Ci, h, w] at strides 4, 8, 16, 32 for each image.
        features: features of the same images, with pyramids at strides 4, 8, 16.
    """
    for layer in adapter.layers.layers:
        for last in (layer.self_attn.out_proj, layer.linear2):  # last layer of a residual branch
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    nn.init.zeros_(adapter.local.weight)
    nn.init.zeros_(adapter.local.bias)
    nn.init.dirac_(adapter.out.weight)
    nn.init.zeros_(adapter.out.bias)

    lateral8, lateral16, lateral32 = adapter.pyramid.laterals
    both = [torch.cat([m[2], upsample(m[3])], 1) for m in maps]
    weight, bias = least_squares(both, [f.embedding for f in features])  # [C, C16 + C32, 1, 1], [C]
    _set(lateral16, weight[:, : lateral16.in_channels], bias)
    _set(lateral32, weight[:, lateral16.in_channels :], torch.zeros_like(bias))
    above = [upsample(lateral16(m[2]) + upsample(lateral32(m[3]))) for m in maps]
    _set(
        lateral8, *least_squares([m[1] for m in maps], [f.pyramid[1] - a for f, a in zip(features, above, strict=True)])
    )
    above = [upsample(lateral8(m[1]) + a) for m, a in zip(maps, above, strict=True)]
    _set(
        adapter.stride4,
        *least_squares([m[0] for m in maps], [f.pyramid[0] - a for f, a in zip(features, above, strict=True)]),
    )


def _set(layer: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def least_squares(inputs: list[Tensor], outputs: list[Tensor], ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return weight [Co, Ci, 1, 1] and bias [Co] of the 1x1 convolution from [1, Ci, h, w] to [1, Co, h, w] with the
    lowest squared error over all images; `ridge` is relative to the mean square of the inputs."""
    size = inputs[0].shape[1] + 1  # the bias is the weight of a channel of ones
    gram = inputs[0].new_zeros(size, size, dtype=torch.float64)
    moment = inputs[0].new_zeros(size, outputs[0].shape[1], dtype=torch.float64)
    for x, y in zip(inputs, outputs, strict=True):
        x, y = (tensor[0].flatten(1).double() for tensor in (x, y))  # [1, C, h, w] -> [C, h*w]
        x = torch.cat([x, torch.ones_like(x[:1])])
        gram += x @ x.T
        moment += x @ y.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram, moment).T.float()  # [Co, Ci + 1]
    return solved[:, :-1, None, None], solved[:, -1]
