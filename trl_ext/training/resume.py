"""Logs and checkpoints of a run, such that a resumed run logs what an uninterrupted one would have logged."""

import gc
import json
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from .logging import MeteredTrainer
from .processes import check_same_lengths


logger = get_logger(__name__)

# Engines that shard a model where they prepare it, for evaluation as well.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class ResumableRun(MeteredTrainer):
    """
    Mixin of a [`~transformers.Trainer`] that carries half-filled logging windows through checkpoints, writes no
    checkpoint of weights that are not finite, and resumes from none that was not written to its end.
    """

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            if self._progress.to_restore:  # the checkpoint was that of the last step: nothing is left to be trained
                self._restore_progress()
                self._total_loss_scalar += self._tr_loss.item()
                # No training step puts the model in training mode, where an uninterrupted run leaves it unless it
                # ends with an evaluation.
                self.model.train(self._progress.training_mode)
            if self._progress.total_loss is not None:
                # Transformers divides by the steps since the resume. The sum covers the whole run.
                logs["train_loss"] = self._total_loss_scalar / self.state.global_step
        super().log(logs, start_time)

    def _run_epoch(self, *args, **kwargs):
        # Transformers looks at `max_steps` after a step, so a run whose last checkpoint is whole would train one too
        # many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.state.global_step == self._globalstep_last_logged:
            # Nothing has been trained since the last log, but for what `auto_find_batch_size` gave up as memory ran
            # out. What a checkpoint holds is restored later, at the first step.
            self._clear_metrics("train")
        super()._run_epoch(*args, **kwargs)

    def last_whole_checkpoint(self) -> str | None:
        """
        The last checkpoint in `output_dir` that was written to its end; a run that was killed may have left others.
        """
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
        Like [`~transformers.Trainer.train`]; with `resume_from_checkpoint=True` it continues from the last checkpoint
        that was written to its end.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_whole_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`: there is no whole checkpoint in `{self.args.output_dir}`. Leave "
                    "it out to train from the first step."
                )
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        check_same_lengths({"train": self.train_dataset, **splits})
        # Values left by an interrupted `train()` of this trainer must not enter this run's logs.
        self._clear_metrics("train")
        self._forget_preparation_for_evaluation()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _forget_preparation_for_evaluation(self) -> None:
        """
        Has Accelerate prepare the model for training if it has prepared it for evaluation alone.

        `evaluate` and `predict` before training mark the model as prepared without wrapping it, and training would
        then take it as it is: in several processes gradients would not be averaged, without an error.
        """
        model, accelerator = self.model, self.accelerator
        is_wrapped = self.model_wrapped is not model or accelerator.distributed_type in _SHARDED
        if accelerator.num_processes == 1 or is_wrapped or not getattr(model, "_is_accelerate_prepared", False):
            return
        del model._is_accelerate_prepared
        if "_original_forward" in model.__dict__:  # mixed precision, which preparation adds again
            model.forward = model.__dict__.pop("_original_forward")
        accelerator._models[:] = [prepared for prepared in accelerator._models if prepared is not model]

    def end(self) -> None:
        """
        Like [`~transformers.Trainer.end`], which destroys the process group, but releases the wrapped model first.

        The reducer of `DistributedDataParallel` holds a reference to the group. If it is the last one, gloo's
        destructor runs while the interpreter's lock is held and joins a thread that waits for that lock: on a busy
        machine the process then never ends.
        """
        self.accelerator.wait_for_everyone()
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        if hasattr(Trainer, "end"):  # not in Transformers 5.17
            super().end()
        elif torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Of a checkpoint with several adapters, Transformers 5.17 leaves out the one that is not in a folder of its
        # own: the policy's.
        model, folder = self.model if model is None else model, Path(resume_from_checkpoint)
        is_left_out = (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and any(
            folder.glob(f"*/{SAFETENSORS_WEIGHTS_NAME}")
        )
        if isinstance(model, PeftModel) and "default" in model.peft_config and is_left_out:
            set_peft_model_state_dict(model, load_peft_weights(str(folder), "cpu"), "default")

    def training_step(self, *args, **kwargs):
        if self._progress.to_restore:
            self._restore_progress()
        return super().training_step(*args, **kwargs)

    def _restore_progress(self) -> None:
        """Restores the logging window from the checkpoint: Transformers restarts its own, and TRL saves none."""
        progress = self._progress
        progress.to_restore = False
        losses = progress.window_loss
        if len(losses) == self.accelerator.num_processes:
            loss = losses[self.accelerator.process_index]
        else:
            loss = sum(losses) / len(losses)
        self._tr_loss += loss
        self._globalstep_last_logged = progress.window_start
        self._total_loss_scalar = progress.total_loss
        window = progress.window or {}
        if not set(window) <= {"sums", "means"}:
            window = self._window_of_0_1(window)
        self._window["train"].load_state_dict(window)

    def _window_of_0_1(self, window: dict[str, list[float]]) -> dict[str, dict]:
        """State of a [`MetricWindow`] from what trl_ext 0.1.0 wrote: name -> its mean in each micro-step."""
        return {"means": window}

    def _save_checkpoint(self, model, trial):
        self._check_finite_weights()
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # A checkpoint with this file is whole, and it is written last: one that is written anew is not, until
            # then.
            (folder / "trainer_state.json").unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self._take_appended("train")
        progress = self._progress
        progress.window = self._window["train"].state_dict()
        progress.window_loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        progress.window_start = self._globalstep_last_logged
        progress.total_loss = self._total_loss_scalar
        progress.training_mode = self.model.training
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # Every process's file is there before the main process writes `trainer_state.json`.
        self.accelerator.wait_for_everyone()

    def _check_finite_weights(self) -> None:
        """Refuses to save weights that are not finite: a finite loss can have a gradient that is not."""
        # Each process looks at the shard it holds (FSDP2's parameters are distributed tensors).
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        local = ((name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained)
        bad = [name for name, p in local if not torch.isfinite(p).all()]
        found = torch.tensor([len(bad)], device=self.accelerator.device)
        if self.accelerator.gather(found).sum() > 0:
            raise FloatingPointError(
                f"Weights are not finite after step {self.state.global_step}: "
                f"{', '.join(bad[:5]) or 'other process'}. The checkpoint was not written. Resume from the last one "
                "with a lower `learning_rate`, or train in bf16 rather than fp16."
            )
