"""Configuration of TDPO."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from .._checks import at_least
from ..losses.tdpo import VARIANTS
from ..preference import PreferenceConfig


_WHOLE_DISTRIBUTION = (
    "TDPO's KL needs the reference's whole next-token distribution at every position together with the policy's "
    "current one, of which precomputing keeps one number a response"
)


@dataclass
class TDPOConfig(PreferenceConfig):
    r"""
    Configuration class for [`TDPOTrainer`].

    Only the parameters that TDPO adds are listed; the others are those of [`~trl.DPOConfig`]. `beta` multiplies the
    whole bracket of the loss, so the weight of the KL term is `alpha * beta`.

    Parameters:
        variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo2"`, whose chosen KL has no gradient, or `"tdpo1"`. The released code runs TDPO1 unless told
            otherwise, since July 2024.
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of TDPO2's KL term, not below 0. At 0 the loss is DPO's. TDPO1 has none: leave it out there.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "precompute_ref_log_probs": _WHOLE_DISTRIBUTION,
        "precompute_ref_batch_size": _WHOLE_DISTRIBUTION,
        "reference_cache_dir": _WHOLE_DISTRIBUTION,
    }

    variant: str = field(
        default="tdpo2",
        metadata={"help": "'tdpo2', whose chosen KL has no gradient, or 'tdpo1'.", "choices": list(VARIANTS)},
    )
    alpha: Annotated[float, at_least(0)] = field(
        default=0.5,
        metadata={"help": "Weight of TDPO2's KL term, not below 0. At 0 the loss is DPO's. TDPO1 has none."},
    )

    def _check_options(self) -> None:
        super()._check_options()
        if self.variant == "tdpo1" and self.alpha != 0.5:
            raise ValueError(
                f"`alpha={self.alpha!r}` has no effect with `variant='tdpo1'`, whose KL term has no weight of its "
                "own. Leave `alpha` at its default (0.5), or use `variant='tdpo2'`."
            )
