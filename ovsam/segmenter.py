"""`ovsam.load(...)` -> Segmenter: the three questions about one picture, answered with Results."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from ovsam.checkpoints import find_checkpoint
from ovsam.errors import InputError
from ovsam.images import Picture, open_image
from ovsam.modeling_ovsam import OVSamFeatures, OVSamModel
from ovsam.processing_ovsam import OVSamProcessor
from ovsam.results import Results
from ovsam.vocabulary import Vocabulary

EMBEDDED = "ovsam-tiny"
CACHE = Path(os.environ.get("OVSAM_CACHE") or Path.home() / ".cache" / "ovsam")

Words = Vocabulary | str | os.PathLike | Sequence[str] | Mapping[str, str]


def load(model: str | os.PathLike = "auto", device: str | None = None) -> "Segmenter":
    """A Segmenter for a preset, a folder or a Hub id.

    Args:
        model: "ovsam-tiny", the checkpoint inside the package, which knows pictograms, not photographs; "auto", which
            is the same for now, unless the environment variable OVSAM_MODEL names another; a folder; or a Hub id.
        device: "cpu", "cuda", ...; a GPU if there is one.

    Raises:
        InputError: no such model, or no such device.
    """
    name = str(model)
    if name == "auto":
        name = os.environ.get("OVSAM_MODEL", EMBEDDED)
    folder = str(find_checkpoint(name)) if name == EMBEDDED else name
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {device!r} cannot be used here; `cpu` always works.") from error
    try:
        whole = AutoModel.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name!r} is no model that can be loaded: pass {EMBEDDED}, a folder with an OVSam model, or its Hub id."
        ) from error
    if not isinstance(whole, OVSamModel):
        raise InputError(f"{name!r} is a {type(whole).__name__}, not an OVSam model; ovsam-tiny is one.")
    return Segmenter(whole.to(target).eval(), processor, name)


class Segmenter:
    """A model and its processor, for people who have a picture and a question.

    A picture is a path, a PIL image or an array [H, W, 3]; or the pair that `encode` returned, which is not encoded
    again. Words are a list, a mapping of prompts to labels, a file, the name of a built-in vocabulary, or a Vocabulary.
    """

    def __init__(self, model: OVSamModel, processor: OVSamProcessor, name: str = ""):
        self.model, self.processor, self.name = model, processor, name
        self._text_hash = ""

    @torch.no_grad()
    def encode(self, image: Picture) -> tuple[Picture, OVSamFeatures]:
        """Features of a picture, to ask about it several times: pass what this returns in place of the picture."""
        image = open_image(image)
        inputs = self._to_device(self.processor(images=image))
        return image, self.model.encode(inputs["pixel_values"], inputs.get("clip_pixel_values"))

    @torch.no_grad()
    def embed(self, words: Words) -> tuple[Vocabulary, Tensor]:
        """The vocabulary and its text embeddings [K, D]; long ones are cached on disk."""
        vocabulary = words if isinstance(words, Vocabulary) else Vocabulary(words)
        worth_keeping = len(vocabulary.prompts) > 256
        embeds = vocabulary.embed(
            self._encode_words,
            templates=tuple(self.model.config.templates),
            text_hash=self._hash_of_text_tower() if worth_keeping else "",
            cache_dir=CACHE if worth_keeping else None,
        )
        return vocabulary, embeds.to(self.model.device)

    def where(
        self,
        image: Picture | tuple[Picture, OVSamFeatures],
        words: Words,
        negative: Sequence[str] = (),
        threshold: float | None = None,
    ) -> Results:
        """Every instance of the words; what looks more like a negative word is left out."""
        vocabulary, embeds = self.embed(words)
        negatives = self.embed(list(negative))[1] if negative else None
        return self._propose(image, vocabulary, embeds, negatives, threshold, source="text")

    def everything(
        self,
        image: Picture | tuple[Picture, OVSamFeatures],
        vocabulary: Words | None = None,
        threshold: float | None = None,
    ) -> Results:
        """All there is, named from the vocabulary or, without one, from the checkpoint's own."""
        words, embeds = self._names(vocabulary)
        return self._propose(image, words, embeds, None, threshold, source="auto")

    @torch.no_grad()
    def what(
        self,
        image: Picture | tuple[Picture, OVSamFeatures],
        points: Sequence[Sequence[float]] | None = None,
        labels: Sequence[int] | None = None,
        boxes: Sequence[Sequence[float]] | None = None,
        vocabulary: Words | None = None,
    ) -> Results:
        """The mask of what was clicked or boxed, named from the vocabulary or, without one, the checkpoint's own.

        Args:
            points: [[x, y], ...], clicks on one object; with `labels`, 1 on it and 0 beside it.
            boxes: [[x1, y1, x2, y2], ...], an object each; together with points, one box for their object.
        """
        if not points and not boxes:
            raise InputError("Pass points or boxes: what to name.")
        if labels and len(labels) != len(points or ()):
            raise InputError(f"There are {len(labels)} labels for {len(points or ())} points; each point takes one.")
        if points and boxes and len(boxes) > 1:
            raise InputError(f"Points are on one object, so that they go with one box, not with {len(boxes)}.")
        picture, features = self._features(image)
        _check_inside(picture.size, points, boxes)
        inputs = self._to_device(
            self.processor(
                images=picture,
                input_points=[[list(map(list, points))]] if points else None,
                input_labels=[[list(labels or [1] * len(points))]] if points else None,
                input_boxes=[list(map(list, boxes))] if boxes else None,
            )
        )
        words, embeds = self._names(vocabulary)
        prompts = {k: inputs[k] for k in ("input_points", "input_labels", "input_boxes") if k in inputs}
        outputs = self.model(features=features, text_embeds=embeds, **prompts)
        asked = [list(map(list, points))] if points else [list(box) for box in boxes]
        return self._results(outputs, picture, words, None, "point" if points else "box", asked)

    @torch.no_grad()
    def _propose(self, image, vocabulary, embeds, negatives, threshold, source: str) -> Results:
        picture, features = self._features(image)
        config, everything = self.model.config, source == "auto"
        if threshold is None:
            threshold = config.objectness_threshold if everything else config.score_threshold
        outputs = self.model(
            features=features,
            text_embeds=embeds,
            negative_embeds=negatives,
            everything=everything,
            proposal_threshold=min(threshold, config.proposal_threshold),
        )
        return self._results(outputs, picture, vocabulary, threshold, source)

    def _results(self, outputs, picture, vocabulary, threshold, source, asked=None) -> Results:
        if outputs.logits is not None:
            outputs.logits = vocabulary.reduce(outputs.logits)
        found = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=threshold,
            everything=source == "auto",
            target_sizes=[(picture.height, picture.width)],
            text_labels=vocabulary.labels if vocabulary is not None else None,
        )[0]
        labels = [label if label is not None else "object" for label in found["text_labels"]]
        if not labels:
            return Results([], (picture.height, picture.width), model=self.name)
        return Results.from_arrays(
            found["masks"].cpu(),
            labels,
            found["labels"].cpu(),
            found["scores"].cpu(),
            found["mask_scores"].cpu(),
            asked if asked is not None else labels,
            source,
            topk=found["topk"],
            model=self.name,
        )

    def _names(self, vocabulary: Words | None) -> tuple[Vocabulary | None, Tensor | None]:
        """The words to name with; neither the user nor the checkpoint may have any, and then all is an "object"."""
        words = vocabulary if vocabulary is not None else self.model.config.vocabulary
        return self.embed(words) if words is not None else (None, None)

    def _features(self, image) -> tuple[Picture, OVSamFeatures]:
        return image if isinstance(image, tuple) else self.encode(image)

    def _encode_words(self, phrases: list[str]) -> Tensor:
        tokens = self._to_device(self.processor.tokenize(phrases))
        return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"])

    def _to_device(self, inputs: Mapping) -> dict:
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def _hash_of_text_tower(self) -> str:
        """Tells text towers apart by what they do: the hash of their embeddings of a few fixed words."""
        if not self._text_hash:
            probe = self._encode_words(["dog", "a red ball", "zzyzx"]).float().cpu()
            self._text_hash = hashlib.sha256((probe * 1e4).round().numpy().tobytes()).hexdigest()[:16]
        return self._text_hash


def _check_inside(size: tuple[int, int], points, boxes) -> None:
    width, height = size
    for x, y in points or ():
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"The point {x:g},{y:g} is outside the picture, which is {width}x{height} pixels.")
    for x1, y1, x2, y2 in boxes or ():
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise InputError(
                f"The box {x1:g},{y1:g},{x2:g},{y2:g} is not left,top,right,bottom inside the picture, which is "
                f"{width}x{height} pixels."
            )
