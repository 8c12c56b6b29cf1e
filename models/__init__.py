"""Importing this package registers every model of the project with timm.create_model."""

from models import lf_vit, vit
from models.vit import Adaptive, AdaptiveViT, StageOutput

__all__ = ["Adaptive", "AdaptiveViT", "StageOutput", "lf_vit", "vit"]
