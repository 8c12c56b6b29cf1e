"""Inference with early exit: accuracy of every exit, threshold sweep, measured speed, budgets, prediction.

python dynamic_inference.py --eval-mode 1 --data_url data/digits --checkpoint_path output/nano/checkpoint.pth
python dynamic_inference.py --images photos --checkpoint_path output/nano/checkpoint.pth > predictions.csv
"""

import argparse
import csv
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import datasets
import utils
from benchmarks.timing import Timing, time_pass
from checkpointing.format import Results, load_checkpoint, load_json
from engine import cascade
from inference import streaming
from inference.budgets import SOLVERS, mode_budget, mode_solve, stored_thresholds, with_last
from inference.session import Session, open_session, show, show_exits, store
from inference.streaming import ExitStream, all_stages, compile_models
from inference.thresholds import NEVER
from models import flags
from models.cost import exit_gflops, token_gflops
from models.exits import confidence, operating_points, uniform_thresholds
from models.selection import bounding_box
from models.weights import baseline_model
from utils import log

MODES = {
    0: "accuracy of each exit",
    1: "the checkpoint's thresholds, or a sweep over thresholds",
    2: "early exit at --threshold, timed",
    3: "stored results",
}


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    flags.add_model_flags(parser)
    add("--checkpoint_path", "--resume", metavar="FILE", required=True)
    add("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add(
        "--eval-mode",
        type=int,
        default=1,
        choices=MODES,
        help="; ".join(f"{k} {v}" for k, v in MODES.items()),
    )
    add("--data_url", "--data-path", default="./data", metavar="DIR", help="data folder")
    datasets.add_data_arguments(parser)
    add("--split", default="val", help="folder of the data set to evaluate on")
    add("--batch_size", "--batch-size", type=int, default=64)
    add("--num_workers", "--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes")
    datasets.add_bad_images(parser)
    datasets.add_device_normalize(parser)
    add("--threshold", type=float, default=0.5, help="confidence that lets an image leave early, 0 to 1")
    add("--repeats", type=int, default=3, help="mode 2: timed passes over the data")
    add("--warmup", type=int, default=3, help="mode 2: untimed batches before each pass")
    add("--baseline", metavar="MODEL", help="mode 2: time this model, unexited, on the same images in turn")
    streaming.add_compile(parser)
    add("--sweep", action="store_true", help="mode 1: sweep even if the checkpoint has thresholds")
    add("--budget", type=float, metavar="GFLOPS", help="find the threshold for this mean cost")
    add(
        "--solve",
        choices=SOLVERS,
        help="find and store thresholds of 59 budgets (with --budget: joint only, of one): "
        + "; ".join(f"{name}: {text}" for name, text in SOLVERS.items()),
    )
    add(
        "--vary",
        nargs="+",
        metavar=("NAME", "VALUE"),
        help="evaluate at several values of keep_rate (EViT) or gate_center (A-ViT) and store the curve",
    )
    add(
        "--calibration",
        metavar="SPLIT",
        help="--budget, --solve: find them on this split; default: on every other image of --split, and"
        " test on the rest",
    )
    add("--calibration-images", type=int, default=50000, help="at most so many of them, drawn at random")
    add("--boxes", metavar="CSV", help="mode 0: object boxes; reports how much of them the region covers")
    add("--images", metavar="PATH", help="predict on an image or a folder of unlabelled images")
    add("--output", metavar="CSV", help="--images: where the table goes; default: standard output")
    add("--results", metavar="FILE", help="write results to this JSON instead of into the checkpoint")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--amp", default="none", choices=("none", "fp16", "bf16"), help="autocast")
    return parser


