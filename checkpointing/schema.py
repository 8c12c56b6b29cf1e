"""What a file may hold under which key: checkpoints come from anywhere, so they are checked when read."""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor

from utils import InputError, Number

RESULTS: dict[str, Any] = {
    "flops": list[float],
    "anytime_classification": list[float],
    "budgeted_batch_classification": tuple[list[float], list[float]],
    "dynamic_threshold": list[list[float]],
}
STD = Number(float, 1e-6)
CHECKPOINT: dict[str, Any] = {
    "model": dict[str, Tensor],
    "model_ema": dict[str, Tensor],
    "model_name": str,
    "model_kwargs": dict[str, object],
    "best_weights": str,  # which of the weights the best epoch was chosen by
    "class_names": list[str],
    "data_config": {
        "mean": tuple[float, float, float],
        "std": tuple[STD, STD, STD],
        "crop_pct": Number(float, 0.01, 1),
        "interpolation": str,
    },
    "epoch": Number(int, -1),  # -1 before the first is complete
    "progress": {
        "step": Number(int, 0),
        "batches": Number(int, 0),
        "sums": dict[str, int | float],
        "skipped": Number(int, 0),
        "images": Number(int, 1),
    },
    "best": float,
    "best_by": str,
    "args": dict | argparse.Namespace,
}


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type such as dict[str, list[float]].

    Numbers are finite and no bool is one; a float may be whole. A list may be a tuple, it is not empty, and
    the lists in a list have one length; a Sequence may be empty.
    """
    base, inner = get_origin(kind) or kind, get_args(kind)
    if base in (UnionType, Union):
        return any(fits(value, one) for one in inner)
    if base in (Any, Literal):
        return base is Any or value in inner
    if base is Sequence:
        return isinstance(value, (list, tuple)) and (not value or fits(value, list[inner]))
    if isinstance(kind, Number):
        return fits(value, kind.kind) and kind.low <= value <= kind.high
    if base in (int, float):
        return isinstance(value, (int, base)) and not isinstance(value, bool) and abs(value) < math.inf
    if base in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        kinds = inner * len(value) if base is list else inner
        lengths = {len(item) for item in value if isinstance(item, (list, tuple))}
        return len(value) == len(kinds) > 0 and all(map(fits, value, kinds)) and len(lengths) <= 1
    if base is dict and inner:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    return isinstance(value, kind)


def check(values: dict[str, Any], kinds: dict[str, Any], source: str) -> None:
    """Check what is there of some keys; the kind of a nested dict is a dict of kinds.

    Raises:
        InputError: a value is not of the kind of its key.
    """
    for name in [name for name in kinds if name in values]:
        value, kind = values[name], kinds[name]
        nested, kind = (kind, dict[str, object]) if isinstance(kind, dict) else ({}, kind)
        if not fits(value, kind):
            raise InputError(f"{source}: {name} is {shown(value)}, not {kind_name(kind)}")
        check(value, nested, f"{source}: {name}")


def kind_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def shown(value: Any) -> str:
    """Return a value as one line, or its type where that would be long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def check_arguments(parser: argparse.ArgumentParser, values: dict[str, Any], source: str) -> None:
    """Check saved arguments: each, given to its flag, has to be what the parser makes of it.

    Args:
        parser: raises InputError for what it does not take; every argument has a flag of its own name.
        values: None stands for one that was not given.

    Raises:
        InputError: the command line cannot have given a value.
    """
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        ways = [[f"{flag}={value}"]]
        if isinstance(value, bool):
            ways = [[flag]] if value else [[], [f"--no-{flag[2:]}"]]
        elif isinstance(value, (list, tuple)):
            value = list(value)
            if not any(str(item).startswith(("-h", "--")) for item in value):  # not another flag
                ways.append([flag, *map(str, value)])
        if value is not None and not any(reads(parser, way, name, value) for way in ways):
            raise InputError(f"{source}: its argument {name} is {shown(value)}, which no flag gives")


def reads(parser: argparse.ArgumentParser, argv: list[str], name: str, value: Any) -> bool:
    """Return whether a parser reads this value of an argument from a command line."""
    try:
        parsed = getattr(parser.parse_args(argv), name)
    except InputError:
        return False
    return (list(parsed) if isinstance(parsed, tuple) else parsed) == value


@contextmanager
def damage_reported(source: str) -> Iterator[None]:
    """Turn what broken state of optimizers, generators and the like raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: its training state is damaged ({type(error).__name__}: {error})"
        ) from error
