"""Two processes do what one does: the same weights from the same images, and every image counted once."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Command, call, run
from ranks import free_port, ranks
from torch.nn.parallel import DistributedDataParallel

import main_deit
import utils
from checkpointing.format import load_checkpoint
from checkpointing.run import Run

pytestmark = pytest.mark.slow

# Nothing random, so that the images of a step are the same however many processes share them.
TRAIN = (
    "--model lf_deit_nano --epochs 2 --device cpu --num_workers 0 --picture-freq 0 --no-aug --no-repeated-aug"
    " --mixup 0 --cutmix 0 --drop-path 0 --reprob 0 --select-from 0.5 --opt sgd --lr 0.02 --unscale-lr"
    " --model-ema-decay 0.9"
).split()


def run_two(name: str, *argv: object) -> str:
    """Runs a command in two processes; returns what they printed."""
    ended = ranks(name, *argv)
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    return "".join(end.out for end in ended)


@pytest.fixture(scope="module")
def odd(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder less one validation image: 39 do not split evenly."""
    root = tmp_path_factory.mktemp("odd") / "pictures"
    shutil.copytree(folder, root)
    (root / "val" / "dusk" / "09.png").unlink()
    return root


@pytest.fixture(scope="module")
def by_two(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains in two processes with batches of 8 and further options; returns the output folder."""

    @cache
    def train(options: str) -> Path:
        output = tmp_path_factory.mktemp("two")
        arguments = [*TRAIN, "--data-path", odd, "--batch-size", 8, "--output_dir", output, *options.split()]
        if options:
            run_two("main_deit", *arguments)
        else:  # once by torchrun itself
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            ended = run(*torchrun, "main_deit.py", *arguments)
            assert ended.returncode == 0, ended.stderr
        return output

    return train


@pytest.fixture(scope="module")
def by_one(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains in this process with further options; returns the output folder."""

    @cache
    def train(options: str) -> Path:
        output = tmp_path_factory.mktemp("one")
        call("main_deit", *TRAIN, "--data-path", odd, "--output_dir", output, *options.split())
        return output

    return train


def saved_in(output: Path) -> dict[str, Any]:
    return load_checkpoint(output / "checkpoint.pth")


def log_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first | second)


def check_logs(ours: list[dict[str, float]], theirs: list[dict[str, float]], averaged: bool) -> None:
    """Compares the entries of the averaged weights, or all the others."""
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        keys = [key for key in one if key.startswith("ema_") == averaged]
        assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "alone", "terms"),
    [
        ("", ["--batch-size 16"], ["fine_ce", "fine_ce"]),
        ("--coarse-only 0.5", ["--batch-size 16 --coarse-only 0.5"], ["coarse_ce", "fine_ce"]),
        ("--accumulate 2", ["--batch-size 16 --accumulate 2", "--batch-size 32"], ["fine_ce", "fine_ce"]),
    ],
    ids=["plain", "coarse-only", "accumulate"],
)
def test_two_processes_train_like_one(
    options: str, alone: list[str], terms: list[str], by_two: Callable, by_one: Callable
) -> None:
    two = by_two(options)
    assert [f"train_{term}" in entry for term, entry in zip(terms, log_of(two), strict=True)] == [True, True]
    assert len(saved_in(two)["rng"]) == 2
    for options in alone:
        one = by_one(options)
        assert distance(saved_in(one)["model"], saved_in(two)["model"]) < 1e-5
        check_logs(log_of(one), log_of(two), averaged=False)
    untrained = by_one("--batch-size 16 --epochs 1 --lr 0 --warmup-lr 0 --min-lr 0")
    assert distance(saved_in(untrained)["model"], saved_in(two)["model"]) > 1e-2  # the tolerance, times 1000


