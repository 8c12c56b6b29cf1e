"""Loaders whose last steps run on the device, where they cost nothing beside the model."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import normalize

from datasets import to_device

AS_BYTES = dict(use_prefetcher=True)  # timm's name for a transform that ends before normalisation


class OnDevice:
    """A loader of bytes, a quarter of what floats take to move, that become model input on the device.

    The numbers are those of a transform that normalises, up to float rounding on a GPU. Erasing draws its
    boxes and pixels as timm's transform does, but in this process and not in those that load.

    Attributes of the loader can be read here.

    Args:
        loader: its batches start with images [B,3,S,S] uint8, from a transform made with AS_BYTES.
        device: where batches go.
        config: `mean` and `std` of the channels; other keys are not read.
        re_prob, re_mode, re_count: of random erasing, as timm.data.create_transform takes them.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        config: dict[str, Any],
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
    ):
        self.loader, self.device, self.config = loader, device, config
        self.erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device=device)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.loader:
            images, *rest = to_device(batch, self.device)
            images = normalize(
                images.float().div_(255), self.config["mean"], self.config["std"], inplace=True
            )
            yield [self.erase(images) if self.erase.probability else images, *rest]
