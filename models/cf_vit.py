"""CF-ViT: a coarse stage answers easy images at half resolution, a fine stage splits the informative patches
in four.

Chen, Lin, Zhang et al., "CF-ViT: A General Coarse-to-Fine Method for Vision Transformer", AAAI 2023, arXiv
2203.03821.
"""

import math

from torch import Tensor

from models.registry import register
from models.selection import top_patches
from models.two_stage import TwoStageViT
from models.vit import NANO, Flag


class CFViT(TwoStageViT):
    """Two-stage ViT that refines the ceil(alpha * g * g) patches with the highest class attention (section
    3.3).

    Args:
        coarse_stage_size: side g of the coarse grid.
        alpha: share of the coarse patches that are refined, in (0, 1].

    Raises:
        InputError: alpha is out of range.
    """

    stage_names = ("coarse", "fine")
    recipe = {"select_from": 201 / 300}
    flags = (
        Flag("--coarse-stage-size", "CF-ViT: side of the coarse grid in patches (7 or 9)", int),
        *TwoStageViT.flags,
    )

    def __init__(self, coarse_stage_size: int = 7, alpha: float = 0.5, **two_stage):
        super().__init__(stage_size=coarse_stage_size, alpha=alpha, **two_stage)
        self.refined = math.ceil(alpha * coarse_stage_size**2)

    def select(self, cls_attn: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        refined, rest = top_patches(cls_attn, self.stage_size**2).tensor_split([self.refined], dim=-1)
        return refined, rest, {}


text = "CF-ViT on DeiT-S: 7x7 or 9x9 coarse grid, 224 or 288 pixels."
register("cf_deit_small", CFViT, text, select_from_epoch=201)
register("cf_deit_nano", CFViT, "CF-ViT at the size of the embedded data set: 7x7 grid, 56 pixels.", **NANO)
