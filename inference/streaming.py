"""Early exit over a stream of batches: who goes on waits until a full batch of them is there.

Exit-aware batching, as in DREX (arXiv 2512.15705): without it every later stage runs on the few images that a
batch leaves over, of a different number each time.
"""

import argparse
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from engine import Precision, check_thresholds
from models import Adaptive
from models.exits import confidence

PATIENCE = 64  # batches that an image may wait for others


class Waiting(NamedTuple):
    """Images on their way to a stage.

    Attributes:
        numbers: [b] in the stream, increasing, on the host.
        images: [b,3,S,S].
        info: of the stage before, {} for the first.
    """

    numbers: Tensor
    images: Tensor
    info: dict[str, Tensor]

    def take(self, rows: Tensor | slice, at: Tensor | slice) -> "Waiting":
        """Some rows, by their places on the host and on the device."""
        return Waiting(
            self.numbers[rows], self.images[at], {name: value[at] for name, value in self.info.items()}
        )


def join(parts: list[Waiting]) -> Waiting:
    if len(parts) == 1:
        return parts[0]
    info = {name: torch.cat([part.info[name] for part in parts]) for name in parts[0].info}
    return Waiting(torch.cat([p.numbers for p in parts]), torch.cat([p.images for p in parts]), info)


class Decision(NamedTuple):
    """A stage's images and, once `ready`, who of them leaves.

    Attributes:
        exit: of the stage.
        waiting: its images, with what the next stage reads.
        leaves: [b] bool, on the host.
        ready: event of the copy to the host; None where there is nothing to wait for.
    """

    exit: int
    waiting: Waiting
    leaves: Tensor
    ready: "torch.cuda.Event | None"


class Line:
    """First in, first out: images before one stage."""

    def __init__(self):
        self.parts: deque[Waiting] = deque()
        self.count = 0

    def push(self, waiting: Waiting) -> None:
        self.parts.append(waiting)
        self.count += len(waiting.numbers)

    def pop(self, most: int) -> Waiting:
        """The first images, at most so many."""
        taken, left = [], min(most, self.count)
        self.count -= left
        while left:
            part = self.parts.popleft()
            if len(part.numbers) > left:
                self.parts.appendleft(part.take(slice(left, None), slice(left, None)))
                part = part.take(slice(left), slice(left))
            taken.append(part)
            left -= len(part.numbers)
        return join(taken)


