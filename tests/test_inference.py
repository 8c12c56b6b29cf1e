"""What inference stores beside which weights, operating points from a stored table, the table of --images."""

import csv
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from cases import Command, call
from ranks import ranks
from torch import Tensor

import datasets
import dynamic_inference
import visualize
from checkpointing import format as layout
from checkpointing.format import (
    chosen_weights,
    digest,
    load_checkpoint,
    load_json,
    save_checkpoint,
    save_json,
)
from inference import prediction
from inference.budgets import choose_thresholds
from inference.pictures import common_threshold, draw_curve
from inference.session import Session, open_model
from inference.thresholds import NEVER
from models.exits import choose_exits, confidence
from utils import InputError


@pytest.fixture
def checkpoint(sharp: Path, tmp_path: Path) -> Path:
    """A copy that the test may write to, with an average that differs from the weights."""
    saved = load_checkpoint(sharp)
    saved["model_ema"] = saved["model"] | {"head.bias": saved["model"]["head.bias"].flip(0)}
    save_checkpoint(saved, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def arguments(checkpoint: Path, folder: Path, mode: int = 1) -> list:
    flags = ["--checkpoint_path", checkpoint, "--data_url", folder, "--eval-mode", mode, "--repeats", 1]
    return [*flags, "--num_workers", 0, "--batch_size", 40, "--device", "cpu"]


# Results belong to the weights they were measured on


def test_a_digest_tells_names_types_and_values() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros((), dtype=torch.bfloat16)}
    others = [{"c": weights["a"], "b": weights["b"]}, weights | {"a": torch.tensor([1.0, 2.5])}]
    others += [weights | {"b": torch.zeros(())}, weights | {"a": torch.tensor([[1.0, 2.0]])}]
    assert len({digest(state) for state in (weights, *others)}) == 5
    assert digest(dict(reversed(weights.items()))) == digest(weights)


