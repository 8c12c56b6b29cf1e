"""Prove on one device that all is right, and measure how fast it is: one report of checks and tables.

    python scripts/acceptance.py --output DIR --minutes 25

A recipe, scripts/acceptance.json, names the parts: commands of this project, each with a time limit of its
own. The report, acceptance.json and acceptance.md, is written anew after every part. A check that fails makes
the exit code 1; a goal of speed that is missed does not.
"""

from _root import ROOT

import argparse
import csv
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import timm
import torch
from tabulate import tabulate

import utils
from utils import InputError, MainError, Number, log

RECIPE = ROOT / "scripts" / "acceptance.json"
SIGNAL_GRACE = 60  # seconds for a checkpoint after a signal


class Check(NamedTuple):
    """One line of the report.

    Attributes:
        part: of the recipe.
        check: what is asked.
        met: whether it is so; None where it cannot be asked.
        value: what was seen.
        goal: whether it is a goal of speed, which is no failure.
    """

    part: str
    check: str
    met: bool | None
    value: str
    goal: bool = False


class Ran(NamedTuple):
    """How a part's command ended.

    Attributes:
        code: its exit code; None where its time was over.
        seconds: that it took.
        last: line that it printed.
        stopped: whether a signal was sent to it.
    """

    code: int | None
    seconds: float
    last: str
    stopped: bool = False


def versions(device: str) -> dict[str, Any]:
    """Return the names and versions that a figure depends on."""
    there = {"device": device, "machine": platform.platform(), "python": platform.python_version()}
    there |= {"torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        there |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        there |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
        there |= {"cudnn": torch.backends.cudnn.version(), "nccl": nccl}
    return there


def filled(text: str, values: dict[str, Any]) -> str:
    """Return a text with the values of its {names}, which may hold names themselves.

    Raises:
        InputError: there is no such value.
    """
    try:
        while (once := text.format(**values)) != text:
            text = once
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"the recipe: {text!r} asks for an unknown value ({error})") from error
    return text


def run_limited(argv: list[str], file: Path, seconds: float, device: str, stop_at: Path | None = None) -> Ran:
    """Run a command of this Python, its output in a file, and end it with all its processes after a time.

    Args:
        argv: after the interpreter.
        file: for what it prints.
        seconds: that it may take.
        device: that the numeric checks run on.
        stop_at: a file; once it is there, a signal tells the command to stop.
    """
    start, stopped = time.monotonic(), False
    environment = os.environ | {"CHECKED_DEVICE": device, "PYTHONUNBUFFERED": "1"}
    with open(file, "wb") as output:
        options = dict(cwd=ROOT, env=environment, start_new_session=True)
        process = subprocess.Popen([sys.executable, *argv], stdout=output, stderr=output, **options)
        code, end = None, start + seconds
        try:
            while code is None and time.monotonic() < end:
                if stop_at and not stopped and stop_at.exists():
                    process.send_signal(signal.SIGTERM)
                    stopped, end = True, max(end, time.monotonic() + SIGNAL_GRACE)
                try:
                    code = process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = file.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Ran(code, time.monotonic() - start, last, stopped)


def ended_well(part: dict[str, Any], ran: Ran) -> Check:
    """Check how a part's command ended."""
    if ran.code is None:
        return Check(part["name"], "ends in time", False, f"ended after {ran.seconds:.0f} s")
    if "stop_at" in part:
        # torchrun's own exit code is one of failure; the checkpoint is what counts.
        return Check(
            part["name"], "stops at a signal", ran.stopped and ran.code != 0, f"exit code {ran.code}"
        )
    value = f"{ran.seconds:.0f} s" if ran.code == 0 else f"exit code {ran.code}: {ran.last[:200]}"
    return Check(part["name"], "exit code 0", ran.code == 0, value)


