"""The pipeline task `open-vocabulary-segmentation`: `pipeline(task, model=…)(image, text=["dog", "red ball"])`."""

from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ovsam.images import open_image

TASK = "open-vocabulary-segmentation"


class OpenVocabularySegmentationPipeline(Pipeline):
    """One picture and words (or boxes, points, or nothing) -> list of dicts `score, label, mask, box, mask_score`."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self, threshold=None, mask_threshold=None, **prompts):
        names = ("text", "negative_text", "input_points", "input_labels", "input_boxes")
        given = {name: prompts[name] for name in names if prompts.get(name) is not None}
        limits = {"threshold": threshold, "mask_threshold": mask_threshold}
        return given, {}, {name: value for name, value in limits.items() if value is not None}

    def preprocess(self, image, **prompts):
        return self.processor(images=open_image(image), return_tensors="pt", **prompts)

    def _forward(self, model_inputs):
        riders = {name: model_inputs.pop(name, None) for name in ("original_sizes", "text_labels", "prompt_counts")}
        return {"outputs": self.model(**model_inputs), **riders}

    def postprocess(self, model_outputs, threshold=None, mask_threshold=0.5):
        result = self.processor.post_process_instance_segmentation(
            model_outputs["outputs"],
            threshold=self.model.config.score_threshold if threshold is None else threshold,
            mask_threshold=mask_threshold,
            target_sizes=model_outputs["original_sizes"],
            text_labels=model_outputs["text_labels"],
            prompt_counts=model_outputs["prompt_counts"],
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


def register_pipeline() -> None:
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=(AutoModel,), type="multimodal"
    )
