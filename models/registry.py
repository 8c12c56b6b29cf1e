"""Models by name: one way to register them with timm, and what is known of a name without building it."""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, get_type_hints

from timm.models import register_model

from checkpointing.schema import fits, kind_name, shown
from models.vit import NANO, Adaptive, AdaptiveViT, init_weights
from utils import InputError

registered: dict[str, tuple[type[Adaptive], dict[str, Any]]] = {}  # name -> class and recipe
reducers: dict[str, type[AdaptiveViT]] = {}  # classes whose `reduce` other models may take over
TIMM_OPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what timm.create_model adds

Make = Callable[[dict[str, Any], dict[str, Any]], Adaptive]  # from defaults and the caller's arguments


def arguments(cls: type) -> list[str]:
    """Return the arguments of a constructor and, as far as it hands others on, those of its bases."""
    names: list[str] = []
    for init in [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]:
        parameters = list(inspect.signature(init).parameters.values())[1:]
        names += [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(dict.fromkeys(names))


def build(
    cls: type[AdaptiveViT], defaults: dict[str, Any], kwargs: dict[str, Any], **fixed: Any
) -> AdaptiveViT:
    """Build and initialise a model from a name's defaults, overridden by the caller's arguments.

    Args:
        cls: its class.
        defaults: of the name.
        kwargs: the caller's.
        fixed: arguments that are not the caller's to give.

    Raises:
        InputError: pretrained weights are asked for (none are hosted), or an argument is not the model's.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None or key not in TIMM_OPTIONS}
    if kwargs.pop("pretrained", False):
        raise InputError("no weights are hosted for this model: load a file with --finetune or --resume")
    if reducer := kwargs.pop("reducer", None):
        cls = with_reducer(cls, reducer)
    accepted = [name for name in arguments(cls) if name not in fixed]
    if unknown := [name for name in kwargs if name not in accepted]:
        raise InputError(f"{cls.__name__} takes no {', '.join(unknown)}, but {', '.join(accepted)}")
    check_types(cls, kwargs)
    try:
        return init_weights(cls(**(defaults | kwargs | fixed)))
    except TypeError as error:
        twice = re.search(r"multiple values for .*argument '(\w+)'", str(error))
        if twice and twice[1] in kwargs:  # the class hands its own value of it on to a base
            raise InputError(f"{cls.__name__}: {twice[1]} follows from its other arguments") from error
        raise


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
