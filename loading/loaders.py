"""Share images out over processes and load them in batches, whose last steps may run on the device."""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate

from loading.images import BadImageError, BadImages
from loading.sampler import ResumableSampler, SeededDataset, ignore_signals

log = logging.getLogger("adaptive-vit")
AS_BYTES = dict(use_prefetcher=True)  # timm's name for a transform that ends before normalisation


class Shard(Subset):
    """Every world_size-th sample from `rank` on: over all processes each sample once, without padding.

    A sample is None where its image cannot be read; `bad` lists these.

    Args:
        dataset: all samples.
        rank: of this process.
        world_size: number of processes.
        max_bad: see images.BadImages.
        bad_list: see images.BadImages.
    """

    def __init__(
        self,
        dataset: Dataset,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int = 0,
        bad_list: Path | None = None,
    ):
        super().__init__(dataset, range(rank, len(dataset), world_size))
        self.rank, self.world_size, self.total = rank, world_size, len(dataset)
        self.bad = BadImages(self.total, max_bad, bad_list)

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except BadImageError as error:
            self.bad.add(self.indices[index], error)
            return None

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def read(self) -> Tensor:
        """Return the numbers, in the data set, of this process's images less those that cannot be read."""
        return self.bad.read(self.rank, self.world_size)


def readable(shard: Shard, indices: Iterable[int]) -> list[int]:
    """Return those of a shard's samples whose image can be read; BadImageError if there are none."""
    good = [index for index in indices if shard[index] is not None]
    if not good:
        raise BadImageError(f"none of the images can be read{shard.bad.where()}")
    return good


class EvalLoader(DataLoader):
    """Load a shard in order, without the images that cannot be read.

    Such images make batches smaller; a batch without any image is skipped.

    Args:
        shard: this process's samples.
        batch_size: images per batch.
        kwargs: further arguments of DataLoader.
    """

    def __init__(self, shard: Shard, batch_size: int, **kwargs: Any):
        super().__init__(
            shard,
            batch_size,
            collate_fn=collate_readable,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # evaluation draws nothing from the training's generator
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__() if batch is not None)


def collate_readable(samples: list[Any]) -> Any:
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else None


def train_loader(
    dataset: Dataset,
    batch_size: int,
    repeats: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> DataLoader:
    """Make a shuffled loader of full batches, smaller ones where the data set does not fill a single one.

    Call `loader.sampler.set_epoch` every epoch. The random numbers of a sample follow from the seed, the
    epoch and the sample's place in the order over all processes, whichever process loads it.

    Args:
        dataset: all samples.
        batch_size: images per batch of this process.
        repeats: repeated augmentation (Hoffer et al. 2020): copies of an image per epoch, on different
            processes; the number of samples per epoch stays that of the data set.
        rank: of this process.
        world_size: number of processes.
        seed: of the order, which repeated augmentation takes from the epoch alone.
        kwargs: further arguments of DataLoader.
    """
    if repeats > 1:
        sampler = RepeatAugSampler(dataset, world_size, rank, num_repeats=repeats)
    else:
        sampler = DistributedSampler(dataset, world_size, rank, seed=seed)
    sampler = ResumableSampler(sampler, rank, world_size)
    if len(sampler) < batch_size:
        smaller = max(len(sampler) // 2 * 2, 1)  # even, for mixup's pairs
        log.info("only %d training images per process: batches of %d", len(sampler), smaller)
        batch_size = smaller
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_size,
        sampler=sampler,
        drop_last=True,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the loader's own draws leave the training's generator alone
        **kwargs,
    )


def to_device(batch: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Move a batch, without waiting where memory is pinned."""
    return [tensor.to(device, non_blocking=True) for tensor in batch]


class Tensors(tuple):
    """Tensors that move together, as PrefetchLoader moves one target."""

    def to(self, **kwargs: Any) -> "Tensors":
        return Tensors(tensor.to(**kwargs) for tensor in self)


class DeviceLoader:
    """Copy the next batch to the device, on a stream of its own, while the model works on this one.

    Images may come as bytes, a quarter of what floats take, and are then normalised on the device. The
    numbers are those of a transform that normalises, up to float rounding. Erasing draws its boxes and pixels
    as timm's transform does, but in this process; it is not left to PrefetchLoader, which would draw for the
    next batch before a checkpoint after this one stores the generators' states.

    Attributes of the loader can be read here.

    Args:
        loader: its batches start with images [B,3,S,S], uint8 from a transform made with AS_BYTES, or float32
            where there is no `config`.
        device: where batches go.
        config: `mean` and `std` of the channels; other keys are not read. None leaves values as they are.
        re_prob, re_mode, re_count: of random erasing, as timm.data.create_transform takes them.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        config: dict[str, Any] | None = None,
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
    ):
        self.loader, self.device = loader, device
        config = config or {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # which PrefetchLoader takes times 255
        self.prefetcher = PrefetchLoader(loader, config["mean"], config["std"], device=device)
        self.erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device=device)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[list[Tensor]]:
        batches = iter(self.loader)
        for first in batches:  # timm's earlier versions take no empty loader
            self.prefetcher.loader = ((images, Tensors(rest)) for images, *rest in chain([first], batches))
            for images, rest in self.prefetcher:
                for tensor in (images, *rest) if self.device.type == "cuda" else ():
                    # Its memory, of the other stream, must not be used again before this stream is done.
                    tensor.record_stream(torch.cuda.current_stream(self.device))
                yield [self.erase(images) if self.erase.probability else images, *rest]


def prefetched(loader: DataLoader, device: torch.device) -> "DataLoader | DeviceLoader":
    """Return a loader whose batches go to a CUDA device ahead of time; on other devices the loader itself."""
    return DeviceLoader(loader, device) if device.type == "cuda" else loader
