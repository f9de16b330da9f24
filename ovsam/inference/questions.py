"""The three questions, whatever runs the model: arguments, lists, tiles, exemplars and results. `Segmenter` runs
torch, and `OnnxSegmenter` onnxruntime.

Nothing here imports torch.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.inference.encoded import EncodedImage, OneImage
from ovsam.inference.options import (
    check_exemplars,
    check_negative,
    check_options,
    check_share,
    check_tile,
    names_of,
)
from ovsam.inference.text_embedder import TextEmbedder
from ovsam.inference.tiling import segment_tiled
from ovsam.ops.arrays import Array, floats, namespace
from ovsam.processing import arguments
from ovsam.processing.images import open_image
from ovsam.processing.vocabulary import Vocabulary, to_vocabulary
from ovsam.results.results import Results

Words = Vocabulary | str | os.PathLike | Sequence[str] | Mapping[str, str]

BATCH = 4  # images of a list that are encoded in one pass


@dataclass(frozen=True)
class Asked:
    """A question, once its words are embedded. negatives: their vocabulary and embeddings; threshold: minimum score, or
    minimum objectness if the source is "auto"."""

    source: str
    vocabulary: Vocabulary | None = None
    embeds: Array | None = None
    negatives: tuple[Vocabulary, Array] | None = None
    threshold: float | None = None
    proposer: Any = None
    refine: bool | None = None
    post: dict = field(default_factory=dict)


class Questions:
    """Detection by text queries, segmentation of prompts, and of everything in an image.

    An image is a path, the bytes of a file, a PIL image, an array [H, W, 3] or a tensor [3, H, W] (uint8, or float in
    [0, 1]), or an `EncodedImage`, which is not encoded again. `encode`, `where`, `everything` and `what` take one image
    and return one result, or a list of images and return a list; lists are encoded in batches.

    Words are a list, a mapping of phrases to labels, a file, the name of a built-in vocabulary, or a Vocabulary.

    A subclass runs the model: it has `name`, `settings` (the fields of OVSamConfig that answers depend on) and the
    methods that raise NotImplementedError here. Arrays are those of its library.
    """

    settings: Any

    def __init__(self, name: str):
        self.name = name
        self._texts = TextEmbedder(self)

    def encode_words(self, phrases: list[str]) -> np.ndarray:
        """Phrases -> their embeddings [K, D] by the text tower, L2-normalised."""
        raise NotImplementedError

    def text_weights(self) -> tuple:
        """Anything hashable that changes with the text tower."""
        raise NotImplementedError

    def to_own(self, embeds: np.ndarray) -> Array:
        """Embeddings as the model takes them."""
        raise NotImplementedError

    def _encode(self, images: list[Image.Image]) -> list[EncodedImage]:
        """Upright RGB images -> their features."""
        raise NotImplementedError

    def _answer(self, encoded: EncodedImage, asked: Asked, threshold: float) -> Any:
        """The output, an OVSamOutput or alike, for a question without prompts."""
        raise NotImplementedError

    def _prompt(self, encoded: EncodedImage, points=None, labels=None, boxes=None, masks=None, words=None, embeds=None):
        """The output for checked prompts: lists in pixels of the image, masks [n, H, W] bool or logits as an array."""
        raise NotImplementedError

    def _instances(self, outputs: Any, size: tuple[int, int], threshold: float | None, post: dict) -> dict[str, Any]:
        """The kept instances of an image of `size` (height, width), with run lengths, as
        OVSamProcessor.post_process_instance_segmentation describes them."""
        raise NotImplementedError

    def _check_proposer(self, proposer: Any) -> Any:
        """Check and return the proposer; raises InputError."""
        raise NotImplementedError

    @overload
    def encode(self, image: OneImage, batch_size: int = BATCH) -> EncodedImage: ...

    @overload
    def encode(self, image: list[OneImage] | tuple[OneImage, ...], batch_size: int = BATCH) -> list[EncodedImage]: ...

    def encode(self, image, batch_size=BATCH):
        """Encode an image once for several questions: pass the result in place of the image.

        Images of a list are encoded `batch_size` at a time.
        """
        batch_size = arguments.whole("batch_size", batch_size, 1)
        image = _listed(image)
        if isinstance(image, list | tuple):
            return [one for batch in self._batches(image, batch_size) for one in batch]
        return image if isinstance(image, EncodedImage) else self._encode([open_image(image)])[0]

    def _batches(self, images: Sequence[OneImage], size: int = BATCH) -> Iterator[list[EncodedImage]]:
        """The encoded images of a list, `size` at a time, in their order."""
        for start in range(0, len(images), size):
            batch = [
                image if isinstance(image, EncodedImage) else open_image(image)
                for image in images[start : start + size]
            ]
            fresh = [image for image in batch if not isinstance(image, EncodedImage)]
            encoded = iter(self._encode(fresh) if fresh else ())
            yield [image if isinstance(image, EncodedImage) else next(encoded) for image in batch]

    def _each(self, images: Sequence[OneImage], ask: Callable[[int, EncodedImage], Any]) -> list:
        """Return ask(index, encoded image) for each image of a list."""
        encoded = (image for batch in self._batches(images) for image in batch)
        return [ask(index, image) for index, image in enumerate(encoded)]

    def embed(self, words: Words, progress: Callable[[int, int], None] | None = None) -> tuple[Vocabulary, Array]:
        """The vocabulary and its text embeddings [K, D]; the last ones are kept in memory, long ones on disk.

        `progress` is called with the number of phrases that are done and of all, at the start and every few phrases; it
        may raise to stop.
        """
        return self._texts.embed(words if isinstance(words, Vocabulary) else Vocabulary(words), progress)

    def where(
        self,
        image: OneImage | Sequence[OneImage],
        words: Words | None = None,
        negative: Vocabulary | Sequence[str] | None = (),
        threshold: float | None = None,
        exemplars: Sequence | Mapping[str, Sequence] | None = None,
        proposer: Any = None,
        refine: bool | None = None,
        tile: int | None = None,
        *,
        nms: str | None = "fast",
        per_word: bool = False,
        rescore: bool = False,
        exclusive: bool = False,
        mask_threshold: float = 0.5,
        top_k: int = 5,
        **unknown: Any,
    ) -> Results | list[Results]:
        """Open-vocabulary detection: every instance of the words, highest score first.

        Instances that score higher for a negative word are left out and listed in `results.dropped`.

        Args:
            exemplars: boxes [x1, y1, x2, y2] around example objects, alone or besides the words; similar objects are
                returned too. A box is on this image, or (image, box) on another one; for a list of images only the
                latter. Their label is "exemplar", or their own: {label: boxes}, which may be one of the words.
            proposer: source of candidate objects: "concepts" (the model's own ConceptHead, the default if it has one),
                "clip-dense", "grid", "detector:ID", "sam3:ID", or a function (ovsam.inference.proposers).
            refine: whether the mask decoder refines the masks of the ConceptHead, which takes longer; the default is
                that of the checkpoint.
            tile: side in pixels of overlapping tiles that are searched for small objects, besides the whole image; the
                time grows with the number of tiles (ovsam/inference/tiling.py).
            nms: how overlapping instances are suppressed, a key of ovsam.ops.nms.NMS, or None.
            per_word: suppress only among instances of one class name.
            rescore: multiply scores by the predicted IoU of the mask.
            exclusive: give each pixel to one instance, that of the highest score.
            mask_threshold: minimum probability of a pixel, between 0 and 1.
            top_k: class names listed per instance.
        """
        arguments.no_others("where", unknown, names_of(Questions.where))
        post = {"nms": nms, "per_word": per_word, "rescore": rescore, "exclusive": exclusive}
        post = check_options(post | {"mask_threshold": mask_threshold, "top_k": top_k})
        threshold, tile = check_share("threshold", threshold), check_tile(tile)
        refine, proposer = arguments.optional_flag("refine", refine), self._check_proposer(proposer)
        examples = check_exemplars(exemplars)
        if words is None and not examples:
            raise InputError("There is no question; pass words or exemplars.")
        image = given = _listed(image)
        wanted = to_vocabulary(words) if words is not None else None
        unwanted = check_negative(negative)
        vocabulary, embeds = self.embed(wanted) if wanted is not None else (None, None)
        if examples:
            if not isinstance(image, list | tuple):
                image = image if tile else self.encode(image)
            vocabulary, embeds = self._with_exemplars(vocabulary, embeds, examples, image)
        negatives = self.embed(unwanted) if unwanted is not None else None
        question = Asked("text", vocabulary, embeds, negatives, threshold, proposer, refine, post)
        return _remember(self._propose(image, question, tile), given)

    def everything(
        self,
        image: OneImage | Sequence[OneImage],
        vocabulary: Words | None = None,
        threshold: float | None = None,
        objectness: float | None = None,
        proposer: Any = None,
        refine: bool | None = None,
        tile: int | None = None,
        *,
        nms: str | None = "fast",
        per_word: bool = False,
        rescore: bool = False,
        exclusive: bool = False,
        mask_threshold: float = 0.5,
        top_k: int = 5,
        **unknown: Any,
    ) -> Results | list[Results]:
        """Automatic mask generation with class names, from the vocabulary or else from the checkpoint's own; highest
        score first.

        Args:
            threshold: minimum score, that of the class name, none by default; the same as `results.filter(score=...)`.
            objectness: minimum objectness, which does not depend on the class name; the model's own by default.

        The other arguments are those of `where`.
        """
        arguments.no_others("everything", unknown, names_of(Questions.everything))
        post = {"nms": nms, "per_word": per_word, "rescore": rescore, "exclusive": exclusive}
        post = check_options(post | {"mask_threshold": mask_threshold, "top_k": top_k})
        threshold, objectness = check_share("threshold", threshold), check_share("objectness", objectness)
        tile, image = check_tile(tile), _listed(image)
        refine, proposer = arguments.optional_flag("refine", refine), self._check_proposer(proposer)
        question = Asked("auto", *self._names(vocabulary), None, objectness, proposer, refine, post)
        found = self._propose(image, question, tile)
        found = _remember(found, image)
        if isinstance(found, list):
            return [results.filter(score=threshold or 0.0) for results in found]
        return found.filter(score=threshold or 0.0)

    def what(
        self,
        image: OneImage | Sequence[OneImage],
        points: Sequence[Sequence[float]] | None = None,
        labels: Sequence[int] | None = None,
        boxes: Sequence[Sequence[float]] | None = None,
        masks: Array | None = None,
        vocabulary: Words | None = None,
        *,
        exclusive: bool = False,
        mask_threshold: float = 0.5,
        top_k: int = 5,
        **unknown: Any,
    ) -> Results | list[Results]:
        """Segmentation and classification of prompts: one mask per object, with class names from the vocabulary or else
        from the checkpoint's own.

        Args:
            points: [[x, y], ...], clicks on one object; with `labels`, 1 on it and 0 beside it.
            boxes: [[x1, y1, x2, y2], ...], an object each; together with points, one box for their object.
            masks: [n, H, W] bool over the image, an object each: rough masks to be made exact, such as an earlier
                result's; together with points, one.

        exclusive, mask_threshold and top_k are those of `where`. Results are in the order of the prompts. With a list
        of images, points, labels, boxes and masks are lists with one entry an image.
        """
        arguments.no_others("what", unknown, names_of(Questions.what))
        post = check_options({"exclusive": exclusive, "mask_threshold": mask_threshold, "top_k": top_k})
        image = _listed(image)
        if isinstance(image, list | tuple):
            every = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
            per_image: dict[str, Any] = {name: given for name, given in every.items() if given is not None}
            for name, given in per_image.items():
                if arguments.length(given) != len(image):
                    raise InputError(
                        f"With a list of {len(image)} images, {name} must be a list with one entry for each; "
                        f"got {arguments.short(given)}."
                    )
            words = self._vocabulary(vocabulary)
            return self._each(
                image,
                lambda i, one: self.what(one, **{k: v[i] for k, v in per_image.items()}, vocabulary=words, **post),
            )
        points, boxes = arguments.points(points), arguments.boxes(boxes)
        labels = arguments.point_labels(labels, len(points)) if points or labels is not None else None
        if not points and not boxes and masks is None:
            raise InputError("There is no prompt; pass points, boxes or masks.")
        masks = None if masks is None else arguments.masks(masks)
        for name, several in (("box", boxes), ("mask", masks)):
            if points and several is not None and len(several) > 1:
                raise InputError(f"All points belong to one object; pass one {name} with them, not {len(several)}.")
        if boxes and masks is not None and len(boxes) != len(masks):
            raise InputError(f"There are {len(boxes)} boxes for {len(masks)} masks; each object takes one of each.")
        encoded = self.encode(image)
        words, embeds = self._names(vocabulary)
        arguments.check_inside(encoded.image.size, points, boxes)
        if masks is not None:
            arguments.masks(masks, (encoded.image.height, encoded.image.width))
        outputs = self._prompt(encoded, points, labels, boxes, masks, words, embeds)
        source: str = "mask"
        prompts: list = ["mask"] * len(outputs.pred_masks[0])
        if points:
            source, prompts = "point", [points]
        elif boxes:
            source, prompts = "box", boxes
        return _remember(self._results(outputs, encoded.image, Asked(source, words, post=post), prompts=prompts), image)

    def _propose(self, image, asked: Asked, tile: int | None) -> Any:
        if isinstance(image, list | tuple):
            if tile:
                return [self._propose(one, asked, tile) for one in image]
            return self._each(image, lambda _, one: self._propose(one, asked, None))
        if tile:
            if isinstance(image, EncodedImage):
                raise InputError(
                    "With tile, pass the image itself instead of an EncodedImage; tiles are encoded one by one."
                )
            return segment_tiled(lambda part: self._propose(part, asked, None), open_image(image), tile, tile // 4)
        encoded, threshold = self.encode(image), asked.threshold
        if threshold is None:
            settings = self.settings
            threshold = settings.objectness_threshold if asked.source == "auto" else settings.score_threshold
        return self._results(self._answer(encoded, asked, threshold), encoded.image, asked, threshold)

    def _with_exemplars(self, vocabulary, embeds, exemplars, image) -> tuple[Vocabulary, Array]:
        """Words and their embeddings, followed by those of the exemplars."""
        labels = {} if vocabulary is None else vocabulary.as_mapping()
        rows = [] if embeds is None else [embeds]
        for label, boxes in exemplars.items():
            for number, (on, box) in enumerate(boxes, 1):
                on = image if on is None else on
                if isinstance(on, list | tuple):
                    raise InputError("With a list of images, an exemplar must be (image, box), not a box alone.")
                encoded = self.encode(on)
                arguments.check_inside(encoded.image.size, (), [box])
                found = self._prompt(encoded, boxes=[box])
                rows.append(floats(found.class_embeds[0]) * self.settings.exemplar_scale)
                labels[f"{label} as in exemplar {number}"] = label
        return Vocabulary(labels), namespace(rows[0]).concatenate(rows)

    def _results(self, outputs, picture, asked: Asked, threshold=None, prompts=None) -> Results:
        size = (picture.height, picture.width)
        found = self._instances(outputs, size, threshold, asked.post)
        labels = [label if label is not None else "object" for label in found["text_labels"]]
        phrases = [phrase if phrase is not None else "object" for phrase in found["phrases"]]
        objectness = found["objectness"]
        results = Results.from_arrays(
            found["masks"],
            labels,
            found["labels"].tolist(),
            found["scores"].tolist(),
            found["mask_scores"].tolist(),
            prompts if prompts is not None else phrases,
            asked.source,
            topk=found["topk"],
            model=self.name,
            objectness=None if objectness is None else objectness.tolist(),
            size=size,
            presence=found["presence"],
            dropped=found["dropped"],
        )
        if asked.source == "auto":  # post-processing sorts by objectness
            best_first = sorted(results, key=lambda one: -one.score)
            results.instances = [replace(one, id=number) for number, one in enumerate(best_first, 1)]
        return results

    def _names(self, vocabulary: Words | None) -> tuple[Vocabulary | None, Array | None]:
        """The class names and their embeddings; None where neither the user nor the checkpoint has any."""
        words = self._vocabulary(vocabulary)
        return self.embed(words) if words is not None else (None, None)

    def _vocabulary(self, vocabulary: Words | None) -> Words | None:
        return vocabulary if vocabulary is not None else self.settings.vocabulary


def _listed(image: Any) -> Any:
    """A generator of images as a list; anything else as it is."""
    return list(image) if arguments.is_stream(image) else image


def _remember(found: Any, image: Any) -> Any:
    """Store the image of results: its file name, or the object that the user has in memory anyway."""
    if isinstance(found, list):
        return [_remember(results, one) for results, one in zip(found, image, strict=True)]
    if isinstance(image, str | os.PathLike):
        found.file_name = os.fspath(image)
    elif not hasattr(image, "read"):  # an open file was read to its end
        found.picture = image.image if isinstance(image, EncodedImage) else image
    return found
