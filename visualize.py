"""Pictures of what a model looks at, and of what early exit costs and gives.

    python visualize.py --model lf_deit_nano --resume output/nano/checkpoint.pth --data-path data/digits \\
        --output_dir pictures
    python visualize.py --resume output/avit/checkpoint.pth --data-path data/digits --per-class
    python visualize.py --resume output/nano/checkpoint.pth --curve --output_dir pictures
"""

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import command_line
import datasets
import utils
from engine import cascade
from inference.pictures import Explained, Line, contact_sheet, depth_map, draw_curve, picture, reference
from loading import loaders
from models import Adaptive
from models.exits import confidence
from models.weights import model_from_checkpoint
from utils import log

PICTURED = {"cls_attn", "region", "depth", "tokens"}  # what a picture reads of a stage's info


def explain(
    model: Adaptive,
    dataset: Dataset,
    indices: Iterable[int],
    config: dict[str, Any],
    thresholds: list[float],
    batch_size: int = 64,
    labelled: bool = True,
) -> list[Explained]:
    """Runs early exit on some images of a data set and keeps what pictures need.

    Args:
        model: in any mode; it is set to evaluation.
        dataset: yields model input and label.
        indices: which images.
        config: mean and std that the input was normalised with.
        thresholds: one per exit but the last.
        batch_size: images at a time.
        labelled: whether the second item of a sample is a class.
    """
    indices, found = list(indices), []
    for first in range(0, len(indices), batch_size):
        images, labels = zip(*(dataset[i] for i in indices[first : first + batch_size]), strict=True)
        found += explain_batch(model, torch.stack(images), labels if labelled else None, config, thresholds)
    panels = max((len(item.kept) for item in found), default=0)
    return [item._replace(panels=panels) for item in found]


def explain_batch(
    model: Adaptive,
    images: Tensor,
    labels: Iterable[int] | None,
    config: dict[str, Any],
    thresholds: list[float],
) -> list[Explained]:
    """`explain` on images [B,3,S,S]; the results hold views of one array of pixels."""
    model.eval()
    rows: list[dict] = [{} for _ in images]
    for step in cascade(model, images.to(next(model.parameters()).device), thresholds):
        logits, info = step.output
        shown = {name: info[name].float().cpu() for name in PICTURED & info.keys()}
        kept = [patches.cpu() for patches in model.kept_patches(info)]
        predicted, sure = logits.argmax(dim=-1).tolist(), confidence(logits).tolist()
        for at, row in enumerate(step.rows.tolist()):
            rows[row] |= {name: value[at].numpy() for name, value in shown.items()}
            rows[row]["kept"] = [patches[at].numpy() for patches in kept]
            rows[row] |= {"exit": step.exit, "predicted": predicted[at], "sure": sure[at]}
    pixels = images.cpu().permute(0, 2, 3, 1) * torch.tensor(config["std"]) + torch.tensor(config["mean"])
    pixels = (255 * pixels).round().clamp(0, 255).byte().numpy()
    labels = [None] * len(rows) if labels is None else [int(label) for label in labels]
    return [as_explained(*found, model.patch_size) for found in zip(pixels, labels, rows, strict=True)]


def as_explained(image: np.ndarray, label: int | None, row: dict, patch_size: int) -> Explained:
    attention, depth = row.get("cls_attn"), row.get("depth")
    if attention is not None:
        attention = attention.reshape(round(len(attention) ** 0.5), -1)
    if depth is not None:
        grid = math.isqrt(len(depth))  # the tokens before the patches are fewer than the next square takes
        depth = depth[-grid * grid :].astype(int).reshape(grid, grid)
    side, kept = len(image) // patch_size, []
    for patches in row["kept"]:
        mask = np.zeros(side * side, dtype=bool)
        mask[patches[patches >= 0]] = True
        kept.append(mask.reshape(side, side))
    return Explained(
        image=image,
        attention=attention,
        depth=depth,
        blocks=len(row.get("tokens", ())),
        kept=kept,
        panels=len(kept),
        box=tuple(int(value) * patch_size for value in row["region"]) if "region" in row else None,
        exit=row["exit"],
        predicted=row["predicted"],
        confidence=row["sure"],
        label=label,
    )


def save(image: Image.Image, path: Path) -> None:
    form = Image.registered_extensions().get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path} is no name of a picture: take one such as picture.png")
    utils.write_atomically(path, lambda temporary: image.save(temporary, form))


