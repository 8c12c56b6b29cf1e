"""Models by name, and the weights of files in them."""

import argparse
import logging
import re
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from checkpointing.format import chosen_weights
from models.flags import read_value
from models.registry import registered
from models.vit import Adaptive, StageOutput
from utils import InputError, values_given

log = logging.getLogger("adaptive-vit")
# From the path of a published file to `model_name` and `model_kwargs`, as far as its name tells them.
file_name_readers: list[Callable[[Path], dict[str, Any]]] = []
WRAPPER = re.compile(r"(?:model|backbone|encoder|module|_orig_mod)\.")  # what others put before our names
LEAST_SHARE = 0.5  # of a model's parameters that weights to start from have to hold


def create_model(name: str | None, kwargs: dict[str, Any]) -> Adaptive:
    """Build a model by name, with one line of error for what timm does not know or does not take."""
    if not name:
        raise InputError("no model given: name one with --model")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise InputError(f"unknown model {name!r}" + (f"; there are {close}" if close else ""))
    if name not in registered:
        raise InputError(f"{name} is a plain timm model: it can be a --baseline, no more")
    return any_model(name, kwargs)


def any_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a model of this project or of timm; InputError for arguments that it does not take."""
    if name in registered:
        return timm.model_entrypoint(name)(**kwargs)
    # Without arguments there is nothing of the user's that a model of timm could refuse.
    given = ", ".join(f"{key}={value}" for key, value in kwargs.items())
    with values_given(f"{name} with {given}") if kwargs else nullcontext():
        return timm.create_model(name, **kwargs)


class OneStage(Adaptive):
    """Wrap any classifier of timm as a model with one exit."""

    def __init__(self, model: nn.Module, img_size: int):
        super().__init__()
        self.model, self.img_size, self.num_classes = model, img_size, model.num_classes

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        return StageOutput(self.model(images), {})


def baseline_model(
    name: str, num_classes: int | None = None, img_size: int | None = None, **kwargs: Any
) -> Adaptive:
    """Build an untrained model to compare speed with, of this project or of timm, in evaluation mode.

    Args:
        name: registered model.
        num_classes: default: the model's own.
        img_size: side of the images in pixels; default: the model's own.
        kwargs: further constructor arguments.

    Raises:
        InputError: there is no such model, or it does not take images of this size or the arguments.
    """
    if not timm.is_model(name):
        raise InputError(f"unknown model {name!r}")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        model = any_model(name, kwargs if img_size is None else kwargs | {"img_size": img_size})
    except InputError:  # a network that takes any size, or derives its own
        model = any_model(name, kwargs)
    if not isinstance(model, Adaptive):
        side = img_size or kwargs.get("img_size", model.pretrained_cfg["input_size"][-1])
        model = OneStage(model, side).eval()
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"{name} takes no images of {side} pixels ({error})") from error
    if img_size not in (None, model.img_size):
        raise InputError(f"{name} takes images of {model.img_size} pixels, not {img_size}")
    return model.eval()


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast, once, the weights that autocast to this type casts at every call: of linear maps, convolutions.

    Outputs under autocast stay what they are. So all other parameters keep their type, as do modules that
    compute without autocast, whose class says `float32_only = True`.
    """
    if getattr(module, "float32_only", False):
        return
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        module.to(dtype)
    for child in module.children():
        cast_weights(child, dtype)


