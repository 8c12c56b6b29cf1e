"""Which exit an image takes and what that costs: pure functions from confidences to exits, accuracy and
thresholds.

n images, E exits, T operating points; an image leaves at the first exit whose confidence reaches its
threshold.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import InputError

DEFAULT_THRESHOLD = 0.7  # confidence that lets an image leave early, where nothing else is asked for


def confidence(logits: Tensor) -> Tensor:
    """Return the maximum softmax probability [B], in float32."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


class Predictions(NamedTuple):
    """What every exit says of every image of a data set, in the data set's order, on the CPU.

    Attributes:
        confidence: [n,E] maximum softmax probability.
        correct: [n,E] bool, whether the highest logit is the label's.
        correct5: [n,E] bool, whether the label is among the five highest logits.
        loss: [n,E] cross-entropy.
        gflops: [n,E] what each image cost up to each exit, where that depends on the image.
    """

    confidence: Tensor
    correct: Tensor
    correct5: Tensor
    loss: Tensor
    gflops: Tensor | None = None

    def summary(self) -> dict[str, float]:
        """Return percentages and mean loss of each exit: exit0_acc1, exit0_acc5, exit0_loss, exit1_acc1..."""
        summary = {}
        for k in range(self.confidence.shape[1]):
            summary[f"exit{k}_acc1"] = 100 * self.correct[:, k].double().mean().item()
            summary[f"exit{k}_acc5"] = 100 * self.correct5[:, k].double().mean().item()
            summary[f"exit{k}_loss"] = self.loss[:, k].double().mean().item()
        return summary


def leaves(confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """Return whether an image leaves at an exit, bool: where its confidence reaches the exit's threshold."""
    return confidence >= threshold


def choose_exits(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Return the first exit at which each image leaves.

    Args:
        confidence: [n,E].
        thresholds: [T,E-1], one row per operating point.

    Returns:
        [T,n] int64.
    """
    early = leaves(confidence[None, :, :-1], thresholds[:, None])  # [T,n,E-1]
    return F.pad(early.byte(), (0, 1), value=1).argmax(dim=-1)  # the first of equal values


class Curve(NamedTuple):
    """Operating points: mean GFLOPs [T], top-1 accuracy in percent [T] and share of images per exit [T,E]."""

    gflops: Tensor
    accuracy: Tensor
    shares: Tensor


def operating_points(predictions: Predictions, thresholds: Tensor, gflops: list[float]) -> Curve:
    """Return what early exit gives at each row of thresholds [T,E-1]; `gflops` are cumulative, one per exit.

    The predictions' own costs, if there are any, take the place of `gflops`.
    """
    exits = choose_exits(predictions.confidence, thresholds)
    correct = predictions.correct.T.gather(0, exits)  # [T,n]: row k of the transposed table is exit k
    shares = F.one_hot(exits, len(gflops)).double().mean(dim=1)
    cost = shares @ torch.tensor(gflops, dtype=torch.float64)
    if predictions.gflops is not None:
        cost = predictions.gflops.double().T.gather(0, exits).mean(dim=1)
    return Curve(cost, 100 * correct.double().mean(dim=1), shares)


def uniform_thresholds(count: int, exits: int) -> Tensor:
    """Return `count` operating points from 0 to 1, one threshold for all exits, [count, exits - 1]."""
    return (
        torch.linspace(0, 1, count, dtype=torch.float64)
        .round(decimals=6)[:, None]
        .expand(-1, exits - 1)
        .float()
    )


def budget_threshold(predictions: Predictions, gflops: list[float], budget: float) -> float:
    """Return the highest common threshold whose mean cost stays within a budget.

    Args:
        predictions: on a calibration split.
        gflops: cumulative GFLOPs of each exit.
        budget: mean GFLOPs per image.

    Raises:
        InputError: even leaving at the first exit costs more.
    """
    if budget < gflops[0]:
        raise InputError(f"a budget of {budget} GFLOPs is below the cost of the first exit, {gflops[0]:.3f}")
    # The cost changes only at the confidences that occur and never falls as the threshold rises, so bisect
    # over them.
    levels = torch.cat([predictions.confidence[:, :-1].flatten(), torch.tensor([0.0, 1.0])]).unique()
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high + 1) // 2
        row = levels[middle].expand(1, len(gflops) - 1)
        if operating_points(predictions, row, gflops).gflops.item() <= budget:
            low = middle
        else:
            high = middle - 1
    return levels[low].item()


def force_exits(confidence: Tensor, counts: list[int]) -> tuple[Tensor, list[float]]:
    """Chooses images and thresholds so that exactly counts[k] of the images leave at exit k.

    The images left out are those nearest to a threshold, so neither a tie nor rounding sends one elsewhere.

    Args:
        confidence: [n,E-1] of the early exits; the more n exceeds the sum of the counts, the wider the gaps.
        counts: one per exit.

    Returns:
        Rows of the chosen images [sum(counts)] and a threshold per exit but the last.

    Raises:
        ValueError: too many images have the same confidence.
    """
    left, chosen, thresholds = torch.arange(len(confidence)), [], []
    for k, count in enumerate(counts[:-1]):
        later = sum(counts[k + 1 :])
        order = left[confidence[left, k].argsort(descending=True)]
        spare = (len(order) - count - later) // (len(counts) - 1 - k)
        leave, left = order[:count], order[count + spare :]
        chosen.append(leave)
        if count == 0 or later == 0:
            thresholds.append(0.0 if count else math.inf)
            continue
        low, high = confidence[leave, k].min(), confidence[left, k].max()
        if not low > high:
            raise ValueError(
                f"exit {k} is equally sure of too many images ({low:.4g}): no share can be forced"
            )
        # The middle may round to the lower confidence, whose image has to stay.
        thresholds.append(torch.nextafter((low + high) / 2, low).item())
    return torch.cat([*chosen, left[: counts[-1]]]), thresholds
