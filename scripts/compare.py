"""Trains the nano models alike on the embedded data set and compares them: a table and a curve.

    python scripts/compare.py --data data/digits --output output/compare

Every model sees the same images the same number of times (scripts/nano.sh). What is there already is not
made again, so an interrupted comparison goes on, and a new system only adds its own run.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from _root import ROOT
from tabulate import tabulate

import utils
from checkpointing.format import Results, load_checkpoint, load_json
from inference.pictures import draw_curve
from utils import log

TWO_STAGE = ["--coarse-only", "0.39", "--select-from", "0"]


class System(NamedTuple):
    """A row of the comparison: its name, the registered model, training flags, and its teacher if any."""

    name: str
    model: str
    flags: list[str] = []
    teacher: str | None = None


SYSTEMS = [
    System("plain 14x14", "deit_nano"),
    System("plain 7x7", "deit_nano", ["--model-kwargs", "patch_size=8"]),
    System("plain 7x7, half size", "deit_nano", ["--model-kwargs", "img_size=28"]),
    System("EViT 14x14, keep 0.7", "evit_deit_nano", ["--fuse_token"]),
    System("EViT 7x7, keep 0.7", "evit_deit_nano", ["--fuse_token", "--model-kwargs", "patch_size=8"]),
    System("A-ViT 7x7", "avit_deit_nano", ["--model-kwargs", "patch_size=8"]),
    # Half of the images: with three networks in one it takes longest by far.
    System("DVT, DeiT, half the training", "dvt_deit_nano", ["--epochs", "1"]),
    System("LF-ViT", "lf_deit_nano", TWO_STAGE),
    System("CF-ViT, DeiT", "cf_deit_nano", TWO_STAGE),
    System("CF-ViT, LV-ViT", "cf_lvvit_nano", TWO_STAGE),
    System("CF-ViT, LV-ViT, token labels", "cf_lvvit_nano", TWO_STAGE, teacher="plain 14x14"),
]


def folder_of(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "_")


def call(*command: str | Path) -> None:
    """Runs a command of the repository; its failure is this one's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # this Python
    if code := subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | {"PATH": path}).returncode:
        raise utils.MainError(f"{' '.join(map(str, command[:3]))} ended with exit code {code}")


def make(system: System, data: Path, output: Path) -> Path:
    """Trains and measures one system; returns its folder."""
    folder = output / folder_of(system.name)
    checkpoint, results = folder / "checkpoint.pth", folder / "test.json"
    if not results.exists():
        flags = list(system.flags)
        if system.teacher:
            labels = output / "token_labels"
            teacher = output / folder_of(system.teacher) / "checkpoint.pth"
            call(
                sys.executable,
                "scripts/make_token_labels.py",
                "--checkpoint",
                teacher,
                "--data-path",
                data,
                "--output",
                labels,
            )
            flags += ["--token-label", "--token-label-data", str(labels)]
        call("bash", "scripts/nano.sh", system.model, data, folder, *flags)
        infer = [sys.executable, "dynamic_inference.py", "--data_url", data, "--checkpoint_path", checkpoint]
        infer += ["--num_workers", "0", "--eval-mode", "1"]
        call(*infer)
        call(*infer, "--split", "test", "--results", results)
    return folder


def main() -> None:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/digits"), help="from scripts/make_digits.py")
    parser.add_argument("--output", type=Path, default=Path("output/compare"))
    args = parser.parse_args()
    utils.start_logging(utils.start("cpu"))
    data, output = args.data.resolve(), args.output.resolve()
    if not (data / "train").is_dir():
        raise FileNotFoundError(f"no {data / 'train'}: python scripts/make_digits.py --output {args.data}")
    output.mkdir(parents=True, exist_ok=True)
    rows, curves, plain = [], {}, []
    for system in SYSTEMS:
        folder = make(system, data, output)
        val = Results.of(load_checkpoint(folder / "checkpoint.pth"))
        test = Results.of(load_json(folder / "test.json"))
        row = [
            system.name,
            1000 * test.flops[-1],
            val.anytime_classification[-1],
            test.anytime_classification[-1],
        ]
        if len(test.flops) == 1:
            cost, accuracy = (column[-1] for column in test.budgeted_batch_classification)
            plain.append((system.name, cost, accuracy))
            varies = cost < 0.999 * test.flops[0]  # with the image, as where tokens halt
            rows.append(row + [None, None, *((1000 * cost, accuracy) if varies else (None, None))])
            continue
        curves[system.name] = test
        chosen = val.cheapest(0.99)
        cost, accuracy = (column[chosen] for column in test.budgeted_batch_classification)
        rows.append(row + [test.anytime_classification[0], chosen / 100, 1000 * cost, accuracy])
    header = ["", "full MFLOPs", "val top-1 %", "test top-1 %", "first exit, test"]
    header += ["threshold*", "mean MFLOPs*", "test top-1 %*"]
    table = tabulate(rows, header, tablefmt="github", floatfmt=".2f", missingval="")
    print(
        f"\n{table}\n\n* lowest threshold that keeps 99 % of the full accuracy on val; A-ViT: as tokens halt"
    )
    utils.write_atomically(output / "table.md", lambda path: path.write_text(table + "\n"))
    draw_curve(curves, output / "curve.png", plain)
    log.info("wrote table.md and curve.png to %s", args.output)


if __name__ == "__main__":
    utils.run_command(main)
