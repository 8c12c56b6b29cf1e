"""Training, evaluation and early exit for every model that follows the protocol of models.vit.Adaptive.

Nothing here knows a method: a model is a chain of stages with one output per exit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

import utils
from loading.loaders import Shard, to_device
from loading.sampler import names_of_batch
from models import Adaptive, StageOutput
from models.exits import Predictions, choose_exits, confidence, uniform_thresholds
from utils import MainError, gather, log, sum_over_ranks


class Precision(NamedTuple):
    """Autocast type and the gradient scaler that fp16 needs; both off in plain float32.

    Attributes:
        device: where the model runs.
        dtype: bfloat16, float16 or None.
        memory_format: of the images.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def place(self, batch: list[Tensor]) -> list[Tensor]:
        """A batch on the device, its images in the memory format."""
        images, *rest = to_device(batch, self.device)
        return [images.contiguous(memory_format=self.memory_format), *rest]

    @classmethod
    def of(cls, device: torch.device, name: str) -> "Precision":
        """From the --amp flag; auto is fp16 on CUDA, as DeiT trains, and float32 elsewhere."""
        if name == "auto":
            name = "fp16" if device.type == "cuda" else "none"
        return cls(device, {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


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


def check_thresholds(model: Adaptive, thresholds: list[float]) -> None:
    if len(thresholds) != model.num_exits - 1:
        raise ValueError(
            f"{len(thresholds)} thresholds given, the model has {model.num_exits - 1} early exits"
        )


@torch.inference_mode()
def cascade(model: Adaptive, images: Tensor, thresholds: list[float]) -> Iterator[Step]:
    """Runs the stages one by one, each only on the images that are still undecided.

    Args:
        images: [B,3,S,S].
        thresholds: one per exit but the last; an image leaves at the first exit whose confidence reaches its
            own.

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
        Logits [B,K] of the exit each image took, and that exit [B] int64. Both are the same whatever the rest
        of the batch is.
    """
    logits, exits = None, torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for step in cascade(model, images, thresholds):
        if logits is None:
            logits = step.output.logits.clone()
        else:
            logits[step.rows] = step.output.logits
            exits[step.rows] = step.exit
    return logits, exits


class Update(NamedTuple):
    """How gradients become new weights.

    Attributes:
        optimizer: over the model's parameters.
        scheduler: of the learning rate, stepped per update or per epoch as it was built.
        scaler: gradient scaler, disabled unless training is in float16.
        ema: moving average of the weights, or None.
        accumulate: batches per update.
        clip_grad: largest gradient norm, or None.
        skip: updates per epoch that may be left out because a loss or a gradient is not finite.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    accumulate: int = 1
    clip_grad: float | None = None
    skip: int = 0


@dataclass
class Progress:
    """How far an epoch has come: what it needs to go on after an interruption.

    Attributes:
        step: batches done, those left out included.
        batches: batches that the sums are of.
        sums: of the learning rate, the losses and the statistics.
        skipped: updates left out.
    """

    step: int = 0
    batches: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    skipped: int = 0


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: Callable[[Tensor, Tensor], Tensor],
    update: Update,
    epoch: int,
    precision: Precision,
    mixup: Callable[..., tuple[Tensor, Tensor]] | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda step, images, losses: None,
    progress: Progress | None = None,
    wishes: Callable[[], list[float]] = list,
    on_update: Callable[[list[float]], None] = lambda wishes: None,
) -> dict[str, float]:
    """Trains for one pass over the loader, or for what is left of one.

    Args:
        model: an Adaptive, or DistributedDataParallel around one.
        loader: full batches of images and labels, or of what `mixup` takes, from `progress.step` on.
        criterion: from logits and target to a scalar.
        update: optimizer and its companions.
        epoch: 0-based.
        precision: device and autocast type.
        mixup: from a batch on the device to images and target; default: the batch is both.
        on_step: called with the step, the number of images, and the losses and schedules of every batch.
        progress: of an interrupted epoch; brought up to date before `on_update`.
        wishes: numbers of this process for `on_update`.
        on_update: called after every update with the sums of the wishes over all processes, which travel with
            the losses.

    Returns:
        Means over the epoch and all processes: `lr`, `loss`, each of its terms and the model's statistics.

    Raises:
        MainError: the loss or, unless the scaler looks after it, the gradient norm is not finite, in all
            processes at once; the weights are those before the bad batch.
    """
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    own: Adaptive = model.module if parallel else model
    progress = progress or Progress()
    model.train()
    updates = math.ceil(len(loader) / update.accumulate)
    update.scheduler.step(epoch)
    update.scheduler.step_update(epoch * updates + math.ceil(progress.step / update.accumulate))
    spoilt = False
    for step, batch in enumerate(loader, progress.step):
        own.set_epoch(epoch + step / len(loader))
        images, *target = precision.place(batch)
        images, target = mixup(images, *target) if mixup else (images, *target)
        first = step - step % update.accumulate
        group = min(
            update.accumulate, len(loader) - first
        )  # the last update of an epoch may have fewer batches
        last = step == first + group - 1
        with nullcontext() if last or not parallel else model.no_sync():
            with precision.autocast():
                outputs = model(images)
                terms = own.loss(outputs, target, criterion)
                loss = torch.stack(list(terms.values())).sum()
            update.scaler.scale(loss / group).backward()
        norm = gradient_norm(own, update) if last else torch.zeros_like(loss)
        # Read after the backward pass is under way, so that a GPU does not wait, and before the update.
        shown = {"loss": loss, **terms, **own.statistics(outputs)}
        asked = [loss.new_full((), wish) for wish in wishes()]
        values = torch.stack([value.detach().float() for value in (*shown.values(), norm, *asked)])
        values = sum_over_ranks(values).tolist()
        world = torch.distributed.get_world_size() if parallel else 1
        losses = {name: value / world for name, value in zip(shown, values, strict=False)}
        finite = math.isfinite(losses["loss"])
        # Gradients that overflow are the scaler's everyday business: it leaves the update out itself.
        if not finite or not (math.isfinite(values[len(shown)]) or update.scaler.is_enabled()):
            what = f"the loss is {losses['loss']}" if not finite else f"the gradient norm is {norm.item()}"
            mine = range(first, step + 1) if finite else [] if loss.isfinite() else [step]
            names = sum(gather([name for one in mine for name in names_of_batch(loader, one)]), [])
            more = f" and {len(names) - 64} more" if len(names) > 64 else ""
            where = f"{what} at epoch {epoch}, step {step} ({', '.join(names[:64])}{more})"
            if progress.skipped + (not spoilt) > update.skip:
                raise MainError(f"{where}; weights were not updated")
            log.warning("%s: this update is left out", where)
            progress.skipped, spoilt = progress.skipped + (not spoilt), True
        else:
            progress.batches += 1
            for name, value in {"lr": update.optimizer.param_groups[0]["lr"], **losses}.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
        if last:
            step_optimizer(own, update, None if spoilt else norm)
            update.scheduler.step_update(epoch * updates + step // update.accumulate + 1)
            spoilt = False
        progress.step = step + 1
        on_step(step, len(images), losses | {name: getattr(own, name) for name in own.knobs})
        if last:
            on_update(values[len(shown) + 1 :])
    return {name: total / progress.batches for name, total in progress.sums.items()}


def gradient_norm(model: nn.Module, update: Update) -> Tensor:
    """Norm of the averaged gradients, the same in all processes."""
    update.scaler.unscale_(update.optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def step_optimizer(model: nn.Module, update: Update, norm: Tensor | None) -> None:
    """Updates the weights and their average with gradients of this norm, None for those to throw away."""
    if norm is not None:
        if update.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), update.clip_grad, norm)
        update.scaler.step(update.optimizer)
    update.scaler.update()
    update.optimizer.zero_grad()
    if update.ema is not None and norm is not None:
        update.ema.update(model)


@torch.inference_mode()
def predict(
    model: Adaptive,
    loader: DataLoader,
    precision: Precision,
    on_batch: Callable[[Tensor, list[StageOutput]], None] = lambda images, outputs: None,
) -> Predictions:
    """Runs all stages on a labelled data set, each image that can be read once over all processes.

    Args:
        model: not wrapped.
        loader: over a `loaders.Shard`.
        precision: device and autocast type.
        on_batch: called with this process's images and outputs.
    """
    model.eval()
    rows, own_costs = [], False
    for batch in loader:
        images, target = precision.place(batch)
        with precision.autocast():
            outputs = model(images)
        on_batch(images, outputs)
        logits = torch.stack([out.logits for out in outputs], dim=1).float()  # [B,E,K]
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == target[:, None, None]
        loss = F.cross_entropy(
            logits.transpose(1, 2), target[:, None].expand(-1, len(outputs)), reduction="none"
        )
        cost = torch.zeros_like(loss)  # [B,E]
        for k, out in enumerate(outputs):
            if (own := model.image_gflops(k, out.info)) is not None:
                cost[:, k], own_costs = own, True
        columns = [confidence(logits), best[..., 0], best.any(dim=-1), loss, cost]
        rows.append(torch.stack(columns, dim=-1))  # [B,E,5]
    shard: Shard = loader.dataset
    table = torch.zeros(shard.total, model.num_exits, 5, device=precision.device)
    if rows:
        table[shard.read().to(table.device)] = torch.cat(rows)
    if shard.world_size > 1:
        table = sum_over_ranks(table)
    shard.bad.report(precision.device)
    table = table[shard.bad.read().to(table.device)]
    first, best, best5, loss, cost = table.cpu().unbind(-1)
    return Predictions(first, best.bool(), best5.bool(), loss, cost if own_costs else None)


def evaluate(model: nn.Module, loader, precision: Precision, prefix: str = "test_") -> dict[str, float]:
    """Accuracy and loss of every exit, and the share of images that three thresholds let go early."""
    model.set_epoch(math.inf)  # what is measured is what inference will do
    sums: dict[str, float] = {"images": 0.0}

    def add_statistics(images: torch.Tensor, outputs: list[StageOutput]) -> None:
        sums["images"] += len(images)
        for name, value in model.statistics(outputs).items():
            sums[name] = sums.get(name, 0.0) + len(images) * value.item()

    predictions = predict(model, loader, precision, add_statistics)
    entry = {prefix + name: value for name, value in predictions.summary().items()}
    parts = utils.gather(sums)
    images = sum(part["images"] for part in parts)
    for name in sorted(parts[0].keys() - {"images"}):
        entry[prefix + name] = sum(part.get(name, 0.0) for part in parts) / images
    if predictions.gflops is not None:
        entry[prefix + "gflops"] = predictions.gflops[:, -1].mean().item()
    thresholds = uniform_thresholds(11, model.num_exits)[[5, 7, 9]]  # 0.5, 0.7, 0.9
    for percent, exits in zip((50, 70, 90), choose_exits(predictions.confidence, thresholds), strict=True):
        for k in range(model.num_exits - 1):
            entry[f"{prefix}exit{k}_share_at_{percent}"] = (exits == k).double().mean().item()
    return entry
