"""Distributed set-up, logging, errors and exit codes, the argument parser."""

import argparse
import errno
import logging
import math
import os
import pickle
import platform
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import world_info_from_env
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("adaptive-vit")


class InputError(ValueError):
    """What a user did wrong: one line with the way out, exit code 2."""


class MainError(Exception):
    """A command's own failure: one line, exit code 1."""


CLOSED_PIPE = 128 + signal.SIGPIPE  # what a shell says of a tool whose reader has gone, as in `... | head -1`
# Errors of the machine, not of what a user gave: a full disk, a device that fails, no memory, too many files.
FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE)
# What libraries raise for values that they do not take.
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
STOPPED = 75  # exit code of a run that a signal has stopped: start it again with --resume auto (EX_TEMPFAIL)


class Stopped(Exception):
    """The end of a run that a signal has stopped, its checkpoint written: one line, exit code STOPPED.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


# Distributed


class Context(NamedTuple):
    """Where this process runs: its device and its place among the processes of the run."""

    device: torch.device
    rank: int
    world_size: int
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0


def start(device: str | None, seed: int = 0, require_cuda: bool = False) -> Context:
    """Join the process group that this process was started for, if any, and seed with seed + rank.

    Args:
        device: by name; None for CUDA where it can be used, else the CPU.
        seed: of every generator.
        require_cuda: refuse any other device.

    Raises:
        InputError: there is no such device, the seed is out of range, or a variable of the group is missing.
    """
    if require_cuda and not torch.cuda.is_available():
        raise InputError(f"--require-cuda: {why_no_cuda() or 'no CUDA device is visible'}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    read_srun()
    check_device(device)
    if require_cuda and torch.device(device).type != "cuda":
        raise InputError(f"--require-cuda: --device is {device}")
    if not 0 <= seed <= 2**31:  # a sum with the rank still fits NumPy's 32 bits
        raise InputError(f"--seed is {seed}: take 0 to {2**31}")
    context = join_group(torch.device(device))
    random_seed(seed, context.rank)
    return context


OWN_STEPS = 0xFFFFFFF0  # Slurm's steps from this number on are its own: a script of sbatch, a shell of salloc


def read_srun() -> None:
    """Put a task's place into torchrun's variables where srun started several, and nobody else has set them.

    SLURM_NTASKS is no sign of it: everything that runs within a job sees it.
    """
    step, tasks = (int(os.environ.get(f"SLURM_STEP_{name}", -1)) for name in ("ID", "NUM_TASKS"))
    if 0 <= step < OWN_STEPS and tasks > 1 and "WORLD_SIZE" not in os.environ:
        for name, slurm in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "STEP_NUM_TASKS")):
            os.environ[name] = os.environ[f"SLURM_{slurm}"]


def join_group(device: torch.device) -> Context:
    """Join the process group that torchrun's variables describe, if they are there; it may be of one process.

    timm's function joins none of one process, does not tell NCCL its device, and takes whatever runs within
    a Slurm job for one of its tasks.

    Args:
        device: of this process; in a group its number is the local rank.

    Raises:
        InputError: a variable is missing or wrong.
    """
    grouped = "WORLD_SIZE" in os.environ and ("RANK" in os.environ or os.environ["WORLD_SIZE"] != "1")
    local_rank = world_info_from_env()[0] if grouped else 0
    if grouped and device.type != "cpu":
        if device.index is not None:
            log.warning("each process has a device of its own: --device %s is %s", device, device.type)
        device = torch.device(device.type, local_rank)
    bound = device if device.type == "cuda" and device.index is not None else None
    if bound:
        torch.cuda.set_device(bound)
    if not grouped:
        return Context(device, 0, 1)
    try:
        dist.init_process_group(dist.get_default_backend_for_device(device), device_id=bound)
    except ValueError as error:
        raise InputError(f"{one_line(error)}; torchrun sets it") from error
    return Context(device, dist.get_rank(), dist.get_world_size(), local_rank)


def check_device(device: str) -> None:
    """Check that there is a device of this name.

    Raises:
        InputError: the name is none, or this machine or this build of PyTorch has no such device.
    """
    try:
        kind, index = (wanted := torch.device(device)).type, wanted.index or 0
        if kind != "cpu":  # each process of this machine has one of its own
            index = max(index, int(os.environ.get("LOCAL_RANK", 0)))
    except RuntimeError as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"--device {device}: take cpu, cuda, mps or xpu")
    count = getattr(torch, kind).device_count()
    if index >= count:
        there = f"there are {count}" if count else f"no {kind.upper()} device is visible"
        there += f" ({reason})" if kind == "cuda" and not count and (reason := why_no_cuda()) else ""
        raise InputError(f"--device {device}: {there}; use --device cpu")


def why_no_cuda() -> str:
    """Return torch's reason why CUDA cannot be used, such as a driver that is missing or too old, else ""."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return one_line(error).split(". ")[0]
    return ""


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # other systems, other architectures
        return platform.processor() or platform.machine()


