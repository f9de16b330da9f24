"""Sam2ClipAdapter: SAM features from CLIP's maps, so that one backbone serves both sides (Open-Vocabulary SAM, §3.2).

It is distilled from a SAM vision encoder: the loss is the per-pixel error of the embedding.
"""

from torch import Tensor, nn

from ovsam.modeling.adapters.common import AdapterModel, TopDown, upsample
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.remote_code import RemoteCodeConfig


class Sam2ClipConfig(RemoteCodeConfig):
    """`in_channels` are the channels of CLIP's maps at strides 4, 8, 16, 32; `width` is the mask decoder's C."""

    model_type = "ovsam_sam2clip"
    auto_classes = {"AutoModel": "Sam2ClipAdapter"}

    in_channels: list | tuple = (32, 64, 96, 960)
    width: int = 256
    num_layers: int = 3
    num_heads: int = 8


class Sam2ClipAdapter(AdapterModel):
    """CLIP maps at strides 4, 8, 16, 32 -> SamFeatures: transformer layers at stride 16, convolutions above it."""

    config: Sam2ClipConfig
    base_model_prefix = "sam2clip"
    finer_maps = 2  # number of maps in `SamFeatures.high_res`

    def __init__(self, config: Sam2ClipConfig):
        super().__init__(config)
        width = config.width
        self.pyramid = TopDown(tuple(config.in_channels[1:]), width)
        self.local = nn.Conv2d(width, width, 3, padding=1)  # also encodes positions for the layers
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.out = nn.Conv2d(width, width, 1)
        self.stride4 = nn.Conv2d(config.in_channels[0], width, 1)
        self.high_res = nn.ModuleList([nn.Conv2d(width, width // 8, 1), nn.Conv2d(width, width // 4, 1)])
        self.post_init()

    def forward(self, maps: tuple[Tensor, ...]) -> SamFeatures:
        stride8, stride16, _ = self.pyramid(maps[1:])
        b, c, h, w = stride16.shape
        rows = (stride16 + self.local(stride16)).flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, h*w, C]
        embedding = self.out(self.layers(rows).transpose(1, 2).view(b, c, h, w))
        stride4 = upsample(stride8) + self.stride4(maps[0])
        high_res = (self.high_res[0](stride4), self.high_res[1](stride8))
        return SamFeatures(embedding=embedding, high_res=high_res, pyramid=(stride4, stride8, embedding))
