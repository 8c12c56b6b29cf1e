"""Time models: work sampled in turn, early exit at forced shares of the images, the largest batch that fits.

Images are random, and the weights may be: what a network costs does not depend on them, except for the exit
that an image takes. So thresholds follow from the confidences on these very images.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader

from checkpointing.optimizer import make_optimizer
from engine import Objective, Precision, Update, cascade, train_one_epoch
from inference.streaming import ExitStream
from loading.loaders import to_device
from models import Adaptive
from models.cost import exit_gflops
from models.exits import confidence, force_exits
from utils import device_name, log

LAST_EPOCH = 10**6  # at which every schedule has ended
POOL = 50  # images over which a share of exits is counted: one batch of one image has no share
MOST = 10  # batches of a pass, where the pool does not take more
DIFFERENT = 512  # images in memory, where two batches do not take more; a larger pass repeats them
Result = TypeVar("Result")


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result of a call and its seconds, by events on CUDA; the device is idle at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = mark(device)
    result = run()
    end = mark(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, max(seconds_between(start, end), 1e-9)


def rates_in_turn(samples: list[Callable[[], int]], device: torch.device, repeats: int) -> list[list[float]]:
    """Return `repeats` rates of each piece of work in images per second; a drift affects all equally.

    Args:
        samples: take one sample each and return its number of images.
        device: that the work runs on.
        repeats: samples of each, taken in turn.
    """
    rates: list[list[float]] = [[] for _ in samples]
    for _ in range(repeats):
        for sample, measured in zip(samples, rates, strict=True):
            images, seconds = timed(sample, device)
            measured.append(images / seconds)
    return rates


def mark(device: torch.device) -> "float | torch.cuda.Event":
    """Return the present, in seconds or, on CUDA, as an event of the device's work; nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Return the seconds between two marks of a device that is idle now."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000


class Timing(NamedTuple):
    """One pass over a loader.

    Attributes:
        images: how many were seen.
        model: seconds inside the model; on CUDA without those in which the device waits for a batch.
        total: seconds in all, loading and transfer included.
        outputs: what the model's runs returned, batch by batch.
        targets: the labels, batch by batch.
    """

    images: int
    model: float
    total: float
    outputs: list[Any]
    targets: list[Tensor]

    def rates(self) -> tuple[float, float]:
        """Return images per second inside the model and in all; 0 for an empty pass."""
        return (self.images / self.model, self.images / self.total) if self.images else (0.0, 0.0)


def time_pass(
    run: Callable[[Iterable[Tensor]], Iterable[Any]], loader: DataLoader, device: torch.device, warmup: int
) -> Timing:
    """Time `run(batches of images)` over a data set; loading goes on while CUDA works, as without a clock.

    Args:
        run: the work, on batches that are on the device.
        loader: of images and labels.
        device: that the work runs on.
        warmup: untimed runs on the first batch.
    """
    marks, targets = [], []  # of when a batch is asked for, and of when it is there

    def feed() -> Iterator[Tensor]:
        batches = (to_device(batch, device) for batch in loader)
        while True:
            asked = mark(device)
            batch = next(batches, None)
            if batch is None:
                return
            marks.append((asked, mark(device)))
            targets.append(batch[1])
            yield batch[0]

    for batch in islice(loader, 1):
        images, _ = to_device(batch, device)
        list(run([images] * warmup))
    outputs, total = timed(lambda: list(run(feed())), device)
    loading = sum(seconds_between(asked, there) for asked, there in marks)
    return Timing(sum(map(len, targets)), max(total - loading, 1e-9), total, outputs, targets)


class Batches:
    """Batches of images [B,3,S,S] from a pool; every iteration puts them together anew.

    So work whose shapes follow from a batch's images does not meet the same ones again.

    Args:
        images: the pool [n,3,S,S], every image of which is in a pass equally often.
        batch_size: images per batch.
        number: of batches, a multiple of n images.
        precision: has the images' memory format.
        seed: of their order.
    """

    def __init__(self, images: Tensor, batch_size: int, number: int, precision: Precision, seed: int):
        self.images, self.batch_size, self.number, self.precision = images, batch_size, number, precision
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Tensor]:
        times = self.number * self.batch_size // len(self.images)
        # A batch of the whole pool is one image after the other: there is nothing to put together.
        if self.number == times == 1:
            yield self.precision.place([self.images])[0]
            return
        orders = [torch.randperm(len(self.images), generator=self.generator) for _ in range(times)]
        for rows in torch.cat(orders).to(self.images.device).split(self.batch_size):
            with torch.inference_mode(False):  # tensors of another kind would compile a stage again
                (batch,) = self.precision.place([self.images[rows]])
            yield batch


