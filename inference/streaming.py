"""Early exit over a stream of batches: images that stay are queued until a later stage has a full batch.

Exit-aware batching, as in DREX (arXiv 2512.15705). Without it every later stage runs on the few images that
one batch leaves over, of a different number each time.
"""

import argparse
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from engine import Precision, check_thresholds, padded_size
from models import Adaptive
from models.exits import confidence, leaves

MAX_WAIT = 64  # batches of the stream that an image may stay queued


class StageInput(NamedTuple):
    """Images that a stage is to run on.

    Attributes:
        numbers: [b] in the stream, increasing, on the host.
        images: [b,3,S,S].
        info: of the stage before, {} for the first.
    """

    numbers: Tensor
    images: Tensor
    info: dict[str, Tensor]

    def take(self, host_rows: Tensor | slice, device_rows: Tensor | slice) -> "StageInput":
        """Return some rows, given twice: as an index on the host and as one on the device."""
        images, info = take_rows(self.images, self.info, device_rows)
        return StageInput(self.numbers[host_rows], images, info)


def take_rows(
    images: Tensor, info: dict[str, Tensor], rows: Tensor | slice
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return some rows of a stage's input.

    Images stay tensors of inference mode or not, as they came: another kind compiles a stage again.
    """
    with torch.inference_mode(images.is_inference()):
        images = images[rows]
    return images, {name: value[rows] for name, value in info.items()}


def concatenate(parts: list[StageInput]) -> StageInput:
    if len(parts) == 1:
        return parts[0]
    info = {name: torch.cat([part.info[name] for part in parts]) for name in parts[0].info}
    with torch.inference_mode(parts[0].images.is_inference()):  # see take_rows
        images = torch.cat([part.images for part in parts])
    return StageInput(torch.cat([part.numbers for part in parts]), images, info)


class PendingDecision(NamedTuple):
    """Which images leave at an exit, on its way to the host.

    Attributes:
        exit: number of the stage.
        inputs: the stage's images, with its info for the next stage.
        leaving: [b] bool, on the host once `copied`.
        copied: event of the copy to the host; None where nothing is copied.
    """

    exit: int
    inputs: StageInput
    leaving: Tensor
    copied: "torch.cuda.Event | None"


class StageQueue:
    """First in, first out: images before one stage."""

    def __init__(self):
        self.parts: deque[StageInput] = deque()
        self.count = 0

    def push(self, inputs: StageInput) -> None:
        self.parts.append(inputs)
        self.count += len(inputs.numbers)

    def pop(self, limit: int) -> StageInput:
        """Remove and return the first images, at most `limit` of them."""
        parts, missing = [], min(limit, self.count)
        self.count -= missing
        while missing:
            part = self.parts.popleft()
            if len(part.numbers) > missing:
                self.parts.appendleft(part.take(slice(missing, None), slice(missing, None)))
                part = part.take(slice(missing), slice(missing))
            parts.append(part)
            missing -= len(part.numbers)
        return concatenate(parts)


class ExitStream:
    """Early exit over batches, each later stage on full batches.

    An image's result is that of `engine.early_exit`, whatever the batches are. The host waits for exit
    decisions alone; on CUDA it does so while the next batch is already under way. Where no batch can fill
    another up, of one image or with one exit, nothing is queued and each result comes at once.

    Memory: each queue holds less than two batches of images with the info of the stage before. Results of
    (max_wait + 3) * batch_size images are kept, because they come out in input order.

    Args:
        model: in evaluation mode.
        precision: device and autocast type.
        thresholds: one per exit but the last, as for `engine.early_exit`.
        batch_size: images per run of a stage; no batch of the stream may be larger.
        pad: fill smaller batches with copies of an image, so that compiled stages see one shape. By default
            they are filled up to `engine.padded_size`.
        max_wait: batches of the stream after which a queued image goes on in a smaller batch.

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
        max_wait: int = MAX_WAIT,
    ):
        check_thresholds(model, thresholds)
        self.model, self.precision, self.thresholds = model, precision, thresholds
        self.batch_size, self.pad, self.max_wait = batch_size, pad, max_wait

    def __call__(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Classify batches of images [b,3,S,S] that are on the device.

        Raises:
            ValueError: a batch is larger than batch_size.

        Yields:
            For each of them logits [b,K] of the exits taken and these exits [b] int64, in input order.
        """
        state = None if self.batch_size == 1 or not self.thresholds else StreamState(self)
        for images in batches:
            if len(images) > self.batch_size:
                raise ValueError(f"a batch of {len(images)} images in a stream of {self.batch_size}")
            # Inference mode around the work alone: between two results the caller's mode is its own.
            if state:
                state.add(images)
                yield from state.finished_batches()
            else:
                yield self.run_alone(images)
        if state:
            state.finish()
            yield from state.finished_batches()

    @torch.inference_mode()
    def run_alone(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify a batch that no other can join: one image, or images of a model with one exit."""
        info: dict[str, Tensor] = {}
        for k, threshold in enumerate([*self.thresholds, -math.inf]):
            logits, info = self.run_stage(k, images, info)
            if k == len(self.thresholds) or not len(images) or leaves(confidence(logits), threshold).item():
                break
        return logits, torch.full((len(images),), k, device=logits.device)

    def run_stage(self, k: int, images: Tensor, info: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a stage on images [b,3,S,S] and the info of the one before; return logits [b,K] and its info.

        The info is contiguous, and of more than b images where these were padded.
        """
        n, device = len(images), images.device
        size = self.batch_size if self.pad and n else padded_size(n, self.batch_size, device)
        if n < size:
            images, info = take_rows(images, info, torch.arange(size, device=device).clamp(max=n - 1))
        with self.precision.autocast():
            logits, info = self.model.stage(k, images, info)
        return logits[:n], {name: value.contiguous() for name, value in info.items()}


class StreamState:
    """What one run of an `ExitStream` keeps: queues, pending decisions and a ring buffer of results."""

    def __init__(self, stream: ExitStream):
        self.stream = stream
        self.queues = [StageQueue() for _ in stream.thresholds]  # queue k is before stage k + 1
        self.decisions: deque[PendingDecision] = deque()
        self.sizes: deque[int] = deque()  # of the batches whose results are not out yet
        self.first_open = self.total = 0  # number of the first image whose result is not out, and of the next
        self.capacity = (stream.max_wait + 3) * stream.batch_size
        device = stream.precision.device
        self.exits = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.max_pending = 1 if device.type == "cuda" else 0  # decisions that may be under way

    @torch.inference_mode()
    def add(self, images: Tensor) -> None:
        """Run the first stage on a batch [b,3,S,S], and what later stages have a full batch for."""
        self.sizes.append(len(images))
        numbers = torch.arange(self.total, self.total + len(images))
        self.run_stage(0, StageInput(numbers, images, {}))
        self.total += len(images)
        self.apply_decisions(self.max_pending)
        while self.first_undecided() < self.total - self.stream.max_wait * self.stream.batch_size:
            self.flush_one_queue()

    @torch.inference_mode()
    def finish(self) -> None:
        """Run all stages on the images that are left."""
        while self.first_undecided() < self.total:
            self.flush_one_queue()

    def run_stage(self, k: int, inputs: StageInput) -> None:
        """Run a stage, write its logits as results so far, and start the copy of its decision to the host."""
        stream, n = self.stream, len(inputs.numbers)
        logits, info = stream.run_stage(k, inputs.images, inputs.info)
        if self.logits is None:
            self.logits = logits.new_zeros(self.capacity, logits.shape[1])
        slots = self.to_device(inputs.numbers % self.capacity)
        self.logits.index_copy_(0, slots, logits)
        self.exits.index_fill_(0, slots, k)
        if k == len(self.queues) or n == 0:
            return
        leaving, copied = leaves(confidence(logits), stream.thresholds[k]), None
        if leaving.is_cuda:
            leaving, copied = leaving.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        outputs = StageInput(inputs.numbers, inputs.images, info)
        self.decisions.append(PendingDecision(k, outputs, leaving, copied))

    def to_device(self, numbers: Tensor) -> Tensor:
        device = self.stream.precision.device
        return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)

    def apply_decisions(self, max_pending: int) -> None:
        """Queue the images that stay until at most `max_pending` decisions are left; run full batches."""
        while len(self.decisions) > max_pending:
            k, inputs, leaving, copied = self.decisions.popleft()
            if copied is not None:
                copied.synchronize()
            stay = (~leaving).nonzero()[:, 0]
            if len(stay):
                all_stay = len(stay) == len(leaving)
                device_rows = slice(len(stay)) if all_stay else self.to_device(stay)
                self.queues[k].push(inputs.take(stay, device_rows))
            while self.queues[k].count >= self.stream.batch_size:
                self.run_stage(k + 1, self.queues[k].pop(self.stream.batch_size))

    def flush_one_queue(self) -> None:
        """Run the first stage that has images queued, be it on less than a full batch."""
        self.apply_decisions(0)
        for k, queue in enumerate(self.queues):
            if queue.count:
                self.run_stage(k + 1, queue.pop(self.stream.batch_size))
                break
        self.apply_decisions(0)

    def first_undecided(self) -> int:
        """Return the number of the first image whose exit is undecided."""
        numbers = [int(decision.inputs.numbers[0]) for decision in self.decisions]
        numbers += [int(queue.parts[0].numbers[0]) for queue in self.queues if queue.count]
        return min(numbers, default=self.total)

    def finished_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the results of the batches at the front all of whose images have taken their exit."""
        undecided = self.first_undecided()
        while self.sizes and self.first_open + self.sizes[0] <= undecided:
            size = self.sizes.popleft()
            slots = self.to_device(torch.arange(self.first_open, self.first_open + size) % self.capacity)
            self.first_open += size
            yield self.logits[slots], self.exits[slots]


def compile_models(
    runs: dict[Adaptive, Callable[[], object]],
    mode: str = "default",
    names: tuple[str, ...] = (),
    reset: bool = True,
) -> str | None:
    """Compile models for inference, or none of them where one fails.

    Args:
        runs: for every model, a run of the shapes that it is compiled for.
        mode: "reduce-overhead" records CUDA graphs, where the device is one and shapes do not change.
        names: methods to compile; default: the model's own `compiled`.
        reset: forget what was compiled before, so that its shapes and recompilations do not count.

    Returns:
        None, or the reason in one line why no model is compiled.
    """
    if reset:
        torch._dynamo.reset()
    try:
        for model, run in runs.items():
            for name in names or model.compiled:
                options = model.compiled.get(name, {}) or {"mode": mode}
                compiled = torch.compile(getattr(model, name), **options)
                compiled = keep_outputs(compiled) if options.get("mode") == "reduce-overhead" else compiled
                setattr(model, name, compiled)
            run()
    except Exception as error:  # compilers fail in many ways; the models themselves are as good as before
        uncompile(runs)
        return f"{type(model).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
    return None


def keep_outputs(method: Callable) -> Callable:
    """Make a method return copies: a CUDA graph writes its next outputs to the same memory."""

    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, method(*args))

    return call


def uncompile(models: Iterable[Adaptive]) -> None:
    """Undo `compile_models`."""
    for model in models:
        for name in ("forward", *model.compiled):
            vars(model).pop(name, None)


def all_stages(model: Adaptive, precision: Precision, batch_size: int) -> Callable[[], object]:
    """Return a function that runs all stages on a full batch of zeros and on one that needs padding."""
    stream = ExitStream(model, precision, [math.inf] * (model.num_exits - 1), batch_size, pad=True)
    images = torch.zeros(batch_size, 3, model.img_size, model.img_size, device=precision.device)
    (images,) = precision.place([images])
    return lambda: list(stream([images, images[:1]]))


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Add --compile for inference."""
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead"),
        help="compile the stages with torch.compile; reduce-overhead: with CUDA graphs",
    )
