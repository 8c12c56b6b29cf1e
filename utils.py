"""Distributed set-up, logging, errors and exit codes, the argument parser."""

import argparse
import logging
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("adaptive-vit")


class MainError(Exception):
    """A command's own failure: one line, exit code 1."""


STOPPED = 75  # exit code of a run that a signal has stopped: start it again with --resume auto (EX_TEMPFAIL)


class Stopped(Exception):
    """A run ends because of a signal, its checkpoint written: one line, exit code STOPPED.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


# Distributed


class Context(NamedTuple):
    """Where this process runs."""

    device: torch.device
    rank: int
    world: int
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0


def start(device: str | None, seed: int = 0) -> Context:
    """Joins the process group that torchrun describes, if any, and seeds every generator with seed + rank.

    Raises:
        ValueError: a CUDA device was asked for and there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device is visible; use --device cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("take cpu or cuda")
        found = init_distributed_device_so(device=device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    context = Context(
        torch.device(found["device"]), found["global_rank"], found["world_size"], found["local_rank"]
    )
    seed += context.rank
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return context


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


@contextmanager
def main_first(context: Context) -> Iterator[None]:
    """Lets each machine's first process go through the body before the others, which find what it fetched."""
    if dist.is_initialized() and not context.is_local_main:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and context.is_local_main:
            dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def by_main(context: Context, function: Callable[[], Any]) -> Any:
    """What a function returns that only the main process calls; its error is raised in every process."""
    result = error = None
    if context.is_main:
        try:
            result = function()
        except (ValueError, OSError, MainError) as caught:
            error = caught
    if (first := gather(error)[0]) is not None:
        raise first
    return result


# Logging


class AboveBar(logging.Handler):
    """Prints lines on stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(context: Context, file: Path | None = None) -> None:
    """Main process: lines on stderr, and in `file`; the others are silent below warnings."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if context.is_main else logging.WARNING)
    handlers: list[logging.Handler] = [AboveBar()]
    if file and context.is_main:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def progress(total: int, shown: bool = True, initial: int = 0) -> tqdm:
    """A bar with rate and time left on a terminal; elsewhere it only counts, and log lines tell the same."""
    visible = shown and sys.stderr.isatty()
    file = sys.stderr if visible else open(os.devnull, "w")  # noqa: SIM115  (open as long as the bar)
    return tqdm(total=total, initial=initial, unit="img", file=file, dynamic_ncols=visible, smoothing=0.05)


def rate_and_left(bar: tqdm) -> tuple[float, str]:
    """Units per second of a bar, and the time it still needs as H:MM:SS."""
    state = bar.format_dict
    rate = state["rate"] or state["n"] / max(state["elapsed"], 1e-9)
    return rate, tqdm.format_interval((state["total"] - state["n"]) / max(rate, 1e-9))


# Files


def write_atomically(
    path: Path, write: Callable[[Path], None], before: Callable[[], None] = lambda: None
) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it: readers see the old or the new.

    `before` is called in between, when the temporary file is whole and on disk.
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


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# Commands


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; bad input becomes one line on stderr and exit code 2, a failure of its own code 1."""
    name = Path(sys.argv[0]).name
    try:
        with loaders_closed():
            main()
    except (ValueError, OSError) as error:
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
    """Ends the loading processes of a loader that an error leaves behind.

    The error refers to the loader and to itself. So Python would end these processes only at its exit, by a
    SIGTERM, which they ignore, and wait for them.
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
    """An argument parser whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": Defaults} | kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        found = super().parse_args(*args, **kwargs)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                self.error(f"{action.option_strings[0]} is {value}: take finite numbers")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists what there is\n")


def check_range(flag: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError where a flag's value is outside low .. high."""
    if not low <= value <= high:
        limits = f"{low} to {high}" if high < float("inf") else f"at least {low}"
        raise ValueError(f"{flag} is {value}: take {limits}")
