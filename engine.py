"""Training, evaluation and early exit for every model that follows the protocol of models.vit.Adaptive.

Nothing here knows a method: a model is a chain of stages with one output per exit.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loading.loaders import Shard, to_device
from loading.sampler import names_of_batch
from models import Adaptive, StageOutput
from models.cost import stage_gflops
from models.exits import Predictions, choose_exits, confidence, uniform_thresholds
from utils import InputError, MainError, gather, log, sum_over_ranks, widest_float


class Precision(NamedTuple):
    """Autocast type and the gradient scaler that fp16 needs; both off in plain float32.

    Attributes:
        device: where the model runs.
        dtype: bfloat16, float16 or None.
        memory_format: of the images.
        weights: what inference casts weights to, once, see `models.weights.cast_weights`; or None.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    weights: torch.dtype | None = None

    @classmethod
    def of(cls, device: torch.device, name: str, channels_last: bool = False) -> "Precision":
        """Make it from the --amp flag; auto is fp16 on CUDA, as DeiT trains, and float32 elsewhere."""
        if name == "auto":
            name = "fp16" if device.type == "cuda" else "none"
        dtype = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
        return cls(device, dtype, torch.channels_last if channels_last else torch.contiguous_format)

    @classmethod
    def inference(cls, device: torch.device, amp: str | None, weights: str) -> "Precision":
        """Make it from --amp, None for what --weights needs, and --weights.

        Raises:
            InputError: autocast computes in another type than that of the weights.
        """
        if weights != "fp32" and amp not in (None, weights):
            raise InputError(f"--weights {weights} computes in {weights}: not with --amp {amp}")
        precision = cls.of(device, amp or {"fp32": "none"}.get(weights, weights))
        return precision._replace(weights=None if weights == "fp32" else precision.dtype)

    def place(self, batch: list[Tensor]) -> list[Tensor]:
        """Return a batch on the device, its images in the memory format."""
        images, *rest = to_device(batch, self.device)
        return [images.contiguous(memory_format=self.memory_format), *rest]

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


def padded_size(n: int, limit: int, device: torch.device) -> int:
    """Return to how many images a stage's `n` are padded: on CUDA one of eight sizes up to `limit`, else n.

    Libraries keep a plan for every shape that they meet there, and to make one takes longer than the stage.
    """
    step = math.ceil(limit / 8) if device.type == "cuda" else 1
    return min(step * math.ceil(n / step), limit) if n else 0


@torch.inference_mode()
def cascade(model: Adaptive, images: Tensor, thresholds: list[float]) -> Iterator[Step]:
    """Run the stages one by one, each only on the images that are still undecided.

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
    rows, info, batch = torch.arange(len(images), device=images.device), {}, len(images)
    for k in range(model.num_exits):
        output = model.stage(k, images, info)
        if len(rows) < len(images):  # the rest was padding
            info = {name: value[: len(rows)] for name, value in output.info.items()}
            output = StageOutput(output.logits[: len(rows)], info)
        if k == model.num_exits - 1:
            yield Step(k, rows, output, torch.ones_like(rows, dtype=torch.bool))
            return
        leaves = confidence(output.logits) >= thresholds[k]
        yield Step(k, rows, output, leaves)
        stay = (~leaves).nonzero()[:, 0]
        if len(stay) == 0:
            return
        rows = rows[stay]
        stay = F.pad(stay, (0, padded_size(len(stay), batch, images.device) - len(stay)))  # with image 0
        images = images[stay]
        info = {name: value[stay] for name, value in output.info.items()}


@torch.inference_mode()
def early_exit(model: Adaptive, images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Classify a batch, computing later stages only for images that need them.

    Returns:
        Logits [B,K] of the exit each image took, and that exit [B] int64. Both are the same whatever the rest
        of the batch is.
    """
    logits, exits = None, torch.zeros(len(images), dtype=torch.int64, device=images.device)  # [B,K], [B]
    for step in cascade(model, images, thresholds):
        if logits is None:
            logits = step.output.logits.clone()
        else:
            logits[step.rows] = step.output.logits
            exits[step.rows] = step.exit
    return logits, exits


