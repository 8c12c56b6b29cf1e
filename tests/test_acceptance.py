"""The acceptance run: parts that end well, fail, hang and stop; tables, goals; the recipe's own commands."""

import importlib
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT, Command

from benchmarks.table import COLUMNS, ModelSpec

sys.path.insert(0, str(ROOT / "scripts"))
import acceptance

TABLE = [",".join(COLUMNS)]
for model, point, fraction, p50, compiled in (
    ("fast", "all stages", "0.7", "", "default"),
    ("fast", "early exit, 100 % at first exit", "0.95", "2.0", "default"),
    ("plain", "one exit", "1.0", "8.0", "eager"),
):
    cells = dict(model=model, operating_point=point, batch_size="1", realised_fraction=fraction)
    cells |= dict(latency_p50_ms=p50, compiled=compiled)
    TABLE.append(",".join(f'"{cells.get(name, "")}"' for name in COLUMNS))
CASES = """<testsuites><testsuite><testcase name="good"/><testcase name="bad"><failure message="1 is not 2"/>
</testcase><testcase name="none"><skipped message="no GPU"/></testcase></testsuite></testsuites>"""
# Says that it has begun, goes on until a signal, and writes what a checkpoint would be.
WAITING = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path('{output}/saved').touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path('{output}/begun').touch()
time.sleep(60)
"""
HANGING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
child.wait()
"""


def code(text: str) -> str:
    return f"-c {shlex.quote(text)}"


def write(name: str, text: str) -> str:
    return code(f"open('{{output}}/{name}', 'w').write({text!r})")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    goals = [
        {"model": "fast", "column": "realised_fraction", "least": 0.9},
        {"model": "fast", "column": "latency_p50_ms", "of": "plain", "most": 0.4},
    ]
    parts: list[dict[str, Any]] = [
        {"name": "good", "minutes": 25, "run": write("a.txt", "1")},
        {"name": "bad", "minutes": 25, "run": code("raise SystemExit('out of luck')")},
        {"name": "hangs", "minutes": 1, "run": code(HANGING)},
        {"name": "stops", "minutes": 25, "run": code(WAITING), "stop_at": "begun"},
        {"name": "same", "minutes": 25, "run": write("b.txt", "1"), "same": ["a.txt", "b.txt"]},
        {"name": "other", "minutes": 25, "run": write("b.txt", "2"), "same": ["a.txt", "b.txt"]},
        {"name": "cases", "minutes": 25, "run": write("x.xml", CASES), "cases": "x.xml"},
        {"name": "table", "minutes": 25, "run": write("t.csv", "\n".join(TABLE)), "table": "t.csv"},
        {"name": "none", "minutes": 25, "run": code("pass"), "table": "no.csv", "compiled": "default"},
    ]
    parts[-2] |= {"compiled": "{how}", "goals": goals}
    file = tmp_path / "recipe.json"
    values = {"how": "{mode}"}
    profiles = {"cpu": {"mode": "default"}, "cuda": {}}
    file.write_text(json.dumps({"values": values, "profiles": profiles, "parts": parts}))
    return file


