"""Pictures of what a model looks at, and of what early exit costs and gives.

    python visualize.py --model lf_deit_nano --resume output/nano/checkpoint.pth --data-path data/digits \\
        --output_dir pictures
    python visualize.py --resume output/avit/checkpoint.pth --data-path data/digits --per-class
    python visualize.py --resume output/nano/checkpoint.pth --curve --output_dir pictures
"""

import argparse
import os
from pathlib import Path

import numpy as np

import datasets
import utils
from checkpointing.format import Results, load_checkpoint, load_json
from inference.pictures import (
    Line,
    contact_sheet,
    draw_classes,
    draw_curve,
    explain,
    picture,
    save,
)
from loading import loaders
from models import flags
from models.weights import model_from_checkpoint
from utils import log


def parse_baseline(text: str) -> tuple[str, float, float]:
    try:
        name, gflops, accuracy = text.rsplit(":", 2)
        return name, float(gflops), float(accuracy)
    except ValueError as error:
        raise ValueError(f"--baseline takes NAME:GFLOPS:ACCURACY, not {text!r}") from error


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    flags.add_model_flags(parser)
    add("--resume", "--checkpoint_path", metavar="FILE", required=True, help="checkpoint")
    add("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add("--output_dir", default="test_img", metavar="DIR", help="where pictures go")
    add("--data-path", "--data_url", metavar="DIR", help="data folder")
    datasets.add_data_arguments(parser)
    add("--split", default="val", help="folder of the data set")
    add("--images", "--img-path", metavar="PATH", help="an image or a folder of images instead of a data set")
    add("--save-name", metavar="FILE", help="name of the picture of a single image")
    add(
        "--num-images",
        "--n_visualization",
        type=int,
        default=24,
        help="how many images of the data set, drawn at random",
    )
    add("--per-class", action="store_true", help="draw of each class the image with the most varied depths")
    add("--batch-size", type=int, default=64)
    workers = min(8, os.cpu_count() or 1)
    add("--num_workers", "--workers", type=int, default=workers, help="loading processes of --per-class")
    datasets.add_bad_images(parser)
    add("--threshold", type=float, default=0.7, help="confidence that lets an image leave early")
    add("--columns", type=int, default=2, help="of the contact sheet")
    add("--seed", type=int, default=0, help="of the random draw")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--curve", action="store_true", help="draw accuracy against GFLOPs instead, from stored results")
    add("--results", metavar="FILE", help="with --curve: take the results from this JSON, not the checkpoint")
    add(
        "--baseline", metavar="NAME:GFLOPS:ACCURACY", action="append", default=[], help="a point of the curve"
    )
    return parser


def draw_stored_curve(args: argparse.Namespace, folder: Path) -> None:
    checkpoint = load_checkpoint(args.resume)
    stored = load_json(args.results) if args.results else checkpoint
    results = Results.of(stored)
    if results.budgeted_batch_classification is None:
        raise ValueError(
            f"{args.results or args.resume} holds no curve: run dynamic_inference.py --eval-mode 1 first"
        )
    name = args.model or checkpoint.get("model_name") or Path(args.resume).stem
    baselines = [parse_baseline(text) for text in args.baseline]
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve([Line(name, results)], folder / "curve.png", baselines)
    log.info("wrote %s", folder / "curve.png")


def main() -> None:
    args = make_parser().parse_args()
    context = utils.start(args.device)
    utils.start_logging(context)
    folder = Path(args.output_dir)
    if args.curve:
        return draw_stored_curve(args, folder)
    if args.per_class and (args.images or not args.data_path):
        raise ValueError("--per-class needs labelled images: --data-path DIR, without --images")
    utils.check_range("--threshold", args.threshold, 0, 1)
    utils.check_range("--num-images", args.num_images, 1)
    utils.check_range("--batch-size", args.batch_size, 1)
    utils.check_range("--max-bad-images", args.max_bad_images, 0)
    utils.check_range("--columns", args.columns, 1)
    checkpoint = load_checkpoint(args.resume)
    model, _, _ = model_from_checkpoint(
        checkpoint, args.resume, args.model, flags.constructor_kwargs(vars(args)), args.use_ema
    )
    model.to(context.device)
    config = datasets.data_config(model.recipe, checkpoint)
    transform = datasets.eval_transform(model.img_size, config)
    classes = checkpoint.get("class_names")
    if args.images:
        dataset = datasets.Files(args.images, transform)
        indices = range(len(dataset))
    elif args.data_path:
        source = datasets.DataSource.of(args, args.data_path)
        dataset = datasets.build_dataset(source, args.split, transform, classes)
        datasets.check_classes(dataset, model.num_classes)
        classes = dataset.classes
        indices = np.random.default_rng(args.seed).permutation(len(dataset))[: args.num_images].tolist()
    else:
        raise ValueError("nothing to draw: give --data-path DIR or --images PATH, or --curve")
    thresholds = [args.threshold] * (model.num_exits - 1)
    shard = loaders.Shard(dataset, max_bad=args.max_bad_images, bad_list=folder / "bad_images.txt")
    if args.per_class:
        loader = loaders.EvalLoader(shard, args.batch_size, num_workers=args.num_workers)
        return draw_classes(model, loader, config, thresholds, folder, classes, args.columns)
    if args.max_bad_images:
        indices = loaders.readable(shard, indices)
    items = explain(model, dataset, indices, config, thresholds, args.batch_size, labelled=not args.images)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (index, item) in enumerate(zip(indices, items, strict=True), 1):
        stage = model.stage_names[item.exit]
        if args.images:
            name = f"{dataset.paths[index].stem}_{stage}_index{number}.png"
            if args.save_name and len(items) == 1:
                name = Path(args.save_name).name
        else:
            outcome = "right" if item.predicted == item.label else "wrong"
            name = f"label{item.label}_{outcome}_{stage}_index{number}.png"
        save(picture(item, model.stage_names, classes), folder / name)
    save(contact_sheet(items, model.stage_names, classes, args.columns), folder / "contact_sheet.png")
    log.info("wrote %d pictures and contact_sheet.png to %s", len(items), folder)


if __name__ == "__main__":
    utils.run_command(main)
