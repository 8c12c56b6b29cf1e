"""Models by name, and the weights of files in them."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.registry import registered
from models.vit import Adaptive, StageOutput
from utils import InputError, values_given

log = logging.getLogger("adaptive-vit")
# From the path of a published file to `model_name` and `model_kwargs`, as far as its name tells them.
file_name_readers: list[Callable[[Path], dict[str, Any]]] = []


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


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly.

    Raises:
        InputError: names or shapes differ, as for a checkpoint of another model or stage size.
    """
    own = model.state_dict()
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
    """
    if name not in registered:
        return {}
    stored, kwargs = checkpoint.get("args") or {}, {}
    stored = stored if isinstance(stored, dict) else vars(stored)
    flags = [flag for flag in registered[name][0].flags if not flag.training]
    for flag in flags:
        for word in flag.words:
            if (value := stored.get(word)) is not None:
                kwargs[flag.target] = flag.type(value) if isinstance(value, str) else value
    arguments = {flag.target for flag in flags}
    for reader in file_name_readers:
        from_name = reader(Path(source)).get("model_kwargs", {})
        kwargs |= {key: value for key, value in from_name.items() if key in arguments}
    return kwargs


def model_from_checkpoint(
    checkpoint: dict[str, Any], source: str, name: str | None, kwargs: dict[str, Any], use_ema: bool = False
) -> tuple[Adaptive, str, dict[str, Any]]:
    """Build the model that a checkpoint was made with and load its weights.

    Args:
        checkpoint: from `load_checkpoint`.
        source: the file's name, for messages.
        name: --model; needed for foreign files, which do not say.
        kwargs: constructor arguments from the command line; they win over the saved ones.
        use_ema: take the averaged weights.

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
    weights = checkpoint.get("model_ema") if use_ema else checkpoint["model"]
    if weights is None:
        raise InputError(f"{source} holds no averaged weights (model_ema); leave --use-ema out")
    if "model_kwargs" in checkpoint:
        kwargs = checkpoint["model_kwargs"] | kwargs
    else:
        kwargs = published_kwargs(name or saved, checkpoint, source) | kwargs
    heads = [value for key, value in weights.items() if key == "head.weight" or key.endswith(".head.weight")]
    if heads:
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
        InputError: no tensor of the file fits.
    """
    state = model.adapt_state_dict(state)
    own = model.state_dict()
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if not fits:
        raise InputError(f"{source}: none of its {len(state)} tensors fits the model")
    model.load_state_dict(fits, strict=False)
    log.info("initialised %d of %d tensors from %s", len(fits), len(own), source)
    for what, names in (("as initialised", own.keys() - fits), ("not used", state.keys() - fits)):
        if names:
            log.info("%s: %s", what, ", ".join(sorted(names)))
