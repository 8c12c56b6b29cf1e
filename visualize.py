"""Pictures of what a model looks at, and of what early exit costs and gives.

    python visualize.py --model lf_deit_nano --resume output/nano/checkpoint.pth --data-path data/digits \\
        --output_dir pictures
    python visualize.py --resume output/nano/checkpoint.pth --curve --output_dir pictures
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

import datasets
import utils
from engine import cascade
from models import Adaptive
from models.exits import confidence
from models.weights import model_from_checkpoint
from utils import log

PICTURED = {"cls_attn", "region"}  # what a picture reads of a stage's info
PANEL = 224  # pixels a side; smaller images are enlarged by a whole factor
RIGHT, WRONG, NEUTRAL, BOX = (0, 150, 0), (200, 0, 0), (60, 60, 60), (255, 210, 0)


class Explained(NamedTuple):
    """One image and what the model did with it.

    Attributes:
        image: [S,S,3] uint8, the model's input.
        attention: [g,g] class attention of the first stage, or None.
        kept: [s,s] bool per drop, which patches of the full image stayed: those that the second stage
            refined, or those after each block that drops.
        panels: how many such drops the model has; an image that left before has fewer.
        box: left, top, right, bottom of the region in input pixels, or None.
        exit: where the image left.
        predicted: class number.
        confidence: maximum softmax probability at that exit.
        label: class number, or None where it is not known.
    """

    image: np.ndarray
    attention: np.ndarray | None
    kept: list[np.ndarray]
    panels: int
    box: tuple[int, int, int, int] | None
    exit: int
    predicted: int
    confidence: float
    label: int | None


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
    model.eval()
    device = next(model.parameters()).device
    indices, found = list(indices), []
    for first in range(0, len(indices), batch_size):
        images, labels = zip(*(dataset[i] for i in indices[first : first + batch_size]), strict=True)
        images = torch.stack(images)
        rows: list[dict] = [{} for _ in labels]
        for step in cascade(model, images.to(device), thresholds):
            logits, info = step.output
            sure = confidence(logits)
            kept = [patches.cpu() for patches in model.kept_patches(info)]
            for at, row in enumerate(step.rows.tolist()):
                for name in PICTURED & info.keys():
                    rows[row][name] = info[name][at].float().cpu()
                rows[row]["kept"] = [patches[at] for patches in kept]
                rows[row] |= {
                    "exit": step.exit,
                    "predicted": int(logits[at].argmax()),
                    "sure": float(sure[at]),
                }
        pixels = images.permute(0, 2, 3, 1) * torch.tensor(config["std"]) + torch.tensor(config["mean"])
        pixels = (255 * pixels).round().clamp(0, 255).byte().numpy()
        for image, label, row in zip(pixels, labels, rows, strict=True):
            found.append(as_explained(image, label if labelled else None, row, model.patch_size))
    panels = max((len(item.kept) for item in found), default=0)
    return [item._replace(panels=panels) for item in found]


def as_explained(image: np.ndarray, label: int | None, row: dict, patch_size: int) -> Explained:
    side = len(image) // patch_size
    attention, box = row.get("cls_attn"), None
    if attention is not None:
        attention = attention.reshape(round(len(attention) ** 0.5), -1).numpy()
    kept = []
    for patches in row["kept"]:
        mask = np.zeros(side * side, dtype=bool)
        mask[patches[patches >= 0].numpy()] = True
        kept.append(mask.reshape(side, side))
    if "region" in row:
        box = tuple(int(value) * patch_size for value in row["region"])
    return Explained(
        image, attention, kept, len(kept), box, row["exit"], row["predicted"], row["sure"], label
    )


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, 0).repeat(factor, 1)


def heat_map(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Attention in colour over the grey image; the scale runs from 0 to the image's own maximum."""
    heat = attention / max(attention.max(), 1e-12)
    heat = enlarge(colormaps["inferno"](heat)[..., :3], len(image) // len(attention))
    grey = image.mean(axis=-1, keepdims=True) / 255
    return (255 * (0.35 * grey + 0.65 * heat)).round().astype(np.uint8)


def dim(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image with every patch that is not kept faded to white."""
    mask = enlarge(kept, len(image) // len(kept))[..., None]
    return np.where(mask, image, 0.3 * image + 0.7 * 255).round().astype(np.uint8)


def picture(item: Explained, stage_names: tuple[str, ...], classes: list[str] | None = None) -> Image.Image:
    """Input with its region, attention and kept patches side by side, under a line with the outcome."""
    factor = max(1, PANEL // len(item.image))
    panels = [Image.fromarray(enlarge(item.image, factor))]
    if item.box is not None:
        left, top, right, bottom = (factor * value for value in item.box)
        ImageDraw.Draw(panels[0]).rectangle((left, top, right - 1, bottom - 1), outline=BOX, width=3)
    if item.attention is not None:
        panels.append(Image.fromarray(enlarge(heat_map(item.image, item.attention), factor)))
    panels += [Image.fromarray(enlarge(dim(item.image, kept), factor)) for kept in item.kept]
    # Where an image left early the place stays, so that sheets line up.
    panels += [Image.new("RGB", panels[0].size, (235, 235, 235))] * (item.panels - len(item.kept))
    width, height, gap = panels[0].width, panels[0].height, 4
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + 22), "white")
    for at, panel in enumerate(panels):
        sheet.paste(panel, (at * (width + gap), 22))
    name = class_name(item.predicted, classes)
    text = f"{stage_names[item.exit]}: {name} {item.confidence:.2f}"
    colour = NEUTRAL
    if item.label is not None:
        colour = RIGHT if item.predicted == item.label else WRONG
        text += f"  (true: {class_name(item.label, classes)})"
    ImageDraw.Draw(sheet).text((2, 3), text, fill=colour, font=ImageFont.load_default(14))
    return sheet


def class_name(number: int, classes: list[str] | None) -> str:
    return classes[number] if classes else str(number)


def contact_sheet(
    items: list[Explained],
    stage_names: tuple[str, ...],
    classes: list[str] | None = None,
    columns: int = 2,
) -> Image.Image:
    """All pictures on one page, row by row."""
    pictures = [picture(item, stage_names, classes) for item in items]
    gap, width, height = 12, max(p.width for p in pictures), max(p.height for p in pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for at, one in enumerate(pictures):
        page.paste(one, (at % columns * (width + gap), at // columns * (height + gap)))
    return page


class Line(NamedTuple):
    """One model's curve: its name and what inference measured."""

    name: str
    results: utils.Results


def draw_curve(lines: list[Line], path: Path, baselines: list[tuple[str, float, float]] = ()) -> None:
    """Accuracy against mean GFLOPs: a line per model, a ring per exit, a star per plain model.

    Args:
        lines: models with a threshold sweep; every tenth threshold is marked.
        path: of the picture.
        baselines: name, GFLOPs and top-1 accuracy in percent of models without early exit.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        gflops, accuracy = line.results.budgeted_batch_classification
        (drawn,) = axes.plot(gflops, accuracy, label=line.name)
        for at in range(0, len(gflops), 10):
            axes.plot(gflops[at], accuracy[at], ".", color=drawn.get_color())
            if len(lines) == 1 and at in (50, 70, 90):
                note = f"T={at / 100:.1f}"
                axes.annotate(
                    note, (gflops[at], accuracy[at]), (4, -11), textcoords="offset points", fontsize=8
                )
        if line.results.flops and line.results.anytime_classification:
            axes.plot(
                line.results.flops,
                line.results.anytime_classification,
                "o",
                fillstyle="none",
                color=drawn.get_color(),
                label="all images to one exit" if line is lines[-1] else None,
            )
    for name, gflops, accuracy in baselines:
        axes.plot(gflops, accuracy, "*", markersize=11, label=name)
    axes.set_xlabel("mean GFLOPs per image (multiply-adds)")
    axes.set_ylabel("top-1 accuracy in percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    utils.write_atomically(path, lambda temporary: FigureCanvasAgg(figure).print_png(temporary))


def parse_baseline(text: str) -> tuple[str, float, float]:
    try:
        name, gflops, accuracy = text.rsplit(":", 2)
        return name, float(gflops), float(accuracy)
    except ValueError as error:
        raise ValueError(f"--baseline takes NAME:GFLOPS:ACCURACY, not {text!r}") from error


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    utils.add_model_arguments(parser)
    add("--resume", "--checkpoint_path", metavar="FILE", required=True, help="checkpoint")
    add("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add("--output_dir", default="test_img", metavar="DIR", help="where pictures go")
    add("--data-path", "--data_url", metavar="DIR", help="data folder")
    add("--data-set", default="IMNET", choices=datasets.DATA_SETS)
    add("--inat-category", default="name", choices=datasets.INAT_CATEGORIES)
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
    add("--batch-size", type=int, default=64)
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
    utils.check_range("--threshold", args.threshold, 0, 1)
    utils.check_range("--num-images", args.num_images, 1)
    utils.check_range("--batch-size", args.batch_size, 1)
    utils.check_range("--columns", args.columns, 1)
    checkpoint = utils.load_checkpoint(args.resume)
    model, _, _ = model_from_checkpoint(
        checkpoint, args.resume, args.model, utils.model_arguments(args), args.use_ema
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
            args.data_set, args.data_path, args.split, transform, classes, args.inat_category
        )
        datasets.check_classes(dataset, model.num_classes)
        classes = dataset.classes
        indices = np.random.default_rng(args.seed).permutation(len(dataset))[: args.num_images].tolist()
    else:
        raise ValueError("nothing to draw: give --data-path DIR or --images PATH, or --curve")
    thresholds = [args.threshold] * (model.num_exits - 1)
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
        picture(item, model.stage_names, classes).save(folder / name)
    contact_sheet(items, model.stage_names, classes, args.columns).save(folder / "contact_sheet.png")
    log.info("wrote %d pictures and contact_sheet.png to %s", len(items), folder)


if __name__ == "__main__":
    utils.run_command(main)
