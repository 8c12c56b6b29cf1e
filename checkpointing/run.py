"""A training run: where it is, how it stops and goes on, what it writes into its folder.

A run that is killed and resumed ends as it would have ended, bit for bit where the arithmetic allows it.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

import utils
from checkpointing.folder import BEST, NEWEST, save_in_turn
from checkpointing.format import restore_rng, rng_state
from checkpointing.optimizer import Groups, load_optimizer
from engine import Observer, Progress, Update
from models.weights import load_weights
from utils import log

# What a scheduler, a shell or Slurm says when time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LEAST_SCALE = 1e-4  # of fp16 gradients: 65536, where it starts, halved 30 times without an update in between


class Settings(NamedTuple):
    """Where a run writes, how often and what.

    Attributes:
        folder: None writes nothing, and leaves signals to do what they always do.
        epochs: of the whole run.
        checkpoint_every: batches, or minutes with an m, between checkpoints within an epoch.
        save_freq: epochs between checkpoints.
        keep_last: checkpoints to keep, besides model_best.pth.
        print_freq: batches between log lines.
        best_by: the measure that decides which epoch is the best.
        constant: what is the same in all checkpoints.
    """

    folder: Path | None
    epochs: int
    checkpoint_every: str
    save_freq: int
    keep_last: int
    print_freq: int
    best_by: str
    constant: dict[str, Any]


class RunLog:
    """A run's progress bar and log lines, its log.txt and its TensorBoard; of the main process alone.

    Args:
        folder: where files go, None for no files.
        is_main: whether this is the main process.
        steps: batches per epoch.
        print_freq: batches between log lines.
    """

    def __init__(self, folder: Path | None, is_main: bool, steps: int, print_freq: int):
        self.folder, self.is_main = folder if is_main else None, is_main
        self.steps, self.print_freq = steps, print_freq
        self.board: SummaryWriter | None = None

    @contextmanager
    def opened(self, total: int, done: int) -> Iterator[None]:
        """Show the bar, of so many images, and write to TensorBoard while the body runs."""
        if self.folder:
            self.board = SummaryWriter(self.folder / "tensorboard")
        try:
            with utils.progress(total, self.is_main, done) as self.bar:
                yield
        finally:
            if self.board:
                self.board.close()

    def has_line(self, step: int) -> bool:
        """Return whether the log has a line of this batch."""
        return step % self.print_freq == 0 or step + 1 == self.steps

    def add_batch(self, epoch: int, step: int, images: int, values: dict[str, float]) -> None:
        """Move the bar by a batch; write a line and to TensorBoard if it is time to."""
        self.bar.update(images)
        self.bar.set_description(f"epoch {epoch} loss {values['loss']:.3f}", refresh=False)
        if not self.is_main or not self.has_line(step):
            return
        rate, left = utils.rate_and_left(self.bar)
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("epoch %d [%d/%d] %s %.0f img/s %s left", epoch, step + 1, self.steps, text, rate, left)
        if self.board:
            for name, value in (values | {"images_per_second": rate}).items():
                self.board.add_scalar(f"step/{name}", value, epoch * self.steps + step)

    def add_epoch(self, epoch: int, entry: dict[str, float], parameters: int) -> None:
        """Put an epoch into TensorBoard, and into log.txt in place of what is there from this epoch on."""
        if not self.folder:
            return
        file = self.folder / "log.txt"
        lines = file.read_text().splitlines() if file.is_file() else []
        earlier = [line for line in lines if epoch_of(line) < epoch]
        line = json.dumps(entry | {"epoch": epoch, "n_parameters": parameters})
        utils.write_atomically(file, lambda path: path.write_text("\n".join([*earlier, line, ""])))
        for name, value in entry.items():
            self.board.add_scalar(name.replace("_", "/", 1), value, epoch)
        self.board.flush()


class Run(Observer):
    """A training run; inside of `with run.started():` it stops at signals with a checkpoint.

    Only the main process writes.

    Args:
        settings: where it writes, how often and what.
        context: this process.
        model: not wrapped.
        update: optimizer and its companions.
        global_batch_size: images per batch, over all processes.
        steps: batches per epoch.

    Attributes:
        epoch: that is being trained, 0-based.
        progress: of this epoch.
        best: highest score so far.
    """

    def __init__(
        self,
        settings: Settings,
        context: utils.Context,
        model: nn.Module,
        update: Update,
        global_batch_size: int,
        steps: int,
    ):
        super().__init__()
        self.settings, self.context, self.model, self.update = settings, context, model, update
        self.global_batch_size, self.steps = global_batch_size, steps
        self.folder, self.epochs = settings.folder, settings.epochs
        self.log = RunLog(self.folder, context.is_main, steps, settings.print_freq)
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.epoch, self.best = 0, -1.0
        self.earlier_are_own = False  # whether checkpoints in the folder are of this run
        self.signal: int | None = None
        every, minutes = settings.checkpoint_every.removesuffix("m"), settings.checkpoint_every.endswith("m")
        self.every_seconds = 60 * int(every) if minutes else math.inf
        self.every_steps = math.inf if minutes else int(every)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Log while the body runs, and catch signals if there is a folder for the checkpoint."""
        total, done = (self.global_batch_size * self.steps * epochs for epochs in (self.epochs, self.epoch))
        done += self.global_batch_size * self.progress.step
        self.saved, self.scale = self.now(), self.update.scaler.get_scale()
        handlers = {}
        if self.folder:
            handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
        try:
            with self.log.opened(total, done):
                yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the second Ctrl-C ends the run at once."""
        if number == signal.SIGINT:
            if self.signal == number:
                raise KeyboardInterrupt
            if self.context.is_main:  # not through the log, which may be what was interrupted
                os.write(2, b"\nstopping after this update with a checkpoint; Ctrl-C again stops at once\n")
        self.signal = number

    # Within an epoch

    def on_step(self, step: int, images: int, values: dict[str, float]) -> None:
        self.log.add_batch(self.epoch, step, images * self.context.world_size, values)
        if self.log.has_line(step):
            self.check_scale(step)

    def check_scale(self, step: int) -> None:
        """Check that the scale of fp16 gradients, which waits for the device, has not fallen towards 0.

        Raises:
            MainError: it has, the same in all processes.
        """
        before, self.scale = self.scale, self.update.scaler.get_scale()
        if self.scale < min(before, LEAST_SCALE):
            raise utils.MainError(
                f"the scale of fp16 gradients has fallen to {self.scale:.1g} at epoch {self.epoch},"
                f" step {step}, and they are still not finite: take --amp bf16 or none, or a lower --lr"
            )

    def now(self) -> tuple[float, int]:
        """Return the time in seconds, and the batches since the run began."""
        return time.monotonic(), self.epoch * self.steps + self.progress.step

    def requests(self) -> list[float]:
        """Return whether a checkpoint is due by the main process's clock, and which signal has come here."""
        due = self.context.is_main and time.monotonic() - self.saved[0] >= self.every_seconds
        return [float(due), *(float(self.signal == number) for number in SIGNALS)]

    def is_due(self, requests: list[float]) -> bool:
        """Return whether a checkpoint is due, or a signal has come to any process."""
        return bool(self.folder) and (any(requests) or self.now()[1] - self.saved[1] >= self.every_steps)

    def on_update(self, requests: list[float]) -> None:
        """Save a checkpoint if one is due; save one and stop if a signal has come to any process."""
        if self.is_due(requests):
            self.save(NEWEST)
            _, *counts = requests
            for number in [number for number, count in zip(SIGNALS, counts, strict=True) if count]:
                self.stop(number)

    def stop(self, number: int) -> None:
        """End the run because of a signal.

        Raises:
            Stopped: always.
        """
        place = f"epoch {self.epoch}, step {self.progress.step}"
        name = signal.Signals(number).name
        raise utils.Stopped(f"stopped by {name} at {place}; --resume auto goes on from there", number)

    # Between epochs

    def end_epoch(self, entry: dict[str, float], score: float) -> None:
        """Log an epoch, then save checkpoint.pth, and model_best.pth if the score is the best so far."""
        # In this order: an epoch that is done again after an interruption in between leaves the same files.
        self.log.add_epoch(self.epoch, entry, self.parameters)
        improved, self.best = score > self.best, max(score, self.best)
        self.epoch, self.progress = self.epoch + 1, Progress()
        signals = [number for number in utils.gather(self.signal) if number] if self.folder else []
        names = [BEST] if improved else []
        if signals or self.epoch == self.epochs or self.epoch % self.settings.save_freq == 0:
            names.append(NEWEST)
        self.save(*names)
        if signals and self.epoch < self.epochs:
            self.stop(signals[0])

    # Checkpoints

    def save(self, *names: str) -> None:
        """Save the state of all processes under these names of the folder."""
        if not (self.folder and names):
            return
        states = utils.gather({"rng": rng_state(), "statistics": self.statistics()})

        def write() -> None:
            checkpoint = self.settings.constant | {
                "model": self.model.state_dict(),
                "optimizer": self.update.optimizer.state_dict(),
                "lr_scheduler": self.update.scheduler.state_dict(),
                "scaler": self.update.scaler.state_dict(),
                "epoch": self.epoch - 1,  # the last that is complete
                "progress": asdict(self.progress) | {"images": self.global_batch_size},  # of the one after it
                "best": self.best,
                "best_by": self.settings.best_by,
                **{key: [state[key] for state in states] for key in ("rng", "statistics")},
            }
            if self.update.ema is not None:
                checkpoint["model_ema"] = self.update.ema.module.state_dict()
            for name in names:
                keep = self.settings.keep_last if self.earlier_are_own else 1
                save_in_turn(checkpoint, self.folder / name, keep)

        utils.by_main(self.context, write)
        if NEWEST in names:
            self.earlier_are_own, self.saved = True, self.now()

    def statistics(self) -> list[dict[str, Tensor]]:
        """Return the running statistics of model and average, which differ between processes."""
        return [
            {name: value.cpu() for name, value in part.named_buffers() if "running_" in name}
            for part in self.update.with_average(self.model)
        ]

    def restore(
        self, checkpoint: dict[str, Any], source: str, make: Callable[[Groups], Optimizer] | None
    ) -> None:
        """Put everything back but the model's weights, which the model has already.

        The schedule follows from the epoch, so that a run may be continued with more --epochs. With another
        number of processes or images per batch, the epoch goes on after as many images, in another order.

        Args:
            checkpoint: from `load_checkpoint`.
            source: its file.
            make: makes an optimizer like the run's over other parameters; None leaves its state unread.
        """
        update = self.update
        if make:
            load_optimizer(update.optimizer, checkpoint["optimizer"], make, source)
        if checkpoint.get("scaler"):
            update.scaler.load_state_dict(checkpoint["scaler"])
        if update.ema is not None and checkpoint.get("model_ema"):
            load_weights(update.ema.module, checkpoint["model_ema"], source)
        self.epoch, best_by = checkpoint["epoch"] + 1, self.settings.best_by
        if (before := checkpoint.get("best_by", best_by)) == best_by:
            self.best = checkpoint.get("best", self.best)
        else:
            log.info(
                "%s decides what is best, no longer %s: the best epochs before do not count", best_by, before
            )
        self.earlier_are_own = bool(self.folder) and Path(source).resolve().parent == self.folder.resolve()
        progress = dict(checkpoint.get("progress", {"images": self.global_batch_size}))
        batch_size, states = progress.pop("images"), checkpoint.get("rng", [])
        self.progress = Progress(**progress)
        if len(states) == self.context.world_size:
            self.restore_process(states[self.context.rank], checkpoint.get("statistics"))
        self.fit_progress(len(states), batch_size)

    def restore_process(self, rng: dict[str, Any], statistics: list | None) -> None:
        """Put back what is this process's own: its generators, and its running statistics."""
        restore_rng(rng)
        if statistics:
            parts, own = self.update.with_average(self.model), statistics[self.context.rank]
            for part, values in zip(parts, own, strict=False):
                part.load_state_dict(values, strict=False)

    def fit_progress(self, processes: int, batch_size: int) -> None:
        """Move the place in the epoch to the start of an update, where the checkpoint's batches were others.

        Args:
            processes: of the run that left the checkpoint.
            batch_size: its images per batch, over all processes.
        """
        step, accumulate = self.progress.step, self.update.accumulate
        fits = step % accumulate == 0 or step == self.steps
        if fits and (processes, batch_size) == (self.context.world_size, self.global_batch_size):
            return
        step = min(step * batch_size // self.global_batch_size, self.steps - 1)
        self.progress = Progress(step - step % accumulate, skipped=self.progress.skipped)
        log.info(
            "the checkpoint is of %d processes and %d images per batch, this run of %d and %d: the order of"
            " samples and the random numbers differ from those of an uninterrupted run",
            *(processes, batch_size, self.context.world_size, self.global_batch_size),
        )


def epoch_of(line: str) -> float:
    """Return the epoch of a line of log.txt; infinity for what is none."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError):
        return math.inf
