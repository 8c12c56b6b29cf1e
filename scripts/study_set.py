"""Study a set of images: is there a way to the class without finding the object, and does detail matter?

    python scripts/study_set.py data/garments --output study.md

Shortcuts: a linear classifier gets what can be known without finding the object, splines of a few numbers or
pixels of the reduced image. What it reaches is to be near chance. Detail: a small network gets the object cut
out of the whole image, of the image at half its side, and at a quarter. What it loses is what a classifier of
reduced images loses for lack of detail, apart from finding the object. All learn from train and are measured
on val and test together. Works on the sets of make_digits.py and make_garments.py, whose boxes.csv it reads.
"""

import _root as _root

import argparse
import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler
from tabulate import tabulate

import utils
from utils import POSITIVE_INT, InputError

SHRINKS = (1, 2, 4)
GRID = 28  # px, side to which the cut-out objects are resized
REDUCED = 14  # px, side of the reduced image


class Images(NamedTuple):
    """Hold what the classifiers are given, a row for each of n images of c channels."""

    labels: np.ndarray  # [n]
    sides: np.ndarray  # [n], of the objects' boxes in px
    shortcuts: dict[str, np.ndarray]  # [n, number of values] each
    objects: dict[int, np.ndarray]  # [n, 28 * 28 * c] each, by how often the image is reduced


def mode_of(path: Path) -> str:
    """Return L for an image without colour, else RGB, as Pillow calls the two."""
    with Image.open(path) as image:
        return "RGB" if np.ptp(np.asarray(image.convert("RGB")), axis=2).any() else "L"


def read_images(data: Path, rows: list[dict[str, str]], mode: str) -> Images:
    """Read the images of rows of boxes.csv, as L or RGB."""
    boxes = np.array([[float(row[side]) for side in ("left", "top", "right", "bottom")] for row in rows])
    shortcuts: dict[str, list[np.ndarray]] = {"centre": [], "brightness": [], "pixels": []}
    objects: dict[int, list[np.ndarray]] = {shrink: [] for shrink in SHRINKS}
    for row, box in zip(rows, boxes, strict=True):
        with Image.open(data / row["file"]) as opened:
            image = opened.convert(mode)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        shortcuts["centre"].append(pixels[image.height // 2, image.width // 2])
        shortcuts["brightness"].append(pixels.mean(axis=(0, 1)))
        reduced = image.resize((REDUCED, REDUCED), Image.Resampling.BILINEAR)
        shortcuts["pixels"].append(np.asarray(reduced).ravel())
        for shrink in SHRINKS:
            small = image.resize([side // shrink for side in image.size], Image.Resampling.BILINEAR)
            cut = small.resize((GRID, GRID), Image.Resampling.BILINEAR, box=tuple(box / shrink))
            objects[shrink].append(np.asarray(cut).ravel())
    sides = boxes[:, 2] - boxes[:, 0]
    values = {name: np.stack(lists).astype(np.float32) for name, lists in shortcuts.items()}
    values |= {"size": sides[:, None], "place": (boxes[:, :2] + boxes[:, 2:]) / 2}
    cuts = {shrink: np.stack(lists) / np.float32(255) for shrink, lists in objects.items()}
    return Images(np.array([int(row["label"]) for row in rows]), sides, values, cuts)


Rows = tuple[np.ndarray, np.ndarray]  # values [n, number of values] and labels [n]


def correct(model: ClassifierMixin, fitted: Rows, held: Rows) -> np.ndarray:
    """Train a classifier on rows and return whether it is right on each of others, as 0 or 1."""
    with warnings.catch_warnings():  # whether the last digit of the loss still moves does not matter here
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*fitted)
    return (model.predict(held[0]) == held[1]).astype(float)


def percent(shares: np.ndarray) -> str:
    """Write a mean over images in percent with its standard error."""
    return f"{100 * shares.mean():.1f} ± {100 * shares.std() / max(len(shares), 1) ** 0.5:.1f}"


def study_shortcuts(train: Images, held: Images) -> str:
    """Return the table of what linear classifiers reach without finding the object."""
    splines = make_pipeline(SplineTransformer(n_knots=8), LogisticRegression(max_iter=1000))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    models = {
        "centre": ("the pixel in the centre", splines),
        "brightness": ("mean brightness", splines),
        "size": ("the object's size", splines),
        "place": ("the object's place", splines),
        "pixels": (f"all pixels of the image at {REDUCED} x {REDUCED}", linear),
    }
    table = [
        ["nothing (the most frequent class)", percent(held.labels == np.bincount(train.labels).argmax())]
    ]
    for key, (name, model) in models.items():
        pairs = ((images.shortcuts[key], images.labels) for images in (train, held))
        table.append([name, percent(correct(model, *pairs))])
    return tabulate(table, ["known of the image", "top-1 %"], tablefmt="github", disable_numparse=True)


def study_detail(train: Images, held: Images) -> str:
    """Return the table of what a small network reaches on the cut-out object, by side of the image."""
    third, two_thirds = np.quantile(held.sides, [1 / 3, 2 / 3])
    groups = {
        "all objects": held.sides > 0,
        f"side up to {third:.1f} px": held.sides <= third,
        f"side from {two_thirds:.1f} px": held.sides >= two_thirds,
    }
    right = {}
    for shrink in SHRINKS:
        model = MLPClassifier(128, early_stopping=True, max_iter=50, random_state=0)
        pairs = ((images.objects[shrink], images.labels) for images in (train, held))
        right[shrink] = correct(model, *pairs)
    names = {1: "whole", 2: "half", 4: "a quarter"}
    table = [
        [names[shrink], *(percent(right[shrink][group]) for group in groups.values())] for shrink in SHRINKS
    ]
    losses = (percent((right[1] - right[2])[group]) for group in groups.values())
    table.append(["lost at half the side", *losses])
    return tabulate(table, ["side of the image", *groups], tablefmt="github", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Read a set, print both tables and write them where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a set of make_digits.py or make_garments.py")
    parser.add_argument("--train", type=POSITIVE_INT, default=20000, help="images to learn from (20000)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="writes the tables, in Markdown")
    args = parser.parse_args(argv)
    if not (boxes := args.data / "boxes.csv").is_file():
        raise FileNotFoundError(f"no {boxes}: give a set of make_digits.py or make_garments.py")
    with open(boxes, newline="") as file:
        rows = list(csv.DictReader(file))
    of_train = [row for row in rows if row["file"].startswith("train/")]
    others = [row for row in rows if not row["file"].startswith("train/")]
    if len(of_train) < 100 or not others:
        raise InputError(f"{args.data} needs 100 images in train and some in val or test")
    mode = mode_of(args.data / of_train[0]["file"])
    train, held = (read_images(args.data, some, mode) for some in (of_train[: args.train], others))
    note = f"{len(train.labels)} images to learn from, {len(held.labels)} to measure; ± standard error."
    text = f"{study_shortcuts(train, held)}\n\n{study_detail(train, held)}\n\n{note}"
    print(text)
    if args.output:
        utils.write_atomically(args.output, lambda path: path.write_text(text + "\n"))


if __name__ == "__main__":
    utils.run_command(main)
