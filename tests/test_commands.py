"""Tests of the three commands: what they print, what they store, how they fail."""

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import Command, Ended, run
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.utils.data import DataLoader

import datasets
import main_deit
import utils
from checkpointing.format import add_to_checkpoint, load_checkpoint, load_json, save_checkpoint
from checkpointing.run import RunLog
from models import recipe_of
from models.cost import exit_gflops
from models.weights import create_model, model_from_checkpoint

THRESHOLD = 0.3
TRAIN = "--model lf_deit_nano --epochs 2 --batch-size 32 --device cpu --num_workers 0".split()


class Answers(NamedTuple):
    """What a plain forward pass over the validation images says, the oracle of all modes.

    Attributes:
        confidence: [n,2].
        predicted: [n,2].
        label: [n].
        gflops: cumulative cost of both exits.
    """

    confidence: Tensor
    predicted: Tensor
    label: Tensor
    gflops: list[float]

    def exits(self, threshold: float) -> list[int]:
        return [0 if first >= threshold else 1 for first in self.confidence[:, 0]]

    def accuracy(self, threshold: float, images: slice = slice(None)) -> float:
        rows = list(zip(self.exits(threshold), self.predicted, self.label, strict=True))[images]
        return 100 * sum(int(guess[k] == label) for k, guess, label in rows) / len(rows)

    def cost(self, threshold: float, images: slice = slice(None)) -> float:
        costs = [self.gflops[k] for k in self.exits(threshold)][images]
        return sum(costs) / len(costs)


@pytest.fixture(scope="module")
def answers(folder: Path, sharp: Path) -> Answers:
    checkpoint = load_checkpoint(sharp)
    model, *_ = model_from_checkpoint(checkpoint, "sharp", None, {})
    transform = datasets.eval_transform(56, checkpoint["data_config"])
    data = datasets.build_dataset(datasets.DataSource("IMNET", folder), "val", transform)
    with torch.no_grad():
        outputs = model.eval()(torch.stack([image for image, _ in data]))
    logits = torch.stack([out.logits for out in outputs], dim=1)
    found = Answers(
        logits.softmax(dim=-1).amax(dim=-1),
        logits.argmax(dim=-1),
        torch.tensor([label for _, label in data.samples]),
        exit_gflops(model),
    )
    assert 5 < sum(found.exits(THRESHOLD)) < 35 and found.accuracy(0) != found.accuracy(1)  # worth testing on
    assert (found.confidence[:, :1] - torch.linspace(0, 1, 101)).abs().min() > 1e-6  # no tie with a threshold
    return found


@pytest.fixture
def checkpoint(sharp: Path, tmp_path: Path) -> Path:
    """A copy that the test may write to."""
    return Path(shutil.copy(sharp, tmp_path / "checkpoint.pth"))


def infer(
    mode: int, folder: Path, checkpoint: Path, batch_size: int = 40, threshold: float = THRESHOLD
) -> list:
    """The arguments of dynamic_inference.py, as its users write them."""
    return (
        f"--eval-mode {mode} --data_url {folder} --batch_size {batch_size} --model lf_deit_nano"
        f" --checkpoint_path {checkpoint} --threshold {threshold}"
    ).split()


