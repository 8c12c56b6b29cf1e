"""Thresholds for mean costs: solved on calibration images and tried on test images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from checkpointing.format import Results
from inference.session import Session
from inference.thresholds import NEVER, best_thresholds, geometric_shares, thresholds_for_shares
from models import Adaptive
from models.exits import Curve, budget_threshold, operating_points
from utils import InputError

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
    thresholds = ", ".join(f"{value:.4f}" for value in row[0])
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


def stored_thresholds(session: Session) -> Tensor | None:
    """Return the thresholds [T,E-1] of the checkpoint, if it has any.

    Raises:
        InputError: they are of another number of exits.
    """
    stored = Results.of(session.trained.checkpoint).dynamic_threshold
    if stored is None:
        return None
    table, exits = torch.tensor(stored, dtype=torch.float32), session.model.num_exits
    if table.ndim != 2 or table.shape[1] not in (exits - 1, exits):
        raise InputError(
            f"the checkpoint's thresholds are {tuple(table.shape)}, for a model with {exits} exits"
        )
    return table[:, : exits - 1]