def most_varied(
    model: Adaptive, loader: DataLoader, config: dict[str, Any], thresholds: list[float]
) -> list[Explained]:
    """For each class the image whose patches differ most in depth, by standard deviation; classes in order.

    Args:
        model: in any mode; it is set to evaluation.
        loader: of images and labels; of equal images of a class the first is taken.
        config: mean and std that the images were normalised with.
        thresholds: one per exit but the last.

    Raises:
        ValueError: the model does not tell token depths.
    """
    best: dict[int, Explained] = {}
    with utils.progress(len(loader.dataset)) as bar:
        for images, labels in loader:
            for item in explain_batch(model, images, labels, config, thresholds):
                if item.depth is None:
                    raise ValueError(
                        f"{type(model).__name__} has no token depths to draw by class:"
                        " take a model whose tokens halt, such as avit_deit_small"
                    )
                if item.label not in best or item.depth.std() > best[item.label].depth.std():
                    best[item.label] = item._replace(image=item.image.copy())  # lets its batch go
            bar.update(len(images))
    return [best[label] for label in sorted(best)]


def draw_classes(
    model: Adaptive,
    loader: DataLoader,
    config: dict[str, Any],
    thresholds: list[float],
    folder: Path,
    classes: list[str],
    columns: int = 2,
) -> None:
    """Draws for each class the image that `most_varied` finds: its input, its token depths, and both.

    Args:
        model, loader, config, thresholds: see `most_varied`.
        folder: gets class<c>_ref.png, class<c>_token_depth.png, class<c>_combined.png, contact_sheet.png.
        classes: their names.
        columns: of the contact sheet; more where it would be higher than wide.
    """
    items = most_varied(model, loader, config, thresholds)
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        image = reference(item)
        start = f"class{item.label}"
        save(image, folder / f"{start}_ref.png")
        save(depth_map(item.depth, item.blocks, image.height), folder / f"{start}_token_depth.png")
        save(picture(item, model.stage_names, classes), folder / f"{start}_combined.png")
    columns = max(columns, math.isqrt(len(items)))
    save(contact_sheet(items, model.stage_names, classes, columns), folder / "contact_sheet.png")
    log.info("wrote three pictures of each of %d classes and contact_sheet.png to %s", len(items), folder)


def parse_baseline(text: str) -> tuple[str, float, float]:
    try:
        name, gflops, accuracy = text.rsplit(":", 2)
        return name, float(gflops), float(accuracy)
    except ValueError as error:
        raise ValueError(f"--baseline takes NAME:GFLOPS:ACCURACY, not {text!r}") from error


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    command_line.add_model_arguments(parser)
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
    command_line.add_bad_images(parser)
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
    checkpoint = utils.load_checkpoint(args.resume)
    stored = utils.load_json(args.results) if args.results else checkpoint
    results = utils.Results.of(stored)
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
    command_line.check_range("--threshold", args.threshold, 0, 1)
    command_line.check_range("--num-images", args.num_images, 1)
    command_line.check_range("--batch-size", args.batch_size, 1)
    command_line.check_range("--max-bad-images", args.max_bad_images, 0)
    command_line.check_range("--columns", args.columns, 1)
    checkpoint = utils.load_checkpoint(args.resume)
    model, _, _ = model_from_checkpoint(
        checkpoint, args.resume, args.model, command_line.model_arguments(args), args.use_ema
    )
    model.to(context.device)
    config = datasets.data_config(model.recipe, checkpoint)
    transform = datasets.eval_transform(model.img_size, config)
    classes = checkpoint.get("class_names")
    if args.images:
        dataset = datasets.Files(args.images, transform)
        indices = range(len(dataset))
    elif args.data_path:
        dataset = datasets.build_dataset(
            args.data_set,
            args.data_path,
            args.split,
            transform,
            classes,
            args.inat_category,
            use_lmdb=args.use_lmdb,
        )
        datasets.check_classes(dataset, model.num_classes)
        classes = dataset.classes
        indices = np.random.default_rng(args.seed).permutation(len(dataset))[: args.num_images].tolist()
    else:
        raise ValueError("nothing to draw: give --data-path DIR or --images PATH, or --curve")
    thresholds = [args.threshold] * (model.num_exits - 1)
    bad = dict(max_bad=args.max_bad_images, bad_list=folder / "bad_images.txt")
    if args.per_class:
        loader = loaders.eval_loader(dataset, args.batch_size, args.num_workers, **bad)
        return draw_classes(model, loader, config, thresholds, folder, classes, args.columns)
    if args.max_bad_images:
        indices = loaders.readable(loaders.Shard(dataset, **bad), indices)
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
    command_line.run_command(main)
