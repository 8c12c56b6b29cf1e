"""Thresholds for mean costs, found on one part of the data and tried on another: dynamic_inference.py's
--budget and --solve."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from checkpointing.format import Results
from inference.session import Session, show, show_exits, store
from inference.thresholds import NEVER, best_thresholds, geometric_shares, thresholds_for_shares
from models.exits import budget_threshold, operating_points

SOLVERS = {
    "geometric": "DVT's exit shares",
    "joint": "the thresholds of highest accuracy at the costs of those shares",
}


def splits(session: Session) -> tuple[Dataset, Dataset]:
    """Images to calibrate on and others to test on: --calibration and --split, or the halves of --split."""
    args = session.args
    tested = session.dataset(args.split)
    if args.calibration:
        calibration = session.dataset(args.calibration)
        if len(calibration) > args.calibration_images:
            order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
            calibration = Subset(calibration, order[: args.calibration_images].sort().values.tolist())
    else:
        calibration, tested = (Subset(tested, range(first, len(tested), 2)) for first in (0, 1))
    if min(len(calibration), len(tested)) == 0:
        raise ValueError("no images are left to calibrate on or to test on: there is only one")
    return calibration, tested


def with_last(thresholds: Tensor) -> list[list[float]]:
    """Thresholds [T,E-1] as checkpoints keep them, [T][E]: what is left leaves at the last exit."""
    last = torch.full_like(thresholds[:, :1], -NEVER)
    return torch.cat([thresholds, last], dim=1).tolist()


def check_early_exits(session: Session) -> None:
    if session.model.num_exits == 1:
        raise ValueError("thresholds are for models with several exits; this one has a single one")


def mode_budget(session: Session) -> None:
    """--budget: the thresholds for one mean cost; a common one, or with --solve joint one per exit."""
    check_early_exits(session)
    args, gflops = session.args, session.gflops
    calibration, tested = splits(session)
    known = session.predict(calibration)
    common = budget_threshold(known, gflops, args.budget)
    row = torch.full((1, session.model.num_exits - 1), common)
    if args.solve == "joint":
        row = best_thresholds(known, gflops, torch.tensor([args.budget]), row)
    new = session.predict(tested)
    rows, found = [], {"budget": args.budget, "threshold": row[0].tolist() if args.solve else common}
    for title, predictions in (("calibration", known), ("test", new)):
        curve = operating_points(predictions, row, gflops)
        rows.append([title, len(predictions.correct), curve.gflops.item(), curve.accuracy.item()])
        found[title] = {"mean_gflops": curve.gflops.item(), "accuracy": curve.accuracy.item()}
    if session.context.is_main:
        header = ["split", "images", "mean GFLOPs", "top-1 %"]
        told = ", ".join(f"{value:.4f}" for value in row[0])
        show(f"budget {args.budget} GFLOPs: threshold {told}", header, rows)
    store(session, Results(), {"budget": found})


def mode_solve(session: Session) -> None:
    """--solve: thresholds of 59 budgets from calibration images, tried on the test images and stored."""
    check_early_exits(session)
    args, gflops = session.args, session.gflops
    calibration, tested = splits(session)
    known, new = session.predict(calibration), session.predict(tested)
    accuracy = show_exits(session, new)
    shares = geometric_shares(session.model.num_exits)
    found = {"geometric": thresholds_for_shares(known.confidence, shares)}
    budgets = operating_points(known, found["geometric"], gflops).gflops
    if args.solve == "joint":
        found["joint"] = best_thresholds(known, gflops, budgets, found["geometric"])
    curves = {
        solver: [operating_points(predictions, thresholds, gflops) for predictions in (known, new)]
        for solver, thresholds in found.items()
    }
    target = (shares.double() @ torch.tensor(gflops, dtype=torch.float64)).tolist()
    header, rows = ["target GFLOPs"], [[value] for value in target]
    for solver, both in curves.items():
        for split, curve in zip(("calibration", "test"), both, strict=True):
            header += [f"{solver}, {split}: GFLOPs", "top-1 %"]
            for row, cost, top1 in zip(rows, curve.gflops.tolist(), curve.accuracy.tolist(), strict=True):
                row += [cost, top1]
    if session.context.is_main:
        images = f"{len(known.correct)} calibration and {len(new.correct)} test images"
        show(f"{images}; every fourth of {len(rows)} budgets", header, rows[::4])
        if args.solve == "joint":
            gains = [
                (joint.accuracy - geometric.accuracy).mean().item()
                for joint, geometric in zip(curves["joint"], curves["geometric"], strict=True)
            ]
            told = f"{gains[0]:.2f} on calibration, {gains[1]:.2f} on test"
            print(f"\njoint above geometric, mean points: {told}")
    curve = curves[args.solve][1]
    results = Results(
        gflops, accuracy, [curve.gflops.tolist(), curve.accuracy.tolist()], with_last(found[args.solve])
    )
    extra: dict[str, Any] = {"solver": args.solve, "target_gflops": target}
    for solver, both in curves.items():
        for split, one in zip(("calibration", "test"), both, strict=True):
            extra[f"{solver}_{split}"] = {"gflops": one.gflops.tolist(), "accuracy": one.accuracy.tolist()}
    store(session, results, extra)


def stored_thresholds(session: Session) -> Tensor | None:
    """Thresholds [T,E-1] of the checkpoint, if it has any.

    Raises:
        ValueError: they are of another number of exits.
    """
    stored = Results.of(session.checkpoint).dynamic_threshold
    if stored is None:
        return None
    table, exits = torch.tensor(stored, dtype=torch.float32), session.model.num_exits
    if table.ndim != 2 or table.shape[1] not in (exits - 1, exits):
        raise ValueError(
            f"the checkpoint's thresholds are {tuple(table.shape)}, for a model with {exits} exits"
        )
    return table[:, : exits - 1]