NO_FLOAT64 = {"mps"}  # types of device


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no more."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


@contextmanager
def in_turn(first: bool, who: str) -> Iterator[None]:
    """Run the body in one process, then in the others, to which an error of the first passes at once.

    They ask the store of the process group for its word, for hours if need be, and without a GPU.

    Args:
        first: whether this is the one.
        who: tells turns apart that several processes take at the same time.

    Raises:
        InputError, OSError, MainError: the first process raised it.
        MainError: the first process raised something else, or is no longer there.
    """
    if not dist.is_initialized():
        yield
        return
    store = _get_default_store()
    key = f"{who}, turn {store.add(f'turns of {dist.get_rank()} by {who}', 1)}"  # all count to the same
    if first:
        try:
            yield
        except BaseException as error:
            store.set(key, pickle.dumps(for_others(error)))
            raise
        store.set(key, pickle.dumps(None))
        return
    if error := pickle.loads(wait_for(store, key)):
        raise error
    yield


def for_others(error: BaseException) -> Exception:
    """Return what the other processes raise for an error: the same if it is foreseen, else who has failed."""
    for kind in (InputError, OSError, MainError):
        if isinstance(error, kind):
            return kind(str(error))
    what = f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
    return MainError(f"process {dist.get_rank()} failed: {what}")


def wait_for(store: dist.Store, key: str) -> bytes:
    """Return a value of a store as soon as it is there.

    Raises:
        MainError: the store is no longer there.
    """
    pause = 0.001  # seconds; `Store.wait` would have a time limit, and keep Ctrl-C and other threads waiting
    try:
        while not store.check([key]):
            time.sleep(pause := min(2 * pause, 0.2))
        return store.get(key)
    except dist.DistError as error:
        raise MainError("the first process is no longer there; its own lines say why") from error


@contextmanager
def main_first(context: Context) -> Iterator[None]:
    """Run the body in each machine's first process, then in its others, which find what the first fetched.

    Raises: see `in_turn`.
    """
    with in_turn(context.is_local_main, f"the first of {socket.gethostname()}"):
        yield


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def by_main(context: Context, function: Callable[[], Any]) -> Any:
    """Call a function in the main process alone and return its result there, None in the others.

    Raises: what the function raises, in all processes; see `in_turn` for the others.
    """
    with in_turn(context.is_main, "the main process"):
        return function() if context.is_main else None


# Logging


