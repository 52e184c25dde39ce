"""Prompts to sample images of, and the order in which a run samples them: whole groups, on whole processes."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch

from ..training.arguments import without_format
from ..training.seeds import derive_seed


class PromptDataset(torch.utils.data.Dataset):
    """
    Prompts, each of which is sampled `num_generations` times.

    An item is an image to sample: a `dict` of
    - `row`, `generation` (`int`): number of the prompt, and of the image among those of the prompt;
    - `prompt` (`str`);
    - `columns` (`dict`): the row's other columns, for the reward functions.

    Args:
        dataset ([`~datasets.Dataset`]):
            Map-style dataset with a column `prompt` of texts.
        num_generations (`int`):
            Images a prompt.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the split, for messages.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset.
        `ValueError`: If it has no rows, no column `prompt`, a transform, or a prompt that is no text.
    """

    unit = "prompts"

    def __init__(self, dataset: datasets.Dataset, num_generations: int, name: str = "train"):
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"The {name} dataset must be a map-style `datasets.Dataset`, got a `{type(dataset).__name__}`: groups "
                "of images are dealt to steps and processes by number."
            )
        if "prompt" not in dataset.column_names:
            raise ValueError(
                f"The {name} dataset has no column `prompt`, only {sorted(dataset.column_names)}. Rename the column "
                "that holds the texts; images are sampled, and not read."
            )
        without_format(dataset, name)  # reward functions get the columns in the format that they have
        if len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty. Give at least one prompt.")
        self.dataset = dataset
        self.num_generations = num_generations
        self.name = name
        self.columns = [column for column in dataset.column_names if column != "prompt"]
        # Rewards of the reference's images of an evaluation, which are the same at every evaluation.
        self.reference_rewards: dict[tuple[int, int], float] = {}
        for row, prompt in enumerate(self.prompts()):
            if not isinstance(prompt, str):
                raise ValueError(
                    f"`prompt` of row {row} of the {name} dataset is {prompt!r}. A prompt of an image is a text."
                )

    def prompts(self) -> list[str]:
        return self.dataset.with_format(None)["prompt"][:]

    @property
    def num_rows(self) -> int:
        """Number of prompts."""
        return len(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset) * self.num_generations

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, generation = divmod(int(index), self.num_generations)
        return {"generation": generation, **self.row(row)}

    def row(self, row: int) -> dict[str, Any]:
        """A prompt with its columns."""
        values = self.dataset[row]
        return {
            "row": row,
            "prompt": values["prompt"],
            "columns": {column: values[column] for column in self.columns},
        }


def collate_prompts(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `row` and `generation` as int64 tensors of shape `(B,)`, `prompt` and each of `columns` as lists."""
    return {
        "row": torch.tensor([item["row"] for item in items]),
        "generation": torch.tensor([item["generation"] for item in items]),
        "prompt": [item["prompt"] for item in items],
        "columns": {name: [item["columns"][name] for item in items] for name in items[0]["columns"]},
    }


class WindowSampler(torch.utils.data.Sampler):
    """
    Order of the images of a run. What one optimizer step trains on is a window of whole groups; each process holds
    whole groups of it, so that a reward function sees all images of a prompt at once.

    Prompts that are left over at the end of an epoch, fewer than a window takes, are passed over.

    Args:
        num_prompts, num_generations (`int`):
            Prompts of the dataset, and images of each.
        batch_size, accumulation_steps, num_processes (`int`):
            Images of a micro-batch on one process, micro-batches of a step, and processes.
        num_iterations (`int`):
            Optimizer steps that train on the same window.
        seed (`int`, *optional*):
            Seed of the order; `None` keeps the dataset's.
        epoch (`Callable[[], int]`):
            Number of the epoch that begins.
    """

    def __init__(
        self,
        num_prompts: int,
        num_generations: int,
        *,
        batch_size: int,
        accumulation_steps: int,
        num_processes: int,
        num_iterations: int,
        seed: int | None,
        epoch: Callable[[], int],
    ):
        self.num_prompts = num_prompts
        self.num_generations = num_generations
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.num_processes = num_processes
        self.num_iterations = num_iterations
        self.seed = seed
        self.epoch = epoch
        self.window_size = batch_size * accumulation_steps * num_processes
        self.num_windows = num_prompts * num_generations // self.window_size

    def __len__(self) -> int:
        return self.num_windows * self.num_iterations * self.window_size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(derive_seed("prompts", self.seed, self.epoch()))
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        count = self.window_size // self.num_generations
        for window in range(self.num_windows):
            prompts = order[window * count : (window + 1) * count]
            images = [prompt * self.num_generations + i for prompt in prompts for i in range(self.num_generations)]
            for _ in range(self.num_iterations):
                # A loader deals batch after batch to process after process; each gets one part of the window.
                for batch in range(self.accumulation_steps):
                    for process in range(self.num_processes):
                        first = (process * self.accumulation_steps + batch) * self.batch_size
                        yield from images[first : first + self.batch_size]
