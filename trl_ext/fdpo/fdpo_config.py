"""Configuration of f-DPO."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from .._checks import EXPLAINED, above
from ..losses import Divergence, get_divergence
from ..losses.f_divergence import DIVERGENCES
from ..preference import PreferenceConfig
from ..training.divergence_options import divergence_parameter, given_parameters


# TRL's names of what it has of the family; see `_convert_trl_options`.
_TRL_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


@dataclass
class FDPOConfig(PreferenceConfig):
    r"""
    Configuration class for [`FDPOTrainer`].

    With its defaults f-DPO is DPO. Only the parameters that f-DPO adds are listed; the others are those of
    [`~trl.DPOConfig`].

    TRL's own names of the family keep working here, so that a [`~trl.DPOConfig`] becomes an `FDPOConfig` by its name:
    `f_divergence_type` selects the divergence, and `f_alpha_divergence_coef`, whose convention is 1 minus the paper's,
    is converted to `alpha`. They cannot be mixed with `divergence` and `alpha`.

    Parameters:
        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            The f-divergence between policy and reference. Possible values are: `"reverse_kl"` (DPO), `"forward_kl"`,
            `"js"`, `"alpha"`, `"hellinger"`, `"jeffreys"`, `"skew_js"`, `"chi_po"`, `"neyman"`. Pass an instance of
            [`~trl_ext.losses.Divergence`] to the trainer to use one of your own.
        alpha (`float`, *optional*):
            Parameter of `divergence="alpha"` (0.5 unless given), any number above 0, in the f-DPO paper's convention:
            toward 0 it is the reverse KL (DPO), at 1 the forward KL. TRL's `f_alpha_divergence_coef` is 1 minus it.
        skew (`float`, *optional*):
            Parameter of `divergence="skew_js"` (0.5 unless given), in (0, 1): the weight of the policy in the mixture.
            At 0.5 it is half the Jensen-Shannon divergence of `"js"`.
        gamma (`float`, *optional*):
            Parameter of `divergence="chi_po"` (1 unless given), above 0: the weight of the KL divergence beside
            chi-squared.
        normalize_curvature (`bool`, *optional*, defaults to `False`):
            Divide `beta` by the divergence's curvature f''(1), so that every divergence starts with DPO's gradient.
            Use it to compare divergences: at equal `beta` they differ by up to 8 times in their initial step size.
        max_log_weight (`float` or `None`, *optional*, defaults to `20.0`):
            Some divergences weigh a pair's gradient by an exponential of its log ratio: forward KL by 1/u, which at a
            log ratio of -90 is e^90 and makes gradient clipping throw the whole step away. Where the log of that
            weight exceeds this bound, the divergence's score continues along its tangent: the pull stays, at weight
            e^max_log_weight. The share of responses there is logged as `tail/*`. `None` leaves the divergence exact.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _honored_options: ClassVar[tuple[str, ...]] = ("f_divergence_type", "f_alpha_divergence_coef")

    divergence: Annotated[str, EXPLAINED] = field(
        default="reverse_kl",
        metadata={
            "help": "The f-divergence between policy and reference. Possible values are: 'reverse_kl' (DPO), "
            "'forward_kl', 'js', 'alpha', 'hellinger', 'jeffreys', 'skew_js', 'chi_po', 'neyman'.",
            "choices": [*DIVERGENCES, "js_divergence"],
        },
    )
    alpha: float | None = divergence_parameter("alpha")
    skew: float | None = divergence_parameter("skew")
    gamma: float | None = divergence_parameter("gamma")
    normalize_curvature: bool = field(
        default=False,
        metadata={
            "help": "Divide `beta` by the divergence's curvature f''(1), so that every divergence starts with DPO's "
            "gradient. Use it to compare divergences."
        },
    )
    max_log_weight: Annotated[float | None, above(0)] = field(
        default=20.0,
        metadata={
            "help": "Where the log of a response's gradient weight exceeds this bound, the divergence's score "
            "continues along its tangent. The share of responses there is logged as `tail/*`. `None` leaves the "
            "divergence exact."
        },
    )

    def _check_options(self) -> None:
        super()._check_options()
        self._convert_trl_options()
        self.get_divergence()

    def get_divergence(self, given: Divergence | None = None) -> Divergence:
        """
        The divergence that `divergence` and its parameters name, or the one that was given to the trainer.

        Raises:
            `TypeError`: If `given` is not a [`~trl_ext.losses.Divergence`]. `ValueError`: If there are two
            divergences, or the divergence cannot be trained with under this configuration.
        """
        if given is None:
            divergence = get_divergence(self.divergence, **given_parameters(self))
        elif not isinstance(given, Divergence):
            raise TypeError(
                f"`divergence` must be an instance of `trl_ext.losses.Divergence`, got {given!r}. To use one by name, "
                "set it in the configuration: `FDPOConfig(divergence=...)`."
            )
        elif self.divergence != "reverse_kl":
            raise ValueError(
                f"A divergence was given to the trainer ({given!r}) and another in `args` "
                f"(`divergence={self.divergence!r}`). Give one."
            )
        else:
            divergence = given
        self.check_divergence(divergence)
        return divergence

    def check_divergence(self, divergence: Divergence) -> None:
        """Raises `ValueError` if the divergence cannot be trained with under this configuration."""
        if not divergence.admissible:
            raise ValueError(
                f"The divergence {divergence!r} is not admissible: its score does not tend to -inf as the policy's "
                "probability of a response tends to 0, so f-DPO's optimum is not that of the constrained problem. Add "
                "a multiple of the KL divergence to it, as 'chi_po' does to chi-squared."
            )
        if self.fp16 and divergence.exponentiates:
            raise ValueError(
                f"`fp16=True` is not supported with the divergence {divergence.name!r}, whose gradients grow "
                "exponentially with the log ratio and overflow under loss scaling. Use `bf16=True`, or a divergence "
                "with bounded gradient weights: 'reverse_kl', 'js' or 'skew_js'."
            )

    def _convert_trl_options(self) -> None:
        if self.f_divergence_type not in ("reverse_kl", *_TRL_DIVERGENCES):
            raise ValueError(
                f"`f_divergence_type={self.f_divergence_type!r}` is not one of TRL's: 'reverse_kl', "
                f"{', '.join(map(repr, _TRL_DIVERGENCES))}. `divergence` takes these and more, under the paper's "
                "names."
            )
        if self.f_divergence_type != "reverse_kl":
            if self.divergence != "reverse_kl":
                raise ValueError(
                    f"Both `divergence={self.divergence!r}` and TRL's `f_divergence_type={self.f_divergence_type!r}` "
                    "were given. Use one; `divergence` takes the paper's names and conventions."
                )
            self.divergence = _TRL_DIVERGENCES[self.f_divergence_type]
            if self.divergence == "alpha":
                if self.alpha is not None:
                    raise ValueError(
                        f"`alpha={self.alpha!r}` (the paper's convention) cannot be combined with TRL's "
                        f"`f_divergence_type='alpha_divergence'`, whose `f_alpha_divergence_coef` is 1 minus it. Use "
                        f"`divergence='alpha', alpha={self.alpha!r}`."
                    )
                self.alpha = 1.0 - self.f_alpha_divergence_coef
        elif self.f_alpha_divergence_coef != 0.5:
            raise ValueError(
                f"`f_alpha_divergence_coef={self.f_alpha_divergence_coef!r}` is TRL's parameter and has no effect "
                "unless `f_divergence_type='alpha_divergence'`. In the paper's convention it reads "
                f"`divergence='alpha', alpha={1.0 - self.f_alpha_divergence_coef!r}`."
            )
        # Once converted, `divergence` and `alpha` are the only place to look.
        self.__dict__.update(f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5)
