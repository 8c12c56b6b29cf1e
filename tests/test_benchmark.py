"""Speed tables: forced exits and sampling against scripted clocks and models, rows against one another."""

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from cases import ROOT, Command
from PIL import Image
from timm.models import register_model
from torch import Tensor

from benchmarks import timing
from benchmarks.table import COLUMNS, FITTED, Bench, ModelSpec, Options, Point, TimedModel, operating_points
from benchmarks.timing import (
    Workload,
    exit_workload,
    largest_batch,
    latencies,
    time_in_turn,
    time_pass,
    training_workload,
)
from engine import Precision
from models import AdaptiveViT, StageOutput
from models.cost import exit_gflops, token_gflops
from models.exits import choose_exits, force_exits
from utils import InputError

sys.path.insert(0, str(ROOT / "scripts"))
import benchmark

CPU = torch.device("cpu")
SMALL = "embed_dim=32,depth=2,num_heads=2"
PLAIN, TWO = f"deit_nano:{SMALL}", f"lf_deit_nano:{SMALL},location_stage_size=3,region_size=2"
QUICK = ["--baseline", PLAIN, "--device", "cpu", "--repeats", 2, "--seconds", 0, "--warmup", 1]


class Limited(AdaptiveViT):
    """Runs out of memory above 40 images a batch, and fails in another way at 7."""

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        if len(images) > 40:
            raise torch.OutOfMemoryError(f"no room for {len(images)}\nsecond line")
        if len(images) == 7:
            raise RuntimeError("seven is too much\nsecond line")
        return super().stage(k, images, prev)


@pytest.fixture(autouse=True, scope="module")
def limited() -> None:
    def limited_vit(pretrained: bool = False, **kwargs) -> Limited:
        return Limited(28, 14, 10, 32, 1, 2)

    limited_vit.__module__ = __name__
    register_model(limited_vit)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, in a list of one, that stand still unless a test moves them."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("counts", [[39, 11], [0, 50], [50, 0], [17, 17, 16], [1, 0, 49], [5, 45, 0], [50]])
