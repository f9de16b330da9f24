"""The pipeline task `open-vocabulary-segmentation`: `pipeline(task, model=…)(image, text=["dog", "red ball"])`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ovsam.errors import InputError
from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.outputs import OVSamOutput
from ovsam.processing import arguments
from ovsam.processing.images import open_image
from ovsam.processing.vocabulary import Vocabulary, to_vocabulary
from ovsam.results.results import Results

TASK = "open-vocabulary-segmentation"
PROMPTS = ("input_points", "input_labels", "input_boxes")
OPTIONS = ("text", "negative_text", *PROMPTS, "vocabulary", "everything", "threshold", "mask_threshold", "top_k")


@dataclass(frozen=True)
class _Batch:
    """Images of one pass, which the base class takes for one input."""

    images: list[Any]


class OpenVocabularySegmentationPipeline(Pipeline):
    """Image and text queries (or boxes, points, or nothing) -> list of dicts `score, label, mask, box, mask_score`,
    highest score first.

    Default thresholds are the model's own.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self,
        images: Any = None,
        candidate_labels: Any = None,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **options: Any,
    ) -> Any:
        """Segment an image, or each of a list, generator or data set.

        Args:
            images: an image as Segmenter takes it (a path, a URL, a PIL image, an array), or a dictionary with the key
                `image` and any of the options, as for zero-shot object detection.
            candidate_labels, text: text queries.
            negative_text: negative queries, which suppress the instances that match them better.
            input_points, input_labels, input_boxes: prompts as the processor takes them.
            vocabulary: class names of prompted instances, or of everything.
            everything: True for automatic mask generation, which is also the default without text and prompts.
            threshold, mask_threshold: minimum score, and minimum probability of the pixels of a mask.
            top_k: maximum number of instances of an image.
            batch_size: number of images in one pass.
            num_workers: has no effect; images are decoded in this process.

        Raises:
            InputError: text queries are given twice, or an option is out of range.
        """
        images = options.pop("image", images)
        arguments.no_others("The pipeline", {name: None for name in options if name not in OPTIONS}, OPTIONS)
        if candidate_labels is not None:
            if options.get("text") is not None:
                raise InputError("The text queries are given twice, as candidate_labels and as text; give one of them.")
            options["text"] = candidate_labels
        if batch_size is None:
            batch_size = self._batch_size or 1
        size = arguments.whole("batch_size", batch_size, 1)
        if isinstance(images, Mapping):
            if not all(isinstance(name, str) for name in images):
                raise InputError(f"The input is {arguments.short(images)}; its keys must be `image` and options.")
            return self(**{**options, **images})
        if isinstance(images, list | tuple):
            return list(self._many(images, size, options))
        if arguments.is_stream(images) or isinstance(images, Dataset):
            return self._many(images, size, options)
        return self._ask(images, options)

    def _many(self, images: Iterable[Any], size: int, options: dict) -> Iterator[list[dict]]:
        source = iter(images[i] for i in range(len(images))) if isinstance(images, Dataset) else iter(images)
        while batch := list(islice(source, size)):
            if any(isinstance(one, Mapping) for one in batch):
                yield from (self(one, **options) for one in batch)
            else:
                yield from self._ask(_Batch(batch), options)

    def _ask(self, images: Any, options: dict) -> list:
        """Answer one image, or the images of a batch."""
        options = dict(options)
        vocabulary, everything = options.pop("vocabulary", None), options.pop("everything", False)
        prompted = any(options.get(name) is not None for name in ("input_points", "input_boxes"))
        if arguments.flag("everything", everything) or vocabulary is not None and not prompted:
            if any(options.pop(name, None) is not None for name in ("text", "negative_text", *PROMPTS)):
                raise InputError("Everything takes a vocabulary, no text and no prompts; leave them out.")
            return self._everything(images, vocabulary, **options)
        if vocabulary is not None:
            if options.get("text") is not None:
                raise InputError("The class names are given twice, as vocabulary and as text; give one of them.")
            options["text"] = to_vocabulary(vocabulary)
        return super().__call__(images, **options)

    def _everything(self, images: Any, vocabulary: Any, threshold=None, mask_threshold=0.5, top_k=None) -> list:
        segmenter = Segmenter(self.model, self.processor)
        batch = images.images if isinstance(images, _Batch) else [images]
        words = None if vocabulary is None else to_vocabulary(vocabulary)
        found: Any = segmenter.everything(batch, words, threshold, mask_threshold=mask_threshold)
        rows = [_rows(results)[: arguments.optional(arguments.whole, "top_k", top_k, 1)] for results in found]
        return rows if isinstance(images, _Batch) else rows[0]

    def _sanitize_parameters(
        self,
        text=None,
        negative_text=None,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        threshold=None,
        mask_threshold=None,
        top_k=None,
    ):
        threshold = arguments.optional(arguments.number, "threshold", threshold, 0, 1)
        mask_threshold = arguments.optional(arguments.number, "mask_threshold", mask_threshold, 0, 1, inside=True)
        top_k = arguments.optional(arguments.whole, "top_k", top_k, 1)
        if isinstance(text, Vocabulary):
            text = text.as_mapping()
        prompts = {
            "text": text,
            "negative_text": negative_text,
            "input_points": input_points,
            "input_labels": input_labels,
            "input_boxes": input_boxes,
        }
        limits = {"threshold": threshold, "mask_threshold": mask_threshold, "top_k": top_k}
        return _given(prompts), _given({"threshold": threshold}), _given(limits)

    def preprocess(self, image, **prompts):
        images = [open_image(one) for one in image.images] if isinstance(image, _Batch) else open_image(image)
        inputs = self.processor(images=images, return_tensors="pt", **prompts)
        return dict(inputs) | {"batch": isinstance(image, _Batch)}

    def _forward(self, model_inputs, threshold=None):
        # A threshold below that of proposals lowers the latter too, as in Segmenter.where.
        batch = model_inputs.pop("batch")
        proposal_threshold = None if threshold is None else min(threshold, self.model.config.proposal_threshold)
        outputs = self.model(**model_inputs, proposal_threshold=proposal_threshold)
        # As a dictionary: the base class moves outputs to the CPU, and would lose the subclass of ModelOutput.
        fields = {name: outputs[name] for name in outputs if name != "features"}
        return {"outputs": fields, "original_sizes": model_inputs["original_sizes"], "batch": batch}

    def postprocess(self, model_outputs, threshold=None, mask_threshold=0.5, top_k=None):
        results = self.processor.post_process_instance_segmentation(
            OVSamOutput(**model_outputs["outputs"]),
            threshold=threshold,
            mask_threshold=mask_threshold,
            target_sizes=model_outputs["original_sizes"],
        )
        found = [self._instances(result)[:top_k] for result in results]
        return found if model_outputs["batch"] else found[0]

    @staticmethod
    def _instances(result: dict) -> list[dict]:
        rows = zip(
            result["scores"].tolist(),
            result["text_labels"],
            result["masks"],
            result["boxes"].tolist(),
            result["mask_scores"].tolist(),
            strict=True,
        )
        found = [
            {"score": score, "label": label, "mask": mask.cpu().numpy(), "box": _box(box), "mask_score": mask_score}
            for score, label, mask, box, mask_score in rows
        ]
        return sorted(found, key=lambda one: -one["score"])


def _rows(results: Results) -> list[dict]:
    return [
        {"score": one.score, "label": one.label, "mask": one.mask, "box": _box(one.box), "mask_score": one.mask_score}
        for one in results
    ]


def _box(corners: Iterable[float]) -> dict[str, float]:
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))


def _given(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if value is not None}


def register_pipeline() -> None:
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=(AutoModel,), type="multimodal"
    )