@pytest.mark.parametrize("change", ["another epoch", "removed"])
def test_results_of_weights_that_were_replaced_go_to_a_file_beside(
    change: str, command: Command, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training saves another epoch between reading and writing."""
    measured = load_checkpoint(checkpoint)
    predict = Session.predict

    def replace_file(session: Session, *argv: object) -> object:
        if change == "removed":
            checkpoint.unlink()
        else:
            weights = measured["model"] | {"head.bias": torch.zeros(4)}
            save_checkpoint(measured | {"model": weights, "epoch": 7}, checkpoint)
        return predict(session, *argv)

    monkeypatch.setattr(Session, "predict", replace_file)
    ended = command("dynamic_inference", *arguments(checkpoint, folder))
    beside = checkpoint.with_suffix(f".{digest(measured['model'])[:8]}.json")
    assert ended.code == 1 and f"the results are in {beside}" in ended.err and "Traceback" not in ended.err
    results = load_json(beside)
    assert len(results["budgeted_batch_classification"][0]) == 101
    of = {"weights": "model", "digest": digest(measured["model"]), "epoch": 1, "split": "val"}
    assert results["results_of"] == of
    if change == "removed":
        assert not checkpoint.exists()
    else:
        assert "other weights of epoch 7" in ended.err
        assert not load_checkpoint(checkpoint).keys() & layout.RESULT_KEYS


def test_a_file_replaced_at_the_last_moment_stays(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process renames its file over the checkpoint while ours is being written."""
    saved, newer = load_checkpoint(checkpoint), checkpoint.with_name("newer.pth")
    save_checkpoint(saved | {"epoch": 9}, newer)
    monkeypatch.setattr(layout, "merged", lambda *_: os.replace(newer, checkpoint) or {})
    with pytest.raises(InputError, match="in the meantime"):
        layout.add_to_checkpoint(checkpoint, {}, {"weights": "model", "digest": digest(saved["model"])})
    assert load_checkpoint(checkpoint)["epoch"] == 9
    assert not list(checkpoint.parent.glob(".*.tmp"))


def test_results_of_the_average_are_never_those_of_the_weights(
    command: Command, folder: Path, checkpoint: Path
) -> None:
    for averaged in (False, True, False):
        flags = ["--use-ema"] if averaged else []
        ended = command("dynamic_inference", *arguments(checkpoint, folder, 0), *flags)
        stored, weights = load_checkpoint(checkpoint), "model_ema" if averaged else "model"
        assert ended.code == 0 and f"({weights})" in ended.err
        assert stored["results_of"]["weights"] == weights
        assert stored["results_of"]["digest"] == digest(stored[weights])
        curve = {"budgeted_batch_classification", "dynamic_threshold"}
        assert not stored.keys() & curve
        printed = command("dynamic_inference", *arguments(checkpoint, folder, 3)).out
        assert f"results of: weights {weights}, " in printed and "NOT" not in printed
        command("dynamic_inference", *arguments(checkpoint, folder, 1), *flags)
    assert "results of weights model_ema" in ended.err and "are replaced" in ended.err


def test_results_say_which_types_they_were_computed_in(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    line = ["--checkpoint_path", checkpoint, "--data_url", folder, "--device", "cpu", "--num_workers", 0]
    line += ["--eval-mode", 2, "--threshold", 0.5, "--repeats", 1, "--warmup", 0]
    ended = command("dynamic_inference", *line, "--weights", "bf16", "--amp", "fp16")
    assert ended.code == 2 and "--weights bf16 computes in bf16: not with --amp fp16" in ended.err
    stored = []
    try:
        for number, flags in enumerate(
            ("--amp bf16", "--weights bf16 --matmul-precision high --baseline deit_nano")
        ):
            path = tmp_path / f"{number}.json"
            assert command("dynamic_inference", *line, *flags.split(), "--results", path).code == 0
            stored.append(load_json(path))
    finally:
        torch.set_float32_matmul_precision("highest")
    plain, cast = stored
    types = {"weights_dtype": "bfloat16", "matmul_precision": "high"}
    assert cast["results_of"] == plain["results_of"] | types and cast["flops"] == plain["flops"]
    same = ("exit_shares", "accuracy", "mean_gflops")
    assert [cast["timed"][name] for name in same] == [plain["timed"][name] for name in same]


def test_stored_results_of_other_weights_are_told(command: Command, folder: Path, checkpoint: Path) -> None:
    command("dynamic_inference", *arguments(checkpoint, folder, 0))
    saved = load_checkpoint(checkpoint)
    save_checkpoint(saved | {"model": saved["model_ema"]}, checkpoint)
    printed = command("dynamic_inference", *arguments(checkpoint, folder, 3)).out
    assert "NOT the weights that the checkpoint holds" in printed


def test_a_json_file_does_not_mix_splits_or_settings(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    flags = ["--results", file]
    command("dynamic_inference", *arguments(checkpoint, folder, 1), *flags)
    ended = command("dynamic_inference", *arguments(checkpoint, folder, 0), *flags, "--split", "train")
    results = load_json(file)
    assert "are replaced" in ended.err and "dynamic_threshold" not in results
    assert results["results_of"]["split"] == "train"
    command("dynamic_inference", *arguments(checkpoint, folder, 0), *flags, "--region-size", 7)
    assert load_json(file)["results_of"]["region_size"] == 7


def test_a_curve_without_thresholds_takes_those_of_another_along(tmp_path: Path) -> None:
    of = {"weights": "model"}
    swept = {"budgeted_batch_classification": [[1], [2]], "dynamic_threshold": [[0.5]], "flops": [3]}
    varied = {"budgeted_batch_classification": [[1, 2], [2, 3]]}
    assert layout.merged(swept, varied, of, tmp_path).keys() == {*varied, "flops", "results_of"}


@pytest.mark.slow
def test_a_later_save_of_training_holds_no_results(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    file = output / "checkpoint.pth"
    assert command("dynamic_inference", *arguments(file, folder)).code == 0
    assert load_checkpoint(file).keys() >= layout.RESULT_KEYS - {"flop"}
    flags = ["--data-path", folder, "--output_dir", output, "--num_workers", 0, "--device", "cpu"]
    assert command("main_deit", "--resume", file, *flags, "--epochs", 3).code == 0
    assert not load_checkpoint(file).keys() & layout.RESULT_KEYS


# The weights that were chosen are the ones evaluated


@pytest.mark.parametrize(
    ("keys", "flag", "weights"),
    [
        ({}, None, "model"),
        ({"best_weights": "model_ema", "model_ema": {}}, None, "model_ema"),
        ({"best_weights": "model_ema", "model_ema": {}}, False, "model"),
        ({"best_weights": "model", "args": {"eval_ema": True}}, None, "model"),
        ({"args": {"eval_ema": True}, "model_ema": {}}, None, "model_ema"),
        ({"args": {"eval_ema": True}}, None, "model"),
        ({"model_ema": {}}, True, "model_ema"),
    ],
)
def test_the_weights_to_use(keys: dict, flag: bool | None, weights: str) -> None:
    assert chosen_weights({"model": {}} | keys, flag) == weights


def test_every_command_takes_the_weights_that_were_chosen(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    saved = load_checkpoint(checkpoint)
    save_checkpoint(saved | {"best_weights": "model_ema"}, checkpoint)
    average = saved["model_ema"]
    command("dynamic_inference", *arguments(checkpoint, folder, 0), "--results", tmp_path / "r.json")
    results = load_json(tmp_path / "r.json")
    assert results["results_of"]["digest"] == digest(average)
    flags = ["--data-path", folder, "--num_workers", 0, "--device", "cpu", "--resume", checkpoint, "--eval"]
    ended = command("main_deit", *flags)
    assert "evaluating the averaged weights" in ended.err
    assert f"ema_exit1_acc1 {results['anytime_classification'][1]:.3f}" in ended.err
    assert "evaluating the raw weights" in command("main_deit", *flags, "--no-eval-ema").err
    drawn = ["--resume", checkpoint, "--images", folder / "val" / "blue" / "00.png", "--output_dir", tmp_path]
    assert "averaged weights (model_ema)" in command("visualize", *drawn).err
    assert command("convert_checkpoint", checkpoint, tmp_path / "new.pth").code == 0
    assert digest(load_checkpoint(tmp_path / "new.pth")["model"]) == digest(average)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


def test_evaluating_an_average_that_is_not_there_is_refused(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    saved = load_checkpoint(sharp)
    del saved["model_ema"]
    save_checkpoint(saved, tmp_path / "raw.pth")
    flags = ["--data-path", folder, "--num_workers", 0, "--device", "cpu", "--resume", tmp_path / "raw.pth"]
    ended = command("main_deit", *flags, "--eval", "--eval-ema")
    assert ended.code == 2 and "no averaged weights" in ended.err
    ended = command("main_deit", *flags, "--eval-ema", "--no-model-ema")
    assert ended.code == 2 and "--eval-ema" in ended.err


def test_conversion_leaves_results_of_other_weights_out(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command("dynamic_inference", *arguments(checkpoint, folder, 0))
    for flags, kept in ([], True), (["--use-ema"], False):
        file = tmp_path / f"{kept}.pth"
        ended = command("convert_checkpoint", checkpoint, file, *flags)
        assert ended.code == 0 and ("left out" in ended.err) is not kept
        new = load_checkpoint(file)
        assert ("anytime_classification" in new) is kept
        assert new.get("results_of", {}).get("digest") == (digest(new["model"]) if kept else None)


# Thresholds


def test_one_default_threshold(command: Command, folder: Path, sharp: Path, tmp_path: Path) -> None:
    parsers = dynamic_inference.make_parser(), visualize.make_parser()
    assert [parser.get_default("threshold") for parser in parsers] == [None, None]
    assert all("default: 0.7" in parser.format_help() for parser in parsers)
    flags = ["--results", tmp_path / "r.json"]
    assert command("dynamic_inference", *arguments(sharp, folder, 2), *flags).code == 0
    assert load_json(tmp_path / "r.json")["timed"]["threshold"] == 0.7


def test_marks_of_a_curve_are_the_stored_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = []
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda axes, text, at, **_: marks.append((text, at)))
    curve = [[float(i) for i in range(21)], [50.0 + i for i in range(21)]]
    levels = [[0.1]] * 10 + [[0.9]] + [[0.95]] * 9 + [[0.5]]
    results = layout.Results([1.0, 2.0], [50.0, 70.0], curve, levels)
    draw_curve({"model": results}, tmp_path / "curve.png")
    assert marks == [("T=0.9", (10.0, 60.0)), ("T=0.5", (20.0, 70.0))]
    results.dynamic_threshold = None  # 21 points are no sweep of hundredths
    assert common_threshold(results, 10) is None


@pytest.fixture(scope="module")
def three(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three exits whose confidences differ, and with thresholds solved for it."""
    torch.manual_seed(0)
    model = timm.create_model("dvt_deit_nano", num_classes=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name:
                parameter.normal_(0, 0.6)
    root = tmp_path_factory.mktemp("three")
    keys = dict(model_name="dvt_deit_nano", model_kwargs={"num_classes": 4}, model=model.state_dict())
    save_checkpoint(keys, root / "three.pth")
    solve = ["--solve", "geometric", "--calibration", "train"]
    call("dynamic_inference", *arguments(root / "three.pth", folder), *solve)
    return root / "three.pth"


def point_of(stored: dict) -> int:
    """A point whose two thresholds differ, in use both."""
    rows = [row[:2] for row in stored["dynamic_threshold"]]
    return next(at for at, (first, second) in enumerate(rows) if max(first, second) < 2 and first != second)


def exits_of(three: Path, folder: Path, levels: list[float]) -> Tensor:
    """Where plain passes over single images leave."""
    opened = open_model(load_checkpoint(three), str(three))
    data = opened.dataset(datasets.DataSource("IMNET", folder), "val")
    with torch.no_grad():
        outputs = opened.model.eval()(torch.stack([image for image, _ in data]))
    sure = torch.stack([confidence(output.logits) for output in outputs], dim=1)
    return choose_exits(sure, torch.tensor([levels]))[0]


@pytest.mark.slow
def test_three_exits_run_at_their_solved_point(
    command: Command, folder: Path, three: Path, tmp_path: Path
) -> None:
    stored = load_checkpoint(three)
    point = point_of(stored)
    levels = stored["dynamic_threshold"][point][:2]
    exits = exits_of(three, folder, levels)
    assert len(exits.unique()) > 1
    cost, accuracy = (column[point] for column in stored["budgeted_batch_classification"])
    for name, flags in {
        "point": ["--point", point],
        "threshold": ["--threshold", *levels],
    }.items():
        file = tmp_path / f"{name}.json"
        ended = command("dynamic_inference", *arguments(three, folder, 2), "--results", file, *flags)
        assert ended.code == 0, ended.err
        timed = load_json(file)["timed"]
        assert timed["threshold"] == levels
        assert timed["exit_shares"] == [(exits == k).double().mean().item() for k in range(3)]
        assert timed["mean_gflops"] == pytest.approx(cost)
        assert timed["accuracy"] == pytest.approx(accuracy)
        ended = command("dynamic_inference", *arguments(three, folder), "--images", folder / "val", *flags)
        names = [row["exit"] for row in csv.DictReader(io.StringIO(ended.out))]
        assert names == [("7x7", "10x10", "14x14")[k] for k in exits]
        drawn = tmp_path / f"pictures_{name}"
        flags += ["--images", folder / "val", "--output_dir", drawn, "--resume", three]
        assert command("visualize", *flags).code == 0
        drawn = {path.name.split("_")[-1]: path.name.split("_")[-2] for path in drawn.glob("*_index*")}
        assert [drawn[f"index{at}.png"] for at in range(1, 41)] == names


@pytest.mark.slow
def test_the_best_stored_point_within_a_budget(
    command: Command, folder: Path, three: Path, tmp_path: Path
) -> None:
    stored = load_checkpoint(three)
    costs, accuracies = stored["budgeted_batch_classification"]
    budget = sorted(costs)[len(costs) // 2]
    best = max(accuracy for cost, accuracy in zip(costs, accuracies, strict=True) if cost <= budget)
    file = tmp_path / "r.json"
    flags = ["--results", file, "--stored-budget", budget]
    ended = command("dynamic_inference", *arguments(three, folder, 2), *flags)
    assert ended.code == 0, ended.err
    timed = load_json(file)["timed"]
    assert timed["accuracy"] == pytest.approx(best) and timed["mean_gflops"] <= budget + 1e-9


def test_thresholds_that_cannot_be_are_refused(sharp: Path, command: Command, folder: Path) -> None:
    opened = open_model(load_checkpoint(sharp), "sharp")
    assert choose_thresholds(opened, None) == [0.7] and choose_thresholds(opened, [NEVER]) == [NEVER]
    curve = [[0.1, 0.2, 0.3], [50.0, 70.0, 70.0]]
    table = {"dynamic_threshold": [[0.2, -NEVER], [0.6, -NEVER], [0.95, -NEVER]]}
    table["budgeted_batch_classification"] = curve
    assert choose_thresholds(opened, None, 2, None, table) == pytest.approx([0.95])
    assert choose_thresholds(opened, None, None, 0.35, table) == pytest.approx([0.6])
    other = table | {"results_of": {"weights": "model", "digest": "another"}}
    for given, text in [
        (([0.1, 0.2],), "--threshold has 2 numbers: take 1"),
        ((None, 3, None, table), "--point 3: the stored thresholds have the rows 0 to 2"),
        ((None, 0), "no thresholds are stored"),
        ((None, 0, None, other), "digest another, not of weights model"),
        ((None, None, 0.05, table), "--stored-budget 0.05: the cheapest stored point takes 0.1"),
    ]:
        with pytest.raises(InputError, match=text):
            choose_thresholds(opened, *given)
    for mode in (0, 1, 3):
        ended = command("dynamic_inference", *arguments(sharp, folder, mode), "--point", 0)
        assert ended.code == 2 and "--point goes with --eval-mode 2" in ended.err
    ended = command("dynamic_inference", *arguments(sharp, folder, 2), "--point", 0, "--threshold", 0.5)
    assert ended.code == 2 and "not allowed with" in ended.err


# The table of --images


def test_rows_are_written_as_they_come(
    command: Command, folder: Path, sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third batch fails, or is interrupted; what came before is there, in order."""
    output, predict_batch = tmp_path / "table.csv", prediction.predict_batch
    flags = [*arguments(sharp, folder), "--batch_size", 8, "--images", folder / "val", "--output", output]
    assert command("dynamic_inference", *flags).code == 0
    whole = output.read_text().splitlines()
    output.unlink()
    assert len(whole) == 41 and not list(tmp_path.glob("*.partial"))
    for error, code in (KeyboardInterrupt(), 130), (InputError("no more"), 2):
        left = iter(range(3))

        def fail(*argv: object, error: BaseException = error, left: Iterator = left) -> object:
            if next(left) == 2:
                raise error
            return predict_batch(*argv)

        monkeypatch.setattr(prediction, "predict_batch", fail)
        ended = command("dynamic_inference", *flags)
        partial = tmp_path / "table.csv.partial"
        assert ended.code == code and f"the predictions up to here are in {partial}" in ended.err
        assert partial.read_text().splitlines() == whole[:17] and not output.exists()


def test_names_keep_their_bytes(
    command: Command, folder: Path, sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = tmp_path / "images", tmp_path / "table.csv"
    images.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(folder / "val" / "blue" / "00.png", images / name)
    flags = [*arguments(sharp, folder), "--images", images]
    ended = command("dynamic_inference", *flags, "--output", output)
    assert ended.code == 0, ended.err
    assert b"caf\xe9.png," in output.read_bytes()
    with open(output, newline="", encoding="utf-8", errors="surrogateescape") as file:
        (row,) = csv.DictReader(file)
    assert Path(row["file"]).exists()
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    dynamic_inference.utils.start_logging(dynamic_inference.utils.Context(torch.device("cpu"), 0, 1))
    monkeypatch.setattr(sys, "argv", ["dynamic_inference.py", *map(str, flags)])
    dynamic_inference.main()
    assert printed.buffer.getvalue() == output.read_bytes()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_lines_of_several_processes_come_in_order(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is played by the first: images 3 and 10 cannot be read, batches hold two."""
    count, batches = 11, []
    for rank in range(processes):
        own = [(n, [str(n)]) for n in range(rank, count, processes) if n not in (3, 10)]
        batches.append(iter([own[at : at + 2] for at in range(0, len(own), 2)]))
    others = batches[1:]
    monkeypatch.setattr(
        prediction.utils, "gather", lambda lines: [lines, *(next(batch, None) for batch in others)]
    )
    steps = list(prediction.lines_in_order(batches[0], count, processes))
    lines = [line for step in steps for line in step]
    assert lines == [(n, [str(n)] if n not in (3, 10) else prediction.EMPTY) for n in range(count)]
    assert len(steps) > 1


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    flags = [*arguments(sharp, folder), "--images", folder / "val", "--batch_size", 6, "--output"]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert command("dynamic_inference", *flags, one).code == 0
    ended = ranks("dynamic_inference", *flags, two)
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert two.read_bytes() == one.read_bytes()


# What cannot be written is known before the work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr(Session, "predict", work)
    monkeypatch.setattr(prediction, "predict_batch", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("flag", ["--results", "--output"])
def test_outputs_are_tried_before_the_work(
    flag: str, command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    images = ["--images", folder] if flag == "--output" else []
    for place in ("/proc/r", tmp_path / "file" / "r", tmp_path / "folder", "/dev/null"):
        ended = command("dynamic_inference", *arguments(sharp, folder), *images, flag, place)
        assert ended.code == 2 and str(place) in ended.err and flag in ended.err, ended
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]


@pytest.mark.usefixtures("no_work")
def test_a_read_only_checkpoint_is_told_before_the_work(
    command: Command, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # for root, who may do everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != checkpoint and access(path, mode))
    ended = command("dynamic_inference", *arguments(checkpoint, folder))
    assert ended.code == 2 and "it is read-only" in ended.err and "--results" in ended.err


def test_pictures_that_cannot_be_written_are_told_before_the_work(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    flags = ["--resume", sharp, "--data-path", folder]
    for further, text in (
        (["--output_dir", "/proc/pictures"], "another folder with --output_dir"),
        (["--output_dir", tmp_path, "--save-name", "mine.txt"], "mine.txt is no name of a picture"),
        (["--output_dir", tmp_path, "--results", "r.json"], "--results goes with"),
        (["--output_dir", tmp_path, "--curve", "--point", 1], "not with --curve"),
    ):
        ended = command("visualize", *flags, *further)
        assert ended.code == 2 and text in ended.err, ended.err
    assert not list(tmp_path.iterdir())


def test_results_of_two_files_are_only_compared_where_they_fit() -> None:
    val = {"budgeted_batch_classification": [[1.0], [2.0]], "dynamic_threshold": [[0.5]]}
    assert layout.read_pair(val, val)[0].thresholds_at(0) == []
    with pytest.raises(InputError, match="different thresholds"):
        layout.read_pair(val, val | {"dynamic_threshold": [[0.6]]})
    with pytest.raises(InputError, match="different weights"):
        layout.read_pair(val | {"results_of": {"digest": "a"}}, val | {"results_of": {"digest": "b"}})
    with pytest.raises(InputError, match="no stored point keeps 99 %"):
        layout.Results([1.0], [70.0], [[1.0], [50.0]]).cheapest(0.99)


def test_a_file_of_an_earlier_version_takes_results(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    save_json({"note": "mine"}, file)
    command("dynamic_inference", *arguments(sharp, folder, 0), "--results", file)
    assert load_json(file)["note"] == "mine" and load_json(file)["results_of"]["split"] == "val"
