"""Configuration of f-DPG."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from trl import RLOOConfig

from .._checks import EXPLAINED, above, at_least
from ..losses import Divergence, get_divergence
from ..losses.f_divergence import DIVERGENCES, INADMISSIBLE_DIVERGENCES
from ..rollout import RolloutConfig
from ..training.divergence_options import divergence_parameter, given_parameters


_OTHER_POLICY = "the policy whose log-probabilities are compared with the target would not be the one that was sampled"


@dataclass
class FDPGConfig(RolloutConfig, RLOOConfig):
    r"""
    Configuration of [`FDPGTrainer`]: that of [`~trl.RLOOTrainer`] with the target and the divergence to it.

    Args:
        divergence (`str`, *optional*, defaults to `"js"`):
            The f-divergence `D_f(pi || p)` that is minimized, by the names of [`~trl_ext.losses.get_divergence`],
            `"pearson"`, `"total_variation"` and `"le_cam"` included.
        alpha, skew, gamma (`float`, *optional*):
            Parameters of `"alpha"`, `"skew_js"` and `"chi_po"`.
        target (`str`, *optional*, defaults to `"reference"`):
            `"reference"`: `log P = log pi_ref + R / beta`, R being the weighted sum of the rewards. `"none"`: R itself
            is the log-score of a response, and no reference is loaded.
        beta (`float`, *optional*, defaults to `0.1`):
            Temperature of the target, above 0. Without a meaning for `target="none"`.
        partition (`str`, *optional*, defaults to `"group"`):
            How the target's normalizer is estimated: from the responses of a `"group"`, as a running mean of a
            `"prompt"`, or as one running mean, `"global"`.
        max_pseudo_reward (`float`, *optional*):
            Upper bound of a response's pseudo-reward, above 0. That of forward KL and Neyman is unbounded.
        num_generations (`int`, *optional*, defaults to `8`):
            Responses to a prompt. With fewer, the normalizer of a group is biased.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "normalize_advantages": "the size of the advantages is part of the objective",
        "reward_clip_range": "it acts on RLOO's rewards, which are replaced; bound pseudo-rewards by "
        "`max_pseudo_reward`",
        "sync_ref_model": "it moves the target",
        "mask_truncated_completions": "a response without tokens has no log-probability; one that is cut is scored as "
        "the prefix that it is",
        "temperature": _OTHER_POLICY,
        "top_p": _OTHER_POLICY,
        "top_k": _OTHER_POLICY,
        "min_p": _OTHER_POLICY,
        "repetition_penalty": _OTHER_POLICY,
        "generation_kwargs": _OTHER_POLICY,
    }
    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = ()
    _inherited_annotations: ClassVar[dict[str, Any]] = {}
    other_defaults = {"beta": 0.1, "num_generations": 8}

    divergence: Annotated[str, EXPLAINED] = field(
        default="js",
        metadata={
            "help": "The f-divergence of the policy to the target. Possible values are: "
            f"{', '.join(map(repr, [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES]))}.",
            "choices": [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES],
        },
    )
    alpha: float | None = divergence_parameter("alpha")
    skew: float | None = divergence_parameter("skew")
    gamma: float | None = divergence_parameter("gamma")
    target: str = field(
        default="reference",
        metadata={
            "help": "'reference': the reference times exp(reward / beta). 'none': the rewards are log-scores.",
            "choices": ["reference", "none"],
        },
    )
    beta: Annotated[float, at_least(0)] = field(
        default=0.1, metadata={"help": "Temperature of the target: the smaller, the more the rewards count."}
    )
    partition: str = field(
        default="group",
        metadata={
            "help": "What the target's normalizer is a mean over: the responses of a group, all responses to a prompt "
            "so far, or all responses so far.",
            "choices": ["group", "prompt", "global"],
        },
    )
    max_pseudo_reward: Annotated[float | None, above(0)] = field(
        default=None,
        metadata={"help": "Upper bound of a response's pseudo-reward; the share that exceeds it is logged."},
    )
    num_generations: Annotated[int, at_least(2)] = field(
        default=8, metadata={"help": "Responses to each prompt, from which a group's normalizer is estimated."}
    )

    def _check_options(self) -> None:
        super()._check_options()
        self.get_divergence()
        if self.target == "none":
            if self.beta not in (0.0, self.other_defaults["beta"]):
                raise ValueError(
                    f"`beta={self.beta!r}` has no effect with `target='none'`, where the rewards are log-scores. Leave "
                    "`beta` out."
                )
            self.beta = 0.0  # TRL loads no reference
        elif self.beta == 0:
            raise ValueError(
                "`beta=0.0` with `target='reference'` is a target that only allows the best response. Give `beta` "
                "above 0, or `target='none'` if the rewards are log-scores."
            )

    def get_divergence(self) -> Divergence:
        """The divergence that `divergence` and its parameters name."""
        return get_divergence(self.divergence, allow_inadmissible=True, **given_parameters(self))