@pytest.mark.parametrize("levels", [12, 10**6])
@pytest.mark.parametrize("n", [50, 100])
def test_forced_exits_are_exact_and_ties_fall_into_the_gap(counts: list[int], levels: int, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    sure = torch.randint(levels, (n, len(counts)), generator=generator) / levels
    try:
        rows, thresholds = force_exits(sure[:, :-1], counts)
    except ValueError:  # without spare images every tie is in the way
        assert n == 50 and levels == 12
        return
    exits = choose_exits(sure[rows], torch.tensor(thresholds)[None])[0]
    assert exits.bincount(minlength=len(counts)).tolist() == counts
    assert len(set(rows.tolist())) == 50


def test_neighbouring_floats_are_told_apart() -> None:
    low = torch.tensor([0.3, 0.7, 0.1])
    for sure in torch.stack([low, torch.nextafter(low, torch.tensor(1.0))]).T:
        rows, thresholds = force_exits(sure[:, None], [1, 1])
        assert rows.tolist() == [1, 0]
        assert (sure >= thresholds[0]).tolist() == [False, True]


def test_equal_confidences_cannot_be_forced() -> None:
    with pytest.raises(ValueError, match="exit 0 is equally sure of too many images"):
        force_exits(torch.full((100, 1), 0.25), [39, 11])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, batch_size, batches",  # of 9 batches, 1.98 go on; of 3, two and one
    [("lf_deit_nano", 1, 50), ("lf_deit_nano", 7, 9), ("lf_deit_nano", 32, 9)]
    + [("dvt_deit_nano", 1, 50), ("dvt_deit_nano", 7, 9), ("dvt_deit_nano", 32, 3)],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_early_exit_work_meets_its_shares(name: str, batch_size: int, batches: int, dtype) -> None:
    images = batches * batch_size
    model = timm.create_model(name, embed_dim=32, depth=2, num_heads=2).eval()
    shares = operating_points(model.num_exits)[-1].shares
    workload = exit_workload(model, Precision(CPU, dtype), batch_size, shares)
    drawn = list(workload.batches)
    assert {len(batch) for batch in drawn} == {batch_size} and workload.sample(2) == 2 * images
    exits = torch.cat([exits for _, exits in workload.run(drawn)])
    edges = [0] + [round(images * sum(shares[: k + 1])) for k in range(model.num_exits)]
    assert exits.bincount(minlength=model.num_exits).tolist() == torch.tensor(edges).diff().tolist()
    assert len({image.numpy().tobytes() for batch in drawn for image in batch}) == images


def test_batches_are_put_together_anew_from_a_pool_of_few_images() -> None:
    model = timm.create_model("lf_deit_nano", embed_dim=8, depth=1, num_heads=1, patch_size=2, region_size=2)
    model.eval().stage = scripted_stage
    workload = exit_workload(model, Precision(CPU), 300, [0.75, 0.25])
    pool, number = workload.batches.images, len(workload.batches)
    assert number > 2 and len(pool) == 600  # two batches, however many a pass has
    passes = [[batch.flatten(1).sum(dim=1) for batch in workload.batches] for _ in range(2)]
    (first, *_), (second, *_) = passes
    assert not torch.equal(first.sort()[0], second.sort()[0])
    for batches in passes:  # each image equally often
        values, times = torch.cat(batches).unique(return_counts=True)
        assert len(values) == len(pool.flatten(1).sum(dim=1).unique()) and times.sum() == 300 * number
    exits = torch.cat([exits for _, exits in workload.run(workload.batches)])
    assert exits.bincount().tolist() == [225 * number, 75 * number]


def scripted_stage(k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
    """Be as sure of an image as it is bright."""
    return StageOutput(images.flatten(1)[:, :3] * torch.tensor([9.0, 0, 0]), {})


def test_work_without_early_exit_runs_all_stages_on_one_batch() -> None:
    model = timm.create_model("lf_deit_nano", embed_dim=32, depth=2, num_heads=2).eval()
    workload = exit_workload(model, Precision(CPU), 3, [0.0, 1.0])
    ((_, exits),) = workload.run(workload.batches)
    assert len(workload.batches) == 1 and (exits == 1).all()
    assert next(iter(workload.batches)) is workload.batches.images  # no copy is timed


def test_operating_points_by_number_of_exits() -> None:
    def points(exits: int, share: float | None = None) -> dict:
        return {point.name: point.shares for point in operating_points(exits, share)}

    assert points(1) == {"one exit": [1.0]}
    assert points(2) == {
        "all stages": [0.0, 1.0],
        "early exit, 78 % at first exit": [0.78, pytest.approx(0.22)],
    }
    assert points(3)["early exit, equal shares"] == pytest.approx([1 / 3] * 3)
    assert points(3, 0.5)["early exit, 50 % at first exit"] == [0.5, 0.25, 0.25]


@pytest.mark.slow
def test_models_whose_images_differ_in_cost_are_timed_at_shares_of_it() -> None:
    torch.manual_seed(0)
    bench = Bench(ModelSpec.of(PLAIN), Precision(CPU), Options())
    timed = TimedModel(ModelSpec.of("avit_deit_nano:depth=12"), None, CPU)
    points = operating_points(1, cost_varies=timed.cost_varies)
    assert [point.name for point in points] == [f"{share} % of its GFLOPs" for share in (100, 78, 65)]
    for point, share in zip(points, (1, 0.78, 0.65), strict=True):
        workload, wanted = bench.workload(timed, 8, point), share * timed.gflops[0]
        images = workload.batches.images
        (cost,) = timed.stage_costs(images[:FITTED])
        assert cost.mean().item() == pytest.approx(wanted, rel=0.005)
    # Of four batches, put together anew in every pass; the other images are as costly.
    assert len(images) == 32 and len(workload.batches) == 4
    assert timed.mean_gflops(workload, bench.precision) == pytest.approx(wanted, rel=0.02)
    assert not bench.baseline.cost_varies


def test_samples_alternate_and_last_long_enough(clock: list[float]) -> None:
    order = ""

    def work(name: str, seconds: float, batches: list[int]) -> Workload:
        def run(batches: Iterable[Tensor]) -> None:
            nonlocal order
            for batch in batches:
                order += name
                clock[0] += seconds * len(batch)

        return Workload(run, [torch.zeros(n, 3, 2, 2) for n in batches])

    works = [work("a", 0.5, [4]), work("b", 0.25, [1, 2])]
    rates = time_in_turn(works, CPU, repeats=3, seconds=1.6, warmup=3)
    assert order == "aaa" + "a" + "bbb" + "bb" + 3 * ("a" + "bb" * 3)
    assert rates == [[pytest.approx(2.0)] * 3, [pytest.approx(4.0)] * 3]


@pytest.mark.parametrize("batches", [0, 3])
def test_a_pass_tells_loading_from_the_model(batches: int, clock: list[float]) -> None:
    class Loader:
        def __iter__(self) -> Iterator[list[Tensor]]:
            for _ in range(batches):
                clock[0] += 0.5
                yield [torch.zeros(4, 3, 2, 2), torch.arange(4)]

    def run(images: Iterable[Tensor]) -> Iterator[int]:
        for batch in images:
            clock[0] += 0.125
            yield len(batch)

    one = time_pass(run, Loader(), CPU, warmup=2)
    assert one.outputs == [4] * batches and len(one.targets) == batches
    if batches:
        assert one.rates() == (pytest.approx(4 / 0.125), pytest.approx(4 / 0.625))
        assert (one.images, one.model, one.total) == (12, pytest.approx(0.375), pytest.approx(1.875))
    else:
        assert one.rates() == (0.0, 0.0)


def test_cuda_is_timed_by_events_around_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            order.append(f"event on {stream}")

        def elapsed_time(self, end: "Event") -> float:
            assert end is not self and order[-1] == "wait"
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    result, seconds = timing.timed(lambda: order.append("run"), torch.device("cuda:1"))
    event = "event on stream of cuda:1"
    assert result is None and seconds == 0.25 and order == ["wait", event, "run", event, "wait"]


def test_loading_goes_on_while_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait of the host between two batches; the device's own clock tells what lies between them."""
    order, now = [], [0]

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = None

        def record(self, stream: str) -> None:
            self.at = now[0]

        def elapsed_time(self, end: "Event") -> float:
            assert order[-1] == "wait"
            return end.at - self.at

    def load() -> Iterator[list[Tensor]]:
        for _ in range(3):
            order.append("load")
            now[0] += 125
            yield [torch.zeros(4, 1), torch.arange(4)]

    def run(batches: Iterable[Tensor]) -> Iterator[None]:
        for _ in batches:
            order.append("run")
            now[0] += 500
            yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(timing, "to_device", lambda batch, device: batch)

    class Loader:
        __iter__ = staticmethod(load)

    one = time_pass(run, Loader(), torch.device("cuda"), warmup=0)
    assert order == ["load", "wait", *["load", "run"] * 3, "wait"]
    assert (one.model, one.total) == (pytest.approx(1.5), pytest.approx(1.875))


def test_latencies_are_of_single_calls(clock: list[float]) -> None:
    batches = [torch.full((1, 3, 2, 2), float(k == 0)) for k in range(25)]

    def run(batches: Iterable[Tensor]) -> None:
        for batch in batches:
            clock[0] += 0.5 if batch.any() else 0.125

    assert latencies(Workload(run, batches), CPU, calls=60, seconds=100) == pytest.approx((125, 500))
    assert clock[0] == 3 * (24 * 0.125 + 0.5)
    latencies(Workload(run, batches), CPU, calls=60, seconds=4)
    assert clock[0] == 5 * (24 * 0.125 + 0.5)  # slow calls are fewer


@pytest.mark.parametrize(
    "limit, cap, expected",
    [
        (10**6, 512, 512),
        (300, 4096, 256),
        (330, 320, 320),
        (300, 320, 256),
        (10, 4096, 8),
        (1, 64, 1),
        (64, 9, 9),
    ],
)
def test_the_largest_batch_is_found_by_doubling(limit: int, cap: int, expected: int) -> None:
    tried = []

    def run(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError("full")

    assert largest_batch(run, cap) == expected
    assert expected in tried and max(tried) <= cap


@pytest.mark.parametrize(
    "said", ["cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "no"]
)
def test_libraries_run_out_of_memory_too(said: str) -> None:
    def run(batch_size: int) -> None:
        if batch_size > 100:
            raise RuntimeError(f"{said} at {batch_size}")

    if said == "no":
        with pytest.raises(RuntimeError, match="no at 128"):
            largest_batch(run, 4096)
    else:
        assert largest_batch(run, 4096) == 64


def test_no_batch_at_all_is_an_error() -> None:
    def run(batch_size: int) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="not even one image"):
        largest_batch(run, 4096)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a table of three models at two batch sizes."""
    folder = tmp_path_factory.mktemp("table")
    patch = pytest.MonkeyPatch()
    files = [part for kind in ("csv", "markdown", "png") for part in (f"--{kind}", folder / f"speed.{kind}")]
    flags = ["--models", TWO, f"{PLAIN},drop_path_rate=0.5", PLAIN, "--batch-size", 1, 4, *QUICK, *files]
    patch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
    benchmark.main()
    patch.undo()
    return folder


def test_rows_agree_with_one_another(table: Path) -> None:
    rows = read(table / "speed.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["model"], row["batch_size"]) for row in rows[::2]] == [
        *[(TWO, "1"), (TWO, "4"), (f"{PLAIN},drop_path_rate=0.5", "1")],
        (PLAIN, "1"),
    ]
    for row in rows:
        number = {name: float(row[name]) for name in COLUMNS[2:11] if name != "spread"}
        rate, base = number["images_per_second"], float(row["baseline_images_per_second"])
        low, high = map(float, row["spread"].split("-"))
        assert low <= rate * 1.001 and rate <= high * 1.001
        assert number["speedup"] == pytest.approx(rate / base)
        assert number["realised_fraction"] == pytest.approx(number["speedup"] / number["saved_gflops"])
        assert row["error"] == row["peak_memory_mib"] == row["compiled"] == ""
        assert bool(row["latency_p50_ms"]) == bool(row["latency_p99_ms"]) == (row["batch_size"] == "1")
        if row["model"] == PLAIN:
            assert number["saved_gflops"] == 1


def test_gflops_are_those_of_the_exits_taken(table: Path) -> None:
    rows = read(table / "speed.csv")
    spec = ModelSpec.of(TWO)
    first, both = exit_gflops(timm.create_model(spec.name, **spec.kwargs))
    (plain,) = exit_gflops(timm.create_model("deit_nano", **ModelSpec.of(PLAIN).kwargs))
    expected = {"1": (39 * first + 11 * both) / 50, "4": (41 * first + 11 * both) / 52}
    for row in rows[:4]:
        cost = both if row["operating_point"] == "all stages" else expected[row["batch_size"]]
        assert float(row["gflops"]) == pytest.approx(cost)
        assert float(row["saved_gflops"]) == pytest.approx(plain / cost)
    assert [row["operating_point"] for row in rows[:4]] == 2 * [
        "all stages",
        "early exit, 78 % at first exit",
    ]


def test_table_and_picture_show_what_there_is(table: Path) -> None:
    text = (table / "speed.markdown").read_text()
    assert f"baseline {PLAIN}" in text.splitlines()[0] and "float32, eager" in text.splitlines()[0]
    assert text.count(f"| {PLAIN} ") == 2 and "peak_memory_mib" not in text and "error" not in text
    assert Image.open(table / "speed.png").size[0] > 300


def test_a_failing_model_gets_a_row(command: Command, tmp_path: Path) -> None:
    flags = ["--models", "limited_vit", PLAIN, "deit_nano:no_such=1", "--batch-size", 7, 8]
    ended = command("benchmark", *flags, *QUICK, "--csv", tmp_path / "a.csv")
    assert ended.code == 0
    rows = read(tmp_path / "a.csv")
    assert [row["batch_size"] for row in rows] == ["7", "8"] * 3
    assert rows[0]["error"] == "seven is too much" and not rows[0]["images_per_second"]
    assert float(rows[0]["parameters"]) > 0
    assert all(row["images_per_second"] and not row["error"] for row in rows[1:4])
    assert all("no_such" in row["error"] for row in rows[4:])


def test_a_failing_baseline_leaves_the_model_its_speed(command: Command, tmp_path: Path) -> None:
    flags = ["--models", PLAIN, "--batch-size", 7, *QUICK, "--baseline", "limited_vit"]
    assert command("benchmark", *flags, "--csv", tmp_path / "a.csv").code == 0
    (row,) = read(tmp_path / "a.csv")
    assert row["error"] == "baseline: seven is too much"
    assert row["images_per_second"] and not row["speedup"] and not row["saved_gflops"]


def test_nothing_measured_is_a_failure(command: Command, tmp_path: Path) -> None:
    flags = ["--models", "limited_vit", "--batch-size", 7, *QUICK, "--csv", tmp_path / "a.csv"]
    ended = command("benchmark", *flags)
    assert ended.code == 1 and "no model could be measured" in ended.err
    assert read(tmp_path / "a.csv")[0]["error"] == "seven is too much"


@pytest.mark.slow
def test_auto_takes_the_largest_batch_that_model_and_baseline_run(command: Command, tmp_path: Path) -> None:
    flags = ["--batch-size", "auto", "--max-batch", 96, "--csv", tmp_path / "a.csv"]
    assert command("benchmark", "--models", "limited_vit", PLAIN, *QUICK, *flags).code == 0
    assert [row["batch_size"] for row in read(tmp_path / "a.csv")] == ["32", "96"]
    flags += ["--baseline", "limited_vit"]
    assert command("benchmark", "--models", PLAIN, *QUICK, *flags).code == 0
    assert [row["batch_size"] for row in read(tmp_path / "a.csv")] == ["32"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--models", PLAIN, "lf_deit_smal"], "unknown model 'lf_deit_smal'; there are lf_deit"),
        (["--models", "deit_nano:depth"], "deit_nano takes KEY=VALUE, not 'depth'"),
        (["--models", PLAIN, "--baseline", "no_such"], "unknown model 'no_such'"),
        (["--models", PLAIN, "--batch-size", "auto"], "--max-batch"),
        (["--models", PLAIN, "--batch-size", "0"], "--batch-size: 0: take numbers from 1 up, or auto"),
        (["--models", PLAIN, "--repeats", "0"], "--repeats: '0' is not a whole number from 1 up"),
        (
            ["--models", PLAIN, "--exit-share", "1.5"],
            "--exit-share: '1.5' is not a finite number from 0 to 1",
        ),
        (["--models", PLAIN, "--csv", "no/such/folder.csv"], "name a file in a folder that exists"),
        (["--models", PLAIN, "--require-compiled"], "--require-compiled: say how with --compile"),
        (["--models", PLAIN, "--target-gflops", "1", "--train"], "--train runs all stages"),
        (["--models", PLAIN, "--target-gflops", "0"], "'0' is not a finite number from 1e-06 up"),
    ],
)
def test_bad_input_is_one_line_before_any_timing(flags: list[str], message: str, command: Command) -> None:
    ended = command("benchmark", "--device", "cpu", *flags)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.count("\n") == 1 and message in ended.err


def test_commas_in_brackets_belong_to_the_value() -> None:
    spec = ModelSpec.of("evit_deit_nano:keep_rate=0.5,drop_loc=[1,2],init=deit")
    assert spec.kwargs == {"keep_rate": 0.5, "drop_loc": [1, 2], "init": "deit"}


@pytest.mark.parametrize("name", benchmark.LISTS)
def test_lists_hold_registered_models(name: str) -> None:
    specs = benchmark.choose_models(name, [PLAIN], [])
    assert [spec.text for spec in specs] == [*benchmark.LISTS[name], PLAIN]


def test_the_project_list_holds_every_full_size_once() -> None:
    listed = set(benchmark.LISTS["project"])
    assert {"lf_deit_small", "evit_deit_base", "avit_deit_tiny", "dvt_t2t_vit_12", "cf_lvvit_small"} < listed
    assert not listed & {"deit_nano", "lf_deit_nano", "deit_small_patch16_shrink_base", "DVT_T2t_vit_12"}
    entries = [timm.models.model_entrypoint(name) for name in benchmark.LISTS["project"]]
    assert len(entries) == len(set(entries))


def test_names_that_timm_dropped_are_left_out(caplog) -> None:
    with caplog.at_level("INFO", logger="adaptive-vit"):
        specs = benchmark.choose_models(None, [], ["gone_model", PLAIN])
    assert [spec.text for spec in specs] == [PLAIN] and "gone_model" in caplog.text


def test_without_fvcore_only_the_cost_is_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    ended = command("benchmark", "--models", PLAIN, *QUICK, "--csv", tmp_path / "a.csv", "--batch-size", 2)
    assert ended.code == 0 and "GFLOPs are not counted" in ended.err
    (row,) = read(tmp_path / "a.csv")
    assert (
        row["speedup"] and not row["gflops"] + row["saved_gflops"] + row["realised_fraction"] + row["error"]
    )


def test_cost_of_halted_tokens_is_saved() -> None:
    torch.manual_seed(0)
    precision = Precision(CPU, torch.bfloat16)  # in which other tokens halt than in float32
    timed = TimedModel(ModelSpec.of("avit_deit_nano:gate_center=1"), None, CPU)
    workload = exit_workload(timed.model, precision, 6, [1.0])
    with torch.inference_mode(), precision.autocast():
        tokens = timed.model(workload.batches.images)[0].info["tokens"]
    assert (tokens[:, -1] < tokens[:, 0]).any()
    mean = timed.mean_gflops(workload, precision)
    assert mean == pytest.approx(token_gflops(timed.model, tokens).mean().item())
    assert mean < timed.gflops[0]


@pytest.mark.parametrize("broken", ["", "torch", PLAIN])
def test_model_and_baseline_are_compiled_both_or_neither(
    broken: str, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def compile(stage, mode):
        if broken == "torch":
            raise RuntimeError("no compiler here")

        def run(*args):
            ran.append(type(stage.__self__).__name__)
            if broken and not isinstance(stage.__self__, Limited):
                raise RuntimeError("no compiler here")
            return stage(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    flags = ["--models", "limited_vit", "--compile", "--batch-size", 2, *QUICK, "--csv", tmp_path / "a.csv"]
    flags += ["--require-compiled"]
    ended = command("benchmark", *flags)
    (row,) = read(tmp_path / "a.csv")
    assert ended.code == bool(broken) and row["images_per_second"] and not row["error"]
    assert ("limited_vit, one exit, batch 2; the lines" in ended.err) == bool(broken)
    assert row["compiled"] == ("eager" if broken else "default")
    assert ("not compiled: " in ended.err) == bool(broken) and ended.err.count("no compiler here") == bool(
        broken
    )
    assert ran[-4:] == 2 * ["AdaptiveViT", "Limited"] if not broken else len(ran) <= 2  # the timed samples


def test_the_baseline_is_compiled_once_for_each_batch_size(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graphs, modes, compile = [], [], torch.compile

    def backend(graph, inputs):
        graphs.append(
            [len(x) for x in inputs if isinstance(x, Tensor) and x.ndim == 4 and len(x[0, 0]) == 56]
        )
        return graph

    def recorded(method, mode):
        modes.append((type(method.__self__).__name__, method.__name__, mode))
        return compile(method, backend=backend)

    monkeypatch.setattr(torch, "compile", recorded)
    tiny = "deit_nano:embed_dim=8,depth=1,num_heads=1,patch_size=28"
    flags = ["--models", f"{tiny},mlp_ratio=2", f"{tiny},mlp_ratio=3", "--batch-size", 2, 5, *QUICK]
    flags += ["--baseline", tiny, "--compile", "reduce-overhead", "--train", "--csv", tmp_path / "a.csv"]
    ended = command("benchmark", *flags, "--require-compiled")
    assert ended.code == 0, ended.err
    # Three models of one class, a graph for each size: none of symbolic sizes, none twice.
    assert modes == 3 * [("AdaptiveViT", "forward", "reduce-overhead")]
    assert graphs == [[2], [2], [5], [5], [2], [5]]
    assert [row["compiled"] for row in read(tmp_path / "a.csv")] == ["reduce-overhead"] * 4


def test_only_test_speed_needs_no_data(command: Command, tmp_path: Path) -> None:
    flags = ["--model", "lf_deit_nano", "--only_test_speed", "--batch-size", 3, "--device", "cpu"]
    flags += ["--model-kwargs", "num_classes=7", "embed_dim=32", "depth=2", "num_heads=2"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "speed_macs.txt").write_text("an earlier line\n")
    ended = command("main_deit", *flags, "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    earlier, line = (tmp_path / "out" / "speed_macs.txt").read_text().splitlines()
    assert earlier == "an earlier line"
    speed = json.loads(line)
    model = timm.create_model("lf_deit_nano", num_classes=7, embed_dim=32, depth=2, num_heads=2)
    assert speed["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        speed["exit_gflops"] == pytest.approx(exit_gflops(model))
        and speed["gflops"] == speed["exit_gflops"][1]
    )
    assert speed["spread"][0] <= speed["images_per_second"] <= speed["spread"][1]
    assert (speed["batch_size"], speed["dtype"], speed["img_size"]) == (3, "float32", 56)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"speed_macs.txt", "train.log"}


def test_timing_first_leaves_training_as_it_is(command: Command, folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, extra in (("plain", []), ("timed", ["--test_speed"])):
        flags = ["--model", "deit_nano", "--data-path", folder, "--epochs", 1, "--batch-size", 32]
        flags += ["--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "--device", "cpu"]
        flags += ["--num_workers", 0, "--output_dir", tmp_path / name]
        assert command("main_deit", *flags, *extra).code == 0
        losses.append(json.loads((tmp_path / name / "log.txt").read_text())["train_loss"])
        assert (tmp_path / name / "speed_macs.txt").exists() == bool(extra)
    assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_training_steps_are_timed_at_the_cost_of_all_stages(command: Command, tmp_path: Path) -> None:
    timms = "vit_tiny_patch16_224:img_size=32,depth=1,embed_dim=32,num_heads=1"
    flags = ["--models", TWO, PLAIN, "--train", "--batch-size", 3, *QUICK, "--baseline", timms]
    flags += ["--csv", tmp_path / "a.csv"]
    ended = command("benchmark", *flags)
    assert ended.code == 0, ended.err
    rows = read(tmp_path / "a.csv")
    assert [row["operating_point"] for row in rows] == ["training step"] * 2
    full = exit_gflops(TimedModel(ModelSpec.of(TWO), None, CPU).model)[-1]
    assert float(rows[0]["gflops"]) == pytest.approx(full)
    assert all(float(row["speedup"]) > 0 and not row["error"] for row in rows)


def test_a_training_step_is_one_of_the_optimizer() -> None:
    torch.manual_seed(0)
    model = TimedModel(ModelSpec.of(TWO), None, CPU).model
    before = {name: value.clone() for name, value in model.named_parameters()}
    workload = training_workload(model, Precision(CPU), 4)
    workload.run(workload.batches)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == before.keys()
    # AdamW's first step has the length of the learning rate, decay aside.
    step = (model.head.weight - before["head.weight"]).abs().max().item()
    assert step == pytest.approx(1e-6, rel=0.05)


def test_a_training_step_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(("norm", "clip", "average", "statistics"), 0)

    def count(owner: object, name: str, what: str) -> None:
        before = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[what] += 1
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    model = TimedModel(ModelSpec.of(TWO), None, CPU).model
    count(torch.nn.utils, "get_total_norm", "norm")
    count(torch.nn.utils, "clip_grads_with_norm_", "clip")
    count(timing.ModelEmaV3, "update", "average")
    count(type(model), "statistics", "statistics")
    assert training_workload(model, Precision(CPU), 2).sample(3) == 6
    assert counts == dict.fromkeys(counts, 3)
    assert model.training and model.selecting


BOTH = "evit_deit_nano:drop_loc=[1],depth=2"


@pytest.mark.parametrize(
    "text, target, name",
    [
        (TWO, 0.0006, "% at first exit"),
        ("dvt_deit_nano:embed_dim=32,depth=2,num_heads=2", 0.01, "% at first exit"),
        (BOTH, 0.025, "keep_rate"),
        ("avit_deit_nano:depth=3", 0.03, "% of its most"),
    ],
)
def test_a_target_is_met_by_exit_shares_or_a_knob(text: str, target: float, name: str) -> None:
    torch.manual_seed(0)
    bench = Bench(ModelSpec.of(PLAIN), Precision(CPU), Options(target_gflops=target))
    timed = TimedModel(ModelSpec.of(text), None, CPU)
    (point,) = bench.points(timed)
    assert f"{target:g} GFLOPs: " in point.name and name in point.name
    workload = bench.workload(timed, 50, point)
    assert timed.mean_gflops(workload, bench.precision) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("text", [TWO, PLAIN, BOTH, "avit_deit_nano:depth=3"])
def test_a_target_out_of_range_names_the_range(text: str, command: Command) -> None:
    ended = command("benchmark", "--models", PLAIN, text, *QUICK, "--target-gflops", 0.1)
    least, most = TimedModel(ModelSpec.of(PLAIN), None, CPU).reachable()
    assert least == most
    assert ended.code == 2 and ended.out == ""
    assert f"--target-gflops 0.1: {PLAIN} costs {most:.3f}, always" in ended.err
    low, high = TimedModel(ModelSpec.of(text), None, CPU).reachable()
    with pytest.raises(InputError, match=f"costs {low:.3f} to {high:.3f}" if high > low else "always"):
        TimedModel(ModelSpec.of(text), None, CPU).aim(0.1)


def test_a_knob_is_fitted_in_the_precision_that_is_timed() -> None:
    """The tokens that halt depend on the precision, and with them what an image costs."""
    bench = Bench(ModelSpec.of(f"avit_deit_nano:{SMALL}"), Precision(CPU, torch.bfloat16), Options())
    types: list[torch.dtype] = []
    hook = bench.baseline.model.blocks[0].mlp.register_forward_hook(lambda *call: types.append(call[2].dtype))
    bench.workload(bench.baseline, 2, Point("", [1.0], 0.8))
    hook.remove()
    assert set(types) == {torch.bfloat16}
