"""Sam2ClipVitAdapter: the SAM2CLIP adapter of the Open-Vocabulary SAM release (Yuan et al. 2024, §3.2): vision
transformer blocks of SAM on top of CLIP's maps, close to SAM ViT-H, from which it is distilled."""

import torch
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer, SamVisionNeck

from ovsam.errors import InputError
from ovsam.modeling.adapters.common import AdapterModel
from ovsam.modeling.outputs import SamFeatures
from ovsam.modeling.remote_code import RemoteCodeConfig


class Sam2ClipVitConfig(RemoteCodeConfig):
    """`in_channels` are the channels of CLIP's maps at strides 4, 8, 16, 32; `grid` is the side of the stride-16 map
    and of the position embedding; `width` is the mask decoder's C. Blocks attend within windows of `window_size` cells,
    `global_blocks` to all cells. The defaults are the released sizes."""

    model_type = "ovsam_sam2clip_vit"
    auto_classes = {"AutoModel": "Sam2ClipVitAdapter"}

    in_channels: list | tuple = (384, 768, 1536, 3072)
    hidden_size: int = 1280
    num_layers: int = 5
    num_heads: int = 16
    window_size: int = 14
    global_blocks: list | tuple = (4,)
    grid: int = 64
    width: int = 256


class Sam2ClipVitAdapter(AdapterModel):
    """CLIP maps at strides 4, 8, 16, 32 -> SamFeatures at stride 16, for a SAM 1 mask decoder (no `high_res`)."""

    config: Sam2ClipVitConfig
    base_model_prefix = "sam2clip"
    finer_maps = 0  # number of maps in `SamFeatures.high_res`
    _supports_sdpa = True

    def __init__(self, config: Sam2ClipVitConfig):
        super().__init__(config)
        size = config.hidden_size
        stride4, stride8, stride16, stride32 = config.in_channels
        self.to_stride16 = nn.ModuleList(
            [
                nn.Conv2d(stride4, size, 4, stride=4),
                nn.Conv2d(stride8, size, 2, stride=2),
                nn.Conv2d(stride16, size, 1),
                nn.ConvTranspose2d(stride32, size, 2, stride=2),
            ]
        )
        self.level_embed = nn.Parameter(torch.zeros(4, size))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, size))
        vision = SamVisionConfig(
            hidden_size=size,
            num_attention_heads=config.num_heads,
            image_size=config.grid,  # in cells: the input has been divided into them already
            patch_size=1,
            output_channels=config.width,
        )
        vision._attn_implementation = config._attn_implementation
        windows = [0 if i in config.global_blocks else config.window_size for i in range(config.num_layers)]
        self.blocks = nn.ModuleList([SamVisionLayer(vision, window) for window in windows])
        self.neck = SamVisionNeck(vision)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SamVisionAttention):
            init.normal_(module.rel_pos_h, std=0.02)
            init.normal_(module.rel_pos_w, std=0.02)
        elif module is self:
            init.normal_(self.level_embed, std=0.02)
            init.normal_(self.pos_embed, std=0.02)

    def forward(self, maps: tuple[Tensor, ...]) -> SamFeatures:
        """maps: CLIP's maps at strides 4, 8, 16, 32, each [B, Ci, hi, wi].

        Raises:
            InputError: the stride-16 map and the position embedding differ in size.
        """
        grid = self.config.grid
        if tuple(maps[2].shape[-2:]) != (grid, grid):
            height, width = (16 * side for side in maps[2].shape[-2:])
            raise InputError(
                f"This model takes square images of {16 * grid} x {16 * grid} pixels; got {height} x {width}: resize "
                "and pad them first, as the processor does."
            )
        levels = zip(maps, self.to_stride16, self.level_embed, strict=True)
        hidden = sum(project(feature) + level[:, None, None] for feature, project, level in levels)
        hidden = hidden.permute(0, 2, 3, 1) + self.pos_embed  # [B, C', h, w] -> [B, h, w, C']
        for block in self.blocks:
            hidden = block(hidden)
        return SamFeatures(embedding=self.neck(hidden), high_res=(), pyramid=())
