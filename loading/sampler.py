"""Which samples a training process sees, from any place in the epoch on, and their random numbers.

Both follow from the seed, the epoch and the place alone, so that an interrupted epoch goes on as if nothing
had happened, with any number of loading processes.
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


class Index(int):
    """Number of a sample that knows its place in the run: epoch, and place in the order of the epoch."""

    place: tuple[int, int]


class Order(Sampler):
    """One process's samples of an epoch, as `Index`, from any sample on.

    Args:
        sampler: deals the samples of an epoch out to processes in turn.
    """

    def __init__(self, sampler: Sampler, rank: int, world: int):
        self.sampler, self.rank, self.world, self.epoch, self.start = sampler, rank, world, 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begins an epoch at this process's sample number `start`."""
        self.sampler.set_epoch(epoch)
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Samples of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Index]:
        for number, index in enumerate(self.sampler):
            if number >= self.start:
                index = Index(index)
                index.place = self.epoch, number * self.world + self.rank
                yield index


class Drawn(Dataset):
    """A data set whose samples, asked for by `Index`, have random numbers of their own."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Index) -> Any:
        numbers = np.random.SeedSequence([self.seed, *index.place]).generate_state(3)
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(int(numbers[0]))
        np.random.seed(numbers[1])
        torch.default_generator.manual_seed(int(numbers[2]))  # torch.manual_seed would also seed the GPUs
        try:
            return self.dataset[int(index)]
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_rng_state(kept[2])


def names_of_batch(loader: DataLoader, step: int) -> list[str]:
    """Files of this process's batch number `step` of an epoch, or numbers where the data set has no files."""
    dataset = loader.dataset
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    samples = getattr(getattr(dataset, "folder", dataset), "samples", None)
    first = step * loader.batch_size - getattr(loader.sampler, "start", 0)
    indices = islice(loader.sampler, first, first + loader.batch_size)
    return [str(samples[index][0]) if samples else f"sample {index}" for index in indices]


def ignore_signals(worker: int) -> None:
    """Lets a loading process live through signals to the whole job: its parent decides when to stop.

    It still ends when its parent dies, which it notices, or terminates it, as at the end of a program.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=obey, args=(os.getppid(),), daemon=True).start()


def obey(parent: int) -> None:
    """Ends this process when its parent, and nobody else, sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
