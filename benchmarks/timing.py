"""Time models: work sampled in turn, early exit at forced shares of the images, the largest batch that fits.

Images are random, and the weights may be: what a network costs does not depend on them, except for the exit
that an image takes. So thresholds follow from the confidences on these very images.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from engine import Precision, cascade
from inference.streaming import ExitStream
from loading.loaders import to_device
from models import Adaptive
from models.cost import exit_gflops
from models.exits import confidence, force_exits
from utils import device_name, log

POOL = 50  # images over which a share of exits is counted: one batch of one image has no share
MOST = 10  # batches of a pass, where the pool does not take more
Result = TypeVar("Result")


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result of a call and its seconds, by events on CUDA; the device is idle at both ends."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        return result, max(time.perf_counter() - start, 1e-9)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    result = run()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return result, max(start.elapsed_time(end) / 1000, 1e-9)


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


class Timing(NamedTuple):
    """One pass over a loader.

    Attributes:
        images: how many were seen.
        model: seconds inside the model.
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
    """Time `run(batches of images)` over a data set.

    Args:
        run: the work, on batches that are on the device.
        loader: of images and labels.
        device: that the work runs on.
        warmup: untimed runs on the first batch.
    """
    loading, targets = 0.0, []

    def feed() -> Iterator[Tensor]:
        nonlocal loading
        batches = (to_device(batch, device) for batch in loader)
        while True:
            batch, seconds = timed(lambda: next(batches, None), device)
            if batch is None:
                return
            loading += seconds
            targets.append(batch[1])
            yield batch[0]

    for batch in islice(loader, 1):
        images, _ = to_device(batch, device)
        list(run([images] * warmup))
    outputs, total = timed(lambda: list(run(feed())), device)
    return Timing(sum(map(len, targets)), total - loading, total, outputs, targets)


class Workload(NamedTuple):
    """What is timed.

    Attributes:
        run: called with batches; one call is one pass.
        batches: of images [B,3,S,S]; all of them are one pass, the least that is timed.
    """

    run: Callable[[Iterable[Tensor]], Any]
    batches: list[Tensor]

    def images(self) -> int:
        """Return the number of images of one pass."""
        return sum(map(len, self.batches))

    def sample(self, passes: int = 1) -> int:
        """Run so many passes; return their number of images."""
        for _ in range(passes):
            self.run(self.batches)
        return passes * self.images()


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
        workload.run(islice(cycle(workload.batches), warmup))
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


def exit_workload(
    model: Adaptive,
    precision: Precision,
    batch_size: int,
    shares: list[float],
    seed: int = 0,
    pad: bool = False,
) -> Workload:
    """Return early exit on random images of which these shares leave at each exit.

    Args:
        model: in evaluation mode, on the device of `precision`.
        precision: device and autocast type.
        batch_size: images per batch.
        shares: one per exit, of sum 1; rounded to whole images of a pass.
        seed: of the images.
        pad: see `streaming.ExitStream`.

    Returns:
        Its `run` gives logits [b,K] and the exits taken [b] of each batch.

    Raises:
        ValueError: the confidences are too close, see `force_exits`.
    """
    early = any(shares[:-1])
    number = batch_size * batches_of_pass(batch_size, shares) if early else batch_size
    edges = [round(number * sum(shares[: k + 1])) for k in range(len(shares))]
    counts = [high - low for low, high in zip([0, *edges], edges, strict=False)]
    # Twice as many images as are timed, so that those nearest to a threshold can be left out.
    device, side = precision.device, model.img_size
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.rand(2 * number if early else number, 3, side, side, device=device, generator=generator)
    sure = torch.zeros(len(images), len(shares) - 1)
    if early:
        for part, cells in zip(images.split(batch_size), sure.split(batch_size), strict=True):
            with precision.autocast():
                steps = cascade(model, part, [math.inf] * (len(shares) - 1))
                for k, step in enumerate(islice(steps, len(shares) - 1)):  # the last stage is not needed
                    cells[:, k] = confidence(step.output.logits)
    rows, thresholds = force_exits(sure, counts)
    # Images of all exits are mixed, as in a data set.
    mixed = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    (images,) = precision.place([images[rows[mixed].to(device)]])
    stream = ExitStream(model, precision, thresholds, batch_size, pad)
    return Workload(lambda batches: list(stream(batches)), list(images.split(batch_size)))


def training_workload(model: Adaptive, precision: Precision, batch_size: int, seed: int = 0) -> Workload:
    """Return training steps with AdamW on random images and labels, the model's schedules at their end."""
    device, side = precision.device, model.img_size
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.rand(batch_size, 3, side, side, device=device, generator=generator)
    target = torch.randint(model.num_classes, (batch_size,), device=device, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)  # next to no change: the next row's model
    scaler = precision.scaler()
    model.train().set_epoch(math.inf)

    def run(batches: Iterable[Tensor]) -> None:
        for batch in batches:
            with precision.autocast():
                terms = model.loss(model(batch), target, F.cross_entropy)
            scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return Workload(run, precision.place([images]))


def largest_batch(run: Callable[[int], object], cap: int, first: int = 64) -> int:
    """Return the largest batch size that runs, by doubling from `first` or, where that fails, by halving.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """

    def fits(batch_size: int) -> bool:
        try:
            run(batch_size)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
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
