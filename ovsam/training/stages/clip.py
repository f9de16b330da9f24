"""Stage `clip`: an image tower is trained towards a locked text tower (LiT, Zhai et al. 2022).

The option `pictures` selects the images. With "objects" each object of a scene is one: the tower encodes a whole window
once, and the features of each object are averaged under its mask. The cost for each object is that of a small crop, and
the dense features are trained at the scale and in the clutter in which the adapters read them. With "whole" it is the
whole image, with the class name of its first named object, as in folders of images for each class; plain vision
transformers may then skip a share of their patches (FLIP, Li et al. 2023), which saves that share of the cost. With
"captions" it is the whole image as in CLIP (Radford et al. 2021), contrasted within the batch by a caption that lists
its class names.
"""

from collections.abc import Callable
from pathlib import Path

import open_clip.transformer
import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from ovsam.checkpoints.text_tower import text_tower
from ovsam.errors import InputError
from ovsam.modeling.clip import DualEncoderSide, OpenClipSide
from ovsam.modeling.clip.base import mask_pool
from ovsam.modeling.clip.transformers_clip import TransformersClipSide, TransformersSiglipSide
from ovsam.training.stages.predictions import Found
from ovsam.training.stages.prompts import visible_objects
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Pixels, Towers
from ovsam.training.stages.word_losses import LitLosses, check_width

PICTURES = ("objects", "whole", "captions")


