"""The checkpoints of an output folder: which is the newest good one, which are kept, and who may write.

checkpoint.pth is the newest, checkpoint.1.pth the one before it, and so on. Once the first is written, the
folder holds a complete one under one of these names at any moment, even after a power cut.
"""

import argparse
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpointing.format import load_checkpoint, save_checkpoint
from utils import InputError, MainError, log

NEWEST = "checkpoint.pth"
BEST = "model_best.pth"


def checkpoint_interval(text: str) -> str:
    """Return a value of --checkpoint-every as it is.

    Raises:
        argparse.ArgumentTypeError: it is neither batches nor minutes.
    """
    if re.fullmatch(r"[1-9]\d*m?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither batches, as 500, nor minutes, as 10m")


def checkpoint_path(folder: Path, number: int) -> Path:
    """Return where a folder's checkpoint lies; number 0 is the newest, 1 the one before it."""
    return folder / f"checkpoint.{number}.pth" if number else folder / NEWEST


def checkpoint_numbers(folder: Path) -> list[int]:
    """Return the numbers of a folder's checkpoints, the newest, 0, first."""
    names = [path.name for path in folder.glob("checkpoint*.pth")]
    matches = [re.fullmatch(r"checkpoint(?:\.(\d+))?\.pth", name) for name in names]
    return sorted(int(match[1] or 0) for match in matches if match)


def load_newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest checkpoint that can be read, and its content; None and {} in a folder without any.

    Raises:
        InputError: there are checkpoints and none can be read.
    """
    error = None
    for number in checkpoint_numbers(folder):
        path = checkpoint_path(folder, number)
        try:
            return path, load_checkpoint(path)
        except ValueError as caught:
            error = error or caught
    if error:
        raise InputError(f"{error}, nor is any before it: remove them to start anew")
    return None, {}


def set_damaged_aside(folder: Path, good: Path) -> None:
    """Rename damaged checkpoints newer than the one that is resumed, and make that one checkpoint.pth."""
    for path in [checkpoint_path(folder, number) for number in checkpoint_numbers(folder)]:
        if path == good:
            os.replace(good, folder / NEWEST)
            return
        try:
            load_checkpoint(path)
            return  # the user wants to go back
        except ValueError as error:
            log.warning("%s: going on from %s", error, good.name)
        os.replace(path, path.with_name(path.name + ".damaged"))


def save_in_turn(checkpoint: dict[str, Any], path: Path, keep: int) -> None:
    """Save a checkpoint; a new checkpoint.pth leaves `keep` files, with those before it.

    Raises:
        MainError: it cannot be written; the files are those from before.
    """
    try:
        if path.name == NEWEST:
            save_checkpoint(checkpoint, path, lambda: renumber(path.parent, keep))
            for number in checkpoint_numbers(path.parent)[keep:]:
                checkpoint_path(path.parent, number).unlink()
        else:
            save_checkpoint(checkpoint, path)
    except OSError as error:
        reason = error.strerror or error
        raise MainError(f"cannot write {path} ({reason}); the checkpoints before it are intact") from error


def renumber(folder: Path, keep: int) -> None:
    """Make room for a new checkpoint.pth: each checkpoint becomes the one before."""
    numbers = checkpoint_numbers(folder) if keep > 1 else []
    for number in numbers[::-1]:
        if number >= keep:  # a save was killed before it removed it
            checkpoint_path(folder, number).unlink()
        elif number:
            os.replace(checkpoint_path(folder, number), checkpoint_path(folder, number + 1))
    if 0 in numbers:
        try:  # a second name: checkpoint.pth itself stays until the new one replaces it
            os.link(folder / NEWEST, checkpoint_path(folder, 1))
        except OSError:  # a file system without links
            os.replace(folder / NEWEST, checkpoint_path(folder, 1))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep an output folder for this process, and clear what killed runs left half-written.

    The lock ends with the body, or with this process, however it ends.

    Raises:
        InputError: another run has the folder.
        OSError: it cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        # A record lock, which forked loading processes do not inherit. The package filelock takes flock's:
        # loading processes would hold that one for as long as they outlive a killed parent.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "another run"
                raise InputError(f"{folder} is in use by {holder}: take another --output_dir") from error
            log.warning("%s cannot be locked (%s): let no other run write to it", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for path in folder.glob(".*.pth.*.tmp"):
            if not is_running(int(path.name.split(".")[-2])):
                path.unlink(missing_ok=True)
        yield


def is_running(process: int) -> bool:
    """Return whether another process of this machine has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()
