"""Configuration of Score as Action."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from .._checks import EXPLAINED, above, at_least
from ..diffusion import OnlineDiffusionConfig
from ..losses import DIVERGENCES, INADMISSIBLE_DIVERGENCES, Divergence, get_divergence
from ..training.divergence_options import divergence_parameter, given_parameters


REWARD_SCALES = ("reference", "none", "group")
VALUE_NETWORKS = ("latent", "reward")
KL = "reverse_kl"


@dataclass
class ScoreAsActionConfig(OnlineDiffusionConfig):
    r"""
    Configuration class for [`ScoreAsActionTrainer`].

    Only the parameters that Score as Action adds are listed; the others are those of
    [`~trl_ext.diffusion.OnlineDiffusionConfig`].

    Parameters:
        beta (`float`, *optional*, defaults to `0.01`):
            Price of a nat of KL to the reference, in units of `reward_scale`. KL is summed over steps and dimensions.
            With 0 there is no penalty, which is DDPO's objective.
        reward_scale (`str`, *optional*, defaults to `"reference"`):
            What rewards are divided by. `"reference"`: their standard deviation among the reference's images of one
            prompt, measured once before the first step. `"none"`: 1. `"group"`: their standard deviation within each
            group, as published for DDPO and Flow-GRPO; it shrinks in training, so that `beta` loses its meaning.
        num_reference_images (`int`, *optional*, defaults to `64`):
            Images of the reference from which that standard deviation is measured. A reward that is the same for all
            of one prompt's images stops the run.
        kl_in_return (`bool`, *optional*, defaults to `True`):
            Whether the return of a step includes the KL of later steps. `False` is Flow-GRPO's loss; it is not the
            gradient of the objective, and stays closer to the reference than its optimum.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            The f-divergence between the distributions of images, policy to reference, that `beta` is the price of, by
            the names of [`~trl_ext.losses.get_divergence`]. Others than `"reverse_kl"` transform the rewards
            (https://huggingface.co/papers/2403.06279), which takes images of the reference of every prompt.
        alpha, skew, gamma (`float`, *optional*):
            Parameters of `"alpha"`, `"skew_js"` and `"chi_po"`.
        reference_images_per_prompt (`int`, *optional*, defaults to `24`):
            Images of the reference of each prompt, for another `divergence` than `"reverse_kl"`. They are sampled when
            a prompt is first trained on, and their rewards are kept in checkpoints.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip of the ratio of policies for each dimension, the `D`-th root of the ratio of densities, as in DDPO and
            Flow-GRPO: 1e-4 is 1.6 nats at the 16,384 dimensions of Stable Diffusion 1.5. For `num_iterations` above 1.
        value_network (`str`, *optional*):
            A value that is taken from the returns beside the group's mean. `"latent"`: of a small network on the
            latent. `"reward"`: of the reward of the clean image that the policy predicts there, by the share of signal
            in the latent, and of the network by the rest, which costs a decode and a call of the reward functions for
            each of the sampler's noisy steps. The network is fitted to the returns of every window, and kept in
            checkpoints. A value changes the variance of the gradient and not its mean.
    """

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = ()
    _refused_options: ClassVar[dict[str, str]] = {}
    _inherited_annotations: ClassVar[dict[str, Any]] = {}

    beta: Annotated[float, at_least(0)] = field(
        default=0.01, metadata={"help": "Price of a nat of KL to the reference, in units of `reward_scale`."}
    )
    reward_scale: str = field(
        default="reference",
        metadata={
            "help": "What rewards are divided by: their standard deviation among the reference's images of one prompt "
            "('reference'), 1 ('none'), or that of each group, as published ('group').",
            "choices": list(REWARD_SCALES),
        },
    )
    num_reference_images: Annotated[int, at_least(2)] = field(
        default=64, metadata={"help": "Images of the reference from which the spread of its rewards is measured."}
    )
    kl_in_return: bool = field(
        default=True, metadata={"help": "Whether the return of a step includes the KL of later steps."}
    )
    divergence: Annotated[str, EXPLAINED] = field(
        default=KL,
        metadata={
            "help": "The f-divergence of policy to reference. Possible values are: "
            f"{', '.join(map(repr, [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES]))}.",
            "choices": [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES],
        },
    )
    alpha: float | None = divergence_parameter("alpha")
    skew: float | None = divergence_parameter("skew")
    gamma: float | None = divergence_parameter("gamma")
    reference_images_per_prompt: Annotated[int, at_least(2)] = field(
        default=24,
        metadata={"help": "Images of the reference of each prompt, for another divergence than 'reverse_kl'."},
    )
    epsilon: Annotated[float, above(0)] = field(
        default=1e-4, metadata={"help": "Clip of the ratio for each dimension, with `num_iterations` above 1."}
    )

    value_network: str | None = field(
        default=None,
        metadata={
            "help": "Baseline beside the group's mean: a small network's value of a latent ('latent'), or the reward "
            "of the predicted clean image, completed by the network ('reward').",
            "choices": list(VALUE_NETWORKS),
        },
    )

    def _check_options(self) -> None:
        super()._check_options()
        divergence = self.get_divergence()
        if self.epsilon != 1e-4 and self.num_iterations == 1:
            raise ValueError(
                f"`epsilon={self.epsilon!r}` has no effect with `num_iterations=1`, where the policy is the one that "
                "sampled and the ratio is 1. Raise `num_iterations`, or leave `epsilon` at its default (0.0001)."
            )
        if self.beta == 0 and not self.kl_in_return:
            raise ValueError(
                "`kl_in_return=False` has no effect with `beta=0.0`, where KL costs nothing. Leave it out."
            )
        if self.value_network is not None and self.reward_scale == "group":
            raise ValueError(
                f"`value_network={self.value_network!r}` with `reward_scale='group'`: rewards that every group divides "
                "by a number of its own have no value that a network could learn. Set `reward_scale='reference'`."
            )
        if self.divergence == KL:
            if self.reference_images_per_prompt != 24:
                raise ValueError(
                    f"`reference_images_per_prompt={self.reference_images_per_prompt}` has no effect with "
                    f"`divergence={KL!r}`, which needs none. Leave it at its default (24)."
                )
            return
        if divergence.curvature == 0:
            raise ValueError(
                f"`divergence={self.divergence!r}` has no surrogate reward, as its score has no inverse. Choose "
                "another."
            )
        if self.beta == 0:
            raise ValueError(f"`divergence={self.divergence!r}` has no effect with `beta=0.0`. Give `beta` above 0.")
        if self.reward_scale == "group":
            raise ValueError(
                f"`divergence={self.divergence!r}` with `reward_scale='group'`: the reference's rewards of a prompt "
                "and those of the group must have one unit. Set `reward_scale='reference'` or 'none'."
            )

    def get_divergence(self) -> Divergence:
        """The divergence that `divergence` and its parameters name."""
        return get_divergence(self.divergence, allow_inadmissible=True, **given_parameters(self))
