"""Rewards of the reference's images, which are measured once."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from ..training.seeds import derive_seed
from .rollouts import ReferenceSampler


if TYPE_CHECKING:
    from .online_trainer import OnlineDiffusionTrainer


class ReferenceRewards:
    """
    Samples images of training prompts from the reference, with the training sampler, and rewards them.

    Args:
        trainer ([`OnlineDiffusionTrainer`]):
            The trainer.

    Attributes:
        by_row (`dict[int, list[float]]`):
            Rewards of each measured prompt's images, by its row; NaN for no opinion. The same in every process.
    """

    def __init__(self, trainer: "OnlineDiffusionTrainer"):
        self.trainer = trainer
        self.by_row: dict[int, list[float]] = {}

    @property
    def spread(self) -> float:
        """Standard deviation of the rewards among images of one prompt."""
        return self.trainer._progress.estimates["reward_spread"]

    def measure(self, rows: Sequence[int], count: int) -> None:
        """Measures `count` images of each of the rows that are not measured yet. Every process must call it."""
        missing = [row for row in dict.fromkeys(rows) if len(self.by_row.get(row, ())) < count]
        if not missing:
            return
        state = self.trainer.accelerator
        own = {row: self._rewards(row, count) for row in missing[state.process_index :: state.num_processes]}
        for part in gather_object([own]):
            self.by_row.update(part)

    def _rewards(self, row: int, count: int) -> list[float]:
        trainer = self.trainer
        item, size = trainer.train_dataset.row(row), trainer.args.per_device_train_batch_size
        model = ReferenceSampler(trainer.policy)
        keys = [("reference", trainer.args.seed, row, number) for number in range(count)]
        pixels = torch.cat(
            [
                trainer.decode(trainer.sample_chains(model, [item["prompt"]] * len(part), part).images)
                for part in (keys[i : i + size] for i in range(0, count, size))
            ]
        )
        columns = {name: [value] * count for name, value in item["columns"].items()}
        return trainer.rewards([item["prompt"]] * count, pixels, **columns)[0].tolist()

    def measure_spread(self, num_images: int, per_prompt: int | None = None) -> None:
        """
        Measures mean and spread of the rewards, unless the run that is resumed did. They are kept in checkpoints.

        Args:
            num_images (`int`):
                Images over all prompts.
            per_prompt (`int`, *optional*):
                Images of each prompt. Defaults to `num_generations`, and more if the prompts are too few.

        Raises:
            `ValueError`: If the images of no prompt differ in reward.
        """
        trainer = self.trainer
        estimates = trainer._progress.estimates
        if "reward_spread" in estimates:
            return
        prompts = trainer.train_dataset.num_rows
        count = per_prompt or max(trainer.args.num_generations, math.ceil(num_images / prompts))
        generator = torch.Generator().manual_seed(derive_seed("reference", trainer.args.seed))
        rows = torch.randperm(prompts, generator=generator)[: math.ceil(num_images / count)].tolist()
        self.measure(rows, count)
        groups = [[reward for reward in self.by_row[row] if reward == reward] for row in rows]
        variances = [torch.tensor(group, dtype=torch.float64).var().item() for group in groups if len(group) > 1]
        spread = math.sqrt(sum(variances) / len(variances)) if variances else 0.0
        if not spread > 0:
            raise ValueError(
                f"The reward functions {', '.join(trainer.rewards.names)} do not tell the reference's images apart: "
                f"of {len(rows)} prompts with {count} images each, the rewards of one prompt's images are all the same "
                f"(the first is {self.by_row[rows[0]][0]:g}). Nothing can be learned from them. Check the reward on "
                "images of the pipeline, or give a finer one."
            )
        known = [reward for group in groups for reward in group]
        estimates["reward_spread"], estimates["reference_reward"] = spread, sum(known) / len(known)
