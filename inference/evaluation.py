"""Accuracy and cost over a labelled data set: at every exit, at thresholds, at values of a model's knob."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import utils
from checkpointing.format import Results, described, digest, load_checkpoint, load_json, origin
from inference.budgets import other_origin, stored_thresholds, with_last_exit
from inference.session import Session, print_table
from inference.thresholds import threshold_text
from models import Adaptive, StageOutput
from models.cost import exit_gflops
from models.exits import operating_points, uniform_thresholds
from utils import InputError, log


def read_boxes(file: str | Path, root: Path, paths: list[Path]) -> Tensor:
    """Read the object boxes of images, [n,4] left, top, right, bottom in pixels.

    Args:
        file: CSV with the columns file, left, top, right, bottom.
        root: folder that the column `file` starts from.
        paths: the images.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it lacks a column or an image.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}")
    boxes = {}
    with open(file, newline="") as opened:
        for row in csv.DictReader(opened):
            try:
                box = [float(row[side]) for side in ("left", "top", "right", "bottom")]
                boxes[root / row["file"]] = box
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file} needs the columns file, left, top, right, bottom") from error
    if missing := [path for path in paths if path not in boxes]:
        raise InputError(f"{file} has no box for {missing[0]}")
    return torch.tensor([boxes[path] for path in paths])


class Coverage:
    """Mean share of each object's box that the region of its image covers.

    Args:
        file: see `read_boxes`.
        dataset: of image files, in the loader's order.
        session: with a model that chooses a region.

    Raises:
        InputError: boxes in the images' pixels do not fit the model's input, or the data are no files.
    """

    def __init__(self, file: str, dataset: Dataset, session: Session):
        if session.trained.config["crop_pct"] != 1:
            raise InputError(
                "--boxes are in the pixels of the images: they need a checkpoint with --crop-pct 1"
            )
        if not hasattr(dataset, "samples"):
            raise InputError("--boxes goes with image files: --data-set IMNET")
        paths = [Path(path) for path, _ in dataset.samples]
        boxes = read_boxes(file, Path(session.source.root), paths).clamp(0, session.model.img_size)
        context = session.context
        self.model, self.count = session.model, 0
        self.boxes = boxes[context.rank :: context.world_size].to(context.device)
        dtype = utils.widest_float(context.device)
        self.total = torch.zeros(2, dtype=dtype, device=context.device)  # shares, images

    def add(self, images: Tensor, outputs: list[StageOutput]) -> None:
        """Add the next batch."""
        region = self.model.picture(outputs[-1].info).region
        if region is None:
            raise InputError("--boxes: this model chooses no region")
        box = self.boxes[self.count : self.count + len(images)]
        self.count += len(images)
        overlap = torch.minimum(box[:, 2:], region[:, 2:]) - torch.maximum(box[:, :2], region[:, :2])
        share = overlap.clamp(min=0).prod(dim=-1) / (box[:, 2:] - box[:, :2]).prod(dim=-1)
        share = share.to(self.total).sum()
        self.total += torch.stack([share, torch.tensor(len(images)).to(share)])

    def mean(self) -> float:
        """Return the mean over all processes in percent."""
        shares, count = utils.sum_over_ranks(self.total).tolist()
        return 100 * shares / count


def evaluate_exits(session: Session, boxes: str | None = None) -> None:
    """Send all images to every exit; with a CSV of boxes, also measure how much of them the region covers."""
    dataset, extra = session.dataset(), {}
    coverage = Coverage(boxes, dataset, session) if boxes else None
    predictions = session.predict(dataset, coverage.add if coverage else None)
    accuracy = session.print_exits(predictions)
    if coverage:
        extra["region_coverage"] = coverage.mean()
        if session.context.is_main:
            print(f"\nthe region covers {extra['region_coverage']:.1f} % of an object's box on average")
    session.store(Results(flops=session.gflops, anytime_classification=accuracy), extra)


