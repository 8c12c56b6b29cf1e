"""Rows of a speed table: models at operating points and batch sizes, each sampled in turn with a baseline.

A row's figure is the ratio of the two, since a drift of the machine affects both equally.
"""

import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.timing import (
    Workload,
    count_gflops,
    exit_workload,
    largest_batch,
    latencies,
    one_line,
    time_in_turn,
    training_workload,
)
from engine import Precision
from inference.streaming import compile_models, uncompile
from models import Adaptive, flags
from models.cost import exit_gflops, fit_knob
from models.weights import baseline_model, cast_weights
from utils import InputError, log

COLUMNS = """
    model operating_point batch_size img_size parameters gflops images_per_second spread speedup saved_gflops
    realised_fraction baseline_images_per_second latency_p50_ms latency_p99_ms peak_memory_mib compiled error
""".split()
Row = dict[str, Any]
FITTED = 8  # images on which a share of the cost is set
CLOSE = 0.005  # share of a target by which the ends of what can be reached may miss it
PASS = 4  # batches of a pass where every batch has a cost of its own
EAGER = "eager"
# Every batch size is compiled for its own shapes, and no model uses up the recompilations of another.
STATIC = dict(automatic_dynamic_shapes=False, recompile_limit=64, accumulated_recompile_limit=4096)
COST_SHARES = (1.0, 0.78, 0.65)  # of the full cost, where the image decides on it


class ModelSpec(NamedTuple):
    """A model as a command line names it: the text, the registered name and the constructor arguments."""

    text: str
    name: str
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> "ModelSpec":
        """Read NAME or NAME:KEY=VALUE,...; commas inside brackets belong to a value.

        Raises:
            InputError: there is no such model, or the text is of another form.
        """
        name, _, rest = text.partition(":")
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            raise InputError(f"unknown model {name!r}" + (f"; there are {close}" if close else ""))
        return cls(text, name, flags.key_values(name, re.split(r",(?![^\[]*\])", rest) if rest else []))


class Options(NamedTuple):
    """How rows are measured.

    Attributes:
        img_size: side of the images in pixels; None for each model's own.
        exit_share: see `operating_points`.
        target_gflops: mean cost of an image to choose the operating point for; None for the usual ones.
        max_batch: limit of the batch size "auto".
        compile: mode of torch.compile for the stages, or for the whole model where it trains; None for eager.
        train: time training steps, with all stages on all images, instead of inference.
        repeats, seconds, warmup: see `timing.time_in_turn`.
        seed: of the images.
    """

    img_size: int | None = None
    exit_share: float | None = None
    target_gflops: float | None = None
    max_batch: int = 4096
    compile: str | None = None
    train: bool = False
    repeats: int = 5
    seconds: float = 0.5
    warmup: int = 3
    seed: int = 0


