"""Optimizers of timm by name, and their state from a checkpoint."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpointing.schema import fits, shown
from utils import InputError

LOOKAHEAD = "lookahead_"  # before a name: timm's wrapper around that optimizer
Groups = list[dict[str, Any]]


def refused_options(opt: str) -> set[str]:
    """Return which of the options eps, betas and momentum an optimizer does not have.

    Raises:
        InputError: timm has no such optimizer, or training cannot run it.
    """
    name = opt.lower().removeprefix(LOOKAHEAD)
    if name not in list_optimizers():
        close = list_optimizers(f"*{name.split('_')[-1][:4]}*")[:8] or ["adamw", "sgd", "lamb", "lion"]
        raise InputError(f"--opt {opt}: timm has no such optimizer; there are {', '.join(close)}")
    info = get_optimizer_info(name)
    if info.second_order:
        raise InputError(f"--opt {opt} needs second derivatives, which training does not compute")
    has = {"eps": info.has_eps, "betas": info.has_betas, "momentum": info.has_momentum}
    return {option for option, there in has.items() if not there}


def make_optimizer(parameters: nn.Module | Groups, opt: str, **options: Any) -> Optimizer:
    """Make an optimizer of timm; AdamW is torch's fused one where the parameters are on CUDA.

    Args:
        parameters: a model, whose biases, norms and positions do not decay, or groups of parameters.
        opt: its name.
        options: further arguments of timm.optim.create_optimizer_v2.

    Raises:
        InputError: there is none of this name, training cannot run it, or it does not take the options.
    """
    refused_options(opt)
    betas, count = options.get("betas"), get_optimizer_info(opt.lower().removeprefix(LOOKAHEAD)).num_betas
    if betas is not None and len(betas) != count:
        raise InputError(f"--opt-betas {' '.join(map(str, betas))}: --opt {opt} takes {count}")
    if opt.lower() == "adamw" and device_of(parameters).type == "cuda":
        options = options | {"fused": True}
    try:
        return create_optimizer_v2(parameters, opt, **options)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        given = ", ".join(f"{name} {value}" for name, value in options.items())
        raise InputError(f"--opt {opt} with {given}: {error}") from error


def device_of(parameters: nn.Module | Groups) -> torch.device:
    """Return the device of the first parameter."""
    if isinstance(parameters, nn.Module):
        return next(parameters.parameters()).device
    return parameters[0]["params"][0].device


def load_optimizer(
    optimizer: Optimizer, saved: dict[str, Any], make: Callable[[Groups], Optimizer], source: str
) -> None:
    """Load what an optimizer has gathered, be it on another device; its options stay as they are.

    Args:
        optimizer: that has made no step.
        saved: its state dict.
        make: makes the same one over other parameters.
        source: the file, for messages.

    Raises:
        InputError: the state is not one that steps with these options leave.
    """
    options = [group.copy() for group in optimizer.param_groups]
    counters, expected = after_a_step(optimizer, make)
    # Whether these are set decides which device the counter of steps is loaded to.
    placing = [{name: group[name] for name in ("fused", "capturable") if name in group} for group in options]
    if len(saved["param_groups"]) == len(placing):
        groups = [group | own for group, own in zip(saved["param_groups"], placing, strict=True)]
        saved = saved | {"param_groups": groups}
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise InputError(f"{source}: {error}; --reset-optimizer starts the optimizer anew") from error
    state = optimizer.state_dict()["state"]
    number = 0
    for group, own, counts, shapes in zip(optimizer.param_groups, options, counters, expected, strict=True):
        for name, value in counts.items():
            check(group.get(name), value, name, source)
        group.update({name: value for name, value in own.items() if name not in counts})
        for parameter in group["params"]:
            values = state.get(number, {})  # empty before its first gradient
            for name in values.keys() | shapes[parameter.shape].keys() if values else ():
                like = shapes[parameter.shape].get(
                    name, parameter
                )  # later steps may add tensors of its shape
                check(values.get(name), like, name, source)
            number += 1


def after_a_step(
    optimizer: Optimizer, make: Callable[[Groups], Optimizer]
) -> tuple[list[dict[str, Any]], list[dict[torch.Size, dict[str, Any]]]]:
    """Return what a first step leaves in an optimizer of this kind.

    Returns:
        For each group, the options that a step has changed, and the state of a parameter of each shape.
    """
    groups = []
    for group in optimizer.param_groups:
        device = group["params"][0].device
        parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes_of(group)]
        groups.append(group | {"params": parameters})
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        trial = make(groups)
        before = [group.copy() for group in trial.param_groups]
        trial.step()
    counters = [
        {name: value for name, value in group.items() if name != "lr" and not same(value, old.get(name))}
        for group, old in zip(trial.param_groups, before, strict=True)
    ]
    states, number, expected = trial.state_dict()["state"], 0, []
    for group in groups:
        expected.append({})
        for shape in shapes_of(group):
            expected[-1][shape] = states.get(number, {})
            number += 1
    return counters, expected


def shapes_of(group: dict[str, Any]) -> list[torch.Size]:
    """Return the shapes of a group's parameters, each once."""
    return list(dict.fromkeys(parameter.shape for parameter in group["params"]))


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return first is second or (type(first) is type(second) and first == second)


def check(value: Any, like: Any, name: str, source: str) -> None:
    """Raise InputError where a saved value cannot take the place of one that a step leaves."""
    if not is_like(value, like):
        what = "missing" if value is None else shown(value)
        if isinstance(value, Tensor):
            what = f"a tensor {list(value.shape)}"
        raise InputError(
            f"{source}: the state of its optimizer is damaged or of other options ({name} is {what});"
            " --reset-optimizer starts the optimizer anew"
        )


def is_like(value: Any, like: Any) -> bool:
    """Return whether a value has the type of another, and tensors in it the shape."""
    if isinstance(like, Tensor):
        return isinstance(value, Tensor) and value.shape == like.shape
    if isinstance(like, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(like) and all(map(is_like, value, like))
    if isinstance(like, bool) or not isinstance(like, (int, float)):
        return type(value) is type(like)
    return fits(value, float)