def numeric_checks(part: dict[str, Any], file: Path) -> list[Check]:
    """Return the cases of a file of pytest's, one check for each; none at all is a failure too."""
    checks = []
    for case in ElementTree.parse(file).iter("testcase"):
        wrong = [node for node in case if node.tag in ("failure", "error")]
        skipped = case.find("skipped")
        value = (
            wrong[0].get("message", "") if wrong else "" if skipped is None else skipped.get("message", "")
        )
        met = None if skipped is not None else not wrong
        checks.append(Check(part["name"], case.get("name", ""), met, " ".join(value.split())[:200]))
    if not any(check.met is not None for check in checks):
        checks.append(Check(part["name"], "some case ran", False, f"{len(checks)} were left out"))
    return checks


def read_table(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def table_checks(part: dict[str, Any], rows: list[dict[str, str]], compiled: str) -> list[Check]:
    """Return a check for each row of a table, that it was measured and compiled."""
    if not rows:
        return [Check(part["name"], "has rows", False, "none was written")]
    checks = []
    for row in rows:
        name = ", ".join(row[key] for key in ("model", "operating_point", "batch_size") if row[key])
        good = not row["error"] and row["compiled"] == compiled
        value = row["error"] or row["compiled"] or "it was not compiled"
        checks.append(Check(part["name"], f"measured and compiled: {name}", good, value))
    return checks


def goal_checks(part: dict[str, Any], rows: list[dict[str, str]], applicable: bool) -> list[Check]:
    """Return a line for each row that a goal of the part speaks of."""
    checks = []
    for goal in part.get("goals", ()):
        column, point = goal["column"], goal.get("point", "")
        chosen = [
            row for row in rows if row["model"].startswith(goal["model"]) and point in row["operating_point"]
        ]
        for row in [row for row in chosen if row[column]]:
            value, of = float(row[column]), ""
            if "of" in goal:
                base = next((other for other in rows if other["model"].startswith(goal["of"])), {})
                if not base.get(column):
                    continue
                value, of = value / float(base[column]), f" of {base['model']}'s"
            met = goal.get("least", value) <= value <= goal.get("most", value)
            wanted = f">= {goal['least']}" if "least" in goal else f"<= {goal['most']}"
            name = f"{row['model']}, {row['operating_point']}, batch {row['batch_size']}"
            text = f"{column}{of} {wanted}: {name}"
            checks.append(Check(part["name"], text, met if applicable else None, f"{value:.3f}", goal=True))
    return checks


def same_files(part: dict[str, Any], files: list[Path]) -> Check:
    contents = [file.read_bytes() if file.exists() else b"" for file in files]
    same = bool(contents[0]) and len(set(contents)) == 1
    return Check(part["name"], "equal logs", same, " and ".join(file.parent.name for file in files))


class Acceptance:
    """A recipe on a device: runs its parts and keeps the report.

    Args:
        recipe: what is in the recipe's file.
        device: cuda or cpu.
        output: the folder of all files.
        minutes: for all parts together; a part's own limit counts in 25ths of them.
    """

    def __init__(self, recipe: dict[str, Any], device: str, output: Path, minutes: float):
        self.recipe, self.device, self.output, self.minutes = recipe, device, output, minutes
        self.values = recipe["values"] | recipe["profiles"][device]
        self.values |= {"device": device, "output": output}
        self.start = time.monotonic()
        self.versions = versions(device)
        self.checks: list[Check] = []
        self.tables: dict[str, list[dict[str, str]]] = {}

    def run(self) -> None:
        """Run all parts; write the report after each."""
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        self.write()
        for number, part in enumerate(self.recipe["parts"]):
            new = self.run_part(number, part)
            self.checks += new
            self.write()
            asked = [check for check in new if check.met is not None and not check.goal]
            bad = [check for check in asked if not check.met]
            log.info("%s: %d of %d checks failed", part["name"], len(bad), len(asked))
            for check in [*bad, *(check for check in new if check.goal)]:
                log.info("  %s: %s (%s)", verdict(check), check.check, check.value)

    def run_part(self, number: int, part: dict[str, Any]) -> list[Check]:
        """Run a part within its limit and what is left of the time; return its lines of the report."""
        left = 60 * self.minutes - (time.monotonic() - self.start)
        if left <= 0:
            return [Check(part["name"], "runs", False, "no time was left")]
        argv = shlex.split(filled(part["run"], self.values))
        seconds, stop_at = min(left, 60 * part["minutes"] * self.minutes / 25), part.get("stop_at")
        stop_file = self.output / stop_at if stop_at else None
        ran = run_limited(argv, self.output / "logs" / f"{number:02}.log", seconds, self.device, stop_file)
        checks = [ended_well(part, ran)]
        if "cases" in part and (file := self.output / part["cases"]).exists():
            checks += numeric_checks(part, file)
        if "table" in part:
            rows = self.tables[part["name"]] = read_table(self.output / part["table"])
            checks += table_checks(part, rows, filled(part["compiled"], self.values))
            checks += goal_checks(part, rows, self.device == "cuda")
        if "same" in part:
            checks.append(same_files(part, [self.output / name for name in part["same"]]))
        return checks

    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.met is False and not check.goal]

    def write(self) -> None:
        """Write the report as JSON and as Markdown."""
        checks = [check._asdict() for check in self.checks]
        minutes = round((time.monotonic() - self.start) / 60, 2)
        report = {"versions": self.versions, "minutes": minutes, "checks": checks, "tables": self.tables}
        text = json.dumps(report, indent=2) + "\n"
        utils.write_atomically(self.output / "acceptance.json", lambda path: path.write_text(text))
        markdown = self.as_markdown(minutes)
        utils.write_atomically(self.output / "acceptance.md", lambda path: path.write_text(markdown))

    def as_markdown(self, minutes: float) -> str:
        """Return the report: what it ran on, goals, tables, checks."""
        about = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        failed, text = len(self.failed()), ""
        count = sum(check.met is not None and not check.goal for check in self.checks)
        for title, goal in (("Goals", True), ("Checks", False)):
            lines = [[c.part, c.check, verdict(c), c.value] for c in self.checks if c.goal == goal]
            section = f"\n## {title}\n\n{tabulate(lines, ['part', 'what', '', 'value'], 'github')}\n"
            text += section if lines else ""
        for name, rows in self.tables.items():
            columns = [key for key in (rows[0] if rows else ()) if any(row[key] for row in rows)]
            cells = [[row[key] for key in columns] for row in rows]
            text += f"\n## {name}\n\n{tabulate(cells, columns, 'github', '.4g')}\n" if rows else ""
        return f"# Acceptance\n\n{about}. {minutes} minutes; {failed} of {count} checks failed.\n{text}"


