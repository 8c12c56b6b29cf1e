"""Every optimizer of timm trains and goes on from its checkpoint bit for bit, or is refused when chosen."""

import io
from functools import partial
from typing import Any

import pytest
import timm
import torch
from cases import Command
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import models  # noqa: F401  (registers the models)
from checkpointing import optimizer as optimizer_module
from checkpointing.optimizer import load_optimizer, make_optimizer
from utils import InputError

FAST = ("adafactor", "adafactorbv", "muon", "sgd", "lamb", "lookahead_adamw")
REFUSED = [name for name in list_optimizers() if name.startswith(("bnb", "fused"))]  # without CUDA
REFUSED.append("adahessian")
TRAINED = [name for name in list_optimizers() if name not in (*REFUSED, *FAST)]
OPTIONS: dict[str, Any] = dict(lr=1e-3, weight_decay=0.05, momentum=0.9)


def tiny(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_nano", depth=1, embed_dim=width, num_heads=2, num_classes=4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        F.cross_entropy(model(torch.randn(4, 3, 56, 56))[0].logits, torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint file hands back."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resumes(name: str) -> None:
    make = partial(make_optimizer, opt=name, **OPTIONS)
    width = 4 if "kron" in name else 32  # kron takes minutes for wider layers
    model = tiny(width)
    optimizer = make(model)
    train(model, optimizer, range(7))  # of lookahead, the first six are a round
    checkpoint = saved(model, optimizer)
    again = tiny(width)
    again.load_state_dict(checkpoint["model"])
    resumed = make(again)
    load_optimizer(resumed, checkpoint["optimizer"], make, "file.pth")
    train(model, optimizer, range(7, 10))
    train(again, resumed, range(7, 10))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(model.parameters()), checkpoint["model"]["cls_token"])


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kron compiles its steps, which takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("name", FAST)
def test_an_optimizer_resumes(name: str) -> None:
    check_resumes(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_others_resume(name: str) -> None:
    check_resumes(name)


@pytest.mark.parametrize("name", ["adahessian", "fusedsgd", "bnblion", "nope", "nope_adamw", "lookahead"])
def test_an_optimizer_is_refused_when_it_is_chosen(name: str, command: Command, tmp_path: Any) -> None:
    if torch.cuda.is_available() and name.startswith(("bnb", "fused")):
        pytest.skip("it may be installed")
    flags = ["--data-path", tmp_path / "none", "--output_dir", tmp_path / "output", "--device", "cpu"]
    ended = command("main_deit", "--model", "deit_nano", "--opt", name, *flags)
    assert ended.code == 2 and f"--opt {name}" in ended.err and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--opt sgd --opt-betas 0.9 0.99", "--opt-betas: --opt sgd has no betas"),
        ("--opt lion --opt-eps 1e-8", "--opt-eps: --opt lion has no eps"),
        ("--opt adan --opt-betas 0.9 0.99", "--opt adan takes 3"),
        ("--opt-betas 0.9 0.99 0.999", "--opt adamw takes 2"),
        ("--opt-betas 1.5 0.9", "Invalid beta parameter"),
        ("--sched step --min-lr 1e-5", "--min-lr: --sched step has no lowest rate"),
        ("--no-model-ema --eval-ema", "--eval-ema needs the average"),
    ],
)
def test_an_option_without_effect_is_refused(flags: str, text: str, command: Command) -> None:
    ended = command("main_deit", "--model", "deit_nano", "--data-path", "none", *flags.split())
    assert ended.code == 2 and text in ended.err


def broken(optimizer: dict[str, Any], what: str) -> None:
    """Damages the state of adamw in one way."""
    state = optimizer["state"][3]
    if what == "missing":
        del state["exp_avg"]
    elif what == "shape":
        state["exp_avg"] = state["exp_avg"][..., :2].clone()
    elif what == "kind":
        state["exp_avg"] = "text"
    elif what == "more":
        state["further"] = [1, 2]
    else:
        optimizer["param_groups"].pop()


@pytest.mark.parametrize("what", ["missing", "shape", "kind", "more", "groups"])
def test_damaged_state_is_refused(what: str) -> None:
    make, model = partial(make_optimizer, opt="adamw", **OPTIONS), tiny()
    optimizer = make(model)
    train(model, optimizer, range(1))
    checkpoint = saved(model, optimizer)["optimizer"]
    broken(checkpoint, what)
    with pytest.raises(InputError, match="^file.pth: .*--reset-optimizer"):
        load_optimizer(make(model), checkpoint, make, "file.pth")


def test_options_that_need_another_state_are_refused() -> None:
    """Adafactor keeps a first moment only where it has betas."""
    model = tiny()
    plain = partial(make_optimizer, opt="adafactor", **OPTIONS)
    with_betas = partial(plain, betas=[0.9, 0.999])
    optimizer = plain(model)
    train(model, optimizer, range(1))
    with pytest.raises(InputError, match="of other options .exp_avg is missing"):
        load_optimizer(with_betas(model), saved(model, optimizer)["optimizer"], with_betas, "file.pth")


def test_parameters_without_a_gradient_have_no_state() -> None:
    make, model = partial(make_optimizer, opt="adamw", **OPTIONS), tiny()
    model.head.requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, range(1))
    head: list[Tensor] = [*model.head.parameters()]
    assert not any(parameter in optimizer.state for parameter in head)
    load_optimizer(make(model), saved(model, optimizer)["optimizer"], make, "file.pth")


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_adamw_resumes_on_another_device(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused one, which runs on the CPU too, takes the plain one's state, and the other way round."""
    # An epsilon that keeps rounding out: some gradients are nothing else.
    make, device = partial(make_optimizer, opt="adamw", eps=1e-4, **OPTIONS), torch.device(first)
    monkeypatch.setattr(optimizer_module, "device_of", lambda _: device)
    model = tiny()
    optimizer = make(model)
    train(model, optimizer, range(2))
    checkpoint = saved(model, optimizer)
    train(model, optimizer, range(2, 4))
    device = torch.device("cpu" if first == "cuda" else "cuda")
    again = tiny()
    again.load_state_dict(checkpoint["model"])
    resumed = make(again)
    load_optimizer(resumed, checkpoint["optimizer"], make, "file.pth")
    train(again, resumed, range(2, 4))
    fused = [[group["fused"] for group in one.state_dict()["param_groups"]] for one in (optimizer, resumed)]
    assert fused == ([[None, None], [True, True]] if first == "cpu" else [[True, True], [None, None]])
    assert {state["step"].item() for state in resumed.state.values()} == {4}
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_counters_of_the_fused_adamw_lie_on_its_device() -> None:
    """Its kernel takes no others; a checkpoint is read onto the CPU, and the plain one keeps them there."""
    make, model = partial(make_optimizer, opt="adamw", **OPTIONS), tiny()
    optimizer = make(model)
    train(model, optimizer, range(1))
    state = saved(model, optimizer)["optimizer"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        groups = [
            group | {"params": [nn.Parameter(torch.empty(p.shape, device="cuda")) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        resumed = make([{"params": group["params"]} for group in groups])
        load_optimizer(resumed, state, make, "file.pth")
        assert {value["step"].device.type for value in resumed.state.values()} == {"cuda"}
        for parameter in resumed.state:
            parameter.grad = torch.empty_like(parameter)
        resumed.step()
