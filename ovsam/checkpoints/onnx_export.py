"""A whole model as ONNX graphs, which `ovsam.load` runs with onnxruntime and numpy alone (`ovsam.inference.onnx`).

| graph | from | to |
|---|---|---|
| image | pixels of one image | all that depends on the image alone: SAM features, maps, locations of the ConceptHead |
| text | token ids | text embeddings |
| locations | locations, word embeddings | the most object-like locations, and their logits for the words |
| boxes | image features, boxes | the mask of each box, by the mask head of the ConceptHead |
| clicks | image features, clicks | the mask of each object that was clicked, likewise |
| masks | image features, points, boxes, masks | a mask, its predicted IoU and its token for each prompt |
| names | image features, masks, tokens, word embeddings | the logits of the words for each mask |

Words are an input, so any vocabulary works without another export. The numbers of prompts, points, words and tokens are
free; the batch is one image. A box is two points with the labels 2 and 3, its corners, as in the ONNX export of SAM's
authors.
"""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.checkpoints.exported import write_settings
from ovsam.checkpoints.onnx_int8 import quantise
from ovsam.errors import InputError
from ovsam.modeling.clip.base import ClipSide
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.outputs import ClipFeatures, ConceptOutput, DecodedMasks, OVSamFeatures, SamFeatures
from ovsam.modeling.scoring import BlendedNaming, FusedNaming
from ovsam.ops.files import check_new_folder
from ovsam.ops.masks import add_prior, follow_clicks, mean_masks
from ovsam.processing.processing_ovsam import OVSamProcessor

OPSET = 20  # the first one with GELU
CONCEPTS = ("objectness", "boxes", "embeds", "logit_scale", "logit_shift")