def verdict(check: Check) -> str:
    """Return "met", "not met" or "failed", or that it was not asked."""
    if check.met is None:
        return "not applicable" if check.goal else "left out"
    return "met" if check.met else "not met" if check.goal else "failed"


def load_recipe(file: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        InputError: it is none.
    """
    try:
        recipe = json.loads(file.read_text())
        if not {"values", "profiles", "parts"} <= recipe.keys():
            raise ValueError("values, profiles and parts are wanted")
    except (ValueError, AttributeError) as error:
        raise InputError(f"--recipe {file}: {error}") from error
    return recipe


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder, for the report and all logs")
    add("--minutes", type=Number(float, 0.01), default=25, help="for all parts together")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one, else cpu at a smaller size")
    add("--recipe", type=Path, default=RECIPE, metavar="FILE", help="the parts")
    return parser


def main() -> None:
    utils.start_logging(utils.Context(torch.device("cpu"), 0, 1))
    args = make_parser().parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    utils.check_device(device)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise InputError(f"--output {args.output} holds something: give a new folder")
    acceptance = Acceptance(load_recipe(args.recipe), device, args.output.absolute(), args.minutes)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in acceptance.versions.items()))
    acceptance.run()
    print((args.output / "acceptance.md").read_text(), end="")
    if failed := acceptance.failed():
        raise MainError(f"{len(failed)} checks failed, the first: {failed[0].part}, {failed[0].check}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends its part too
    utils.run_command(main)
