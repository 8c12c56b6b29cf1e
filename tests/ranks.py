"""Runs commands in a group of two processes without torchrun, and without importing everything each time."""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from cases import ROOT, Ended

PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["main_deit", "dynamic_inference"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(name: str, *argv: object, timeout: float = 300) -> list[Ended]:
    """Calls a module's `main` as a command in two processes; returns how each of them ended.

    They are forks of a process that has imported the commands. As under torchrun, a process that fails ends
    the other one: its code is then -9. So does the time limit, in seconds.
    """
    with pytest.MonkeyPatch.context() as patch:  # the first call starts the process that forks
        PROCESSES.set_forkserver_preload(PRELOADED)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory() as folder:
            port = free_port()
            given = [(name, [str(word) for word in argv], rank, port, folder) for rank in range(2)]
            processes = [PROCESSES.Process(target=run_rank, args=values) for values in given]
            for process in processes:
                process.start()
            running = {process.sentinel: process for process in processes}
            while running:
                ended = [running.pop(sentinel) for sentinel in wait(running, timeout)]
                for process in ended:
                    process.join()
                if not ended or any(process.exitcode for process in ended):
                    for process in running.values():
                        process.kill()
            texts = [
                [(Path(folder) / f"{kind}{rank}").read_text() for kind in ("out", "err")] for rank in range(2)
            ]
    return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]


def run_rank(name: str, argv: list[str], rank: int, port: int, folder: str) -> None:
    """Becomes a process as torchrun would start it, whose streams are files of a folder."""
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{kind}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()})
    sys.argv = [f"{name}.py", *argv]
    multiprocessing.set_start_method(None, force=True)  # of processes that load images: the system's again
    import utils

    utils.run_command(importlib.import_module(name).main)