class Graph(nn.Module):
    """A part of a model with named tensors in and out. `inputs` and `outputs` are their names, none that of an operator
    of torch, from which exporters make names of their own; `free` are the axes whose length is free: {input: {axis:
    name}}."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: dict[str, dict[int, str]] = {}


class TextGraph(Graph):
    inputs, outputs = ("input_ids", "attention_mask"), ("text_embeds",)
    free = dict.fromkeys(inputs, {0: "words", 1: "tokens"})

    def __init__(self, clip: ClipSide):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.clip.encode_text(input_ids, attention_mask)


class ImageGraph(Graph):
    inputs = ("pixel_values",)

    def __init__(self, model: OVSamModel, outputs: tuple[str, ...]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        named = flatten(self.model.encode(pixel_values))
        return tuple(named[name] for name in self.outputs)


class LocationGraph(Graph):
    """Locations and words -> the locations of highest objectness: `location` [1, T]; `likely` [1, T], their objectness
    as a probability; and `logits` [1, T, K]."""

    inputs = ("objectness", "embeds", "logit_scale", "logit_shift", "words")
    outputs = ("location", "likely", "logits")
    free = {"words": {0: "words"}}

    def __init__(self, model: OVSamModel):
        super().__init__()
        self.model = model

    def forward(self, objectness: Tensor, embeds: Tensor, scale: Tensor, shift: Tensor, words: Tensor):
        concepts = ConceptOutput(objectness=objectness, embeds=embeds, logit_scale=scale, logit_shift=shift)
        likely, index = self.model.likely_locations(concepts)
        return index, likely, self.model._concept_naming(concepts, index).logits(words)


class BoxGraph(Graph):
    """Boxes `regions` [1, P, 4] -> mask logits of the ConceptHead for them [1, P, H, W], at its own stride."""

    outputs = ("masks",)
    free = {"regions": {1: "prompts"}}

    def __init__(self, model: OVSamModel, names: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.read = _read(names, "mask_features_")
        self.inputs = (*self.read, "regions")

    def forward(self, *given: Tensor) -> Tensor:
        features = unflatten(dict(zip(self.read, given, strict=False)))
        return self.model._box_masks(features, given[-1])


class ClickGraph(Graph):
    """Clicks -> mask logits of the ConceptHead for them [1, P, H, W]; for clicks with a mask prompt, where `mask_given`
    [1, P] is True, the mean of both. `points`, `labels` and `input_masks` are those of MaskGraph."""

    outputs = ("masks",)
    own = ("points", "labels", "input_masks", "mask_given")
    free = {
        "points": {1: "prompts", 2: "points"},
        "labels": {1: "prompts", 2: "points"},
        "input_masks": {1: "prompts"},
        "mask_given": {1: "prompts"},
    }

    def __init__(self, model: OVSamModel, names: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.read = _read(names, "mask_features_", "objectness", "boxes")
        self.inputs = (*self.read, *self.own)

    def forward(self, *given: Tensor) -> Tensor:
        features = unflatten(dict(zip(self.read, given, strict=False)))
        points, labels, input_masks, mask_given = given[len(self.read) :]
        model = self.model
        masks, agreed = model.concepts.point_masks(features.concepts, points, labels, model.sam.image_size)
        return torch.where(mask_given[..., None, None], mean_masks(input_masks, masks, agreed), masks)


class MaskGraph(Graph):
    """Prompts -> one mask each, of the mask decoder.

    `points` [1, P, N, 2] are in pixels of the model input, `labels` [1, P, N] those of SAM; a box is two points with
    the labels 2 and 3. `input_masks` [1, P, h, w] are mask logits of any resolution. A decoder that was trained to
    correct the masks of the ConceptHead always takes them, or mask prompts, and adds them to its own; another one takes
    a mask where `mask_given` [1, P] is True. Outputs: `masks` logits, at the resolution of input_masks if they are
    added to them, else [1, P, H/4, W/4]; `iou` [1, P]; `tokens` [1, P, C].
    """

    outputs = ("masks", "iou", "tokens")

    def __init__(self, model: OVSamModel, names: tuple[str, ...]):
        super().__init__()
        self.model, self.corrects = model, corrects(model)
        self.read = _read(names, "image_embedding", "high_res_")
        self.inputs = (*self.read, "points", "labels", "input_masks")
        self.free = {
            "points": {1: "prompts", 2: "points"},
            "labels": {1: "prompts", 2: "points"},
            "input_masks": {1: "prompts", 2: "height", 3: "width"},
        }
        if not self.corrects:
            self.inputs += ("mask_given",)
            self.free["mask_given"] = {1: "prompts"}

    def forward(self, *given: Tensor):
        features = unflatten(dict(zip(self.read, given, strict=False))).sam
        points, labels, input_masks = given[len(self.read) : len(self.read) + 3]
        sam = self.model.sam
        # Resized here and not in `decode`, which would compare sizes and so fix them.
        grid = 4 * sam.grid
        small = F.interpolate(input_masks, (grid, grid), mode="bilinear", antialias=True)
        if self.corrects:
            decoded = sam.decode(features, points, labels, None, small)
        else:
            decoded = self._decode_some_masks(features, points, labels, small, given[-1])
        decoded = sam.select_masks(decoded, multimask_output=False)
        masks = decoded.masks[:, :, 0]
        if self.corrects:
            masks = F.interpolate(masks, input_masks.shape[-2:], mode="bilinear")
            masks = add_prior(masks[:, :, None], input_masks, self.model.config.mask_head_weight)[:, :, 0]
            masks = follow_clicks(masks, points * (masks.shape[-1] / sam.image_size), labels)
        return masks, decoded.iou[:, :, 0], decoded.tokens[:, :, 0]

    def _decode_some_masks(
        self, features: SamFeatures, points: Tensor, labels: Tensor, masks: Tensor, mask_given: Tensor
    ) -> DecodedMasks:
        """As `SamSide.decode`, where some prompts have a mask and others have none."""
        sam, encoder = self.model.sam, self.model.sam.model.prompt_encoder
        sparse, _ = encoder(points, labels, None, None)
        embedded = encoder.mask_embed(masks.flatten(0, 1)[:, None]).unflatten(0, masks.shape[:2])  # [1, P, C, h, w]
        none = encoder.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        dense = torch.where(mask_given[..., None, None, None], embedded, none)
        return sam._decode(features, sam._position(), sparse, dense)


class NameGraph(Graph):
    """Masks -> `class_embeds` [1, P, D] and the logits of the words, [1, P, K].

    `regions` [1, P, 4] are the boxes of the prompts, or else of the masks; `shares` [K] the share of the CLIP side in
    each word's logit (Open-Vocabulary SAM; not every model reads it).
    """

    outputs = ("class_embeds", "logits")
    own = ("masks", "regions", "tokens", "words", "shares")
    free = {
        "masks": {1: "prompts", 2: "height", 3: "width"},
        "regions": {1: "prompts"},
        "tokens": {1: "prompts"},
        "words": {0: "words"},
        "shares": {0: "words"},
    }

    def __init__(self, model: OVSamModel, names: tuple[str, ...]):
        super().__init__()
        self.model = model
        maps = ("map_", "pool_map") if model.clip2sam is not None else ()
        self.read = _read(names, *(maps or (CONCEPTS if "embeds" in names else ("pool_map",))))
        self.inputs = (*self.read, *self.own)

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        features = unflatten(dict(zip(self.read, given, strict=False)))
        masks, regions, tokens, words, shares = given[len(self.read) :]
        quarter = [round(self.model.sam.image_size / 4)] * 2
        masks = F.interpolate(masks, quarter, mode="bilinear")  # of stride 2: the mean of four cells, as in `_name`
        naming = self.model._name(features, masks, regions, tokens)
        logits = naming.blend(words, shares) if isinstance(naming, BlendedNaming) else naming.logits(words)
        return naming.embeds, logits


def flatten(features: OVSamFeatures) -> dict[str, Tensor]:
    """The tensors of the features by name, those that are read after the image."""
    named = {"image_embedding": features.sam.embedding}
    named |= {f"high_res_{i}": one for i, one in enumerate(features.sam.high_res or ())}
    named |= {f"map_{i}": one for i, one in enumerate(features.maps or ())}
    if features.clip is not None:
        named["pool_map"] = features.clip.pool_map
    if features.concepts is not None:
        named |= {name: features.concepts[name] for name in CONCEPTS}
        named |= {f"mask_features_{i}": one for i, one in enumerate(features.concepts.mask_features or ())}
    return named


def unflatten(named: dict[str, Tensor]) -> OVSamFeatures:
    """Features with the tensors that are given."""

    def several(prefix: str) -> tuple[Tensor, ...]:
        return tuple(named[name] for name in sorted(named) if name.startswith(prefix))

    concepts: dict[str, Any] = {name: named[name] for name in CONCEPTS if name in named}
    if "mask_features_0" in named:
        concepts["mask_features"] = several("mask_features_")
    # A ModelOutput whose only argument is a dictionary would take it for its fields, hence high_res and maps.
    return OVSamFeatures(
        sam=SamFeatures(embedding=named.get("image_embedding"), high_res=several("high_res_")),
        clip=ClipFeatures(maps=(), pool_map=named["pool_map"]) if "pool_map" in named else None,
        maps=several("map_"),
        concepts=ConceptOutput(**concepts) if concepts else None,
    )


def _read(names: tuple[str, ...], *prefixes: str) -> tuple[str, ...]:
    """The features that begin with one of the prefixes."""
    return tuple(name for name in names if name.startswith(prefixes))


def corrects(model: OVSamModel) -> bool:
    """Whether the mask decoder corrects the masks of the ConceptHead, and so always takes one."""
    return model.concepts is not None and bool(model.config.mask_head_weight)


def check_exportable(model: OVSamModel, processor: OVSamProcessor) -> None:
    """Raises InputError for a model of which no graphs are made."""
    if processor.clip_images is not None:
        raise InputError(
            "This model prepares an image twice, for SAM and for CLIP; only models whose sides share one input are "
            "exported to ONNX, such as ovsam-tiny."
        )
    if not model.sam.corners_are_points:
        kind = model.config.sam_config.model_type
        raise InputError(f"The SAM side {kind!r} cannot be exported to ONNX; those with SAM 2's prompts can.")
    if processor.pads:
        raise InputError("This model pads images, which exported models do not; SAM 2 and EdgeTAM resize them.")
    if processor.tokenizer.padding_side != "right" or not getattr(processor.tokenizer, "is_fast", False):
        raise InputError("This model has no tokenizer of the package tokenizers that pads at the right.")


@torch.no_grad()
def export_onnx(
    model: OVSamModel,
    processor: OVSamProcessor,
    folder: str | os.PathLike[str],
    name: str = "",
    int8: bool = False,
) -> list[Path]:
    """Write the graphs of a model, its tokenizer and its settings to a new or empty folder.

    Args:
        model: on the CPU, in float32 and evaluation mode.
        processor: of the model.
        folder: where to write; `ovsam.load(folder)` then runs it without torch.
        name: of the model, which results record.
        int8: whether to store the weights of the text tower as 8-bit integers (`ovsam.checkpoints.onnx_int8`).

    Returns:
        the files, in the order in which they were written.

    Raises:
        InputError: the model cannot be exported, the folder is not empty, or onnx or onnxruntime are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("The export needs onnx and onnxscript, which `pip install 'ovsam[onnx]'` brings.") from error
    check_new_folder(folder)
    target = Path(folder)
    check_exportable(model, processor)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        half = Path(scratch) / "folder"
        half.mkdir()
        for kind, (graph, examples) in graphs_of(model, processor).items():
            write_graph(graph, examples, half / f"{kind}.onnx")
        if int8:
            quantise(half / "text.onnx")
        processor.tokenizer.backend_tokenizer.save(str(half / "tokenizer.json"))
        write_settings(half, settings_of(model, processor, name))
        if target.exists():
            target.rmdir()
        shutil.move(half, target)
    return sorted(target.iterdir())


