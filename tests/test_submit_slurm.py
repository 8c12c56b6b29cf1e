"""Jobs as Slurm runs them: arguments, ranks, folder, a time limit in the middle, failure."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import submitit
from cases import ROOT, Command, run
from submitit.core.utils import FailedJobError, pickle_load

import main_deit

sys.path.insert(0, str(ROOT / "scripts"))
import submit_slurm

from checkpointing.format import load_checkpoint

pytestmark = pytest.mark.slow

TRAIN = "--model deit_nano --batch-size 32 --device cpu --num_workers 0 --picture-freq 0".split()
DATA = ["--data-path", "unused"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for Slurm: sbatch keeps its environment, scontrol its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "sbatch": f"env >{folder}/environment; echo Submitted batch job 4242",
        "srun": "exit 1",
        "scontrol": f"echo $* >{folder}/scontrol.txt",
    }
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def start_tasks() -> Iterator[Callable[[Path, int], list[subprocess.Popen]]]:
    """Does what srun does with a job's script: one command, as often as there are tasks, numbered."""
    tasks = []

    def start(script: Path, count: int) -> list[subprocess.Popen]:
        line = next(line for line in script.read_text().splitlines() if line.startswith("srun "))
        words = shlex.split(line)
        shared = os.environ | dict(
            SUBMITIT_EXECUTOR="slurm",
            SLURM_JOB_ID="4242",
            SLURM_NTASKS=str(count),
            SLURM_JOB_NUM_NODES="1",
            SLURM_JOB_NODELIST="localhost",
            SLURM_NODEID="0",
        )
        for rank in range(count):
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            with open(script.parent / f"4242_{rank}_log.out", "a") as log:
                streams = dict(stdout=log, stderr=log)
                command = words[words.index("env") :]
                tasks.append(subprocess.Popen(command, env=shared | own, cwd=script.parent, **streams))
        return tasks[-count:]

    yield start
    for task in tasks:
        task.kill()
        task.wait()


def log_of(output: Path) -> list[dict]:
    file = output / "log.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_two_tasks_train_together_and_go_on_after_the_time_limit(
    slurm: Path, start_tasks: Callable, folder: Path, tmp_path: Path
) -> None:
    argv = ["--nodes", 1, "--ngpus", 2, "--job_dir", tmp_path / "jobs/%j", *TRAIN, "--epochs", 4]
    ended = run("scripts/submit_slurm.py", *argv, "--data-path", folder)
    output = tmp_path / "jobs/4242"
    printed = (f"job 4242, folder {output}, log 4242_0_log.out\n", "")
    assert (ended.stdout, ended.stderr) == printed and ended.returncode == 0
    (output / "utils.py").write_text("raise ImportError('not the project')\n")  # tasks start in this folder

    tasks = start_tasks(output / "4242_submission.sh", 2)
    latest = time.monotonic() + 300
    while not log_of(output):
        assert time.monotonic() < latest
        assert [task.poll() for task in tasks] == [None, None], (output / "4242_0_log.out").read_text()
        time.sleep(0.02)
    for task in tasks[::-1]:  # all get the signal, the first one acts on it
        task.send_signal(signal.SIGUSR2)
    assert tasks[0].wait(300) == 255
    assert (slurm / "scontrol.txt").read_text() == "requeue 4242\n"
    tasks[1].kill()
    tasks[1].wait()
    reached = load_checkpoint(output / "checkpoint.pth")["epoch"]
    assert 0 <= reached < 3

    assert [task.wait(300) for task in start_tasks(output / "4242_submission.sh", 2)] == [0, 0]
    epochs = [entry["epoch"] for entry in log_of(output)]
    assert epochs[0] == 0 and epochs[-1] == 3 and epochs == sorted(set(epochs))
    assert set(epochs) >= set(range(reached + 1, 4))
    assert [pickle_load(output / f"4242_{rank}_result.pkl")[0] for rank in (0, 1)] == ["success"] * 2
    saved = load_checkpoint(output / "checkpoint.pth")
    assert len(saved["rng"]) == 2  # two processes in one group
    assert (saved["epoch"], saved["args"]["resume"]) == (3, str(output / "checkpoint.pth"))


def test_a_task_knows_its_place_among_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_deit, "main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["task"])
    slurm = (
        "SLURM_JOB_ID=7 SLURM_NTASKS=16 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=gpu[03-04] SLURM_NODEID=1"
    )
    slurm += " SLURM_PROCID=11 SLURM_LOCALID=3 SUBMITIT_EXECUTOR=slurm"
    monkeypatch.setattr(os, "environ", dict(os.environ) | dict(pair.split("=") for pair in slurm.split()))
    submit_slurm.Training(DATA, str(tmp_path / "%j"))()
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["3", "11", "16", "gpu03", "8"]  # utils.start goes by them