def table_of(out: str, title: str) -> list[list[str]]:
    """Cells of the printed table below a title, the header first, without rules."""
    lines = out.split(title, 1)[1].splitlines()[1:]
    lines = lines[: lines.index("")] if "" in lines else lines
    return [re.split(r"\s{2,}", line.strip()) for line in lines if set(line) - set(" -")]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def same(first: object, second: object) -> bool:
    """Whether two nested structures hold the same numbers, to the last bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


# Training


def test_training_leaves_checkpoints_and_logs(folder: Path, trained: Path) -> None:
    entries = log_of(trained)
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert all(np.isfinite(value) for entry in entries for value in entry.values())
    assert all(
        entry["train_loss"] == pytest.approx(entry["train_fine_ce"] + entry["train_coarse_kl"], abs=1e-5)
        for entry in entries
    )
    saved = load_checkpoint(trained / "checkpoint.pth")
    assert saved["epoch"] == 1
    assert saved["model_name"] == "lf_deit_nano" and saved["model_kwargs"]["num_classes"] == 4
    assert saved["class_names"] == ["amber", "blue", "coral", "dusk"]
    assert saved["data_config"] == datasets.DATA_CONFIG
    assert saved["best"] == max(entry["test_exit1_acc1"] for entry in entries)
    assert load_checkpoint(trained / "model_best.pth")["epoch"] in (0, 1)
    assert list((trained / "tensorboard").iterdir())
    assert not [path for path in trained.iterdir() if path.name.endswith(".tmp")]


def test_first_and_last_learning_rate(trained: Path) -> None:
    """Warm-up begins at 1e-6; the schedule of 2 x 2 updates ends at --min-lr."""
    peak, low = 5e-4 * 32 / 512, 1e-5
    second = low + (peak - low) * (1 + math.cos(math.pi / 4)) / 2
    assert log_of(trained)[0]["train_lr"] == pytest.approx((1e-6 + second) / 2)
    saved = load_checkpoint(trained / "checkpoint.pth")["optimizer"]["param_groups"]
    assert all(group["lr"] == pytest.approx(1e-5) for group in saved)


def test_learning_rate_and_decay_of_the_weights() -> None:
    """The rate grows with the images of an update; biases, norms, class token and positions do not decay."""
    args = main_deit.parse([*TRAIN, "--data-path", "unused", "--accumulate", "2"])[0]
    model = create_model("lf_deit_nano", {})
    groups = create_optimizer_v2(model, **main_deit.optimizer_options(args, 4 * 32)).param_groups
    assert {group["lr"] for group in groups} == {5e-4 * 32 * 2 * 4 / 512}
    decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
    free = {name for name, weight in model.named_parameters() if id(weight) not in decayed}
    flat = {name for name, weight in model.named_parameters() if weight.ndim == 1}
    assert free == flat | {"cls_token", "pos_embed_list.0", "pos_embed_list.1"}


def test_flags_win_over_the_recipe_of_the_model() -> None:
    arguments = "--data-path unused --epochs 200".split()
    recipe, chosen, plain = (
        main_deit.model_kwargs(main_deit.parse([*arguments, *more.split()])[0], 4)
        for more in ("--model lf_deit_nano", "--model lf_deit_nano --select-from 0.5", "--model deit_nano")
    )
    assert recipe["select_from_epoch"] == pytest.approx(200 * 231 / 300)
    assert chosen["select_from_epoch"] == 100 and "select_from_epoch" not in plain
    assert recipe["num_classes"] == 4


def test_evaluation_repeats_the_log(command: Command, folder: Path, trained: Path) -> None:
    ended = command(
        "main_deit", *TRAIN, "--data-path", folder, "--eval", "--resume", trained / "checkpoint.pth"
    )
    assert ended.code == 0
    entry = log_of(trained)[-1]
    printed = dict(re.findall(r"(test_\w+) ([\d.]+)$", ended.err, re.MULTILINE))
    assert printed == {key: f"{value:.3f}" for key, value in entry.items() if key.startswith("test_")}


def test_evaluation_of_the_average(command: Command, folder: Path, tmp_path: Path) -> None:
    """Where the average decided which epoch is the best, --eval repeats the accuracy that decided."""
    average = ["--eval-ema", "--model-ema-decay", 0.5, "--output_dir", tmp_path]
    assert command("main_deit", *TRAIN, "--data-path", folder, *average).code == 0
    best = load_checkpoint(tmp_path / "model_best.pth")
    entry = log_of(tmp_path)[best["epoch"]]
    assert best["best_by"] == "ema_exit1_acc1" and best["best"] == entry["ema_exit1_acc1"]
    argv = ["--data-path", folder, "--num_workers", 0, "--device", "cpu"]
    argv += ["--eval", "--resume", tmp_path / "model_best.pth"]
    ended = command("main_deit", *argv)
    assert ended.code == 0 and "evaluating the averaged weights (model_ema) of" in ended.err
    printed = dict(re.findall(r"((?:test|ema)_\w+) ([\d.]+)$", ended.err, re.MULTILINE))
    assert printed == {key: f"{value:.3f}" for key, value in entry.items() if key.startswith("ema_")}
    ended = command("main_deit", *argv, "--no-eval-ema")
    assert "evaluating the raw weights (model) of" in ended.err
    assert f"test_exit1_loss {entry['test_exit1_loss']:.3f}" in ended.err and "ema_" not in ended.err


def test_evaluation_of_an_average_that_is_not_there(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(sharp)
    checkpoint.pop("model_ema")
    save_checkpoint(checkpoint, tmp_path / "plain.pth")
    argv = ["--data-path", folder, "--num_workers", 0, "--eval", "--resume", tmp_path / "plain.pth"]
    ended = command("main_deit", *argv, "--eval-ema")
    assert ended.code == 2 and "plain.pth holds no averaged weights" in ended.err


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 33",
        "--token-label",
        "--opt nope",
        "--opt adahessian",
        "--opt sgd",
        "--seed 7",
        "--data-set IMNET",
    ],
)
def test_evaluation_checks_nothing_of_training(
    flags: str, command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """Nor does it need the training images."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(folder / "val")
    argv = ["--data-path", tmp_path / "data", "--num_workers", 0, "--device", "cpu"]
    argv += ["--eval", "--resume", trained / "checkpoint.pth", *flags.split()]
    ended = command("main_deit", *argv)
    assert ended.code == 0, ended.err
    assert f"test_exit1_acc1 {log_of(trained)[-1]['test_exit1_acc1']:.3f}" in ended.err


@pytest.mark.parametrize(
    ("flags", "warmup", "cooldown"),
    [
        ("--model cf_lvvit_nano", 5, 10),
        ("--model cf_lvvit_nano --epochs 1", 0.1, 0),
        ("--model cf_lvvit_nano --epochs 60", 5, 2),
        ("--model cf_lvvit_nano --epochs 1 --cooldown-epochs 4 --warmup-epochs 3", 3, 4),
        ("--model t2t_vit_14 --epochs 15", 1, 0),
        ("--model t2t_vit_14 --epochs 600", 20, 10),
        ("--model avit_deit_tiny", 5, 0),
        ("--model deit_nano --epochs 30", 3, 0),
    ],
)
def test_epochs_of_a_recipe_scale_with_shorter_runs(flags: str, warmup: float, cooldown: int) -> None:
    args, _ = main_deit.parse(["--data-path", "unused", *flags.split()])
    assert args.warmup_epochs == pytest.approx(warmup) and args.cooldown_epochs == cooldown
    assert args.scaled == ([] if "--cooldown" in flags else ["warmup_epochs", "cooldown_epochs"])


def test_a_short_run_of_a_recipe_says_what_is_scaled(command: Command, folder: Path, tmp_path: Path) -> None:
    """What was scaled follows --epochs when the run is resumed; what a flag said stays."""
    flags = (
        "--model cf_lvvit_nano --model-kwargs depth=2 --batch-size 32 --device cpu --num_workers 0".split()
    )
    argv = [*flags, "--data-path", folder, "--output_dir", tmp_path]
    ended = command("main_deit", *argv, "--epochs", 1)
    assert ended.code == 0, ended.err
    assert "scaled to 1 epochs: --warmup-epochs 5 to 0.1, --cooldown-epochs 10 to 0" in ended.err
    assert len(log_of(tmp_path)) == 1
    resume = ["--resume", str(tmp_path / "checkpoint.pth"), "--data-path", "unused", "--epochs", "300"]
    args, _ = main_deit.parse(resume)
    assert (args.warmup_epochs, args.cooldown_epochs) == (5, 10)
    args, _ = main_deit.parse([*resume, "--warmup-epochs", "2"])
    assert (args.warmup_epochs, args.cooldown_epochs, args.scaled) == (2, 10, ["cooldown_epochs"])