def test_every_part_runs_and_is_reported(recipe: Path, tmp_path: Path, command: Command) -> None:
    output = tmp_path / "out"
    ended = command("acceptance", "--output", output, "--recipe", recipe, "--device", "cpu", "--minutes", 1)
    report = json.loads((output / "acceptance.json").read_text())
    met = {}
    for check in report["checks"]:
        met.setdefault(check["part"], []).append(check["met"])
    rows = [True, True, True, False]  # it ended; three rows, of which the last was not compiled
    assert met == {
        "good": [True],
        "bad": [False],
        "hangs": [False],
        "stops": [True],
        "same": [True, True],
        "other": [True, False],
        "cases": [True, True, False, None],
        "table": [*rows, None, None, None],  # goals, which a CPU does not meet or miss
        "none": [True, False],
    }
    assert (output / "saved").exists()
    failed = sum(values.count(False) for values in met.values())
    assert ended.code == 1 and f"{failed} checks failed, the first: bad, exit code 0" in ended.err
    values = [(check["check"], check["value"]) for check in report["checks"]]
    goal = "latency_p50_ms of plain's <= 0.4: fast, early exit, 100 % at first exit, batch 1"
    assert (goal, "0.250") in values and ("exit code 0", "exit code 1: out of luck") in values
    assert report["tables"]["table"][0]["model"] == "fast" and report["versions"]["device"] == "cpu"
    text = (output / "acceptance.md").read_text()
    assert text == ended.out and "1 is not 2" in text and "not applicable" in text
    # Nothing of a part that hung is left.
    child = Path(f"/proc/{(output / 'logs' / '02.log').read_text().strip()}/cmdline")
    assert not child.exists() or not child.read_bytes()


def test_goals_are_met_or_missed_on_a_gpu(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\n".join(TABLE))
    part = json.loads(recipe.read_text())["parts"][-2]
    checks = acceptance.goal_checks(part, acceptance.read_table(tmp_path / "t.csv"), applicable=True)
    assert [(check.met, check.goal) for check in checks] == [(False, True), (True, True), (True, True)]
    assert [acceptance.verdict(check) for check in checks] == ["not met", "met", "met"]


def test_what_is_left_of_the_time_is_the_limit(recipe: Path, tmp_path: Path) -> None:
    run = acceptance.Acceptance(acceptance.load_recipe(recipe), "cpu", tmp_path / "out", 0.01)
    run.start = time.monotonic() - 1
    (check,) = run.run_part(0, run.recipe["parts"][0])
    assert not check.met and check.value == "no time was left"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("{", [], "--recipe"),
        ('{"parts": []}', [], "values, profiles and parts are wanted"),
        (None, ["--minutes", 0], "--minutes: '0' is not a finite number from 0.01 up"),
        (None, ["--output", "."], "holds something: give a new folder"),
    ],
)
def test_bad_input_is_one_line(
    text: str | None, flags: list, message: str, recipe: Path, tmp_path: Path, command: Command
) -> None:
    if text is not None:
        recipe.write_text(text)
    flags = ["--device", "cpu", "--recipe", recipe, "--output", tmp_path / "out", *flags]
    ended = command("acceptance", *flags)
    assert ended.code == 2 and message in ended.err and not ended.out


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_commands_of_the_recipe_are_ones_that_there_are(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "versions", lambda device: {})
    run = acceptance.Acceptance(acceptance.load_recipe(acceptance.RECIPE), device, tmp_path, 25)
    names = [part["name"] for part in run.recipe["parts"]]
    assert len(set(names)) == len(names)
    for part in run.recipe["parts"]:
        argv = shlex.split(acceptance.filled(part["run"], run.values))
        at = next((k for k, word in enumerate(argv) if word.endswith(".py") and "/" not in word[:3]), 0)
        name = Path(argv[at]).stem
        if name == "main_deit":
            parser = importlib.import_module(name).make_parser()
            assert "--output_dir" in argv and parser.parse_known_args(argv[at + 1 :])[0].model
        elif name == "benchmark":
            args = importlib.import_module(name).make_parser().parse_args(argv[at + 1 :])
            specs = [ModelSpec.of(text) for text in [*args.models, args.baseline]]
            assert str(args.csv) == str(tmp_path / part["table"])
            assert acceptance.filled(part["compiled"], run.values) == (args.compile or "")
            assert args.require_compiled == bool(args.compile) == (device == "cuda")
            for goal in part["goals"]:
                assert goal["column"] in COLUMNS
                assert any(spec.text.startswith(goal["model"]) for spec in specs)
        else:
            assert (ROOT / argv[at]).exists() or argv[:2] == ["-m", "pytest"]
