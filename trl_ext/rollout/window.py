"""The order of the prompts, and the generation window: what a resumed run needs to continue where the run stopped."""

from collections.abc import Callable, Iterator
from pathlib import Path
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


def window_file(checkpoint: Path, process: int, processes: int) -> Path:
    """A process's file in a checkpoint."""
    return Path(checkpoint) / f"rollout-{process:05d}-of-{processes:05d}.pt"


def save_window(checkpoint: Path, process: int, processes: int, state: dict[str, Any]) -> None:
    """Writes a process's part of the state: tensors, numbers, strings, and lists and dictionaries of them."""
    path = window_file(checkpoint, process, processes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def load_window(checkpoint: Path, process: int, processes: int, device: torch.device) -> dict[str, Any]:
    """
    Reads what [`save_window`] wrote.

    Raises:
        `ValueError`: If the checkpoint is not one of these trainers, or of another number of processes.
    """
    path = window_file(checkpoint, process, processes)
    if path.is_file():
        # Only tensors and plain containers are unpickled. In several processes on a CPU the device is "cpu:0".
        return torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
    others = sorted(Path(checkpoint).glob("rollout-*-of-*.pt"))
    if others:
        count = int(others[0].stem.rpartition("-")[2])
        raise ValueError(
            f"`{checkpoint}` was written by {count} process{'es' * (count > 1)}, and this run has {processes}: what "
            f"each process sampled cannot be dealt out anew. Resume with {count}."
        )
    raise ValueError(
        f"`{checkpoint}` has no `{path.name}`, so it was not written by this trainer (or with `save_only_model=True`) "
        "and cannot be resumed from. Load its weights as `model` to start a new run from them."
    )