class Coverage:
    """Mean share of each object's box that the region of its image covers."""

    def __init__(self, file: str, dataset: Dataset, session: Session):
        self.sums = torch.zeros(2, dtype=torch.float64, device=session.context.device)
        size, crop = session.model.img_size, session.config["crop_pct"]
        if crop != 1:
            raise ValueError(
                "--boxes are in the pixels of the images: they need a checkpoint with --crop-pct 1"
            )
        if not hasattr(dataset, "samples"):
            raise ValueError("--boxes goes with image files: --data-set IMNET")
        root, found = Path(session.args.data_url), {}
        if not Path(file).is_file():
            raise FileNotFoundError(f"no file {file}")
        with open(file, newline="") as opened:
            for row in csv.DictReader(opened):
                try:
                    found[str(root / row["file"])] = [
                        float(row[side]) for side in ("left", "top", "right", "bottom")
                    ]
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{file} needs the columns file, left, top, right, bottom") from error
        paths = [str(Path(path)) for path, _ in dataset.samples]
        if lost := [path for path in paths if path not in found]:
            raise ValueError(f"{file} has no box for {lost[0]}")
        boxes = torch.tensor([found[path] for path in paths]).clamp(0, size)
        self.boxes = boxes[session.context.rank :: session.context.world_size].to(session.context.device)
        self.patch, self.seen = session.model.patch_size, 0

    def add(self, images: Tensor, outputs: list) -> None:
        region = outputs[-1].info.get("region")
        if region is None:
            raise ValueError("--boxes: this model chooses no region")
        box = self.boxes[self.seen : self.seen + len(images)]
        self.seen += len(images)
        region = region * self.patch
        overlap = torch.minimum(box[:, 2:], region[:, 2:]) - torch.maximum(box[:, :2], region[:, :2])
        share = overlap.clamp(min=0).prod(dim=-1) / (box[:, 2:] - box[:, :2]).prod(dim=-1)
        self.sums += torch.stack([share.double().sum(), torch.tensor(len(images)).to(share)])

    def mean(self) -> float:
        total, count = utils.sum_over_ranks(self.sums).tolist()
        return 100 * total / count


def mode_exits(session: Session) -> None:
    """Mode 0: all images to every exit."""
    dataset, extra = session.dataset(session.args.split), {}
    coverage = Coverage(session.args.boxes, dataset, session) if session.args.boxes else None
    predictions = session.predict(dataset, coverage.add if coverage else None)
    accuracy = show_exits(session, predictions)
    if coverage:
        extra["region_coverage"] = coverage.mean()
        if session.context.is_main:
            print(f"\nthe region covers {extra['region_coverage']:.1f} % of an object's box on average")
    store(session, Results(flops=session.gflops, anytime_classification=accuracy), extra)


def mode_sweep(session: Session) -> None:
    """Mode 1: the checkpoint's thresholds, or 0.00, 0.01, ... 1.00 for all exits, from one pass over the
    data."""
    stored = None if session.args.sweep else stored_thresholds(session)
    thresholds = uniform_thresholds(101, session.model.num_exits) if stored is None else stored
    predictions = session.predict(session.dataset(session.args.split))
    accuracy = show_exits(session, predictions)
    curve = operating_points(predictions, thresholds, session.gflops)
    if session.context.is_main:
        rows = []
        for at in range(0, len(thresholds), 4 if len(thresholds) == 59 else 5):
            levels = ["never" if t >= NEVER else f"{t:.2f}" for t in thresholds[at].tolist()]
            same = len(set(levels)) <= 1
            rows.append([" ".join(levels[:1] if same else levels), curve.gflops[at].item()])
            rows[-1] += [curve.accuracy[at].item(), *(100 * share for share in curve.shares[at].tolist())]
        leaving = [f"{stage} %" for stage in session.model.stage_names]
        title = "early exit by threshold" if stored is None else "early exit at the checkpoint's thresholds"
        if session.model.num_exits > 1:
            show(title, ["threshold", "mean GFLOPs", "top-1 %", *leaving], rows)
    budgeted = [curve.gflops.tolist(), curve.accuracy.tolist()]
    store(session, Results(session.gflops, accuracy, budgeted, with_last(thresholds)), {})


def mode_vary(session: Session) -> None:
    """--vary: one operating point per value of what the model lets change after training."""
    model, (name, *values) = session.model, session.args.vary
    if name not in model.knobs:
        told = f"it takes {', '.join(model.knobs)}" if model.knobs else "this model has nothing to vary"
        raise ValueError(f"--vary {name}: {told}")
    dataset, rows = session.dataset(session.args.split), []
    for value in map(float, values):
        setattr(model, name, value)
        predictions = session.predict(dataset)
        cost = (
            exit_gflops(model)[-1] if predictions.gflops is None else predictions.gflops[:, -1].mean().item()
        )
        rows.append([value, cost, predictions.summary()[f"exit{model.num_exits - 1}_acc1"]])
    if session.context.is_main:
        show(f"{name} after training", [name, "mean GFLOPs", "top-1 %"], rows)
    _, costs, accuracy = zip(*rows, strict=True)
    results = Results(budgeted_batch_classification=[list(costs), list(accuracy)])
    store(session, results, {"varied": {name: [row[0] for row in rows]}})


