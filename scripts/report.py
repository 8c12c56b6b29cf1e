"""Print the closing table of the quickstart: what early exit gives, chosen on val and measured on test.

python scripts/report.py CHECKPOINT RESULTS.json
"""

import _root as _root

from typing import Any

from tabulate import tabulate

import utils
from checkpointing.format import Results, load_checkpoint, load_json, read_pair
from inference.thresholds import threshold_text
from models.weights import model_from_checkpoint
from utils import InputError

# What the quickstart has to reach: percentage points for "gain", else percent.
PASS = {"gain": 6.0, "coverage": 90.0, "accuracy": 99.0, "cost": 75.0}


def thresholds_of(results: Results, at: int, form: str) -> str:
    """Return the stored thresholds of an operating point, one where its exits share it."""
    levels = results.thresholds_at(at)
    return "not stored" if levels is None else threshold_text(levels, form)


def print_accuracy(name: str, stages: tuple[str, ...], test: Results) -> None:
    """Print cost and accuracy of the first exit, of three operating points, and of all stages."""
    gflops, accuracy = test.budgeted_batch_classification
    rows = [[f"{stages[0]} stage alone", test.flops[0], test.anytime_classification[0]]]
    for share in (0.5, 0.7, 0.9):
        at = round(share * (len(gflops) - 1))
        rows.append([f"early exit, threshold {thresholds_of(test, at, '.3g')}", gflops[at], accuracy[at]])
    every = "both stages" if len(stages) == 2 else "all stages"
    rows.append([every, test.flops[-1], test.anytime_classification[-1]])
    print(tabulate(rows, [f"{name}, test images", "mean GFLOPs", "top-1 %"], floatfmt=("", ".4f", ".2f")))


def print_speed(name: str, timed: dict[str, Any]) -> None:
    """Print images per second of early exit and of the plain model beside it."""
    plain = timed["baseline"]
    levels = timed["threshold"]
    levels = threshold_text(levels if isinstance(levels, list) else [levels], "g")
    rows = [[f"{name}, early exit at {levels}", timed["mean_gflops"], timed["images_per_second"]]]
    rows += [[f"plain {plain['model']}, untrained", plain["gflops"], plain["images_per_second"]]]
    print("\n" + tabulate(rows, ["speed", "mean GFLOPs", "images/s"], floatfmt=("", ".4f", ".0f")))
    saved = plain["gflops"] / timed["mean_gflops"]
    print(f"{timed['speedup']:.2f}x the images per second for {saved:.2f}x fewer GFLOPs")


def print_marks(stages: tuple[str, ...], val: Results, test: Results, coverage: float | None) -> None:
    """Print which marks are passed; the operating point is chosen on val.

    Args:
        stages: their names.
        val, test: results on the two splits.
        coverage: mean share of an object's box in the region, in percent; None where there is no region.
    """
    chosen, every = val.cheapest(PASS["accuracy"] / 100), "both stages" if len(stages) == 2 else "all stages"
    gflops, accuracy = (column[chosen] for column in test.budgeted_batch_classification)
    first, full = test.anytime_classification[0], test.anytime_classification[-1]
    threshold, cost = thresholds_of(val, chosen, ".2f"), 100 * gflops / test.flops[-1]
    marks = [[f"{stages[-1]} above {stages[0]}, points", full - first, "gain"]]
    if coverage is not None:
        marks.append(["region covers of the digit, %", coverage, "coverage"])
    marks.append([f"cost at threshold {threshold}, % of {every}", cost, "cost"])
    marks.append([f"accuracy there, % of {every}", 100 * accuracy / full, "accuracy"])
    rows = []
    for text, value, mark in marks:
        reached = value <= PASS[mark] if mark == "cost" else value >= PASS[mark]
        wanted = f"{'<=' if mark == 'cost' else '>='} {PASS[mark]:g}"
        rows.append([text, value, wanted, "reached" if reached else "MISSED"])
    header = ["pass marks (threshold chosen on val)", "measured", "wanted", ""]
    print("\n" + tabulate(rows, header, floatfmt=".1f"))


def main() -> None:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="with the results on val")
    parser.add_argument("results", metavar="RESULTS.json", help="the results on test, eval modes 0, 1 and 2")
    args = parser.parse_args()
    checkpoint, stored = load_checkpoint(args.checkpoint), load_json(args.results)
    model, name, _ = model_from_checkpoint(checkpoint, args.checkpoint, None, {})
    if model.num_exits == 1:
        raise InputError(f"{args.checkpoint}: {name} has one exit; the table is of early exit")
    val, test = read_pair(checkpoint, stored)
    for file, results in ((args.checkpoint, val), (args.results, test)):
        if results.budgeted_batch_classification is None:
            raise InputError(f"{file} holds no curve: run dynamic_inference.py --eval-mode 1 first")
    print_accuracy(name, model.stage_names, test)
    if "baseline" in stored.get("timed", {}):
        print_speed(name, stored["timed"])
    print_marks(model.stage_names, val, test, stored.get("region_coverage"))


if __name__ == "__main__":
    utils.run_command(main)
