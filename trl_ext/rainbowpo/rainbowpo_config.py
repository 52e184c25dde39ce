"""Configuration of RainbowPO."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from .._checks import above, at_least, between
from ..losses.rainbowpo import LINKS
from ..preference.dispersion import DispersionConfig


# (length_normalization, mixing_alpha is 1, contextual_scaling) -> link -> name of the method at that corner
_CORNERS = {
    (False, True, False): {
        "sigmoid": "DPO",
        "hinge": "SLiC's hinge loss on DPO's rewards (TRL's `hinge`)",
        "ipo": "IPO on summed log-probabilities",
    },
    (True, True, False): {
        "sigmoid": "length-normalized DPO (TRL's `sigmoid_norm`)",
        "ipo": "IPO (TRL's `ipo`)",
    },
    (False, True, True): {
        "sigmoid": "Mallows-DPO",
        "ipo": "Mallows-DPO with the link 'ipo'",
    },
    (True, True, True): {"sigmoid": "length-normalized Mallows-DPO"},
}


@dataclass
class RainbowPOConfig(DispersionConfig):
    r"""
    Configuration class for [`RainbowPOTrainer`].

    Only the parameters that RainbowPO adds or changes are listed; the others are those of [`~trl.DPOConfig`]. The
    defaults are those of the released code, `dpo_config.py`, and of one of its three final notebooks; its README has
    others (`beta=0.1`, `gamma=0`, no mixing). The paper does not say which settings its best number has.

    Parameters:
        beta (`float`, *optional*, defaults to `10.0`):
            Scale of the loss's argument. With length normalization the argument is a difference per token and usual
            values are 2.5 to 10; without it, 0.1.
        length_normalization (`bool`, *optional*, defaults to `True`):
            Divide the log-probability of each response by its number of tokens, for policy, reference and SFT term.
        mixing_alpha (`float`, *optional*, defaults to `0.25`):
            Share of the reference in the mixed reference, in [0, 1]. At 1 it is DPO's reference; at 0 no
            log-probability of the reference is read, and without contextual scaling no reference model is loaded,
            built or run.
        gamma (`float`, *optional*, defaults to `0.1`):
            Home advantage: the lead, in the unit of the log-probabilities, of the chosen response in the rest of the
            mixed reference. It counts `1 - mixing_alpha` times and is inside `beta`: SimPO's margin is `beta * gamma`.
        contextual_scaling (`bool`, *optional*, defaults to `True`):
            Multiply the argument by the weight of the pair's prompt, as Mallows-DPO does.
        kappa (`float` or `str`, *optional*, defaults to `"auto"`):
            Scale of the weights `-kappa log(dispersion)`. `"auto"` makes them average 1 over the training set; it is
            estimated once, from the reference, before the first loss, reported on the model card and kept in
            checkpoints. The released code has the constant 0.29, which is such an estimate for Llama-3-8B-Instruct.
        num_kappa_samples (`int` or `None`, *optional*, defaults to `1024`):
            Number of training pairs, evenly spaced, from which `kappa="auto"` is estimated. `None` takes them all.
        dispersion_column (`str`, *optional*):
            Column of the datasets, evaluation sets included, that holds the dispersion of each pair, a number in [0,
            1]: 0 where everybody prefers the chosen response, 1 where people are evenly split. It takes the place of
            the reference's entropy, which is then not computed.
        link (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`, `"ipo"`, `"squared_hinge"` or `"cauchy"`. See [`~trl_ext.losses.rainbow_po_loss`].
        sft_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of the chosen response, per token with length normalization, else
            summed. The released code's coefficient is 0.5, switched off.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("kappa", "contextual_scaling"),
        ("num_kappa_samples", "contextual_scaling"),
        ("dispersion_column", "contextual_scaling"),
    )

    beta: Annotated[float, above(0)] = field(
        default=10.0,
        metadata={"help": "Scale of the loss's argument: 2.5 to 10 with length normalization, about 0.1 without."},
    )
    length_normalization: bool = field(
        default=True,
        metadata={"help": "Divide the log-probability of each response by its number of tokens."},
    )
    mixing_alpha: Annotated[float, between(0, 1)] = field(
        default=0.25,
        metadata={"help": "Share of the reference in the mixed reference, in [0, 1]: 1 is DPO's, 0 SimPO's."},
    )
    gamma: float = field(
        default=0.1,
        metadata={
            "help": "Home advantage of the chosen response, counted 1 - mixing_alpha times. SimPO's margin is beta * "
            "gamma."
        },
    )
    contextual_scaling: bool = field(
        default=True,
        metadata={"help": "Multiply the argument by the weight of the pair's prompt, as Mallows-DPO does."},
    )
    link: str = field(
        default="sigmoid",
        metadata={
            "help": "Link between argument and loss. Possible values are: 'sigmoid', 'hinge', 'ipo', 'squared_hinge', "
            "'cauchy'.",
            "choices": list(LINKS),
        },
    )
    sft_coef: Annotated[float, at_least(0)] = field(
        default=0.0,
        metadata={"help": "Weight of the negative log-likelihood of the chosen response."},
    )

    def _check_options(self) -> None:
        super()._check_options()
        if self.mixing_alpha == 1 and self.gamma not in (0, 0.1):
            raise ValueError(
                f"`gamma={self.gamma!r}` has no effect with `mixing_alpha=1`: it counts `1 - mixing_alpha` times. "
                "Lower `mixing_alpha`, or leave `gamma` at its default (0.1)."
            )

    @property
    def uses_dispersion(self) -> bool:
        return self.contextual_scaling

    @property
    def amounts_to(self) -> str:
        """The name that `equivalent_method` had in 0.1.0."""
        return self.equivalent_method

    @property
    def equivalent_method(self) -> str:
        """The method that these options amount to, by its own name where it has one."""
        corner = (self.length_normalization, self.mixing_alpha == 1, self.contextual_scaling)
        name = _CORNERS.get(corner, {}).get(self.link)
        if (self.length_normalization, self.mixing_alpha, self.contextual_scaling) == (True, 0, False):
            margin = f"{self.beta:g} x {self.gamma:g} = {self.beta * self.gamma:g}"
            name = {"sigmoid": f"SimPO with the margin {margin}"}.get(self.link)
        if name is None:
            if self.mixing_alpha == 1:
                reference = "the reference"
            elif self.mixing_alpha == 0:
                reference = f"no reference, a margin of {self.gamma:g}"
            else:
                margin = f"{1 - self.mixing_alpha:g} x {self.gamma:g}"
                reference = f"{self.mixing_alpha:g} of the reference, a margin of {margin}"
            parts = [
                "log-probabilities per token" if self.length_normalization else "summed log-probabilities",
                reference,
                *(["contextual scaling"] if self.contextual_scaling else []),
                f"link '{self.link}'",
            ]
            name = f"RainbowPO ({', '.join(parts)})"
        return f"{name}, with an SFT term of weight {self.sft_coef:g}" if self.sft_coef else name
