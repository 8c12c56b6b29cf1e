"""Time loading, the model and both together, to tell which of the two is the slower."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
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
from benchmarks.table import ModelSpec
from benchmarks.timing import rates_in_turn
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


class LoaderVariant(NamedTuple):
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


LOADER_VARIANTS = (
    LoaderVariant("training", True),
    LoaderVariant("training, normalised on the device", True, True),
    LoaderVariant("training, normalised on the device, fast decoding", True, True, True),
    LoaderVariant("evaluation", False),
    LoaderVariant("evaluation, normalised on the device", False, True),
)


class Options(NamedTuple):
    """How rows are measured: processes that load, samples of each part, and the least seconds of a sample."""

    num_workers: int
    repeats: int = 5
    seconds: float = 0.5


def write_random_jpegs(folder: Path, count: int = 200, seed: int = 0) -> None:
    """Write JPEGs of 500 x 375 pixels, ImageNet's usual size, with detail of all sizes as in photographs."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = np.zeros((375, 500, 3), np.float32)
        for side in (4, 16, 64, 256):
            noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), np.float32) / 4
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)


def batches_of(
    variant: LoaderVariant,
    data: datasets.Files,
    img_size: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[list[Tensor]]:
    """Return batches on the device without end; images are drawn at random.

    Args:
        variant: how they are loaded.
        data: the images; its transform is set.
        img_size: side of the model input in pixels.
        batch_size: images per batch.
        num_workers: processes that load.
        device: where they go.
    """
    config, ending = datasets.DATA_CONFIG, AS_BYTES if variant.on_device else {}
    if variant.training:
        data.transform = datasets.train_transform(img_size, config, **AUGMENTATION, **ending)
    else:
        data.transform = datasets.eval_transform(img_size, config | ending)
    data.side = 2 * img_size if variant.fast else 0
    sampler = RandomSampler(data, replacement=True, num_samples=2**40)
    loader = DataLoader(
        data, batch_size, sampler=sampler, num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    if variant.on_device:
        erasing = {name: AUGMENTATION[name] for name in ERASING if variant.training}
        return iter(DeviceLoader(loader, device, config, **erasing))
    return (loaders.to_device(batch, device) for batch in loader)


def rates(
    batches: Iterator[list[Tensor]],
    run: Callable[[Tensor], Any],
    device: torch.device,
    options: Options,
    warmup: int,
) -> list[float]:
    """Return images per second of taking batches and running them, one number per sample.

    Args:
        batches: without end.
        run: called with the images of a batch.
        device: that the work runs on.
        options: number and least length of samples.
        warmup: untimed batches, such as those that were loaded ahead.
    """
    for images, *_ in islice(batches, warmup):
        run(images)

    def sample() -> int:
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < options.seconds:
            images, *_ = next(batches)
            run(images)
            count += len(images)
        return count

    return rates_in_turn([sample], device, options.repeats)[0]


def compare(
    load: Callable[[], Iterator[list[Tensor]]],
    run: Callable[[Tensor], Any],
    batch: Tensor,
    device: torch.device,
    options: Options,
) -> Row:
    """Return the cells of a row: rates of the loader, the model and both, and which part is the slower.

    Args:
        load: starts a loader of endless batches on the device.
        run: the model, on images.
        batch: images for the model alone.
        device: that the model runs on.
        options: number and least length of samples.
    """
    ahead = 2 * options.num_workers + 1  # batches that wait in the loader
    parts = {
        "loader": rates(load(), lambda images: None, device, options, ahead),
        "model": rates(repeat([batch]), run, device, options, 3),
        "both": rates(load(), run, device, options, ahead),
    }
    row = Row()
    for part, values in parts.items():
        row[f"{part}_images_per_second"] = statistics.median(values)
        row[f"{part}_spread"] = f"{min(values):.4g}-{max(values):.4g}"
    loader, model = (row[f"{part}_images_per_second"] for part in ("loader", "model"))
    row["limited_by"] = "loader" if loader < model else "model"
    row["workers_needed"] = math.ceil(max(options.num_workers, 1) * model / loader)
    return row


@torch.inference_mode()
def measure(
    spec: ModelSpec,
    img_size: int | None,
    path: str | Path | None,
    batch_sizes: list[int],
    precision: Precision,
    options: Options,
) -> list[Row]:
    """Measure a row per batch size and variant of loading.

    Args:
        spec: the model, which runs all its stages forward.
        img_size: side of its input in pixels; None for its own.
        path: a folder with images at any depth; None for random JPEGs, which are removed again.
        batch_sizes: images per batch.
        precision: device and autocast type.
        options: processes, number and least length of samples.

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
            write_random_jpegs(Path(folder))
        data = datasets.Files(path or folder)
        for batch_size in batch_sizes:
            batch = torch.rand(batch_size, 3, side, side, device=device)
            for variant in LOADER_VARIANTS:
                load = partial(batches_of, variant, data, side, batch_size, options.num_workers, device)
                known = dict(transform=variant.name, model=spec.text, batch_size=batch_size, img_size=side)
                row = known | {"workers": options.num_workers} | compare(load, run, batch, device, options)
                log.info("%s", verdict(row))
                rows.append(row)
    return rows


def verdict(row: Row) -> str:
    """Return a sentence that tells which part limits."""
    loader, model, both = (row[f"{part}_images_per_second"] for part in ("loader", "model", "both"))
    told = f"{row['transform']}, batch {row['batch_size']}: the {row['limited_by']} limits: loading gives"
    told += f" {loader:.4g} images/s with {row['workers']} processes, the model {model:.4g}, both {both:.4g}"
    if row["limited_by"] == "model":
        return told
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{told}; about {row['workers_needed']} processes would keep up, on as many cores (here {cores})"


def as_markdown(rows: list[Row], header: str) -> str:
    """Return the header line, the table, and sentences that tell which part limits."""
    formats = [".1f" if name.endswith("second") else "" for name in COLUMNS]
    table = tabulate([[row[name] for name in COLUMNS] for row in rows], COLUMNS, "github", formats)
    return f"{header}\n\n{table}\n\n" + "".join(f"- {verdict(row)}\n" for row in rows)
