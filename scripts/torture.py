"""Trains a tiny model once in peace, then with kills at random moments, and compares what is left.

    python scripts/torture.py --kills 100 --model NAME

Half of the kills are SIGKILL and half SIGTERM. After each the run goes on with --resume auto; where it ends
first, the next one starts. Log, weights, average, optimizer and random generators must agree in every bit.
"""

from _root import ROOT

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import utils
from checkpointing.format import load_checkpoint
from utils import NON_NEGATIVE, NON_NEGATIVE_INT, POSITIVE_INT

# Everything random is on; checkpoints come at other steps than updates and epochs.
TRAIN = (
    "--model-kwargs depth=2 --epochs 4 --batch-size 8 --accumulate 2 --device cpu"
    " --drop-path 0.3 --lr 1e-3 --unscale-lr --model-ema-decay 0.9 --picture-freq 0 --checkpoint-every 3"
)


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="deit_nano", metavar="NAME", help="what to train")
    add("--kills", type=POSITIVE_INT, default=20)
    add("--workers", type=NON_NEGATIVE_INT, default=1, help="loading processes")
    add("--patience", type=NON_NEGATIVE, default=4, help="most seconds of training between kills")
    add("--seed", type=int, default=0, help="of the moments")
    return parser


def make_pictures(root: Path) -> None:
    """Make a data folder of noise: 3 classes, 96 training and 24 validation images."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for label in ("ash", "birch", "cedar"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (56, 56, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")


def start(model: str, workers: int, data: Path, output: Path) -> subprocess.Popen:
    """Start or resume a run."""
    words = ["main_deit.py", "--model", model, *TRAIN.split(), "--num_workers", workers, "--resume", "auto"]
    words += ["--data-path", data, "--output_dir", output]
    output.mkdir(exist_ok=True)
    with open(output / "stderr.txt", "w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=file,
            start_new_session=True,
        )


def hit(run: subprocess.Popen, output: Path, patience: float) -> str:
    """Kill a run some time after its training has begun, rarely before; return how it ended."""
    begun = random.random() < 0.9
    while begun and run.poll() is None and "training and" not in (output / "stderr.txt").read_text():
        time.sleep(0.05)
    end = time.monotonic() + random.uniform(0, patience)
    while run.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if run.poll() is not None:
        return "finished" if run.returncode == 0 else f"exit code {run.returncode}"
    number = random.choice((signal.SIGKILL, signal.SIGTERM))
    # All processes, as a machine that fails or a scheduler does; half of the SIGKILLs hit the first alone.
    if number == signal.SIGTERM or random.random() < 0.5:
        os.killpg(run.pid, number)
    else:
        run.kill()
    code = run.wait()
    if code == 0:
        return "finished"
    known = {-signal.SIGKILL: "killed", -signal.SIGTERM: "ended at start", utils.STOPPED: "stopped"}
    return known.get(code, f"exit code {code}")


def same(first: Any, second: Any) -> bool:
    """Return whether tensors in dicts and lists are the same to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def differences(first: Path, second: Path) -> list[str]:
    """Return what is not the same in two output folders."""
    names = ["log.txt"] if (first / "log.txt").read_text() != (second / "log.txt").read_text() else []
    for name in ("checkpoint.pth", "model_best.pth"):
        one, two = load_checkpoint(first / name), load_checkpoint(second / name)
        keys = (one.keys() | two.keys()) - {"args"}  # of these, the path to resume differs
        names += [f"{name}: {key}" for key in sorted(keys) if not same(one.get(key), two.get(key))]
    return names + [path.name for path in second.glob(".*.tmp")]


def main() -> None:
    args = make_parser().parse_args()
    random.seed(args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        root, kills, runs, ended = Path(name), 0, 0, ""
        make_pictures(root / "data")
        resume = partial(start, args.model, args.workers, root / "data")
        # In peace
        if resume(root / "whole").wait():
            raise utils.MainError((root / "whole" / "stderr.txt").read_text())
        # Killed and resumed, until enough kills are done and the last run has ended
        while kills < args.kills or ended != "finished":
            output = root / f"run{runs}"
            patience = args.patience if kills < args.kills else float("inf")
            ended = hit(resume(output), output, patience)
            counts[ended] += 1
            if ended.startswith("exit code"):
                raise utils.MainError(f"{ended}: {(output / 'stderr.txt').read_text()}")
            kills += ended != "finished"
            if ended == "finished":
                if names := differences(root / "whole", output):
                    raise utils.MainError(f"run {runs} differs in {', '.join(names)}")
                runs += 1
            print(f"{kills} kills, {runs} runs finished and the same", end="\r", file=sys.stderr)
    ends = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{kills} kills ({ends}): {runs} runs end bit for bit like the uninterrupted one")


if __name__ == "__main__":
    utils.run_command(main)
