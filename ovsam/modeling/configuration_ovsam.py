"""OVSamConfig: which parts a model is composed of, and the few numbers that belong to the whole."""

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
    """A whole model. The configurations of its parts may also be given as dictionaries.

    `composition` says where image features come from:

    - `dual`: a SAM vision encoder and a CLIP image encoder;
    - `clip`: CLIP's alone; `sam2clip_config` turns its maps into SAM features (Open-Vocabulary SAM, the paper);
    - `sam`: SAM's alone; the adapters read its pyramid, and CLIP keeps only its text tower.

    `clip2sam_config` (names of prompted masks) and `concepts_config` (words to instances) may be None: the model then
    names by CLIP's own pooling, and cannot answer words or everything.

    `vocabulary` holds the words to name with when a user gives none: a list, the name of a built-in one ("lvis"), None.
    `templates` are the sentences the text tower was trained with, `{}` standing for the word. `score_threshold` is the
    default below which words and everything return nothing; `proposal_threshold` the lower one below which a location
    is not even refined; `max_locations` how many locations words are compared with, 0 for all. `objectness_weight` is
    objectness' share in the score of a word: score = p(word)^(1 - w) * objectness^w (OWLv2's own scores: 0).
    `score_calibration` and `name_calibration`, (scale, shift), make scores mean how often they are right: a score's
    logit is multiplied by scale, which is positive, and shift is added; the first for words, the second for the names
    of prompted masks and of everything. `score_threshold` and `proposal_threshold` are for calibrated scores.
    `exemplar_scale`: an exemplar is a word whose embedding has this length, since cosines between two pictures of a
    kind run higher than those between a picture and its word (0.82 against 0.20 in ovsam-tiny). `prototype_weight`: how
    much the ConceptHead's prototype masks have to say beside the mask decoder: their logits, times this, are added to
    the decoder's, for words, and for single masks of boxes and clicks that come without a mask; 0 leaves all masks to
    the decoder.
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
    prototype_weight: float = 0.0
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
                "The composition 'clip' has no SAM vision encoder: it needs sam2clip_config, which stands in."
            )
        for name in ("score_calibration", "name_calibration"):
            pair = getattr(self, name)
            if len(pair) != 2 or pair[0] <= 0:
                raise InputError(f"{name} is {pair}; it must be a positive scale and a shift.")
        super().__post_init__(**kwargs)
