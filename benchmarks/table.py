"""Rows of a speed table: models at operating points and batch sizes, each sampled in turn with a baseline.

The ratio of the two is what a row says about a model: drift of the machine hits both alike.
"""

import re
import statistics
from functools import partial
from typing import Any, NamedTuple

import timm
import torch

from benchmarks.timing import (
    Work,
    count_gflops,
    exit_work,
    largest_batch,
    latencies,
    one_line,
    time_in_turn,
    train_work,
)
from engine import Precision
from inference.streaming import compile_models, uncompile
from models import Adaptive, flags
from models.cost import token_gflops
from models.weights import baseline_model
from utils import log

COLUMNS = """
    model operating_point batch_size img_size parameters gflops images_per_second spread speedup saved_gflops
    realised_fraction baseline_images_per_second latency_p50_ms latency_p99_ms peak_memory_mib compiled error
""".split()
Row = dict[str, Any]
FITTED = 8  # images on which the depth of tokens is set


class Spec(NamedTuple):
    """A model as it was asked for: the text, the registered name and constructor main_deit."""

    text: str
    name: str
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> "Spec":
        """Reads NAME or NAME:KEY=VALUE,...; commas inside brackets belong to a value.

        Raises:
            ValueError: there is no such model, or the text is of another form.
        """
        name, _, rest = text.partition(":")
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            raise ValueError(f"unknown model {name!r}" + (f"; there are {close}" if close else ""))
        return cls(text, name, flags.key_values(name, re.split(r",(?![^\[]*\])", rest) if rest else []))


class Options(NamedTuple):
    """How rows are measured.

    Attributes:
        img_size: side of the images in pixels; None for each model's own.
        exit_share: see `operating_points`.
        max_batch: limit of the batch size "auto".
        compile: mode of torch.compile for the stages, or for the whole model where it trains; None for eager.
        train: time training steps, with all stages on all images, instead of inference.
        repeats, seconds, warmup: see `speed.time_in_turn`.
        seed: of the images.
    """

    img_size: int | None = None
    exit_share: float | None = None
    max_batch: int = 4096
    compile: str | None = None
    train: bool = False
    repeats: int = 5
    seconds: float = 0.5
    warmup: int = 3
    seed: int = 0


