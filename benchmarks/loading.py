"""Whether the loader keeps up: images per second of loading, of the model and of both together."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import datasets
from benchmarks.table import Spec
from benchmarks.timing import synchronize
from engine import Precision
from loading import loaders
from loading.loaders import AS_BYTES, DeviceLoader
from models.weights import baseline_model
from utils import log

COLUMNS = """
    transform model batch_size img_size workers loader_images_per_second loader_spread
    model_images_per_second model_spread both_images_per_second both_spread limited_by workers_needed
""".split()
Row = dict[str, Any]
# The training recipe of DeiT, which is this project's.
AUGMENTATION = dict(
    color_jitter=0.4,
    auto_augment="rand-m9-mstd0.5-inc1",
    interpolation="bicubic",
    re_prob=0.25,
    re_mode="pixel",
)
ERASING = ("re_prob", "re_mode")


class Way(NamedTuple):
    """How images are loaded: with the transform of training or of evaluation, and what makes it faster.

    Attributes:
        name: what the table calls it.
        training: which transform.
        on_device: images are moved as bytes and become model input on the device.
        fast: JPEGs may be decoded at a part of their size.
    """

    name: str
    training: bool
    on_device: bool = False
    fast: bool = False


WAYS = (
    Way("training", True),
    Way("training, normalised on the device", True, True),
    Way("training, normalised on the device, fast decoding", True, True, True),
    Way("evaluation", False),
    Way("evaluation, normalised on the device", False, True),
)


class Options(NamedTuple):
    """How rows are measured: processes that load, samples of each part, and the least seconds of a sample."""

    workers: int
    repeats: int = 5
    seconds: float = 0.5


def write_pictures(folder: Path, count: int = 200, seed: int = 0) -> None:
    """JPEGs of 500 x 375 pixels, ImageNet's usual size, with detail of all sizes, as photographs have it."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        picture = np.zeros((375, 500, 3), np.float32)
        for side in (4, 16, 64, 256):
            coarse = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
            picture += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32) / 4
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)


def batches_of(
    way: Way, data: datasets.Files, img_size: int, batch_size: int, workers: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """Batches on the device without end; images are drawn at random.

    Args:
        way: how they are loaded.
        data: the images; its transform is set.
        img_size: side of the model input in pixels.
        batch_size: images per batch.
        workers: processes that load.
        device: where they go.
    """
    config, ending = datasets.DATA_CONFIG, AS_BYTES if way.on_device else {}
    if way.training:
        data.transform = datasets.train_transform(img_size, config, **AUGMENTATION, **ending)
    else:
        data.transform = datasets.eval_transform(img_size, config | ending)
    data.side = 2 * img_size if way.fast else 0
    sampler = RandomSampler(data, replacement=True, num_samples=2**40)
    loader = DataLoader(
        data, batch_size, sampler=sampler, num_workers=workers, pin_memory=device.type == "cuda"
    )
    if way.on_device:
        erasing = {name: AUGMENTATION[name] for name in ERASING if way.training}
        return iter(DeviceLoader(loader, device, config, **erasing))
    return (loaders.to_device(batch, device) for batch in loader)


def rates(
    batches: Iterator[list[Tensor]],
    run: Callable[[Tensor], Any],
    device: torch.device,
    options: Options,
    warmup: int,
) -> list[float]:
    """Images per second of taking batches and running them, one number per sample.

    Args:
        batches: without end.
        run: called with the images of a batch.
        device: waited for before the clock is read.
        options: number and least length of samples.
        warmup: untimed batches, such as those that were loaded ahead.
    """
    for images, *_ in islice(batches, warmup):
        run(images)
    found = []
    for _ in range(options.repeats):
        synchronize(device)
        start, seen = time.perf_counter(), 0
        while seen == 0 or time.perf_counter() - start < options.seconds:
            images, *_ = next(batches)
            run(images)
            seen += len(images)
        synchronize(device)
        found.append(seen / max(time.perf_counter() - start, 1e-9))
    return found


def compare(
    load: Callable[[], Iterator[list[Tensor]]],
    run: Callable[[Tensor], Any],
    batch: Tensor,
    device: torch.device,
    options: Options,
) -> Row:
    """Rates of the loader, the model and both together, and which of the two is the slower.

    Args:
        load: starts a loader of endless batches on the device.
        run: the model, on images.
        batch: images for the model alone.
        device: waited for before the clock is read.
        options: see `rates`.
    """
    ahead = 2 * options.workers + 1  # batches that are loaded while nobody takes them
    found = {
        "loader": rates(load(), lambda images: None, device, options, ahead),
        "model": rates(repeat([batch]), run, device, options, 3),
        "both": rates(load(), run, device, options, ahead),
    }
    row = Row()
    for part, values in found.items():
        row[f"{part}_images_per_second"] = statistics.median(values)
        row[f"{part}_spread"] = f"{min(values):.4g}-{max(values):.4g}"
    loader, model = (row[f"{part}_images_per_second"] for part in ("loader", "model"))
    row["limited_by"] = "loader" if loader < model else "model"
    row["workers_needed"] = math.ceil(max(options.workers, 1) * model / loader)
    return row


@torch.inference_mode()
def measure(
    spec: Spec,
    img_size: int | None,
    path: str | Path | None,
    batch_sizes: list[int],
    precision: Precision,
    options: Options,
) -> list[Row]:
    """A row per batch size and way of loading.

    Args:
        spec: the model, which runs all its stages forward.
        img_size: side of its input in pixels; None for its own.
        path: a folder with images at any depth; None for pictures that are made and removed.
        batch_sizes: images per batch.
        precision: device and autocast type.
        options: see `rates`.

    Raises:
        FileNotFoundError: there is no image in the folder.
        BadImageError: an image cannot be read.
    """
    model = baseline_model(spec.name, img_size=img_size, **spec.kwargs).to(precision.device).eval()
    side, device, rows = model.img_size, precision.device, []

    def run(images: Tensor) -> None:
        with precision.autocast():
            model(images)

    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            write_pictures(Path(folder))
        data = datasets.Files(path or folder)
        for batch_size in batch_sizes:
            batch = torch.rand(batch_size, 3, side, side, device=device)
            for way in WAYS:

                def load(way: Way = way, batch_size: int = batch_size) -> Iterator[list[Tensor]]:
                    return batches_of(way, data, side, batch_size, options.workers, device)

                known = dict(transform=way.name, model=spec.text, batch_size=batch_size, img_size=side)
                row = known | {"workers": options.workers} | compare(load, run, batch, device, options)
                log.info("%s", verdict(row))
                rows.append(row)
    return rows


def verdict(row: Row) -> str:
    """Which part limits, in a sentence."""
    loader, model, both = (row[f"{part}_images_per_second"] for part in ("loader", "model", "both"))
    told = f"{row['transform']}, batch {row['batch_size']}: the {row['limited_by']} limits: loading gives"
    told += f" {loader:.4g} images/s with {row['workers']} processes, the model {model:.4g}, both {both:.4g}"
    if row["limited_by"] == "model":
        return told
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{told}; about {row['workers_needed']} processes would keep up, on as many cores (here {cores})"


def as_markdown(rows: list[Row], header: str) -> str:
    """The header line, the table, and which part limits."""
    formats = [".1f" if name.endswith("second") else "" for name in COLUMNS]
    table = tabulate([[row[name] for name in COLUMNS] for row in rows], COLUMNS, "github", formats)
    return f"{header}\n\n{table}\n\n" + "".join(f"- {verdict(row)}\n" for row in rows)
