"""Starts main_deit.py as a Slurm job with one process per GPU, and lets it go on after a time limit.

    python scripts/submit_slurm.py --nodes 2 --ngpus 8 --partition gpu --model NAME --data-path DATA
    python scripts/submit_slurm.py --executor local --nodes 1 --ngpus 2 --model deit_nano --data-path DATA

All flags but those below, and whatever follows a --, are main_deit.py's (-- --help lists them). Its output
goes to the job's folder, unless --output_dir names another one. A job that reaches its time limit or is
preempted saves a checkpoint, is queued again and resumes from it.
"""

from _root import ROOT

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NamedTuple

try:
    import submitit
except ImportError:  # only submitting needs it: --help and the tests of the flags do not
    submitit = None

import main_deit
import utils
from checkpointing.folder import NEWEST
from utils import POSITIVE_INT, InputError

SIGNAL_DELAY = 120  # seconds between the signal and the time limit
MAX_TIMEOUTS = 30


class JobFlags(NamedTuple):
    """This script's own flags."""

    nodes: int
    ngpus: int
    timeout: int
    job_dir: str
    partition: str | None
    constraint: str | None
    comment: str | None
    account: str | None
    qos: str | None
    mem_per_gpu: int
    cpus_per_task: int
    executor: str


def checkpoint_of(argv: list[str]) -> Path:
    """Return where main_deit.py, called with these arguments, saves its checkpoint."""
    return Path(main_deit.make_parser().parse_args(argv).output_dir) / NEWEST


def last_written(file: Path) -> int | None:
    """Return the time stamp of a file in nanoseconds, None where there is no such file."""
    return file.stat().st_mtime_ns if file.is_file() else None


class Training:
    """What every task of a job calls: main_deit.py, resumed if the job was queued again.

    Only a checkpoint of this very job is resumed, not one that lay in --output_dir before.
    """

    def __init__(self, argv: list[str], folder: str):
        """Take main_deit.py's arguments and the job's folder, where %j stands for the job's number."""
        self.argv, self.folder, self.requeued = argv, folder, False
        self.old = last_written(checkpoint_of(self.arguments("%j")))

    def arguments(self, job_id: str) -> list[str]:
        """Return the arguments of a fresh run; an --output_dir of the user comes later and so wins."""
        return ["--output_dir", self.folder.replace("%j", job_id), *self.argv]

    def __call__(self) -> None:
        argv = self.arguments(submitit.JobEnvironment().job_id)
        # Slurm also restarts jobs that lost their machine without warning: `checkpoint` is not called then.
        again = self.requeued or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        if again and last_written(checkpoint_of(argv)) not in (None, self.old):
            argv += ["--resume", "auto"]
        # The machine's GPUs stay visible, as under torchrun: main_deit.py takes the one of its local rank.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.argv = ["main_deit.py", *argv]
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: training takes the signal over
        try:
            main_deit.main()
        except utils.Stopped as stop:
            if stop.signal == signal.SIGUSR2 and callable(requeue):
                requeue(stop.signal, None)  # the first task ends here
                time.sleep(SIGNAL_DELAY)  # its end is the end of all: one that failed would end it too early
            raise
        utils.leave_group()

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Return what the job runs next; submitit calls this when time runs out."""
        self.requeued = True
        return submitit.helpers.DelayedSubmission(self)


def make_parser() -> argparse.ArgumentParser:
    # Without abbreviations: they could be flags of main_deit.py.
    parser = utils.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--nodes", type=POSITIVE_INT, default=2, metavar="N", help="machines (2)")
    gpus = "GPUs, and so processes, on each of them (8)"
    add("--ngpus", type=POSITIVE_INT, default=8, metavar="N", help=gpus)
    # Slurm would send its signal at once if there were not more time than it comes early.
    least = utils.Number(int, SIGNAL_DELAY // 60 + 1)
    add("--timeout", type=least, default=2800, metavar="MIN", help="time limit in minutes (2800)")
    add("--job_dir", default="output/slurm/%j", metavar="DIR", help="the job's folder (output/slurm/%%j)")
    add("--partition", metavar="NAME", help="default: the cluster's")
    add("--constraint", metavar="LIST", help="features that the machines must have")
    add("--use_volta32", dest="constraint", action="store_const", const="volta32gb", help="V100 with 32 GB")
    add("--comment", metavar="TEXT", help="for the scheduler, some clusters ask for one")
    add("--account", metavar="NAME", help="whom the job is charged to; default: the cluster's")
    add("--qos", metavar="NAME", help="quality of service; default: the cluster's")
    add("--mem-per-gpu", type=POSITIVE_INT, default=40, metavar="GB", help="main memory for each GPU (40)")
    add("--cpus-per-task", type=POSITIVE_INT, default=10, metavar="N", help="CPU cores for each process (10)")
    add(
        "--executor",
        default="slurm",
        choices=("slurm", "local", "debug"),
        help="slurm, or this machine in the background (local), or one process in the foreground (debug)",
    )
    return parser


def parse(argv: list[str]) -> tuple[JobFlags, list[str]]:
    """Return own flags, and main_deit.py's arguments in the order they were given.

    Raises:
        InputError: a flag has no good value, or main_deit.py would refuse its arguments.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    args, rest = make_parser().parse_known_args(argv[:end])
    rest += argv[end + 1 :]
    theirs = main_deit.make_parser().parse_args(rest)
    if theirs.resume is None:  # otherwise it reads the file, which another job may still have to write
        main_deit.parse(rest)
    return JobFlags(**vars(args)), rest


