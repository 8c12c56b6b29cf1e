"""Pictures of what a model looks at, and of what early exit costs and gives.

python visualize.py --resume output/nano/checkpoint.pth --data-path data/digits --output_dir pictures
python visualize.py --resume output/nano/checkpoint.pth --data-path data/digits --per-class
python visualize.py --resume output/nano/checkpoint.pth --curve --output_dir pictures
"""

if __name__ == "__main__":  # the imports take seconds
    from checkpointing.interrupt import exit_on_interrupt

    exit_on_interrupt()

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

import datasets
import utils
from checkpointing.format import Results, load_checkpoint, load_json
from inference.budgets import add_threshold_flags, choose_thresholds
from inference.pictures import (
    check_picture_name,
    contact_sheet,
    draw_all,
    draw_classes,
    draw_curve,
    explain,
    save,
)
from inference.session import open_model
from loading import loaders
from models import flags
from utils import NON_NEGATIVE_INT, POSITIVE_INT, InputError, log


def baseline(text: str) -> tuple[str, float, float]:
    """Read a value of --baseline; argparse reports the error."""
    try:
        name, gflops, accuracy = text.rsplit(":", 2)
        return name, float(gflops), float(accuracy)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:GFLOPS:ACCURACY") from error


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    flags.add_model_flags(parser)
    add("--resume", "--checkpoint_path", metavar="FILE", required=True, help="checkpoint")
    flags.add_use_ema(parser)
    datasets.add_config_arguments(parser)
    add("--output_dir", default="test_img", metavar="DIR", help="where pictures go")
    add("--data-path", "--data_url", metavar="DIR", help="data folder")
    datasets.add_data_arguments(parser)
    add("--split", default="val", help="folder of the data set")
    add("--images", "--img-path", metavar="PATH", help="an image or a folder of images instead of a data set")
    add("--save-name", metavar="FILE", help="name of the picture of a single image")
    add(
        "--num-images",
        "--n_visualization",
        type=POSITIVE_INT,
        default=24,
        help="how many images of the data set, drawn at random",
    )
    add("--per-class", action="store_true", help="draw of each class the image with the most varied depths")
    add("--batch-size", type=POSITIVE_INT, default=64)
    workers = min(8, os.cpu_count() or 1)
    add(
        "--num_workers",
        "--workers",
        type=NON_NEGATIVE_INT,
        default=workers,
        help="loading processes of --per-class",
    )
    datasets.add_bad_images(parser)
    add_threshold_flags(parser)
    add("--columns", type=POSITIVE_INT, default=2, help="of the contact sheet")
    add("--seed", type=NON_NEGATIVE_INT, default=0, help="of the random draw")
    utils.add_device(parser)
    add("--curve", action="store_true", help="draw accuracy against GFLOPs instead, from stored results")
    results = "--curve, --point, --stored-budget: take the results from this JSON, not the checkpoint"
    add("--results", metavar="FILE", help=results)
    add(
        "--baseline",
        type=baseline,
        metavar="NAME:GFLOPS:ACCURACY",
        action="append",
        default=[],
        help="a point of the curve",
    )
    return parser


def parse() -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: flags do not go together, or there is nothing to draw.
        OSError: the folder of the pictures cannot be written to.
    """
    args = make_parser().parse_args()
    if args.curve and (args.point is not None or args.stored_budget is not None):
        raise InputError("--point and --stored-budget choose where images leave: not with --curve")
    if args.results and not args.curve and args.point is None and args.stored_budget is None:
        raise InputError("--results goes with --curve, --point and --stored-budget")
    if args.save_name:
        check_picture_name(Path(args.save_name))
    utils.check_writable(Path(args.output_dir, "contact_sheet.png"), "name another folder with --output_dir")
    if args.per_class and (args.images or not args.data_path):
        raise InputError("--per-class needs labelled images: --data-path DIR, without --images")
    if not (args.images or args.data_path or args.curve):
        raise InputError("nothing to draw: give --data-path DIR or --images PATH, or --curve")
    return args


def stored_curve(checkpoint: dict[str, Any], file: str, results: str | None) -> Results:
    """Return the results of a checkpoint, or of a JSON file in its stead; InputError if there is no curve."""
    stored = Results.of(load_json(results) if results else checkpoint)
    if stored.budgeted_batch_classification is None:
        raise InputError(f"{results or file} holds no curve: run dynamic_inference.py --eval-mode 1 first")
    return stored


def main() -> None:
    args = parse()
    context = utils.start(args.device, require_cuda=args.require_cuda)
    utils.start_logging(context)
    utils.log_device(context, args.device)
    folder, checkpoint = Path(args.output_dir), load_checkpoint(args.resume)
    if args.curve:
        results = stored_curve(checkpoint, args.resume, args.results)
        name = args.model or checkpoint.get("model_name") or Path(args.resume).stem
        folder.mkdir(parents=True, exist_ok=True)
        draw_curve({name: results}, folder / "curve.png", args.baseline)
        return log.info("wrote %s", folder / "curve.png")
    # The model, and which images
    kwargs = flags.constructor_kwargs(vars(args))
    config = datasets.given_config(vars(args))
    trained = open_model(checkpoint, args.resume, args.model, kwargs, args.use_ema, config)
    model, classes = trained.model.to(context.device), trained.class_names
    if args.images:
        dataset = datasets.Files(args.images, trained.transform())
        indices = range(len(dataset))
    else:
        dataset = trained.dataset(datasets.DataSource.of(args, args.data_path), args.split)
        classes = dataset.classes
        indices = np.random.default_rng(args.seed).permutation(len(dataset))[: args.num_images].tolist()
    stored = load_json(args.results) if args.results else None
    point = args.threshold, args.point, args.stored_budget, stored
    run = dict(config=trained.config, thresholds=choose_thresholds(trained, *point))
    shard = loaders.Shard(dataset, max_bad=args.max_bad_images, bad_list=folder / "bad_images.txt")
    # The pictures
    if args.per_class:
        loader = loaders.EvalLoader(shard, args.batch_size, num_workers=args.num_workers)
        draw_classes(model, loader, **run, folder=folder, classes=classes, columns=args.columns)
        return log.info("drawn with %s", trained.which_weights())
    if args.max_bad_images:
        indices = loaders.readable(shard, indices)
    items = explain(model, dataset, indices, **run, batch_size=args.batch_size, labelled=not args.images)
    pictures = draw_all(items, model.stage_names, classes)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (index, item) in enumerate(zip(indices, items, strict=True), 1):
        start = f"label{item.label}_{'right' if item.predicted == item.label else 'wrong'}"
        start = dataset.paths[index].stem if args.images else start
        name = f"{start}_{model.stage_names[item.exit]}_index{number}.png"
        if args.images and args.save_name and len(items) == 1:
            name = Path(args.save_name).name
        save(pictures[number - 1], folder / name)
    save(contact_sheet(pictures, args.columns), folder / "contact_sheet.png")
    log.info("wrote %d pictures and contact_sheet.png to %s", len(items), folder)
    log.info("drawn with %s", trained.which_weights())


if __name__ == "__main__":
    utils.run_command(main)
