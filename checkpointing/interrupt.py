"""Ctrl-C while a command still imports what it needs. Imports next to nothing itself."""

import os
import signal
import sys
from typing import NoReturn


def exit_on_interrupt() -> None:
    """Make an interruption a line and exit code 130, without a traceback, until `utils.run_command` begins.

    Commands call this before their imports, which take seconds.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # where it is not ignored
        signal.signal(signal.SIGINT, exit_at_once)


def exit_at_once(*_: object) -> NoReturn:
    """Exit without raising: an import may turn what is raised in it into an error of its own."""
    os.write(2, os.fsencode(f"{os.path.basename(sys.argv[0])}: interrupted\n"))
    os._exit(130)
