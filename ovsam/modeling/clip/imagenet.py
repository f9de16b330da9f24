"""An open-vocabulary CLIP side made of any ImageNet classifier of timm and a sentence encoder, without any training.

The bridge between the two is ConSE (Norouzi et al., Zero-Shot Learning by Convex Combination of Semantic Embeddings,
ICLR 2014): an image embedding is the mean of the text embeddings of the ten likeliest class names of ImageNet, weighted
by their probabilities. The classifier is applied to the features of a region, or to every location by itself, as
DenseCLIP does with CLIP (Zhou et al., ECCV 2022).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from ovsam.errors import InputError
from ovsam.modeling.clip.base import MAX_SEQUENCES, ClipSide, map_blocks, region_pool
from ovsam.modeling.clip.dual_encoder import DualEncoderSide, SentenceClipConfig
from ovsam.modeling.outputs import ClipFeatures


class ImageNetConfig(SentenceClipConfig):
    """`num_classes` is the number of classes of `architecture`, `top` the number of classes that are averaged."""

    model_type = "ovsam_imagenet"

    architecture: str = "tf_efficientnet_lite2"
    num_classes: int = 1000
    top: int = 10


class ImageNetSide(ClipSide):
    """Image -> maps of the classifier's last four stages; class names -> [K, D].

    The last map is the one that the classifier pools, after its last convolution and normalisation.

    `class_embeds` [N, D] holds the text embeddings of the classifier's own class names; it is a buffer, so that it is
    saved with the classifier. `part` is "all", "vision" or "text"; weights have the same names in all three.
    """

    templates = ("{}",)
    logit_scale = 100.0
    logit_shift = 0.0

    encode_text = DualEncoderSide.encode_text

    def __init__(self, config: ImageNetConfig, part: str = "all"):
        super().__init__()
        classifier = create_classifier(config.architecture, config.num_classes, config.image_size)
        self.text_model = None if part == "vision" else BertModel(config.text_config, add_pooling_layer=False)
        info = classifier.feature_info
        stages = len(info) if isinstance(info, list) else len(info.channels())
        stages_are_blocks = hasattr(classifier, "patch_embed") and hasattr(classifier, "blocks")
        self.map_stages = map_blocks(stages) if stages_are_blocks else list(range(stages))[-4:]
        self.channels = (*(info[i]["num_chs"] for i in self.map_stages[:-1]), classifier.num_features)
        self.strides = tuple(info[i]["reduction"] for i in self.map_stages)
        self.embed_dim, self.top = config.embed_dim, min(config.top, config.num_classes)
        self.image_size = config.image_size
        self.image_mean = tuple(config.image_mean)
        self.image_std = tuple(config.image_std)
        self.max_text_length = config.max_text_length
        self.vision_model = None if part == "text" else classifier
        if part != "text":
            self.register_buffer("class_embeds", torch.zeros(config.num_classes, config.embed_dim))

    def encode_image(self, pixel_values: Tensor) -> ClipFeatures:
        last, maps = self.vision_model.forward_intermediates(pixel_values, indices=self.map_stages, output_fmt="NCHW")
        pool_map = self._to_map(last, maps[-1].shape[-2:])
        return ClipFeatures(maps=(*maps[:-1], pool_map), pool_map=pool_map)

    def _to_map(self, last: Tensor, size: Sequence[int]) -> Tensor:
        """Last features of the classifier as [B, C, h, w], without prefix tokens."""
        if last.ndim == 3:  # [B, prefix + h*w, C]
            last = last[:, getattr(self.vision_model, "num_prefix_tokens", 0) :]
            return last.mT.unflatten(2, tuple(size))
        if getattr(self.vision_model, "output_fmt", "NCHW") == "NHWC":
            return last.permute(0, 3, 1, 2)
        return last

    def classify(self, features: Tensor) -> Tensor:
        """Logits [n, N] of the classifier for features [n, C] of its last map."""
        model = self.vision_model
        if hasattr(model, "num_prefix_tokens"):  # a vision transformer pools tokens, or takes the first
            prefix = model.num_prefix_tokens if model.global_pool != "token" else 0
            return model.forward_head(features[:, None].expand(-1, prefix + 1, -1))
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            return model.forward_head(features[:, None, None])
        return model.forward_head(features[..., None, None])

    def pool(self, features: ClipFeatures, masks: Tensor | None = None, boxes: Tensor | None = None) -> Tensor:
        stride = self.image_size / features.pool_map.shape[-1]
        pooled = region_pool(features.pool_map, stride, masks, boxes)  # [B, P, C]
        embeds = conse(self.classify(pooled.flatten(0, 1)), self.class_embeds, self.top)
        return embeds.unflatten(0, pooled.shape[:2])

    def dense(self, features: ClipFeatures) -> Tensor:
        batch, _, *size = features.pool_map.shape
        locations = features.pool_map.flatten(2).mT.flatten(0, 1)  # [B, C, h, w] -> [B*h*w, C]
        chunks = [conse(self.classify(x), self.class_embeds, self.top) for x in locations.split(MAX_SEQUENCES)]
        return torch.cat(chunks).unflatten(0, (batch, -1)).mT.unflatten(2, size)  # [B*h*w, D] -> [B, D, h, w]


def conse(logits: Tensor, class_embeds: Tensor, top: int) -> Tensor:
    """ConSE: the mean of the embeddings of the `top` likeliest classes, weighted by their probabilities.

    Args:
        logits: [n, N].
        class_embeds: [N, D].
        top: number of classes that are averaged.

    Returns:
        [n, D], L2-normalised, in the type of `class_embeds`.
    """
    probability, index = logits.float().softmax(-1).topk(top, dim=-1)  # [n, top]
    mean = (probability[..., None] * class_embeds[index].float()).sum(-2)
    return F.normalize(mean, dim=-1).to(class_embeds.dtype)


def create_classifier(name: str, num_classes: int, image_size: int, pretrained: bool = False) -> nn.Module:
    """A classifier of timm that takes images of `image_size`.

    All of its buffers are saved, since `from_pretrained` would overwrite others with uninitialised memory.

    Raises:
        InputError: timm has no such model, or the model gives no intermediate maps.
    """
    import timm  # here and below, since it takes long to import

    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"timm has no model {name!r}; timm.list_models() lists its models.")
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    size = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    classifier = timm.create_model(name, num_classes=num_classes, pretrained=pretrained, **size)
    if not hasattr(classifier, "forward_intermediates"):
        raise InputError(f"The timm model {name!r} has no forward_intermediates; choose another model.")
    for module in classifier.modules():
        module._non_persistent_buffers_set = set()
    return classifier


def imagenet_names(num_classes: int = 1000) -> list[list[str]]:
    """Class names of ImageNet-1k or, for 21,841 classes and similar numbers, of its larger sets; a list of synonyms
    each.

    Source: the lemmas that timm keeps (`timm.data.ImageNetInfo`), which are WordNet's.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        raise InputError(f"No list of ImageNet names has {num_classes} classes; there are lists of 1,000 and 21,841.")
    return [[name.strip() for name in line.split(",")] for line in ImageNetInfo(subset).label_descriptions()]