class Objective(NamedTuple):
    """What training minimises.

    Attributes:
        criterion: from logits and target to a scalar.
        mixup: from a batch on the device to images and target; None where the batch is both.
    """

    criterion: Callable[[Tensor, Tensor], Tensor]
    mixup: Callable[..., tuple[Tensor, Tensor]] | None = None


class Update(NamedTuple):
    """How gradients become new weights.

    Attributes:
        optimizer: over the model's parameters.
        scheduler: of the learning rate, stepped per update or per epoch as it was built.
        scaler: gradient scaler, disabled unless training is in float16.
        ema: moving average of the weights, or None.
        accumulate: batches per update.
        clip_grad: largest gradient norm, or None or 0 for none.
        skip: updates per epoch that may be left out because a loss or a gradient is not finite.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    accumulate: int = 1
    clip_grad: float | None = None
    skip: int = 0

    def with_average(self, model: nn.Module) -> list[nn.Module]:
        """Return a model and, where there is one, its moving average."""
        return [model] if self.ema is None else [model, self.ema.module]

    def can_be_masked(self) -> bool:
        """Return whether a flag on the device can keep an update from weights and state.

        It can where the optimizer's own kernel looks at the flag `found_inf`, as GradScaler also asks.
        """
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def updates(self, batches: int) -> int:
        """Return how many updates so many batches of an epoch make."""
        return math.ceil(batches / self.accumulate)

    def group(self, step: int, batches: int) -> range:
        """Return the batches of the update that batch `step` belongs to; an epoch's last may have fewer."""
        first = step - step % self.accumulate
        return range(first, min(first + self.accumulate, batches))


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

    def add(self, values: dict[str, float]) -> None:
        """Add the values of one batch."""
        self.batches += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return the means over the batches."""
        return {name: total / self.batches for name, total in self.sums.items()}


class Observer:
    """What `train_one_epoch` reports to; this one only keeps the progress of the epoch.

    Attributes:
        progress: up to date when `on_update` is called; sums and `skipped` may else be a batch behind `step`.
    """

    def __init__(self) -> None:
        self.progress = Progress()

    def requests(self) -> list[float]:
        """Return numbers of this process, whose sums over all processes the other methods get."""
        return []

    def on_step(self, step: int, images: int, values: dict[str, float]) -> None:
        """Take note of a batch that has been read.

        Args:
            step: its number.
            images: in it, of this process.
            values: its losses, the learning rate and the model's knobs.
        """

    def is_due(self, requests: list[float]) -> bool:
        """Return whether `on_update` has something to do, the same in all processes."""
        return False

    def on_update(self, requests: list[float]) -> None:
        """Act between two updates, at the end of an epoch or where `is_due` says so, on the last requests."""


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    objective: Objective,
    update: Update,
    epoch: int,
    precision: Precision,
    run: Observer | None = None,
) -> dict[str, float]:
    """Train for one pass over the loader, or for what is left of one.

    Args:
        model: an Adaptive, or DistributedDataParallel around one.
        loader: full batches, from `run.progress.step` on.
        objective: what is minimised.
        update: optimizer and its companions.
        epoch: 0-based.
        precision: device and autocast type.
        run: is told of every batch; its progress may be that of an interrupted epoch.

    Returns:
        Means over the epoch and all processes: `lr`, `loss`, each of its terms and the model's statistics.

    Raises:
        MainError: the loss or, unless the scaler looks after it, the gradient norm is not finite, in all
            processes at once; the weights are those before the bad batch.
    """
    own: Adaptive = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    run = run or Observer()
    progress, updates = run.progress, update.updates(len(loader))
    model.train()
    update.scheduler.step(epoch)
    update.scheduler.step_update(epoch * updates + update.updates(progress.step))
    reports = Reports(update, run, loader, epoch, precision.device)
    for step, batch in enumerate(loader, progress.step):
        own.set_epoch(epoch + step / len(loader))
        group = update.group(step, len(loader))
        is_last = step == group[-1]
        # Forward and backward; processes average their gradients with the last batch of an update.
        with nullcontext() if is_last or model is own else model.no_sync():
            scalars = backward(model, precision, batch, objective, update.scaler, len(group))
        norm = gradient_norm(own, update) if is_last else torch.zeros_like(scalars["loss"])
        # What all processes have to say of the batch; where a flag can mask the update, of the one before.
        shown = {name: getattr(own, name) for name in own.knobs}
        reports.send(step, len(batch[0]), scalars, norm, shown)
        reports.read(but_last=1 if update.can_be_masked() else 0)
        # The update
        if is_last:
            step_optimizer(own, update, norm, reports.discard(group))
            update.scheduler.step_update(epoch * updates + step // update.accumulate + 1)
        progress.step = step + 1
        if is_last and (progress.step == len(loader) or run.is_due(reports.requests)):
            reports.read()
            run.on_update(reports.requests)
    return progress.means()


class Report(NamedTuple):
    """What all processes have to say of a batch, on its way to the host.

    Attributes:
        step: number of the batch.
        images: in it, of this process.
        shown: learning rate and knobs.
        scalars: of this process, on the device: `loss`, its terms and the model's statistics.
        norm: of the averaged gradients, on the device.
        sums: over the processes, of loss, norm, further scalars and requests; on the host once `copied`.
        copied: event of the copy to the host; None where nothing is copied.
    """

    step: int
    images: int
    shown: dict[str, float]
    scalars: dict[str, Tensor]
    norm: Tensor
    sums: Tensor
    copied: "torch.cuda.Event | None"


class Reports:
    """The reports of an epoch's batches, and what follows from losses or gradients that are not finite.

    Where a flag on the device masks the update, a report may be read after it: the host does not wait for the
    batch that it has just launched. Such a flag also leaves out all updates after the one that ends the run.

    Args:
        update: says how many updates may be left out.
        run: is told of every batch that is read.
        loader: names the files of a batch.
        epoch: 0-based.
        device: of the losses.

    Attributes:
        requests: sums over the processes of the requests that were sent with the batch read last.
    """

    def __init__(self, update: Update, run: Observer, loader: DataLoader, epoch: int, device: torch.device):
        self.update, self.run, self.loader, self.epoch = update, run, loader, epoch
        self.queue: deque[Report] = deque()
        self.requests: list[float] = []
        self.left_out: range | None = None  # batches of the update that was left out last
        # The same on the device: whether the present update is left out, and how many of the epoch were.
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.full((), run.progress.skipped, device=device)

    def send(
        self, step: int, images: int, scalars: dict[str, Tensor], norm: Tensor, shown: dict[str, float]
    ) -> None:
        """Start the way of a batch's values to the host; they travel in one tensor."""
        scalars = {name: value.detach() for name, value in scalars.items()}  # without the batch's graph
        loss, *further = scalars.values()
        further += [norm.new_full((), request) for request in self.run.requests()]
        sums = sum_over_ranks(torch.stack([value.float() for value in (loss, norm, *further)]))
        if self.update.can_be_masked():
            # The scaler looks after gradients that overflow itself.
            judged = sums[:1] if self.update.scaler.is_enabled() else sums[:2]
            self.bad = self.bad | ~judged.isfinite().all()
        copied = None
        if sums.is_cuda:
            sums, copied = sums.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        shown = shown | {"lr": self.update.optimizer.param_groups[0]["lr"]}
        self.queue.append(Report(step, images, shown, scalars, norm, sums, copied))

    def read(self, but_last: int = 0) -> None:
        """Take note of the batches sent, but for some; only here a step waits for the device.

        Raises:
            MainError: one is not finite and its update may not be left out; all processes raise it.
        """
        while len(self.queue) > but_last:
            report = self.queue.popleft()
            if report.copied is not None:
                report.copied.synchronize()
            loss, norm, *further = report.sums.tolist()
            size = dist.get_world_size() if dist.is_initialized() else 1
            losses = dict(zip(report.scalars, [value / size for value in (loss, *further)], strict=False))
            self.requests = further[len(report.scalars) - 1 :]
            if math.isfinite(loss) and (math.isfinite(norm) or self.update.scaler.is_enabled()):
                self.run.progress.add({"lr": report.shown["lr"], **losses})
            else:
                self.leave_out(report, losses["loss"])
            self.run.on_step(report.step, report.images, losses | report.shown)

    def leave_out(self, report: Report, loss: float) -> None:
        """Count an update that is left out because a batch is not finite; `loss` is that of all processes."""
        group = self.update.group(report.step, len(self.loader))
        so_far = range(group[0], report.step + 1)
        where = describe_nonfinite(loss, report, self.loader, so_far, self.epoch)
        progress = self.run.progress
        progress.skipped += self.left_out != group
        self.left_out = group
        if progress.skipped > self.update.skip:
            raise MainError(f"{where}; weights were not updated")
        log.warning("%s: this update is left out", where)

    def discard(self, group: range) -> Tensor | bool:
        """Return whether the update of these batches, all of them sent, is to be left out.

        Where a flag masks it this is the flag, a float [] on the device; else the batches have been read.
        """
        if not self.update.can_be_masked():
            return self.left_out == group
        bad, self.bad = self.bad, torch.zeros_like(self.bad)
        self.skipped = self.skipped + bad
        return (bad | (self.skipped > self.update.skip)).float()


