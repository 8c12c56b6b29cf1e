"""Train several models on one data set with one recipe and compare them: a table and a curve.

    python scripts/compare.py --data data/digits --output output/compare --systems NAME:MODEL:FLAGS ...

Every model sees the same images the same number of times (scripts/nano.sh), unless its FLAGS, further flags
of main_deit.py, say otherwise. Nothing is made twice, so an interrupted comparison goes on, and a new system
only adds its own run. scripts/compare.sh compares this project's models.
"""

from _root import ROOT

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

import utils
from checkpointing.format import Results, load_checkpoint, load_json, read_pair
from inference.pictures import draw_curve
from inference.thresholds import threshold_text
from utils import InputError, log

HEADER = ["", "full MFLOPs", "val top-1 %", "test top-1 %", "first exit, test"]
HEADER += ["threshold*", "mean MFLOPs*", "test top-1 %*"]
NOTE = (
    "* lowest threshold that keeps 99 % of the full accuracy on val; of one exit: what images cost themselves"
)


class System(NamedTuple):
    """A row of the comparison: its name, the registered model, and training flags."""

    name: str
    model: str
    flags: list[str]

    @classmethod
    def of(cls, text: str) -> "System":
        """Read NAME:MODEL or NAME:MODEL:FLAGS, the flags as a shell splits them."""
        name, _, rest = text.partition(":")
        model, _, flags = rest.partition(":")
        if not name or not model:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME:MODEL:FLAGS")
        return cls(name, model, shlex.split(flags))

    def folder(self, output: Path) -> Path:
        return output / self.name.lower().replace(",", "").replace(" ", "_")


def call(*command: str | Path) -> None:
    """Run a command of the repository.

    Raises:
        MainError: it failed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # this Python
    if code := subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | {"PATH": path}).returncode:
        raise utils.MainError(f"{' '.join(map(str, command[:3]))} ended with exit code {code}")


def make(system: System, teacher: System | None, data: Path, output: Path) -> tuple[Results, Results]:
    """Train and measure a system, unless that is done; return its results on val and on test.

    Args:
        system: what to train.
        teacher: a system that makes token labels for it, if any.
        data: folder with train/, val/ and test/.
        output: folder with a folder per system.
    """
    folder = system.folder(output)
    checkpoint, results = folder / "checkpoint.pth", folder / "test.json"
    if not results.exists():
        flags = list(system.flags)
        if teacher:
            source = teacher.folder(output) / "checkpoint.pth"
            labels = teacher.folder(output) / "token_labels"
            script = [sys.executable, "scripts/make_token_labels.py", "--checkpoint", source]
            call(*script, "--data-path", data, "--output", labels)
            flags += ["--token-label", "--token-label-data", str(labels)]
        call("bash", "scripts/nano.sh", system.model, data, folder, *flags)
        infer = [sys.executable, "dynamic_inference.py", "--data_url", data, "--checkpoint_path", checkpoint]
        infer += ["--num_workers", "0", "--eval-mode", "1"]
        call(*infer)
        call(*infer, "--split", "test", "--results", results)
    return read_pair(load_checkpoint(checkpoint), load_json(results))


def table_row(name: str, val: Results, test: Results) -> list[Any]:
    """Return the cells of a system; the operating point is chosen on val."""
    row = [name, 1000 * test.flops[-1], val.anytime_classification[-1], test.anytime_classification[-1]]
    exits, chosen = len(test.flops), val.cheapest(0.99)
    cost, accuracy = (column[chosen] for column in test.budgeted_batch_classification)
    if exits > 1:
        first = test.anytime_classification[0]
        levels = val.thresholds_at(chosen)
        return row + [first, levels and threshold_text(levels, ".2f"), 1000 * cost, accuracy]
    varies = cost < 0.999 * test.flops[0]
    return row + [None, None, *((1000 * cost, accuracy) if varies else (None, None))]


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/digits"), help="from scripts/make_digits.py")
    add("--output", type=Path, default=Path("output/compare"))
    systems = "what to compare: a name for the table, a registered model, further flags of main_deit.py"
    add("--systems", type=System.of, nargs="+", required=True, metavar="NAME:MODEL:FLAGS", help=systems)
    teachers = "train system NAME on token labels that system TEACHER, an earlier one, makes"
    add("--teacher", nargs=2, action="append", default=[], metavar=("NAME", "TEACHER"), help=teachers)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    systems = {system.name: system for system in args.systems}
    if unknown := {name for pair in args.teacher for name in pair} - systems.keys():
        raise InputError(f"--teacher names no system: {', '.join(sorted(unknown))}")
    teachers = {name: systems[teacher] for name, teacher in args.teacher}
    utils.start_logging(utils.start("cpu"))
    data, output = args.data.resolve(), args.output.resolve()
    if not (data / "train").is_dir():
        raise FileNotFoundError(f"no {data / 'train'}: python scripts/make_digits.py --output {args.data}")
    output.mkdir(parents=True, exist_ok=True)
    rows, curves, plain = [], {}, []
    for name, system in systems.items():
        val, test = make(system, teachers.get(name), data, output)
        rows.append(table_row(name, val, test))
        if len(test.flops) > 1:
            curves[name] = test
        else:
            plain.append((name, *(column[-1] for column in test.budgeted_batch_classification)))
    table = tabulate(rows, HEADER, tablefmt="github", floatfmt=".2f", missingval="")
    print(f"\n{table}\n\n{NOTE}")
    utils.write_atomically(output / "table.md", lambda path: path.write_text(table + "\n"))
    draw_curve(curves, output / "curve.png", plain)
    log.info("wrote table.md and curve.png to %s", args.output)


if __name__ == "__main__":
    utils.run_command(main)
