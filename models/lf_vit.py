"""LF-ViT: a location stage answers easy images at half resolution, a focus stage looks at the region that
matters.

Hu, Cheng, Lu and Liu, "LF-ViT: Reducing Spatial Redundancy in Vision Transformer for Efficient Image
Recognition", AAAI 2024, arXiv 2402.00033.
"""

import math

import torch
from torch import Tensor

from models.registry import register
from models.selection import best_region, region_table, top_patches
from models.two_stage import TwoStageViT
from models.vit import NANO, Flag, Picture


class LFViT(TwoStageViT):
    """Two-stage ViT that refines inside one square region:

    - the region is the m x m square with the highest sum of class attention (section 3.3);
    - in it, the ceil(alpha * m * m) patches with the highest attention are refined.

    Args:
        location_stage_size: side g of the location grid.
        region_size: side m of the region in location patches, at most g; 5 up to g = 7, else 8, as published.
        alpha: share of the region's patches that are refined, in (0, 1].

    Raises:
        InputError: region_size or alpha is out of range.
    """

    stage_names = ("location", "focus")
    recipe = {"select_from": 231 / 300}
    flags = (
        Flag("--location-stage-size", "LF-ViT: side of the location grid in patches (7 or 9)", int),
        Flag("--region-size", "LF-ViT: side of the region in location patches", int),
        *TwoStageViT.flags,
    )

    def __init__(
        self, location_stage_size: int = 7, region_size: int | None = None, alpha: float = 0.88, **two_stage
    ):
        super().__init__(stage_size=location_stage_size, alpha=alpha, **two_stage)
        if region_size is None:
            region_size = min(5, location_stage_size) if location_stage_size <= 7 else 8
        self.region_size = region_size
        self.refined = math.ceil(alpha * region_size**2)
        self.register_buffer("regions", region_table(location_stage_size, region_size), persistent=False)

    def select(self, cls_attn: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Add `region` [B,4]: left, top, right, bottom on the 2g x 2g grid, right and bottom exclusive."""
        winner = best_region(cls_attn, self.stage_size, self.region_size)  # [B]
        inside, outside = self.regions[winner].tensor_split([self.region_size**2], dim=-1)
        order = top_patches(cls_attn.gather(1, inside), self.region_size**2)
        refined, rejected = inside.gather(1, order).tensor_split([self.refined], dim=-1)
        corners = self.stage_size - self.region_size + 1
        corner = torch.stack([winner % corners, winner // corners], dim=-1)  # [B,2] column, row
        box = 2 * torch.cat([corner, corner + self.region_size], dim=-1)
        return refined, torch.cat([outside, rejected], dim=-1), {"region": box}

    def picture(self, info: dict[str, Tensor]) -> Picture:
        region = self.patch_size * info["region"] if "region" in info else None
        return super().picture(info)._replace(region=region)


text = "LF-ViT on DeiT-S: 7x7 or 9x9 location grid, 224 or 288 pixels."
register("lf_deit_small", LFViT, text, select_from_epoch=231)
register("lf_deit_nano", LFViT, "LF-ViT at the size of the embedded data set: 7x7 grid, 56 pixels.", **NANO)
