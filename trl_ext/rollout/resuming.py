"""Training of methods that sample: the order of the prompts, the generation window, and both in checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..training.resume import ResumableRun
from ..training.window_file import load_window, save_window
from .window import EpochSampler


if TYPE_CHECKING:  # one of the two parents, which have what is used here in common
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object


class ResumableWindows(ResumableRun, _Parent):
    """
    Mixin of TRL's GRPO and RLOO trainers whose runs resume bit-identically, in any epoch and inside a generation
    window: the order of the prompts depends on the epoch alone, and the window is in the checkpoint.

    The trainer has a [`RunBoundary`] among its callbacks.
    """

    _step: int
    _buffered_inputs: Any
    _checkpoint: str | None

    def _get_train_sampler(self, dataset=None):
        args = self.args
        return EpochSampler(
            super()._get_train_sampler(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            # What has been trained says which epoch begins, in a resumed run too.
            epoch=lambda: int(self.state.epoch or 0),
        )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Like [`~transformers.Trainer.train`]; with `resume_from_checkpoint=True` it continues from the last checkpoint
        that was written to its end.
        """
        # TRL counts micro-steps and keeps completions from one `train()` of a trainer to the next.
        self._step, self._buffered_inputs, self._checkpoint = 0, None, None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin_run(self, checkpoint: str | None) -> None:
        """
        Called in every process once the model is prepared, and before anything is trained or evaluated. A method that
        computes something from what training starts from overrides it.

        Args:
            checkpoint (`str`, *optional*):
                The checkpoint that the run resumes from.
        """

    def state_dict(self) -> dict[str, Any]:
        """
        What the method itself carries through checkpoints, of this process: tensors, numbers, strings, and lists and
        dictionaries of them. A method that has a state overrides it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of [`~RolloutTrainer.state_dict`]."""

    @property
    def _window_settings(self) -> dict[str, int]:
        """Options that give the micro-steps of a window their meaning."""
        names = ("per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations")
        return {name: getattr(self.args, name) for name in names}

    @property
    def _is_inside_window(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0

    def _save_rng_state(self, output_dir):
        # Beside the random state, which a resumed run needs as much; before the file that marks a checkpoint complete.
        state = {
            "step": self._step,
            "settings": self._window_settings,
            "window": self._buffered_inputs if self._is_inside_window else None,
            "method": self.state_dict(),
        }
        save_window(Path(output_dir), self.accelerator.process_index, self.accelerator.num_processes, state)
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._checkpoint = checkpoint
        accelerator = self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        state = load_window(checkpoint, rank, ranks, accelerator.device, self._window_settings)
        self._step, self._buffered_inputs = state["step"], state["window"]
        self.load_state_dict(state["method"])


class RunBoundary(TrainerCallback):
    """Tells a trainer that a run begins."""

    def __init__(self, trainer: ResumableWindows):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_run(self.trainer._checkpoint)
