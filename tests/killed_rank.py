"""Run by torchrun: main_deit.py, whose rank 1 kills itself when it first is at the step that is given."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_deit
import utils
from checkpointing.run import Run


def main() -> None:
    number, original = int(sys.argv.pop(1)), Run.on_step

    def on_step(run: Run, step: int, *rest: Any) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and run.context.rank == 1 and run.epoch * run.steps + step == number:
            print(f"killed at step {number}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        original(run, step, *rest)

    Run.on_step = on_step
    main_deit.main()


if __name__ == "__main__":
    utils.run_command(main)
