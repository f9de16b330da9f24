"""Stage `mae`: masked-autoencoder pre-training of a plain vision transformer (He et al. 2022), from images alone.

The encoder is the transformer of timm, run on the visible patches: without masking it equals the forward of the tower.
The decoder is small and is discarded. Towers with windows or convolutions (Hiera, ConvNeXt) raise an error, since they
need all patches. transformers has a pre-training model for its Hiera (`HieraForPreTraining`).
"""

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.training.stages.predictions import Found
from ovsam.training.stages.towers import IMAGENET_MEAN, IMAGENET_STD, Pixels


class MaeStage(nn.Module):
    """
    Args:
        architecture: name of a plain vision transformer of timm.
        image_size: side of the images in pixels.
        mask_ratio: share of masked patches.
        decoder_width, decoder_depth, decoder_heads: sizes of the decoder.
        normalise: whether the target pixels of each patch are normalised by their mean and deviation.
        mean, std: normalisation of the tower in use (CLIP's differs from ImageNet's).
    """

    def __init__(
        self,
        architecture: str,
        image_size: int = 224,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise: bool = True,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ):
        super().__init__()
        options = {"num_classes": 0, "pretrained": False}
        if isinstance(kind := timm.create_model(architecture, **options), VisionTransformer):
            options["img_size"] = image_size
        if type(kind) is not VisionTransformer:
            kind = type(kind).__name__
            raise InputError(f"mae needs a plain vision transformer of timm; {architecture} is a {kind}.")
        self.vit = timm.create_model(architecture, **options)
        self.patch = self.vit.patch_embed.patch_size[0]
        self.grid = self.vit.patch_embed.grid_size
        self.mask_ratio, self.normalise = mask_ratio, normalise
        self.pixels = Pixels(tuple(mean), tuple(std), image_size)
        self.embed = nn.Linear(self.vit.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_width))
        position = build_sincos2d_pos_embed(list(self.grid), decoder_width, interleave_sin_cos=False)  # [L, C]
        self.register_buffer("position", position, persistent=False)
        blocks = [Block(decoder_width, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)]
        self.decoder = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(decoder_width)
        self.out = nn.Linear(decoder_width, 3 * self.patch**2)

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights as the trunk of an open_clip side with this transformer of timm (`timm_model_name`)."""
        return {f"clip.model.visual.trunk.{name}": tensor for name, tensor in self.vit.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        self.vit.load_state_dict({name.removeprefix("clip.model.visual.trunk."): t for name, t in state.items()})

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        pixels = self.pixels(image)
        patches = self.patchify(pixels)  # [B, L, 3*p*p]
        b, length = patches.shape[:2]
        order = torch.rand(b, length, device=image.device).argsort(1)
        kept = order[:, : max(1, round(length * (1 - self.mask_ratio)))].sort(1).values
        prediction = self.decode(self.encode(pixels, kept), kept)
        hidden = torch.ones(b, length, device=image.device).scatter(1, kept, 0)
        return {"loss": masked_error(prediction.float(), patches, hidden, self.normalise)}

    def encode(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """pixels [B, 3, H, W], kept [B, n] indices of patches -> tokens [B, prefix + n, C], like the tower's own
        `forward_features`, but for those patches only."""
        vit = self.vit
        tokens = vit._pos_embed(vit.patch_embed(pixels))  # [B, prefix + L, C]
        prefix = vit.num_prefix_tokens
        patches = tokens[:, prefix:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        return vit.norm(vit.blocks(vit.norm_pre(torch.cat([tokens[:, :prefix], patches], 1))))

    def decode(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """-> predicted pixels of every patch [B, L, 3*p*p]"""
        visible = self.embed(tokens[:, self.vit.num_prefix_tokens :])
        whole = self.mask_token.to(visible.dtype).expand(len(visible), len(self.position), -1)
        whole = whole.scatter(1, kept[..., None].expand_as(visible), visible) + self.position
        return self.out(self.norm(self.decoder(whole)))

    def patchify(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, h, p, w, p] -> [B, h, w, p, p, 3] -> [B, h*w, p*p*3]"""
        p, (h, w) = self.patch, self.grid
        return pixels.reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), h * w, -1)

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return nothing: this stage has no predictions."""
        return [(masks[b, :0], word_ids[b, :0], torch.zeros(0)) for b in range(len(image))]


def masked_error(prediction: Tensor, patches: Tensor, hidden: Tensor, normalise: bool) -> Tensor:
    """Mean squared error of the hidden patches' pixels. prediction, patches [B, L, X], hidden [B, L] of 0 and 1."""
    if normalise:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((prediction - patches).square().mean(-1) * hidden).sum() / hidden.sum().clamp(min=1)
