"""Stage `sam2clip`: Sam2ClipAdapter learns to be the SAM side's image encoder from CLIP's maps (Open-Vocabulary SAM,
Yuan et al. 2024, §3.2): the per-pixel squared error of its features, whose targets are computed once and kept on disk.

As an option also EdgeSAM's prompts in the loop (Zhou et al. 2023, §3.3): masks decoded from the adapter's features must
be those decoded from the teacher's, for a first prompt and for clicks where the two disagree.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ovsam.adapters.sam2clip import Sam2ClipAdapter, Sam2ClipConfig
from ovsam.boxes import masks_to_boxes
from ovsam.errors import InputError
from ovsam.results import write_whole
from ovsam.sam import SamFeatures

from .losses import dice_loss, mask_iou
from .predictions import Found, prompted
from .targets import choose_objects, corrective_clicks, jitter_boxes, random_points
from .towers import Towers

TEACHER = "teacher_"  # what a sample of the cache has beside the picture: teacher_0, the embedding, and its finer maps


class Sam2ClipStage(nn.Module):
    """
    Args:
        towers: a CLIP side, whose maps the adapter reads, and the SAM side that teaches it.
        layers, heads: of the adapter's transformer.
        cache: keep the teacher's features on disk (2 bytes a number: 8.4 MB a picture for SAM 2 at 1024 px), instead of
            encoding every picture again in every epoch.
        loops: prompts in the loop; 0 none, 1 what EdgeSAM found to be enough.
        prompts: objects of each picture that are prompted.
        mask_weight: of the distilled masks' losses (Dice + cross entropy, as EdgeSAM) beside the features'.
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
    ):
        super().__init__()
        self.towers = towers
        if towers.clip_size not in (None, towers.sam.image_size):
            raise InputError("sam2clip reads CLIP's maps of the very picture SAM sees: leave model.clip_size out.")
        size = {"in_channels": towers.channels, "width": towers.sam.width}
        self.sam2clip = Sam2ClipAdapter(Sam2ClipConfig(**size, num_layers=layers, num_heads=heads))
        self.cache, self.loops, self.prompts, self.mask_weight = cache, loops, prompts, mask_weight

    def published_state(self) -> dict[str, Tensor]:
        return {f"sam2clip.{name}": tensor for name, tensor in self.sam2clip.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        self.sam2clip.load_state_dict({name.removeprefix("sam2clip."): tensor for name, tensor in state.items()})

    def prepare(self, data: Dataset, folder: Path, data_key: str) -> Dataset:
        """The training set with the teacher's features beside each picture. `folder` is the cache's parent, `data_key`
        whatever tells this data set and its seed from others."""
        if not self.cache:
            return data
        self.towers.sam.to(PartialState().device)
        key = f"{state_hash(self.towers.sam)}-{hashlib.sha256(data_key.encode()).hexdigest()[:12]}"
        cached = TeacherCache(data, Path(folder) / key)
        cached.build(self.teach)
        return cached

    @torch.no_grad()
    def teach(self, image: Tensor) -> dict[str, Tensor]:
        """What the SAM side makes of pictures [B, 3, S, S]."""
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
        # SAM 1 has no finer maps, and its decoder asks for none.
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
        """Both decode the same prompts: first a box or a click, then clicks drawn where their masks disagree."""
        sam = self.towers.sam
        masks, valid, _ = choose_objects(masks, self.prompts)  # [B, P, H, W], [B, P]
        b, p = valid.shape
        size = masks.shape[-1]
        points = labels = boxes = None
        if torch.rand(()) < 0.5:
            boxes = jitter_boxes(masks_to_boxes(masks), 0.1, float(size))
        else:
            points = random_points(masks.flatten(0, 1)).view(b, p, 1, 2)
            labels = torch.ones(b, p, 1, dtype=torch.long, device=masks.device)
        loss, weight = 0.0, valid.float() / valid.sum().clamp(min=1)
        for loop in range(1 + self.loops):
            prompts = {"input_points": points, "input_labels": labels, "input_boxes": boxes}
            with torch.no_grad():
                want = sam.decode(teacher, **prompts).masks[:, :, 0].float()  # [B, P, h, w]
            got = sam.decode(student, **prompts).masks[:, :, 0].float()
            target = (want > 0).float()
            pixel = F.binary_cross_entropy_with_logits(got, target, reduction="none").mean((-1, -2))
            loss = loss + ((pixel + dice_loss(got, target)) * weight).sum() / (1 + self.loops)
            if loop < self.loops:
                clicks, found = corrective_clicks(got.detach() > 0, want > 0, size)
                points = clicks if points is None else torch.cat([points, clicks], 2)
                labels = found if labels is None else torch.cat([labels, found], 2)
        return loss, (mask_iou(got.detach(), target) * weight).sum()

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """What the decoder makes of the adapter's features and the true boxes."""
        features = self.sam2clip(self.towers.maps(image))
        return prompted(self.towers.sam.decode(features, input_boxes=masks_to_boxes(masks)), masks, word_ids)


def state_hash(module: nn.Module) -> str:
    """Of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


class TeacherCache(Dataset):
    """A data set with a teacher's tensors beside each sample, from one safetensors file a sample, in half precision."""

    def __init__(self, data: Dataset, folder: Path):
        self.data, self.folder = data, folder

    def __getattr__(self, name: str):  # words, skipped, pictures, ... of the data set itself
        if name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[index] | load_file(self.path(index))

    def path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def whole(self, index: int) -> bool:
        """Whether the file is there and can be read: a broken one is made again."""
        try:
            return all(name.startswith(TEACHER) for name in load_file(self.path(index)))
        except (OSError, SafetensorError):
            return False

    def build(self, teach) -> None:
        """Make the files that are missing or broken, each process its share; teach: pictures [B, 3, S, S] -> ..."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        mine = range(state.process_index, len(self), state.num_processes)
        lacking = [index for index in mine if not self.whole(index)]
        for index in tqdm(lacking, desc="teacher features", disable=not lacking or not state.is_main_process):
            taught = teach(self.data[index]["image"][None])
            tensors = {name: tensor[0].half().cpu().contiguous() for name, tensor in taught.items()}
            write_whole(self.path(index), partial(save_file, tensors))
        state.wait_for_everyone()
