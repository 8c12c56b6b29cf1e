"""Importing this package registers every model of the project with timm.create_model."""

from typing import Any

import timm
import torch

from models import a_vit, cf_vit, dvt, evit, lf_vit, lv_vit, t2t, vit
from models.vit import Adaptive, AdaptiveViT, StageOutput

__all__ = [
    "Adaptive",
    "AdaptiveViT",
    "StageOutput",
    "a_vit",
    "cf_vit",
    "dvt",
    "evit",
    "lf_vit",
    "lv_vit",
    "recipe_of",
    "t2t",
    "vit",
]


def recipe_of(name: str) -> dict[str, Any]:
    """Training options that a registered model wants, {} for an unknown name."""
    if not timm.is_model(name):
        return {}
    with torch.device("meta"):  # no weights are made
        return getattr(timm.create_model(name), "recipe", {})