def graphs_of(model: OVSamModel, processor: OVSamProcessor) -> dict[str, tuple[Graph, tuple[Tensor, ...]]]:
    """The graphs of a model, each with inputs of it."""
    side = model.sam.image_size
    image = torch.zeros(1, 3, side, side)
    named = flatten(model.encode(image))
    names = tuple(named)
    # Counts above one, and different: exporters take a length of 1 for a constant, and equal ones for the same.
    words = torch.nn.functional.normalize(torch.randn(3, model.clip.embed_dim), dim=-1)
    tokens = processor.tokenize(["a", "red ball"])
    graphs: dict[str, tuple[Graph, tuple[Tensor, ...]]] = {
        "image": (ImageGraph(model, names), (image,)),
        "text": (TextGraph(model.clip), (tokens["input_ids"], tokens["attention_mask"])),
    }
    if "embeds" in named:
        graph = LocationGraph(model)
        graphs["locations"] = graph, (*(named[one] for one in graph.inputs[:-1]), words)
    grid = 4 * model.sam.grid
    at = torch.tensor([[0.1, 0.1], [0.6, 0.7], [0.3, 0.4], [0.5, 0.2], [0.2, 0.6]]) * side
    points, labels = at.expand(1, 4, -1, -1).contiguous(), torch.tensor([2, 3, 1, 0, -10]).expand(1, 4, -1).contiguous()
    regions = at[:2].view(1, 1, 4).expand(1, 4, -1).contiguous()
    given, no_mask = torch.zeros(1, 4, grid, grid), torch.zeros(1, 4, dtype=torch.bool)
    if "mask_features_0" in named:
        boxes = BoxGraph(model, names)
        graphs["boxes"] = boxes, (*(named[one] for one in boxes.read), regions)
        given = boxes(*graphs["boxes"][1])
        clicks = ClickGraph(model, names)
        prompts = points, labels, torch.zeros(1, 4, grid, grid), no_mask
        graphs["clicks"] = clicks, (*(named[one] for one in clicks.read), *prompts)
    masks = MaskGraph(model, names)
    prompts = points, labels, given, no_mask
    graphs["masks"] = masks, (*(named[one] for one in masks.read), *prompts[: 3 if masks.corrects else 4])
    found, _, token = masks(*graphs["masks"][1])
    names_graph = NameGraph(model, names)
    naming = model._name(unflatten({one: named[one] for one in names_graph.read}), found, regions, token)
    if isinstance(naming, FusedNaming):
        raise InputError(
            "This model scores each word against all others, as Open-Vocabulary SAM does; such a model cannot be "
            "exported to ONNX."
        )
    if naming.embeds is not None:
        own = (found, regions, token, words, torch.rand(len(words)))
        graphs["names"] = names_graph, (*(named[one] for one in names_graph.read), *own)
    return graphs


