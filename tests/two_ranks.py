"""Run in two processes: writes what two processes do together into a file, then one of them fails.

The other is then waiting as in a collective of NCCL, where nothing tells it of the failure.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import engine
import main_deit
import utils
from checkpointing.format import load_checkpoint
from checkpointing.run import Run
from loading import loaders
from models.weights import create_model

COLLECTIVES = ("barrier", "all_reduce", "all_gather_object", "all_gather", "broadcast")
TRAIN = (
    "--model deit_nano --model-kwargs embed_dim=16 depth=1 num_heads=1 --epochs 2 --batch-size 8 --device cpu"
)
TRAIN += " --num_workers 0 --picture-freq 0"


def outcome(action: Callable[[], Any]) -> list:
    """What an action returns or raises, of all processes."""
    try:
        result = [action()]
    except (Exception, KeyboardInterrupt) as error:
        result = [type(error).__name__, str(error)]
    return utils.gather(result)


def exchange(context: utils.Context) -> dict[str, Any]:
    sums = utils.sum_over_ranks(torch.tensor([context.rank + 1, 10**context.rank])).tolist()
    norm = nn.BatchNorm1d(2)
    norm.running_mean += context.rank
    distribute_bn(norm, context.world_size, reduce=True)
    means = utils.gather(norm.running_mean.tolist())
    return {"sums": sums, "means": means, "gathered": utils.gather({"rank": context.rank})}


def take_turns(context: utils.Context, folder: Path) -> dict[str, Any]:
    """The same call with several bodies; how many collectives they took, in all."""
    counts, originals = [], {name: getattr(dist, name) for name in COLLECTIVES}
    errors = [
        KeyError("x"),
        utils.InputError("no y"),
        FileNotFoundError(2, "none", "z"),
        utils.MainError("w"),
    ]
    errors += [KeyboardInterrupt()]

    def counted(action: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            for name in COLLECTIVES:
                setattr(dist, name, lambda *_, **__: counts.append(1))
            try:
                return action()
            finally:
                for name, function in originals.items():
                    setattr(dist, name, function)

        return call

    def fetch() -> bool:
        with utils.main_first(context):
            there = (folder / "fetched").exists()
            if context.is_main:
                time.sleep(0.5)
                (folder / "fetched").touch()
        return there

    def fail(error: BaseException) -> None:
        raise error

    def fail_first(error: BaseException) -> None:
        with utils.main_first(context):
            fail(error)

    turns = {
        "fetched": outcome(counted(fetch)),
        "result": outcome(counted(lambda: utils.by_main(context, lambda: 3))),
        "by_main": [outcome(counted(lambda: utils.by_main(context, lambda: fail(e)))) for e in errors],  # noqa: B023
        "main_first": [outcome(counted(lambda: fail_first(e))) for e in errors],  # noqa: B023
    }
    return turns | {"collectives": sum(utils.gather(len(counts)))}


class Branches(nn.Module):
    """The second layer is not in every graph."""

    varying_graph = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        x = self.first(x).tanh()
        return (self.second(x) if both else x).square().mean()


def descend(wrap: Callable[[nn.Module], nn.Module], batches: list[tuple[Tensor, bool]]) -> list[list[float]]:
    """The weights after each update of two batches."""
    model, history = Branches(), []
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step, batch in enumerate(batches):
        waits = step % 2 == 0 and isinstance(wrapped, DistributedDataParallel)
        with wrapped.no_sync() if waits else nullcontext():
            (wrapped(*batch) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
            history.append(torch.cat([value.detach().flatten() for value in model.parameters()]).tolist())
    return history


def accumulate(context: utils.Context) -> dict[str, Any]:
    """Batches of 8 by one process, or a half of each by both, with gradients as views or not."""
    generator, kinds = torch.Generator().manual_seed(1), [False, False, True, True, True, True]
    whole = [(torch.randn(8, 5, generator=generator), both) for both in kinds]
    halves = [(images[context.rank :: 2], both) for images, both in whole]
    copied = dict(find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=False)
    return {
        "alone": descend(lambda model: model, whole),
        "views": utils.gather(descend(lambda model: main_deit.in_parallel(model, context, False), halves)),
        "copies": descend(lambda model: DistributedDataParallel(model, **copied), halves),
    }


def predict_uneven(context: utils.Context) -> dict[str, Any]:
    """Five images in batches of two: 2 + 1 here, 2 there; then all of them in each process."""
    torch.manual_seed(0)
    model = create_model("deit_nano", dict(embed_dim=16, depth=1, num_heads=1, num_classes=4))
    data = TensorDataset(torch.randn(5, 3, model.img_size, model.img_size), torch.arange(5) % 4)
    precision, tables = engine.Precision.of(torch.device("cpu"), "none"), {}
    for name, share in {"shared": (context.rank, context.world_size), "all": (0, 1)}.items():
        loader = loaders.EvalLoader(loaders.Shard(data, *share), 2)
        tables[name] = utils.gather(engine.predict(model, loader, precision).confidence.tolist())
    return tables


def train_and_resume(context: utils.Context, data: str, folder: Path) -> dict[str, Any]:
    """A run, and one that a signal to the second process stops in its first epoch."""
    original = Run.on_step

    def on_step(run: Run, step: int, *rest: Any) -> None:
        if context.rank == 1 and step == run.epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        original(run, step, *rest)

    def train(name: str, *argv: str) -> None:
        sys.argv = [
            "main_deit.py",
            *TRAIN.split(),
            "--data-path",
            data,
            "--output_dir",
            str(folder / name),
            *argv,
        ]
        main_deit.main()

    def start(device: str, seed: int, *_: Any) -> utils.Context:
        random_seed(seed, context.rank)
        return context

    utils.start = start  # the group stays the same
    train("whole")
    Run.on_step = on_step
    stopped = outcome(lambda: train("stopped"))
    progress = load_checkpoint(folder / "stopped" / "checkpoint.pth")["progress"]["step"]
    Run.on_step = original
    train("stopped", "--resume", "auto")
    states = [load_checkpoint(folder / name / "checkpoint.pth") for name in ("whole", "stopped")]
    same = [torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"]]
    return {"stopped": stopped, "step": progress, "same": all(same), "epochs": states[1]["epoch"]}


def main() -> None:
    data, folder = sys.argv[1], Path(sys.argv[2])
    context = utils.start("cpu")
    results = exchange(context) | {"turns": take_turns(context, folder)}
    results |= accumulate(context) | {"predicted": predict_uneven(context)}
    results["run"] = train_and_resume(context, data, folder)
    if context.is_main:
        (folder / "results.json").write_text(json.dumps(results))
        time.sleep(600)

    def wait_for_others() -> None:
        print("waiting for the others", file=sys.stderr, flush=True)
        time.sleep(600)

    dist.destroy_process_group = wait_for_others
    while not (folder / "results.json").exists():
        time.sleep(0.01)
    raise KeyError("the second process fails")
