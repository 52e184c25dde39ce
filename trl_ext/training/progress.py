"""What a run has counted so far, so that a resumed run logs what an uninterrupted one would have logged."""

import time

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class PreferenceProgress(TrainerCallback, ExportableState):
    """
    Counters and half-filled logging windows, carried through checkpoints in `trainer_state.json`.

    Transformers restarts its loss window and TRL its `num_tokens` on resume. This callback only holds the values: the
    trainer fills them in as a checkpoint is written and takes them back at its first step after a resume. The name of
    the class is a key of `trainer_state.json`, so it stays.

    Args:
        num_tokens (`int`, *optional*, defaults to `0`):
            Non-padding tokens trained on so far, over all processes.
        window (`dict`, *optional*):
            Metrics since the last log: the state of a [`MetricWindow`], or, in a checkpoint of trl_ext 0.1.0, the name
            of each metric and its mean in each micro-step.
        window_loss (`list[float]`, *optional*):
            Loss summed since the last log, one value a process.
        window_start (`int`, *optional*):
            Global step of the last log.
        total_loss (`float`, *optional*):
            Loss summed from the first step to the last log.
        estimates (`dict[str, float]`, *optional*):
            Hyperparameters that the method estimated from the training data, which a resumed run must not estimate
            anew.
        training_mode (`bool`, *optional*, defaults to `True`):
            Whether the model was in training mode as the checkpoint was written; an evaluation leaves it in evaluation
            mode.
        seconds (`float`, *optional*, defaults to `0.0`):
            Seconds of training before this process; `None` if the checkpoint does not say.
    """

    def __init__(
        self,
        num_tokens=0,
        window=None,
        window_loss=None,
        window_start=None,
        total_loss=None,
        estimates=None,
        training_mode=True,
        seconds=0.0,
    ):
        self.num_tokens = num_tokens
        self.window = window
        self.window_loss = window_loss
        self.window_start = window_start
        self.total_loss = total_loss
        self.estimates = {} if estimates is None else estimates
        self.training_mode = training_mode
        self.seconds = seconds
        self._started = None
        self.to_restore = False

    def state(self) -> dict:
        names = ("num_tokens", "window", "window_loss", "window_start", "total_loss", "estimates", "training_mode")
        values = {name: getattr(self, name) for name in names}
        return {"args": {**values, "seconds": self.elapsed}, "attributes": {}}

    @property
    def elapsed(self) -> float | None:
        """Seconds of training that led to these weights, interrupted runs included; `None` if that is not known."""
        if self.seconds is None or self._started is None:
            return self.seconds
        return self.seconds + time.monotonic() - self._started

    def on_train_begin(self, args, state, control, **kwargs):
        # Transformers restores callbacks by itself only under `restore_callback_states_from_checkpoint`.
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.to_restore = state.global_step > 0 and saved is not None
        if self.to_restore:
            self.__dict__.update({"seconds": None, **saved["args"]})
        elif state.global_step == 0:
            # A second `train()` of the same trainer starts its counters afresh.
            PreferenceProgress.__init__(self, estimates=self.estimates)
        self._started = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds, self._started = self.elapsed, None