class Subject:
    """A model on its device with its cost; GFLOPs are None where they cannot be counted."""

    def __init__(self, spec: Spec, img_size: int | None, device: torch.device):
        self.text = spec.text
        self.model: Adaptive = baseline_model(spec.name, **({"img_size": img_size} | spec.kwargs))
        self.gflops = count_gflops(self.model, spec.text)
        self.model.to(device)

    def cells(self) -> Row:
        """What a row says of the model however it is run."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model": self.text, "img_size": self.model.img_size, "parameters": parameters}

    @torch.inference_mode()
    def mean_gflops(self, work: Work, precision: Precision) -> float | None:
        """Runs the work; mean cost of its images at the exits they take, or of the tokens that go on."""
        exits = torch.cat([exits for _, exits in work.run(work.batches)])
        if self.gflops is None:
            return None
        costs = torch.tensor(self.gflops, dtype=torch.float64)[exits.cpu()]
        if self.model.num_exits == 1:
            with precision.autocast():
                infos = [self.model(batch)[0].info for batch in work.batches]
            if "tokens" in infos[0]:
                costs = torch.cat([token_gflops(self.model, info["tokens"]) for info in infos])
        return costs.mean().item()


class Point(NamedTuple):
    """What a model is timed at.

    Attributes:
        name: in the table.
        shares: of the images per exit.
        depth: mean depth of tokens as a share of the blocks, where they halt.
    """

    name: str
    shares: list[float]
    depth: float | None = None


TRAINING = [Point("training step", [])]


def operating_points(model: Adaptive, share: float | None = None) -> list[Point]:
    """All stages and early exit, or the depths at which tokens halt.

    Args:
        model: with its number of exits.
        share: of the images that leave at the first exit, the rest evenly at the others; default: 0.78 of
            two exits, equal shares of more.
    """
    exits = model.num_exits
    if model.depth_shares:
        blocks = len(model.blocks)
        return [Point(f"mean depth {blocks * depth:.2g}", [1.0], depth) for depth in model.depth_shares]
    if exits == 1:
        return [Point("one exit", [1.0])]
    name = "early exit, equal shares"
    if exits == 2 or share is not None:
        share = 0.78 if share is None else share
        name = f"early exit, {100 * share:.3g} % at first exit"
    first = 1 / exits if share is None else share
    rest = [(1 - first) / (exits - 1)] * (exits - 1)
    return [Point("all stages", [0.0] * (exits - 1) + [1.0]), Point(name, [first, *rest])]


def peak_memory(model: Adaptive, work: Work) -> float | None:
    """Runs the work; MiB of GPU memory for weights, images and what a pass needs; None on other devices."""
    device = work.batches[0].device
    if device.type != "cuda":
        return None
    own = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *work.batches])
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work.run(work.batches)
    return (torch.cuda.max_memory_allocated(device) - before + own) / 2**20


class Bench:
    """Measures rows against one baseline."""

    def __init__(self, baseline: Spec, precision: Precision, options: Options):
        self.spec, self.precision, self.options = baseline, precision, options
        self.baseline = Subject(baseline, options.img_size, precision.device)

    def rows(self, spec: Spec, batch_sizes: list[int | str]) -> list[Row]:
        """All rows of a model; where it fails, a row says so.

        Args:
            spec: the model.
            batch_sizes: numbers or "auto".
        """
        try:
            same = spec == self.spec
            subject = self.baseline if same else Subject(spec, self.options.img_size, self.precision.device)
        except Exception as error:  # whatever a model raises belongs into its row
            return [failed({"model": spec.text, "batch_size": size}, error) for size in batch_sizes]
        points = TRAINING
        if not self.options.train:
            points = operating_points(subject.model, self.options.exit_share)
        return [row for size in batch_sizes for row in self.rows_of_size(subject, size, points)]

    def rows_of_size(self, subject: Subject, size: int | str, points: list[Point]) -> list[Row]:
        cells = subject.cells()
        try:
            batch_size = self.largest(subject, points) if size == "auto" else size
        except Exception as error:
            return [failed(cells | {"batch_size": size}, error)]
        found = []
        for point in points:
            known = cells | {"operating_point": point.name, "batch_size": batch_size}
            try:
                row = known | self.measure(subject, batch_size, point)
                times = f", {row['speedup']:.2f} times the baseline" if "speedup" in row else ""
                log.info("%s: %.4g images/s%s", title(row), row["images_per_second"], times)
            except Exception as error:
                row = failed(known, error)
            found.append(row)
        return found

    def work(self, subject: Subject, batch_size: int, point: Point | None = None) -> Work:
        """Early exit at a point; default: all stages."""
        model, options = subject.model, self.options
        if options.train:
            return train_work(model, self.precision, batch_size, options.seed)
        shares = point.shares if point else [0.0] * (model.num_exits - 1) + [1.0]
        work = exit_work(model, self.precision, batch_size, shares, options.seed, bool(options.compile))
        if point and point.depth is not None:
            model.fit_depth(torch.cat(work.batches)[:FITTED], point.depth)
        return work

    def largest(self, subject: Subject, points: list[Point]) -> int:
        """The largest batch at which the baseline and all operating points run."""

        def run(batch_size: int) -> None:
            self.once(self.work(self.baseline, batch_size))
            for point in points:
                self.once(self.work(subject, batch_size, point))

        return largest_batch(run, self.options.max_batch)

    def compile(self, works: dict[Adaptive, Work]) -> bool:
        """Compiles all or none: unlike modes have no ratio."""
        runs = {model: partial(work.run, work.batches) for model, work in works.items()}
        mode, train = self.options.compile, self.options.train
        reason = compile_models(runs, *(("default", ("forward",)) if train else (mode,)))
        if reason:
            log.info("not compiled: %s", reason)
        return reason is None

    def once(self, work: Work) -> Work:
        work.run(work.batches[:1])
        return work

    def measure(self, subject: Subject, batch_size: int, point: Point) -> Row:
        """The cells that follow from running a model."""
        options, device, row = self.options, self.precision.device, Row()
        work = self.work(subject, batch_size, point)
        try:
            baseline = self.once(self.work(self.baseline, batch_size))
        except Exception as error:  # the model's own speed is still worth a row
            baseline, row["error"] = None, f"baseline: {one_line(error)}"
        works = {subject.model: work} | ({self.baseline.model: baseline} if baseline else {})
        row["compiled"] = bool(options.compile) and self.compile(works)
        try:
            row["gflops"] = subject.gflops and subject.gflops[-1]
            if not options.train:
                row["gflops"] = subject.mean_gflops(work, self.precision)
            row["peak_memory_mib"] = peak_memory(subject.model, work)
            timed = [baseline, work] if baseline else [work]
            *theirs, ours = time_in_turn(timed, device, options.repeats, options.seconds, options.warmup)
            if batch_size == 1:
                row["latency_p50_ms"], row["latency_p99_ms"] = latencies(work, device)
        finally:
            uncompile(works)
            for model in works:
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
    """A row by name, operating point and batch size, as far as it has them."""
    parts = [row["model"], row.get("operating_point"), f"batch {row['batch_size']}"]
    return ", ".join(part for part in parts if part)


def failed(known: Row, error: Exception) -> Row:
    log.info("%s: failed: %s", title(known), one_line(error))
    return known | {"error": one_line(error)}
