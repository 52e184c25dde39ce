"""The exponential moving average of the trained parameters."""

import contextlib
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from .saving import EMA_FILE, save_ema


class EMACallback(TrainerCallback):
    """
    Updates the average after every optimizer step, and saves and restores it with checkpoints.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`):
            The trained parameters, by name.
        decay (`float`):
            Largest decay; the decay starts at 2/11 and grows as (1 + step) / (10 + step).
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float):
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self.decay = decay
        self._new = lambda: EMAModel(parameters.values(), decay=decay)
        self.average = self._new()
        self.is_active = False
        self._restored = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.average = self._new()  # the weights may have changed since the trainer was made
        elif not self._restored:
            raise ValueError(
                f"`use_ema=True`, but the run resumes at step {state.global_step} from a checkpoint without "
                f"`{EMA_FILE}`. Resume with `use_ema=False`, as the checkpoint was trained."
            )
        self._restored = False

    def on_step_end(self, args, state, control, **kwargs):
        self.average.step(self.parameters.values())

    def save(self, folder) -> None:
        save_ema(
            Path(folder) / EMA_FILE, self.average.shadow_params, list(self.parameters), self.average.optimization_step
        )

    def load(self, folder) -> None:
        path = Path(folder) / EMA_FILE
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            for name, shadow in zip(self.parameters, self.average.shadow_params, strict=True):
                shadow.copy_(file.get_tensor(name))
            self.average.optimization_step = int(file.metadata()["optimization_step"])
        self._restored = True

    @contextlib.contextmanager
    def applied(self):
        """Puts the average into the parameters, and afterward restores them bit for bit."""
        if self.is_active:
            yield
            return
        self.is_active = True
        parameters = list(self.parameters.values())
        kept = [parameter.detach().clone() for parameter in parameters]
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            self.is_active = False