@pytest.fixture(scope="module")
def jobs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, submitit.Job]:
    """Two jobs on this machine, side by side: one that trains, and one without data."""
    root, jobs = tmp_path_factory.mktemp("local"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, data in {"good": folder, "bad": root / "nowhere"}.items():
            argv = [*"--executor local --nodes 1 --ngpus 1 --job_dir".split(), root / name / "%j" / "run"]
            argv += [*TRAIN, "--data-path", data, "--epochs", 1, "--model-kwargs", "depth=2"]
            jobs[name] = submit_slurm.submit(*submit_slurm.parse([str(word) for word in argv]))
    return jobs


def test_a_local_job_trains_into_its_folder(jobs: dict[str, submitit.Job]) -> None:
    job = jobs["good"]
    assert job.results() == [None]
    output = job.paths.folder
    assert output.parts[-3:] == ("good", job.job_id, "run")
    assert [entry["epoch"] for entry in log_of(output)] == [0]
    assert load_checkpoint(output / "checkpoint.pth")["epoch"] == 0
    assert "64 training and 40 validation images" in (output / f"{job.job_id}_0_log.out").read_text()


def test_a_failed_run_fails_the_job(jobs: dict[str, submitit.Job]) -> None:
    job = jobs["bad"]
    with pytest.raises(FailedJobError, match="FileNotFoundError: .*nowhere"):
        job.results()
    assert not (job.paths.folder / "checkpoint.pth").exists()


def test_debugging_runs_here(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(main_deit, "main", lambda: calls.append(sys.argv[1:]))
    ended = command("submit_slurm", "--executor", "debug", "--job_dir", tmp_path / "%j", *DATA)
    number = re.match(r"job (DEBUG_\d+), ", ended.out)[1]
    assert ended.code == 0 and calls == [["--output_dir", str(tmp_path / number), *DATA]]


# Arguments


def strings(parser) -> set[str]:
    return {string for action in parser._actions for string in action.option_strings}


def test_no_flag_is_main_deits() -> None:
    common = strings(submit_slurm.make_parser()) & strings(main_deit.make_parser())
    assert common == {"-h", "--help"}


OWN = [["--nodes", "3"], ["--use_volta32"], ["--job_dir=jobs"]]
THEIRS = [
    text.split() for text in ("--model deit_nano", "-b 128", "DATA", "--model-kwargs a=2 b=-1", "--lr=1")
]


@pytest.mark.parametrize("mixed", itertools.permutations(OWN), ids=lambda own: own[0][0])
def test_other_flags_pass_in_their_order(mixed: tuple) -> None:
    separate, sides = list(itertools.chain(*THEIRS)), itertools.zip_longest(THEIRS, mixed, fillvalue=[])
    own = list(itertools.chain(*mixed))
    for argv in (list(itertools.chain(*itertools.chain(*sides))), [*own, "--", *separate]):
        args, rest = submit_slurm.parse(argv)
        assert (args.nodes, args.constraint, args.job_dir) == (3, "volta32gb", "jobs")
        assert rest == separate


def test_abbreviations_are_main_deits() -> None:
    assert submit_slurm.parse([*DATA, "--acc", "2"])[1] == [
        *DATA,
        "--acc",
        "2",
    ]  # --accumulate, not --account


def test_what_follows_two_dashes_is_main_deits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unrecognized arguments: --ngpus;"):
        submit_slurm.parse(["--nodes", "1", "--", *DATA, "--ngpus", "2"])
    with pytest.raises(SystemExit, match="0"):
        submit_slurm.parse(["--", "--help"])
    assert "--batch-size" in capsys.readouterr().out


def test_slurm_gets_the_flags(slurm: Path, command: Command, tmp_path: Path) -> None:
    flags = "--nodes 3 --ngpus 4 --partition gpu --timeout 90 --mem-per-gpu 30 --cpus-per-task 6 --qos high"
    flags += " --constraint a100&nvme --account lab"
    ended = command(
        "submit_slurm",
        *[*flags.split(), "--comment", "before the deadline", "--job_dir", tmp_path / "%j"],
        *["--model", "lf_deit_nano", *DATA],
    )
    assert ended.code == 0
    lines = (tmp_path / "4242" / "4242_submission.sh").read_text().splitlines()
    found = dict(line[10:].partition("=")[::2] for line in lines if line.startswith("#SBATCH "))
    expected = dict(nodes="3", time="90", partition="gpu", mem="120GB", qos="high", account="lab", requeue="")
    expected |= dict(constraint="'a100&nvme'", comment="'before the deadline'", signal="USR2@120")
    expected |= {"ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6"}
    expected |= {"job-name": "lf_deit_nano"}
    assert {key: found[key] for key in expected} == expected
    assert found["output"] == str(tmp_path / "%j/%j_0_log.out")
    srun = next(line for line in lines if line.startswith("srun ")).split()
    assert {"--cpus-per-task=6", "--kill-on-bad-exit=1"} <= set(srun)
    submission = submitit.SlurmJob(tmp_path / "%j", "4242").submission()
    assert submission._timeout_countdown == 30
    assert submission.function.argv == ["--model", "lf_deit_nano", *DATA]


@pytest.mark.parametrize("inside", [True, False])
def test_a_job_inherits_nothing_from_another_one(
    inside: bool, slurm: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    if inside:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_NTASKS", "64")
    assert command("submit_slurm", "--job_dir", tmp_path, *DATA).code == 0
    seen = (slurm / "environment").read_text()
    assert "SLURM_NTASKS" not in seen and ("SBATCH_ACCOUNT=lab" in seen) == (not inside)


@pytest.mark.parametrize(("visible", "gpus"), [(None, ()), ("", []), ("5,3", [5, 3])])
def test_a_local_job_keeps_to_the_visible_gpus(
    visible: str | None, gpus: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    argv = ["--executor", "local", "--nodes", "1", "--ngpus", "2", "--job_dir", str(tmp_path), *DATA]
    executor = submit_slurm.make_executor(submit_slurm.parse(argv)[0], "name")
    assert executor.parameters["visible_gpus"] == gpus
    assert executor.parameters["tasks_per_node"] == executor.parameters["gpus_per_node"] == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is GPU-8932f937"):
        submit_slurm.make_executor(submit_slurm.parse(argv)[0], "name")


# Once more after a time limit


@pytest.mark.parametrize("where", ["job", "user"])
@pytest.mark.parametrize("start", ["first", "requeued", "restarted"])
@pytest.mark.parametrize("checkpoint", ["none", "old", "new", "replaced"])
def test_a_job_resumes_only_what_it_saved(
    checkpoint: str, start: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(main_deit, "main", lambda: calls.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["task"])
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"SUBMITIT_DEBUG_JOB_ID": "7", "RANK": "3"})
    output = tmp_path / ("7" if where == "job" else "mine")
    argv = [*DATA, "--resume", "other.pth"] + (["--output", str(output)] if where == "user" else [])
    file = output / "checkpoint.pth"
    output.mkdir()
    if checkpoint in ("old", "replaced"):
        file.touch()
        os.utime(file, (1e9, 1e9))
    training = submit_slurm.Training(argv, str(tmp_path / "%j"))
    if checkpoint in ("new", "replaced"):
        file.touch()
    if start == "requeued":
        training = training.checkpoint().function
    elif start == "restarted":
        os.environ["SLURM_RESTART_COUNT"] = "1"
    training()
    # A folder of the job's own holds nothing older than the job.
    own = checkpoint in ("new", "replaced") or (checkpoint == "old" and where == "job")
    resumes = start != "first" and own
    expected = ["main_deit.py", "--output_dir", str(tmp_path / "7"), *argv]
    assert calls == [expected + ["--resume", "auto"] * resumes]
    args = main_deit.make_parser().parse_args(calls[0][1:])
    assert args.output_dir == str(output) and args.resume == ("auto" if resumes else "other.pth")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("0", "0", "1")


# Errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--nodes 0", "--nodes: '0' is not a whole number from 1 up"),
        ("--ngpus 0", "--ngpus: '0' is not a whole number from 1 up"),
        ("--timeout 2", "--timeout: '2' is not a whole number from 3 up"),
        ("--mem-per-gpu 0", "--mem-per-gpu: '0' is not a whole number from 1 up"),
        ("--cpus-per-task 0", "--cpus-per-task: '0' is not a whole number from 1 up"),
        ("--nodes many", "argument --nodes: 'many' is not a whole number from 1 up"),
        ("--modle deit_nano", "unrecognized arguments: --modle;"),
        ("--batch-size 33", "--batch-size 33 is odd"),
        ("--resume later.pth --lr fast", "argument --lr: 'fast' is not a finite number from 0 up"),
        ("--executor local", "LocalExecutor can use only one node. Use nodes=1"),
        ("", "there is no Slurm here (no sbatch, srun): try --executor local --nodes 1"),
    ],
)
def test_bad_input_is_one_line(
    argv: str, message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = command("submit_slurm", *argv.split(), *DATA, "--job_dir", tmp_path / "jobs" / "%j")
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith("submit_slurm.py: error: ") and ended.err.count("\n") == 1
    assert message in ended.err


def test_missing_data_is_told_before(command: Command) -> None:
    ended = command("submit_slurm", "--model", "deit_nano")
    assert ended.code == 2 and "no data: give the folder" in ended.err


def test_a_checkpoint_need_not_be_there_yet() -> None:
    assert submit_slurm.parse(["--resume", "later.pth"])[1] == ["--resume", "later.pth"]


def test_missing_submitit_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_slurm, "submitit", None)
    ended = command("submit_slurm", *DATA)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "submit_slurm.py: error: the package submitit is missing: pip install submitit\n"


def test_what_slurm_says_is_passed_on(slurm: Path, command: Command, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho invalid partition: gpus >&2\nexit 1\n")
    ended = command("submit_slurm", "--job_dir", tmp_path / "%j", "--partition", "gpus", *DATA)
    assert ended.code == 1 and ended.out == "" and ended.err.count("\n") == 1
    assert "the job was not accepted: invalid partition: gpus" in ended.err
