"""What several processes must agree on, and how long they wait for each other."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainingArguments

from .._checks import default_of


@contextlib.contextmanager
def honored_ddp_timeout(args: TrainingArguments) -> Iterator[None]:
    """
    Context in which Transformers starts the process group; afterwards the group has the timeout `args.ddp_timeout`.

    Transformers passes `ddp_timeout` on for GPUs only: on CPUs, a process waited 30 minutes for another whatever the
    option said. A group that was started before, by the user, keeps its own timeout unless `ddp_timeout` was set.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration, whose `__post_init__` starts the group.
    """
    was_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    yield
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    default = next(default_of(field) for field in dataclasses.fields(args) if field.name == "ddp_timeout")
    if not was_there or args.ddp_timeout != default:
        _set_pg_timeout(args.ddp_timeout_delta)


def check_same_lengths(datasets: Mapping[str, Any]) -> None:
    """
    Checks that every process was given the same datasets, by name and length: otherwise one of them would finish
    earlier, and the others would wait for it until `ddp_timeout` is over.

    Every process must call it. In one process it does nothing.

    Args:
        datasets (`Mapping[str, Any]`):
            Datasets by their names; one without a length, a stream, or `None` is compared by name alone.

    Raises:
        `ValueError`: On every process, with the lengths of all.
    """
    if PartialState().num_processes == 1:
        return
    lengths = {name: len(data) if hasattr(data, "__len__") else None for name, data in datasets.items()}
    found = gather_object([lengths])
    for name in dict.fromkeys(name for given in found for name in given):
        told = [_describe(given, name) for given in found]
        if len(set(told)) > 1:
            each = ", ".join(f"{text} on process {rank}" for rank, text in enumerate(told))
            raise ValueError(
                f"The processes were given {name} datasets of different lengths: {each}. Give every process the whole "
                "dataset: the trainer splits each batch among them."
            )


def check_is_split(dataset: Any) -> None:
    """Raises `TypeError` if `train_dataset` is a dictionary of splits instead of one of them."""
    if isinstance(dataset, Mapping):
        names = list(dataset)
        name = "train" if "train" in names or not names else names[0]
        raise TypeError(
            f"`train_dataset` is a `{type(dataset).__name__}` with the splits {names}. Give one of them: "
            f"`train_dataset=dataset[{name!r}]`."
        )


def _describe(lengths: Mapping[str, int | None], name: str) -> str:
    if name not in lengths:
        return "none"
    return "a stream" if lengths[name] is None else f"{lengths[name]:,} rows"
