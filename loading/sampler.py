"""Order the samples of an epoch, from any place in it on, and seed the random numbers of each sample.

Order and numbers follow from the seed, the epoch and the place in it alone. So an interrupted epoch goes on
as if nothing had happened, with any number of loading processes.
"""

import os
import random
import signal
from collections.abc import Iterator
from itertools import islice
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class SampleIndex(int):
    """Index of a sample in the data set, with its place in the run.

    Attributes:
        place: the epoch, and the sample's number in the epoch over all processes.
    """

    place: tuple[int, int]


class ResumableSampler(Sampler):
    """Yield one process's samples of an epoch, as `SampleIndex`, from any sample on.

    Args:
        sampler: gives each process every world_size-th sample of an epoch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, sampler: Sampler, rank: int, world_size: int):
        self.sampler, self.rank, self.world_size, self.epoch, self.start = sampler, rank, world_size, 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin an epoch at this process's sample number `start`."""
        self.sampler.set_epoch(epoch)
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Count the samples of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[SampleIndex]:
        for number, index in enumerate(self.sampler):
            if number >= self.start:
                index = SampleIndex(index)
                index.place = self.epoch, number * self.world_size + self.rank
                yield index


class SeededDataset(Dataset):
    """Seed all random generators for every sample, and restore their states after it.

    Args:
        dataset: the samples.
        seed: of the run; a sample's own seeds follow from it and from `SampleIndex.place`.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SampleIndex) -> Any:
        seeds = np.random.SeedSequence([self.seed, *index.place]).generate_state(3)
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would also seed the GPUs
        try:
            return self.dataset[int(index)]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def names_of_batch(loader: DataLoader, step: int) -> list[str]:
    """Return the files of this process's batch number `step` of an epoch.

    Where the data set has no files, samples are named by their indices.
    """
    dataset = loader.dataset
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    samples = getattr(getattr(dataset, "folder", dataset), "samples", None)
    first = step * loader.batch_size - getattr(loader.sampler, "start", 0)
    indices = islice(loader.sampler, first, first + loader.batch_size)
    return [str(samples[index][0]) if samples else f"sample {index}" for index in indices]


def ignore_signals(worker: int) -> None:
    """Make a loading process ignore signals that the whole job gets: its parent decides when to stop.

    The process still ends when its parent dies, which it notices, or terminates it, as at a program's end.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=exit_on_sigterm, args=(os.getppid(),), daemon=True).start()


def exit_on_sigterm(parent: int) -> None:
    """End this process when its parent, and no other process, sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
