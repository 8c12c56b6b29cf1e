"""Importing this package registers every model of the project with timm.create_model."""

from importlib import import_module
from pkgutil import iter_modules

from models.registry import recipe_of
from models.vit import Adaptive, AdaptiveViT, Knob, Picture, StageOutput

__all__ = ["Adaptive", "AdaptiveViT", "Knob", "Picture", "StageOutput", "recipe_of"]

for module in iter_modules(__path__):
    import_module(f"models.{module.name}")
