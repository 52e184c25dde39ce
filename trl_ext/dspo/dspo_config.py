"""Configuration of DSPO."""

from dataclasses import dataclass, field
from typing import Annotated

from .._checks import above, between
from ..diffusion import DiffusionConfig
from ..losses.diffusion import DSPO_VARIANTS, check_dspo_parameters


@dataclass
class DSPOConfig(DiffusionConfig):
    r"""
    Configuration class for [`DSPOTrainer`].

    Only the parameters that DSPO adds or changes are listed; the others are those of
    [`~trl_ext.diffusion.DiffusionConfig`].

    Parameters:
        variant (`str`, *optional*, defaults to `"score"`):
            `"score"` (the released SD 1.5 branch), or `"squared"` (what the released SDXL branch comes to).
        beta (`float`, *optional*):
            Temperature of u, whose scale is that of Diffusion-DPO. Defaults to what was released: 0.001 for `"score"`,
            5000 for `"squared"`. At 0.001 the rejected image has next to no say.
        score_weight (`float`, *optional*):
            Weight of the preference's score, of `"score"` only: greater than 0 and less than 2. Defaults to `beta`, as
            released; with a weight of its own, `beta` can be of Diffusion-DPO's order.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    """

    variant: str = field(default="score", metadata={"help": "'score' or 'squared'.", "choices": list(DSPO_VARIANTS)})
    # Every method has a beta; here `None` stands for the variant's until the constructor ends.
    beta: Annotated[float | None, above(0)] = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Temperature of u. Defaults to 0.001 for 'score', to 5000 for 'squared'."},
    )
    score_weight: Annotated[float | None, between(0, 2, "()")] = field(
        default=None,
        metadata={"help": "Weight of the preference's score, of 'score' only; in (0, 2). Defaults to beta."},
    )

    def _check_options(self) -> None:
        super()._check_options()
        if self.beta is None:
            self.beta = 5000.0 if self.variant == "squared" else 0.001
        check_dspo_parameters(beta=self.beta, score_weight=self.score_weight, variant=self.variant)
