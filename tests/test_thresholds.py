"""Threshold solvers against the published ones' outputs, a literal walk through the images, and all pairs."""

import itertools
import json

import numpy as np
import pytest
import torch
from cases import VECTORS
from safetensors.torch import load_file

from inference.thresholds import NEVER, best_thresholds, geometric_shares, thresholds_for_shares
from models.exits import Predictions, operating_points

CASES = ["dvt_threshold_a", "dvt_threshold_edge_ties"]


def predictions(probabilities: torch.Tensor, target: torch.Tensor) -> Predictions:
    """From probabilities [E,n,K]."""
    confidence, best = probabilities.transpose(0, 1).max(dim=-1)
    correct = best == target[:, None]
    return Predictions(confidence, correct, correct, torch.zeros_like(confidence))


@pytest.mark.parametrize("stem", CASES)
def test_thresholds_cost_and_accuracy_equal_the_published_codes(stem: str) -> None:
    case = load_file(VECTORS / f"{stem}.safetensors")
    gflops = json.loads((VECTORS / f"{stem}.json").read_text())["flops"]
    shares = geometric_shares(3)
    torch.testing.assert_close(shares, case["output.exit_fractions"], atol=1e-7, rtol=0)
    found = {
        split: predictions(case[f"input.{split}_probs"], case[f"input.{split}_targets"].long())
        for split in ("calib", "test")
    }
    thresholds = thresholds_for_shares(found["calib"].confidence, shares)
    assert torch.equal(thresholds, case["output.thresholds"][:, :2])
    for split, known in found.items():
        curve = operating_points(known, thresholds, gflops)
        n = len(known.correct)
        assert torch.equal((curve.shares * n).round().long(), case[f"output.{split}_exit_counts"].long())
        torch.testing.assert_close(
            curve.accuracy, case[f"output.{split}_accuracy"].double(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            curve.gflops, case[f"output.{split}_expected_flops"].double(), atol=0, rtol=1e-5
        )
        summary = [known.summary()[f"exit{k}_acc1"] for k in range(3)]
        assert summary == pytest.approx(case[f"output.{split}_anytime_top1"].tolist(), abs=1e-4)


def walk(confidence: np.ndarray, shares: np.ndarray) -> list[float]:
    """The rule as it is told: per exit, count down the images that are still there."""
    gone, found = set(), []
    for k in range(confidence.shape[1] - 1):
        wanted, threshold, seen = int(np.floor(np.float32(len(confidence)) * shares[k])), NEVER, 0
        for i in sorted(range(len(confidence)), key=lambda i: -confidence[i, k]):
            if i in gone or wanted == 0:
                continue
            seen += 1
            if seen == wanted:
                threshold = float(confidence[i, k])
                break
        gone |= {i for i in range(len(confidence)) if confidence[i, k] >= threshold}
        found.append(threshold)
    return found


@pytest.mark.parametrize("exits", [2, 3, 4])
@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_shares_become_thresholds_as_if_images_were_counted_one_by_one(exits: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels + exits)
    confidence = torch.randint(levels, (37, exits), generator=generator).float() / levels
    shares = geometric_shares(exits)
    found = thresholds_for_shares(confidence, shares)
    expected = [walk(confidence.numpy(), row) for row in shares.numpy()]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0, rtol=0)


def random_predictions(n: int, exits: int, levels: int, seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.randint(1, levels, (n, exits), generator=generator).float() / levels
    correct = torch.rand(n, exits, generator=generator) < confidence
    return Predictions(confidence, correct, correct, confidence)


@pytest.mark.parametrize("exits", [2, 3])
@pytest.mark.parametrize("levels", [4, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_trying_all_thresholds_finds(exits: int, levels: int, seed: int) -> None:
    known, gflops = random_predictions(17, exits, levels, seed), [1.0, 2.5, 6.0][:exits]
    budgets = torch.tensor([1.0, 1.3, 2.0, 3.3, 6.0])
    start = torch.full((5, exits - 1), 0.5)
    found = best_thresholds(known, gflops, budgets, start)
    choices = [torch.cat([known.confidence[:, k].unique(), torch.tensor([NEVER])]) for k in range(exits - 1)]
    every = torch.tensor(list(itertools.product(*choices)))
    tried = operating_points(known, every, gflops)
    reached = operating_points(known, found, gflops)
    for row, budget in enumerate(budgets):
        fits = tried.gflops <= budget + 1e-9
        assert reached.gflops[row] <= budget + 1e-9
        assert reached.accuracy[row].item() == pytest.approx(tried.accuracy[fits].max().item())


def test_the_search_is_never_worse_than_where_it_starts() -> None:
    known, gflops = random_predictions(500, 3, 10**6, 0), [1.0, 2.5, 6.0]
    start = thresholds_for_shares(known.confidence, geometric_shares(3))
    before = operating_points(known, start, gflops)
    after = operating_points(known, best_thresholds(known, gflops, before.gflops, start, 16), gflops)
    assert (after.accuracy >= before.accuracy).all() and (after.accuracy > before.accuracy).any()
    assert (after.gflops <= before.gflops + 1e-9).all()


def test_what_cannot_be_solved_is_refused() -> None:
    known, start = random_predictions(5, 3, 100, 0), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="below the cost of the first exit"):
        best_thresholds(known, [1.0, 2.0, 3.0], torch.tensor([0.9]), start)
    with pytest.raises(ValueError, match="2 or 3 exits"):
        best_thresholds(random_predictions(5, 1, 100, 0), [1.0], torch.tensor([1.0]), start)