def visible_gpus() -> list[int] | tuple[()]:
    """Return the numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves; () stands for all, as in submitit.

    Raises:
        InputError: it has names instead of numbers.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        return () if text is None else [int(number) for number in text.split(",") if number]
    except ValueError as error:
        raise InputError(f"CUDA_VISIBLE_DEVICES is {text}: local jobs need numbers there") from error


def make_executor(flags: JobFlags, name: str) -> "submitit.Executor":
    """Return what starts the tasks of a job of this name.

    Raises:
        InputError: this machine has no Slurm, or cannot give what was asked for.
    """
    if flags.executor == "debug":
        return submitit.DebugExecutor(flags.job_dir)
    # A task imports Training from this file, wherever it was submitted from.
    path = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
    python = shlex.join(["env", f"PYTHONPATH={path}", sys.executable])
    if flags.executor == "local":
        executor = submitit.LocalExecutor(flags.job_dir, max_num_timeout=MAX_TIMEOUTS, python=python)
        executor.folder.mkdir(parents=True, exist_ok=True)  # submitit makes its last part only
        gpus = visible_gpus()
        with utils.values_given("--executor local"):
            executor.update_parameters(
                nodes=flags.nodes,
                tasks_per_node=flags.ngpus,
                gpus_per_node=flags.ngpus,
                visible_gpus=gpus,
                timeout_min=flags.timeout,
                signal_delay_s=SIGNAL_DELAY,
                stderr_to_stdout=True,
            )
        return executor
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise InputError("there is no Slurm here (no sbatch, srun): try --executor local --nodes 1")
    executor = submitit.SlurmExecutor(flags.job_dir, max_num_timeout=MAX_TIMEOUTS, python=python)
    executor.update_parameters(
        job_name=name,
        time=flags.timeout,
        nodes=flags.nodes,
        ntasks_per_node=flags.ngpus,
        gpus_per_node=flags.ngpus,
        cpus_per_task=flags.cpus_per_task,
        mem=f"{flags.mem_per_gpu * flags.ngpus}GB",
        partition=flags.partition,
        constraint=flags.constraint,
        comment=flags.comment,
        account=flags.account,
        qos=flags.qos,
        signal_delay_s=SIGNAL_DELAY,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},  # where the cluster's default is not to
        # From Slurm 22.05 on srun does not take the cores over from sbatch. A failed task ends the others.
        srun_args=[f"--cpus-per-task={flags.cpus_per_task}", "--kill-on-bad-exit=1"],
    )
    return executor


def submit(flags: JobFlags, argv: list[str]) -> "submitit.Job":
    """Submit a run of main_deit.py with these arguments.

    Raises:
        InputError: submitit is not installed, or as `make_executor`.
        MainError: Slurm refuses the job.
    """
    if submitit is None:
        raise InputError("the package submitit is missing: pip install submitit")
    executor = make_executor(flags, main_deit.make_parser().parse_args(argv).model or "main_deit")
    # From within a job, sbatch would take that job's numbers of tasks and GPUs over.
    environment = submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    try:
        with environment, redirect_stderr(StringIO()):  # submitit prints what it raises as well
            return executor.submit(Training(argv, str(executor.folder)))
    except RuntimeError as error:
        raise utils.MainError(f"the job was not accepted: {' '.join(str(error).split())}") from error


def main() -> None:
    flags, argv = parse(sys.argv[1:])
    job = submit(flags, argv)
    print(f"job {job.job_id}, folder {job.paths.folder}, log {job.paths.stdout.name}")
    if flags.executor == "debug":
        job.results()


if __name__ == "__main__":
    import submit_slurm  # tasks know Training by this module's name, not as __main__

    utils.run_command(submit_slurm.main)
