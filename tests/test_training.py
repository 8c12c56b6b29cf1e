"""A few steps of training: the loss falls, accumulation and clipping do what they say."""

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import Objective, Observer, Precision, Update, predict, train_one_epoch
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
