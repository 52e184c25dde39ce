"""The reference is what training starts from."""

from typing import TYPE_CHECKING

from .checks import is_noisy


if TYPE_CHECKING:  # one of the two parents, which have what is used here in common
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object

# Per-token KL between policy and reference on the first batch, above which they are not the same model.
_START_KL = 1e-2


class CheckedStart(_Parent):
    """Mixin that gives a model in memory itself as reference, and checks the reference on the first batch."""

    _has_begun = False

    def _needs_reference(self, args) -> bool:
        """Whether the method reads a reference under this configuration. Called before the trainer is built."""
        return args.beta != 0

    @property
    def needs_reference(self) -> bool:
        return self._needs_reference(self.args)

    def _copy_start_to_reference(self) -> None:
        """TRL loads the reference by the model's name, and a model in memory may have changed since it was loaded."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return  # both are sharded by now; a difference shows on the first batch
        start = self.accelerator.unwrap_model(self.model).state_dict()
        self.accelerator.unwrap_model(self.ref_model).load_state_dict(start)

    def _check_start(self) -> None:
        """Raises `ValueError` if the first batch shows that the reference is not what training starts from."""
        kl = self._metrics["train"].get("kl")
        if not kl or not abs(kl[0]) > _START_KL or is_noisy(self.model, self.args):
            return
        raise ValueError(
            f"The KL between the policy and its reference is {kl[0]:.3g} per token on the first batch, before any "
            "step: the reference is not the model that training starts from. Save the model with `save_pretrained` "
            "and pass the folder as `model`."
        )

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not self._has_begun:
            self._has_begun = True
            if self._step == 1 and self.needs_reference:
                self._check_start()
        return loss