class TimedModel:
    """A model on its device with its cost.

    Attributes:
        text: the model as a command line names it.
        gflops: cumulative GFLOPs of each exit; None where they cannot be counted.
        cost_varies: whether what a stage costs depends on the image.
    """

    def __init__(self, spec: ModelSpec, img_size: int | None, device: torch.device):
        self.text = spec.text
        self.model: Adaptive = baseline_model(spec.name, **({"img_size": img_size} | spec.kwargs))
        self.gflops = count_gflops(self.model, spec.text)
        self.model.to(device)
        image = torch.zeros(1, 3, self.model.img_size, self.model.img_size, device=device)
        self.cost_varies = any(cost is not None for cost in self.stage_costs(image))

    def cells(self) -> Row:
        """Return what a row says of the model however it is run."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model": self.text, "img_size": self.model.img_size, "parameters": parameters}

    @torch.inference_mode()
    def stage_costs(self, images: Tensor) -> list[Tensor | None]:
        """Return what each stage costs each of the images [B,3,S,S], in GFLOPs; None where it is fixed."""
        return [self.model.image_gflops(k, output.info) for k, output in enumerate(self.model(images))]

    @torch.inference_mode()
    def mean_gflops(self, workload: Workload, precision: Precision) -> float | None:
        """Run a pass batch by batch; return the mean cost of its images at the exits that they take."""
        if self.gflops is None:
            return None
        fixed, paid = torch.tensor([0.0, *self.gflops], dtype=torch.float64).diff(), []
        for batch in workload.batches:
            ((_, exits),) = workload.run([batch])
            taken = exits.cpu()
            stages = fixed.repeat(len(batch), 1)  # [B,E]
            if self.cost_varies:
                with precision.autocast():
                    costs = self.stage_costs(batch)
                for k, cost in enumerate(costs):
                    if cost is not None:
                        stages[:, k] = cost.cpu()
            paid.append(stages.cumsum(dim=1).gather(1, taken[:, None]))
        return torch.cat(paid).mean().item()

    def reachable(self) -> tuple[float, float]:
        """Return the least and the most that an image can cost on average, in GFLOPs, as `aim` sets it.

        Raises:
            InputError: the GFLOPs cannot be counted.
        """
        if self.gflops is None:
            raise InputError(f"--target-gflops: the GFLOPs of {self.text} cannot be counted")
        if len(self.gflops) > 1:
            return self.gflops[0], statistics.mean(self.gflops[1:])
        if not self.model.knobs:
            return self.gflops[0], self.gflops[0]
        name, (_, *ends) = next(iter(self.model.knobs.items()))
        costs, before = [], getattr(self.model, name)
        for end in ends:
            setattr(self.model, name, end)
            costs.append(self.cost_at_knob())
        setattr(self.model, name, before)
        return min(costs), max(costs)

    def cost_at_knob(self) -> float:
        """Return what an image costs, on average over a few where that varies, in GFLOPs."""
        if not self.cost_varies:
            return exit_gflops(self.model)[-1]
        side, device = self.model.img_size, next(self.model.parameters()).device
        images = torch.rand(
            FITTED, 3, side, side, device=device, generator=torch.Generator(device).manual_seed(0)
        )
        return sum(cost.mean().item() for cost in self.stage_costs(images) if cost is not None)

    def aim(self, target: float) -> "Point":
        """Return the point at which an image costs so many GFLOPs on average.

        A share of the images leaves at the first exit, the rest evenly at the others. A model of one exit has
        its first knob moved: now, or for the images themselves where its cost depends on them.

        Raises:
            InputError: it can cost neither so little nor so much.
        """
        low, high = self.reachable()
        if not low * (1 - CLOSE) <= target <= high * (1 + CLOSE):
            span = f"{low:.3f} to {high:.3f}" if high > low else f"{low:.3f}, always"
            raise InputError(f"--target-gflops {target:g}: {self.text} costs {span}")
        if len(self.gflops) > 1:
            share = min(max((high - target) / (high - low), 0.0), 1.0)
            *_, point = operating_points(len(self.gflops), share)
            return point._replace(name=f"{target:g} GFLOPs: {point.name}")
        if self.cost_varies and self.model.knobs:
            return Point(
                f"{target:g} GFLOPs: {100 * target / high:.3g} % of its most", [1.0], min(target / high, 1.0)
            )
        if self.model.knobs:
            value = self.turn_knob(target)
            return Point(f"{target:g} GFLOPs: {next(iter(self.model.knobs))} {value:.4g}", [1.0])
        return Point(f"{target:g} GFLOPs: one exit", [1.0])

    def turn_knob(self, target: float) -> float:
        """Move the first knob to where an image costs about `target` GFLOPs, and return its value."""
        name, (kind, low, high) = next(iter(self.model.knobs.items()))

        def distance(value: float) -> float:
            setattr(self.model, name, value)
            return self.cost_at_knob() - target

        cheap, dear = sorted((low, high), key=distance)
        for _ in range(12):
            middle = kind((cheap + dear) / 2)
            cheap, dear = (cheap, middle) if distance(middle) > 0 else (middle, dear)
        value = min((cheap, dear), key=lambda end: abs(distance(end)))
        setattr(self.model, name, value)
        self.gflops = exit_gflops(self.model)
        return value


class Point(NamedTuple):
    """What a model is timed at.

    Attributes:
        name: in the table.
        shares: of the images per exit.
        cost: share of the full cost, where the image decides on it.
    """

    name: str
    shares: list[float]
    cost: float | None = None


TRAINING = [Point("training step", [])]


def operating_points(exits: int, share: float | None = None, cost_varies: bool = False) -> list[Point]:
    """Return all stages and early exit; of one exit, shares of the full cost where that varies.

    Args:
        exits: of the model.
        share: of the images that leave at the first exit, the rest evenly at the others; default: 0.78 of
            two exits, equal shares of more.
        cost_varies: whether what an image costs depends on it, and can be moved.
    """
    if exits == 1 and cost_varies:
        return [Point(f"{100 * cost:.3g} % of its GFLOPs", [1.0], cost) for cost in COST_SHARES]
    if exits == 1:
        return [Point("one exit", [1.0])]
    name = "early exit, equal shares"
    if exits == 2 or share is not None:
        share = 0.78 if share is None else share
        name = f"early exit, {100 * share:.3g} % at first exit"
    first = 1 / exits if share is None else share
    rest = [(1 - first) / (exits - 1)] * (exits - 1)
    return [Point("all stages", [0.0] * (exits - 1) + [1.0]), Point(name, [first, *rest])]


def peak_memory(model: Adaptive, workload: Workload) -> float | None:
    """Run one batch; return the MiB of GPU memory for weights, images and the work, None without a GPU.

    Nothing may be compiled: what CUDA graphs hold is not counted by PyTorch as allocated.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    own = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    workload.run(workload.first(1))
    return (torch.cuda.max_memory_allocated(device) - before + own) / 2**20


