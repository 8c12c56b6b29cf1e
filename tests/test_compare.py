"""The tables of scripts/compare.py and scripts/report.py, on results whose numbers are known."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases import ROOT, Command

from checkpointing.format import load_checkpoint, save_checkpoint, save_json

sys.path.insert(0, str(ROOT / "scripts"))
import compare

# Four operating points whose numbers say nothing about their thresholds.
CURVE = [[0.1, 0.2, 0.3, 0.4], [60.0, 79.0, 79.5, 80.0]]
TWO = dict(flops=[0.1, 0.4], anytime_classification=[60.0, 80.0], budgeted_batch_classification=CURVE)
TWO["dynamic_threshold"] = [[0.0, 0.0], [0.31, 0.0], [0.62, 0.0], [0.93, 0.0]]
ONE = dict(flops=[0.4], anytime_classification=[70.0], budgeted_batch_classification=[[0.4], [70.0]])
SYSTEMS = ["one:deit_nano", "a, two:lf_deit_nano:--select-from 0 --model-kwargs 'init=a b'"]


def test_systems_are_read_from_text() -> None:
    system = compare.System.of(SYSTEMS[1])
    assert (system.name, system.model) == ("a, two", "lf_deit_nano")
    assert system.flags == ["--select-from", "0", "--model-kwargs", "init=a b"]
    assert compare.System.of(SYSTEMS[0]).flags == [] and system.folder(Path("out")) == Path("out/a_two")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "train").mkdir(parents=True)
    return tmp_path / "data"


def test_every_system_is_made_once(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are recorded; the results appear as if they had run."""
    called = []

    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess:
        called.append(arguments)
        if "--results" in arguments:
            path = Path(arguments[arguments.index("--results") + 1])
            stored = ONE if path.parent.name == "one" else TWO
            save_json(stored, path)
            save_checkpoint(stored | {"model": {}}, path.with_name("checkpoint.pth"))
        elif "scripts/nano.sh" in arguments:
            Path(arguments[4]).mkdir()
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    output = tmp_path / "output"
    flags = ["--data", data, "--output", output, "--systems", *SYSTEMS, "--teacher", "a, two", "one"]
    ended = command("compare", *flags)
    assert ended.code == 0, ended.err
    assert [arguments[1] for arguments in called] == [
        *["scripts/nano.sh", "dynamic_inference.py", "dynamic_inference.py"],
        *["scripts/make_token_labels.py", "scripts/nano.sh", "dynamic_inference.py", "dynamic_inference.py"],
    ]
    labels = str(output / "one" / "token_labels")
    assert called[3][-2:] == ["--output", labels] and called[4][-2:] == ["--token-label-data", labels]
    assert called[4][5:9] == ["--select-from", "0", "--model-kwargs", "init=a b"]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in ended.out.splitlines() if "|" in line
    ]
    assert rows[2] == ["one", "400.00", "70.00", "70.00", "", "", "", ""]
    # 99 % of 80 is 79.2: the third point, at its stored threshold.
    assert rows[3] == ["a, two", "400.00", "80.00", "80.00", "60.00", "0.62", "300.00", "79.50"]
    assert (output / "table.md").exists() and (output / "curve.png").exists()
    called.clear()
    assert command("compare", *flags).code == 0 and not called


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--systems", "name alone"], "'name alone' is not NAME:MODEL:FLAGS"),
        (["--systems", *SYSTEMS, "--teacher", "one", "nobody"], "--teacher names no system: nobody"),
        (["--systems", *SYSTEMS, "--data", "nowhere"], "make_digits.py --output nowhere"),
    ],
)
def test_bad_systems_are_one_line(flags: list[str], message: str, command: Command) -> None:
    ended = command("compare", *flags)
    assert ended.code == 2 and message in ended.err


def test_the_recipe_names_systems_that_compare_reads(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    listed = subprocess.run(
        ["bash", "scripts/compare.sh"], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True
    ).stdout.splitlines()
    args = compare.make_parser().parse_args(listed[1:])
    assert len(args.systems) == 14 and args.systems[8].flags == "--coarse-only 0.39 --select-from 0".split()
    assert args.teacher == [["CF-ViT, LV-ViT, token labels", "plain 14x14"]]


def test_the_report_shows_the_stored_thresholds(command: Command, sharp: Path, tmp_path: Path) -> None:
    checkpoint, results = tmp_path / "checkpoint.pth", tmp_path / "results.json"
    save_checkpoint(load_checkpoint(sharp) | TWO, checkpoint)
    timed = dict(threshold=0.7, mean_gflops=0.2, images_per_second=30.0, speedup=1.5)
    timed["baseline"] = dict(model="deit_nano", gflops=0.4, images_per_second=20.0)
    save_json(TWO | {"timed": timed, "region_coverage": 95.0}, results)
    ended = command("report", checkpoint, results)
    assert ended.code == 0, ended.err
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert lines[0] == "lf_deit_nano, test images mean GFLOPs top-1 %"
    assert lines[2] == "location stage alone 0.1000 60.00"
    assert lines[3:6] == [
        "early exit, threshold 0.62 0.3000 79.50",
        "early exit, threshold 0.62 0.3000 79.50",
        "early exit, threshold 0.93 0.4000 80.00",
    ]
    assert lines[6] == "both stages 0.4000 80.00"
    assert "1.50x the images per second for 2.00x fewer GFLOPs" in lines
    assert lines[-4:] == [
        "focus above location, points 20.0 >= 6 reached",
        "region covers of the digit, % 95.0 >= 90 reached",
        "cost at threshold 0.62, % of both stages 75.0 <= 75 reached",
        "accuracy there, % of both stages 99.4 >= 99 reached",
    ]


def test_a_report_without_a_curve_says_what_to_run(command: Command, sharp: Path, tmp_path: Path) -> None:
    save_json({}, tmp_path / "results.json")
    ended = command("report", sharp, tmp_path / "results.json")
    assert ended.code == 2 and "run dynamic_inference.py --eval-mode 1 first" in ended.err
