"""No work is lost: a run that is killed, stopped or damaged and resumed ends bit for bit as it would have."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import ROOT, Command, Ended, run
from ranks import ranks
from torch import Tensor, nn
from torch.utils.data import Dataset

import datasets
import main_deit
import utils
from checkpointing.folder import checkpoint_numbers, checkpoint_path, load_newest, save_in_turn
from checkpointing.format import load_checkpoint
from checkpointing.run import Run, RunLog
from checkpointing.schema import check_arguments
from engine import Objective
from loading import loaders
from loading.sampler import names_of_batch

STEPS = 8  # per epoch
TRAIN = (
    "--model deit_nano --model-kwargs depth=2 --epochs 2 --batch-size 8 --device cpu --num_workers 0"
    " --picture-freq 0 --lr 1e-3 --unscale-lr --model-ema-decay 0.9 --drop-path 0.3 --checkpoint-every 3"
).split()
Train = Callable[..., Ended]


class Killed(BaseException):
    """The process ends here: nothing catches it, and what was in memory is not looked at again."""


@pytest.fixture
def train(command: Command, folder: Path, tmp_path: Path) -> Train:
    """Trains into a folder of that name, in this process."""

    def train(name: str, *argv: object) -> Ended:
        return command("main_deit", *TRAIN, "--data-path", folder, "--output_dir", tmp_path / name, *argv)

    return train


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Run], None]], None]:
    """Does something, once, when a step of the run is done, and before what follows an update."""

    def at_step(number: int, action: Callable[[Run], None]) -> None:
        def on_step(run: Run, step: int, *rest: Any) -> None:
            original(run, step, *rest)
            if run.epoch * STEPS + step == number:
                patch.undo()
                action(run)

        patch, original = pytest.MonkeyPatch(), Run.on_step
        patch.setattr(Run, "on_step", on_step)

    return at_step


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The folder that an uninterrupted run with further options leaves. Not to be written to."""
    found: dict[str, Path] = {}

    def whole(options: str = "") -> Path:
        if options not in found:
            found[options] = tmp_path_factory.mktemp("whole")
            argv = [*TRAIN, *options.split(), "--data-path", str(folder), "--output_dir", found[options]]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["main_deit.py", *map(str, argv)])
                main_deit.main()
        return found[options]

    yield whole


def kill(run: Run) -> None:
    raise Killed


def same(first: Any, second: Any) -> bool:
    """Equality to the last bit of tensors in dicts and lists."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def check_same(first: Path, second: Path) -> None:
    """Two output folders: log, and everything in the checkpoints but the command line."""
    assert (first / "log.txt").read_text() == (second / "log.txt").read_text()
    for name in ("checkpoint.pth", "model_best.pth"):
        one, two = load_checkpoint(first / name), load_checkpoint(second / name)
        assert one.keys() == two.keys()
        for key in one.keys() - {"args"}:
            assert same(one[key], two[key]), (name, key)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", "log.txt", "train.log", "tensorboard"}


def spoil(path: Path) -> None:
    """Changes a bit in the middle, which is in a weight: torch.load would take it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def one_line(ended: Ended) -> str:
    """The only line beside those of the log."""
    lines = [line for line in ended.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, ended.err
    return lines[0]


# Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills", "again"),
    [
        ("", [1, 6, 13], "--num_workers 2"),  # before the first checkpoint, in both epochs; other workers
        (
            "--model lf_deit_nano --model-kwargs depth=2 --accumulate 3",
            [4, 12],
            "",
        ),  # 3, 3 and 2 batches per update
        ("--no-repeated-aug --save-freq 2 --checkpoint-every 50", [11], ""),  # back to the start
    ],
    ids=["plain", "accumulate", "rare"],
)
def test_killed_run_ends_like_an_uninterrupted_one(
    options: str, kills: list, again: str, whole: Callable, train: Train, at_step: Callable, tmp_path: Path
) -> None:
    argv = [*options.split(), "--resume", "auto"]
    for step in kills:
        at_step(step, kill)
        with pytest.raises(Killed):
            train("run", *argv)
    ended = train("run", *argv, *again.split())
    assert ended.code == 0, ended.err
    check_same(whole(options), tmp_path / "run")


def test_skipped_batches_are_not_loaded(
    train: Train, at_step: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], datasets.load_image
    monkeypatch.setattr(datasets, "load_image", lambda path, **_: loaded.append(path) or load(path, **_))
    at_step(6, kill)
    with pytest.raises(Killed):
        train("run", "--epochs", 1, "--checkpoint-every", 2)
    loaded.clear()
    assert train("run", "--epochs", 1, "--resume", "auto").code == 0
    assert sum("train" in Path(path).parts for path in loaded) == (STEPS - 6) * 8


