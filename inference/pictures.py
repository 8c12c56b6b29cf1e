"""Pictures: early exit on single images, drawn; contact sheets; accuracy against cost."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import utils
from checkpointing.format import Results
from engine import cascade
from models import Adaptive
from models.exits import confidence
from utils import InputError, log

PANEL = 224  # pixels a side; smaller images are enlarged by a whole factor
GAP, SHEET_GAP, HEAD, BAR = 4, 12, 22, 36  # pixels: between panels and pictures, the headline, the colour bar
RIGHT, WRONG, NEUTRAL, BOX = (0, 150, 0), (200, 0, 0), (60, 60, 60), (255, 210, 0)
EMPTY = 235  # grey of the panels that an image which left early does not have


class Explanation(NamedTuple):
    """One image and what the model did with it.

    Attributes:
        image: [3,S,S] uint8, the model's input.
        label: class number, or None where it is not given.
        exit: where the image left.
        predicted: class number.
        confidence: maximum softmax probability at that exit.
        kept: [s,s] bool each, patches of the full image: those that the stage refined, and those that stayed
            after each drop.
        blocks: how many there are, the end of the colour scale of `depth`.
        heat: [g,g] attention, or None.
        region: [4] left, top, right, bottom in input pixels, or None.
        depth: [g,g] blocks that each patch went through, or None.
        groups: [s,s] number of the token that each patch is part of at the end, or None.
    """

    image: Tensor
    label: int | None
    exit: int
    predicted: int
    confidence: float
    kept: list[Tensor]
    blocks: int = 0
    heat: Tensor | None = None
    region: Tensor | None = None
    depth: Tensor | None = None
    groups: Tensor | None = None

    @property
    def drops(self) -> int:
        """How many panels tell which patches stay, or with which they merge."""
        return len(self.kept) + (self.groups is not None)


def explain(
    model: Adaptive,
    dataset: Dataset,
    indices: Iterable[int],
    config: dict[str, Any],
    thresholds: list[float],
    batch_size: int = 64,
    labelled: bool = True,
) -> list[Explanation]:
    """Run early exit on some images of a data set and keep what pictures show.

    Args:
        model: in any mode; it is set to evaluation.
        dataset: yields model input and label.
        indices: which images.
        config: mean and std that the input was normalised with.
        thresholds: one per exit but the last.
        batch_size: images at a time.
        labelled: whether the second item of a sample is a class.
    """
    indices, items = list(indices), []
    for first in range(0, len(indices), batch_size):
        images, labels = zip(*(dataset[i] for i in indices[first : first + batch_size]), strict=True)
        items += explain_batch(model, torch.stack(images), labels if labelled else None, config, thresholds)
    return items


def explain_batch(
    model: Adaptive,
    images: Tensor,
    labels: Iterable[int] | None,
    config: dict[str, Any],
    thresholds: list[float],
) -> list[Explanation]:
    """Do what `explain` does on images [B,3,S,S]; the tensors of the results are views of batches."""
    model.eval()
    rows: list[dict[str, Any]] = [{} for _ in images]
    for step in cascade(model, images.to(next(model.parameters()).device), thresholds):
        logits, parts = step.output.logits, model.picture(step.output.info)
        maps = {"heat": square(parts.heat), "region": parts.region, "depth": square(parts.depth)}
        maps["groups"] = square(parts.groups)
        maps = {name: value.cpu() for name, value in maps.items() if value is not None}
        grid = images.shape[-1] // model.patch_size
        kept = [mask(index.cpu(), grid) for index in (parts.refined, *parts.kept) if index is not None]
        predicted, top = logits.argmax(dim=-1).tolist(), confidence(logits).tolist()
        for at, row in enumerate(step.rows.tolist()):
            rows[row] |= dict(
                exit=step.exit, predicted=predicted[at], confidence=top[at], blocks=parts.blocks
            )
            rows[row] |= {name: value[at] for name, value in maps.items()} | {"kept": [m[at] for m in kept]}
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pixels = (255 * (images.cpu() * std + mean)).round().clamp(0, 255).byte()
    labels = [None] * len(rows) if labels is None else map(int, labels)
    return [Explanation(*columns, **row) for *columns, row in zip(pixels, labels, rows, strict=True)]


def square(cells: Tensor | None) -> Tensor | None:
    """Return values [B,g*g] as [B,g,g]."""
    return None if cells is None else cells.unflatten(1, (math.isqrt(cells.shape[1]), -1))


def mask(patches: Tensor, side: int) -> Tensor:
    """Return which patches of a grid are among `patches` [B,n], as [B,side,side]; -1 is none of them."""
    table = torch.zeros(len(patches), side**2 + 1, dtype=torch.bool)
    table.scatter_(1, patches % (side**2 + 1), True)  # -1 goes to the last column
    return table[:, :-1].unflatten(1, (side, side))


def most_varied(
    model: Adaptive, loader: DataLoader, config: dict[str, Any], thresholds: list[float]
) -> list[Explanation]:
    """Return for each class, in order, the image whose patches differ most in depth, by standard deviation.

    Args:
        model: in any mode; it is set to evaluation.
        loader: of images and labels; of equal images of a class the first is taken.
        config: mean and std that the images were normalised with.
        thresholds: one per exit but the last.

    Raises:
        InputError: the model has no token depths.
    """
    best: dict[int, tuple[float, Explanation]] = {}
    with utils.progress(len(loader.dataset)) as bar:
        for images, labels in loader:
            for item in explain_batch(model, images, labels, config, thresholds):
                if item.depth is None:
                    raise InputError(
                        f"{type(model).__name__} has no token depths to draw by class:"
                        " take a model whose tokens halt"
                    )
                spread = item.depth.numpy().std()
                if item.label not in best or spread > best[item.label][0]:
                    item = item._replace(image=item.image.clone(), depth=item.depth.clone())  # frees batches
                    best[item.label] = spread, item
            bar.update(len(images))
    return [best[label][1] for label in sorted(best)]


# Drawing; a picture is a tensor [3,height,width] uint8


def enlarge(image: Tensor, side: int) -> Tensor:
    """Repeat the pixels of images [...,s,s] so that they are `side` wide, a multiple of s."""
    factor = side // image.shape[-1]
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def colour(values: Tensor, name: str) -> Tensor:
    """Return values [h,w] from 0 to 1 in the colours of a matplotlib map, [3,h,w] uint8."""
    return torch.from_numpy(colormaps[name](values.numpy(), bytes=True)[..., :3]).movedim(-1, 0)


def heat_map(image: Tensor, heat: Tensor) -> Tensor:
    """Draw attention [g,g] over the grey image; the scale runs from 0 to the image's own maximum."""
    heat = enlarge(colour(heat / heat.max().clamp(min=1e-12), "inferno"), image.shape[-1])
    grey = image.float().mean(dim=0, keepdim=True)
    return (0.35 * grey + 0.65 * heat).round().byte()


