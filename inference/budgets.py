"""Thresholds for mean costs: solved on calibration images and tried on test images."""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from checkpointing.format import Results, described, origin
from inference.session import Session, TrainedModel
from inference.thresholds import (
    NEVER,
    best_thresholds,
    geometric_shares,
    threshold_level,
    threshold_text,
    thresholds_for_shares,
)
from models import Adaptive
from models.exits import DEFAULT_THRESHOLD, Curve, budget_threshold, operating_points
from utils import NON_NEGATIVE, NON_NEGATIVE_INT, InputError, log

SOLVERS = {
    "geometric": "exit shares that fall geometrically, arXiv 2105.15075",
    "joint": "the thresholds of highest accuracy at the costs of those shares",
}
SPLITS = ("calibration", "test")


class Calibration(NamedTuple):
    """Images that thresholds are solved on.

    Attributes:
        split: None for every other image of the split to evaluate on; the rest is then tested.
        images: at most so many of the split, drawn at random.
    """

    split: str | None = None
    images: int = 50000

    def datasets(self, session: Session) -> list[Dataset]:
        """Return the calibration images and the test images.

        Raises:
            InputError: one of them is empty.
        """
        tested = session.dataset()
        if self.split:
            calibration = session.dataset(self.split)
            if len(calibration) > self.images:
                order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
                calibration = Subset(calibration, order[: self.images].sort().values.tolist())
        else:
            calibration, tested = (Subset(tested, range(first, len(tested), 2)) for first in (0, 1))
        if min(len(calibration), len(tested)) == 0:
            raise InputError("no images are left to calibrate on or to test on: there is only one")
        return [calibration, tested]


def check_early_exits(model: Adaptive) -> None:
    if model.num_exits == 1:
        raise InputError("thresholds are for models with several exits; this one has a single one")


def solve_budget(session: Session, calibration: Calibration, budget: float, joint: bool) -> None:
    """Solve for one budget of mean GFLOPs: a common threshold, or with `joint` one per exit."""
    check_early_exits(session.model)
    parts, gflops = calibration.datasets(session), session.gflops
    predictions = [session.predict(parts[0])]
    common = budget_threshold(predictions[0], gflops, budget)
    row = torch.full((1, session.model.num_exits - 1), common)
    if joint:
        row = best_thresholds(predictions[0], gflops, torch.tensor([budget]), row)
    predictions.append(session.predict(parts[1]))
    rows, solved = [], {"budget": budget, "threshold": row[0].tolist() if joint else common}
    for split, part in zip(SPLITS, predictions, strict=True):
        curve = operating_points(part, row, gflops)
        cost, accuracy = curve.gflops.item(), curve.accuracy.item()
        rows.append([split, len(part.correct), cost, accuracy])
        solved[split] = {"mean_gflops": cost, "accuracy": accuracy}
    thresholds = threshold_text(row[0].tolist(), ".4f")
    header = ["split", "images", "mean GFLOPs", "top-1 %"]
    session.print_table(f"budget {budget} GFLOPs: threshold {thresholds}", header, rows)
    session.store(Results(), {"budget": solved})


def solve_curve(session: Session, calibration: Calibration, solver: str) -> None:
    """Solve for 59 budgets and store the thresholds with what they give on the test images.

    Args:
        session: of a model with several exits.
        calibration: images to solve on.
        solver: one of SOLVERS; "joint" also shows what "geometric" gives.
    """
    check_early_exits(session.model)
    gflops = session.gflops
    predictions = [session.predict(part) for part in calibration.datasets(session)]
    accuracy = session.print_exits(predictions[1])
    # Thresholds, and the curves of both splits.
    shares = geometric_shares(session.model.num_exits)
    solved = {"geometric": thresholds_for_shares(predictions[0].confidence, shares)}
    if solver == "joint":
        budgets = operating_points(predictions[0], solved["geometric"], gflops).gflops
        solved["joint"] = best_thresholds(predictions[0], gflops, budgets, solved["geometric"])
    curves = {
        name: [operating_points(part, thresholds, gflops) for part in predictions]
        for name, thresholds in solved.items()
    }
    target = (shares.double() @ torch.tensor(gflops, dtype=torch.float64)).tolist()
    # Tables and results.
    sizes = [len(part.correct) for part in predictions]
    title = f"{sizes[0]} calibration and {sizes[1]} test images; every fourth of {len(target)} budgets"
    session.print_table(title, *curve_table(target, curves))
    if solver == "joint" and session.context.is_main:
        gains = [
            (joint.accuracy - geometric.accuracy).mean().item()
            for joint, geometric in zip(curves["joint"], curves["geometric"], strict=True)
        ]
        print(f"\njoint above geometric, mean points: {gains[0]:.2f} on calibration, {gains[1]:.2f} on test")
    tested = curves[solver][1]
    budgeted = [tested.gflops.tolist(), tested.accuracy.tolist()]
    extra: dict[str, Any] = {"solver": solver, "target_gflops": target}
    for name, pair in curves.items():
        for split, curve in zip(SPLITS, pair, strict=True):
            extra[f"{name}_{split}"] = {"gflops": curve.gflops.tolist(), "accuracy": curve.accuracy.tolist()}
    session.store(Results(gflops, accuracy, budgeted, with_last_exit(solved[solver])), extra)


