r"""
Score as action: policy gradients through the steps of a stochastic diffusion sampler.

Sources: *Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time Reinforcement Learning*,
https://huggingface.co/papers/2502.01819; *Fine-tuning of diffusion models via stochastic control: entropy regularization
and beyond*, https://huggingface.co/papers/2403.06279, for the surrogate reward; *Flow-GRPO*,
https://huggingface.co/papers/2505.05470, for the stochastic sampler of flows.

A sampler goes from noise to an image in K Gaussian steps, `x' ~ N(mean, std^2)`, whose means move with the prediction of
the denoiser: the action. The objective is

    J = E[reward] - beta sum_k KL(policy's step k || reference's step k)

KL is in nats, SUMMED over the dimensions of a latent. Its gradient has two parts at each step: the KL of that step,
differentiated directly ([`step_kl`]), and the score of the step times what comes after it, the reward minus beta times the
KL of LATER steps ([`reward_advantages`]). A KL that is only added to the loss lacks the second part, and optimizes
something else.
"""

import math
from typing import NamedTuple

import torch

from ._inputs import is_number, prepare_inputs, saturation
from .f_divergence import Divergence, get_divergence


PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


class Transition(NamedTuple):
    """
    One Gaussian step of a sampler.

    Args:
        mean (`torch.Tensor` of shape `(B, ...)`): Mean of the next sample, with gradient to the prediction.
        std (`torch.Tensor` of shape `(B,)`): Standard deviation in every dimension; 0 for a deterministic step.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def log_ratio(self, next_sample: torch.Tensor, old_mean: torch.Tensor) -> torch.Tensor:
        """
        `log p(next_sample) - log p_old(next_sample)` of this step and one with another mean, in nats.

        Computed from the difference of the means, so that it is exactly 0 for equal ones: two log-densities are large
        numbers that nearly cancel.

        Args:
            next_sample (`torch.Tensor` of shape `(B, ...)`):
                What was sampled.
            old_mean (`torch.Tensor` of shape `(B, ...)`):
                The mean that it was sampled with. The standard deviation is the same.

        Returns:
            `torch.Tensor` of shape `(B,)`, summed over the dimensions.

        Raises:
            ValueError: if the shapes differ, an input is not floating-point, or a step is deterministic.
        """
        _require_noise(self.std)
        mean, next_sample, old_mean = prepare_inputs(
            mean=self.mean, next_sample=next_sample, old_mean=old_mean.detach()
        )
        std = _expand(self.std.to(mean.dtype), mean)
        terms = ((mean - old_mean) / std) * ((next_sample - mean) / std + (next_sample - old_mean) / std) / 2
        return terms.flatten(1).sum(1)


def transition(
    sample: torch.Tensor,
    prediction: torch.Tensor,
    level: torch.Tensor | float,
    next_level: torch.Tensor | float,
    *,
    noise_level: float,
    prediction_type: str,
) -> Transition:
    r"""
    Mean and standard deviation of one step of the stochastic sampler, from the denoiser's prediction.

    With `a` and `a'` the levels of this node and the next (less noisy) one, `eta` the noise level and
    `std = eta sqrt((1-a') / (1-a) (1 - a/a'))`:

        "epsilon"        mean = sqrt(a'/a) x + c eps,    c = sqrt(1 - a' - std^2) - sqrt(a'/a) sqrt(1-a)
        "v_prediction"   the same with eps = sqrt(a) v + sqrt(1-a) x
        "flow"           mean = x + v dt + g^2 / (2 s) (x + (1-s) v) dt,    std = g sqrt(-dt),    g = eta sqrt(s / (1-s))

    The first two are DDIM's step with its `eta`. In a flow the levels are `s`, `dt = s' - s`, and `v = noise - image`; at
    `s = 1`, where `g` would be infinite, `1 - s` in it is that of the next node.

    Args:
        sample (`torch.Tensor` of shape `(B, ...)`):
            `x`, the latents at this node.
        prediction (`torch.Tensor` of the same shape):
            The denoiser's output.
        level (`float` or `torch.Tensor` of shape `(B,)`):
            For "epsilon" and "v_prediction" `alphas_cumprod` at this node, in (0, 1); for "flow" the share of noise `s`, in
            (0, 1]. From the table of the pipeline, not from a scheduler that has sampled: sampling changes it.
        next_level (`float` or `torch.Tensor` of shape `(B,)`):
            The same at the next node: larger than `level`, up to 1, for the first two, and smaller, down to 0, for "flow".
        noise_level (`float`):
            `eta`, from 0 (deterministic) up; at most 1 except for "flow". With less than 1 (0.7 for flows) the optimum of
            the KL-regularized problem is biased towards the reference, because the image still depends on the first noise.
        prediction_type (`str`):
            `"epsilon"`, `"v_prediction"` or `"flow"`.

    Returns:
        [`Transition`]: `mean` of the sample's shape and `std` of shape `(B,)`, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, a level is out of its range or not less noisy than
            the one before, or a setting is not what is said above.

    Example: from `a = 0.5` to `a' = 0.8` at full noise, `std^2 = 0.2 / 0.5 * (1 - 0.625) = 0.15`.

    ```python
    >>> step = transition(torch.ones(1, 4), torch.zeros(1, 4), 0.5, 0.8, noise_level=1.0, prediction_type="epsilon")
    >>> step.mean, step.std.square()
    (tensor([[1.2649, 1.2649, 1.2649, 1.2649]]), tensor([0.1500]))
    ```
    """
    sample, prediction = prepare_inputs(sample=sample, prediction=prediction)
    from_sample, from_prediction, std = _coefficients(
        level, next_level, noise_level=noise_level, prediction_type=prediction_type, like=sample
    )
    mean = _expand(from_sample, sample) * sample + _expand(from_prediction, sample) * prediction
    return Transition(mean, std)


def step_kl(
    prediction: torch.Tensor,
    ref_prediction: torch.Tensor,
    level: torch.Tensor | float,
    next_level: torch.Tensor | float,
    *,
    noise_level: float,
    prediction_type: str,
) -> torch.Tensor:
    r"""
    `KL(policy's step || reference's step) = |mean - mean_ref|^2 / (2 std^2)` of one step from the same sample, in nats,
    summed over the dimensions.

    The means of [`transition`] differ only by the predictions, so the sample is not needed: with `d` their difference, the
    KL is `c^2 |d|^2 / (2 std^2)` for "epsilon", `a` times that for "v_prediction", and
    `(1 + eta^2 / 2)^2 (1-s) |dt| |d|^2 / (2 eta^2 s)` for "flow".

    Args:
        prediction (`torch.Tensor` of shape `(B, ...)`):
            The policy's output.
        ref_prediction (`torch.Tensor` of the same shape):
            The reference's. No gradient goes to it.
        level, next_level, noise_level, prediction_type:
            As for [`transition`].

    Returns:
        `torch.Tensor` of shape `(B,)`: nats of each sample, in float32, or float64 if an input is. Differentiable.

    Raises:
        ValueError: as for [`transition`], and if a step is deterministic: there the KL is infinite or 0. Leave the last step
            out where the sampler takes its mean.

    Example: in a flow at `s = 0.5`, `dt = -0.1` and `eta = 1`, predictions that differ by 0.2 in each of 10 dimensions have
    `1.5^2 * 0.5 * 0.1 * 0.4 / (2 * 0.5) = 0.045` nats.

    ```python
    >>> step_kl(torch.full((1, 10), 0.2), torch.zeros(1, 10), 0.5, 0.4, noise_level=1.0, prediction_type="flow")
    tensor([0.0450])
    ```
    """
    prediction, ref_prediction = prepare_inputs(prediction=prediction, ref_prediction=ref_prediction)
    _, from_prediction, std = _coefficients(
        level, next_level, noise_level=noise_level, prediction_type=prediction_type, like=prediction
    )
    _require_noise(std)
    # Squares of what is not larger than this, and sums of them, are finite.
    bound = math.sqrt(saturation(prediction.dtype) / max(prediction[0].numel(), 1)) if len(prediction) else 1.0
    difference = _expand(from_prediction / std, prediction) * (prediction - ref_prediction.detach())
    return difference.clamp(-bound, bound).square().flatten(1).sum(1) / 2