def sweep_thresholds(session: Session, ignore_stored: bool = False) -> None:
    """Evaluate early exit at the checkpoint's thresholds, or at 0.00, 0.01, ... 1.00 for all exits.

    Thresholds that were solved for other weights or settings are not taken.
    """
    trained = session.trained
    stored = None if ignore_stored else stored_thresholds(trained, trained.checkpoint)
    if stored is not None and (of := other_origin(trained, trained.checkpoint)):
        log.warning("the checkpoint's thresholds are of %s: a sweep instead", of)
        stored = None
    exits = session.model.num_exits
    thresholds = uniform_thresholds(101, exits) if stored is None else stored
    predictions = session.predict(session.dataset())
    accuracy = session.print_exits(predictions)
    curve = operating_points(predictions, thresholds, session.gflops)
    if exits > 1:
        rows = []
        for at in range(0, len(thresholds), 4 if len(thresholds) == 59 else 5):
            levels = threshold_text(thresholds[at].tolist(), ".2f")
            shares = (100 * curve.shares[at]).tolist()
            rows.append([levels, curve.gflops[at].item(), curve.accuracy[at].item(), *shares])
        title = "early exit by threshold" if stored is None else "early exit at the checkpoint's thresholds"
        stages = [f"{stage} %" for stage in session.model.stage_names]
        session.print_table(title, ["threshold", "mean GFLOPs", "top-1 %", *stages], rows)
    budgeted = [curve.gflops.tolist(), curve.accuracy.tolist()]
    session.store(Results(session.gflops, accuracy, budgeted, with_last_exit(thresholds)), {})


def knob_values(model: Adaptive, name: str, texts: list[str]) -> list[Any]:
    """Read values of a model's knob.

    Raises:
        InputError: the model has no such knob, a value is not of its type, or is outside its range.
    """
    if name not in model.knobs:
        names = f"it takes {', '.join(model.knobs)}" if model.knobs else "this model has nothing to vary"
        raise InputError(f"--vary {name}: {names}")
    kind, low, high = model.knobs[name]
    numbers = "whole numbers" if kind is int else "numbers"
    try:
        values = [kind(text) for text in texts]
    except ValueError as error:
        raise InputError(f"--vary takes a name and {numbers}, not {' '.join([name, *texts])}") from error
    for value in values:
        if not low <= value <= high:
            raise InputError(f"--vary {name} {value}: take {numbers} from {low} to {high}")
    return values


def vary_knob(session: Session, name: str, texts: list[str]) -> None:
    """Evaluate one operating point per value of a knob, which the model lets change after training."""
    model = session.model
    values, rows = knob_values(model, name, texts), []
    dataset = session.dataset()
    for value in values:
        setattr(model, name, value)
        predictions = session.predict(dataset)
        own = predictions.gflops
        cost = exit_gflops(model)[-1] if own is None else own[:, -1].mean().item()
        rows.append([value, cost, predictions.summary()[f"exit{model.num_exits - 1}_acc1"]])
    session.print_table(f"{name} after training", [name, "mean GFLOPs", "top-1 %"], rows)
    _, costs, accuracy = zip(*rows, strict=True)
    results = Results(budgeted_batch_classification=[list(costs), list(accuracy)])
    session.store(results, {"varied": {name: values}})


def print_stored(checkpoint_path: str, results_path: Path | None = None) -> None:
    """Print what a checkpoint holds; its results, or those of a JSON file. Needs neither data nor a model."""
    checkpoint = load_checkpoint(checkpoint_path)
    stored = load_json(results_path) if results_path else checkpoint
    results, of = Results.of(stored), origin(stored)
    print(f"{checkpoint_path}: {checkpoint.get('model_name', 'no model name')}")
    for name in ("epoch", "best", "best_weights", "model_kwargs", "data_config"):
        if name in checkpoint:
            print(f"{name}: {checkpoint[name]}")
    if of:
        weights = checkpoint.get(str(of.get("weights")))
        same = isinstance(weights, dict) and digest(weights) == of.get("digest")
        print(f"results of: {described(of)}{'' if same else '; NOT the weights that the checkpoint holds'}")
    print(f"flops: {results.flops}\nanytime_classification: {results.anytime_classification}")
    if results.budgeted_batch_classification is None:
        return print("budgeted_batch_classification: None")
    rows = [list(row) for row in zip(*results.budgeted_batch_classification, strict=True)]
    header = ["GFLOPs", "top-1 %"]
    if results.dynamic_threshold and len(results.flops or []) > 1:
        header += ["point", "threshold"]
        levels = [results.thresholds_at(point) for point in range(len(rows))]
        rows = [[*row, at, threshold_text(levels[at] or [])] for at, row in enumerate(rows)]
    print_table("budgeted_batch_classification", header, rows)
