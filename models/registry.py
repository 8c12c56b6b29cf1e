"""Models by name: one way to register them with timm, and what is known of a name without building it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_type_hints

from timm.models import register_model

from checkpointing.schema import fits, kind_name, shown
from models.vit import NANO, Adaptive, AdaptiveViT, init_weights
from utils import InputError

registered: dict[str, tuple[type[Adaptive], dict[str, Any]]] = {}  # name -> class and recipe
TIMM_OPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what timm.create_model adds

Make = Callable[[dict[str, Any], dict[str, Any]], Adaptive]  # from defaults and the caller's arguments


def build(cls: type[AdaptiveViT], defaults: dict[str, Any], kwargs: dict[str, Any]) -> AdaptiveViT:
    """Build and initialise a model from a name's defaults, overridden by the caller's arguments.

    Raises:
        InputError: pretrained weights are asked for (none are hosted), or an argument is not the model's.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in TIMM_OPTIONS}
    if kwargs.pop("pretrained", False):
        raise InputError("no weights are hosted for this model: load a file with --finetune or --resume")
    check_types(cls, kwargs)
    try:
        return init_weights(cls(**(defaults | kwargs)))
    except TypeError as error:
        raise InputError(f"{cls.__name__}: {str(error).split('__init__() ')[-1]}") from error


def check_types(cls: type, kwargs: dict[str, Any]) -> None:
    """Check the arguments of a constructor, and of those of its bases, against their annotations.

    Raises:
        InputError: one is of another type, as a text where a bool is wanted.
    """
    kinds: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        kinds |= get_type_hints(vars(base)["__init__"]) if "__init__" in vars(base) else {}
    for name, value in kwargs.items():
        if name in kinds and not fits(value, kinds[name]):
            raise InputError(f"{cls.__name__}: {name} is {shown(value)}, not {kind_name(kinds[name])}")


def register(
    names: str,
    cls: type[Adaptive],
    text: str,
    make: Make | None = None,
    recipe: dict[str, Any] | None = None,
    **defaults: Any,
) -> None:
    """Register a model with timm under a name and its aliases.

    Args:
        names: separated by spaces; the first is the one that lists show.
        cls: its class, whose flags, recipe and knobs are the model's.
        text: what it is, in one line.
        make: builds it; default: `build` of the class.
        recipe: training options of this size; default: the class's own.
        defaults: constructor arguments.
    """
    make = make or partial(build, cls)
    recipe = cls.recipe if recipe is None else recipe

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Adaptive:
        model = make(defaults, {"pretrained": pretrained, **kwargs})
        model.recipe = recipe
        return model

    entrypoint.__doc__, entrypoint.__module__ = text, cls.__module__
    for name in names.split():
        entrypoint.__name__ = name  # the name that timm takes
        register_model(entrypoint)
        registered[name] = cls, recipe


def recipe_of(name: str | None) -> dict[str, Any]:
    """Return the training options that a registered model wants, {} for any other name."""
    return registered[name][1] if name in registered else {}


def classes() -> Iterator[type[Adaptive]]:
    """Yield every registered class once."""
    yield from dict.fromkeys(cls for cls, _ in registered.values())


register("deit_nano", AdaptiveViT, "Plain DeiT at the size of the embedded data set.", **NANO, img_size=56)
