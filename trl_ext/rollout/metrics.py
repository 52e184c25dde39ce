"""What the trainers of all methods that sample log and evaluate: means over samples, and statistics of rewards."""

from typing import TYPE_CHECKING

import torch

from ..training.logging import MeteredTrainer
from ..training.metrics import StepMetrics
from ..training.seeds import seeded


if TYPE_CHECKING:  # one of the two parents, which have what is used here in common
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object


class SampleMetrics(MeteredTrainer, _Parent):
    """
    Mixin of TRL's GRPO and RLOO trainers whose metrics are means over samples, in training and in evaluation, however
    they are split over batches and processes.

    The trainer calls [`~SampleMetrics._init_metrics`] before the constructor of its parent.
    """

    _eval_rewards: list[torch.Tensor]
    _eval_samples: int

    def _init_metrics(self) -> None:
        super()._init_metrics()
        self._eval_rewards, self._eval_samples = [], 0

    def local_rows(self, values: torch.Tensor) -> torch.Tensor:
        """
        This process's rows of a tensor over the samples of all processes, such as `_calculate_rewards` returns.
        """
        count = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * count :][:count]

    def record_means(self, **values: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """
        Logs means over the samples of all processes, or over their tokens.

        Args:
            values:
                Name -> this process's values, the samples in the first dimension, or `(values, where)` with a mask of
                the same shape. `__` in a name stands for `/`.
        """
        pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in values.items()}
        first = next(iter(pairs.values()))[0]
        metrics = StepMetrics(first.device, len(first))
        for name, (value, where) in pairs.items():
            metrics.mean(name.replace("__", "/"), value, None if where is None else where.bool())
        self._window[self._mode].append(*metrics.reduce(self.accelerator))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.model.training:
            # In several processes Accelerate fills the last batch with rows of the first.
            self._eval_rewards.append(rewards[: self._rows_of_last_batch()].float().cpu())
        return rewards

    def _rows_of_last_batch(self) -> int | None:
        if not self.accelerator.gradient_state.end_of_dataloader:
            return None
        return self._eval_samples % (self.args.eval_batch_size * self.accelerator.num_processes) or None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = self._rows_of_last_batch() or len(inputs) * self.accelerator.num_processes
        self._take_appended("eval", rows)  # the last batch may be smaller
        return output

    def _take_appended(self, mode: str, weight: float = 1.0) -> None:
        for name, values in self._metrics[mode].items():
            # TRL's count of tokens is no mean, and a metric is NaN in a batch where no reward function applies.
            for value in () if name == "num_tokens" else values:
                if value == value:
                    self._window[mode].add(name, value * weight, weight)
        self._metrics[mode].clear()

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = super()._pop_metrics(mode)
        if mode == "train" and metrics:
            metrics["num_tokens"] = self.state.num_input_tokens_seen
        if mode == "eval" and self._eval_rewards:
            metrics.update(self._reward_statistics(torch.cat(self._eval_rewards)))
            self._eval_rewards.clear()
        return metrics

    def _clear_metrics(self, mode: str) -> None:
        super()._clear_metrics(mode)
        if mode == "eval":
            self._eval_rewards.clear()

    def _reward_statistics(self, rewards: torch.Tensor) -> dict[str, float]:
        """TRL's statistics of rewards, of shape (samples, functions), over all of them at once."""
        total = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        columns = {f"rewards/{name}": rewards[:, i] for i, name in enumerate(self.reward_func_names)}
        statistics = {"reward": _mean(total), "reward_std": _deviation(total)}
        for name, column in columns.items():
            statistics |= {f"{name}/mean": _mean(column), f"{name}/std": _deviation(column)}
        return {name: value for name, value in statistics.items() if value is not None}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        # Each prompt is repeated by TRL's sampler, so the dataset has fewer rows than there are samples.
        dataset = dataloader.dataset
        self._eval_samples = len(dataset) * self.num_generations_eval if hasattr(dataset, "__len__") else 0
        # Every evaluation draws the same random numbers, and none changes what training samples next.
        with seeded(self.accelerator.device, self.args.seed, "evaluation", self.accelerator.process_index):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )


def _mean(values: torch.Tensor) -> float | None:
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def _deviation(values: torch.Tensor) -> float | None:
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else 0.0 if len(known) else None
