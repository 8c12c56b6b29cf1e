"""The checkpoints of an output folder: which is the newest good one, which are kept, and who may write.

checkpoint.pth is the newest, checkpoint.1.pth the one before it, and so on. At any moment, power cuts
included, at least one complete file that has been on disk before is there under one of these names.
"""

import argparse
import errno
import fcntl
import os
import re
import socket
from pathlib import Path
from typing import IO, Any

from checkpointing.format import load_checkpoint, save_checkpoint
from utils import MainError, log

NAME = "checkpoint.pth"
BEST = "model_best.pth"


def interval(text: str) -> str:
    """A value of --checkpoint-every; argparse tells the error."""
    if re.fullmatch(r"[1-9]\d*m?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither batches, as 500, nor minutes, as 10m")


def older(folder: Path, number: int) -> Path:
    return folder / f"checkpoint.{number}.pth" if number else folder / NAME


def numbers(folder: Path) -> list[int]:
    """Of the checkpoints that a folder has, the newest, 0, first."""
    names = [path.name for path in folder.glob("checkpoint*.pth")]
    found = [re.fullmatch(r"checkpoint(?:\.(\d+))?\.pth", name) for name in names]
    return sorted(int(match[1] or 0) for match in found if match)


def find_newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that can be read, and its content; None and {} where there is no checkpoint.

    Raises:
        ValueError: there are checkpoints and none can be read.
    """
    error = None
    for number in numbers(folder):
        try:
            return older(folder, number), load_checkpoint(older(folder, number))
        except ValueError as caught:
            error = error or caught
    if error:
        raise ValueError(f"{error}, nor is any before it: remove them to start anew")
    return None, {}


def set_aside(folder: Path, good: Path) -> None:
    """Renames damaged checkpoints that are newer than the one that is resumed, which takes their place."""
    for path in [older(folder, number) for number in numbers(folder)]:
        if path == good:
            os.replace(good, folder / NAME)
            return
        try:
            load_checkpoint(path)
            return  # the user wants to go back
        except ValueError as error:
            log.warning("%s: going on from %s", error, good.name)
        os.replace(path, path.with_name(path.name + ".damaged"))


def save(checkpoint: dict[str, Any], path: Path, keep: int) -> None:
    """Saves a checkpoint; where it is checkpoint.pth, `keep` files are left, with those before it.

    Raises:
        MainError: it cannot be written; the files are those from before.
    """
    try:
        if path.name == NAME:
            save_checkpoint(checkpoint, path, lambda: shift(path.parent, keep))
            for number in numbers(path.parent)[keep:]:
                older(path.parent, number).unlink()
        else:
            save_checkpoint(checkpoint, path)
    except OSError as error:
        reason = error.strerror or error
        raise MainError(f"cannot write {path} ({reason}); the checkpoints before it are intact") from error


def shift(folder: Path, keep: int) -> None:
    """Makes room for a new checkpoint.pth: each becomes the one before."""
    found = numbers(folder) if keep > 1 else []
    for number in found[::-1]:
        if number >= keep:  # a save was killed before it removed it
            older(folder, number).unlink()
        elif number:
            os.replace(older(folder, number), older(folder, number + 1))
    if 0 in found:
        try:  # a second name: checkpoint.pth itself stays until the new one replaces it
            os.link(folder / NAME, older(folder, 1))
        except OSError:  # a file system without links
            os.replace(folder / NAME, older(folder, 1))


def open_folder(folder: Path) -> IO[str]:
    """Makes an output folder this process's own and clears what killed runs left half-written.

    Returns:
        The lock, which lasts until it is closed or this process ends, however it ends. It is a record lock:
        unlike flock's, loading processes do not inherit it and so cannot outlive their parent with it.

    Raises:
        ValueError: another run has the folder.
        OSError: it cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise ValueError(f"{folder} is in use by {holder}: take another --output_dir") from error
        log.warning("%s cannot be locked (%s): let no other run write to it", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    for path in folder.glob(".*.pth.*.tmp"):
        if not alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)
    return file


def alive(process: int) -> bool:
    """Whether another process of this machine has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()
