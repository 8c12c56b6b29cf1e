"""What a file may hold under which key: checkpoints come from anywhere, so they are looked at when read."""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Test = Callable[[Any], bool]


class Form(NamedTuple):
    """A test of a value, and what passes it is called."""

    fits: Test
    what: str


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= -1


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def list_of(test: Test, length: int | None = None) -> Test:
    def fits(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == (length or len(value))
            and all(map(test, value))
        )

    return fits


def dict_of(test: Test) -> Test:
    return lambda value: (
        isinstance(value, dict) and all(map(is_text, value)) and all(map(test, value.values()))
    )


def is_config(value: Any) -> bool:
    """How images become model input, see datasets.DATA_CONFIG."""
    tests = {"mean": list_of(is_number, 3), "std": list_of(lambda v: is_number(v) and v > 0, 3)}
    tests |= {"crop_pct": lambda v: is_number(v) and 0 < v <= 1, "interpolation": is_text}
    return isinstance(value, dict) and all(name in tests and tests[name](value[name]) for name in value)


def is_table(value: Any) -> bool:
    """Rows of numbers, all of one length."""
    return list_of(list_of(is_number))(value) and len({len(row) for row in value}) == 1


STATE = Form(dict_of(lambda value: isinstance(value, Tensor)), "a state dict of tensors")
NUMBERS = Form(lambda value: list_of(is_number)(value) and len(value) > 0, "a list of numbers")
RESULTS = {
    "flops": NUMBERS,
    "anytime_classification": NUMBERS,
    "budgeted_batch_classification": Form(
        lambda value: is_table(value) and len(value) == 2 and len(value[0]) > 0,
        "two lists of as many numbers",
    ),
    "dynamic_threshold": Form(is_table, "rows of numbers of one length"),
}
CHECKPOINT = {
    "model": STATE,
    "model_ema": STATE,
    "model_name": Form(is_text, "a name"),
    "model_kwargs": Form(dict_of(lambda value: True), "arguments by name"),
    "class_names": Form(list_of(is_text), "a list of names"),
    "data_config": Form(is_config, "mean, std, crop_pct and interpolation"),
    "epoch": Form(is_count, "a whole number from -1 up"),
    "best": Form(is_number, "a number"),
    "args": Form(lambda value: isinstance(value, (dict, argparse.Namespace)), "arguments by name"),
}


def check(values: dict[str, Any], forms: dict[str, Form], source: str) -> None:
    """Raises ValueError for the first value, None apart, that has not the form of its key."""
    for name, form in forms.items():
        value = values.get(name)
        if value is not None and not form.fits(value):
            raise ValueError(f"{source}: {name} is {shown(value)}, not {form.what}")


def shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def test_of(action: argparse.Action) -> Test:
    """What the values of a flag have in common."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return is_text if isinstance(action.const, str) else lambda value: isinstance(value, bool)
    one: Test = is_text
    if action.choices:
        one = action.choices.__contains__
    elif action.type in (int, float):
        one = is_number
    elif action.type not in (None, str):  # what a function makes of a text
        return lambda value: is_text(value) or list_of(is_count)(value)
    if isinstance(action.nargs, int):
        return list_of(one, action.nargs)
    return list_of(one) if action.nargs in ("*", "+") else one


def alike(value: Any, own: Any) -> bool:
    """Whether a saved option of an optimizer is of its kind."""
    if isinstance(own, (list, tuple)):
        return list_of(is_number, len(own))(value)
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    return is_number(value) if is_number(own) else type(value) is type(own)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads an optimizer's state; TypeError where it would only fail in its next step."""
    own = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, before in zip(optimizer.param_groups, own, strict=True):
        for name, value in before.items():
            if name != "params" and not alike(group.get(name, "nothing"), value):
                raise TypeError(f"its optimizer's {name} is {shown(group.get(name))}")
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise TypeError(f"its optimizer's {name} has the shape {list(value.shape)}")
            if not isinstance(value, Tensor) and not is_number(value):
                raise TypeError(f"its optimizer's {name} is {shown(value)}")


@contextmanager
def damage_told(source: str) -> Iterator[None]:
    """Turns what broken state of optimizers, generators and the like raises into a ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{source}: its training state is damaged ({type(error).__name__}: {error})"
        ) from error


def check_arguments(parser: argparse.ArgumentParser, values: dict[str, Any], source: str) -> None:
    """Raises ValueError where a saved argument is none that the command line could have given."""
    for action in parser._actions:
        value = values.get(action.dest)
        whole = action.type is int and isinstance(value, float)
        if value is not None and (whole or not test_of(action)(value)):
            raise ValueError(f"{source}: its argument {action.dest} is {shown(value)}, which no flag gives")
