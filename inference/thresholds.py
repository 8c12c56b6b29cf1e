"""Thresholds for a budget, learned on a calibration split: DVT's geometric exit shares, and a search for the
best.

n images, E exits, T operating points. `NEVER` is the threshold of an exit that no image takes.

Wang, Huang, Song, Huang, Huang, "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient
Image Recognition", NeurIPS 2021, arXiv 2105.15075, section 3.3 (budgeted batch classification).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.exits import Predictions

NEVER = 1e8  # the value in published checkpoints


def geometric_shares(exits: int, points: int = 59) -> Tensor:
    """Share of the images that each exit should take, [T,E] float32: q^k over its sum, q = 0.05, 0.10, ..."""
    q = torch.arange(1, points + 1) / 20
    share = (torch.arange(1, exits + 1) * q.log()[:, None]).exp()
    return share / share.sum(dim=-1, keepdim=True)


def thresholds_for_shares(confidence: Tensor, shares: Tensor) -> Tensor:
    """Thresholds that let these shares of all calibration images leave at each exit.

    Where confidences are equal, more leave; where fewer images are left than should leave, or none should,
    the threshold is NEVER.

    Args:
        confidence: [n,E].
        shares: [T,E] float32.

    Returns:
        [T,E-1].
    """
    counts = (len(confidence) * shares).floor().long()  # in float32, as in the published code
    gone, found = torch.zeros(len(shares), len(confidence), dtype=torch.bool), []
    for k in range(confidence.shape[1] - 1):
        order = confidence[:, k].argsort(descending=True, stable=True)
        rank = (~gone[:, order]).cumsum(dim=1)  # [T,n]
        reached = rank == counts[:, k, None]
        threshold = confidence[order, k][reached.byte().argmax(dim=1)]  # at the first image of that rank
        threshold = threshold.where(reached.any(dim=1) & (counts[:, k] > 0), NEVER)
        gone |= confidence[:, k] >= threshold[:, None]
        found.append(threshold)
    return torch.stack(found, dim=1)


def best_thresholds(
    predictions: Predictions, gflops: list[float], budgets: Tensor, start: Tensor, candidates: int = 256
) -> Tensor:
    """Thresholds of the highest calibration accuracy within mean-GFLOPs budgets.

    Of two early exits, the second's threshold is searched over all values, the first's over quantiles and
    those of `start`; so no row is worse than its `start` where that one keeps the budget. One early exit is
    searched over all values.

    Args:
        predictions: on the calibration split; 2 or 3 exits.
        gflops: cumulative, one per exit.
        budgets: [T] mean GFLOPs per image.
        start: [T,E-1] thresholds to be at least as good as.
        candidates: how many thresholds of a first of two early exits are tried.

    Returns:
        [T,E-1].

    Raises:
        ValueError: the model has one exit, or more than three; a budget is below the cost of the first exit.
    """
    confidence, correct = predictions.confidence, predictions.correct.double()
    n, exits = confidence.shape
    if exits not in (2, 3):
        raise ValueError(f"the search takes models with 2 or 3 exits, this one has {exits}")
    if budgets.min() < gflops[0]:
        raise ValueError(
            f"a budget of {budgets.min():.3f} GFLOPs is below the cost of the first exit, {gflops[0]:.3f}"
        )
    cost = torch.tensor(gflops, dtype=torch.float64)
    at = exits - 2  # the exit that is searched over all values
    firsts = torch.tensor([NEVER])
    if exits == 3:
        steps = torch.linspace(0, 1, candidates, dtype=torch.float64)
        quantiles = confidence[:, 0].double().quantile(steps, interpolation="nearest").float()
        firsts = torch.cat([firsts, start[:, 0], quantiles]).unique()
    order = confidence[:, at].argsort(descending=True, stable=True)
    level = confidence[order, at]
    # A threshold takes all images of equal confidence: after position p it must be lower, or there must be no
    # image.
    ends = torch.cat([torch.tensor([True]), level[1:] < level[:-1], torch.tensor([True])])  # [n+1]
    values = torch.cat([torch.tensor([NEVER]), level])  # threshold that lets the first p images leave
    gain = correct[order, at] - correct[order, -1]
    saved = cost[-1] - cost[at]
    best = torch.full((len(budgets),), -1.0, dtype=torch.float64)
    chosen = torch.full((len(budgets), exits - 1), NEVER)
    for first in firsts:
        leaves = confidence[:, 0] >= first if exits == 3 else torch.zeros(n, dtype=torch.bool)
        stays = (~leaves)[order].double()
        base = correct[leaves, 0].sum() + correct[~leaves, -1].sum()
        right = base + F.pad((stays * gain).cumsum(0), (1, 0))  # [n+1], by how many leave at `at`
        left = F.pad(stays.cumsum(0), (1, 0))
        mean = (leaves.sum() * cost[0] + stays.sum() * cost[-1] - saved * left) / n
        right = right.where(ends, -1.0)
        # The cost falls along the positions: those within a budget are a tail, whose best is a running
        # maximum.
        highest, where = right.flip(0).cummax(0)
        tail = torch.searchsorted(mean.flip(0).contiguous(), budgets.double() * (1 + 1e-9), right=True) - 1
        fits = tail >= 0
        tail = tail.clamp(min=0)
        better = fits & (highest[tail] > best)
        best = best.where(~better, highest[tail])
        position = n - where[tail]
        row = values[position][:, None]
        if exits == 3:
            row = torch.cat([first.expand(len(budgets), 1), row], dim=1)
        chosen = chosen.where(~better[:, None], row)
    return chosen
