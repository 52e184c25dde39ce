"""
What a trainer logs and returns of a step: metrics of training, of every evaluation set under its own prefix, and of
`predict`.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from .metrics import MetricWindow, StepMetrics
from .processes import check_same_lengths
from .progress import PreferenceProgress


if TYPE_CHECKING:  # what the mixins expect to be mixed into
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class MeteredTrainer(_Trainer):
    """
    Mixin of a [`~transformers.Trainer`] whose metrics are means over pairs, in training, evaluation and prediction.

    A step calls [`~MeteredTrainer.start_metrics`], fills in its metrics, and gives them to [`~MeteredTrainer.record`].
    Whatever is appended to `self._metrics[mode][name]`, as TRL's trainers do, is logged as well: as a mean of its
    values.

    The trainer has a [`PreferenceProgress`] among its callbacks, and calls [`~MeteredTrainer._init_metrics`] before
    the constructor of its parent.
    """

    _window: dict[str, MetricWindow]
    _metrics: dict[str, dict[str, list[float]]]
    _metric_key_prefix: str

    def _init_metrics(self) -> None:
        self._window = {"train": MetricWindow(), "eval": MetricWindow()}
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._metric_key_prefix = "eval"

    @property
    def _progress(self) -> PreferenceProgress:
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, PreferenceProgress))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # ---- The step --------------------------------------------------------------------------------------------------

    def counted_pairs(self, num_pairs: int) -> torch.Tensor | None:
        """
        Which of a batch's pairs count, of shape `(num_pairs,)`; `None` for all.

        In several processes Accelerate fills the last batch of an evaluation with rows of the first. They are last in
        the order of the processes, which is how [`~accelerate.Accelerator.gather_for_metrics`] leaves them out, too.
        """
        if self.model.training or self.accelerator.num_processes == 1 or getattr(self, "_tp_size", 1) > 1:
            return None
        remainder = self._rows_of_last_batch()
        if remainder is None:
            return None
        first = self.accelerator.process_index * num_pairs
        return torch.arange(first, first + num_pairs, device=self.accelerator.device) < remainder

    def _rows_of_last_batch(self) -> int | None:
        """Rows over all processes if this is a DataLoader's last batch and not all of its rows count."""
        state = self.accelerator.gradient_state
        return state.remainder if state.end_of_dataloader and state.remainder > 0 else None

    def mean_loss(self, losses: torch.Tensor) -> torch.Tensor:
        """
        Mean of the losses of a batch's pairs, without those that only fill it up: Transformers weighs it by the
        others.
        """
        counted = self.counted_pairs(len(losses))
        # A process all of whose pairs fill up has no say, whatever its mean.
        return losses.mean() if counted is None or not counted.any() else losses[counted].mean()

    def start_metrics(self, losses: torch.Tensor, loss: torch.Tensor) -> StepMetrics:
        """
        Returns the metrics of a step, to be filled in.

        Args:
            losses (`torch.Tensor` of shape `(B,)`):
                Loss of each pair.
            loss (`torch.Tensor` of shape `()`):
                The minimized loss.
        """
        counted = self.counted_pairs(len(losses))
        metrics = StepMetrics(loss.device, len(losses), counted, averages_steps=self.model.training)
        finite = torch.isfinite(losses.detach())
        metrics.total("nonfinite", (~finite).sum() + (~torch.isfinite(loss.detach())))
        return metrics

    def record(self, metrics: StepMetrics) -> dict[str, float] | None:
        """
        Keeps a step's metrics until the next log.

        Returns:
            The sums that were put in with [`StepMetrics.total`], over all processes; `None` if a loss is not finite.
            Every process gets the same answer, so all of them can stop, and none waits for another.
        """
        names, sums = metrics.reduce(self.accelerator)
        count = metrics.num_totals
        totals = dict(zip(names[:count], sums[0, :count].tolist(), strict=True))  # the one sync with the host
        if totals["nonfinite"] > 0:
            return None
        self._window[self._mode].append(names[count:], sums[:, count:])
        return totals

    # ---- Logs ------------------------------------------------------------------------------------------------------

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        """Means since the last log."""
        self._take_appended(mode)
        return self._window[mode].pop_means()

    def _metrics_to_log(self, mode: str) -> dict[str, float]:
        """Means since the last log, and whatever else a trainer logs with them."""
        return self._pop_metrics(mode)

    def _take_appended(self, mode: str) -> None:
        for name, values in self._metrics[mode].items():
            for value in values:
                self._window[mode].add(name, value)
        self._metrics[mode].clear()

    def _clear_metrics(self, mode: str) -> None:
        self._window[mode].clear()
        self._metrics[mode].clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Logs, with the metrics since the last log under the prefix of their evaluation set.

        The summary at the end of a run takes what training has left in its window, whatever ran last: an evaluation
        that ends a run leaves the model in evaluation mode, and TRL then drops the metrics of the last steps.
        """
        mode = "train" if "train_loss" in logs else self._mode
        metrics = self._metrics_to_log(mode)
        if mode == "eval":
            metrics = {f"{self._metric_key_prefix}_{name}": value for name, value in metrics.items()}
        logs.update(metrics)
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._metric_key_prefix = metric_key_prefix
        check_same_lengths({metric_key_prefix: dataloader.dataset})
        # Values left by an interrupted evaluation must not enter the next one.
        self._clear_metrics("eval")
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        output = super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        # `Trainer.predict` does not log, so the metrics are handed over here.
        metrics = self._pop_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output
