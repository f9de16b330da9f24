"""The towers of a stage, from the `[model]` table of a recipe: tiny ones of this project, or released ones.

A tower is written as one of

- `"facebook/sam2.1-hiera-small"`: an id on the Hub (also `ID@REVISION`) or a folder, as in `ovsam.compose`;
- `{open_clip = "convnext_large_d_320", pretrained = "laion2b_s29b_b131k_ft_soup"}`: open_clip's names;
- `{architecture = "mobilenetv4_conv_small", ...}`: a new tower of this project over a timm trunk;
- `{model_type = "sam2", ...}`: any configuration of transformers or of this project, new;

the last two with `weights = "runs/NAME/model.safetensors"` to start from the result of another recipe.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, EdgeTamConfig

from ovsam.checkpoints.compose import Part, load_clip, load_sam, load_tokenizer
from ovsam.checkpoints.text_tower import embed_texts, text_config
from ovsam.errors import InputError
from ovsam.modeling.adapters.common import AdapterModel, maps_at_strides
from ovsam.modeling.adapters.concepts import ConceptHead, ConceptHeadConfig
from ovsam.modeling.clip import CLIP_SIDES, ClipFeatures, DualEncoderConfig, DualEncoderSide, OpenClipConfig
from ovsam.modeling.features import sam_channels, sam_maps
from ovsam.modeling.locations import boxed_locations
from ovsam.modeling.sam import SAM_SIDES, SamFeatures, SamSide
from ovsam.processing.vocabulary import Vocabulary
from ovsam.training.feature_cache import FeatureCache

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Spec = str | dict
MAP = "map_"  # how the names of kept maps begin: map_0 has stride 4


class Pixels(nn.Module):
    """uint8 images [B, 3, S, S] -> the normalised input of a tower [B, 3, size, size]; `size` None keeps S."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int | None = None):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None] * 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.float()
        if self.size is not None and image.shape[-1] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True).clamp(0, 255)
        return ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class Towers(nn.Module):
    """A SAM side and a CLIP side, either of which may be missing, with the inputs of the adapters.

    `composition` is that of the whole model: adapters read CLIP's maps, or in `sam` the pyramid of the SAM side. They
    work in the frame of these maps: `frame` is the side of that input in pixels, which is `clip_size` if it is given
    (for towers that take one size only), and the recipe's size otherwise. `concepts` is a trained ConceptHead over the
    same maps. Towers are frozen unless a stage trains them; a frozen tower keeps its batch statistics. In `sam`, a CLIP
    side with an image tower is a teacher.
    """

    def __init__(
        self,
        sam: SamSide | None = None,
        clip: nn.Module | None = None,
        composition: str = "dual",
        clip_size: int | None = None,
        concepts: ConceptHead | None = None,
    ):
        super().__init__()
        self.concepts = concepts
        self.sam, self.clip, self.composition, self.clip_size = sam, clip, composition, clip_size
        self.sam_pixels = Pixels(IMAGENET_MEAN, IMAGENET_STD)
        if clip is not None:
            self.clip_pixels = Pixels(clip.image_mean, clip.image_std, clip_size)
        self.requires_grad_(False)

    @property
    def channels(self) -> list[int]:
        """Channels of the four maps that adapters read."""
        if self.composition == "sam":
            return list(sam_channels(self.sam.pyramid_channels))
        return list(self.clip.channels)

    @property
    def embed_dim(self) -> int:
        return self.clip.embed_dim

    def frame(self, image: Tensor) -> int:
        """Side of the input that adapters refer to, in pixels."""
        return image.shape[-1] if self.composition == "sam" else self.clip_size or image.shape[-1]

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():  # frozen modules stay in evaluation mode
            parameters = list(module.parameters())
            if parameters and not all(parameter.requires_grad for parameter in parameters):
                module.training = False
        return self

    def encode_sam(self, image: Tensor) -> SamFeatures:
        return self.sam.encode(self.sam_pixels(image))

    def encode_clip(self, image: Tensor) -> ClipFeatures:
        """Return CLIP's features, with maps at strides 4, 8, 16 and 32."""
        pixels = self.clip_pixels(image)
        features = self.clip.encode_image(pixels)
        return ClipFeatures(maps=maps_at_strides(features.maps, tuple(pixels.shape[-2:])), pool_map=features.pool_map)

    def keep_maps(self, data: Dataset, folder: Path, data_key: str) -> FeatureCache:
        """Return the data set with the maps of every sample, computed once and stored on disk."""

        @torch.no_grad()
        def compute(image: Tensor) -> dict[str, Tensor]:
            maps = self.maps(image.to(next(self.parameters()).device))
            return {f"{MAP}{i}": feature for i, feature in enumerate(maps)}

        return FeatureCache.of(data, folder, data_key, self, compute, MAP)

    def maps(
        self, image: Tensor, sam: SamFeatures | None = None, kept: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the four maps that adapters read, in their frame.

        Args:
            image: images, uint8 [B, 3, S, S].
            sam: features of the SAM side, if they have been computed already.
            kept: maps of the images, if `keep_maps` has added them to the samples.
        """
        if kept:
            return tuple(kept[name].float() for name in sorted(kept))
        if self.composition == "sam":
            return sam_maps((sam or self.encode_sam(image)).pyramid, tuple(image.shape[-2:]))
        return self.encode_clip(image).maps

    def teach(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return CLIP's own embedding of each box [B, O, 4] (in pixels of `image`): [B, O, D], L2-normalised. For a
        detector (OWLv2) it is that of the location whose box has the highest IoU."""
        pixels = self.clip_pixels(image)
        boxes = boxes * (pixels.shape[-1] / image.shape[-1])
        features = self.clip.encode_image(pixels)
        if not self.clip.has_concepts:
            return self.clip.pool(features, boxes=boxes)
        out = self.clip.concepts(features)
        best = boxed_locations(out, boxes, trust=1.0)  # [B, O]
        return out.embeds.take_along_dim(best[..., None], 1)


def start_region(adapter: AdapterModel, towers: Towers) -> AdapterModel:
    """Initialise an adapter with the class embedding of each location by a tower of this project."""
    if towers.composition != "sam" and isinstance(towers.clip, DualEncoderSide):
        adapter.region.detail.load_state_dict(towers.clip.detail_projection.state_dict())
        adapter.region.context.load_state_dict(towers.clip.context_projection.state_dict())
    return adapter.to(memory_format=torch.channels_last)


def build_towers(model: dict) -> Towers:
    """Build towers from a recipe's `[model]`: `sam` and `clip` as described above, and the other arguments of Towers;
    `templates` are those of `text_embedder`."""
    numbers = {name: value for name, value in model.items() if name not in ("sam", "clip", "templates")}
    weights = numbers.pop("concepts", None)
    if unknown := numbers.keys() - {"composition", "clip_size"}:
        known = "sam, clip, concepts, composition, clip_size, templates"
        raise InputError(f"[model] has {', '.join(sorted(unknown))}; it takes {known}.")
    sam = sam_side(model["sam"]) if "sam" in model else None
    clip = clip_side(model["clip"]) if "clip" in model else None
    towers = Towers(sam, clip, **numbers)
    if weights is not None:
        towers.concepts = concept_head(weights, towers).requires_grad_(False)
    return towers


def concept_head(path: str, towers: Towers) -> ConceptHead:
    """Return the ConceptHead in the weights of a recipe at `path`."""
    width = load_file(path)["concepts.objectness.weight"].shape[1]  # [1, width, 1, 1]
    size = {"in_channels": towers.channels, "embed_dim": towers.embed_dim, "width": width}
    head = ConceptHead(ConceptHeadConfig(**size))
    _load(head, path, "concepts.")
    return head


def sam_side(spec: Spec) -> SamSide:
    """Build a whole SAM side, with its weights if it has any."""
    if isinstance(spec, str):
        part = load_sam(spec)
        made = SAM_SIDES[part.config.model_type](part.config)
        made.load_state_dict({name: part.state[name] for name in made.state_dict()})
        return made
    spec = dict(spec)
    weights, trunk_weights = spec.pop("weights", None), spec.pop("trunk_weights", None)
    if "architecture" in spec:
        made = SAM_SIDES["edgetam"](edgetam_config(**spec))
        init_from_scratch(made)
    else:
        made = _side(SAM_SIDES, spec["model_type"])(AutoConfig.for_model(**spec))
    if trunk_weights is not None:  # a trained trunk of the same architecture, such as that of the clip stage
        _load(made.model.vision_encoder.backbone.timm_model, trunk_weights, "clip.vision_model.")
    if weights is not None:
        _load(made, weights, "sam.")
    return made


def clip_side(spec: Spec) -> nn.Module:
    """Return the image half of a CLIP side, with its weights if it has any; `text_embedder` is the other half."""
    part = _clip_part(spec)
    side = _side(CLIP_SIDES, part.config.model_type)(part.config, part="vision")
    if part.state:
        side.load_state_dict({name: part.state[name] for name in side.state_dict()})
    if isinstance(spec, dict) and "weights" in spec:
        _load(side, spec["weights"], "clip.", partly=True)
    return side


def text_embedder(spec: Spec, templates: Sequence[str] = ("{}",)) -> Callable[[list[str]], Tensor]:
    """Return a function from n words to [n, D], L2-normalised, the mean over the templates, by the text tower of a CLIP
    side.

    A new side has no text tower yet: its image tower is trained towards the text tower of ovsam-tiny.
    """
    part = _clip_part(spec)
    if not part.state:
        encode = embed_texts
    else:
        side = CLIP_SIDES[part.config.model_type](part.config, part="text").eval()
        side.load_state_dict({name: part.state[name] for name in side.state_dict()})
        side.to("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(spec, dict):
            tokenizer = open_clip.get_tokenizer(spec["open_clip"])
        else:
            tokenizer = load_tokenizer(part)

        def encode(texts: list[str]) -> Tensor:
            if isinstance(spec, dict):
                tokens = {"input_ids": tokenizer(texts)}
            else:
                length = {"padding": "max_length", "max_length": side.max_text_length, "truncation": True}
                tokens = dict(tokenizer(texts, **length, return_tensors="pt"))
            device = next(side.parameters()).device
            return side.encode_text(**{name: tensor.to(device) for name, tensor in tokens.items()})

    def embed(words: list[str]) -> Tensor:
        unique = list(dict.fromkeys(words))
        row = {word: i for i, word in enumerate(unique)}
        return Vocabulary(unique).embed(encode, templates)[torch.tensor([row[word] for word in words])]

    return embed


def edgetam_config(architecture: str, channels: list[int], width: int, mlp_dim: int, image_size: int) -> EdgeTamConfig:
    """Return the configuration of an EdgeTAM of any width over any timm trunk with maps at strides 4, 8, 16, 32
    (`channels`, in that order)."""
    grid = image_size // 16
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    }
    return EdgeTamConfig(
        vision_config={
            "model_type": "edgetam_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": channels[::-1],
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
            "fpn_hidden_size": width,
            "fpn_top_down_levels": [0, 1, 2, 3],
        },
        prompt_encoder_config={"hidden_size": width, "image_size": image_size},
        mask_decoder_config={"hidden_size": width, "mlp_dim": mlp_dim, "iou_head_hidden_dim": width},
    )


@torch.no_grad()
def init_from_scratch(side: SamSide) -> None:
    """Initialise each layer as in PyTorch instead of transformers' normal(0.02), with which prompts train far more
    slowly."""
    model = side.model
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
    wrapper = model.vision_encoder.backbone.config
    trunk = timm.create_model(wrapper.architecture, pretrained=False, **wrapper.model_args)
    model.vision_encoder.backbone.timm_model.load_state_dict(trunk.state_dict())
    # Between prompts and image, key projections start equal to those of queries: similar position encodings then make a
    # prompt and the pixels near it attend to each other from the first step.
    transformer = model.mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossings:
        nn.init.orthogonal_(attention.q_proj.weight, gain=1.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.zeros_(attention.q_proj.bias)
        nn.init.zeros_(attention.k_proj.bias)
    # Position encoding: SAM's frequencies (sigma 1) are smooth over four cells of a 32 x 32 grid. Sigma between 1 and 4
    # keeps the long range and distinguishes neighbouring cells.
    code = model.prompt_encoder.shared_embedding.positional_embedding
    code.mul_(4 ** torch.rand(code.shape[1]))


def _clip_part(spec: Spec) -> Part:
    """Return the configuration of a CLIP side and, if it is trained, the weights of both halves."""
    if isinstance(spec, str):
        return load_clip(spec)
    if "open_clip" in spec:
        config = OpenClipConfig(model_cfg=open_clip.get_model_config(spec["open_clip"]))
        try:
            loaded = open_clip.create_model(spec["open_clip"], spec["pretrained"], force_custom_text=True)
        except (OSError, RuntimeError) as error:
            what = f"{spec['open_clip']} with the weights {spec['pretrained']!r}"
            raise InputError(f"open_clip cannot download {what}; run this once with a network.") from error
        return Part(spec["open_clip"], config, {f"model.{name}": t for name, t in loaded.state_dict().items()})
    numbers = {name: value for name, value in spec.items() if name != "weights"}
    if "model_type" in spec:
        return Part(spec["model_type"], AutoConfig.for_model(**numbers), {})
    return Part(spec["architecture"], DualEncoderConfig(**numbers, text_config=text_config()), {})


def _side(sides: dict[str, Any], model_type: str) -> Any:
    if model_type not in sides:
        raise InputError(f"There is no side for a model of type {model_type!r}; choose one of {', '.join(sides)}.")
    return sides[model_type]


def _load(module: nn.Module, path: str, prefix: str, partly: bool = False) -> None:
    """Load weights of `module` from the result of a recipe; `partly`: an image trunk alone is enough, as from `mae`."""
    if not os.path.isfile(path):
        raise InputError(f"The recipe starts from {path}, which does not exist; train that recipe first.")
    state = {name.removeprefix(prefix): t for name, t in load_file(path).items() if name.startswith(prefix)}
    own = module.state_dict()
    wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
    wrong += [name for name in own if name not in state and not partly]
    if wrong or not state:
        differs = f"{wrong[0]} and {len(wrong) - 1} more differ" if wrong else f"there is no {prefix}*"
        raise InputError(
            f"{path} has the weights of another model: {differs}. Use the result of a recipe with the same model."
        )
    module.load_state_dict(state, strict=False)
