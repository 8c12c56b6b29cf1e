"""A few steps of training: the loss falls, accumulation and clipping do what they say, nothing waits."""

from typing import Any

import pytest
import timm
import torch
from cases import HostWaits
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from engine import Objective, Observer, Precision, Reports, Update, predict, train_one_epoch
from loading.loaders import Shard
from utils import MainError

CPU = Precision(torch.device("cpu"))
PLAIN = Objective(nn.CrossEntropyLoss())


class Losses(Observer):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_step(self, step: int, images: int, losses: dict[str, float]) -> None:
        self.losses.append(losses["loss"])


def tinted(count: int) -> TensorDataset:
    """Noise with a tint per class."""
    generator = torch.Generator().manual_seed(0)
    tints, labels = torch.randn(10, 3, 1, 1, generator=generator), torch.arange(count) % 10
    return TensorDataset(torch.randn(count, 3, 56, 56, generator=generator) + tints[labels], labels)


def make_update(model: nn.Module, batches: int, sgd: bool = False, **options) -> Update:
    lr = 2e-3
    optimizer = (torch.optim.SGD if sgd else torch.optim.AdamW)(model.parameters(), lr=lr)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=1, step_on_epochs=False, updates_per_epoch=batches, min_lr=lr
    )
    return Update(optimizer, scheduler, CPU.scaler(), **options)


def train(batch: int, **options) -> tuple[nn.Module, list[float], Update]:
    torch.manual_seed(0)
    model, data = timm.create_model("lf_deit_nano"), tinted(320)
    loader = DataLoader(data, batch)
    update = make_update(model, len(loader), **options)
    run = Losses()
    train_one_epoch(model, loader, PLAIN, update, 0, CPU, run)
    return model, run.losses, update


def test_the_loss_falls_and_both_stages_learn() -> None:
    model, losses, _ = train(16)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    accuracy = predict(model, DataLoader(Shard(tinted(100)), 30), CPU).correct.double().mean(dim=0)
    assert (accuracy > 0.8).all()


def test_accumulated_batches_make_one_update() -> None:
    whole, _, _ = train(64, sgd=True)
    parts, _, _ = train(16, sgd=True, accumulate=4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_last_update_of_an_epoch_may_have_fewer_batches() -> None:
    _, losses, update = train(64, accumulate=3)  # batches of 64, 64, 64 and 64, 64
    assert len(losses) == 5
    assert {int(state["step"]) for state in update.optimizer.state.values()} == {2}


def test_gradients_are_clipped() -> None:
    model, norms = timm.create_model("lf_deit_nano"), []
    update = make_update(model, 20, clip_grad=0.01)
    update.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    )
    train_one_epoch(model, DataLoader(tinted(32), 16), PLAIN, update, 0, CPU)
    assert len(norms) == 2 and max(norms) < 0.0101