@pytest.mark.slow
def test_log_written_but_checkpoint_not(
    whole: Callable, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files of an epoch: its line is not there twice."""
    save = Run.save
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", lambda run, *names: kill(run) if run.epoch == 2 else save(run, *names))
        with pytest.raises(Killed):
            train("run")
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2
    assert train("run", "--resume", "auto").code == 0
    check_same(whole(), tmp_path / "run")


def test_another_batch_size_goes_on_after_as_many_images(
    train: Train, at_step: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(6, kill)
    with pytest.raises(Killed):
        train("run", "--epochs", 1)
    steps: list[int] = []
    monkeypatch.setattr(Run, "on_step", lambda run, step, *_: steps.append(step))
    ended = train("run", "--epochs", 1, "--resume", "auto", "--batch-size", 16)
    assert ended.code == 0 and "8 images per batch, this run of 1 and 16: the order of samples" in ended.err
    assert steps == [3]  # of 0 to 3; six batches of 8 are three of 16


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_a_sample_follow_from_its_place(workers: int) -> None:
    """Not from the number of processes, nor from which batches came before."""
    state = torch.get_rng_state()
    train = partial(loaders.train_loader, Draws(), seed=5)
    both = [train(4, rank=rank, world_size=2, num_workers=workers) for rank in range(2)]
    alone = train(8)
    for loader, start in ((both[0], 0), (both[1], 0), (alone, 0)):
        loader.sampler.set_epoch(3, start)
    batches = list(alone)
    parts = [list(loader) for loader in both]
    assert [len(values.unique()) for values in torch.cat(batches).T] == [24] * 4
    for step, batch in enumerate(batches):
        assert torch.equal(batch[0::2], parts[0][step]) and torch.equal(batch[1::2], parts[1][step])
    both[0].sampler.set_epoch(3, 8)
    assert torch.equal(next(iter(both[0])), parts[0][2])
    both[0].sampler.set_epoch(4)
    assert not {row[0].item() for row in next(iter(both[0]))} & {row[0].item() for row in parts[0][0]}
    assert torch.equal(torch.get_rng_state(), state)


class Draws(Dataset):
    """Random numbers of all three kinds."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), index])


# Two processes


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1".split()
# Else the processes of the second attempt may find the addresses of the first, which torchrun keeps.
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(folder: Path, tmp_path: Path) -> None:
    """Running statistics of batch normalisation, which differ between ranks inside an epoch, included."""
    argv = [*TRAIN, "--model", "cf_lvvit_nano", "--batch-size", 4, "--data-path", folder, "--resume", "auto"]
    whole = ranks("main_deit", *argv, "--output_dir", tmp_path / "whole")
    assert [end.code for end in whole] == [0, 0], [end.err for end in whole]
    output = ["--output_dir", tmp_path / "run"]
    ended = run(*TORCHRUN, "tests/killed_rank.py", 12, *argv, *output, **ELASTIC)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("killed at step 12") == 1
    check_same(tmp_path / "whole", tmp_path / "run")
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.1.pth")
    assert saved["progress"]["step"] and not same(*saved["statistics"])  # or nothing was shown


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_with_a_checkpoint(
    name: str, whole: Callable, train: Train, at_step: Callable, tmp_path: Path
) -> None:
    def send(run: Run) -> None:
        # From outside and to all processes, as a scheduler does. It is the next update that looks at it.
        processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
        subprocess.run(["kill", f"-{name[3:]}", *(str(process.pid) for process in processes)], check=True)
        time.sleep(0.1)
        assert len(processes) == 1 + len(multiprocessing.active_children()) == 3

    before = signal.getsignal(signal.Signals[name])
    at_step(10, send)
    ended = train("run", "--num_workers", 2)
    assert ended.code == utils.STOPPED == 75
    told = [line for line in ended.err.splitlines() if "main_deit.py: " in line]
    assert told == [f"main_deit.py: stopped by {name} at epoch 1, step 4; --resume auto goes on from there"]
    assert signal.getsignal(signal.Signals[name]) == before
    assert train("run", "--resume", "auto").code == 0
    check_same(whole(), tmp_path / "run")


def test_a_signal_waits_for_the_update(train: Train, at_step: Callable, tmp_path: Path) -> None:
    at_step(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert "at epoch 0, step 6;" in train("run", "--accumulate", 3, "--checkpoint-every", "9m").err


@pytest.mark.slow
def test_a_signal_during_evaluation_stops_after_it(
    whole: Callable, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_epoch = RunLog.add_epoch
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "add_epoch", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), add_epoch(*_)))
        assert "at epoch 1, step 0;" in train("run").err
    assert train("run", "--resume", "auto").code == 0
    check_same(whole(), tmp_path / "run")


