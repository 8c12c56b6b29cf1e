"""Thresholds for mean costs, solved on calibration images: by geometric exit shares, and by a search.

Wang, Huang, Song, Huang, Huang, "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient
Image Recognition", NeurIPS 2021, arXiv 2105.15075, section 3.3 (budgeted batch classification).

n images, E exits, T operating points. `NEVER` is the threshold of an exit that no image takes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.exits import Predictions, leaves
from utils import SHARE, InputError

NEVER = 1e8  # the value in published checkpoints


def threshold_level(text: str) -> float:
    """Read a threshold, a number from 0 to 1 or "never", as a type of argparse."""
    return NEVER if text == "never" else SHARE(text)


def threshold_text(levels: list[float], form: str = ".4g") -> str:
    """Return thresholds as text, one number where all are the same."""
    levels = levels[:1] if len(set(levels)) == 1 else levels
    return " ".join("never" if level >= NEVER else format(level, form) for level in levels) or "none"


def geometric_shares(exits: int, points: int = 59) -> Tensor:
    """Return the share of images for each exit, [T,E] float32: q^k over its sum, q = 0.05, 0.10, ..."""
    q = torch.arange(1, points + 1) / 20
    share = (torch.arange(1, exits + 1) * q.log()[:, None]).exp()
    return share / share.sum(dim=-1, keepdim=True)


def thresholds_for_shares(confidence: Tensor, shares: Tensor) -> Tensor:
    """Return the thresholds that let these shares of the images leave at each exit.

    Where confidences are equal, more leave. Where fewer images are left than should leave, or none should,
    the threshold is NEVER.

    Args:
        confidence: [n,E].
        shares: [T,E] float32.

    Returns:
        [T,E-1].
    """
    counts = (len(confidence) * shares).floor().long()  # in float32, as in the published code
    gone = torch.zeros(len(shares), len(confidence), dtype=torch.bool)  # [T,n]
    thresholds = []
    for k in range(confidence.shape[1] - 1):
        order = confidence[:, k].argsort(descending=True, stable=True)
        rank = (~gone[:, order]).cumsum(dim=1)  # [T,n]
        reached = rank == counts[:, k, None]
        threshold = confidence[order, k][reached.byte().argmax(dim=1)]  # at the first image of that rank
        threshold = threshold.where(reached.any(dim=1) & (counts[:, k] > 0), NEVER)
        gone |= leaves(confidence[:, k], threshold[:, None])
        thresholds.append(threshold)
    return torch.stack(thresholds, dim=1)


def best_thresholds(
    predictions: Predictions, gflops: list[float], budgets: Tensor, start: Tensor, candidates: int = 256
) -> Tensor:
    """Return the thresholds of the highest accuracy within mean-GFLOPs budgets.

    A single early exit is searched over all values. Of two, the second is searched over all values for each
    candidate of the first: quantiles of its confidence and the values in `start`. So no row is worse than
    its `start` where that one keeps the budget.

    Args:
        predictions: on the calibration split; 2 or 3 exits.
        gflops: cumulative, one per exit.
        budgets: [T] mean GFLOPs per image.
        start: [T,E-1] thresholds to be at least as good as.
        candidates: how many quantiles are tried.

    Returns:
        [T,E-1].

    Raises:
        InputError: the model has one exit, or more than three; a budget is below the cost of the first exit.
    """
    n, exits = predictions.confidence.shape
    if exits not in (2, 3):
        raise InputError(f"the search takes models with 2 or 3 exits, this one has {exits}")
    if budgets.min() < gflops[0]:
        raise InputError(
            f"a budget of {budgets.min():.3f} GFLOPs is below the cost of the first exit, {gflops[0]:.3f}"
        )
    firsts = torch.tensor([NEVER])
    if exits == 3:
        steps = torch.linspace(0, 1, candidates, dtype=torch.float64)
        quantiles = predictions.confidence[:, 0].double().quantile(steps, interpolation="nearest").float()
        firsts = torch.cat([firsts, start[:, 0], quantiles]).unique()
    most = torch.full((len(budgets),), -1.0, dtype=torch.float64)  # images classified correctly so far
    best = torch.full((len(budgets), exits - 1), NEVER)
    for first in firsts:
        gone = torch.zeros(n, dtype=torch.bool)
        if exits == 3:
            gone = leaves(predictions.confidence[:, 0], first)
        correct, threshold = best_last_threshold(predictions, gflops, budgets, gone)
        row = threshold[:, None]
        if exits == 3:
            row = torch.cat([first.expand(len(budgets), 1), row], dim=1)
        better = correct > most
        most, best = most.where(~better, correct), best.where(~better[:, None], row)
    return best


def best_last_threshold(
    predictions: Predictions, gflops: list[float], budgets: Tensor, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """Search the threshold of the last early exit over all values.

    Args:
        predictions, gflops, budgets: see `best_thresholds`.
        gone: [n] bool, images that leave at the first exit, before the one that is searched.

    Returns:
        Images classified correctly, [T] float64 and -1 where no threshold keeps the budget, and thresholds
        [T].
    """
    n, exits = predictions.confidence.shape
    at = exits - 2
    confidence, correct = predictions.confidence[:, at], predictions.correct.double()
    cost = torch.tensor(gflops, dtype=torch.float64)
    order = confidence.argsort(descending=True, stable=True)
    level = confidence[order]
    # Thresholds by how many of the most confident images reach them, [n+1]. Images of equal confidence leave
    # together: a threshold is possible only where the next image's confidence is lower, or there is none.
    thresholds = torch.cat([torch.tensor([NEVER]), level])
    possible = torch.cat([torch.tensor([True]), level[1:] < level[:-1], torch.tensor([True])])
    # Correct images and mean cost of each.
    stays = (~gone)[order].double()
    gain = correct[order, at] - correct[order, -1]
    base = correct[gone, 0].sum() + correct[~gone, -1].sum()
    right = (base + F.pad((stays * gain).cumsum(0), (1, 0))).where(possible, -1.0)
    left = F.pad(stays.cumsum(0), (1, 0))
    mean = (gone.sum() * cost[0] + stays.sum() * cost[-1] - (cost[-1] - cost[at]) * left) / n
    # The cost falls along the positions: those within a budget are a tail, whose best is a running maximum.
    highest, where = right.flip(0).cummax(0)
    tail = torch.searchsorted(mean.flip(0).contiguous(), budgets.double() * (1 + 1e-9), right=True) - 1
    fits, tail = tail >= 0, tail.clamp(min=0)
    return highest[tail].where(fits, -1.0), thresholds[n - where[tail]]
