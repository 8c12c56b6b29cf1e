"""Closing table of the quickstart: what a checkpoint reaches, choices made on val and figures from test.

python scripts/report.py CHECKPOINT RESULTS.json
"""

import sys

import _root as _root
from tabulate import tabulate

import utils
from checkpointing.format import Results, load_checkpoint, load_json

PASS = {"focus": 6.0, "coverage": 90.0, "accuracy": 99.0, "cost": 75.0}


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("give the checkpoint and the results file")
    val = Results.of(load_checkpoint(sys.argv[1]))
    stored = load_json(sys.argv[2])
    test, timed = Results.of(stored), stored["timed"]
    gflops, accuracy = test.budgeted_batch_classification

    rows = [["location stage alone", test.flops[0], test.anytime_classification[0]]]
    rows += [[f"early exit, threshold {t / 100:.1f}", gflops[t], accuracy[t]] for t in (50, 70, 90)]
    rows += [["both stages", test.flops[1], test.anytime_classification[1]]]
    print(tabulate(rows, ["LF-ViT nano, test images", "mean GFLOPs", "top-1 %"], floatfmt=("", ".4f", ".2f")))

    plain = timed["baseline"]
    speed = [["LF-ViT nano, early exit at 0.7", timed["mean_gflops"], timed["images_per_second"]]]
    speed += [[f"plain {plain['model']}, untrained", plain["gflops"], plain["images_per_second"]]]
    print("\n" + tabulate(speed, ["speed", "mean GFLOPs", "images/s"], floatfmt=("", ".4f", ".0f")))
    saved = plain["gflops"] / timed["mean_gflops"]
    print(f"{timed['speedup']:.2f}x the images per second for {saved:.2f}x fewer GFLOPs")

    chosen = val.cheapest(PASS["accuracy"] / 100)
    gain = test.anytime_classification[1] - test.anytime_classification[0]
    kept = 100 * accuracy[chosen] / test.anytime_classification[1]
    cost = 100 * gflops[chosen] / test.flops[1]
    marks = [
        ["focus above location, points", gain, f">= {PASS['focus']:g}", gain >= PASS["focus"]],
        ["region covers of the digit, %", stored["region_coverage"], f">= {PASS['coverage']:g}"],
        [
            f"cost at threshold {chosen / 100:.2f}, % of both stages",
            cost,
            f"<= {PASS['cost']:g}",
            cost <= PASS["cost"],
        ],
        ["accuracy there, % of both stages", kept, f">= {PASS['accuracy']:g}", kept >= PASS["accuracy"]],
    ]
    marks[1].append(marks[1][1] >= PASS["coverage"])
    for mark in marks:
        mark[3] = "reached" if mark[3] else "MISSED"
    print(
        "\n"
        + tabulate(marks, ["pass marks (threshold chosen on val)", "found", "wanted", ""], floatfmt=".1f")
    )


if __name__ == "__main__":
    utils.run_command(main)