def test_averaged_weights_are_those_of_one_process(by_two: Callable, by_one: Callable) -> None:
    """Both processes hold the same average, as each evaluates it on its share of the images."""
    one, two = by_one("--batch-size 16"), by_two("")
    assert distance(saved_in(one)["model_ema"], saved_in(two)["model_ema"]) < 1e-5
    check_logs(log_of(one), log_of(two), averaged=True)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_two_processes_infer_like_one(
    mode: int, command: Command, odd: Path, sharp: Path, tmp_path: Path
) -> None:
    text = f"--eval-mode {mode} --data_url {odd} --checkpoint_path {sharp} --batch_size 8 --threshold 0.3"
    arguments = [*text.split(), "--device", "cpu", "--num_workers", 0, "--repeats", 1, "--results"]
    printed = run_two("dynamic_inference", *arguments, tmp_path / "two.json")
    ended = command("dynamic_inference", *arguments, tmp_path / "one.json")
    assert ended.code == 0, ended.err
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys() and one["flops"] == two["flops"]
    if mode == 2:
        for key in ("exit_shares", "accuracy", "mean_gflops"):
            assert two["timed"][key] == one["timed"][key]
        right = 39 * two["timed"]["accuracy"] / 100
        assert right == pytest.approx(round(right))  # of 39 images, not of 40
    else:
        assert len(set(one["anytime_classification"])) == 2
        for key in ("anytime_classification", "budgeted_batch_classification"):
            assert two.get(key) == one.get(key)
        assert len(printed.splitlines()) == len(ended.out.splitlines())  # only one of them prints


def test_two_processes_predict_in_order(command: Command, odd: Path, sharp: Path) -> None:
    arguments = ["--checkpoint_path", sharp, "--images", odd / "val", "--threshold", 0.3]
    arguments += ["--device", "cpu", "--num_workers", 0]
    printed = run_two("dynamic_inference", *arguments)
    assert printed.splitlines() == command("dynamic_inference", *arguments).out.splitlines()
    assert len(printed.splitlines()) == 1 + 39


# Groups of one process, and who is in none


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sets what torchrun sets for a single process; every call is another start."""

    def start() -> None:
        port = free_port()
        values = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return start


def test_a_group_of_one_trains_like_no_group(
    torchrun: Callable, trained: Path, folder: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    """To the last bit, also after a signal: all that several processes do happens, with a single one."""
    calls, original = [], Run.on_step

    def on_step(run: Run, step: int, *rest: Any) -> None:
        if "distribute_bn" not in calls and step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        original(run, step, *rest)

    def noted(function: Callable) -> Callable:
        return lambda *args, **kwargs: (calls.append(function.__name__), function(*args, **kwargs))[1]

    monkeypatch.setattr(Run, "on_step", on_step)
    for module, name in ((dist, "all_reduce"), (dist, "all_gather_object"), (main_deit, "distribute_bn")):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    monkeypatch.setattr(DistributedDataParallel, "__init__", noted(DistributedDataParallel.__init__))
    flags = f"--model lf_deit_nano --data-path {folder} --epochs 2 --batch-size 32 --device cpu"
    for code, extra in ((utils.STOPPED, []), (0, ["--resume", "auto"])):
        torchrun()
        ended = command("main_deit", *flags.split(), "--num_workers", 0, "--output_dir", tmp_path, *extra)
        assert ended.code == code, ended.err
        assert not dist.is_initialized()
        device = f" device: cpu, {utils.cpu_name()}, in a group of 1 (gloo)"
        assert ended.err.splitlines()[0].endswith(device)
        assert (tmp_path / "train.log").read_text().splitlines()[0].endswith(device)
        assert {"__init__", "all_reduce", "all_gather_object"} <= set(calls)
    assert "distribute_bn" in calls and calls.count("__init__") == 2
    assert (tmp_path / "log.txt").read_text() == (trained / "log.txt").read_text()
    for key in ("model", "model_ema"):
        assert distance(saved_in(tmp_path)[key], saved_in(trained)[key]) == 0


IN_SLURM = dict(SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_JOB_ID=7)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        IN_SLURM,  # a shell of salloc, a script of sbatch
        IN_SLURM
        | dict(SLURM_STEP_ID=0xFFFFFFFA, SLURM_STEP_NUM_TASKS=4),  # a shell that is a step of its own
        IN_SLURM | dict(SLURM_STEP_ID=0, SLURM_STEP_NUM_TASKS=1),  # srun -n 1
        dict(WORLD_SIZE=1),
    ],
    ids=["plain", "salloc", "interactive step", "srun of one", "no rank"],
)
def test_a_command_on_its_own_joins_no_group(environment: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it waits for others"))
    assert utils.start("cpu") == (torch.device("cpu"), 0, 1, 0)


def test_a_task_of_srun_takes_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its step, also where the job has more; and it has to know where the others are."""
    slurm = IN_SLURM | dict(SLURM_STEP_ID=3, SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1, SLURM_LOCALID=1)
    monkeypatch.setattr(os, "environ", os.environ | {name: str(value) for name, value in slurm.items()})
    with pytest.raises(utils.InputError, match="MASTER_ADDR expected"):
        utils.start("cpu")
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "1", "2"]


