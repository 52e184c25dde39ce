"""Configuration of DPH-RL."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from trl import GRPOConfig

from .._checks import EXPLAINED, above, at_least, between, default_of
from ..losses import Divergence, get_divergence
from ..losses.f_divergence import DIVERGENCES, INADMISSIBLE_DIVERGENCES
from ..rollout import RolloutConfig
from ..training.divergence_options import divergence_parameter, given_parameters


ESTIMATORS = ("sampled", "exact", "nll")
_EXACT = ("forward_kl", "reverse_kl")


@dataclass
class DPHRLConfig(RolloutConfig, GRPOConfig):
    r"""
    Configuration class for [`DPHRLTrainer`].

    Only the parameters that DPH-RL adds are listed; the others are those of [`~trl.GRPOConfig`].

    Parameters:
        rehearsal_coef (`float`, *optional*, defaults to `0.1`):
            eta: weight of the divergence, a mean over tokens of the rehearsed answers, beside GRPO's loss. At 0 this
            is GRPO. The useful size depends on task and divergence: try 0.01 to 1, and read `rehearsal/forgotten`.
            (The released code averages rehearsed rows into the same batches, so its coefficients act as about a
            ninth of what they say.)
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            The f-divergence between the policy and what training started from, at the tokens of the rehearsed answers.
            Possible values are: `"forward_kl"`, `"jeffreys"`, `"alpha"`, `"js"`, `"hellinger"`, `"skew_js"`,
            `"reverse_kl"`, `"chi_po"`, `"neyman"`, `"pearson"`, `"total_variation"`, `"le_cam"`. Only the forward KL,
            Jeffreys and Neyman bring back tokens that are all but forgotten; see the page. Pass an instance of
            [`~trl_ext.losses.Divergence`] to the trainer to use one of your own.
        alpha (`float`, *optional*), skew (`float`, *optional*), gamma (`float`, *optional*):
            Parameters of `divergence="alpha"`, `"skew_js"` and `"chi_po"`, as in [`FDPOConfig`].
        rehearsal_batch_size (`int`, *optional*):
            Rehearsed answers that each process adds to a micro-step. Defaults to an eighth of
            `per_device_train_batch_size`, at least 1.
        rehearsal_max_logratio (`float` or `None`, *optional*, defaults to `3.0`):
            Beyond this log ratio of policy to start, a token's term continues along its tangent: the term stays
            finite, and its gradient keeps its sign. `None` leaves it exact.
        rehearsal_estimator (`str`, *optional*, defaults to `"sampled"`):
            How the divergence is estimated. `"sampled"`: at the saved tokens, from their saved log-probabilities.
            `"exact"`: over the whole vocabulary at the saved positions, with the adapter switched off, or with
            `ref_model`, as the start; no variance, and it holds the distribution where the former holds one token a
            position. For `"forward_kl"` and `"reverse_kl"`. `"nll"`: the likelihood of the answers, for demonstrations
            that the initial model did not write; over many passes it memorizes them.

    Raises:
        `ValueError`: If an option has a value of a wrong type or out of its range, has no effect, or cannot be honored.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("log_completions_hub_repo", "log_completions"),
        *((f"entropy_{name}", "use_adaptive_entropy") for name in ("coef_min", "coef_max", "coef_delta", "target")),
        ("use_bias_correction_kl", "beta"),
        *(
            (f"vllm_importance_sampling_{name}", "use_vllm")
            for name in ("correction", "mode", "clip_max", "clip_min", "cap")
        ),
    )
    _inherited_annotations: ClassVar[dict[str, Any]] = {
        "loss_type": Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
        "scale_rewards": bool | Literal["group", "batch", "none"],
        "importance_sampling_level": Literal["token", "sequence"],
        "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
        "delta": Annotated[float | None, above(0)],
        "top_entropy_quantile": Annotated[float, between(0, 1)],
        "entropy_coef": float,
        "off_policy_mask_threshold": Annotated[float | None, above(0)],
        "max_tool_calling_iterations": Annotated[int | None, at_least(0)],
    }

    rehearsal_coef: Annotated[float, at_least(0)] = field(
        default=0.1,
        metadata={
            "help": "Weight of the divergence on the rehearsed answers, a mean over their tokens, beside GRPO's loss. 0 "
            "is GRPO."
        },
    )
    divergence: Annotated[str, EXPLAINED] = field(
        default="forward_kl",
        metadata={
            "help": "The f-divergence between the policy and what training started from, at the tokens of the "
            "rehearsed answers. 'forward_kl', 'jeffreys' and 'neyman' bring back what is all but forgotten.",
            "choices": [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES],
        },
    )
    alpha: float | None = divergence_parameter("alpha")
    skew: float | None = divergence_parameter("skew")
    gamma: float | None = divergence_parameter("gamma")
    rehearsal_batch_size: Annotated[int | None, at_least(1)] = field(
        default=None,
        metadata={
            "help": "Rehearsed answers that each process adds to a micro-step. Default: an eighth of "
            "`per_device_train_batch_size`, at least 1."
        },
    )
    rehearsal_max_logratio: Annotated[float | None, above(0)] = field(
        default=3.0,
        metadata={
            "help": "Beyond this log ratio of policy to start, a token's term continues along its tangent. `None` "
            "leaves it exact."
        },
    )
    rehearsal_estimator: str = field(
        default="sampled",
        metadata={
            "help": "'sampled': the divergence at the saved tokens. 'exact': over the whole vocabulary at their "
            "positions (forward_kl, reverse_kl). 'nll': the answers' likelihood, for demonstrations.",
            "choices": list(ESTIMATORS),
        },
    )

    def _check_options(self) -> None:
        super()._check_options()
        self.get_divergence()
        self._check_estimator()
        self._check_loss_options()
        if self.rehearsal_batch_size is None:
            self.rehearsal_batch_size = max(1, self.per_device_train_batch_size // 8)

    def _check_estimator(self) -> None:
        estimator = self.rehearsal_estimator
        if estimator == "sampled":
            return
        if self.rehearsal_max_logratio not in (None, 3.0):
            raise ValueError(
                f"`rehearsal_max_logratio={self.rehearsal_max_logratio!r}` has no effect with `rehearsal_estimator="
                f"{estimator!r}`, which has no tail to bound. Leave it at its default (3.0)."
            )
        if estimator == "nll" and self.divergence != "forward_kl":
            raise ValueError(
                f"`divergence={self.divergence!r}` has no effect with `rehearsal_estimator='nll'`, which maximizes a "
                "likelihood. Use `rehearsal_estimator='sampled'`, or leave `divergence` at its default ('forward_kl')."
            )
        if estimator == "exact" and self.divergence not in _EXACT:
            raise ValueError(
                f"`rehearsal_estimator='exact'` is not supported with `divergence={self.divergence!r}`: it computes "
                f"{' and '.join(map(repr, _EXACT))} over the vocabulary. Use `rehearsal_estimator='sampled'`."
            )

    def _check_loss_options(self) -> None:
        """TRL reads the parameters of one loss under others as well, where they do nothing."""
        for option in dataclasses.fields(GRPOConfig):
            loss = option.name.partition("_")[0]
            value = getattr(self, option.name)
            if loss in ("sapo", "vespo") and loss != self.loss_type and value != default_of(option):
                raise ValueError(
                    f"`{option.name}={value!r}` has no effect with `loss_type={self.loss_type!r}`. Set "
                    f"`loss_type={loss!r}`, or leave it at its default ({default_of(option)!r})."
                )

    def get_divergence(self, given: Divergence | None = None) -> Divergence:
        """
        The divergence that `divergence` and its parameters name, or the one that was given to the trainer.

        Raises:
            `TypeError`: If `given` is not a [`~trl_ext.losses.Divergence`]. `ValueError`: If there are two
            divergences, or one that the estimator does not have.
        """
        params = given_parameters(self)
        if given is None:
            return get_divergence(self.divergence, allow_inadmissible=True, **params)
        if not isinstance(given, Divergence):
            raise TypeError(
                f"`divergence` of the trainer must be a `trl_ext.losses.Divergence`, got {given!r}. Name one of the "
                "built-in ones in `DPHRLConfig(divergence=...)`."
            )
        if self.divergence != "forward_kl" or params:
            raise ValueError(
                f"There are two divergences: {given!r}, given to the trainer, and `divergence={self.divergence!r}` of "
                "the configuration. Leave one of them out."
            )
        if self.rehearsal_estimator != "sampled":
            raise ValueError(
                f"A divergence of your own ({given!r}) needs `rehearsal_estimator='sampled'`, got "
                f"{self.rehearsal_estimator!r}."
            )
        return given
