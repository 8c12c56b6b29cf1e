"""Drawing: what a model did with an image, contact sheets, and accuracy against cost."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import utils
from checkpointing.format import Results
from engine import cascade
from models import Adaptive
from models.exits import confidence
from utils import log

PANEL = 224  # pixels a side; smaller images are enlarged by a whole factor
GAP, HEAD, BAR, FONT = 4, 22, 12, 14  # pixels: between panels, the headline, the colour bar, letters
RIGHT, WRONG, NEUTRAL, BOX = (0, 150, 0), (200, 0, 0), (60, 60, 60), (255, 210, 0)


class Explained(NamedTuple):
    """One image and what the model did with it.

    Attributes:
        image: [S,S,3] uint8, the model's input.
        attention: [g,g] class attention of the first stage, or None.
        depth: [g,g] blocks that each patch went through, or None.
        blocks: how many there are, the end of the colour scale of `depth`.
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
    depth: np.ndarray | None
    blocks: int
    kept: list[np.ndarray]
    panels: int
    box: tuple[int, int, int, int] | None
    exit: int
    predicted: int
    confidence: float
    label: int | None


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


def depth_map(depth: np.ndarray, blocks: int, side: int) -> Image.Image:
    """Token depths [g,g] in colour, `side` pixels a side, and the bar of their scale.

    The scale is 1 (black) to `blocks` (white) whatever the depths are, so that pictures can be compared; the
    published ones scale each picture on its own.
    """

    def colour(depth: np.ndarray) -> Image.Image:
        return Image.fromarray(colormaps["hot"]((depth - 1) / max(blocks - 1, 1), bytes=True)[..., :3])

    cells = colour(depth).resize((side, side), Image.Resampling.NEAREST)
    levels = blocks - np.arange(side) * blocks // side  # [side], deepest on top
    letters = ImageFont.load_default(FONT)
    scale = Image.new("RGB", (BAR + GAP + round(letters.getlength(str(blocks))), side), "white")
    scale.paste(colour(np.tile(levels[:, None], BAR)))
    draw = ImageDraw.Draw(scale)
    # What is white would have no end on white paper.
    draw.rectangle((0, 0, BAR - 1, side - 1), outline=NEUTRAL)
    ImageDraw.Draw(cells).rectangle((0, 0, side - 1, side - 1), outline=NEUTRAL)
    for text, height, anchor in ((str(blocks), 0, "lt"), ("1", side - 1, "lb")):
        draw.text((BAR + GAP, height), text, fill=NEUTRAL, font=letters, anchor=anchor)
    return beside([cells, scale])


def beside(panels: list[Image.Image]) -> Image.Image:
    """Panels of one height in a row."""
    row = Image.new("RGB", (sum(panel.width + GAP for panel in panels) - GAP, panels[0].height), "white")
    left = 0
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + GAP
    return row


def reference(item: Explained) -> Image.Image:
    """The model's input, enlarged if it is small."""
    return Image.fromarray(enlarge(item.image, max(1, PANEL // len(item.image))))


def headline(item: Explained, stage_names: tuple[str, ...], classes: list[str] | None = None) -> str:
    """Exit, class, confidence, mean depth of the patches and true class, as far as they are known."""
    text = f"{stage_names[item.exit]}: {class_name(item.predicted, classes)} {item.confidence:.2f}"
    if item.depth is not None:
        text += f", mean depth {item.depth.mean():.1f}"
    return text if item.label is None else f"{text}  (true: {class_name(item.label, classes)})"


def picture(item: Explained, stage_names: tuple[str, ...], classes: list[str] | None = None) -> Image.Image:
    """Input with its region, attention, token depth and kept patches side by side, under the headline."""
    panels = [reference(item)]
    side = panels[0].height
    factor = side // len(item.image)
    if item.box is not None:
        left, top, right, bottom = (factor * value for value in item.box)
        ImageDraw.Draw(panels[0]).rectangle((left, top, right - 1, bottom - 1), outline=BOX, width=3)
    if item.attention is not None:
        panels.append(Image.fromarray(enlarge(heat_map(item.image, item.attention), factor)))
    if item.depth is not None:
        panels.append(depth_map(item.depth, item.blocks, side))
    panels += [Image.fromarray(enlarge(dim(item.image, kept), factor)) for kept in item.kept]
    # Where an image left early the place stays, so that sheets line up.
    panels += [Image.new("RGB", (side, side), (235, 235, 235))] * (item.panels - len(item.kept))
    row = beside(panels)
    sheet = Image.new("RGB", (row.width, HEAD + side), "white")
    sheet.paste(row, (0, HEAD))
    known = item.label is not None
    colour = (RIGHT if item.predicted == item.label else WRONG) if known else NEUTRAL
    text = headline(item, stage_names, classes)
    ImageDraw.Draw(sheet).text((2, 3), text, fill=colour, font=ImageFont.load_default(FONT))
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
    results: Results


MARKED = {0.5: "T=0.5", 0.7: "T=0.7", 0.9: "T=0.9"}


def common_threshold(results: Results, at: int) -> float | None:
    """The threshold of an operating point, if all its early exits have the same."""
    thresholds = results.dynamic_threshold
    if thresholds is None:  # a sweep of 101 points, as files of earlier versions hold it
        return at / 100
    early = {round(value, 4) for value in thresholds[at][: len(results.flops or thresholds[at]) - 1]}
    return early.pop() if len(early) == 1 else None


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
            if len(lines) == 1 and (note := MARKED.get(common_threshold(line.results, at))):
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
        logits, shown = step.output.logits, model.picture(step.output.info)
        kept = [patches.cpu() for patches in (shown.refined, *shown.kept) if patches is not None]
        parts = {"heat": shown.heat, "box": shown.region, "depth": shown.depth}
        parts = {name: value.float().cpu() for name, value in parts.items() if value is not None}
        predicted, sure = logits.argmax(dim=-1).tolist(), confidence(logits).tolist()
        for at, row in enumerate(step.rows.tolist()):
            rows[row] |= {name: value[at].numpy() for name, value in parts.items()} | {"blocks": shown.blocks}
            rows[row]["kept"] = [patches[at].numpy() for patches in kept]
            rows[row] |= {"exit": step.exit, "predicted": predicted[at], "sure": sure[at]}
    pixels = images.cpu().permute(0, 2, 3, 1) * torch.tensor(config["std"]) + torch.tensor(config["mean"])
    pixels = (255 * pixels).round().clamp(0, 255).byte().numpy()
    labels = [None] * len(rows) if labels is None else [int(label) for label in labels]
    return [as_explained(*found, model.patch_size) for found in zip(pixels, labels, rows, strict=True)]


def as_explained(image: np.ndarray, label: int | None, row: dict, patch_size: int) -> Explained:
    attention, depth = row.get("heat"), row.get("depth")
    if attention is not None:
        attention = attention.reshape(round(len(attention) ** 0.5), -1)
    if depth is not None:
        depth = depth.astype(int).reshape(math.isqrt(len(depth)), -1)
    side, kept = len(image) // patch_size, []
    for patches in row["kept"]:
        mask = np.zeros(side * side, dtype=bool)
        mask[patches[patches >= 0]] = True
        kept.append(mask.reshape(side, side))
    return Explained(
        image=image,
        attention=attention,
        depth=depth,
        blocks=row["blocks"],
        kept=kept,
        panels=len(kept),
        box=tuple(map(int, row["box"])) if "box" in row else None,
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
