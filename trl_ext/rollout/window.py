"""The order of the prompts, which a resumed run continues."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """
    TRL's sampler, whose order depends on the epoch and not on how many epochs this process has iterated over.

    `RepeatSampler` draws the orders of all epochs from one generator. A run that resumes in the second epoch makes the
    sampler anew, so it gets the order of the first. This sampler draws the orders of the earlier epochs first; an
    uninterrupted run has TRL's orders.

    Args:
        sampler (`Sampler`):
            TRL's `RepeatSampler`.
        seed (`int`):
            Seed of its generator.
        epoch (`Callable`):
            Returns the number of the epoch that begins.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]):
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)
