"""What a training run keeps and leaves behind: its place, checkpoints, log.txt, TensorBoard; how it stops.

A run that is killed and resumed ends as it would have ended, bit for bit where the arithmetic allows it.
"""

import argparse
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import utils
from checkpointing import folder as checkpoints
from checkpointing.format import restore_rng, rng_state
from checkpointing.schema import load_optimizer
from engine import Progress, Update
from models.weights import load_weights
from utils import log

# What a scheduler, a shell or Slurm says when time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Run:
    """A training run; inside of `with run:` it stops at signals with a checkpoint.

    Only the main process writes. Without --output_dir nothing is written, and signals do what they always do.

    Args:
        args: the command line.
        context: this process.
        constant: what is the same in all checkpoints.
        model: not wrapped.
        update: optimizer and its companions.
        images: per batch, over all processes.
        steps: batches per epoch.

    Attributes:
        epoch: that is being trained, 0-based.
        progress: of this epoch.
        best: highest score so far.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        context: utils.Context,
        constant: dict[str, Any],
        model: nn.Module,
        update: Update,
        images: int,
        steps: int,
    ):
        self.args, self.context, self.constant = args, context, constant
        self.model, self.update, self.images, self.steps = model, update, images, steps
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.board: SummaryWriter | None = None
        self.epoch, self.progress, self.best = 0, Progress(), -1.0
        self.epochs = args.epochs + args.cooldown_epochs
        every = args.checkpoint_every
        self.every_seconds = 60 * int(every[:-1]) if every.endswith("m") else float("inf")
        self.every_steps = float("inf") if every.endswith("m") else int(every)
        self.owns_older = False  # checkpoints that lie in the folder are of this run
        self.signal: int | None = None

    def __enter__(self) -> "Run":
        if self.folder:
            self.handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
            if self.context.is_main:
                self.board = SummaryWriter(self.folder / "tensorboard")
        self.saved = self.now()
        total, done = (self.images * self.steps * epochs for epochs in (self.epochs, self.epoch))
        done += self.images * self.progress.step
        self.bar = utils.progress(total, self.context.is_main, done)
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if self.board:
            self.board.close()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal; the second Ctrl-C ends the run at once."""
        if number == signal.SIGINT:
            if self.signal == number:
                raise KeyboardInterrupt
            if self.context.is_main:  # not through the log, which may be what was interrupted
                os.write(2, b"\nstopping after this update with a checkpoint; Ctrl-C again stops at once\n")
        self.signal = number

    # Within an epoch

    def on_step(self, step: int, images: int, losses: dict[str, float]) -> None:
        """Moves the bar by a batch; every --print-freq batches writes a line and to TensorBoard."""
        self.bar.update(images * self.context.world)
        self.bar.set_description(f"epoch {self.epoch} loss {losses['loss']:.3f}", refresh=False)
        if not self.context.is_main or (step % self.args.print_freq and step + 1 < self.steps):
            return
        rate, left = utils.rate_and_left(self.bar)
        numbers = losses | {"lr": self.update.optimizer.param_groups[0]["lr"]}
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        log.info("epoch %d [%d/%d] %s %.0f img/s %s left", self.epoch, step + 1, self.steps, text, rate, left)
        if self.board is not None:
            for name, value in (numbers | {"images_per_second": rate}).items():
                self.board.add_scalar(f"step/{name}", value, self.epoch * self.steps + step)

    def now(self) -> tuple[float, int]:
        """Time in seconds, and batches since the run began."""
        return time.monotonic(), self.epoch * self.steps + self.progress.step

    def wishes(self) -> list[float]:
        """Whether a checkpoint is due by the main process's clock, and which signal this process has got."""
        due = self.context.is_main and time.monotonic() - self.saved[0] >= self.every_seconds
        return [float(due), *(float(self.signal == number) for number in SIGNALS)]

    def on_update(self, wishes: list[float]) -> None:
        """Saves a checkpoint if it is time to, or a signal has come to any process, and then stops."""
        due, *got = wishes
        got = [number for number, count in zip(SIGNALS, got, strict=True) if count]
        if self.folder and (due or got or self.now()[1] - self.saved[1] >= self.every_steps):
            self.save(checkpoints.NAME)
        if self.folder and got:
            self.stop(got[0])

    def stop(self, number: int) -> None:
        place = f"epoch {self.epoch}, step {self.progress.step}"
        name = signal.Signals(number).name
        raise utils.Stopped(f"stopped by {name} at {place}; --resume auto goes on from there", number)

    # Between epochs

    def end_epoch(self, entry: dict[str, float], score: float) -> None:
        """Logs an epoch, then saves checkpoint.pth, and model_best.pth if the score is the best so far."""
        # In this order: an epoch that is done again after an interruption in between leaves the same files.
        self.write(entry)
        improved, self.best = score > self.best, max(score, self.best)
        self.epoch, self.progress = self.epoch + 1, Progress()
        got = [number for number in utils.gather(self.signal) if number] if self.folder else []
        names = [checkpoints.BEST] if improved else []
        if got or self.epoch == self.epochs or self.epoch % self.args.save_freq == 0:
            names.append(checkpoints.NAME)
        self.save(*names)
        if got and self.epoch < self.epochs:
            self.stop(got[0])

    def write(self, entry: dict[str, float]) -> None:
        """Puts an epoch into TensorBoard, and into log.txt instead of what is there from this epoch on."""
        if not (self.folder and self.context.is_main):
            return
        file = self.folder / "log.txt"
        lines = file.read_text().splitlines() if file.is_file() else []
        earlier = [line for line in lines if epoch_of(line) < self.epoch]
        line = json.dumps(entry | {"epoch": self.epoch, "n_parameters": self.parameters})
        utils.write_atomically(file, lambda path: path.write_text("\n".join([*earlier, line, ""])))
        for name, value in entry.items():
            self.board.add_scalar(name.replace("_", "/", 1), value, self.epoch)
        self.board.flush()

    # Checkpoints

    def save(self, *names: str) -> None:
        """Saves the state of all processes under these names of the folder."""
        if not (self.folder and names):
            return
        states = utils.gather({"rng": rng_state(), "statistics": self.statistics()})

        def write() -> None:
            checkpoint = self.constant | {
                "model": self.model.state_dict(),
                "optimizer": self.update.optimizer.state_dict(),
                "lr_scheduler": self.update.scheduler.state_dict(),
                "scaler": self.update.scaler.state_dict(),
                "epoch": self.epoch - 1,  # the last that is complete
                "progress": asdict(self.progress) | {"images": self.images},  # of the one after it
                "best": self.best,
                **{key: [state[key] for state in states] for key in ("rng", "statistics")},
            }
            if self.update.ema is not None:
                checkpoint["model_ema"] = self.update.ema.module.state_dict()
            for name in names:
                keep = self.args.keep_last if self.owns_older else 1
                checkpoints.save(checkpoint, self.folder / name, keep)

        utils.by_main(self.context, write)
        if checkpoints.NAME in names:
            self.owns_older, self.saved = True, self.now()

    def statistics(self) -> list[dict[str, Tensor]]:
        """Running statistics of model and average, which differ between processes inside an epoch."""
        parts = [self.model] + ([self.update.ema.module] if self.update.ema else [])
        return [
            {name: value.cpu() for name, value in part.named_buffers() if "running_" in name}
            for part in parts
        ]

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Puts everything but the model's weights back, which it has already.

        The schedule follows from the epoch, so that a run may be continued with more --epochs. With another
        number of processes or images per batch, the epoch goes on after as many images, in another order.
        """
        args, update = self.args, self.update
        if "optimizer" not in checkpoint:
            raise ValueError(f"{args.resume} holds weights only; start from it with --finetune")
        load_optimizer(update.optimizer, checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            update.scaler.load_state_dict(checkpoint["scaler"])
        if update.ema is not None and checkpoint.get("model_ema"):
            load_weights(update.ema.module, checkpoint["model_ema"], args.resume)
        self.best, self.epoch = checkpoint.get("best", -1.0), checkpoint["epoch"] + 1
        self.owns_older = bool(self.folder) and Path(args.resume).resolve().parent == self.folder.resolve()
        progress = dict(checkpoint.get("progress", {"images": self.images}))
        states, images = checkpoint.get("rng", []), progress.pop("images")
        self.progress = Progress(**progress)
        if len(states) == self.context.world:
            restore_rng(states[self.context.rank])
            own = checkpoint.get("statistics", [[]] * self.context.world)[self.context.rank]
            for part, values in zip([self.model, update.ema and update.ema.module], own, strict=False):
                if part is not None:
                    part.load_state_dict(values, strict=False)
        fits = self.progress.step % args.accumulate == 0 or self.progress.step == self.steps
        if len(states) != self.context.world or images != self.images or not fits:
            step = min(self.progress.step * images // self.images, self.steps - 1)
            self.progress = Progress(step - step % args.accumulate, skipped=self.progress.skipped)
            log.info(
                "the checkpoint is of %d processes and %d images per batch, this run of %d and %d: the order"
                " of samples and the random numbers differ from those of an uninterrupted run",
                *(len(states), images, self.context.world, self.images),
            )


def epoch_of(line: str) -> float:
    """Epoch of a line of log.txt; infinity for what is none."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
