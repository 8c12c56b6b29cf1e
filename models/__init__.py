"""Importing this package registers every model of the project with timm.create_model."""

from typing import Any

import timm
import torch

from models import cf_vit, evit, lf_vit, lv_vit, vit
from models.vit import Adaptive, AdaptiveViT, StageOutput

__all__ = ["Adaptive", "AdaptiveViT", "StageOutput", "cf_vit", "evit", "lf_vit", "lv_vit", "recipe_of", "vit"]


def recipe_of(name: str) -> dict[str, Any]:
    """Training options that a registered model wants, {} for an unknown name."""
    if not timm.is_model(name):
        return {}
    with torch.device("meta"):  # no weights are made
        return getattr(timm.create_model(name), "recipe", {})