def mode_timed(session: Session) -> None:
    """Mode 2: early exit for real, later stages only for the images that need them."""
    args, model, device = session.args, session.model, session.context.device
    loader = session.loader(session.dataset(args.split))

    plain = baseline_model(args.baseline, model.num_classes, model.img_size) if args.baseline else None
    baseline_gflops = exit_gflops(plain)[-1] if plain else None
    if plain:
        if plain.img_size != model.img_size:
            raise ValueError(
                f"--baseline {args.baseline} takes {plain.img_size} pixels, the model {model.img_size}"
            )
        plain.to(device).eval()

    systems = [(model, session.thresholds())] + ([(plain, [])] if plain else [])
    if args.compile:
        runs = {system: all_stages(system, session.precision, args.batch_size) for system, _ in systems}
        if reason := compile_models(runs, args.compile):
            log.info("not compiled: %s", reason)
    streams = [
        ExitStream(system, session.precision, thresholds, args.batch_size, pad=bool(args.compile))
        for system, thresholds in systems
    ]
    passes: list[list[Timing]] = [[] for _ in streams]
    for _ in range(args.repeats):
        for stream, timings in zip(streams, passes, strict=True):
            timings.append(time_pass(stream, loader, device, args.warmup))
    ours = passes[0]

    loader.dataset.bad.report(device)
    rows = [
        torch.stack([exits, logits.argmax(dim=-1) == target])
        for (logits, exits), target in zip(ours[0].outputs, ours[0].targets, strict=True)
    ]
    exits, correct = torch.cat([torch.zeros(2, 0, dtype=torch.int64, device=device), *rows], dim=1)
    tally = torch.cat([torch.bincount(exits, minlength=model.num_exits), correct.sum()[None]])
    *left, right = utils.sum_over_ranks(tally).tolist()
    shares, accuracy = [count / sum(left) for count in left], 100 * right / sum(left)
    mean_gflops = sum(share * cost for share, cost in zip(shares, session.gflops, strict=True))
    if (own := session.predict(loader.dataset.dataset).gflops) is not None and model.num_exits == 1:
        mean_gflops = own.mean().item()
    rows = [["early exit", mean_gflops, *speeds(ours, session.context)]]
    if plain:
        rows.append([args.baseline, baseline_gflops, *speeds(passes[1], session.context)])
    extra = {
        "threshold": args.threshold,
        "exit_shares": shares,
        "accuracy": accuracy,
        "mean_gflops": mean_gflops,
        "images_per_second": rows[0][2],
        "images_per_second_end_to_end": rows[0][4],
    }
    if plain:
        extra["baseline"] = {
            "model": args.baseline,
            "gflops": baseline_gflops,
            "images_per_second": rows[1][2],
        }
        extra["speedup"] = rows[0][2] / rows[1][2]
    if session.context.is_main:
        leaving = ", ".join(
            f"{100 * s:.1f} % {name}" for s, name in zip(shares, model.stage_names, strict=True)
        )
        print(f"\nthreshold {args.threshold}: top-1 {accuracy:.2f} %; leaving at {leaving}")
        header = ["", "GFLOPs", "images/s in the model", "spread", "images/s with loading", "spread"]
        show(f"median of {args.repeats} passes, batch {args.batch_size}, {describe(device)}", header, rows)
        if plain:
            saved = baseline_gflops / mean_gflops
            print(f"\nspeed-up {extra['speedup']:.2f}x over {args.baseline}, GFLOPs saved {saved:.2f}x")
    store(session, Results(flops=session.gflops), {"timed": extra})