def backward(
    model: nn.Module,
    precision: Precision,
    batch: list[Tensor],
    objective: Objective,
    scaler: torch.amp.GradScaler,
    accumulate: int,
) -> dict[str, Tensor]:
    """Add a batch's gradients, divided by `accumulate`, to those that are there.

    Returns:
        Scalars on the device: `loss`, each of its terms and the model's statistics.
    """
    own: Adaptive = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    images, *target = precision.place(batch)
    images, target = objective.mixup(images, *target) if objective.mixup else (images, *target)
    with precision.autocast():
        outputs = model(images)
        terms = own.loss(outputs, target, objective.criterion)
        loss = torch.stack(list(terms.values())).sum()
    scaler.scale(loss / accumulate).backward()
    return {"loss": loss, **terms, **own.statistics(outputs)}


def gradient_norm(model: nn.Module, update: Update) -> Tensor:
    """Return the norm of the averaged gradients, the same in all processes."""
    update.scaler.unscale_(update.optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def describe_nonfinite(loss: float, report: Report, loader: DataLoader, batches: range, epoch: int) -> str:
    """Return what is not finite, and the files that may be the reason; all processes have to call this.

    `loss` is the mean over the processes, of the last one of these batches, and `report` is of that batch.
    """
    if math.isfinite(loss):
        what = f"the gradient norm is {report.norm.item()}"
    else:
        what, batches = (
            f"the loss is {loss}",
            batches[:0] if report.scalars["loss"].isfinite() else batches[-1:],
        )
    names = sum(gather([name for batch in batches for name in names_of_batch(loader, batch)]), [])
    more = f" and {len(names) - 64} more" if len(names) > 64 else ""
    return f"{what} at epoch {epoch}, step {report.step} ({', '.join(names[:64])}{more})"


def step_optimizer(model: nn.Module, update: Update, norm: Tensor, discard: Tensor | bool) -> None:
    """Update the weights and their average with gradients of this norm, or throw the gradients away.

    `discard` says so, see `Reports.discard`; where it is a tensor nothing here waits for it.
    """
    if discard is not True:
        if update.clip_grad:
            nn.utils.clip_grads_with_norm_(model.parameters(), update.clip_grad, norm)
        with masked(update.optimizer, discard) if isinstance(discard, Tensor) else nullcontext():
            update.scaler.step(update.optimizer)
    update.scaler.update()
    update.optimizer.zero_grad()
    if update.ema is None or discard is True:
        return
    if isinstance(discard, Tensor):
        update_average(update.ema, model, discard)
    else:
        update.ema.update(model)


@contextmanager
def masked(optimizer: torch.optim.Optimizer, discard: Tensor) -> Iterator[None]:
    """Make the step in the body leave weights and state as they are where the flag is 1 and not 0."""

    def add_flag(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        overflow = getattr(optimizer, "found_inf", discard)  # where there is one it is the scaler's
        optimizer.found_inf = torch.maximum(overflow, discard)  # the kernel compares with 1

    hook = optimizer.register_step_pre_hook(add_flag)
    try:
        yield
    finally:
        hook.remove()
        vars(optimizer).pop("found_inf", None)


@torch.no_grad()
def update_average(ema: ModelEmaV3, model: nn.Module, discard: Tensor) -> None:
    """Do what `ema.update(model)` does, and nothing where the flag on the device is 1 and not 0."""
    averages, values = ema.module.state_dict(), model.state_dict()
    names = [name for name, _ in model.named_parameters()]  # these are finite
    parameters = [averages.pop(name) for name in names]
    steps = torch._foreach_sub([values[name] for name in names], parameters)
    torch._foreach_mul_(steps, (1 - ema.decay) * (1 - discard))
    torch._foreach_add_(parameters, steps)
    for name, average in averages.items():
        value = values[name]
        if average.is_floating_point():
            value = average.lerp(value, 1 - ema.decay)
        average.copy_(torch.where(discard > 0, average, value))


@torch.inference_mode()
def predict(
    model: Adaptive,
    loader: DataLoader,
    precision: Precision,
    on_batch: Callable[[Tensor, list[StageOutput]], None] = lambda images, outputs: None,
) -> Predictions:
    """Run all stages on a labelled data set, each image that can be read once over all processes.

    Args:
        model: not wrapped.
        loader: over a `loaders.Shard`.
        precision: device and autocast type.
        on_batch: called with this process's images and outputs.
    """
    model.eval()
    rows = []
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
        cost = torch.full_like(loss, math.nan)  # [B,E], of each stage where it depends on the image
        for k, out in enumerate(outputs):
            if (own := model.image_gflops(k, out.info)) is not None:
                cost[:, k] = own
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
    fixed = cost.isnan().any(dim=0)  # [E]
    if fixed.any() and not fixed.all():
        cost = cost.where(~fixed, torch.tensor(stage_gflops(model)))
    gflops = None if fixed.all() else cost.cumsum(dim=1)
    return Predictions(first, best.bool(), best5.bool(), loss, gflops)


def evaluate(
    model: Adaptive, loader: DataLoader, precision: Precision, prefix: str = "test_"
) -> dict[str, float]:
    """Evaluate a model, with its schedules at their end, as inference will run it.

    Returns:
        By name, after the prefix: accuracy in percent and loss of every exit, the model's statistics, mean
        GFLOPs where they depend on the image, and the share of images that leave early at three thresholds.
    """
    model.set_epoch(math.inf)
    sums: dict[str, Any] = {"images": 0.0}
    wide = widest_float(precision.device)

    def add_statistics(images: Tensor, outputs: list[StageOutput]) -> None:
        sums["images"] += len(images)
        for name, value in model.statistics(outputs).items():
            sums[name] = sums.get(name, 0.0) + len(images) * value.to(wide)  # read when all batches are done

    predictions = predict(model, loader, precision, add_statistics)
    entry = {prefix + name: value for name, value in predictions.summary().items()}
    # A process without images has no statistics.
    parts = gather({name: float(value) for name, value in sums.items()})
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
