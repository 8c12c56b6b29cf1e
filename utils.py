"""Distributed set-up, logging, errors and exit codes, the argument parser."""

import argparse
import errno
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("adaptive-vit")


class InputError(ValueError):
    """What a user did wrong: one line with the way out, exit code 2."""


class MainError(Exception):
    """A command's own failure: one line, exit code 1."""


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


def start(device: str | None, seed: int = 0) -> Context:
    """Join the process group that torchrun describes, if any, and seed every generator with seed + rank.

    Raises:
        InputError: a CUDA device was asked for and there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device is visible; use --device cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("take cpu or cuda")
        place = init_distributed_device_so(device=device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    random_seed(seed, place["global_rank"])
    return Context(
        torch.device(place["device"]), place["global_rank"], place["world_size"], place["local_rank"]
    )


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


@contextmanager
def main_first(context: Context) -> Iterator[None]:
    """Run the body in each machine's first process, then in its others, which find what the first fetched."""
    if dist.is_initialized() and not context.is_local_main:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and context.is_local_main:
            dist.barrier()


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def by_main(context: Context, function: Callable[[], Any]) -> Any:
    """Call a function in the main process alone and return its result there, None in the others.

    Raises:
        InputError, OSError, MainError: the function raised it; all processes then do.
    """
    result = error = None
    if context.is_main:
        try:
            result = function()
        except (InputError, OSError, MainError) as caught:
            error = caught
    if (first := gather(error)[0]) is not None:
        raise first
    return result


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
    """Run a command; bad input becomes one line on stderr and exit code 2, a failure of its own code 1."""
    name = Path(sys.argv[0]).name
    try:
        with loaders_closed():
            main()
    except (InputError, OSError) as error:
        # A data loader's worker hands its exception on as a traceback: the last line says what happened.
        text = str(error).strip()
        line = (
            text.splitlines()[-1].split("Error: ", 1)[-1]
            if "Original Traceback" in text
            else " ".join(text.split())
        )
        print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except MainError as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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


def check_range(flag: str, value: float, low: float, high: float = float("inf")) -> None:
    """Check that a flag's value lies in low .. high.

    Raises:
        InputError: it does not.
    """
    if not low <= value <= high:
        limits = f"{low} to {high}" if high < float("inf") else f"at least {low}"
        raise InputError(f"{flag} is {value}: take {limits}")