def unwrapped(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without what a wrapper, such as Lightning's, has put before the model's names.

    Args:
        state: any names.
        own: names of the model, or of a part of it.
    """
    prefixes = {"": 0}
    for name in state:
        at = 0
        while match := WRAPPER.match(name, at):
            prefixes[name[: (at := match.end())]] = 0
    for prefix in prefixes:
        inner = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        prefixes[prefix] = len(set(inner) & set(own))
    prefix = max(prefixes, key=prefixes.__getitem__)
    outer = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return outer | {name.removeprefix(prefix): state[name] for name in state if name not in outer}


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly, but for what a wrapper has put before all names.

    Raises:
        InputError: names or shapes differ, as for a checkpoint of another model or stage size.
    """
    own = model.state_dict()
    state = unwrapped(state, own)
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if shapes:
        name = shapes[0]
        theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
        raise InputError(
            f"{source} does not fit the model: {name} is {theirs} there and {ours} here"
            f" ({len(shapes)} such tensors); check --model, its stage size and the number of classes"
        )
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        parts = [f"lacks {len(missing)} tensors ({missing[0]}, ...)"] if missing else []
        parts += [f"has {len(unknown)} unknown ones ({unknown[0]}, ...)"] if unknown else []
        raise InputError(f"{source} is of another model: it {' and '.join(parts)}")
    model.load_state_dict(state)


def published_name(source: str | Path) -> str | None:
    """Return the model that the name of a published file tells, if it does."""
    names = [reader(Path(source)).get("model_name") for reader in file_name_readers]
    return next(filter(None, names), None)


def published_kwargs(name: str | None, checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments that a published file tells by its command line or by its name.

    The file's name wins: it tells what was trained.

    Raises:
        InputError: the command line holds what a flag does not take.
    """
    if name not in registered:
        return {}
    stored, kwargs = checkpoint.get("args") or {}, {}
    stored = stored if isinstance(stored, dict) else vars(stored)
    flags = [flag for flag in registered[name][0].flags if not flag.training]
    for flag in flags:
        for word in flag.words:
            if (value := stored.get(word)) is None:
                continue
            try:
                read = read_value if flag.type is bool else flag.type  # bool("False") is true
                kwargs[flag.target] = read(value) if isinstance(value, str) else value
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise InputError(f"{source}: its argument {word} is {value!r}") from error
    arguments = {flag.target for flag in flags}
    for reader in file_name_readers:
        from_name = reader(Path(source)).get("model_kwargs", {})
        kwargs |= {key: value for key, value in from_name.items() if key in arguments}
    return kwargs


def inherited_kwargs(name: str | None, checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments that weights to start from bring along for a model, and log them.

    Those of training alone and the number of classes are not of them, and another method takes none.
    """
    saved = checkpoint.get("model_name")
    if "model_kwargs" not in checkpoint:
        kwargs = published_kwargs(name, checkpoint, source)
    elif name in registered and saved in registered and registered[name][0] is registered[saved][0]:
        training = {flag.target for flag in registered[name][0].flags if flag.training} | {"num_classes"}
        kwargs = {key: value for key, value in checkpoint["model_kwargs"].items() if key not in training}
    else:
        log.info("%s is of %s: its arguments are not taken over for %s", source, saved, name)
        kwargs = {}
    if kwargs:
        texts = [f"{key} {value}" for key, value in sorted(kwargs.items())]
        log.info("from %s, where no flag says otherwise: %s", source, ", ".join(texts))
    return kwargs


def model_from_checkpoint(
    checkpoint: dict[str, Any],
    source: str,
    name: str | None,
    kwargs: dict[str, Any],
    use_ema: bool | None = None,
) -> tuple[Adaptive, str, dict[str, Any]]:
    """Build the model that a checkpoint was made with and load its weights.

    Args:
        checkpoint: from `load_checkpoint`.
        source: the file's name, for messages.
        name: --model; needed for foreign files, which do not say.
        kwargs: constructor arguments from the command line; they win over the saved ones.
        use_ema: see `chosen_weights`.

    Returns:
        The model, its name and its constructor arguments.

    Raises:
        InputError: the checkpoint is of another model or lacks what was asked for.
    """
    saved = checkpoint.get("model_name")
    if name and saved and name != saved:
        raise InputError(
            f"{source} is a checkpoint of {saved}, not of {name}; leave --model out or name {saved}"
        )
    weights = checkpoint[chosen_weights(checkpoint, use_ema, source)]
    if "model_kwargs" in checkpoint:
        kwargs = checkpoint["model_kwargs"] | kwargs
    else:
        kwargs = published_kwargs(name or saved, checkpoint, source) | kwargs
    heads = [value for key, value in weights.items() if key == "head.weight" or key.endswith(".head.weight")]
    if heads and heads[0].ndim:
        kwargs.setdefault("num_classes", len(heads[0]))
    model = create_model(name or saved, kwargs)
    load_weights(model, weights, source)
    names = checkpoint.get("class_names")
    if names and len(names) != model.num_classes:
        raise InputError(f"{source} names {len(names)} classes and its model has {model.num_classes}")
    return model, name or saved, kwargs


def initialise_from(model: Adaptive, state: dict[str, Tensor], source: str) -> None:
    """Start a model from the weights of a timm, DeiT or own checkpoint, and name what was not loaded.

    Raises:
        InputError: less than `LEAST_SHARE` of the model's parameters would come from the file, heads for
            another number of classes left aside.
    """
    own = model.state_dict()
    parts = {name.split(".", 1)[1] for name in own if "." in name}  # a plain model may start each of several
    state = model.adapt_state_dict(unwrapped(state, own.keys() | parts))
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    heads = {
        name
        for name in (own.keys() & state.keys()) - fits.keys()
        if own[name].shape[1:] == state[name].shape[1:] and own[name].shape[:1] == (model.num_classes,)
    }
    size = sum(own[name].numel() for name in own if name not in heads)
    share = sum(value.numel() for value in fits.values()) / max(size, 1)
    if share < LEAST_SHARE:
        raise InputError(
            f"{source} fits {100 * share:.0f} % of the model's parameters, {len(fits)} of {len(own)} tensors:"
            f" it is of another model or size (at least {100 * LEAST_SHARE:.0f} % are wanted)"
        )
    model.load_state_dict(fits, strict=False)
    log.info("initialised %d of %d tensors from %s", len(fits), len(own), source)
    for what, names in (("as initialised", own.keys() - fits), ("not used", state.keys() - fits)):
        if names:
            log.info("%s: %s", what, ", ".join(sorted(names)))
