"""Early exit over a data set, timed: later stages run only on the images that need them."""

import statistics
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

import utils
from benchmarks.timing import Timing, time_pass
from checkpointing.format import Results
from engine import Precision
from inference.session import Session
from inference.streaming import ExitStream, all_stages, compile_models, uncompile
from inference.thresholds import threshold_text
from models import Adaptive
from models.cost import exit_gflops
from models.exits import operating_points
from models.weights import baseline_model, cast_weights
from utils import log


class TimedPasses(NamedTuple):
    """How passes over a data set are timed.

    Attributes:
        repeats: timed passes.
        warmup: untimed batches before each pass.
        baseline: name of a model that is timed in turn, all its stages on the same images.
        compile: mode of torch.compile for the stages; None for eager.
    """

    repeats: int = 3
    warmup: int = 3
    baseline: str | None = None
    compile: str | None = None


def time_early_exit(session: Session, thresholds: list[float], options: TimedPasses) -> None:
    """Time early exit at one operating point, beside a baseline if there is one; print and store the speeds.

    Args:
        session: the model and its data.
        thresholds: one per early exit.
        options: of the timing.
    """
    model, context = session.model, session.context
    dataset = session.dataset()
    loader = session.loader(dataset)
    systems = [(model, thresholds)]
    if options.baseline:
        plain = baseline_model(options.baseline, model.num_classes, model.img_size)
        baseline_gflops = exit_gflops(plain)[-1]
        plain.to(context.device)
        if session.precision.weights:
            cast_weights(plain, session.precision.weights)
        systems.append((plain, []))
    # Passes of both in turn.
    passes = time_systems(session, systems, loader, options)
    loader.dataset.bad.report(context.device)
    shares, accuracy = exits_and_accuracy(passes[0][0], model.num_exits, context.device)
    # What an image costs may depend on it.
    mean_gflops = sum(share * cost for share, cost in zip(shares, session.gflops, strict=True))
    if cost_depends_on_image(model, session.precision):
        row = torch.tensor([thresholds], dtype=torch.float32)
        mean_gflops = operating_points(session.predict(dataset), row, session.gflops).gflops.item()
    rows = [["early exit", mean_gflops, *speeds(passes[0], context)]]
    timed = {
        "device": utils.device_name(context.device),
        "threshold": thresholds[0] if len(set(thresholds)) == 1 else thresholds,
        "exit_shares": shares,
        "accuracy": accuracy,
        "mean_gflops": mean_gflops,
        "images_per_second": rows[0][2],
        "images_per_second_end_to_end": rows[0][4],
    }
    if options.baseline:
        rows.append([options.baseline, baseline_gflops, *speeds(passes[1], context)])
        baseline = {"model": options.baseline, "gflops": baseline_gflops, "images_per_second": rows[1][2]}
        timed |= {"baseline": baseline, "speedup": rows[0][2] / rows[1][2]}
    report(session, timed, thresholds, rows, options.repeats)
    session.store(Results(flops=session.gflops), {"timed": timed})


def time_systems(
    session: Session, systems: list[tuple[Adaptive, list[float]]], loader: DataLoader, options: TimedPasses
) -> list[list[Timing]]:
    """Time models at their thresholds in turn; return the passes of each."""
    batch_size, precision = session.loading.batch_size, session.precision
    if options.compile:
        runs = {model: all_stages(model, precision, batch_size) for model, _ in systems}
        if reason := compile_models(runs, options.compile):
            log.info("not compiled: %s", reason)
    streams = [
        ExitStream(model, precision, thresholds, batch_size, pad=bool(options.compile))
        for model, thresholds in systems
    ]
    passes: list[list[Timing]] = [[] for _ in streams]
    for _ in range(options.repeats):
        for stream, timings in zip(streams, passes, strict=True):
            timings.append(time_pass(stream, loader, session.context.device, options.warmup))
    uncompile(model for model, _ in systems)
    return passes


def exits_and_accuracy(timing: Timing, num_exits: int, device: torch.device) -> tuple[list[float], float]:
    """Return the share of images per exit, and top-1 accuracy in percent, of a pass over all processes."""
    counts = torch.zeros(num_exits + 1, dtype=torch.int64, device=device)  # the last is of correct images
    for (logits, exits), target in zip(timing.outputs, timing.targets, strict=True):
        correct = (logits.argmax(dim=-1) == target).sum()
        counts += torch.cat([torch.bincount(exits, minlength=num_exits), correct[None]])
    *taken, correct = utils.sum_over_ranks(counts).tolist()
    return [count / sum(taken) for count in taken], 100 * correct / sum(taken)


@torch.inference_mode()
def cost_depends_on_image(model: Adaptive, precision: Precision) -> bool:
    """Return whether what some stage costs depends on the image."""
    with precision.autocast():
        outputs = model(torch.zeros(1, 3, model.img_size, model.img_size, device=precision.device))
    return any(model.image_gflops(k, output.info) is not None for k, output in enumerate(outputs))


def speeds(passes: list[Timing], context: utils.Context) -> list[Any]:
    """Return median and spread of images/s in the model, then those in all, over all processes."""
    table = torch.tensor([timing.rates() for timing in passes], device=context.device)
    cells: list[Any] = []
    for column in utils.sum_over_ranks(table).T.tolist():
        cells += [statistics.median(column), f"{min(column):.4g}-{max(column):.4g}"]
    return cells


def report(
    session: Session, timed: dict[str, Any], thresholds: list[float], rows: list[list[Any]], repeats: int
) -> None:
    """Print what `time_early_exit` stores."""
    if not session.context.is_main:
        return
    stages = zip(timed["exit_shares"], session.model.stage_names, strict=True)
    leaving = ", ".join(f"{100 * share:.1f} % {stage}" for share, stage in stages)
    levels = threshold_text(thresholds)
    print(f"\nthreshold {levels}: top-1 {timed['accuracy']:.2f} %; leaving at {leaving}")
    header = ["", "GFLOPs", "images/s in the model", "spread", "images/s with loading", "spread"]
    device = session.context.device
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    title = f"median of {repeats} passes, batch {session.loading.batch_size}, {machine}"
    session.print_table(title, header, rows)
    if "baseline" in timed:
        saved = timed["baseline"]["gflops"] / timed["mean_gflops"]
        name = timed["baseline"]["model"]
        print(f"\nspeed-up {timed['speedup']:.2f}x over {name}, GFLOPs saved {saved:.2f}x")