class ClipStage(nn.Module):
    """
    Args:
        words: words embedded by the locked text tower.
        towers: towers with the CLIP side whose image tower is trained.
        label_smoothing: label smoothing of the cross entropy among all names.
        keyword_weight: weight of the cross entropy against the keywords of a word.
        images: "objects", "whole" or "captions"; label_smoothing and keyword_weight are not used for captions.
        patch_drop: share of the patches that are skipped in training on whole images (FLIP: 0.5).
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        label_smoothing: float = 0.05,
        keyword_weight: float = 0.3,
        pictures: str = "objects",
        patch_drop: float = 0.0,
    ):
        super().__init__()
        if pictures not in PICTURES:
            raise InputError(f"images is {pictures!r}; it must be one of {', '.join(PICTURES)}.")
        if patch_drop and pictures != "whole":
            raise InputError("patch_drop needs images = 'whole': objects need the features of all patches.")
        check_width(words, towers.embed_dim)
        self.clip = towers.clip.requires_grad_(True)
        self.clip.to(memory_format=torch.channels_last)
        if patch_drop:
            drop_patches(self.clip, patch_drop)
        if pictures == "captions" and not isinstance(self.clip, DualEncoderSide):
            raise InputError(
                "images = 'captions' is for towers of this project, trained from scratch; choose 'objects' or 'whole'."
            )
        size = self.clip.image_size if pictures == "whole" else towers.clip_size
        self.clip_pixels = Pixels(self.clip.image_mean, self.clip.image_std, size)
        self.pictures = pictures
        self.lit = LitLosses(words, label_smoothing, keyword_weight)
        self.caption_words: list[str] = []
        self.embed: Callable[[list[str]], Tensor] | None = None

    def prepare(self, data: Dataset, folder: Path, data_key: str) -> Dataset:
        """Prepare the words and the text tower for captions, which are written at each step."""
        if self.pictures == "captions":
            self.caption_words = [word.name for word in data.words]
            self.embed = caption_embedder()
        return data

    def published_state(self) -> dict[str, Tensor]:
        return {f"clip.{name}": tensor for name, tensor in self.clip.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        own = {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}
        self.clip.load_state_dict(own)

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        if self.pictures == "whole":
            named = word_ids >= 0
            seen = named.any(1)
            ids = word_ids.gather(1, named.int().argmax(1, keepdim=True))[seen, 0]
            return self.lit(F.normalize(self.picture_embeds(image)[seen].float(), dim=-1), ids)
        if self.pictures == "captions":
            return self.match_captions(image, word_ids)
        visible = visible_objects(masks, word_ids)
        embeds = mask_pool(self.clip.encode_image(self.clip_pixels(image)).pool_map, masks)[visible]  # [n, D]
        return self.lit(F.normalize(embeds.float(), dim=-1), word_ids[visible])

    def match_captions(self, image: Tensor, word_ids: Tensor) -> dict[str, Tensor]:
        """CLIP's loss: classify the caption of each image in the batch, and the image of each caption."""
        named = (word_ids >= 0).any(1)
        captions = [write_caption(ids[ids >= 0], self.caption_words) for ids in word_ids[named]]
        texts = self.embed(captions).to(image.device)  # [b, D]
        embeds = F.normalize(self.picture_embeds(image)[named].float(), dim=-1)
        logits = self.lit.log_scale.clamp(max=4.6).exp() * embeds @ texts.T  # [b, b]
        own = torch.arange(len(texts), device=image.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        retrieved = (logits.argmax(1) == own).float().mean()
        return {"loss": loss, "retrieved": retrieved, "scale": self.lit.log_scale.detach().exp()}

    def picture_embeds(self, image: Tensor) -> Tensor:
        """Embeddings [B, D] of whole images, by the tower's own pooling."""
        pixels = self.clip_pixels(image)
        if isinstance(self.clip, OpenClipSide):
            return self.clip.model.visual(pixels)
        if isinstance(self.clip, TransformersClipSide | TransformersSiglipSide):
            return self.clip.model.get_image_features(pixels).pooler_output
        return self.clip.encode_image(pixels).pool_map.mean((2, 3))

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return the base word of highest score for every true object, or for the whole image."""
        there = masks.flatten(2).any(-1)  # [B, O]
        if self.pictures == "whole":
            embeds = F.normalize(self.picture_embeds(image).float(), dim=-1)[:, None].expand(-1, masks.shape[1], -1)
        else:
            embeds = F.normalize(mask_pool(self.clip.encode_image(self.clip_pixels(image)).pool_map, masks), dim=-1)
        scores, classes = self.lit.logits(embeds).softmax(-1).max(-1)
        ids = self.lit.base_ids[classes]
        return [(masks[b][there[b]], ids[b][there[b]], scores[b][there[b]]) for b in range(len(masks))]


def write_caption(ids: Tensor, words: list[str]) -> str:
    """ "fork, cat face and red apple": each word of an image once, in a random order. ids [n] are indices into
    `words`."""
    unique = ids.unique()
    names = [words[i] for i in unique[torch.randperm(len(unique))].tolist()]
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def caption_embedder() -> Callable[[list[str]], Tensor]:
    """Return a function from captions to [n, D], L2-normalised, by the locked text tower, in bfloat16 for speed."""
    side, tokenizer = text_tower()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side.to(device)

    @torch.no_grad()
    def embed(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        with torch.autocast(device, torch.bfloat16):
            return side.encode_text(tokens["input_ids"], tokens["attention_mask"]).float()

    return embed


def drop_patches(side: nn.Module, share: float) -> None:
    """Make a plain vision transformer skip a random share of its patches in training (FLIP).

    Raises:
        InputError: the tower is of another kind; windows and convolutions need all patches.
    """
    if isinstance(side, TransformersClipSide | TransformersSiglipSide):
        prefix = int(isinstance(side, TransformersClipSide))  # the class token
        embeddings = side.model.vision_model.embeddings
        embeddings.patch_drop = PatchDropout(share, num_prefix_tokens=prefix)
        embeddings.register_forward_hook(lambda module, inputs, tokens: module.patch_drop(tokens))
        return
    visual = side.model.visual if isinstance(side, OpenClipSide) else None
    trunk = getattr(visual, "trunk", None)
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        visual.patch_dropout = open_clip.transformer.PatchDropout(share)
    elif isinstance(trunk, VisionTransformer):
        trunk.patch_drop = PatchDropout(share, num_prefix_tokens=trunk.num_prefix_tokens)
    else:
        kind = type(trunk or visual or side).__name__
        raise InputError(f"patch_drop needs a plain vision transformer as CLIP's image tower; this one is {kind}.")