def write_graph(graph: Graph, examples: tuple[Tensor, ...], path: Path) -> None:
    """Export one graph to one file, weights inside."""
    names: Any = tuple(graph.free.get(name, {}) for name in graph.inputs)
    shapes: Any = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in names)
    if _takes_any_number(graph):
        names, shapes = (names,), (shapes,)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Exported here, since torch.onnx.export would fix the length of an axis that is not free, without a word.
        traced = torch.export.export(graph.eval(), examples, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    program.save(str(path), external_data=False)


def _takes_any_number(graph: Graph) -> bool:
    """Whether `forward` takes *given, which torch.export describes as one tuple."""
    return graph.forward.__code__.co_flags & 0x04 != 0


def settings_of(model: OVSamModel, processor: OVSamProcessor, name: str) -> dict[str, Any]:
    """Everything that answers depend on besides the graphs."""
    config, images = model.config, processor.image_processor
    fields = (
        "templates",
        "vocabulary",
        "max_detections",
        "objectness_weight",
        "score_calibration",
        "name_calibration",
        "nms_threshold",
        "mask_nms_threshold",
        "proposal_threshold",
        "score_threshold",
        "objectness_threshold",
        "exemplar_scale",
        "refine_boxes",
    )
    adapter = config.clip2sam_config
    trained: Sequence[str] = getattr(adapter, "trained_words", ()) if adapter is not None else ()
    return {
        "name": name,
        "image_size": model.sam.image_size,
        "mask_size": 4 * model.sam.grid,
        "corrects": corrects(model),
        "resample": int(images.resample),
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "embed_dim": model.clip.embed_dim,
        "has_adapter": model.clip2sam is not None,
        "reads_tokens": model.clip2sam is not None and model.clip2sam.reads_tokens,
        "max_text_length": processor.max_text_length,
        "text_padding": processor.text_padding,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "pad_token": processor.tokenizer.pad_token,
        "trained_words": sorted(trained),
        **{field: getattr(config, field) for field in fields},
    }