class ExitStream:
    """Early exit over batches, each stage on full batches of survivors.

    An image's answer is that of `engine.early_exit`, whatever the batches are. The host waits for nothing but
    who leaves; on CUDA it does so while the next batch is already under way.

    Memory: before each stage but the first wait less than two batches of images with the info of the stage
    before, and logits of (patience + 3) * batch_size images are kept, because answers are in input order.

    Args:
        model: in evaluation mode.
        precision: device and autocast type.
        thresholds: one per exit but the last, as for `engine.early_exit`.
        batch_size: images per run of a stage; no batch of the stream may be larger.
        pad: fill batches that are smaller, the last ones, with copies of an image, so that every stage sees
            one shape: for compiled stages.
        patience: batches after which an image goes on in a smaller batch.

    Raises:
        ValueError: the number of thresholds does not fit the model.
    """

    def __init__(
        self,
        model: Adaptive,
        precision: Precision,
        thresholds: list[float],
        batch_size: int,
        pad: bool = False,
        patience: int = PATIENCE,
    ):
        check_thresholds(model, thresholds)
        self.model, self.precision, self.thresholds = model, precision, thresholds
        self.batch_size, self.pad, self.patience = batch_size, pad, patience

    def __call__(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Classifies batches of images [b,3,S,S] that are on the device.

        Raises:
            ValueError: a batch is larger than batch_size.

        Yields:
            For each of them logits [b,K] of the exits taken and these exits [b] int64, in input order.
        """
        return Pass(self).over(batches)


class Pass:
    """One pass of an `ExitStream`: its lines, its pending decisions and a ring of answers."""

    def __init__(self, stream: ExitStream):
        self.stream = stream
        self.lines = [Line() for _ in stream.thresholds]  # line k is before stage k + 1
        self.decisions: deque[Decision] = deque()
        self.sizes: deque[int] = deque()  # of the batches that are not answered yet
        self.first = self.seen = 0  # number of the first image without an answer, and of the next
        self.room = (stream.patience + 3) * stream.batch_size
        device = stream.precision.device
        self.exits = torch.zeros(self.room, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.overlap = 1 if device.type == "cuda" else 0  # decisions that may be under way

    def over(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        # Inference mode around the work alone: between two answers the caller's mode is its own.
        for images in batches:
            if len(images) > self.stream.batch_size:
                raise ValueError(f"a batch of {len(images)} images in a stream of {self.stream.batch_size}")
            with torch.inference_mode():
                self.sizes.append(len(images))
                self.run(0, Waiting(torch.arange(self.seen, self.seen + len(images)), images, {}))
                self.seen += len(images)
                self.settle(self.overlap)
                while self.oldest() < self.seen - self.stream.patience * self.stream.batch_size:
                    self.hurry()
            yield from self.answers()
        with torch.inference_mode():
            while self.oldest() < self.seen:
                self.hurry()
        yield from self.answers()

    def run(self, k: int, waiting: Waiting) -> None:
        """Runs a stage, writes its logits as answers so far, and has its decision sent to the host."""
        stream, n = self.stream, len(waiting.numbers)
        images, info = waiting.images, waiting.info
        if stream.pad and n < stream.batch_size:
            rows = torch.arange(stream.batch_size, device=images.device).clamp(max=n - 1)
            _, images, info = waiting.take(slice(0), rows)
        with stream.precision.autocast():
            logits, info = stream.model.stage(k, images, info)
        logits = logits[:n]
        if self.logits is None:
            self.logits = logits.new_zeros(self.room, logits.shape[1])
        place = self.to_device(waiting.numbers % self.room)
        self.logits.index_copy_(0, place, logits)
        self.exits.index_fill_(0, place, k)
        if k == len(self.lines):
            return
        leaves, ready = confidence(logits) >= stream.thresholds[k], None
        if leaves.is_cuda:
            leaves, ready = leaves.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self.decisions.append(Decision(k, Waiting(waiting.numbers, waiting.images, info), leaves, ready))

    def to_device(self, numbers: Tensor) -> Tensor:
        device = self.stream.precision.device
        return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)

    def settle(self, most: int) -> None:
        """Carries out decisions until at most so many are under way, and runs what is full."""
        while len(self.decisions) > most:
            k, waiting, leaves, ready = self.decisions.popleft()
            if ready is not None:
                ready.synchronize()
            stay = (~leaves).nonzero()[:, 0]
            if len(stay):
                whole = len(stay) == len(leaves)
                place = slice(len(stay)) if whole else self.to_device(stay)
                self.lines[k].push(waiting.take(stay, place))
            while self.lines[k].count >= self.stream.batch_size:
                self.run(k + 1, self.lines[k].pop(self.stream.batch_size))

    def hurry(self) -> None:
        """Lets the first line that is not empty go on, full batch or not."""
        self.settle(0)
        for k, line in enumerate(self.lines):
            if line.count:
                self.run(k + 1, line.pop(self.stream.batch_size))
                break
        self.settle(0)

    def oldest(self) -> int:
        """Number of the first image that may still go on."""
        firsts = [int(decision.waiting.numbers[0]) for decision in self.decisions]
        firsts += [int(line.parts[0].numbers[0]) for line in self.lines if line.count]
        return min(firsts, default=self.seen)

    def answers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches at the front that are answered in full."""
        oldest = self.oldest()
        while self.sizes and self.first + self.sizes[0] <= oldest:
            size = self.sizes.popleft()
            place = self.to_device(torch.arange(self.first, self.first + size) % self.room)
            self.first += size
            yield self.logits[place], self.exits[place]


def compile_models(
    runs: dict[Adaptive, Callable[[], object]], mode: str = "default", names: tuple[str, ...] = ()
) -> str | None:
    """Compiles models for inference, or none of them where one fails.

    Args:
        runs: of every model a run of the shapes that it is compiled for.
        mode: "reduce-overhead" records CUDA graphs, where the device is one and shapes do not change.
        names: methods to compile; default: the model's own `compiled`.

    Returns:
        None, or in one line why all are as they were.
    """
    torch._dynamo.reset()  # nothing inherits the shapes or the count of recompilations of others
    try:
        for model, run in runs.items():
            for name in names or model.compiled:
                method = getattr(model, name)
                options = model.compiled.get(name, {}) or {"mode": mode}
                compiled = torch.compile(method, **options)
                compiled = keep_outputs(compiled) if options.get("mode") == "reduce-overhead" else compiled
                setattr(model, name, compiled)
            run()
    except Exception as error:  # compilers fail in many ways; the models themselves are as good as before
        uncompile(runs)
        return f"{type(model).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
    return None


def keep_outputs(method: Callable) -> Callable:
    """Copies what a method returns: a CUDA graph writes its next outputs to the same memory."""

    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, method(*args))

    return call


def uncompile(models: Iterable[Adaptive]) -> None:
    for model in models:
        for name in ("forward", *model.compiled):
            vars(model).pop(name, None)


def all_stages(model: Adaptive, precision: Precision, batch_size: int) -> Callable[[], object]:
    """A run of a batch of that size through all stages."""
    stream = ExitStream(model, precision, [math.inf] * (model.num_exits - 1), batch_size)
    images = torch.zeros(batch_size, 3, model.img_size, model.img_size, device=precision.device)
    return lambda: list(stream([images]))


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Adds --compile for inference."""
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead"),
        help="compile the stages with torch.compile; reduce-overhead: with CUDA graphs",
    )
