"""Mask decoder of Open-Vocabulary SAM (Yuan et al. 2024): that of SAM 1 with a label token in place of the IoU token.
The token takes part in attention and so changes the masks, but its output is not used."""

from torch import Tensor, nn
from transformers import AutoConfig, SamConfig

from ovsam.errors import InputError
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.sam.base import DecodedMasks, Part
from ovsam.modeling.sam.decode import MaskPrompts
from ovsam.modeling.sam.sam1 import Sam1Side


class LabelTokenSamConfig(SamConfig):
    """A SAM 1 without a vision encoder; the release has one mask token (`num_multimask_outputs` 0)."""

    model_type = "ovsam_label_token_sam"


AutoConfig.register(LabelTokenSamConfig.model_type, LabelTokenSamConfig)


class LabelTokenSamSide(Sam1Side):
    """SAM 1's prompt encoder and mask decoder; `iou_token` of the latter is the label token, and no IoU is predicted.

    Raises:
        InputError: `part` needs a vision encoder, that is, the composition is not `clip`.
    """

    def __init__(self, config: LabelTokenSamConfig, part: Part = "all"):
        if part not in ("decoder", "tracker"):
            raise InputError("This SAM side has no vision encoder; use it with the composition 'clip'.")
        super().__init__(config, part)
        self.model.mask_decoder.iou_prediction_head = nn.Identity()

    def _decode(
        self, features: SamFeatures, position: Tensor, sparse: Tensor, dense: Tensor | MaskPrompts
    ) -> DecodedMasks:
        decoded = super()._decode(features, position, sparse, dense)
        return DecodedMasks(masks=decoded.masks, tokens=decoded.tokens)

    def select_masks(
        self, decoded: DecodedMasks, multimask_output: bool, by_stability: bool | None = None
    ) -> DecodedMasks:
        """Return all masks: without a predicted IoU there is no order among them."""
        return decoded
