"""Logs and checkpoints of a run, such that a resumed run logs what an uninterrupted one would have logged."""

import json
from pathlib import Path

import torch
from accelerate.logging import get_logger

from .metrics import MetricWindow
from .progress import PreferenceProgress


logger = get_logger(__name__)


class ResumableRun:
    """
    Mixin of a [`~transformers.Trainer`] whose metrics are averaged over the logging window: carries half-filled windows
    through checkpoints, writes no checkpoint of weights that are not finite, and resumes from none that was not written to
    its end.

    The trainer has `_window` (name of the mode -> [`MetricWindow`]), `_metrics` (mode -> name -> list of values), and a
    [`PreferenceProgress`] among its callbacks.
    """

    _window: dict[str, MetricWindow]
    _metrics: dict[str, dict[str, list[float]]]

    @property
    def _progress(self) -> PreferenceProgress:
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, PreferenceProgress))

    def _fill_metrics(self, mode: str) -> None:
        for name, values in self._window[mode].drain().items():
            self._metrics[mode][name].extend(values)

    def _restore_total_loss(self, logs: dict[str, float]) -> None:
        """Transformers divides by the steps since the resume; the sum, restored below, covers the whole run."""
        if "train_loss" in logs and self._progress.total_loss is not None:
            logs["train_loss"] = self._total_loss_scalar / self.state.global_step

    def last_whole_checkpoint(self) -> str | None:
        """The last checkpoint in `output_dir` that was written to its end; a run that was killed may have left others."""
        found = [path for path in Path(self.args.output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
        for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
            if self._is_whole(path):
                return str(path)
            logger.warning(f"`{path}` was not written to its end and is passed over.")
        return None

    def _is_whole(self, checkpoint: Path) -> bool:
        # Transformers writes `trainer_state.json` last, after everything that a resumed run needs.
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return True

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Like [`~transformers.Trainer.train`]; with `resume_from_checkpoint=True` it continues from the last checkpoint that was
        written to its end.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_whole_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`: there is no whole checkpoint in `{self.args.output_dir}`. Leave it out "
                    "to train from the first step."
                )
        # What an interrupted `train()` of this trainer left belongs to no log of this one.
        self._window["train"].drain()
        self._metrics["train"].clear()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def training_step(self, *args, **kwargs):
        progress = self._progress
        if progress.to_restore:
            progress.to_restore = False
            # Transformers restarts the window of the logged loss on resume, and nobody keeps that of the metrics.
            losses = progress.window_loss
            if len(losses) == self.accelerator.num_processes:
                loss = losses[self.accelerator.process_index]
            else:
                loss = sum(losses) / len(losses)
            self._tr_loss += loss
            self._globalstep_last_logged = progress.window_start
            self._total_loss_scalar = progress.total_loss
            for name, values in progress.window.items():
                self._metrics["train"][name].extend(values)
        return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        self._check_finite_weights()
        self._fill_metrics("train")
        progress = self._progress
        progress.window = {name: list(values) for name, values in self._metrics["train"].items()}
        progress.window_loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        progress.window_start = self._globalstep_last_logged
        progress.total_loss = self._total_loss_scalar
        super()._save_checkpoint(model, trial)

    def _check_finite_weights(self) -> None:
        """A finite loss can have a gradient that is not: a checkpoint of what it left would replace a good one."""
        # Each process looks at the shard it holds (FSDP2's parameters are distributed tensors).
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        local = ((name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained)
        bad = [name for name, p in local if not torch.isfinite(p).all()]
        found = torch.tensor([len(bad)], device=self.accelerator.device)
        if self.accelerator.gather(found).sum() > 0:
            raise FloatingPointError(
                f"Weights are not finite after step {self.state.global_step}: {', '.join(bad[:5]) or 'other process'}. "
                "The checkpoint was not written. Resume from the last one with a lower `learning_rate`, or train in "
                "bf16 rather than fp16."
            )
