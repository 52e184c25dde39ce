"""Policy and reference in one module, which the trainer trains, prepares, saves and resumes."""

import contextlib

import torch
from torch import nn
from transformers import PretrainedConfig

from ..training.adapters import use_reference_adapter
from .families import PipelineFamily


class DenoiserConfig(PretrainedConfig):
    """
    The denoiser's configuration in the form that the trackers of Transformers and TRL read. They fail on diffusers'
    `FrozenDict`.
    """

    model_type = "diffusion"

    def __init__(self, **kwargs):
        denoiser = kwargs.pop("denoiser", {})
        super().__init__(**kwargs)
        self.denoiser = denoiser


class PairedDenoiser(nn.Module):
    """
    Runs a denoiser and its reference in one forward, so that wrappers for several processes see a single call.

    The reference is the first that exists of: a separate model, the frozen copy of a starting LoRA, the denoiser with
    its adapter switched off. It runs in the same module, under the same autocast and on the same inputs, so an
    untrained policy equals its reference bit for bit.

    Args:
        family ([`PipelineFamily`]):
            Family of the pipeline whose denoiser is trained.
        adapter_name (`str`, *optional*):
            The trained adapter; `None` under full fine-tuning.
        reference (`torch.nn.Module`, *optional*):
            Frozen reference. It is not part of the state dict.
        name_or_path (`str`, *optional*):
            Source of the pipeline. Defaults to the one in its configuration.
    """

    def __init__(
        self,
        family: PipelineFamily,
        adapter_name: str | None = None,
        reference: nn.Module | None = None,
        name_or_path: str | None = None,
    ):
        super().__init__()
        self.denoiser = family.denoiser
        self.family = family
        self.adapter_name = adapter_name
        self._reference = [reference]  # in a list, so that it is not registered as a submodule
        name = name_or_path or family.pipeline.config.get("_name_or_path") or ""
        self.config = DenoiserConfig(name_or_path=name, denoiser=_plain(dict(self.denoiser.config)))
        self.input_dtype = _base_dtype(self.denoiser)
        # What FSDP2 shards as one unit, unless it is told.
        kinds = {type(module).__name__ for module in self.denoiser.modules()}
        self._no_split_modules = [
            kind for kind in getattr(self.denoiser, "_no_split_modules", None) or () if kind in kinds
        ]

    @property
    def reference(self) -> nn.Module | None:
        """The separate reference model, if there is one."""
        return self._reference[0]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to_device(self, device) -> None:
        """Moves the separate reference, which is no submodule."""
        if self.reference is not None:
            self.reference.to(device)

    def reference_adapter(self):
        """
        Context in which the denoiser is its own reference: with the frozen copy of its starting LoRA, or no adapter.
        """
        return use_reference_adapter(self.denoiser)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the predictions of the policy, with gradient, and of the reference, without.

        The signature has no `**kwargs`: `Trainer` would then assume that the loss is divided by the number of items,
        and no longer divide it by the accumulation steps.
        """
        ref_pred = self.reference_prediction(noisy, timesteps, conditioning)
        # The reference runs first, as it leaves no activations behind.
        return self.family.predict(self.denoiser, noisy.to(self.input_dtype), timesteps, conditioning), ref_pred

    def reference_prediction(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The prediction of the reference alone, without gradient."""
        with torch.no_grad(), self.reference_adapter() if self.reference is None else contextlib.nullcontext():
            model = self.denoiser if self.reference is None else self.reference
            return self.family.predict(model, noisy.to(_base_dtype(model)), timesteps, conditioning)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Called by `Trainer` under `gradient_checkpointing=True`, with the options for it."""
        given = {
            **(activation_checkpointing_kwargs or {}),
            **({"every_n_layers": every_n_layers} if every_n_layers != 1 else {}),
            **({"offload": offload} if offload else {}),
        }
        if given.pop("use_reentrant", False) or given:
            raise ValueError(
                f"`gradient_checkpointing_kwargs` cannot be honored by a diffusers model: got "
                f"{activation_checkpointing_kwargs}, every_n_layers={every_n_layers}, offload={offload}. diffusers "
                "checkpoints every block without reentry; leave the options out."
            )
        self.denoiser.enable_gradient_checkpointing()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """The same under the names by which older releases of Transformers call it."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        self.denoiser.disable_gradient_checkpointing()


def _base_dtype(denoiser: nn.Module) -> torch.dtype:
    """Type that a denoiser's inputs are in. A LoRA's own parameters are in float32 whatever the base is in."""
    base = (p for n, p in denoiser.named_parameters() if "lora_" not in n and p.is_floating_point())
    return next(base).dtype


def _plain(value):
    """Converts the values of a configuration to types that JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