class Workload(NamedTuple):
    """What is timed.

    Attributes:
        run: called with batches.
        batches: of images [B,3,S,S]; all of them are one pass, the least that is timed.
    """

    run: Callable[[Iterable[Tensor]], Any]
    batches: Batches | list[Tensor]

    def first(self, number: int) -> Iterator[Tensor]:
        """Yield so many batches, pass after pass."""
        return islice(chain.from_iterable(repeat(self.batches)), number)

    def sample(self, passes: int = 1) -> int:
        """Run so many passes in one; return their number of images."""
        images = 0

        def counted() -> Iterator[Tensor]:
            nonlocal images
            for batch in self.first(passes * len(self.batches)):
                images += len(batch)
                yield batch

        self.run(counted())
        return images


def time_in_turn(
    workloads: list[Workload], device: torch.device, repeats: int, seconds: float, warmup: int
) -> list[list[float]]:
    """Return `repeats` rates of each workload in images per second, sampled in turn.

    Args:
        workloads: sampled in this order, `repeats` times over.
        device: that they run on.
        repeats: samples of each.
        seconds: least length of a sample, which is a whole number of passes.
        warmup: untimed batches of each.
    """
    samples = []
    for workload in workloads:
        workload.run(workload.first(warmup))
        _, once = timed(workload.sample, device)
        samples.append(partial(workload.sample, math.ceil(seconds / once) or 1))
    return rates_in_turn(samples, device, repeats)


def latencies(
    workload: Workload, device: torch.device, calls: int = 100, seconds: float = 5.0
) -> tuple[float, float]:
    """Return median and 99th percentile of single calls in milliseconds.

    Over whole passes, until there are so many calls or so many seconds have gone by.
    """
    times: list[float] = []
    while len(times) < calls and sum(times) < seconds:
        times += [timed(partial(workload.run, [batch]), device)[1] for batch in workload.batches]
    p50, p99 = np.percentile(times, [50, 99])
    return 1000 * float(p50), 1000 * float(p99)


def batches_of_pass(batch_size: int, shares: list[float]) -> int:
    """Return how many batches hold the pool and keep the batches of later stages as full as can be."""
    going = [1 - sum(shares[: k + 1]) for k in range(len(shares) - 1)]  # to the later stages

    def waste(number: int) -> float:
        runs = [number * share for share in going]
        return sum(math.ceil(count - 1e-6) - count for count in runs) / number

    least = math.ceil(POOL / batch_size)
    return min(range(least, max(least, MOST) + 1), key=lambda number: round(waste(number), 6))


