"""The pipeline task `open-vocabulary-segmentation`: `pipeline(task, model=…)(image, text=["dog", "red ball"])`."""

from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ovsam.modeling.outputs import OVSamOutput
from ovsam.processing.images import open_image

TASK = "open-vocabulary-segmentation"


class OpenVocabularySegmentationPipeline(Pipeline):
    """Image and text queries (or boxes, points, or nothing) -> list of dicts `score, label, mask, box, mask_score`.

    Default thresholds are the model's own.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self,
        text=None,
        negative_text=None,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        threshold=None,
        mask_threshold=None,
    ):
        prompts = {
            "text": text,
            "negative_text": negative_text,
            "input_points": input_points,
            "input_labels": input_labels,
            "input_boxes": input_boxes,
        }
        limits = {"threshold": threshold, "mask_threshold": mask_threshold}
        return _given(prompts), _given({"threshold": threshold}), _given(limits)

    def preprocess(self, image, **prompts):
        return self.processor(images=open_image(image), return_tensors="pt", **prompts)

    def _forward(self, model_inputs, threshold=None):
        # A threshold below that of proposals lowers the latter too, as in Segmenter.where.
        proposal_threshold = None if threshold is None else min(threshold, self.model.config.proposal_threshold)
        outputs = self.model(**model_inputs, proposal_threshold=proposal_threshold)
        # As a dictionary: the base class moves outputs to the CPU, and would lose the subclass of ModelOutput.
        fields = {name: outputs[name] for name in outputs if name != "features"}
        return {"outputs": fields, "original_sizes": model_inputs["original_sizes"]}

    def postprocess(self, model_outputs, threshold=None, mask_threshold=0.5):
        result = self.processor.post_process_instance_segmentation(
            OVSamOutput(**model_outputs["outputs"]),
            threshold=threshold,
            mask_threshold=mask_threshold,
            target_sizes=model_outputs["original_sizes"],
        )[0]
        rows = zip(
            result["scores"].tolist(),
            result["text_labels"],
            result["masks"],
            result["boxes"].tolist(),
            result["mask_scores"].tolist(),
            strict=True,
        )
        return [
            {
                "score": score,
                "label": label,
                "mask": mask.cpu().numpy(),
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
                "mask_score": mask_score,
            }
            for score, label, mask, box, mask_score in rows
        ]


def _given(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if value is not None}


def register_pipeline() -> None:
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=(AutoModel,), type="multimodal"
    )