def start_logging(context: Context, file: Path | None = None) -> None:
    """Log lines of the main process to stderr and `file`; the other processes log warnings only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if context.is_main else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file and context.is_main:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def log_device(context: Context, given: str | None) -> None:
    """Log on what a command runs, and why that is not CUDA where no device was `given`.

    The line is written before the next one, so that bad input that ends the command stays a single line.
    """
    text = f"{context.device.type}, {device_name(context.device)}"
    if dist.is_initialized():
        text += f", in a group of {context.world_size} ({dist.get_backend()})"
    if context.device.type == "cpu" and not given:
        text += f"; no CUDA: {why_no_cuda() or 'no device is visible'}"

    def write_first(record: logging.LogRecord) -> bool:
        log.removeFilter(write_first)
        log.info("device: %s", text)
        return True

    log.addFilter(write_first)


@contextmanager
def progress(total: int, shown: bool = True, initial: int = 0) -> Iterator[tqdm]:
    """Show a bar with rate and time left on a terminal, above which log lines appear.

    Elsewhere the bar only counts: log lines have to tell the same.
    """
    visible = shown and sys.stderr.isatty()
    with open(os.devnull, "w") as nowhere:
        file = sys.stderr if visible else nowhere
        options = dict(unit="img", file=file, dynamic_ncols=visible, smoothing=0.05)
        with tqdm(total=total, initial=initial, **options) as bar, logging_redirect_tqdm([log]):
            yield bar


def rate_and_left(bar: tqdm) -> tuple[float, str]:
    """Return a bar's units per second, and the time it still needs as H:MM:SS."""
    state = bar.format_dict
    rate = state["rate"] or state["n"] / max(state["elapsed"], 1e-9)
    return rate, tqdm.format_interval((state["total"] - state["n"]) / max(rate, 1e-9))


# Files


def write_atomically(
    path: Path, write: Callable[[Path], None], before: Callable[[], None] = lambda: None
) -> None:
    """Write a file so that readers see the old content or the new, never a part of it.

    Args:
        path: the file.
        write: fills a temporary file beside it, which is then renamed.
        before: called before it is renamed, when it is whole and on disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        before()
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system does this for folders
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, way_out: str) -> None:
    """Check, before the work, that its result can be written; its folder may be one that is yet to be made.

    Args:
        path: the file.
        way_out: ends the line of the error.

    Raises:
        OSError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell of a read-only disk
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): {way_out}") from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# Commands


