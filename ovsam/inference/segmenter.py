"""Segmenter: text queries, prompts or everything in an image -> Results."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovsam.errors import InputError
from ovsam.inference.encoded import EncodedImage, OneImage, map_tensors
from ovsam.inference.options import check_device, check_dtype, check_proposer
from ovsam.inference.proposers import (
    Proposer,
    Question,
    decode_proposals,
    get_proposer,
    mask_boxes,
    text_inputs,
)
from ovsam.inference.questions import Asked, Questions
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.fuse import fuse
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.outputs import OVSamFeatures, OVSamOutput
from ovsam.ops.edges import edge_map
from ovsam.processing.processing_ovsam import OVSamProcessor
from ovsam.processing.vocabulary import Vocabulary


class Segmenter(Questions):
    """A model and its processor, in torch, with the questions of `Questions`."""

    def __init__(self, model: OVSamModel, processor: OVSamProcessor, name: str = ""):
        super().__init__(name)
        self.model, self.processor = model, processor
        self._proposers: dict[str, Proposer] = {}

    def __repr__(self) -> str:
        config, parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        words = f"{len(config.vocabulary):,} words" if config.vocabulary else "no vocabulary"
        return (
            f"Segmenter({self.name or type(self.model).__name__!r}: composition {config.composition}, "
            f"{parameters / 1e6:.1f} M parameters, {words}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def settings(self) -> OVSamConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Segmenter":
        """Move and cast the model in place; returns this Segmenter. Raises InputError: unknown device or dtype."""
        target, dtype = check_device(self.device if device is None else device), check_dtype(dtype)
        self.model.to(target, dtype)
        self._proposers.clear()  # they are loaded on the device of the model
        self._texts.clear()
        return self

    def fuse(self) -> "Segmenter":
        """Fold normalisations into convolutions and store weights channels-last, in place; returns this Segmenter.

        Images are encoded faster, with outputs equal to 1e-5 (`ovsam.modeling.fuse`). The model cannot be trained or
        saved afterwards.
        """
        fuse(self.model)
        self._texts.clear()
        return self

    @torch.no_grad()
    def _encode(self, images: list[Image.Image], concepts: bool = True) -> list[EncodedImage]:
        inputs = self._to_device(self.processor(images=images))
        pixels = (inputs.get(name) for name in ("pixel_values", "clip_pixel_values", "clip_window"))
        features = self.model.encode(*pixels, concepts=concepts)
        if len(images) == 1:
            return [EncodedImage(images[0], features)]
        return [
            EncodedImage(image, map_tensors(partial(torch.narrow, dim=0, start=i, length=1), features))
            for i, image in enumerate(images)
        ]

    def encode_frame(self, image: Image.Image) -> EncodedImage:
        """Encode an RGB image for tracking; what only questions need is computed when one is asked."""
        return self._encode([image], concepts=False)[0]

    @torch.no_grad()
    def edges(self, image: OneImage | Sequence[OneImage]) -> Tensor | list[Tensor]:
        """The edges of the objects in an image, [H, W] in [0, 1], from the masks of everything. They
        are thin on the mask decoder's grid, a quarter of the model input, and enlarged from there."""
        if isinstance(image, list | tuple):
            return self._each(image, lambda _, one: self.edges(one))
        encoded = self.encode(image)
        picture, features = encoded.image, encoded.features
        outputs = self.model(features=features, everything=True)
        grid = edge_map(outputs.pred_masks[0, :, 0].float().sigmoid())  # [h, w]
        across, down = self.processor.picture_share(picture.height, picture.width)
        grid = grid[: round(down * grid.shape[0]), : round(across * grid.shape[1])]
        size = picture.height, picture.width
        return torch.nn.functional.interpolate(grid[None, None], size, mode="bilinear", align_corners=False)[0, 0]

    @torch.no_grad()
    def _prompt(
        self, encoded: EncodedImage, points=None, labels=None, boxes=None, masks=None, words=None, embeds=None
    ) -> OVSamOutput:
        picture, features = encoded.image, encoded.features
        inputs = self.processor(
            original_sizes=[(picture.height, picture.width)],
            input_points=[[points]] if points else None,
            input_labels=[[list(labels or [1] * len(points))]] if points else None,
            input_boxes=[boxes] if boxes else None,
        )
        prompts = {k: inputs[k] for k in ("input_points", "input_labels", "input_boxes") if k in inputs}
        if masks is not None:
            prompts["input_masks"] = self.processor.mask_prompts(torch.from_numpy(masks), self.model.sam.image_size)
            if not points:  # SAM needs a box or clicks beside a mask prompt
                prompts.setdefault("input_boxes", mask_boxes(prompts["input_masks"]))
        return self.model(features=features, text_embeds=embeds, text_labels=_labels(words), **self._to_device(prompts))

    @torch.no_grad()
    def _answer(self, encoded: EncodedImage, asked: Asked, threshold: float) -> OVSamOutput:
        picture, features = encoded.image, encoded.features
        everything = asked.source == "auto"
        negatives = None if asked.negatives is None else (asked.negatives[0].prompts, asked.negatives[1])
        self.model.complete(features)  # the choice of a proposer depends on it
        propose = self._proposer(asked.proposer, features)
        if propose is None:
            return self.model(
                features=features,
                **text_inputs(_labels(asked.vocabulary), asked.embeds, negatives),
                everything=everything,
                refine=asked.refine,
                proposal_threshold=min(threshold, self.settings.proposal_threshold),
            )
        words = asked.vocabulary.prompts if asked.vocabulary is not None else []
        question = Question(
            picture,
            words,
            asked.embeds,
            everything,
            self.model,
            self.processor,
            features,
            _labels(asked.vocabulary),
        )
        return decode_proposals(question, propose(question), negatives)

    def _instances(self, outputs: OVSamOutput, size: tuple[int, int], threshold, post: dict) -> dict[str, Any]:
        return self.processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[size], return_coco_annotation=True, **post
        )[0]

    def _check_proposer(self, proposer: Any) -> str | Proposer | None:
        return check_proposer(proposer)

    @torch.no_grad()
    def encode_words(self, phrases: list[str]) -> np.ndarray:
        tokens = self._to_device(self.processor.tokenize(phrases))
        try:
            return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu().numpy()
        except IndexError as error:
            raise InputError(
                f"The tokenizer of {self.name or 'this model'} has tokens that its text tower lacks; save both again."
            ) from error

    def text_weights(self) -> tuple:
        # Weights that were changed in place have another version.
        version = sum(0 if one.is_inference() else one._version for one in self.model.clip.parameters())
        return id(self.model.clip), version, self.device, self.dtype

    def to_own(self, embeds: np.ndarray) -> Tensor:
        return torch.from_numpy(embeds).to(self.device)

    def _proposer(self, proposer: str | Proposer | None, features: OVSamFeatures) -> Proposer | None:
        """The proposer; None if the ConceptHead of the model is used."""
        if proposer is None:
            if features.concepts is not None:
                return None
            proposer = "clip-dense" if features.clip is not None else "grid"
        if proposer == "concepts":
            return None
        if not isinstance(proposer, str):
            return proposer
        if proposer not in self._proposers:
            self._proposers[proposer] = get_proposer(proposer, str(self.model.device))
        return self._proposers[proposer]

    def _to_device(self, inputs: Mapping) -> dict:
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _labels(words: Vocabulary | None) -> dict[str, str] | None:
    """Words in the form of the processor: phrases to class names."""
    return None if words is None else words.as_mapping()