@pytest.mark.parametrize("sched", ["step", "multistep"])
def test_steps_of_the_learning_rate_scale(sched: str) -> None:
    args, _ = main_deit.parse(
        ["--model", "deit_nano", "--data-path", "unused", "--epochs", "10", "--sched", sched, "--lr", "1"]
        + ["--unscale-lr", "--warmup-epochs", "0", "--no-sched-on-updates"]
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler, _ = create_scheduler_v2(optimizer, **main_deit.schedule_options(args, 5))
    rates = []
    for epoch in range(10):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    at = [3, 6, 9] if sched == "step" else [2, 5, 8]  # timm's multistep counts the epoch that begins
    expected = [0.1 ** sum(epoch >= step for step in at) for epoch in range(10)]
    assert rates == pytest.approx(expected)


@pytest.mark.slow
def test_evaluation_prepares_images_as_training_did(command: Command, folder: Path, tmp_path: Path) -> None:
    shared = [*TRAIN, "--data-path", folder, "--epochs", 1]
    assert command("main_deit", *shared, "--crop-pct", 0.5, "--output_dir", tmp_path).code == 0
    printed = command("main_deit", *shared, "--eval", "--resume", tmp_path / "checkpoint.pth").err
    assert f"test_exit0_loss {log_of(tmp_path)[0]['test_exit0_loss']:.3f}" in printed


@pytest.mark.slow
def test_a_small_folder_trains_in_smaller_batches(command: Command, folder: Path, tmp_path: Path) -> None:
    arguments = ["--data-path", folder, "--output_dir", tmp_path, "--epochs", 1, "--batch-size", 66]
    ended = command("main_deit", *TRAIN, *arguments)
    assert ended.code == 0 and "only 64 training images per process: batches of 64" in ended.err
    assert load_checkpoint(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"] == 1


def test_a_resumed_run_keeps_its_options(trained: Path) -> None:
    saved = load_checkpoint(trained / "checkpoint.pth")["args"]
    args, _ = main_deit.parse(
        ["--resume", str(trained / "checkpoint.pth"), "--data-path", "here", "--lr", "1"]
    )
    changed = {name for name, value in saved.items() if vars(args)[name] != value}
    assert changed == {"resume", "data_path", "lr", "output_dir", "device", "num_workers"}


def test_released_lv_weights_get_their_own_crop() -> None:
    assert datasets.data_config(recipe_of("cf_lvvit_small"), {})["crop_pct"] == 0.9
    assert datasets.data_config(recipe_of("lf_deit_small"), {})["crop_pct"] == 0.875
    assert (
        datasets.data_config(recipe_of("cf_lvvit_small"), {"data_config": {"crop_pct": 1}})["crop_pct"] == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--channels-last"], ["--accumulate", "2"]])
def test_other_precision_and_layout_train(
    command: Command, folder: Path, tmp_path: Path, flags: list
) -> None:
    arguments = ["--data-path", folder, "--output_dir", tmp_path, "--epochs", 1, *flags]
    assert command("main_deit", *TRAIN, *arguments).code == 0
    assert 1 < log_of(tmp_path)[0]["train_loss"] < 3


@pytest.mark.slow
def test_any_model_of_timm_can_be_the_baseline(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    flags = f"--eval-mode 2 --data_url {folder} --checkpoint_path {sharp} --num_workers 0 --repeats 1".split()
    ended = command(
        "dynamic_inference", *flags, "--baseline", "test_resnet", "--results", tmp_path / "r.json"
    )
    assert ended.code == 0, ended.err
    assert load_json(tmp_path / "r.json")["timed"]["baseline"]["model"] == "test_resnet"
    ended = command("dynamic_inference", *flags, "--baseline", "test_vit", "--results", tmp_path / "r.json")
    assert ended.code == 2 and "takes no images of 56 pixels" in ended.err  # its patches are 16 pixels wide


def test_fewer_folders_than_classes_are_not_guessed(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(sharp)
    checkpoint.pop("class_names")
    save_checkpoint(checkpoint, tmp_path / "nameless.pth")
    shutil.copytree(folder / "val", tmp_path / "data" / "val")
    shutil.rmtree(next((tmp_path / "data" / "val").iterdir()))
    flags = ["--data_url", tmp_path / "data", "--num_workers", 0, "--eval-mode", 0]
    ended = command("dynamic_inference", *flags, "--checkpoint_path", tmp_path / "nameless.pth")
    assert ended.code == 2 and "does not name its classes" in ended.err
    assert (
        command("dynamic_inference", *flags, "--checkpoint_path", sharp, "--results", tmp_path / "r").code
        == 0
    )


@pytest.mark.slow
def test_a_longer_run_takes_the_longer_schedule(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    arguments = ["--data-path", folder, "--output_dir", tmp_path, "--resume", trained / "checkpoint.pth"]
    assert command("main_deit", *TRAIN, *arguments, "--epochs", 3).code == 0
    whole = tmp_path / "whole"
    assert command("main_deit", *TRAIN, "--data-path", folder, "--output_dir", whole, "--epochs", 3).code == 0
    assert log_of(tmp_path)[0]["train_lr"] == log_of(whole)[2]["train_lr"] > 1e-5


def test_training_goes_on_for_another_epoch(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "more"
    shutil.copytree(trained, output)
    arguments = ["--data-path", folder, "--output_dir", output, "--resume", output / "checkpoint.pth"]
    ended = command("main_deit", *TRAIN, *arguments, "--epochs", 3)
    assert ended.code == 0, ended.err
    assert [entry["epoch"] for entry in log_of(output)] == [0, 1, 2]
    assert log_of(output)[:2] == log_of(trained)
    before, after = (load_checkpoint(root / "checkpoint.pth") for root in (trained, output))
    assert after["epoch"] == 2
    assert after["optimizer"]["state"][0]["step"] == 6  # of 2 per epoch
    assert not same(before["model"], after["model"]) and not same(before["model_ema"], after["model_ema"])


@pytest.mark.slow
def test_interrupted_run_ends_like_an_uninterrupted_one(
    command: Command, folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(log: RunLog, epoch: int, *rest: object) -> None:
        if epoch:
            raise KeyboardInterrupt
        add_epoch(log, epoch, *rest)

    add_epoch = RunLog.add_epoch
    arguments = [*TRAIN, "--data-path", folder, "--output_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "add_epoch", stop)
        assert command("main_deit", *arguments).code == 130
    path = tmp_path / "run" / "checkpoint.pth"
    assert load_checkpoint(path)["epoch"] == 0
    ended = command("main_deit", *arguments, "--resume", path)
    assert ended.code == 0, ended.err
    whole, resumed = (load_checkpoint(file) for file in (trained / "checkpoint.pth", path))
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "epoch", "best", "rng"):
        assert same(whole[key], resumed[key]), key
    assert log_of(tmp_path / "run") == log_of(trained)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", ["--repeated-aug", "--no-repeated-aug"])
def test_every_epoch_has_its_own_order(
    repeats: str, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = []

    def look(model: object, loader: DataLoader, *_: object) -> dict[str, float]:
        orders.append(list(loader.sampler))
        return {"loss": 0.0}

    monkeypatch.setattr(main_deit, "train_one_epoch", look)
    assert command("main_deit", *TRAIN, "--data-path", folder, repeats).code == 0
    assert len(orders) == 2 and orders[0] != orders[1]
    assert [len(set(order)) for order in orders] == [22 if repeats == "--repeated-aug" else 64] * 2


def test_finished_run_is_left_alone(command: Command, folder: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    before = (output / "checkpoint.pth").read_bytes()
    arguments = ["--data-path", folder, "--output_dir", output, "--resume", output / "checkpoint.pth"]
    assert command("main_deit", *TRAIN, *arguments).code == 0
    assert (output / "checkpoint.pth").read_bytes() == before


@pytest.mark.slow
def test_finetuning_starts_from_the_given_weights(
    command: Command, folder: Path, sharp: Path, tmp_path: Path
) -> None:
    """With a learning rate of nothing, what comes out is what went in."""
    still = "--epochs 1 --lr 0 --min-lr 0 --warmup-lr 0 --no-model-ema --picture-freq 0".split()
    arguments = ["--data-path", folder, "--output_dir", tmp_path, "--finetune", sharp]
    ended = command("main_deit", *TRAIN, *still, *arguments)
    assert ended.code == 0, ended.err
    found, given = (load_checkpoint(path) for path in (tmp_path / "checkpoint.pth", sharp))
    assert same(dict(found["model"]), dict(given["model"]))
    assert "model_ema" not in found and found["epoch"] == 0


# Inference


STORED = {
    0: ["anytime_classification"],
    1: ["anytime_classification", "budgeted_batch_classification", "dynamic_threshold"],
    2: [],
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_exact_command_prints_and_stores(
    mode: int, command: Command, folder: Path, checkpoint: Path, answers: Answers
) -> None:
    before = load_checkpoint(checkpoint)
    if mode == 1:
        shell = run("dynamic_inference.py", *infer(mode, folder, checkpoint))
        ended = Ended(shell.returncode, shell.stdout, shell.stderr)
    else:
        ended = command("dynamic_inference", *infer(mode, folder, checkpoint))
    assert ended.code == 0, ended.err
    after = load_checkpoint(checkpoint)
    assert after["flops"] == pytest.approx(answers.gflops)
    if mode == 2:
        share = 100 - 100 * sum(answers.exits(THRESHOLD)) / 40
        text = f"top-1 {answers.accuracy(THRESHOLD):.2f} %; leaving at {share:.1f} % location"
        assert f"threshold {THRESHOLD}: {text}, {100 - share:.1f} % focus" in ended.out
        speed = table_of(ended.out, "median of 3 passes, batch 40")
        assert float(speed[1][1]) == pytest.approx(answers.cost(THRESHOLD), rel=1e-3)
    else:
        accuracy = [answers.accuracy(0), answers.accuracy(2)]
        assert after["anytime_classification"] == pytest.approx(accuracy)
        rows = table_of(ended.out, "all images to one exit")
        assert [row[0] for row in rows] == ["exit", "location", "focus"]
        assert [float(row[2]) for row in rows[1:]] == pytest.approx(accuracy, abs=0.01)
        assert [float(row[1]) for row in rows[1:]] == pytest.approx(answers.gflops, rel=1e-3)
    if mode == 1:
        gflops, accuracy = after["budgeted_batch_classification"]
        thresholds = [t / 100 for t in range(101)]
        assert gflops == pytest.approx([answers.cost(t) for t in thresholds])
        assert accuracy == pytest.approx([answers.accuracy(t) for t in thresholds])
        assert (gflops[0], gflops[-1]) == pytest.approx(tuple(answers.gflops))
        assert gflops == sorted(gflops)
        rows = table_of(ended.out, "early exit by threshold")[1:]
        assert [float(row[0]) for row in rows] == [t / 100 for t in range(0, 101, 5)]
        assert [float(row[2]) for row in rows] == pytest.approx(accuracy[::5], abs=0.01)
        assert [float(row[3]) + float(row[4]) for row in rows] == pytest.approx([100] * 21, abs=0.1)
    assert after.keys() - before.keys() == {"flops", "results_of", "device", *STORED[mode]}
    assert all(same(before[key], after[key]) for key in before)
    assert not [path for path in checkpoint.parent.iterdir() if path.name.endswith(".tmp")]


def test_stored_results_are_printed_without_data(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    curve = [[0.5, 1.0, 1.5], [10.0, 20.0, 30.0]]
    results = {"flops": [0.5, 1.5], "anytime_classification": [10.0, 30.0]}
    add_to_checkpoint(checkpoint, results | {"budgeted_batch_classification": curve})
    before = checkpoint.read_bytes()
    ended = command("dynamic_inference", *infer(3, tmp_path / "nowhere", checkpoint))
    assert ended.code == 0
    assert "lf_deit_nano" in ended.out
    assert "flops: [0.5, 1.5]" in ended.out and "anytime_classification: [10.0, 30.0]" in ended.out
    rows = table_of(ended.out, "\nbudgeted_batch_classification")
    assert [[float(cell) for cell in row] for row in rows[1:]] == [[0.5, 10], [1, 20], [1.5, 30]]
    assert checkpoint.read_bytes() == before


def test_results_of_other_spelling_and_none(command: Command, checkpoint: Path) -> None:
    add_to_checkpoint(checkpoint, {"flop": [0.5, 1.5]})
    ended = command("dynamic_inference", "--eval-mode", 3, "--checkpoint_path", checkpoint)
    assert ended.code == 0
    assert "flops: [0.5, 1.5]" in ended.out and "budgeted_batch_classification: None" in ended.out


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_results_go_to_a_file_instead(
    mode: int, command: Command, folder: Path, checkpoint: Path, answers: Answers, tmp_path: Path
) -> None:
    before, path = checkpoint.read_bytes(), tmp_path / "new" / "results.json"
    options = ["--results", path, "--num_workers", 0, "--repeats", 1]
    assert command("dynamic_inference", *infer(mode, folder, checkpoint), *options).code == 0
    assert checkpoint.read_bytes() == before
    found = json.loads(path.read_text())
    assert found["flops"] == pytest.approx(answers.gflops)
    if mode == 1:
        assert len(found["budgeted_batch_classification"][0]) == 101
    if mode == 2:
        timed = found["timed"]
        assert timed["device"] == found["device"] == utils.cpu_name() != ""
        assert timed["accuracy"] == pytest.approx(answers.accuracy(THRESHOLD))
        assert timed["mean_gflops"] == pytest.approx(answers.cost(THRESHOLD))
        assert 0 < timed["images_per_second_end_to_end"] <= timed["images_per_second"]


def test_results_in_a_file_are_merged(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    for mode in (1, 2):
        options = ["--results", path, "--num_workers", 0, "--repeats", 1]
        command("dynamic_inference", *infer(mode, folder, checkpoint), *options)
    assert json.loads(path.read_text()).keys() == {
        "flops",
        "anytime_classification",
        "budgeted_batch_classification",
        "dynamic_threshold",
        "results_of",
        "device",
        "timed",
    }


@pytest.mark.parametrize(
    ("threshold", "batch_size"), [(THRESHOLD, 1), (THRESHOLD, 7), (THRESHOLD, 64), (0, 7), (1, 7)]
)
def test_early_exit_is_the_same_in_any_batch(
    threshold: float,
    batch_size: int,
    command: Command,
    folder: Path,
    checkpoint: Path,
    answers: Answers,
    tmp_path: Path,
) -> None:
    options = ["--results", tmp_path / "results.json", "--num_workers", 0, "--repeats", 1]
    command("dynamic_inference", *infer(2, folder, checkpoint, batch_size, threshold), *options)
    timed = json.loads((tmp_path / "results.json").read_text())["timed"]
    late = sum(answers.exits(threshold)) / 40
    assert timed["exit_shares"] == pytest.approx([1 - late, late])
    assert timed["accuracy"] == pytest.approx(answers.accuracy(threshold))
    assert timed["mean_gflops"] == pytest.approx(answers.cost(threshold))
    if threshold in (0, 1):
        assert timed["mean_gflops"] == pytest.approx(answers.gflops[threshold])


def test_baseline_is_timed_beside(command: Command, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ["--results", tmp_path / "results.json", "--num_workers", 0, "--repeats", 1]
    ended = command("dynamic_inference", *infer(2, folder, checkpoint), *options, "--baseline", "deit_nano")
    assert ended.code == 0, ended.err
    timed = json.loads((tmp_path / "results.json").read_text())["timed"]
    baseline = timed["baseline"]
    assert timed["speedup"] == pytest.approx(timed["images_per_second"] / baseline["images_per_second"])
    ratio = baseline["gflops"] / timed["mean_gflops"]
    assert f"GFLOPs saved {ratio:.2f}x" in ended.out


def test_other_region_is_counted_anew(command: Command, folder: Path, checkpoint: Path) -> None:
    """A region over the whole grid refines more, so the checkpoint's GFLOPs are replaced, with a warning."""
    options = ["--num_workers", 0, "--region-size", 7]
    quiet = command("dynamic_inference", *infer(0, folder, checkpoint), "--num_workers", 0)
    first = load_checkpoint(checkpoint)["flops"]
    ended = command("dynamic_inference", *infer(0, folder, checkpoint), *options)
    second = load_checkpoint(checkpoint)["flops"]
    assert "warning" not in quiet.err and "warning" in ended.err
    assert second[0] == first[0] and second[1] > first[1]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_budget_is_kept_on_the_calibration_half(
    share: float, command: Command, folder: Path, checkpoint: Path, answers: Answers, tmp_path: Path
) -> None:
    before = checkpoint.read_bytes()
    low, high = answers.gflops
    budget, even, odd = low + share * (high - low) + 1e-9, slice(0, None, 2), slice(1, None, 2)
    options = ["--budget", budget, "--results", tmp_path / "results.json", "--num_workers", 0]
    ended = command("dynamic_inference", *infer(1, folder, checkpoint), *options)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "results.json").read_text())["budget"]
    levels = sorted([0.0, 1.0, *answers.confidence[even, 0].tolist()])
    best = max(level for level in levels if answers.cost(level - 1e-6, even) <= budget)
    threshold = found["threshold"]
    assert threshold == pytest.approx(best, abs=1e-5)
    assert found["calibration"]["mean_gflops"] <= budget
    for title, half in (("calibration", even), ("test", odd)):
        assert found[title]["mean_gflops"] == pytest.approx(answers.cost(threshold - 1e-6, half))
        assert found[title]["accuracy"] == pytest.approx(answers.accuracy(threshold - 1e-6, half))
    rows = table_of(ended.out, "threshold")
    assert [row[:2] for row in rows[1:]] == [["calibration", "20"], ["test", "20"]]
    assert checkpoint.read_bytes() == before


def test_budget_from_another_split(
    command: Command, folder: Path, checkpoint: Path, answers: Answers
) -> None:
    options = ["--budget", sum(answers.gflops) / 2, "--calibration", "train", "--num_workers", 0]
    ended = command("dynamic_inference", *infer(1, folder, checkpoint), *options)
    rows = table_of(ended.out, "threshold")
    assert [row[:2] for row in rows[1:]] == [["calibration", "64"], ["test", "40"]]


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["geometric", "joint"])
def test_solved_thresholds_are_stored_and_used_again(
    solver: str, command: Command, folder: Path, checkpoint: Path, answers: Answers
) -> None:
    """Solved on the even images and told on the odd ones; mode 1 then takes them, for all images."""
    ended = command("dynamic_inference", *infer(1, folder, checkpoint), "--num_workers", 0, "--solve", solver)
    assert ended.code == 0, ended.err
    found = load_checkpoint(checkpoint)
    thresholds, last = torch.tensor(found["dynamic_threshold"]).unbind(1)
    assert len(thresholds) == 59 and (last == -1e8).all()
    even, odd = slice(0, None, 2), slice(1, None, 2)
    shares = torch.arange(1, 60) / 20
    wanted = (20 / (1 + shares)).floor()  # of the 20 calibration images, to leave early
    if solver == "geometric":
        early = (answers.confidence[even, 0] >= thresholds[:, None] - 1e-6).sum(dim=1)
        assert torch.equal(early, wanted.long())
    for row in (0, 20, 58):
        level = thresholds[row].item() - 1e-6
        if solver == "joint":
            budget = answers.cost(
                answers.confidence[even, 0].sort(descending=True).values[int(wanted[row]) - 1] - 1e-6, even
            )
            tried = [t.item() - 1e-6 for t in answers.confidence[even, 0]] + [1e8]
            assert answers.accuracy(level, even) == max(
                answers.accuracy(t, even) for t in tried if answers.cost(t, even) <= budget + 1e-9
            )
        gflops, accuracy = (column[row] for column in found["budgeted_batch_classification"])
        assert gflops == pytest.approx(answers.cost(level, odd))
        assert accuracy == pytest.approx(answers.accuracy(level, odd))
    ended = command("dynamic_inference", *infer(1, folder, checkpoint), "--num_workers", 0)
    assert "at the checkpoint's thresholds" in ended.out
    again = load_checkpoint(checkpoint)
    assert again["dynamic_threshold"] == found["dynamic_threshold"]
    cost = answers.cost(thresholds[20].item() - 1e-6, slice(None))
    assert again["budgeted_batch_classification"][0][20] == pytest.approx(cost)
    command("dynamic_inference", *infer(1, folder, checkpoint), "--num_workers", 0, "--sweep")
    swept = torch.tensor(load_checkpoint(checkpoint)["dynamic_threshold"])
    torch.testing.assert_close(swept[:, 0], torch.linspace(0, 1, 101))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_predictions_of_a_folder(
    batch_size: int, command: Command, folder: Path, checkpoint: Path, answers: Answers
) -> None:
    arguments = infer(1, "unused", checkpoint, batch_size)
    ended = command("dynamic_inference", *arguments, "--images", folder / "val", "--num_workers", 0)
    assert ended.code == 0, ended.err
    header, *rows = csv.reader(io.StringIO(ended.out))
    assert header == ["file", "class", "confidence", "exit", "GFLOPs", "region"]
    assert [row[0] for row in rows] == sorted(map(str, (folder / "val").rglob("*.png")))
    names = ["amber", "blue", "coral", "dusk"]
    for at, (exit_, row) in enumerate(zip(answers.exits(THRESHOLD), rows, strict=True)):
        assert row[1] == names[answers.predicted[at, exit_]]
        assert float(row[2]) == pytest.approx(answers.confidence[at, exit_].item(), abs=1e-4)
        assert row[3] == ("location", "focus")[exit_]
        assert float(row[4]) == pytest.approx(answers.gflops[exit_], abs=1e-4)
        if exit_ == 0:
            assert row[5] == ""
        else:  # 40 pixels of the middle 56, in a picture that was enlarged to 64: 35 of its own
            left, top, right, bottom = map(int, row[5].split())
            assert 3 <= left < right <= 53 and 3 <= top < bottom <= 53
            assert right - left == pytest.approx(35, abs=1) and bottom - top == pytest.approx(35, abs=1)


def test_prediction_of_one_image_into_a_file(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    image, before = folder / "val" / "blue" / "03.png", checkpoint.read_bytes()
    arguments = ["--checkpoint_path", checkpoint, "--images", image, "--num_workers", 0]
    printed = command("dynamic_inference", *arguments)
    written = command("dynamic_inference", *arguments, "--output", tmp_path / "table.csv")
    assert printed.code == written.code == 0 and written.out == ""
    assert (tmp_path / "table.csv").read_text().splitlines() == printed.out.splitlines()
    assert len(printed.out.splitlines()) == 2
    assert checkpoint.read_bytes() == before


# Pictures


@pytest.mark.slow
def test_exact_command_draws_pictures(
    folder: Path, checkpoint: Path, answers: Answers, tmp_path: Path
) -> None:
    output = tmp_path / "pictures"
    command = f"visualize.py --model lf_deit_nano --resume {checkpoint} --data-path {folder}"
    ended = run(*command.split(), "--output_dir", output, "--batch-size", 8)
    assert ended.returncode == 0, ended.stderr
    expected = {"contact_sheet.png"}
    for number, at in enumerate(np.random.default_rng(0).permutation(40)[:24], 1):
        exit_ = answers.exits(0.7)[at]
        outcome = "right" if answers.predicted[at, exit_] == answers.label[at] else "wrong"
        stage = ("location", "focus")[exit_]
        expected.add(f"label{answers.label[at]}_{outcome}_{stage}_index{number}.png")
    assert {path.name for path in output.iterdir()} == expected
    sizes = {}
    for path in output.iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
            assert len(image.getcolors(1 << 20)) > 100
    page = sizes.pop("contact_sheet.png")
    ((width, height),) = set(sizes.values())
    assert width > 3 * 56 and page[0] > 2 * width and page[1] > 12 * height


def test_pictures_of_unlabelled_images(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ["--resume", checkpoint, "--output_dir", tmp_path / "pictures", "--threshold", 0]
    assert command("visualize", *arguments, "--images", folder / "val" / "blue").code == 0
    names = [f"{i:02}_location_index{i + 1}.png" for i in range(10)]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [*names, "contact_sheet.png"]
    image = folder / "val" / "blue" / "03.png"
    assert command("visualize", *arguments, "--images", image, "--save-name", "mine.png").code == 0
    assert (tmp_path / "pictures" / "mine.png").is_file()


def test_curve_of_stored_results(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    arguments = ["--resume", checkpoint, "--curve", "--output_dir", output]
    ended = command("visualize", *arguments)
    assert ended.code == 2 and "--eval-mode 1" in ended.err and not output.exists()
    results = {"flops": [0.5, 1.5], "anytime_classification": [50.0, 60.0]}
    gflops, accuracy = torch.linspace(0.5, 1.5, 101), torch.linspace(50, 60, 101)
    curve = {"budgeted_batch_classification": [gflops.tolist(), accuracy.tolist()]}
    add_to_checkpoint(checkpoint, results | curve)
    assert command("visualize", *arguments, "--baseline", "deit_nano:2.0:58").code == 0
    assert [path.name for path in output.iterdir()] == ["curve.png"]
    with Image.open(output / "curve.png") as image:
        assert len(image.getcolors(1 << 20)) > 100


# Errors


@pytest.fixture(scope="module")
def bad(folder: Path, sharp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folders and checkpoints with something wrong in each."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("broken_train", "broken_val", "other_classes"):
        shutil.copytree(folder, root / name)
    for split in ("train", "val"):
        (root / "empty" / split).mkdir(parents=True)
        image = root / f"broken_{split}" / split / "coral" / "05.png"
        image.write_bytes(image.read_bytes()[:60])
        (root / "other_classes" / split / "amber").rename(root / "other_classes" / split / "apricot")
    saved = load_checkpoint(sharp)
    weights = saved["model"]
    fewer = {name: value for name, value in weights.items() if name != "cls_token"}
    torch.save(saved | {"model": fewer}, root / "fewer.pth")
    torch.save(saved | {"model": weights | {"extra": torch.zeros(1)}}, root / "more.pth")
    torch.save({"epoch": 3}, root / "none.pth")
    torch.save({"model": weights, "model_name": "lf_deit_nano"}, root / "weights.pth")
    (root / "cut.pth").write_bytes(sharp.read_bytes()[:5000])
    (root / "list.json").write_text("[1, 2]")
    return root


NANO = "--model lf_deit_nano"
INFER = "--data_url {folder} --checkpoint_path {sharp} --num_workers 0"
ERRORS = {
    "main_deit": [
        (f"{NANO} --data-path nowhere", "nowhere"),
        (f"{NANO} --data-path {{bad}}/empty", "empty/train"),
        (f"{NANO} --data-path {{bad}}/broken_train --no-repeated-aug --epochs 1", "coral/05.png"),
        (f"{NANO} --data-path {{folder}} --batch-size 9", "--batch-size 9 is odd"),
        (f"{NANO} --data-path {{folder}} --batch-size 0", "--batch-size"),
        (f"{NANO} --data-path {{folder}} --region-size 9", "region_size is 9"),
        (f"{NANO} --data-path {{folder}} --model-kwargs colour=3", "colour"),
        (f"{NANO} --data-path {{folder}} --model-kwargs depth=0", "depth is 0"),
        (f"{NANO} --data-path {{folder}} --model-kwargs num_heads=0", "num_heads is 0"),
        (f"{NANO} --data-path {{folder}} --sched none", "--sched"),
        (f"{NANO} --data-path {{folder}} --aa foo", "foo"),
        (f"{NANO} --data-path {{folder}} --hflip 3", "--hflip: '3' is not a finite number from 0 to 1"),
        (f"{NANO} --data-path {{folder}} --opt-betas 0.9", "--opt-betas"),
        (f"{NANO} --data-path {{folder}} --drop-path 1", "drop_path_rate is 1"),
        (f"{NANO} --data-path {{folder}} --device foo", "--device foo"),
        (f"{NANO} --data-path {{folder}} --device meta", "--device meta"),
        (f"{NANO} --data-path {{folder}} --colour red", "--colour"),
        (f"{NANO}", "--data-path"),
        ("--model resnet10t --alpha 0.5 --data-path {folder}", "resnet10t"),
        ("--model resnet10t --data-path {folder}", "resnet10t is a plain timm model"),
        (f"{NANO} --data-path {{folder}} --eval", "--resume"),
        (f"{NANO} --data-path {{folder}} --resume nowhere.pth", "nowhere.pth"),
        (f"{NANO} --data-path {{folder}} --resume {{bad}}/weights.pth", "--finetune"),
        (f"{NANO} --data-path {{folder}} --finetune {{bad}}/none.pth", "none.pth"),
        (f"{NANO} --data-path {{bad}}/other_classes --resume {{sharp}}", "apricot"),
        ("--model lf_deit_nanoo --data-path {folder}", "lf_deit_nano"),
        ("--model resnet10t --data-path {folder}", "resnet10t"),
        ("--data-path {folder}", "--model"),
    ],
    "dynamic_inference": [
        ("--data_url nowhere --checkpoint_path {sharp}", "nowhere"),
        ("--data_url {bad}/empty --checkpoint_path {sharp}", "empty/val"),
        ("--data_url {bad}/broken_val --checkpoint_path {sharp} --num_workers 0", "coral/05.png"),
        ("--data_url {bad}/broken_val --checkpoint_path {sharp} --num_workers 2", "coral/05.png"),
        ("--data_url {bad}/other_classes --checkpoint_path {sharp}", "apricot"),
        (f"{INFER} --location-stage-size 9", "pos_embed_list"),
        (f"{INFER} --budget nan", "--budget: 'nan' is not a finite number"),
        (f"{INFER} --eval-mode 9", "--eval-mode"),
        (f"{INFER} --images {{folder}} --output nowhere/table.csv", "nowhere/table.csv"),
        (f"{INFER} --region-size 9", "region_size is 9"),
        (f"{INFER} --model-kwargs colour=3", "colour"),
        (f"{INFER} --threshold 7", "--threshold"),
        (f"{INFER} --batch_size 0", "--batch_size"),
        (f"{INFER} --model deit_nano", "checkpoint of lf_deit_nano"),
        (f"{INFER} --budget 0.0001", "budget"),
        (f"{INFER} --eval-mode 2 --baseline deit_nanoo", "deit_nanoo"),
        (f"{INFER} --images nowhere", "nowhere"),
        ("--data_url {folder} --checkpoint_path nowhere.pth", "nowhere.pth"),
        ("--data_url {folder} --checkpoint_path nowhere.pth --eval-mode 3", "nowhere.pth"),
        ("--data_url {folder} --checkpoint_path {bad}/fewer.pth", "cls_token"),
        ("--data_url {folder} --checkpoint_path {bad}/more.pth", "extra"),
        ("--data_url {folder} --checkpoint_path {bad}/none.pth", "none.pth"),
        ("--data_url {folder} --checkpoint_path {bad}/cut.pth", "cut.pth"),
    ],
    "visualize": [
        ("--resume nowhere.pth --data-path {folder}", "nowhere.pth"),
        ("--resume {sharp} --data-path nowhere", "nowhere"),
        ("--resume {sharp} --data-path {bad}/empty", "empty/val"),
        ("--resume {sharp} --data-path {bad}/broken_val --num-images 40", "coral/05.png"),
        ("--resume {sharp} --data-path {folder} --threshold 7", "--threshold"),
        ("--resume {sharp} --data-path {folder} --location-stage-size 9", "pos_embed_list"),
        ("--resume {sharp}", "--data-path"),
        ("--resume {sharp} --curve --results nowhere.json", "nowhere.json"),
        ("--resume {sharp} --curve --results {bad}/list.json", "list.json"),
    ],
}
DEFAULTS = {
    "main_deit": "--batch-size 16 --num_workers 0",
    "dynamic_inference": "--num_workers 0",
    "visualize": "",
}


def check_error(name: str, ended: Ended, text: str) -> None:
    """Exit code 2, and one line beside the dated ones of the log."""
    lines = [line for line in ended.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert len(lines) == 1 and lines[0].startswith(f"{name}.py: error: ") and text in lines[0], lines


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        pytest.param(name, arguments, text, id=f"{name}-{arguments}")
        for name, entries in ERRORS.items()
        for arguments, text in entries
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(
    name: str,
    arguments: str,
    text: str,
    command: Command,
    bad: Path,
    folder: Path,
    sharp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "output"
    for file in ("checkpoint.pth", "model_best.pth", "log.txt", "contact_sheet.png", "curve.png"):
        output.mkdir(exist_ok=True)
        (output / file).write_text("mine")
    places = {"folder": folder, "sharp": sharp, "bad": bad}
    argv = [*DEFAULTS[name].split(), *arguments.format(**places).split()]
    if name != "dynamic_inference":
        argv += ["--output_dir", str(output)]
    before, kept = sharp.read_bytes(), contents(output)
    ended = command(name, *argv)
    check_error(name, ended, text)
    assert sharp.read_bytes() == before
    assert kept.items() <= contents(output).items()
    assert not [
        file for file in contents(output).keys() - kept.keys() if file.endswith((".pth", ".png", ".tmp"))
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["main_deit", "dynamic_inference", "visualize"])
def test_device_that_is_not_there(name: str, command: Command, folder: Path, sharp: Path) -> None:
    argv = ["--data-path", folder, "--resume", sharp, "--device", "cuda"]
    check_error(name, command(name, *argv), "--device cpu")


@pytest.mark.slow
def test_error_of_a_loading_process_in_a_shell(bad: Path, tmp_path: Path) -> None:
    arguments = f"{NANO} --data-path {bad}/broken_train --batch-size 32 --num_workers 2 --no-repeated-aug"
    ended = run("main_deit.py", *arguments.split(), "--output_dir", tmp_path / "output", "--device", "cpu")
    check_error("main_deit", Ended(ended.returncode, ended.stdout, ended.stderr), "coral/05.png")
    assert not list((tmp_path / "output").glob("*.pth"))


@pytest.mark.parametrize("name", ["main_deit", "dynamic_inference", "visualize"])
def test_help_lists_the_flags(name: str) -> None:
    assert "--model-kwargs" in __import__(name).make_parser().format_help()