def embed_classes(names: Sequence[Sequence[str]], embed: Callable[[list[str]], Tensor]) -> Tensor:
    """`class_embeds` [N, D]: the mean of the embeddings of each class's synonyms, L2-normalised.

    Args:
        names: the synonyms of each class.
        embed: texts -> [K, D], L2-normalised; the text tower.
    """
    rows = embed([name for synonyms in names for name in synonyms]).split([len(synonyms) for synonyms in names])
    return F.normalize(torch.stack([row.mean(0) for row in rows]), dim=-1)


def pretrained_imagenet(
    name: str, text_config: dict, embed: Callable[[list[str]], Tensor], image_size: int = 512
) -> tuple[ImageNetConfig, dict[str, Tensor]]:
    """A configuration, and the weights of the vision half under the side's names, of a classifier that timm downloads.

    Args:
        name: timm name with a tag, such as "tf_efficientnet_lite2.in1k".
        text_config: configuration of the text tower, a BERT.
        embed: as for `embed_classes`.
        image_size: side of the square input in pixels.
    """
    import timm

    pretrained = timm.models.get_pretrained_cfg(name)
    if pretrained is None:
        raise InputError(f"timm has no weights {name!r}; timm.list_pretrained() lists its weights.")
    classifier = create_classifier(name, pretrained.num_classes, image_size, pretrained=True)
    class_embeds = embed_classes(imagenet_names(pretrained.num_classes), embed)
    config = ImageNetConfig(
        architecture=name,
        num_classes=pretrained.num_classes,
        text_config=text_config,
        embed_dim=class_embeds.shape[1],
        image_size=image_size,
        image_mean=pretrained.mean,
        image_std=pretrained.std,
    )
    state = {f"vision_model.{key}": tensor for key, tensor in classifier.state_dict().items()}
    return config, state | {"class_embeds": class_embeds}
