"""The CLIP side that holds OWLv2 ("Scaling Open-Vocabulary Object Detection", Minderer et al., 2023): a dual encoder
that has a ConceptHead of its own, so that text queries find instances without any training.

OWLv2 takes the image padded at the bottom and at the right to a square. Each patch has an objectness, a box, and a
class embedding with a scale and a shift of its own. Text queries come later, as one matrix product.
"""

import torch
import torch.nn.functional as F
from transformers import Owlv2Config, Owlv2ForObjectDetection
from transformers.image_transforms import center_to_corners_format
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ovsam.errors import InputError
from ovsam.modeling.clip.base import ClipSide, map_blocks, region_pool
from ovsam.modeling.outputs import ClipFeatures, ConceptOutput


class Owlv2Side(ClipSide):
    """OWLv2 as both encoders and ConceptHead; weights have the names of transformers' Owlv2ForObjectDetection.

    `maps` are the patch tokens after four blocks, all at the stride of the patches; `pool_map` [B, C, h, w] is the
    input of the detection heads. The input may have any size in whole patches: position embeddings are interpolated,
    box biases computed. `part` is "all", "vision" (the vision tower and the heads) or "text".
    """

    image_mean = tuple(OPENAI_CLIP_MEAN)
    image_std = tuple(OPENAI_CLIP_STD)
    model_class = Owlv2ForObjectDetection
    softmax = False
    templates = ("a photo of a {}",)
    # Scores do not include objectness, and are lower than those of a head that is trained with it.
    settings = {
        "objectness_weight": 0.0,
        "score_threshold": 0.2,
        "proposal_threshold": 0.1,
        "objectness_threshold": 0.2,
    }
    has_concepts = True
    image_processor = {"image_processor_type": "Owlv2ImageProcessor", "do_pad": True}

    def __init__(self, config: Owlv2Config, part: str = "all"):
        super().__init__()
        self.model = model = Owlv2ForObjectDetection(config)
        vision = config.vision_config
        self.blocks = map_blocks(vision.num_hidden_layers)
        self.channels = (vision.hidden_size,) * len(self.blocks)
        self.strides = (vision.patch_size,) * len(self.blocks)
        self.embed_dim = config.projection_dim
        self.image_size = vision.image_size
        self.max_text_length = config.text_config.max_position_embeddings
        # Both projections are kept, since the initialisation of transformers needs them; they are small.
        if part == "text":
            model.owlv2.vision_model = None
            model.class_head = model.box_head = model.objectness_head = model.layer_norm = None
        elif part == "vision":
            model.owlv2.text_model = None

    @property
    def logit_scale(self) -> torch.Tensor:
        """Scale of an average location, for pooled regions; in `concepts` each location has its own."""
        return F.elu(self.model.class_head.logit_scale(self.model.layer_norm.bias)).float().squeeze() + 1

    @property
    def logit_shift(self) -> torch.Tensor:
        """Shift of an average location, as for `logit_scale`."""
        return self.model.class_head.logit_shift(self.model.layer_norm.bias).float().squeeze()

    def encode_image(self, pixel_values: torch.Tensor) -> ClipFeatures:
        """[B, 3, H, W], padded to a square -> four maps [B, C, h, w] and the heads' input [B, C, h, w].

        Raises:
            InputError: a side of the input is not a whole number of patches.
        """
        height, width = pixel_values.shape[-2:]
        patch = self.strides[0]
        if height % patch or width % patch:
            raise InputError(
                f"This OWLv2 takes images whose sides are multiples of {patch} pixels, not {height} x {width}."
            )
        vision = self.model.owlv2.vision_model
        output = vision(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        # The hidden states are the input of the first block, then the output of each.
        maps = tuple(self._grid(output.hidden_states[block + 1][:, 1:], pixel_values) for block in self.blocks)
        tokens = vision.post_layernorm(output.last_hidden_state)  # [B, 1 + h*w, C], the class token first
        tokens = self.model.layer_norm(tokens[:, 1:] * tokens[:, :1])
        return ClipFeatures(maps=maps, pool_map=self._grid(tokens, pixel_values))

    def _grid(self, tokens: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, h*w, C] -> [B, C, h, w]"""
        return tokens.mT.unflatten(2, [side // self.strides[0] for side in pixel_values.shape[-2:]])

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[K, T] -> [K, D], L2-normalised. The tower is causal and does not read the padding after a phrase.

        Raises:
            InputError: T is over `max_text_length` (16 in released checkpoints).
        """
        if input_ids.shape[1] > self.max_text_length:
            raise InputError(
                f"This OWLv2 takes phrases of at most {self.max_text_length} tokens, not {input_ids.shape[1]}; shorten "
                "the longest one."
            )
        return _normalise(F.normalize(self.model.owlv2.get_text_features(input_ids).pooler_output, dim=-1))

    def concepts(self, features: ClipFeatures) -> ConceptOutput:
        """Return the h*w patches as locations, row by row; boxes [B, L, 4] xyxy in pixels of the padded square. There
        is no mask head, and no duplicates are removed."""
        h, w = features.pool_map.shape[-2:]
        tokens = features.pool_map.flatten(2).mT  # [B, C, h, w] -> [B, h*w, C]
        # Boxes stay in float32: the precision of bfloat16 is 2 px in a square of 960 px.
        bias = self.model.compute_box_bias(h, w).to(tokens.device)
        boxes = (self.model.box_head(tokens).float() + bias).sigmoid()  # centre and size, in fractions of the input
        sides = torch.tensor([w, h, w, h], device=tokens.device) * self.strides[0]
        head = self.model.class_head
        return ConceptOutput(
            objectness=self.model.objectness_predictor(tokens),
            boxes=center_to_corners_format(boxes) * sides,
            embeds=_normalise(head.dense0(tokens)),
            logit_scale=F.elu(head.logit_scale(tokens).float()) + 1,
            logit_shift=head.logit_shift(tokens).float(),
        )

    def pool(
        self, features: ClipFeatures, masks: torch.Tensor | None = None, boxes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the patches' class embeddings under masks [B, P, Hm, Wm] or in boxes [B, P, 4] of the padded square
        -> [B, P, D], L2-normalised."""
        # The projection is affine, so it may follow the mean.
        return _normalise(self.model.class_head.dense0(region_pool(features.pool_map, self.strides[0], masks, boxes)))

    def dense(self, features: ClipFeatures) -> torch.Tensor:
        """Class embeddings of the patches, as in `concepts`, as a map [B, D, h, w]."""
        return _normalise(self.model.class_head.dense0(features.pool_map.movedim(1, -1))).movedim(-1, 1)


def _normalise(embeds: torch.Tensor) -> torch.Tensor:
    """L2-normalise as in OWLv2's class head, with the same epsilon."""
    return embeds / (embeds.norm(dim=-1, keepdim=True) + 1e-6)