def test_second_interrupt_stops_at_once(train: Train, at_step: Callable, tmp_path: Path) -> None:
    at_step(4, lambda run: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert train("run").code == 130
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]["step"] == 3


# Damaged, and not to be written


@pytest.mark.slow
@pytest.mark.parametrize("damage", [spoil, lambda path: os.truncate(path, 70_000)], ids=["bit", "cut"])
def test_damaged_checkpoint(
    damage: Callable, whole: Callable, train: Train, at_step: Callable, tmp_path: Path
) -> None:
    at_step(11, kill)
    with pytest.raises(Killed):
        train("run")
    output = tmp_path / "run"
    assert names_in(output) == {"checkpoint.pth", "checkpoint.1.pth", "model_best.pth"}
    damage(output / "checkpoint.pth")
    ended = train("run", "--resume", output / "checkpoint.pth")
    assert ended.code == 2 and "checkpoint.pth is not a readable checkpoint" in one_line(ended)
    ended = train("run", "--resume", "auto")
    assert ended.code == 0 and ended.err.count("checkpoint.pth is not a readable checkpoint") == 1
    assert "going on from checkpoint.1.pth" in ended.err
    check_same(whole(), output)
    assert names_in(output) == {
        *("checkpoint.pth", "checkpoint.1.pth", "model_best.pth", "checkpoint.pth.damaged"),
    }
    for path in output.glob("checkpoint*.pth"):
        damage(path)
    ended = train("run", "--resume", "auto")
    assert ended.code == 2 and "remove them to start anew" in one_line(ended)


def test_full_disk_leaves_the_last_checkpoint(train: Train, at_step: Callable, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(4, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1])))
    try:
        ended = train("run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.code == 1 and "checkpoint.pth (File too large)" in one_line(ended)
    assert names_in(tmp_path / "run") == {"checkpoint.pth"}
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]["step"] == 3


def test_as_many_checkpoints_as_wanted_stay(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.zeros(3)}}
    for number in range(5):
        save_in_turn(state | {"number": number}, tmp_path / "checkpoint.pth", keep=3)
        kept = [load_checkpoint(checkpoint_path(tmp_path, n))["number"] for n in range(min(3, number + 1))]
        assert kept == list(range(number, -1, -1))[:3] and len(names_in(tmp_path)) == len(kept)
    save_in_turn(state | {"number": 9}, tmp_path / "checkpoint.pth", keep=1)  # the first of a new run
    assert names_in(tmp_path) == {"checkpoint.pth"}


def test_killed_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the calls that put files on disk or name them: the newest complete checkpoint is found."""
    state, path = {"model": {"weight": torch.zeros(3)}}, tmp_path / "checkpoint.pth"

    def die_at(call: int, function: Callable) -> Callable:
        def count(*argv: Any) -> None:
            calls.append(function)
            if len(calls) == call:
                os._exit(9)
            function(*argv)

        return count

    for number in range(3):
        save_in_turn(state | {"number": number}, path, keep=3)
    newest, saved, calls, code = 2, 2, [], 9
    while code and newest < 40:  # further in each round, until all calls are done
        newest, call = newest + 1, newest - 1
        if not (child := os.fork()):
            for name in ("fsync", "replace", "link"):
                monkeypatch.setattr(os, name, die_at(call, getattr(os, name)))
            save_in_turn(state | {"number": newest}, path, keep=3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = load_newest(tmp_path)[1]["number"]
        assert left == newest or (code and left == saved), call
        saved = left
    assert left == newest and call > 5
    assert checkpoint_numbers(tmp_path) == [0, 1, 2]


# Losses that are not finite


class Spoiled(nn.Module):
    """Cross-entropy that is not a number in some of its calls."""

    def __init__(self, calls: set[int]):
        super().__init__()
        self.calls, self.count = calls, -1

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.count += 1
        return nn.functional.cross_entropy(logits, target) * (torch.nan if self.count in self.calls else 1)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_loss_that_is_not_finite(
    skip: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[str]] = []
    original = main_deit.train_one_epoch

    def look(model: nn.Module, loader: Any, *rest: Any) -> dict:
        batches.extend(names_of_batch(loader, step) for step in range(STEPS))
        return original(model, loader, *rest)

    monkeypatch.setattr(main_deit, "train_one_epoch", look)
    monkeypatch.setattr(main_deit, "make_objective", lambda *_: Objective(Spoiled({4, 6})))
    ended = train("run", "--epochs", 1, "--mixup", 0, "--cutmix", 0, "--skip-nonfinite", skip)
    files = ", ".join(batches[(4, 6, 6)[skip]])
    assert f"the loss is nan at epoch 0, step {(4, 6, 6)[skip]} ({files})" in ended.err
    assert (".png" in files) and ended.code == (1, 1, 0)[skip]
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert all(value.isfinite().all() for value in saved["model"].values())
    if skip < 2:
        assert "; weights were not updated" in ended.err.splitlines()[-1]
        assert saved["progress"]["step"] == (3, 6)[skip]
    else:
        assert saved["optimizer"]["state"][0]["step"] == 6
        assert np.isfinite(json.loads((tmp_path / "run" / "log.txt").read_text())["train_loss"])


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_gradient_that_is_not_finite(amp: str, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops at once, or when halving the scale of fp16 gradients has not helped: here from 2e-4 on."""

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    criterion = Spoiled(set())
    objective = Objective(lambda *batch: Steep.apply(criterion(*batch)))
    monkeypatch.setattr(main_deit, "make_objective", lambda *_: objective)
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", ("cuda", 2e-4, 2.0, 0.5, 2000, True))
    ended = train("run", "--mixup", 0, "--cutmix", 0, "--amp", amp, "--print-freq", 2)
    place = "the gradient norm is (nan|inf) at epoch 0, step 0"
    if amp == "fp16":
        place = "the scale of fp16 gradients has fallen to 5e-05 at epoch 0, step 2, .* --amp bf16"
    assert ended.code == 1 and re.search(place, one_line(ended))


