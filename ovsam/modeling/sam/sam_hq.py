"""SAM-HQ (Ke et al. 2023): SAM 1 with an additional token, whose mask is made of finer features (section 3.2)."""

from torch import Tensor
from transformers import SamHQModel

from ovsam.modeling.outputs import DecodedMasks, SamFeatures
from ovsam.modeling.sam.base import take_masks
from ovsam.modeling.sam.decode import MaskPrompts, decode_masks
from ovsam.modeling.sam.sam1 import Sam1Side


class SamHqSide(Sam1Side):
    """A `SamHQModel`; takes a `SamHQConfig`. Its geometry is SAM 1's.

    Masks are SAM's plus the high-quality one, as in transformers by default; candidates of an ambiguous prompt come in
    order of predicted IoU, highest first. They equal those of SAM-HQ's own code: transformers (4.56 to 5.23), by
    mistake, upscales the image from before the decoder's transformer, with rows and columns swapped.
    """

    model_class = SamHQModel
    finer_maps = 1
    image_layers = (
        "activation",
        *("encoder_conv1", "encoder_norm", "encoder_conv2"),
        *("compress_vit_conv1", "compress_vit_norm", "compress_vit_conv2"),
    )

    def _encode(self, pixel_values: Tensor) -> SamFeatures:
        seen, decoder = self.model.vision_encoder(pixel_values), self.model.mask_decoder
        embedding = seen.last_hidden_state
        early = seen.intermediate_embeddings[0].permute(0, 3, 1, 2)  # [B, h, w, C'] -> [B, C', h, w]
        fine = decoder.encoder_conv2(decoder.activation(decoder.encoder_norm(decoder.encoder_conv1(embedding))))
        early = decoder.activation(decoder.compress_vit_norm(decoder.compress_vit_conv1(early)))
        fine = fine + decoder.compress_vit_conv2(early)  # [B, C/8, 4h, 4w]
        return SamFeatures(embedding=embedding, high_res=(fine,), pyramid=(embedding,))

    def _decode(
        self, features: SamFeatures, position: Tensor, sparse: Tensor, dense: Tensor | MaskPrompts
    ) -> DecodedMasks:
        assert features.high_res is not None  # checked by `decode`
        fine = features.high_res[0]
        decoded = decode_masks(self.model.mask_decoder, features.embedding, position, (), sparse, dense, fine)
        decoded.masks, best = decoded.masks.split([decoded.iou.shape[-1], 1], dim=2)
        decoded.masks = decoded.masks + best
        decoded.tokens = decoded.tokens[:, :, :-1]
        return decoded

    def select_masks(
        self, decoded: DecodedMasks, multimask_output: bool, by_stability: bool | None = None
    ) -> DecodedMasks:
        selected = super().select_masks(decoded, multimask_output, by_stability)
        return take_masks(selected, selected.iou.argsort(dim=-1, descending=True))