def images_of_pool(batch_size: int, number: int) -> int:
    """Return how many different images a pass of so many batches is made of: all of them, or a divisor."""
    most = max(DIFFERENT // batch_size, 2)  # batches
    return batch_size * max(k for k in range(1, number + 1) if number % k == 0 and k <= most)


def draw_images(model: Adaptive, precision: Precision, batch_size: int, seed: int) -> Tensor:
    """Return a batch of random images [B,3,S,S] on the device."""
    device, side = precision.device, model.img_size
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(batch_size, 3, side, side, device=device, generator=generator)


def early_confidence(model: Adaptive, precision: Precision, images: Tensor) -> Tensor:
    """Return the confidence [B,E-1] of every exit but the last in images [B,3,S,S], on the CPU."""
    early = model.num_exits - 1
    with precision.autocast():
        steps = islice(cascade(model, images, [math.inf] * early), early)  # the last stage is not needed
        return torch.stack([confidence(step.output.logits).cpu() for step in steps], dim=1)


def exit_workload(
    model: Adaptive,
    precision: Precision,
    batch_size: int,
    shares: list[float],
    seed: int = 0,
    pad: bool = False,
    batches: int = 1,
) -> Workload:
    """Return early exit on random images of which these shares leave at each exit.

    Args:
        model: in evaluation mode, on the device of `precision`.
        precision: device and autocast type.
        batch_size: images per batch.
        shares: one per exit, of sum 1; rounded to whole images of a pass.
        seed: of the images.
        pad: see `streaming.ExitStream`.
        batches: of a pass where no image leaves early; of more than one, no two are the same.

    Returns:
        Its `run` gives logits [b,K] and the exits taken [b] of each batch.

    Raises:
        ValueError: the confidences are too close, see `force_exits`.
    """
    early = any(shares[:-1])
    number = batches_of_pass(batch_size, shares) if early else batches
    count = images_of_pool(batch_size, number)
    edges = [round(count * sum(shares[: k + 1])) for k in range(len(shares))]
    counts = [high - low for low, high in zip([0, *edges], edges, strict=False)]
    # Draw twice as many images as are timed, so that those nearest to a threshold can be left out. They are
    # drawn batch by batch, and once more when it is known which ones are wanted: few are in memory at once.
    parts = (2 if early else 1) * count // batch_size
    sure = torch.zeros(parts * batch_size, len(shares) - 1)
    draw = partial(draw_images, model, precision, batch_size)
    seeds = [seed + 65536 * k for k in range(parts)]  # apart from those of other runs; 32 bits are used
    if early:
        sure = torch.cat([early_confidence(model, precision, draw(number)) for number in seeds])
    rows, thresholds = force_exits(sure, counts)
    side, filled = model.img_size, 0
    images = torch.empty(count, 3, side, side, device=precision.device)
    for k in range(parts):
        own = rows[rows // batch_size == k] % batch_size
        images[filled : filled + len(own)] = draw(seeds[k])[own.to(images.device)]
        filled += len(own)
    stream = ExitStream(model, precision, thresholds, batch_size, pad)
    drawn = Batches(images, batch_size, number, precision, seed)
    return Workload(lambda batches: list(stream(batches)), drawn)


def training_workload(model: Adaptive, precision: Precision, batch_size: int, seed: int = 0) -> Workload:
    """Return steps of `train_one_epoch` on random images and labels, the model's schedules at their end.

    With AdamW, clipped gradients and a moving average of the weights; without augmentation and mixup.
    """
    generator = torch.Generator(precision.device).manual_seed(seed)
    images = draw_images(model, precision, batch_size, seed)
    target = torch.randint(model.num_classes, (batch_size,), device=precision.device, generator=generator)
    # Next to no change of the weights: the next row's model is the same.
    optimizer = make_optimizer(model, "adamw", lr=1e-6, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=1, min_lr=1e-6)
    objective = Objective(LabelSmoothingCrossEntropy(0.1))
    update = Update(optimizer, scheduler, precision.scaler(), ModelEmaV3(model, decay=0.99996), clip_grad=1.0)

    def run(batches: Iterable[Tensor]) -> None:
        steps = [[batch, target] for batch in batches]
        if steps:
            train_one_epoch(model, steps, objective, update, LAST_EPOCH, precision)

    return Workload(run, precision.place([images]))


# What libraries say where memory is short and PyTorch's own allocator did not notice.
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that memory is short, cuDNN's and cuBLAS's included."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def largest_batch(run: Callable[[int], object], cap: int, first: int = 64) -> int:
    """Return the largest batch size that runs, by doubling from `first` or, where that fails, by halving.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """

    def fits(batch_size: int) -> bool:
        try:
            run(batch_size)
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            if torch.cuda.is_available():
                gc.collect()  # what a failed run held lies in the cycles of its traceback
                torch.cuda.empty_cache()

    size = min(first, cap)
    while not fits(size):
        if size == 1:
            raise torch.OutOfMemoryError("not even one image fits")
        size //= 2
    while size < cap and fits(min(2 * size, cap)):
        size = min(2 * size, cap)
    return size


def count_gflops(model: Adaptive, name: str) -> list[float] | None:
    """Return cumulative GFLOPs of each exit; None, and a line in the log, where they cannot be counted."""
    try:
        return exit_gflops(model)
    except Exception as error:  # a counter that is not installed; tracing a foreign model raises anything
        log.info("%s: GFLOPs are not counted (%s)", name, one_line(error))
        return None


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def dtype_name(precision: Precision) -> str:
    return str(precision.dtype or torch.float32).removeprefix("torch.")


def measure_model(
    model: Adaptive, name: str, precision: Precision, batch_size: int, repeats: int = 5, seconds: float = 0.5
) -> dict[str, Any]:
    """Time all stages of a model on one batch of uniform random images; no data set is needed.

    Returns:
        The entries of a line of speed_macs.txt: `gflops` is the cost of the last exit, `exit_gflops` of all.
    """
    training = model.training
    model.to(precision.device, memory_format=precision.memory_format).eval()
    workload = exit_workload(model, precision, batch_size, [0.0] * (model.num_exits - 1) + [1.0])
    (rates,) = time_in_turn([workload], precision.device, repeats, seconds, warmup=3)
    gflops = count_gflops(model, name)
    model.train(training)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops": gflops and gflops[-1],
        "exit_gflops": gflops,
        "images_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "batch_size": batch_size,
        "img_size": model.img_size,
        "dtype": dtype_name(precision),
        "device": device_name(precision.device),
        "threads": torch.get_num_threads(),
    }


def report_speed(
    model: Adaptive, name: str, precision: Precision, batch_size: int, folder: Path | None
) -> None:
    """Log what `measure_model` returns, and append it to speed_macs.txt in a folder, as a line of JSON."""
    speed = measure_model(model, name, precision, batch_size)
    low, high = speed["spread"]
    cost = "" if speed["gflops"] is None else f", {speed['gflops']:.3f} GFLOPs"
    log.info(
        "%s: %d parameters%s, %.4g images/s (%.4g-%.4g), batch %d, %s, %s",
        *(name, speed["parameters"], cost, speed["images_per_second"], low, high, batch_size),
        *(speed["dtype"], speed["device"]),
    )
    if folder:
        with open(folder / "speed_macs.txt", "a") as file:
            file.write(json.dumps(speed) + "\n")