# Two runs, one folder

HOLDER = """
import os, time
from pathlib import Path
from checkpointing.folder import locked
with locked(Path({folder!r})):
    if os.fork():
        print("locked", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_one_run_per_folder(train: Train, tmp_path: Path) -> None:
    """The lock goes with its process, even where children of it live on."""
    output = tmp_path / "run"
    code = HOLDER.format(folder=str(output))
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        (output / f".checkpoint.pth.{holder.pid}.tmp").touch()  # it is writing just now
        ended = train("run", "--epochs", 1)
        assert ended.code == 2 and f"{output} is in use by process {holder.pid} on " in one_line(ended)
        holder.kill()
        holder.wait()
        assert (output / f".checkpoint.pth.{holder.pid}.tmp").exists()
        assert train("run", "--epochs", 1).code == 0
        assert names_in(output) == {"checkpoint.pth", "checkpoint.1.pth", "model_best.pth"}
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


@pytest.mark.slow
def test_a_new_run_in_an_old_folder_keeps_nothing_of_it(
    train: Train, whole: Callable, tmp_path: Path
) -> None:
    shutil.copytree(whole(), tmp_path / "run")
    assert train("run", "--epochs", 1, "--checkpoint-every", "9m").code == 0
    assert names_in(tmp_path / "run") == {"checkpoint.pth", "model_best.pth"}
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 1


# The command line


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--resume auto", "--output_dir"),
        ("--checkpoint-every 0", "'0' is neither batches, as 500, nor minutes, as 10m"),
        ("--checkpoint-every 5h", "'5h' is neither"),
        ("--keep-last 0", "--keep-last: '0' is not a whole number from 1 up"),
        ("--skip-nonfinite -1", "--skip-nonfinite: '-1' is not a whole number from 0 up"),
        ("--eval --resume auto --output_dir nowhere", "--eval needs the checkpoint"),
    ],
)
def test_bad_flags(argv: str, text: str, command: Command, folder: Path) -> None:
    ended = command("main_deit", *TRAIN, "--data-path", folder, *argv.split())
    assert ended.code == 2 and text in one_line(ended)


def test_saved_arguments_are_those_that_a_command_line_gives() -> None:
    """Each saved value is what its flag makes of it, or the file is refused."""
    parser = main_deit.make_parser()
    line = "--model-kwargs a=1 b=x --mean 0.1 0.2 0.3 --no-pin-mem --token-label --amp --drop-loc 1,3"
    saved = vars(parser.parse_args(line.split()))
    saved = {name: value for name, value in saved.items() if name not in main_deit.OF_ONE_RUN}
    check_arguments(parser, saved, "file.pth")
    check_arguments(parser, saved | {"scale": [0.08, 1.0]}, "file.pth")  # JSON has no tuples
    wrong: dict[str, list[Any]] = {
        "lr": ["text", True, float("nan"), -1.0, [0.1], torch.zeros(3)],
        "epochs": [3.5, 0, True],
        "opt_betas": [[0.9, "x"], 0.9],
        "mean": [[0.1, 0.2], torch.zeros(3)],
        "model_kwargs": [["--help"], ["-h"], [1], {"a": 1}],
        "aa": [3, [], {"a": 1}, torch.zeros(3, 3)],
        "amp": ["nope", True],
        "pin_mem": [0, "no"],
        "checkpoint_every": ["5h", 5],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"file.pth: its argument {name} is .*, which no flag gives"):
                check_arguments(parser, saved | {name: value}, "file.pth")


def test_deterministic_mode(train: Train) -> None:
    try:
        assert train("run", "--epochs", 1, "--deterministic").code == 0
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)