def test_the_moving_average_follows_the_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model("lf_deit_nano")
    start = model.head.weight.detach().clone()
    update = make_update(model, 20, ema=ModelEmaV3(model, decay=0.75))
    train_one_epoch(model, DataLoader(tinted(16), 16), PLAIN, update, 0, CPU)
    expected = 0.75 * start + 0.25 * model.head.weight
    torch.testing.assert_close(update.ema.module.head.weight, expected)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = timm.create_model("lf_deit_nano")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.full((4, 3, 56, 56), float("nan"))
    loader = DataLoader(TensorDataset(images, torch.zeros(4, dtype=torch.int64)), 4)
    with pytest.raises(MainError, match="epoch 0, step 0"):
        train_one_epoch(model, loader, PLAIN, make_update(model, 1), 0, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Flawed(nn.Module):
    """Cross-entropy that is no number in some batches and has infinite gradients in others."""

    def __init__(self, losses: set[int] = frozenset(), gradients: set[int] = frozenset()):
        super().__init__()
        self.losses, self.gradients, self.batch = losses, gradients, -1

    def next_batch(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self.batch += 1
        return images, target

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, target)
        if self.batch in self.gradients:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss * (torch.nan if self.batch in self.losses else 1)


def trained_by(optimizer: str, criterion: Flawed, batches: int = 6, **options: Any) -> dict[str, Any]:
    """What training with batches of 4 leaves, with torch's fused AdamW or with the plain one.

    The model normalises batches, so that its moving average has buffers too.
    """
    torch.manual_seed(0)
    model = timm.create_model("cf_lvvit_nano", depth=2)
    update = make_update(model, batches)._replace(**options)
    lr = update.optimizer.param_groups[0]["lr"]
    fused = torch.optim.AdamW(model.parameters(), lr=lr, fused=optimizer == "fused")
    update.scheduler.optimizer = fused
    update = update._replace(optimizer=fused, ema=ModelEmaV3(model, decay=0.7))
    run, error, objective = Losses(), None, Objective(criterion, criterion.next_batch)
    try:
        train_one_epoch(model, DataLoader(tinted(4 * batches), 4), objective, update, 0, CPU, run)
    except MainError as raised:
        error = str(raised)
    moments = [[state[name] for name in ("step", "exp_avg")] for state in fused.state.values()]
    tensors = {"model": model.state_dict(), "ema": update.ema.module.state_dict(), "moments": moments}
    return tensors | {"run": run, "error": error, "scale": update.scaler.get_scale()}


SPOILS = {
    "losses": (dict(losses={2, 3}), dict(skip=2)),
    "gradient": (dict(gradients={1}), dict(skip=1, clip_grad=0.1)),
    "accumulated": (dict(losses={2}, gradients={5}), dict(skip=2, accumulate=2)),
    "scaler": (dict(losses={1}, gradients={3}), dict(skip=1)),
}


@pytest.mark.parametrize("case", SPOILS)
def test_a_masked_update_is_one_left_out(case: str) -> None:
    """The fused optimizer, masked on the device, leaves what the plain one does that the host skips."""
    spoils, options = SPOILS[case]
    ends = []
    for optimizer in ("fused", "plain"):
        scaler = dict(scaler=torch.amp.GradScaler("cpu", 2.0**10)) if case == "scaler" else {}
        ends.append(trained_by(optimizer, Flawed(**spoils), **options, **scaler))
    masked, skipped = ends
    assert masked["error"] is skipped["error"] is None
    for name in ("model", "ema", "moments"):
        torch.testing.assert_close(masked[name], skipped[name], atol=1e-5, rtol=1e-4, msg=name)
    assert {int(step) for step, _ in masked["moments"]} == {
        6 // options.get("accumulate", 1) - options.get("skip", 0) - (case == "scaler")
    }
    one, other = (end["run"] for end in ends)
    assert one.losses == pytest.approx(other.losses, rel=1e-4, nan_ok=True) and len(one.losses) == 6
    assert (one.progress.step, one.progress.batches) == (other.progress.step, other.progress.batches)
    assert one.progress.skipped == other.progress.skipped == options.get("skip", 0)
    assert one.progress.sums == pytest.approx(other.progress.sums, rel=1e-4)
    assert masked["scale"] == skipped["scale"]


@pytest.mark.parametrize("skip", [0, 1])
def test_no_update_comes_after_the_one_that_ends_the_run(skip: int) -> None:
    """The batch after it has been launched when its loss is read, and leaves no trace."""
    spoiled = {2} if skip == 0 else {0, 2}
    ended = trained_by("fused", Flawed(losses=spoiled), skip=skip)
    assert ended["error"].startswith("the loss is nan at epoch 0, step 2 (sample 8, sample 9")
    assert ended["error"].endswith("; weights were not updated")
    before = trained_by("fused", Flawed(losses=spoiled - {2}), batches=2, skip=skip)
    for name in ("model", "ema"):
        for key, value in before[name].items():
            assert torch.equal(value, ended[name][key]) or name == "model" and ".bn" in key, key
    assert len(ended["run"].losses) == 2


@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_the_host_reads_a_batch_after_its_update(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads once per batch, where nothing can mask the update before it, and else a batch later."""
    order, send, step = [], Reports.send, torch.optim.AdamW.step

    class Read(Losses):
        def on_step(self, step: int, *rest: Any) -> None:
            super().on_step(step, *rest)
            order.append(f"read {step}")

    def sent(self: Reports, step: int, *rest: Any) -> None:
        send(self, step, *rest)
        order.append(f"sent {step}")
        if step == 0:
            waits.counts.clear()  # of building the model and the loader

    monkeypatch.setattr(Reports, "send", sent)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (order.append("update"), step(self)))
    monkeypatch.setitem(globals(), "Losses", Read)
    with HostWaits() as waits:
        trained_by(optimizer, Flawed(), batches=3, clip_grad=1.0)
    middle = "sent 0, update, sent 1, read 0, update, sent 2, read 1, update, read 2"
    if optimizer == "plain":
        middle = "sent 0, read 0, update, sent 1, read 1, update, sent 2, read 2, update"
    else:  # the plain one asks for its counters, on the CPU alone
        assert +waits.counts == {"tolist": 3}
    assert ", ".join(order) == middle
