"""Who sees which images in which batch; loaders whose last steps run on the device."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate
from torchvision.transforms.functional import normalize

from loading.images import BadImageError, BadImages
from loading.sampler import Drawn, Order, ignore_signals

log = logging.getLogger("adaptive-vit")
AS_BYTES = dict(use_prefetcher=True)  # timm's name for a transform that ends before normalisation


class Shard(Subset):
    """Every world-th sample from `rank` on: over all processes each sample once, without padding.

    A sample is None where its image cannot be read: `bad`, a BadImages, knows which.
    """

    def __init__(
        self,
        dataset: Dataset,
        rank: int = 0,
        world: int = 1,
        max_bad: int = 0,
        bad_list: Path | None = None,
    ):
        super().__init__(dataset, range(rank, len(dataset), world))
        self.rank, self.world, self.total = rank, world, len(dataset)
        self.bad = BadImages(self.total, max_bad, bad_list)

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except BadImageError as error:
            self.bad.add(self.indices[index], error)
            return None

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def read(self) -> torch.Tensor:
        """Numbers, in the data set, of this process's images so far, less those that cannot be read."""
        return self.bad.read(self.rank, self.world)


def readable(shard: Shard, indices: Iterable[int]) -> list[int]:
    """Those of a shard's samples whose image can be read; BadImageError if there are none."""
    found = [index for index in indices if shard[index] is not None]
    if not found:
        raise BadImageError(f"none of the images can be read{shard.bad.where()}")
    return found


class EvalLoader(DataLoader):
    """Leaves out images that cannot be read: batches become smaller, and one of no images is skipped."""

    def __init__(self, shard: Shard, *args: Any, **kwargs: Any):
        super().__init__(shard, *args, collate_fn=collate_read, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__() if batch is not None)


def collate_read(samples: list[Any]) -> Any:
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else None


def eval_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    max_bad: int = 0,
    bad_list: Path | None = None,
    **kwargs: Any,
) -> DataLoader:
    """Loader over this process's shard, in order; see images.BadImages for the limit and the list."""
    shard = Shard(dataset, rank, world, max_bad, bad_list)
    return EvalLoader(
        shard,
        batch_size,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # evaluation draws nothing from the training's generator
        **kwargs,
    )


def train_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    repeats: int = 1,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    **kwargs,
) -> DataLoader:
    """Shuffled loader of full batches, smaller ones where the data set does not fill a single one.

    Call `loader.sampler.set_epoch` every epoch. The random numbers of a sample follow from the seed, the
    epoch and the sample's place in the order over all processes, whichever process loads it.

    Args:
        repeats: repeated augmentation (Hoffer et al. 2020): copies of an image per epoch, on different
            processes; the number of samples per epoch stays that of the data set.
        seed: of the order, which repeated augmentation takes from the epoch alone.
    """
    if repeats > 1:
        sampler = RepeatAugSampler(dataset, world, rank, num_repeats=repeats)
    else:
        sampler = DistributedSampler(dataset, world, rank, seed=seed)
    sampler = Order(sampler, rank, world)
    if len(sampler) < batch_size:
        smaller = max(len(sampler) // 2 * 2, 1)  # even, for mixup's pairs
        log.info("only %d training images per process: batches of %d", len(sampler), smaller)
        batch_size = smaller
    return DataLoader(
        Drawn(dataset, seed),
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the loader's own draws leave the training's generator alone
        **kwargs,
    )


def to_device(batch: Iterable[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Moves a batch, without waiting where memory is pinned."""
    return [tensor.to(device, non_blocking=True) for tensor in batch]


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