def group_map(image: Tensor, groups: Tensor) -> Tensor:
    """Draw every patch in the mean colour of the patches of its group; `groups` [s,s]."""
    colours = F.avg_pool2d(image.float(), image.shape[-1] // len(groups)).flatten(1)  # [3,s*s]
    index = groups.flatten().expand_as(colours)
    means = torch.zeros(3, int(groups.max()) + 1).scatter_reduce(
        1, index, colours, "mean", include_self=False
    )
    return enlarge(means.gather(1, index).round().byte().unflatten(1, groups.shape), image.shape[-1])


def depth_map(depth: Tensor, blocks: int, side: int) -> Tensor:
    """Draw token depths [g,g], `side` pixels a side, and the colour bar of their scale.

    The scale is 1 (black) to `blocks` (white) whatever the depths are, so that pictures can be compared; the
    published ones scale each picture on its own.
    """
    cells = enlarge(colour((depth.float() - 1) / max(blocks - 1, 1), "hot"), side)
    frame = torch.tensor([[0, 0, side - 1, side - 1]])  # white cells would have no end on white paper
    return beside([draw_bounding_boxes(cells, frame, colors=NEUTRAL), depth_bar(blocks, side)])


def depth_bar(blocks: int, side: int) -> Tensor:
    """Draw the scale of `depth_map`, deepest on top."""
    figure = Figure(figsize=(BAR / 100, side / 100), dpi=100)
    mappable = ScalarMappable(Normalize(1, max(blocks, 2)), "hot")
    axes = figure.add_axes((0, 0.02, 0.33, 0.96))
    figure.colorbar(mappable, axes, boundaries=np.arange(0.5, blocks + 1), ticks=[1, blocks])
    axes.tick_params(labelsize=8, length=0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).movedim(-1, 0)


def beside(panels: list[Tensor]) -> Tensor:
    """Put panels of one height in a row."""
    gap = panels[0].new_full((3, panels[0].shape[1], GAP), 255)
    return torch.cat([part for panel in panels for part in (gap, panel)][1:], dim=2)


def reference(item: Explanation) -> Tensor:
    """Return the model's input, enlarged if it is small."""
    side = item.image.shape[-1]
    return enlarge(item.image, side * max(1, PANEL // side))


def headline(item: Explanation, stage_names: tuple[str, ...], classes: list[str] | None = None) -> str:
    """Tell exit, class, confidence, mean depth of the patches and true class, as far as they are given."""
    names = classes or range(10**9)  # a class without a name is called by its number
    text = f"{stage_names[item.exit]}: {names[item.predicted]} {item.confidence:.2f}"
    if item.depth is not None:
        text += f", mean depth {item.depth.double().mean():.1f}"
    return text if item.label is None else f"{text}  (true: {names[item.label]})"


def draw(
    item: Explanation, stage_names: tuple[str, ...], classes: list[str] | None = None, drops: int = 0
) -> Tensor:
    """Draw the input with its region, attention, depth, kept and merged patches under the headline.

    Args:
        item: what is drawn.
        stage_names: of the model.
        classes: names; default: numbers.
        drops: panels of kept and merged patches; where the image left before, their places stay empty.
    """
    image = reference(item)
    side = image.shape[-1]
    panels = [image]
    if item.region is not None:
        box = item.region * (side // item.image.shape[-1]) - torch.tensor([0, 0, 1, 1])
        panels = [draw_bounding_boxes(image, box[None], colors=BOX, width=3)]
    if item.heat is not None:
        panels.append(heat_map(image, item.heat))
    if item.depth is not None:
        panels.append(depth_map(item.depth, item.blocks, side))
    for kept in item.kept:
        panels.append(draw_segmentation_masks(image, ~enlarge(kept, side), alpha=0.7, colors="white"))
    if item.groups is not None:
        panels.append(group_map(image, item.groups))
    panels += [torch.full_like(image, EMPTY)] * (drops - item.drops)
    row = beside(panels)
    ink = NEUTRAL if item.label is None else RIGHT if item.predicted == item.label else WRONG
    head, text = Image.new("RGB", (row.shape[-1], HEAD), "white"), headline(item, stage_names, classes)
    ImageDraw.Draw(head).text((2, 3), text, fill=ink, font=ImageFont.load_default(14))
    return torch.cat([pil_to_tensor(head), row], dim=1)


def draw_all(
    items: list[Explanation], stage_names: tuple[str, ...], classes: list[str] | None = None
) -> list[Tensor]:
    """Draw explanations of one model, all with the same panels; arguments as for `draw`."""
    drops = max(item.drops for item in items)
    return [draw(item, stage_names, classes, drops) for item in items]


def contact_sheet(pictures: list[Tensor], columns: int = 2) -> Tensor:
    """Put pictures of one size on one page, row by row."""
    if len(pictures) == 1:
        return pictures[0]
    page = make_grid(pictures, columns, SHEET_GAP, pad_value=255)
    return page[:, SHEET_GAP:-SHEET_GAP, SHEET_GAP:-SHEET_GAP]


def check_picture_name(path: Path) -> str:
    """Return the format that a picture's name says.

    Raises:
        InputError: it says none.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise InputError(f"{path} is no name of a picture: take one such as picture.png")
    return form


def save(picture: Tensor, path: Path) -> None:
    """Write a picture in the format that the name says, see `check_picture_name`."""
    form = check_picture_name(path)
    utils.write_atomically(path, lambda temporary: to_pil_image(picture).save(temporary, form))


def draw_classes(
    model: Adaptive,
    loader: DataLoader,
    config: dict[str, Any],
    thresholds: list[float],
    folder: Path,
    classes: list[str],
    columns: int = 2,
) -> None:
    """Draw for each class the image of `most_varied`: its input, its token depths, and both.

    Args:
        model, loader, config, thresholds: see `most_varied`.
        folder: gets class<c>_ref.png, class<c>_token_depth.png, class<c>_combined.png, contact_sheet.png.
        classes: their names.
        columns: of the contact sheet; more where it would be higher than wide.
    """
    utils.check_writable(folder / "contact_sheet.png", "name another folder with --output_dir")
    items = most_varied(model, loader, config, thresholds)
    pictures = draw_all(items, model.stage_names, classes)
    folder.mkdir(parents=True, exist_ok=True)
    for item, picture in zip(items, pictures, strict=True):
        image, start = reference(item), f"class{item.label}"
        save(image, folder / f"{start}_ref.png")
        save(depth_map(item.depth, item.blocks, image.shape[-1]), folder / f"{start}_token_depth.png")
        save(picture, folder / f"{start}_combined.png")
    save(contact_sheet(pictures, max(columns, math.isqrt(len(items)))), folder / "contact_sheet.png")
    log.info("wrote three pictures of each of %d classes and contact_sheet.png to %s", len(items), folder)


MARKED = {0.5: "T=0.5", 0.7: "T=0.7", 0.9: "T=0.9"}


def common_threshold(results: Results, at: int) -> float | None:
    """Return the threshold of an operating point, if all its early exits have the same."""
    early = {round(value, 4) for value in results.thresholds_at(at) or ()}
    return early.pop() if len(early) == 1 else None


def draw_curve(
    models: dict[str, Results], path: Path, baselines: Iterable[tuple[str, float, float]] = ()
) -> None:
    """Draw accuracy against mean GFLOPs: a line per model, a ring per exit, a star per plain model.

    Args:
        models: results with a threshold sweep, by name; every tenth threshold is marked.
        path: of the picture.
        baselines: name, GFLOPs and top-1 accuracy in percent of models without early exit.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, results in models.items():
        gflops, accuracy = results.budgeted_batch_classification
        (line,) = axes.plot(gflops, accuracy, ".-", label=name, markevery=10)
        for at in range(0, len(gflops), 10) if len(models) == 1 else ():
            if note := MARKED.get(common_threshold(results, at)):
                place = dict(xytext=(4, -11), textcoords="offset points", fontsize=8)
                axes.annotate(note, (gflops[at], accuracy[at]), **place)
        if results.flops and results.anytime_classification:
            style = dict(fillstyle="none", color=line.get_color())
            label = "all images to one exit" if name == [*models][-1] else None
            axes.plot(results.flops, results.anytime_classification, "o", label=label, **style)
    for name, gflops, accuracy in baselines:
        axes.plot(gflops, accuracy, "*", markersize=11, label=name)
    axes.set_xlabel("mean GFLOPs per image (multiply-adds)")
    axes.set_ylabel("top-1 accuracy in percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    utils.write_atomically(path, lambda temporary: FigureCanvasAgg(figure).print_png(temporary))