def run_command(main: Callable[[], None]) -> None:
    """Run a command and end the process where it does not succeed.

    Bad input is exit code 2 after a line on stderr, an interruption 130 after a line. A failure of its own is
    1, after a line where it is foreseen, else after its traceback. Where the reader of standard output has
    gone, the exit code is CLOSED_PIPE, without a word. One of several processes that fails waits for none.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with errors_told(Path(sys.argv[0]).name), loaders_closed(), output_written():
            main()
        leave_group()
    except BaseException as error:
        if dist.is_initialized():
            exit_alone(error)
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def errors_told(name: str) -> Iterator[None]:
    """Tell of the body's error in a line that begins with a command's name, where the error is foreseen.

    Raises:
        SystemExit: with the exit code, after the line.
    """
    try:
        yield
    except (InputError, OSError) as error:
        line = one_line(error)
        # By the text: a loading process hands on no more of an error, nor does an InputError that it causes.
        if any(f"[Errno {number}]" in line for number in FAILURES):
            end(f"{name}: failed: {line}", 1)
        end(f"{name}: error: {line}", 2)
    except MainError as error:
        end(f"{name}: failed: {error}", 1)
    except Stopped as stop:
        leave_group()  # all processes stop here
        end(f"{name}: {stop}" if int(os.environ.get("RANK", 0)) == 0 else "", STOPPED)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
        end(f"{name}: interrupted", 130)


def leave_group() -> None:
    """Leave the process group, if there is one, as all processes do at the end of their work."""
    if not dist.is_initialized():
        return
    store = _get_default_store()
    if store.add("processes that leave", 1) == dist.get_world_size():
        store.set("all leave", b"")
    if dist.get_rank() == 0:  # the store may be its own, and another process still at its last turn
        wait_for(store, "all leave")
    dist.destroy_process_group()


def exit_alone(error: BaseException) -> NoReturn:
    """End this process because of an error and leave the others as they are.

    They may be waiting for it. To leave the group, or to end as Python does, would be to wait for them, and
    whoever started the processes would not learn that one has failed.
    """
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    logging.shutdown()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):
            stream.flush()
    os._exit(int(error.code or 0) if isinstance(error, SystemExit) else 1)


def one_line(error: BaseException) -> str:
    """Return the text of an error as one line.

    A data loader's worker hands its exception on as a traceback: the last line says what happened.
    """
    text = str(error).strip()
    if "Original Traceback" in text:
        return text.splitlines()[-1].split("Error: ", 1)[-1]
    return " ".join(text.split())


def end(line: str, code: int) -> NoReturn:
    """Exit with a code after a line on stderr, where that can still be written."""
    with suppress(OSError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def output_written() -> Iterator[None]:
    """Write out, after the body, what standard output still holds, while an error can be told.

    Raises:
        SystemExit: its reader has gone.
        OSError: it cannot be written, or as the body.
    """
    output = sys.stdout or open(os.devnull, "w")  # closed by the shell's >&-
    try:
        try:
            yield
        finally:
            output.flush()
    except OSError as error:
        gone = error.errno == errno.EPIPE and reader_has_gone(output)
        try:
            output.flush()
        except OSError:  # Python would try again at exit, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if gone:
            sys.exit(CLOSED_PIPE)
        raise


def reader_has_gone(output: TextIO) -> bool:
    """Return whether a file is a pipe that nobody reads from any more."""
    with suppress(OSError):  # no file of the system's
        poll = select.poll()
        poll.register(output.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


@contextmanager
def values_given(what: str) -> Iterator[None]:
    """Turn what a library raises in the body for values that a user gave into an InputError that names them.

    The body is the library's call alone: a fault of our own must not pass for the user's.
    """
    try:
        yield
    except InputError:
        raise
    except REFUSALS as error:
        reason = one_line(error) or type(error).__name__
        reason = f"no {reason}" if isinstance(error, LookupError) else reason
        raise InputError(f"{what}: {reason[:300]}") from error


@contextmanager
def loaders_closed() -> Iterator[None]:
    """End the loading processes of a loader when an error leaves the body.

    The error's traceback refers to the loader. Python would end its processes only at exit, by a SIGTERM,
    which they ignore.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or "default:" in (action.help or ""):
            return action.help or ""
        return super()._get_help_string(action) or "default: %(default)s"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError for a wrong command line, and takes finite numbers only."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": Defaults} | kwargs)
        self.register("type", float, Number(float))
        self.register("type", int, Number(int))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists what there is")


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say where a command runs, see `start`."""
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--require-cuda", action="store_true", help="end, instead of running without CUDA")


def add_matmul_precision(parser: argparse._ActionsContainer) -> None:
    """Add --matmul-precision, for torch.set_float32_matmul_precision."""
    precise = "of float32 products: high takes TF32 on GPUs that have it, medium bfloat16"
    choices = ("highest", "high", "medium")
    parser.add_argument("--matmul-precision", default="highest", choices=choices, help=precise)


class Number(NamedTuple):
    """A type of argparse: numbers from `low` to `high`, and finite.

    Attributes:
        kind: int or float.
        low, high: the limits, both included.
    """

    kind: type[int] | type[float]
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, text: str) -> int | float:
        """Return the number that a text spells.

        Raises:
            argparse.ArgumentTypeError: it spells none, or one beyond the limits.
        """
        with suppress(ValueError):
            number = self.kind(text)
            if self.low <= number <= self.high and abs(number) < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not {self}")

    def __repr__(self) -> str:
        what = "a whole number" if self.kind is int else "a finite number"
        if self.low == -math.inf:
            return what
        return f"{what} from {self.low} " + ("up" if self.high == math.inf else f"to {self.high}")


POSITIVE_INT = Number(int, 1)
NON_NEGATIVE_INT = Number(int, 0)
NON_NEGATIVE = Number(float, 0)
SHARE = Number(float, 0, 1)