def test_a_group_is_told_its_gpu(torchrun: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is guessed from the rank: here the third process of a machine is the tenth of all."""
    torchrun()
    calls = []
    for name, value in dict(RANK=9, LOCAL_RANK=2, WORLD_SIZE=12).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: calls.append((*given, named)))
    monkeypatch.setattr(dist, "get_rank", lambda: 9)
    monkeypatch.setattr(dist, "get_world_size", lambda: 12)
    gpu = torch.device("cuda:2")
    assert utils.start("cuda") == (gpu, 9, 12, 2)
    assert calls == [gpu, ("nccl", {"device_id": gpu})]


def test_the_first_process_keeps_the_store_until_all_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    store, rank, left = dist.HashStore(), 0, []
    monkeypatch.setattr(utils, "_get_default_store", lambda: store)
    for name, value in dict(is_initialized=True, get_world_size=2).items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(rank))
    pauses = iter([lambda: None, lambda: other(), lambda: None])

    def other() -> None:
        nonlocal rank
        rank = 1
        utils.leave_group()
        rank = 0

    monkeypatch.setattr(utils.time, "sleep", lambda _: next(pauses)())
    utils.leave_group()
    assert left == [1, 0]


def test_a_store_that_is_gone_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False)
    client.add("x", 1)
    del store
    with pytest.raises(utils.MainError, match="the first process is no longer there"):
        utils.wait_for(client, "word")


# What processes do together, and how one of them fails


@pytest.fixture(scope="module")
def together(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """What tests/two_ranks.py writes, and how it ends."""
    output = tmp_path_factory.mktemp("together")
    ended = ranks("two_ranks", folder, output)
    assert (output / "results.json").exists(), [end.err for end in ended]
    return json.loads((output / "results.json").read_text()), ended


def test_two_processes_exchange(together: tuple) -> None:
    results, _ = together
    assert results["sums"] == [1 + 2, 1 + 10]
    assert results["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert results["means"] == [[0.5, 0.5]] * 2


def test_the_first_process_is_waited_for_without_a_collective(together: tuple) -> None:
    """So that no time limit of theirs ends a long download; its errors reach the other one."""
    turns = together[0]["turns"]
    assert turns["collectives"] == 0
    assert turns["fetched"] == [[False], [True]]  # whether it was there when they came
    assert turns["result"] == [[3], [None]]
    foreseen = [["InputError", "no y"], ["FileNotFoundError", "[Errno 2] none: 'z'"], ["MainError", "w"]]
    raised = [["KeyError", "'x'"], *foreseen, ["KeyboardInterrupt", ""]]
    foreseen[1] = ["OSError", foreseen[1][1]]
    told = [["MainError", "process 0 failed: KeyError: 'x'"], *foreseen]
    told += [["MainError", "process 0 failed: KeyboardInterrupt"]]
    expected = [list(pair) for pair in zip(raised, told, strict=True)]
    assert turns["by_main"] == turns["main_first"] == expected


def test_gradients_are_accumulated_alike_as_views_and_copies(together: tuple) -> None:
    results, _ = together
    assert results["views"] == [results["copies"]] * 2
    torch.testing.assert_close(torch.tensor(results["copies"]), torch.tensor(results["alone"]))
    assert len({tuple(weights) for weights in results["alone"]}) == 3


def test_uneven_shares_are_predicted_once(together: tuple) -> None:
    predicted = together[0]["predicted"]
    assert predicted["shared"] == predicted["all"]
    assert len(predicted["all"][0]) == 5 and predicted["all"][0] == predicted["all"][1]


def test_a_signal_to_one_process_stops_both_and_they_go_on(together: tuple) -> None:
    """To the last bit."""
    result = together[0]["run"]
    line = "stopped by SIGTERM at epoch 0, step 2; --resume auto goes on from there"
    assert result == {"stopped": [["Stopped", line]] * 2, "step": 2, "same": True, "epochs": 1}


def test_a_process_that_fails_waits_for_no_other(together: tuple) -> None:
    """It keeps its traceback and ends, while the other one would wait for minutes, until it is killed."""
    first, second = together[1]
    assert (first.code, second.code) == (-signal.SIGKILL, 1)
    assert "KeyError: 'the second process fails'" in second.err and "waiting" not in first.err + second.err
