"""The mask decoder of Open-Vocabulary SAM (Yuan et al. 2024): SAM 1's, where a label token stands in the place of the
IoU token. It takes part in attention and so changes the masks, but nothing reads what becomes of it."""

from typing import Literal

from torch import Tensor, nn
from transformers import AutoConfig, SamConfig

from ovsam.errors import InputError
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.base import DecodedMasks
from ovsam.modeling.sam.sam1 import Sam1Side


class LabelTokenSamConfig(SamConfig):
    """A SAM 1 without a vision encoder; the release has one mask token, `num_multimask_outputs` of 0."""

    model_type = "ovsam_label_token_sam"


AutoConfig.register(LabelTokenSamConfig.model_type, LabelTokenSamConfig)


class LabelTokenSamSide(Sam1Side):
    """SAM 1's prompt encoder and mask decoder; in the latter `iou_token` holds the label token, and there is no IoU.

    Raises:
        InputError: a part other than "decoder", that is, a composition other than `clip`.
    """

    def __init__(self, config: LabelTokenSamConfig, part: Literal["all", "vision", "decoder"] = "all"):
        if part != "decoder":
            raise InputError("This SAM side has no vision encoder: it goes with the composition 'clip' alone.")
        super().__init__(config, part)
        self.model.mask_decoder.iou_prediction_head = nn.Identity()

    def _decode(self, features: SamFeatures, position: Tensor, sparse: Tensor, dense: Tensor) -> DecodedMasks:
        decoded = super()._decode(features, position, sparse, dense)
        return DecodedMasks(masks=decoded.masks, tokens=decoded.tokens)

    def select_masks(
        self, decoded: DecodedMasks, multimask_output: bool, by_stability: bool | None = None
    ) -> DecodedMasks:
        """All there are: without a predicted IoU there is nothing to choose by."""
        return decoded
