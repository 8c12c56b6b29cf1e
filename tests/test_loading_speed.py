"""Loading speed: the same numbers whoever normalises, and which part limits, by scripted parts."""

import csv
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import ROOT, Command, HostWaits
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import loading
from benchmarks.loading import (
    COLUMNS,
    LOADER_VARIANTS,
    LoaderVariant,
    Options,
    batches_of,
    compare,
    rates,
    verdict,
    write_random_jpegs,
)
from datasets import DATA_CONFIG, Files, eval_transform, train_transform
from loading.images import load_image
from loading.loaders import AS_BYTES, DeviceLoader, EvalLoader, Shard, prefetched

sys.path.insert(0, str(ROOT / "scripts"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_random_jpegs(folder, 6)
    return folder


def test_pictures_are_of_imagenets_usual_size(pictures: Path) -> None:
    files = sorted(pictures.iterdir())
    assert len(files) == 6
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        assert 20_000 < file.stat().st_size < 250_000


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_normalised_on_the_device_is_the_same(workers: int, pictures: Path) -> None:
    plain, as_bytes = (Files(pictures, eval_transform(56, DATA_CONFIG | end)) for end in ({}, AS_BYTES))
    assert as_bytes[0][0].dtype == torch.uint8
    loader = DeviceLoader(EvalLoader(Shard(as_bytes), 4, num_workers=workers), CPU, DATA_CONFIG)
    assert (len(loader), loader.batch_size, loader.dataset.total) == (2, 4, 6)
    ordinary = EvalLoader(Shard(plain), 4, num_workers=workers)
    for (images, numbers), (expected, order) in zip(loader, ordinary, strict=True):
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
        assert torch.equal(numbers, order)


def test_training_normalised_on_the_device_is_the_same(pictures: Path) -> None:
    batches = []
    for ending in ({}, AS_BYTES):
        transform = train_transform(56, DATA_CONFIG, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0, **ending)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        loader = DataLoader(Files(pictures, transform), 6)
        batches.append(next(iter(DeviceLoader(loader, CPU, DATA_CONFIG) if ending else loader))[0])
    torch.testing.assert_close(*batches, atol=1e-6, rtol=0)


def test_erasing_on_the_device_comes_after_normalisation(pictures: Path) -> None:
    data = Files(pictures, eval_transform(56, DATA_CONFIG | AS_BYTES))
    whole = next(iter(DeviceLoader(DataLoader(data, 6), CPU, DATA_CONFIG)))[0]
    settings = dict(re_prob=0.7, re_mode="pixel", re_count=2)
    random.seed(1), torch.manual_seed(1)
    images = next(iter(DeviceLoader(DataLoader(data, 6), CPU, DATA_CONFIG, **settings)))[0]
    random.seed(1), torch.manual_seed(1)
    next(iter(DataLoader(data, 6)))  # a loader draws too
    expected = RandomErasing(0.7, mode="pixel", max_count=2, device="cpu")(whole.clone())
    assert torch.equal(images, expected)
    erased = (images != whole).flatten(1).any(dim=1)
    assert erased.any() and not erased.all()


def test_erasing_draws_nothing_for_the_next_batch() -> None:
    """As a resumed run needs it: the generators' states belong to the batch that was given last."""
    images = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    source = DataLoader(TensorDataset(images, torch.arange(12)), 4, generator=torch.Generator())
    batches = DeviceLoader(source, CPU, DATA_CONFIG, 0.7, "pixel")
    random.seed(2), torch.manual_seed(2)
    given, states = [], []
    for batch, _ in batches:
        given.append(batch)
        states.append((random.getstate(), torch.get_rng_state()))
    for step, (batch, _) in enumerate(batches):
        if step:
            assert torch.equal(batch, given[step])
        random.setstate(states[step][0]), torch.set_rng_state(states[step][1])


def test_three_tensors_of_a_batch_arrive() -> None:
    images, label, box = (
        torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8),
        torch.rand(5, 2, 1),
        torch.rand(5, 4),
    )
    batches = list(DeviceLoader(DataLoader(TensorDataset(images, label, box), 2), CPU, DATA_CONFIG))
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    mean, std = (torch.tensor(DATA_CONFIG[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(whole[0], (images / 255 - mean) / std, atol=1e-6, rtol=0)
    assert torch.equal(whole[1], label) and torch.equal(whole[2], box)


@pytest.mark.parametrize(
    ("side", "size"), [(0, (500, 375)), (188, (500, 375)), (187, (250, 188)), (90, (125, 94))]
)
def test_fast_decoding_keeps_at_least_the_side(side: int, size: tuple[int, int], pictures: Path) -> None:
    path = sorted(pictures.iterdir())[0]
    fast = load_image(path, side=side)
    assert fast.size == size and min(size) >= side
    resized = load_image(path).resize(size, Image.Resampling.BOX)
    assert (
        np.abs(np.asarray(fast, int) - np.asarray(resized, int)).mean() < 8
    )  # of noise; a resize gives others


def test_fast_decoding_is_of_jpegs_alone() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    assert load_image(file, side=8).size == (64, 64)


@pytest.mark.parametrize("variant", LOADER_VARIANTS, ids=[variant.name for variant in LOADER_VARIANTS])
def test_batches_do_not_end_and_are_model_input(variant: LoaderVariant, pictures: Path) -> None:
    data = Files(pictures)
    batches = batches_of(variant, data, 28, 4, 0, CPU)
    for _ in range(4):
        images, numbers = next(batches)
        assert images.shape == (4, 3, 28, 28) and images.dtype == torch.float32
        assert len(numbers) == 4 and images.min() < 0 < images.max()
    assert data.side == (56 if variant.fast else 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, in a list of one, that stand still unless a test moves them."""
    now = [0.0]
    monkeypatch.setattr(loading.time, "perf_counter", lambda: now[0])
    return now


def test_samples_are_whole_batches_of_at_least_the_seconds(clock: list[float]) -> None:
    taken = []

    def batches() -> Iterator[list[Tensor]]:
        while True:
            clock[0] += 0.25
            yield [torch.zeros(5, 1), torch.zeros(5)]

    def run(images: Tensor) -> None:
        taken.append(len(images))
        clock[0] += 0.25

    assert rates(batches(), run, CPU, Options(0, 3, 1.8), warmup=2) == [pytest.approx(10)] * 3
    assert len(taken) == 2 + 3 * 4
    assert len(rates(batches(), run, CPU, Options(0, 2, 0), warmup=0)) == 2 and len(taken) == 16


@pytest.mark.parametrize(("loading", "forward"), [(0.5, 0.125), (0.125, 0.5), (0.25, 0.25)])
def test_the_slower_part_limits(loading: float, forward: float, clock: list[float]) -> None:
    def load() -> Iterator[list[Tensor]]:
        while True:
            clock[0] += loading
            yield [torch.zeros(8, 1), torch.zeros(8)]

    def run(images: Tensor) -> None:
        clock[0] += forward * len(images) / 8

    row = compare(load, run, torch.zeros(8, 1), CPU, Options(3, 5, 2.0))
    assert row["loader_images_per_second"] == pytest.approx(8 / loading)
    assert row["model_images_per_second"] == pytest.approx(8 / forward)
    assert row["both_images_per_second"] == pytest.approx(8 / (loading + forward))
    assert row["limited_by"] == ("loader" if loading > forward else "model")
    assert row["workers_needed"] == {0.5: 12, 0.125: 1, 0.25: 3}[loading]
    row |= dict(transform="training", batch_size=8, workers=3)
    assert ("about 12 processes would keep up" in verdict(row)) == (loading > forward)


SMALL = "deit_nano:embed_dim=32,depth=2,num_heads=2"
QUICK = ["--loader", "--models", SMALL, "--device", "cpu", "--repeats", 2, "--seconds", 0, "--num_workers", 0]


@pytest.mark.slow
@pytest.mark.parametrize("made", [True, False])
def test_the_table_holds_all_variants(
    made: bool, command: Command, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "write_random_jpegs", lambda folder: write_random_jpegs(folder, 2))
    flags = [*QUICK, "--batch-size", 1, 2, "--csv", tmp_path / "a.csv", "--markdown", tmp_path / "a.md"]
    ended = command("benchmark", *flags, *([] if made else ["--data-path", pictures]))
    assert ended.code == 0, ended.err
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(row["batch_size"], row["transform"]) for row in rows] == [
        (size, variant.name) for size in "12" for variant in LOADER_VARIANTS
    ]
    for row in rows:
        loader, model = float(row["loader_images_per_second"]), float(row["model_images_per_second"])
        assert (row["limited_by"] == "loader") == (loader < model) and float(
            row["both_images_per_second"]
        ) > 0
        assert row["model"] == SMALL and row["img_size"] == "56"
    text = (tmp_path / "a.md").read_text()
    assert text == ended.out and "float32, eager" in text.splitlines()[0] and text.count("limits: ") == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "auto", "--max-batch", 4], "--batch-size as numbers"),
        (["--png", "speed.png"], "no --png"),
        (["--num_workers", -1], "'-1' is not a whole number from 0 up"),
        (["--data-path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(flags: list, message: str, command: Command) -> None:
    ended = command("benchmark", *QUICK, *flags)
    lines = [line for line in ended.err.splitlines() if "benchmark.py: error" in line]
    assert ended.code == 2 and ended.out == "" and len(lines) == 1 and message in lines[0]


@pytest.mark.slow
def test_predictions_do_not_depend_on_who_normalises(
    command: Command, sharp: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--checkpoint_path", sharp, "--device", "cpu", "--num_workers", 0]
    for mode in (["--images", folder / "val"], ["--data_url", folder, "--eval-mode", 0]):
        printed = []
        for extra in ([], ["--device-normalize"]):
            results = ["--results", tmp_path / "results.json"]
            printed.append(command("dynamic_inference", *flags, *mode, *results, *extra).out)
        assert printed[0] == printed[1] and printed[0].count("\n") > 3


@pytest.mark.parametrize("config", [None, DATA_CONFIG], ids=["floats", "bytes"])
def test_batches_are_moved_without_a_wait(config: dict | None) -> None:
    """Floats come out bit for bit, and a loader without batches has none."""
    images = torch.randint(0, 255, (5, 3, 8, 8), dtype=torch.uint8) if config else torch.randn(5, 3, 8, 8)
    batches = [(images[:3], torch.arange(3)), (images[3:], torch.arange(2))]
    with HostWaits() as waits:
        loader = DeviceLoader(batches, CPU, config)
        moved = list(loader)
    assert +waits.counts == {} and [target.tolist() for _, target in moved] == [[0, 1, 2], [0, 1]]
    expected = images
    if config:
        mean, std = (
            torch.tensor([255 * value for value in config[name]])[:, None, None] for name in ("mean", "std")
        )
        expected = (images - mean) / std
    assert torch.equal(torch.cat([batch for batch, _ in moved]), expected)
    assert list(DeviceLoader([], CPU, config)) == []
    assert prefetched(batches, CPU) is batches
    with FakeTensorMode():
        assert isinstance(prefetched(batches, torch.device("cuda")), DeviceLoader)
