"""What each process of a run that samples carries through a checkpoint: the samples that it still trains on."""

from pathlib import Path
from typing import Any

import torch


def window_file(checkpoint: str | Path, process: int, processes: int) -> Path:
    """A process's file in a checkpoint."""
    return Path(checkpoint) / f"rollout-{process:05d}-of-{processes:05d}.pt"


def save_window(checkpoint: str | Path, process: int, processes: int, state: dict[str, Any]) -> None:
    """Writes a process's part of the state: tensors, numbers, strings, and lists and dictionaries of them."""
    path = window_file(checkpoint, process, processes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def load_window(
    checkpoint: str | Path, process: int, processes: int, device: torch.device, settings: dict[str, Any]
) -> dict[str, Any]:
    """
    Reads what [`save_window`] wrote. `settings` are the options that give a window its meaning; those of the run that
    wrote it are the entry `"settings"` of its state.

    Raises:
        `ValueError`: If the checkpoint is not one of these trainers, or of another number of processes, or of other
            settings.
    """
    path = window_file(checkpoint, process, processes)
    if path.is_file():
        # Only tensors and plain containers are unpickled. In several processes on a CPU the device is "cpu:0".
        state = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"`{name}={value}`, and the run that wrote `{checkpoint}` had {state['settings'].get(name)}. "
                    "Resume with the settings of the run."
                )
        return state
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
