"""Inference with early exit: accuracy of every exit, threshold sweep, measured speed, budgets, prediction.

python dynamic_inference.py --eval-mode 1 --data_url data/digits --checkpoint_path output/nano/checkpoint.pth
python dynamic_inference.py --images photos --checkpoint_path output/nano/checkpoint.pth > predictions.csv
"""

if __name__ == "__main__":  # the imports take seconds
    from checkpointing.interrupt import exit_on_interrupt

    exit_on_interrupt()

import argparse
import os
from pathlib import Path

import torch

import datasets
import utils
from benchmarks.early_exit import TimedPasses, time_early_exit
from checkpointing.format import load_checkpoint, load_json
from datasets import DataSource
from engine import Precision
from inference import streaming
from inference.budgets import (
    SOLVERS,
    Calibration,
    add_threshold_flags,
    choose_thresholds,
    solve_budget,
    solve_curve,
)
from inference.evaluation import evaluate_exits, print_stored, sweep_thresholds, vary_knob
from inference.prediction import predict_files
from inference.session import Loading, ResultFile, add_precision, open_model, open_session
from models import flags, registry
from utils import NON_NEGATIVE, NON_NEGATIVE_INT, POSITIVE_INT, InputError

MODES = {
    0: "accuracy of each exit",
    1: "the checkpoint's thresholds, or a sweep over thresholds",
    2: "early exit at --threshold, --point or --stored-budget, timed",
    3: "stored results",
}


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    flags.add_model_flags(parser)
    knobs = dict.fromkeys(name for cls in registry.classes() for name in cls.knobs)
    add("--checkpoint_path", "--resume", metavar="FILE", required=True)
    flags.add_use_ema(parser)
    datasets.add_config_arguments(parser)
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
    add("--batch_size", "--batch-size", type=POSITIVE_INT, default=64)
    add(
        "--num_workers",
        "--workers",
        type=NON_NEGATIVE_INT,
        default=min(8, os.cpu_count() or 1),
        help="loading processes",
    )
    datasets.add_bad_images(parser)
    datasets.add_device_normalize(parser)
    add_threshold_flags(parser)
    add("--repeats", type=POSITIVE_INT, default=3, help="mode 2: timed passes over the data")
    add("--warmup", type=NON_NEGATIVE_INT, default=3, help="mode 2: untimed batches before each pass")
    add("--baseline", metavar="MODEL", help="mode 2: time this model, unexited, on the same images in turn")
    streaming.add_compile(parser)
    add("--sweep", action="store_true", help="mode 1: sweep even if the checkpoint has thresholds")
    add_solver_flags(parser)
    add(
        "--vary",
        nargs="+",
        metavar=("NAME", "VALUE"),
        help=f"evaluate at several values of {', '.join(knobs)}, as far as the model has it; store the curve",
    )
    add("--boxes", metavar="CSV", help="mode 0: object boxes; reports how much of them the region covers")
    add("--images", metavar="PATH", help="predict on an image or a folder of unlabelled images")
    add("--output", type=Path, metavar="CSV", help="--images: the table's file; default: standard output")
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON file that gets the results instead of the checkpoint",
    )
    utils.add_device(parser)
    add_precision(parser)
    return parser


def add_solver_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that solve for thresholds on calibration images."""
    add = parser.add_argument
    add("--budget", type=NON_NEGATIVE, metavar="GFLOPS", help="solve for the threshold of this mean cost")
    add(
        "--solve",
        choices=SOLVERS,
        help="solve for the thresholds of 59 budgets and store them (with --budget: joint only, of one): "
        + "; ".join(f"{name}: {text}" for name, text in SOLVERS.items()),
    )
    add(
        "--calibration",
        metavar="SPLIT",
        help="--budget, --solve: solve on this split; default: on every other image of --split, and test on"
        " the rest",
    )
    add(
        "--calibration-images",
        type=POSITIVE_INT,
        default=50000,
        help="at most so many of them, drawn at random",
    )


def parse() -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: flags do not go together.
        OSError: a file to be written cannot be.
    """
    args = make_parser().parse_args()
    if args.boxes and args.max_bad_images:
        raise InputError("--boxes needs every image: not with --max-bad-images")
    if args.budget is not None and args.solve == "geometric":
        raise InputError("--budget goes with --solve joint: geometric shares are not made for one budget")
    if args.vary and len(args.vary) == 1:
        raise InputError(f"--vary takes a name and numbers, not {args.vary[0]} alone")
    if args.output and not args.images:
        raise InputError("--output goes with --images: --results is for results of labelled images")
    evaluates = not (args.solve or args.vary) and args.budget is None
    if not (args.images or evaluates and args.eval_mode == 2):
        for flag, value in (("--point", args.point), ("--stored-budget", args.stored_budget)):
            if value is not None:
                raise InputError(f"{flag} goes with --eval-mode 2 and --images")
    return args


def check_outputs(args: argparse.Namespace, results: ResultFile) -> None:
    """Check, before the work, that what is to be written can be.

    Raises:
        InputError: the checkpoint's layout takes no results.
        OSError: a file cannot be written.
    """
    if args.output:
        if not args.output.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output {args.output}: name a file in a folder that exists")
        utils.check_writable(args.output, "name another with --output")
    if args.results or not args.images and args.budget is None:  # these two store nothing in a checkpoint
        results.check()


def main() -> None:
    args = parse()
    context = utils.start(args.device, require_cuda=args.require_cuda)
    utils.start_logging(context)
    utils.log_device(context, args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    evaluates = not (args.images or args.solve or args.vary) and args.budget is None  # as --eval-mode says
    if evaluates and args.eval_mode == 3:
        return print_stored(args.checkpoint_path, args.results) if context.is_main else None
    precision = Precision.inference(context.device, args.amp, args.weights)
    # The model with its data
    checkpoint = load_checkpoint(args.checkpoint_path)
    results = ResultFile(Path(args.checkpoint_path), args.results)
    utils.by_main(context, lambda: check_outputs(args, results))
    kwargs = flags.constructor_kwargs(vars(args))
    config = datasets.given_config(vars(args))
    trained = open_model(checkpoint, args.checkpoint_path, args.model, kwargs, args.use_ema, config)
    written = args.results or args.output
    bad_list = written.with_name("bad_images.txt") if written else None
    loading = Loading(args.batch_size, args.num_workers, args.max_bad_images, bad_list, args.device_normalize)
    source = DataSource.of(args, args.data_url)
    session = open_session(trained, source, args.split, context, precision, loading, results)
    # What is asked of it
    stored = load_json(args.results) if args.results and args.results.is_file() else None
    point = args.threshold, args.point, args.stored_budget, stored
    calibration = Calibration(args.calibration, args.calibration_images)
    if args.images:
        predict_files(session, args.images, choose_thresholds(trained, *point), args.output)
    elif args.budget is not None:
        solve_budget(session, calibration, args.budget, joint=args.solve == "joint")
    elif args.solve:
        solve_curve(session, calibration, args.solve)
    elif args.vary:
        vary_knob(session, args.vary[0], args.vary[1:])
    elif args.eval_mode == 0:
        evaluate_exits(session, args.boxes)
    elif args.eval_mode == 1:
        sweep_thresholds(session, ignore_stored=args.sweep)
    else:
        options = TimedPasses(args.repeats, args.warmup, args.baseline, args.compile)
        time_early_exit(session, choose_thresholds(trained, *point), options)
    utils.log.info("these are results of %s, %s", args.checkpoint_path, trained.which_weights())


if __name__ == "__main__":
    utils.run_command(main)