class Bench:
    """Measures rows against one baseline, which is compiled once for each batch size."""

    def __init__(self, baseline: ModelSpec, precision: Precision, options: Options):
        self.spec, self.precision, self.options = baseline, precision, options
        self.baseline = self.build(baseline)
        self.baselines: dict[int, Workload] = {}  # by batch size
        self.methods: dict[Adaptive, dict[str, Callable]] = {}  # of compiled models
        if options.compile:
            torch._dynamo.reset()  # recompilations of earlier models do not count

    def build(self, spec: ModelSpec) -> TimedModel:
        """Build a model as it is timed."""
        timed = TimedModel(spec, self.options.img_size, self.precision.device)
        if self.precision.weights:
            cast_weights(timed.model, self.precision.weights)
        return timed

    def timed_model(self, spec: ModelSpec) -> TimedModel:
        return self.baseline if spec == self.spec else self.build(spec)

    def check_target(self, specs: list[ModelSpec]) -> None:
        """Check, before anything is timed, that all models can cost what is aimed at.

        Raises:
            InputError: one cannot.
        """
        for spec in specs if self.options.target_gflops else ():
            self.timed_model(spec).aim(self.options.target_gflops)

    def points(self, timed: TimedModel) -> list[Point]:
        """Return what a model is timed at."""
        options, model = self.options, timed.model
        if options.train:
            return TRAINING
        if options.target_gflops:
            return [timed.aim(options.target_gflops)]
        return operating_points(model.num_exits, options.exit_share, timed.cost_varies and bool(model.knobs))

    def rows(self, spec: ModelSpec, batch_sizes: list[int | str]) -> list[Row]:
        """Return all rows of a model; where it fails, a row says so.

        Args:
            spec: the model.
            batch_sizes: numbers or "auto".
        """
        try:
            timed = self.timed_model(spec)
            points = self.points(timed)
        except Exception as error:  # whatever a model raises belongs into its row
            return [failed({"model": spec.text, "batch_size": size}, error) for size in batch_sizes]
        rows = [row for size in batch_sizes for row in self.rows_of_size(timed, size, points)]
        if timed is not self.baseline:
            self.methods.pop(timed.model, None)
        return rows

    def rows_of_size(self, timed: TimedModel, size: int | str, points: list[Point]) -> list[Row]:
        cells, rows = timed.cells(), []
        try:
            batch_size = self.largest(timed, points) if size == "auto" else size
        except Exception as error:
            return [failed(cells | {"batch_size": size}, error)]
        for point in points:
            known = cells | {"operating_point": point.name, "batch_size": batch_size}
            try:
                row = known | self.measure(timed, batch_size, point)
                times = f", {row['speedup']:.2f} times the baseline" if "speedup" in row else ""
                log.info("%s: %.4g images/s%s", title(row), row["images_per_second"], times)
            except Exception as error:
                row = failed(known, error)
            rows.append(row)
        return rows

    def workload(self, timed: TimedModel, batch_size: int, point: Point | None = None) -> Workload:
        """Return early exit at a point; default: all stages."""
        model, options = timed.model, self.options
        if options.train:
            return training_workload(model, self.precision, batch_size, options.seed)
        shares = point.shares if point else [0.0] * (model.num_exits - 1) + [1.0]
        pad, batches = bool(options.compile), 1
        if timed.cost_varies:
            batches = max(PASS, math.ceil(FITTED / batch_size))
        workload = exit_workload(model, self.precision, batch_size, shares, options.seed, pad, batches)
        if point and point.cost is not None:
            with self.precision.autocast():  # what an image costs may depend on it
                fit_knob(model, workload.batches.images[:FITTED], point.cost)
        return workload

    def largest(self, timed: TimedModel, points: list[Point]) -> int:
        """Return the largest batch at which the baseline and all operating points run."""

        def run(batch_size: int) -> None:
            self.once(self.workload(self.baseline, batch_size))
            for point in points:
                self.once(self.workload(timed, batch_size, point))

        return largest_batch(run, self.options.max_batch)

    def once(self, workload: Workload) -> Workload:
        workload.run(workload.first(1))
        return workload

    def baseline_workload(self, batch_size: int) -> Workload:
        if batch_size not in self.baselines:
            self.baselines[batch_size] = self.once(self.workload(self.baseline, batch_size))
        return self.baselines[batch_size]

    def compile(self, workloads: dict[Adaptive, Workload]) -> str:
        """Compile all models or none, since a compiled and an eager one have no ratio; return how they run.

        A model that was compiled before only compiles shapes that are new to it.
        """
        mode, names = self.options.compile, ("forward",) if self.options.train else ()
        skipped = counters["inductor"]["cudagraph_skips"]
        for model, work in workloads.items():
            vars(model).update(self.methods.get(model, {}))
            run = partial(self.once, work)
            try:
                if model in self.methods:
                    run()
                elif reason := compile_models({model: run}, mode, names, reset=False):
                    raise RuntimeError(reason)
            except Exception as error:
                log.info("not compiled: %s", one_line(error))
                uncompile(workloads)
                return EAGER
            own = vars(model)
            self.methods[model] = {name: own[name] for name in ("forward", *model.compiled) if name in own}
        without = counters["inductor"]["cudagraph_skips"] - skipped
        return f"{mode}, {without} graphs skipped" if without else mode

    def measure(self, timed: TimedModel, batch_size: int, point: Point) -> Row:
        """Return the cells that follow from running a model."""
        options, row = self.options, Row()
        workload = self.workload(timed, batch_size, point)
        row["peak_memory_mib"] = peak_memory(timed.model, self.once(workload))
        try:
            baseline = self.baseline_workload(batch_size)
        except Exception as error:  # the model's own speed is still worth a row
            baseline, row["error"] = None, f"baseline: {one_line(error)}"
        workloads = ({self.baseline.model: baseline} if baseline else {}) | {timed.model: workload}
        try:
            with torch._dynamo.config.patch(STATIC):
                if options.compile:
                    row["compiled"] = self.compile(workloads)
                row["gflops"] = timed.gflops and timed.gflops[-1]
                if not options.train:
                    row["gflops"] = timed.mean_gflops(workload, self.precision)
                in_turn = [baseline, workload] if baseline else [workload]
                sampling = options.repeats, options.seconds, options.warmup
                *theirs, ours = time_in_turn(in_turn, self.precision.device, *sampling)
                if batch_size == 1:
                    row["latency_p50_ms"], row["latency_p99_ms"] = latencies(workload, self.precision.device)
        finally:
            uncompile(workloads)
            for model in workloads:
                model.eval().zero_grad()
        row["images_per_second"], row["spread"] = statistics.median(ours), f"{min(ours):.4g}-{max(ours):.4g}"
        if theirs:
            row["baseline_images_per_second"] = statistics.median(theirs[0])
            row["speedup"] = row["images_per_second"] / row["baseline_images_per_second"]
            if row["gflops"] and self.baseline.gflops:
                row["saved_gflops"] = self.baseline.gflops[-1] / row["gflops"]
                row["realised_fraction"] = row["speedup"] / row["saved_gflops"]
        return row


def title(row: Row) -> str:
    """Return a row's name, operating point and batch size, as far as it has them."""
    parts = [row["model"], row.get("operating_point"), f"batch {row['batch_size']}"]
    return ", ".join(part for part in parts if part)


def failed(known: Row, error: Exception) -> Row:
    log.info("%s: failed: %s", title(known), one_line(error))
    return known | {"error": one_line(error)}
