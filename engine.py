"""Training, evaluation and early exit for every model that follows the protocol of models.vit.Adaptive.

Nothing here knows a method: a model is a chain of stages with one output per exit.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import Tensor, nn

from models import Adaptive, StageOutput

Autocast = Callable[[], torch.autocast]


class Step(NamedTuple):
    """One stage of an early-exit run.

    Attributes:
        exit: number of the stage.
        rows: [b] which images of the batch reached it.
        output: the stage's output for these images.
        leaves: [b] bool, which of them stop here.
    """

    exit: int
    rows: Tensor
    output: StageOutput
    leaves: Tensor


def confidence(logits: Tensor) -> Tensor:
    """Maximum softmax probability [B], in float32."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def check_thresholds(model: Adaptive, thresholds: list[float]) -> None:
    if len(thresholds) != model.num_exits - 1:
        raise ValueError(f"{len(thresholds)} thresholds given, the model has {model.num_exits - 1} early exits")


@torch.inference_mode()
def cascade(model: Adaptive, images: Tensor, thresholds: list[float]) -> Iterator[Step]:
    """Runs the stages one by one, each only on the images that are still undecided.

    Args:
        images: [B,3,S,S].
        thresholds: one per exit but the last; an image leaves at the first exit whose confidence reaches its own.

    Yields:
        One step per stage that has images left.

    Raises:
        ValueError: the number of thresholds does not fit the model.
    """
    check_thresholds(model, thresholds)
    rows, info = torch.arange(len(images), device=images.device), {}
    for k in range(model.num_exits):
        output = model.stage(k, images, info)
        if k == model.num_exits - 1:
            yield Step(k, rows, output, torch.ones_like(rows, dtype=torch.bool))
            return
        leaves = confidence(output.logits) >= thresholds[k]
        yield Step(k, rows, output, leaves)
        stay = (~leaves).nonzero()[:, 0]
        if len(stay) == 0:
            return
        rows, images = rows[stay], images[stay]
        info = {name: value[stay] for name, value in output.info.items()}


@torch.inference_mode()
def early_exit(model: Adaptive, images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Classifies a batch, computing later stages only for images that need them.

    Returns:
        Logits [B,K] of the exit each image took, and that exit [B] int64. Both are the same whatever the rest of the
        batch is.
    """
    logits, exits = None, torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for step in cascade(model, images, thresholds):
        if logits is None:
            logits = step.output.logits.clone()
        else:
            logits[step.rows] = step.output.logits
            exits[step.rows] = step.exit
    return logits, exits