def curve_table(target: list[float], curves: dict[str, list[Curve]]) -> tuple[list[str], list[list[float]]]:
    """Return header and rows of a table of curves, calibration and test, at every fourth budget."""
    header, columns = ["target GFLOPs"], [target]
    for solver, pair in curves.items():
        for split, curve in zip(SPLITS, pair, strict=True):
            header += [f"{solver}, {split}: GFLOPs", "top-1 %"]
            columns += [curve.gflops.tolist(), curve.accuracy.tolist()]
    return header, [list(row) for row in zip(*columns, strict=True)][::4]


def with_last_exit(thresholds: Tensor) -> list[list[float]]:
    """Return thresholds [T,E-1] as checkpoints keep them, [T][E]: all that is left takes the last exit."""
    last = torch.full_like(thresholds[:, :1], -NEVER)
    return torch.cat([thresholds, last], dim=1).tolist()


def stored_thresholds(trained: TrainedModel, stored: dict[str, Any]) -> Tensor | None:
    """Return the thresholds [T,E-1] of a checkpoint or of a JSON file of results, if it has any.

    Raises:
        InputError: they are of another number of exits.
    """
    table = Results.of(stored).dynamic_threshold
    if table is None:
        return None
    table, exits = torch.tensor(table, dtype=torch.float32), trained.model.num_exits
    if table.ndim != 2 or table.shape[1] not in (exits - 1, exits):
        raise InputError(f"the stored thresholds are {tuple(table.shape)}, for a model with {exits} exits")
    return table[:, : exits - 1]


def other_origin(trained: TrainedModel, stored: dict[str, Any]) -> str | None:
    """Return what stored results are of, where that is not the opened model's weights and settings."""
    of, own = origin(stored), trained.results_of("")
    if not of:  # as published files, whose results are those of `model`
        return None if trained.weights == "model" else described({"weights": "model"})
    differ = any(of.get(key) != own.get(key) for key in (of.keys() | own.keys()) - {"split", "epoch"})
    return described(of) if differ else None


def add_threshold_flags(parser: argparse._ActionsContainer) -> None:
    """Add the ways to say where images leave early, see `choose_thresholds`."""
    add = parser.add_mutually_exclusive_group().add_argument
    add(
        "--threshold",
        type=threshold_level,
        nargs="+",
        metavar="T",
        help="confidence that lets an image leave early, 0 to 1 or never: one for all exits, or one for each"
        f" but the last; default: {DEFAULT_THRESHOLD}",
    )
    add(
        "--point",
        type=NON_NEGATIVE_INT,
        metavar="N",
        help="take row N, from 0, of the stored thresholds instead: of --results FILE, if it is there and has"
        " any, else of the checkpoint",
    )
    add(
        "--stored-budget",
        type=NON_NEGATIVE,
        metavar="GFLOPS",
        help="take the row of the highest stored accuracy within this mean cost",
    )


def choose_thresholds(
    trained: TrainedModel,
    levels: list[float] | None,
    point: int | None = None,
    budget: float | None = None,
    results: dict[str, Any] | None = None,
) -> list[float]:
    """Return the thresholds of the early exits: given ones, or an operating point of a stored table.

    Args:
        trained: the model, with its checkpoint.
        levels: one for all early exits, or one for each; default: DEFAULT_THRESHOLD.
        point: row of the stored table.
        budget: mean GFLOPs: the row of the highest stored accuracy within them.
        results: of a JSON file; the table is the checkpoint's where they hold none.

    Raises:
        InputError: the model has another number of exits; there is no table, no such row in it, or it is of
            other weights.
    """
    early = trained.model.num_exits - 1
    if point is None and budget is None:
        levels = levels or [DEFAULT_THRESHOLD]
        if len(levels) not in (1, early):
            raise InputError(f"--threshold has {len(levels)} numbers: take 1, or {early} for this model")
        return levels * early if len(levels) == 1 else levels
    check_early_exits(trained.model)
    stored = results if results and results.get("dynamic_threshold") is not None else trained.checkpoint
    table = stored_thresholds(trained, stored)
    if table is None:
        raise InputError("no thresholds are stored: make some with dynamic_inference.py --solve joint")
    if of := other_origin(trained, stored):
        raise InputError(f"the stored thresholds are of {of}, not of {described(trained.results_of(''))}")
    if budget is not None:
        point = best_point(Results.of(stored), budget)
    if point >= len(table):
        raise InputError(f"--point {point}: the stored thresholds have the rows 0 to {len(table) - 1}")
    log.info("stored point %d: threshold %s", point, threshold_text(table[point].tolist()))
    return table[point].tolist()


def best_point(results: Results, budget: float) -> int:
    """Return the operating point of the highest stored accuracy within a budget, the cheapest of equal ones.

    Raises:
        InputError: there is none, or the thresholds have no curve.
    """
    curve = results.budgeted_batch_classification
    if curve is None or len(curve[0]) != len(results.dynamic_threshold):
        raise InputError("the stored thresholds have no curve: run dynamic_inference.py --eval-mode 1 first")
    within = [at for at, cost in enumerate(curve[0]) if cost <= budget]
    if not within:
        raise InputError(
            f"--stored-budget {budget}: the cheapest stored point takes {min(curve[0]):.4g} GFLOPs"
        )
    return max(within, key=lambda at: (curve[1][at], -curve[0][at]))
