"""Command-line flags of the models: those that methods declare, and KEY=VALUE for every other argument."""

import argparse
import ast
import json
from typing import Any

from models.registry import classes
from models.vit import Flag
from utils import InputError


def declared_flags() -> list[Flag]:
    """Return the flags of all registered methods, each once.

    Raises:
        RuntimeError: two methods mean different things by one name.
    """
    flags = list(dict.fromkeys(flag for cls in classes() for flag in cls.flags))
    names = [name for flag in flags for name in flag.spellings]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RuntimeError(f"several methods declare {', '.join(sorted(twice))}, and not alike")
    return flags


def add_model_flags(parser: argparse._ActionsContainer, training: bool = False) -> None:
    """Add --model and everything that changes how a model is built.

    Args:
        parser: or a group of one.
        training: also those flags that training alone reads.
    """
    add = parser.add_argument
    add("--model", metavar="NAME", help="registered model; default: the one the checkpoint names")
    side = "side of the images in pixels, for models that do not derive it"
    add("--input-size", "--img-size", dest="img_size", type=int, help=side)
    for flag in declared_flags():
        if training or not flag.training:
            flag.add_to(parser)
    further = "further constructor arguments of the model"
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help=further)


def add_use_ema(parser: argparse._ActionsContainer) -> None:
    """Add --use-ema, see `checkpointing.format.chosen_weights`."""
    text = "take the averaged weights, or the others; default: those that the best epoch was chosen by"
    parser.add_argument("--use-ema", action=argparse.BooleanOptionalAction, help=text)


def constructor_kwargs(values: dict[str, Any], epochs: float | None = None) -> dict[str, Any]:
    """Return the constructor arguments that were given on a command line.

    Args:
        values: what a parser with `add_model_flags` made of it.
        epochs: of the training run, where it is one.
    """
    kwargs = {} if values["img_size"] is None else {"img_size": values["img_size"]}
    for flag in declared_flags():
        if (value := values.get(flag.words[0])) is not None:
            kwargs[flag.target] = value * epochs if flag.epochs else value
    return kwargs | key_values("--model-kwargs", values["model_kwargs"])


def key_values(flag: str, pairs: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE arguments; a value is spelt as in JSON or Python, or else is a string.

    `models.registry.check_types` then refuses a string where the constructor wants something else.

    Raises:
        InputError: an argument is of another form, or there twice.
    """
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"{flag} takes KEY=VALUE, not {pair!r}")
        if key in arguments:
            raise InputError(f"{flag} has {key} twice")
        arguments[key] = read_value(text)
    return arguments


def read_value(text: str) -> Any:
    """Return a value that is spelt as in JSON or Python, and any other text as it is."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
