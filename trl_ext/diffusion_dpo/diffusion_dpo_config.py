"""Configuration of Diffusion-DPO."""

from dataclasses import dataclass, field
from typing import Annotated

from .._checks import between
from ..diffusion import DiffusionConfig
from ..losses.diffusion import LOSS_TYPES, check_diffusion_dpo_parameters


@dataclass
class DiffusionDPOConfig(DiffusionConfig):
    r"""
    Configuration class for [`DiffusionDPOTrainer`].

    Only the parameters that Diffusion-DPO adds are listed; the others are those of
    [`~trl_ext.diffusion.DiffusionConfig`].

    Parameters:
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (the paper's), `"hinge"`, `"ipo"`, or `"dmpo"`, the reverse KL divergence of
            https://huggingface.co/papers/2507.07510.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of pairs whose label is taken to be wrong, in [0, 0.5). Of `"sigmoid"`, and of `"dmpo"`, which needs
            one above 0: 0.01 in the paper.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    """

    loss_type: str = field(
        default="sigmoid", metadata={"help": "'sigmoid', 'hinge', 'ipo' or 'dmpo'.", "choices": list(LOSS_TYPES)}
    )
    label_smoothing: Annotated[float, between(0, 0.5, "[)")] = field(
        default=0.0,
        metadata={"help": "Share of pairs whose label is taken to be wrong; 'dmpo' needs one above 0, such as 0.01."},
    )

    def _check_options(self) -> None:
        super()._check_options()
        check_diffusion_dpo_parameters(beta=self.beta, loss_type=self.loss_type, label_smoothing=self.label_smoothing)
