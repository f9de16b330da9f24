"""OVSamConfig: the parts of a model, and the settings that concern all of them."""

import math

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ovsam.errors import InputError
from ovsam.modeling.adapters import (
    Clip2SamConfig,
    Clip2SamFpnConfig,
    ConceptHeadConfig,
    Sam2ClipConfig,
    Sam2ClipVitConfig,
)
from ovsam.modeling.clip import DualEncoderConfig, ImageNetConfig, OpenClipConfig
from ovsam.modeling.remote_code import RemoteCodeConfig

COMPOSITIONS = ("dual", "clip", "sam")
SHARES = (  # settings from 0 to 1
    "objectness_weight",
    "nms_threshold",
    "mask_nms_threshold",
    "proposal_threshold",
    "score_threshold",
    "objectness_threshold",
)
AMOUNTS = ("max_locations", "max_detections", "exemplar_scale", "mask_head_weight")

for _part in (
    Clip2SamConfig,
    Clip2SamFpnConfig,
    ConceptHeadConfig,
    DualEncoderConfig,
    ImageNetConfig,
    OpenClipConfig,
    Sam2ClipConfig,
    Sam2ClipVitConfig,
):
    AutoConfig.register(_part.model_type, _part)


class OVSamConfig(RemoteCodeConfig):
    """Configuration of a whole model. The configurations of its parts may also be given as dictionaries.

    `composition` is the source of the image features:

    - `dual`: a SAM vision encoder and a CLIP image encoder;
    - `clip`: CLIP alone; `sam2clip_config` turns its maps into SAM features (Open-Vocabulary SAM, the paper);
    - `sam`: SAM alone; the adapters read its pyramid, and only the text tower of CLIP is kept.

    Args:
        clip2sam_config: adapter that classifies prompted masks; without it the model classifies by CLIP's own pooling.
        concepts_config: ConceptHead, which finds instances of text queries; without it the model needs prompts, unless
            the CLIP side finds objects itself.
        vocabulary: default class names: a list, the name of a built-in vocabulary ("lvis"), or None.
        templates: sentences that the text tower was trained with; `{}` stands for the class name.
        score_threshold: default lowest score of instances that are returned.
        proposal_threshold: lowest score of locations that are refined; lower than `score_threshold`.
        max_locations: number of locations that text queries are compared with; 0 for all.
        objectness_weight: weight w of the objectness in the score of a text query: score = p(word)^(1 - w) *
            objectness^w (0 for OWLv2).
        score_calibration: (scale, shift) that calibrate the scores of text queries: the logit of a score is multiplied
            by scale, which is positive, and shift is added. `score_threshold` and `proposal_threshold` apply to
            calibrated scores.
        name_calibration: (scale, shift) for the class names of prompted masks and of everything.
        exemplar_scale: length of the embedding of an exemplar, which is used like a text query. Cosines between two
            images of a class are higher than those between an image and its class name (0.82 against 0.20 in
            ovsam-tiny).
        mask_head_weight: weight of the prior, which is added to the masks of a mask decoder that was trained to correct
            it: the masks of the ConceptHead, or mask prompts. 0 uses the masks of the decoder alone.
        refine_boxes: whether the mask decoder refines the ConceptHead's masks of boxes, those of prompts and those of
            locations, if a call leaves it open. It always refines those of clicks and mask prompts.
    """

    model_type = "ovsam"
    auto_classes = {"AutoModel": "OVSamModel", "AutoModelForMaskGeneration": "OVSamModel"}
    sub_configs_defaults = {
        "sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam2"),
        "clip_config": SubConfigSpec(config_class=AutoConfig, model_type=DualEncoderConfig.model_type),
        "sam2clip_config": SubConfigSpec(config_class=AutoConfig, model_type=Sam2ClipConfig.model_type, optional=True),
        "clip2sam_config": SubConfigSpec(config_class=AutoConfig, model_type=Clip2SamConfig.model_type, optional=True),
        "concepts_config": SubConfigSpec(config_class=ConceptHeadConfig, optional=True),
    }

    composition: str = "dual"
    sam_config: PreTrainedConfig | None = None
    clip_config: PreTrainedConfig | None = None
    sam2clip_config: PreTrainedConfig | None = None
    clip2sam_config: PreTrainedConfig | None = None
    concepts_config: ConceptHeadConfig | None = None
    vocabulary: list | str | None = None
    templates: list | tuple = ("{}",)
    max_locations: int = 300
    max_detections: int = 100
    objectness_weight: float = 0.5
    score_calibration: list | tuple = (1.0, 0.0)
    name_calibration: list | tuple = (1.0, 0.0)
    exemplar_scale: float = 0.22
    mask_head_weight: float = 0.0
    refine_boxes: bool = True
    nms_threshold: float = 0.6
    mask_nms_threshold: float = 0.6
    proposal_threshold: float = 0.1
    score_threshold: float = 0.3
    objectness_threshold: float = 0.3

    def __post_init__(self, **kwargs):
        if self.composition not in COMPOSITIONS:
            raise InputError(f"composition is {self.composition!r}; it must be one of {', '.join(COMPOSITIONS)}.")
        if self.composition == "clip" and self.sam2clip_config is None:
            raise InputError(
                "The composition 'clip' has no SAM vision encoder: it needs sam2clip_config, which replaces it."
            )
        for name in ("score_calibration", "name_calibration"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(isinstance(one, int | float) for one in pair) or pair[0] <= 0:
                raise InputError(f"{name} is {pair}; it must be two numbers, a positive scale and a shift.")
        for name in SHARES:
            if not isinstance(value := getattr(self, name), int | float) or not 0 <= value <= 1:
                raise InputError(f"{name} is {value!r}; it must be a number from 0 to 1.")
        for name in AMOUNTS:
            if not isinstance(value := getattr(self, name), int | float) or not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}; it must be a number, 0 or more.")
        if getattr(self, "id2label", None) is None and isinstance(self.vocabulary, list | tuple):
            labels = dict(enumerate(self.vocabulary))
            self.id2label, self.label2id = labels, {word: number for number, word in labels.items()}
        if getattr(self, "id2label", None):  # json sorts numbers as text
            self.id2label = dict(sorted((int(number), word) for number, word in self.id2label.items()))
        super().__post_init__(**kwargs)