def speeds(passes: list, context: utils.Context) -> list[Any]:
    """Median and spread of images/s inside the model and in all, over all processes."""
    table = utils.sum_over_ranks(torch.tensor([p.rates() for p in passes], device=context.device)).cpu()
    cells: list[Any] = []
    for column in table.T.tolist():
        cells += [statistics.median(column), f"{min(column):.4g}-{max(column):.4g}"]
    return cells


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def mode_images(session: Session) -> None:
    """--images: one line of CSV per picture."""
    args, model = session.args, session.model
    dataset = datasets.Files(args.images, session.transform())
    loader, names = session.loader(dataset), session.checkpoint.get("class_names")
    lines: list[tuple[int, list]] = []
    for images, numbers in loader:
        images = images.to(session.context.device)
        found: list[list] = [[] for _ in images]
        with session.precision.autocast():
            steps = list(cascade(model, images, session.thresholds()))
        for step in steps:
            sure, best = confidence(step.output.logits).tolist(), step.output.logits.argmax(dim=-1).tolist()
            info, regions = step.output.info, None
            costs = [session.gflops[step.exit]] * len(best)
            if "tokens" in info:
                costs = token_gflops(model, info["tokens"]).tolist()
            if "kept" in info:  # without a region of its own: the box around the refined patches
                regions = info.get("region", bounding_box(info["kept"], model.img_size // model.patch_size))
            for at, row in enumerate(step.rows.tolist()):
                label = names[best[at]] if names else best[at]
                box = ""
                if regions is not None:
                    region = [value * model.patch_size for value in regions[at].tolist()]
                    region = dataset.in_original(int(numbers[row]), region, model.img_size, session.config)
                    box = " ".join(map(str, region))
                found[row] = [label, f"{sure[at]:.4f}", model.stage_names[step.exit]]
                found[row] += [f"{costs[at]:.4f}", box]
        lines += [(number, cells) for number, cells in zip(numbers.tolist(), found, strict=True)]
    bad = loader.dataset.bad
    bad.report(session.context.device)
    lines += [(number, [""] * 5) for number in bad.numbers() if session.context.is_main]
    merged = sorted(line for part in utils.gather(lines) for line in part)
    if not session.context.is_main:
        return
    table = [["file", "class", "confidence", "exit", "GFLOPs", "region"]]
    table += [[str(dataset.paths[number]), *cells] for number, cells in merged]
    if args.output:
        utils.write_atomically(Path(args.output), lambda path: write_csv(table, path))
        log.info("%d predictions written to %s", len(merged), args.output)
    else:
        csv.writer(sys.stdout).writerows(table)


def write_csv(table: list[list], path: Path) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)


def mode_stored(args: argparse.Namespace) -> None:
    """Mode 3: what the checkpoint holds; needs neither data nor a model."""
    checkpoint = load_checkpoint(args.checkpoint_path)
    results = Results.of(load_json(args.results) if args.results else checkpoint)
    print(f"{args.checkpoint_path}: {checkpoint.get('model_name', 'no model name')}")
    for name in ("epoch", "best", "model_kwargs", "data_config"):
        if name in checkpoint:
            print(f"{name}: {checkpoint[name]}")
    print(f"flops: {results.flops}\nanytime_classification: {results.anytime_classification}")
    if results.budgeted_batch_classification:
        rows = [list(row) for row in zip(*results.budgeted_batch_classification, strict=True)]
        show("budgeted_batch_classification", ["GFLOPs", "top-1 %"], rows)
    else:
        print("budgeted_batch_classification: None")


def main() -> None:
    args = make_parser().parse_args()
    utils.check_range("--threshold", args.threshold, 0, 1)
    for name in ("batch_size", "repeats", "calibration_images"):
        utils.check_range(f"--{name}", getattr(args, name), 1)
    utils.check_range("--max-bad-images", args.max_bad_images, 0)
    if args.boxes and args.max_bad_images:
        raise ValueError("--boxes needs every image: not with --max-bad-images")
    if args.budget is not None:
        utils.check_range("--budget", args.budget, 0)
        if args.solve == "geometric":
            raise ValueError("--budget goes with --solve joint: geometric shares are not made for one budget")
    if args.vary:
        try:
            list(map(float, args.vary[1:]))[0]
        except (ValueError, IndexError) as error:
            raise ValueError("--vary takes a name and numbers, as --vary keep_rate 0.5 0.7 1") from error
    for name in ("output", "results"):
        path = getattr(args, name)
        if (
            path
            and Path(path).is_dir()
            or name == "output"
            and path
            and not Path(path).absolute().parent.is_dir()
        ):
            raise FileNotFoundError(f"--{name} {path}: name a file in a folder that exists")
    context = utils.start(args.device)
    utils.start_logging(context)
    if args.eval_mode == 3 and not (args.images or args.solve or args.vary) and args.budget is None:
        return mode_stored(args) if context.is_main else None
    session = open_session(args, context)
    if args.images:
        mode_images(session)
    elif args.budget is not None:
        mode_budget(session)
    elif args.solve:
        mode_solve(session)
    elif args.vary:
        mode_vary(session)
    else:
        (mode_exits, mode_sweep, mode_timed)[args.eval_mode](session)


if __name__ == "__main__":
    utils.run_command(main)
