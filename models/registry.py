"""Models by name: one way to register them with timm, and what is known of a name without building it."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from timm.models import register_model

from models.vit import NANO, Adaptive, AdaptiveViT, init_weights
from utils import InputError

registered: dict[str, tuple[type[Adaptive], dict[str, Any]]] = {}  # name -> class and recipe
reducers: dict[str, type[AdaptiveViT]] = {}  # classes whose `reduce` other models may take over
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
    if reducer := kwargs.pop("reducer", None):
        cls = with_reducer(cls, reducer)
    try:
        return init_weights(cls(**(defaults | kwargs)))
    except TypeError as error:
        raise InputError(f"{cls.__name__}: {str(error).split('__init__() ')[-1]}") from error


def register_reducer(name: str, cls: type[AdaptiveViT]) -> None:
    """Offer a class's `reduce` to other models, as their argument reducer=name."""
    reducers[name] = cls


@cache
def with_reducer(cls: type[AdaptiveViT], name: str) -> type[AdaptiveViT]:
    """Return a class of models whose blocks drop or merge tokens as another method's do.

    Raises:
        InputError: there is no such reducer, or the class runs its blocks in a way of its own.
    """
    if name not in reducers:
        raise InputError(f"reducer is {name!r}: take one of {', '.join(sorted(reducers))}")
    if issubclass(reducers[name], cls):
        return reducers[name]
    if cls.run is not AdaptiveViT.run or cls.reduce is not AdaptiveViT.reduce:
        raise InputError(f"{cls.__name__} takes no reducer: it drops or merges tokens itself")
    return type(f"{cls.__name__}With{reducers[name].__name__}", (cls, reducers[name]), {})


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
