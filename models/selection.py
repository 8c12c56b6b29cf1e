"""Which tokens survive: pure functions from scores to indices, no state, no Python loop over images.

Grids are square and row-major: patch `t` of a grid of side `g` sits at row `t // g`, column `t % g`. Indices
never count the class token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import InputError


def top_patches(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest scores, best first; of equal scores the lower index comes first.

    Args:
        scores: [B,P].
        k: how many to keep, 0 <= k <= P.

    Returns:
        [B,k] int64.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]


def best_region(scores: Tensor, grid_size: int, region_size: int) -> Tensor:
    """Top-left corner, numbered row-major over all corners, of the square with the highest sum of scores.

    Of equal sums the first in raster order wins (LF-ViT, section 3.3, neighborhood global class attention).

    Args:
        scores: [B,g*g].
        grid_size: side g of the grid.
        region_size: side m of the square in patches, 1 <= m <= g.

    Returns:
        [B] int64 in 0 .. (g-m+1)**2 - 1.
    """
    grid = scores.unflatten(-1, (1, grid_size, grid_size))
    sums = F.avg_pool2d(grid, region_size, stride=1)  # [B,1,g-m+1,g-m+1]
    return sums.flatten(1).argmax(dim=-1)


def region_table(grid_size: int, region_size: int) -> Tensor:
    """For every region of `best_region`: first its own patches, then all the others, both in raster order.

    Returns:
        [(g-m+1)**2, g*g] int64; every row is a permutation of the grid's patches.

    Raises:
        InputError: the region is empty or does not fit into the grid.
    """
    if not 1 <= region_size <= grid_size:
        raise InputError(
            f"region_size is {region_size}: take 1 to {grid_size}, the side of the location grid"
        )
    corners = grid_size - region_size + 1
    first = torch.arange(corners)
    axis = torch.arange(grid_size)
    within = (axis >= first[:, None]) & (
        axis < first[:, None] + region_size
    )  # [corner,g], the same for both axes
    inside = within[:, None, :, None] & within[None, :, None, :]  # [corner row, corner column, row, column]
    # False sorts before True and the sort is stable, so each half stays in raster order.
    return (~inside).reshape(corners**2, grid_size**2).byte().argsort(dim=-1, stable=True)


def refine(coarse: Tensor, grid_size: int) -> Tensor:
    """The four children of coarse patches on the grid of twice the side.

    Args:
        coarse: [B,k] patches of the grid of side `grid_size`.
        grid_size: side g of the coarse grid.

    Returns:
        [B,4k] patches of the grid of side 2g: all top-left children in the order of `coarse`, then all
        top-right, bottom-left and bottom-right ones.
    """
    top_left = 4 * coarse - 2 * (coarse % grid_size)  # 2r * 2g + 2c
    below = 2 * grid_size
    return torch.cat([top_left, top_left + 1, top_left + below, top_left + below + 1], dim=-1)


def original_patches(kept: list[Tensor], fused: bool) -> list[Tensor]:
    """Turns kept slots of successive drops into patches of the image.

    Args:
        kept: [B,n] per drop: which of the slots that entered it stay.
        fused: whether each drop appends one slot that is no patch, for the next drop to keep or not.

    Returns:
        [B,n] per drop: patches of the image, -1 for a slot that is none.
    """
    found: list[Tensor] = []
    for index in kept:
        if found:
            slots = F.pad(found[-1], (0, int(fused)), value=-1)  # the fused slot is the last
            index = slots.gather(1, index)
        found.append(index)
    return found


def bounding_box(index: Tensor, side: int) -> Tensor:
    """Smallest box around patches [B,n] of a grid of this side: [B,4] left, top, right, bottom, exclusive."""
    row, column = index // side, index % side
    low, high = torch.stack([column, row]).aminmax(dim=-1)  # each [2,B]
    return torch.cat([low, high + 1]).T


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B,n] of `x` [B,N,C] (or [1,N,C], shared by all images), as [B,n,C]."""
    return x.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
