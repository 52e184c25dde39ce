r"""
Score as action: policy gradients through the steps of a stochastic diffusion sampler.

Sources: *Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time Reinforcement Learning*,
https://huggingface.co/papers/2502.01819; *Fine-tuning of diffusion models via stochastic control: entropy
regularization and beyond*, https://huggingface.co/papers/2403.06279, for the surrogate reward; *Flow-GRPO*,
https://huggingface.co/papers/2505.05470, for the stochastic sampler of flows.

A sampler goes from noise to an image in K Gaussian steps, `x' ~ N(mean, std^2)`, whose means move with the prediction
of the denoiser: the action. The objective is

    J = E[reward] - beta sum_k KL(policy's step k || reference's step k)

KL is in nats, SUMMED over the dimensions of a latent. The gradient of J has two parts at each step: the gradient of
the step's own KL ([`step_kl`]), and the score of the step times its return, the reward minus beta times the KL of
LATER steps ([`reward_advantages`]). A loss that only adds the KL lacks its share of the second part, and has another
optimum.
"""

import math
from typing import NamedTuple

import torch

from ._inputs import is_number, prepare_inputs, saturation
from .f_divergence import Divergence, _working_dtype, get_divergence


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

        The log ratio is computed from the difference of the means, so it is exactly 0 for equal means. The two
        log-densities themselves are large numbers that nearly cancel.

        Args:
            next_sample (`torch.Tensor` of shape `(B, ...)`):
                The next sample that was drawn.
            old_mean (`torch.Tensor` of shape `(B, ...)`):
                The mean that it was drawn with. The standard deviation is the same.

        Returns:
            `torch.Tensor` of shape `(B,)`, summed over the dimensions.

        Raises:
            ValueError: if the shapes differ, an input is not floating-point, or a step is deterministic.
        """
        _require_noise(self.std)
        mean, next_sample, old_mean = prepare_inputs(
            mean=self.mean, next_sample=next_sample, old_mean=old_mean.detach()
        )
        std, bound = _expand(self.std, mean), _root_bound(mean)
        moved = ((mean - old_mean) / std).clamp(-bound, bound)
        around = ((next_sample - mean) / std + (next_sample - old_mean) / std).clamp(-bound, bound)
        return (moved * around).flatten(1).sum(1) / 2


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
        "flow"           mean = x + v dt + g^2 / (2 s) (x + (1-s) v) dt,   std = g sqrt(-dt),   g = eta sqrt(s / (1-s))

    The first two are DDIM's step with its `eta`. In a flow the levels are `s`, `dt = s' - s`, and `v = noise - image`;
    at `s = 1`, where `g` would be infinite, `1 - s` in it is that of the next node.

    Args:
        sample (`torch.Tensor` of shape `(B, ...)`):
            `x`, the latents at this node.
        prediction (`torch.Tensor` of the same shape):
            The denoiser's output.
        level (`float` or `torch.Tensor` of shape `(B,)`):
            For "epsilon" and "v_prediction" `alphas_cumprod` at this node, in (0, 1), and for the latter also 0, as in
            schedules with zero terminal SNR; for "flow" the share of noise `s`, in (0, 1]. From the table of the
            pipeline, not from a scheduler that has sampled: sampling changes it.
        next_level (`float` or `torch.Tensor` of shape `(B,)`):
            The same at the next node: larger than `level`, up to 1, for the first two, and smaller, down to 0, for
            "flow".
        noise_level (`float`):
            `eta`, from 0 (deterministic) up; at most 1 except for "flow". With less than 1 (0.7 for flows) the optimum
            of the KL-regularized problem is biased toward the reference, because the image still depends on the first
            noise.
        prediction_type (`str`):
            `"epsilon"`, `"v_prediction"` or `"flow"`.

    Returns:
        [`Transition`]: `mean` of the sample's shape and `std` of shape `(B,)`, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, a level is out of its range or not less noisy
            than the one before, or a setting is out of its range.

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
    return Transition(mean, std.to(mean.dtype))


def predicted_clean(
    sample: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor | float, *, prediction_type: str
) -> torch.Tensor:
    r"""
    The clean latents that a prediction implies, `E[x_0 | x]` of an exact denoiser:

        "epsilon"        x_0 = (x - sqrt(1-a) eps) / sqrt(a)
        "v_prediction"   x_0 = sqrt(a) x - sqrt(1-a) v
        "flow"           x_0 = x - s v

    Args:
        sample (`torch.Tensor` of shape `(B, ...)`):
            `x`, the latents at a node.
        prediction (`torch.Tensor` of the same shape):
            The denoiser's output there.
        level (`float` or `torch.Tensor` of shape `(B,)`), prediction_type (`str`):
            As for [`transition`].

    Returns:
        `torch.Tensor` of the sample's shape, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, or the prediction type is unknown.

    Example: half of the variance is noise, and the noise is predicted to be 0.

    ```python
    >>> predicted_clean(torch.ones(1, 2), torch.zeros(1, 2), 0.5, prediction_type="epsilon")
    tensor([[1.4142, 1.4142]])
    ```
    """
    sample, prediction = prepare_inputs(sample=sample, prediction=prediction)
    _check_prediction_type(prediction_type)
    (level,) = _levels(level=level, like=sample)
    if prediction_type == "flow":
        factors = torch.ones_like(level), -level
    elif prediction_type == "v_prediction":
        factors = level.sqrt(), -(1 - level).sqrt()
    else:
        factors = level.rsqrt(), -((1 - level) / level).sqrt()
    from_sample, from_prediction = (_expand(factor, sample) for factor in factors)
    return from_sample * sample + from_prediction * prediction


def share_of_signal(level: float, *, prediction_type: str) -> float:
    r"""
    The share of a latent's variance that is the image's, if image and noise have the variance 1: `alphas_cumprod` for
    "epsilon" and "v_prediction", `(1-s)^2 / ((1-s)^2 + s^2)` for "flow". It rises to 1 at the image.

    Example: a flow at half of its way has as much of the image as of the noise.

    ```python
    >>> share_of_signal(0.5, prediction_type="flow")
    0.5
    ```
    """
    _check_prediction_type(prediction_type)
    return (1 - level) ** 2 / ((1 - level) ** 2 + level**2) if prediction_type == "flow" else level


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
    `KL(policy's step || reference's step) = |mean - mean_ref|^2 / (2 std^2)` of one step from the same sample, in
    nats, summed over the dimensions.

    The means of [`transition`] differ only by the predictions, so the sample is not needed: with `d` their difference,
    the KL is `c^2 |d|^2 / (2 std^2)` for "epsilon", `a` times that for "v_prediction", and `(1 + eta^2 / 2)^2 (1-s)
    |dt| |d|^2 / (2 eta^2 s)` for "flow".

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
        ValueError: as for [`transition`], and if a step is deterministic: there the KL is infinite or 0. Leave the
            last step out where the sampler takes its mean.

    Example: in a flow at `s = 0.5`, `dt = -0.1` and `eta = 1`, predictions that differ by 0.2 in each of 10 dimensions
    have `1.5^2 * 0.5 * 0.1 * 0.4 / (2 * 0.5) = 0.045` nats.

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
    bound = _root_bound(prediction)
    difference = _expand(from_prediction / std, prediction) * (prediction - ref_prediction.detach())
    return difference.clamp(-bound, bound).square().flatten(1).sum(1) / 2


def reward_advantages(
    rewards: torch.Tensor,
    step_kls: torch.Tensor,
    *,
    beta: float,
    num_generations: int,
    reward_scale: float | str = 1.0,
    kl_in_return: bool = True,
    leave_one_out: bool = True,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Factor of each step's score in the policy gradient: the return after the step minus the group's baseline.

    With K steps in the order of sampling (the noisiest first), the return after step k is

        R_k = reward / reward_scale - beta sum_{j > k} KL_j

    The return does not include the step's own KL, which is differentiated directly. The baseline is the mean of `R_k`
    over the other images of the prompt. It does not depend on what the step draws, so the gradient stays unbiased.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Reward of each image. An image with a reward of NaN has the advantage 0 and enters no baseline.
        step_kls (`torch.Tensor` of shape `(B, K)`):
            KL of each step in nats, from [`step_kl`].
        beta (`float`):
            Price of a nat, in units of the scaled reward, at least 0. With 0 this is DDPO's objective.
        num_generations (`int`):
            Images per prompt, at least 2: rows `0` to `num_generations - 1` belong to the first prompt, and so on.
        reward_scale (`float` or `str`, *optional*, defaults to `1.0`):
            Constant that rewards are divided by, such as their standard deviation over samples of the reference,
            measured once. `"group"` divides by the standard deviation within each group, as published for Flow-GRPO.
            This deviation shrinks in training, so `beta` loses its meaning and the policy collapses. With `"group"`,
            the rewards of a group in which all are equal count as 0.
        kl_in_return (`bool`, *optional*, defaults to `True`):
            `False` leaves the KL of later steps out, as Flow-GRPO does. The result is not the gradient of the
            objective: it tilts each step by the mean reward instead of its exponential mean, and the policy stays
            closer to the reference.
        leave_one_out (`bool`, *optional*, defaults to `True`):
            Whether an image is left out of its own baseline. `False` multiplies every advantage by `1 - 1 / n`, where
            `n` is the number of images in the group.
        values (`torch.Tensor` of shape `(B, K)`, *optional*):
            Estimate of each return from what was known before the step, such as a value network's. It is subtracted
            before the mean of the others is, and leaves the gradient unbiased however wrong it is.

    Returns:
        `torch.Tensor` of shape `(B, K)`, in float32, or float64 if an input is, without gradient. An image that is
        alone in its group has the advantage 0.

    Raises:
        ValueError: if the shapes do not fit, an input is not floating-point, or a setting is out of its range.

    Example: two images of one prompt with rewards 1 and 0 and step KLs of (0.1, 0.2) and (0.1, 0.4) nats at beta 1.
    Returns are (0.8, 1) and (-0.4, 0): the advantages are the differences.

    ```python
    >>> kls = torch.tensor([[0.1, 0.2], [0.1, 0.4]])
    >>> reward_advantages(torch.tensor([1.0, 0.0]), kls, beta=1.0, num_generations=2)
    tensor([[ 1.2000,  1.0000],
            [-1.2000, -1.0000]])
    ```
    """
    if not is_number(beta) or beta < 0:
        raise ValueError(f"beta must be a finite number of at least 0, got {beta!r}.")
    if isinstance(num_generations, bool) or not isinstance(num_generations, int) or num_generations < 2:
        raise ValueError(
            f"num_generations must be an integer of at least 2, got {num_generations!r}: the baseline of an image is "
            "the mean of the others of its prompt."
        )
    if reward_scale != "group" and (not is_number(reward_scale) or reward_scale <= 0):
        raise ValueError(f"reward_scale must be a finite number greater than 0 or 'group', got {reward_scale!r}.")
    if rewards.dim() != 1 or step_kls.dim() != 2 or len(step_kls) != len(rewards):
        raise ValueError(
            f"rewards must be of shape (B,) and step_kls of shape (B, K), got {tuple(rewards.shape)} and "
            f"{tuple(step_kls.shape)}."
        )
    if len(rewards) % num_generations:
        raise ValueError(
            f"rewards must hold whole groups of num_generations={num_generations} images, got {len(rewards)} of them. "
            "Gather the groups of all processes first."
        )
    if values is not None and values.shape != step_kls.shape:
        raise ValueError(f"values must be of the shape of step_kls, got {tuple(values.shape)}.")
    (step_kls,) = prepare_inputs(step_kls=step_kls.detach())
    (rewards,) = prepare_inputs(rewards=rewards.detach())
    dtype = torch.promote_types(rewards.dtype, step_kls.dtype)
    rewards, step_kls = rewards.to(dtype).view(-1, num_generations), step_kls.to(dtype)

    counted = ~rewards.isnan()
    count = counted.sum(1, keepdim=True)
    rewards = rewards.masked_fill(~counted, 0.0)
    if reward_scale == "group":
        rewards = _standardized(rewards, counted, count)
    else:
        rewards = rewards / reward_scale
    rewards = rewards.clamp(-saturation(dtype), saturation(dtype))
    returns = rewards.unsqueeze(-1).expand(*rewards.shape, step_kls.shape[1])
    if kl_in_return and beta > 0:
        later = step_kls.flip(1).cumsum(1).flip(1) - step_kls
        returns = returns - beta * later.view(returns.shape)
    if values is not None:
        returns = returns - values.detach().to(dtype).view(returns.shape)

    counted, count = counted.unsqueeze(-1), count.unsqueeze(-1)
    mean = returns.masked_fill(~counted, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    # R - (n mean - R) / (n - 1) = (R - mean) n / (n - 1)
    factor = count / (count - 1).clamp(min=1) if leave_one_out else 1.0
    limit = 8 * saturation(dtype)
    advantages = ((returns - mean) * factor).clamp(-limit, limit)
    return advantages.masked_fill(~(counted & (count > 1)), 0.0).flatten(0, 1)


def reward_normalizer(ref_rewards: torch.Tensor, *, beta: float, divergence: str | Divergence) -> torch.Tensor:
    r"""
    `lambda` of each prompt, for which `E_ref[(f')^{-1}((reward - lambda) / beta)] = 1` over samples of the reference.

    The optimum of `E_p[reward] - beta D_f(p || p_ref)` is `p_ref (f')^{-1}((reward - lambda) / beta)`; `lambda`
    normalizes it. For reverse KL it is `beta log E_ref[exp(reward / beta)]`, the value of the objective at the
    optimum.

    Args:
        ref_rewards (`torch.Tensor` of shape `(N,)` or `(P, N)`):
            Rewards of N samples of the reference, of one prompt or of each of P. With N = 24 and a `beta` of a quarter
            of the rewards' range, the error is a few hundredths of that range.
        beta (`float`):
            Price of a nat, in units of the reward, greater than 0.
        divergence (`str` or [`Divergence`]):
            As for [`surrogate_reward`].

    Returns:
        `torch.Tensor` of shape `()` or `(P,)`, in float32, or float64 if the input is, without gradient.

    Raises:
        ValueError: if `ref_rewards` is empty, not finite, not floating-point or of another shape, `beta` is not a
            finite number greater than 0, or the divergence is unknown or has no inverse score.

    Example: rewards of 1 and 0 with equal probability under reverse KL at beta 1: `log((e + 1) / 2)`.

    ```python
    >>> reward_normalizer(torch.tensor([1.0, 0.0]), beta=1.0, divergence="reverse_kl")
    tensor(0.6201)
    ```
    """
    divergence = _invertible(divergence)
    if not is_number(beta) or beta <= 0:
        raise ValueError(f"beta must be a finite number greater than 0, got {beta!r}.")
    _check_rewards("ref_rewards", ref_rewards)
    rewards = ref_rewards.detach().to(_working_dtype(ref_rewards.device))
    # The score increases and is 0 at the ratio 1. So no ratio is above 1 if lambda is the largest reward, and none is
    # below 1 if lambda is the smallest.
    offset = beta * divergence.score(torch.zeros((), dtype=rewards.dtype, device=rewards.device))
    low, high = (rewards.amin(-1) - offset), (rewards.amax(-1) - offset)
    for _ in range(60):
        middle = (low + high) / 2
        log_ratios = divergence.log_inverse_score((rewards - middle.unsqueeze(-1)) / beta)
        too_low = log_ratios.logsumexp(-1) > math.log(rewards.shape[-1])
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return high.to(torch.promote_types(ref_rewards.dtype, torch.float32))


def surrogate_reward(
    rewards: torch.Tensor,
    ref_rewards: torch.Tensor,
    *,
    beta: float,
    divergence: str | Divergence,
    floor: float = -20.0,
    cap: float = math.log(100.0),
) -> torch.Tensor:
    r"""
    Reward whose KL-regularized optimum is the optimum of `E_p[reward] - beta D_f(p || p_ref)`:

        r_f = beta log (f')^{-1}((reward - lambda) / beta)

    from https://huggingface.co/papers/2403.06279. Train with `r_f` and the KL penalty at the same `beta`; nothing else
    changes. For reverse KL, `r_f = reward - lambda`, which only shifts the rewards of a prompt.

    Args:
        rewards (`torch.Tensor` of shape `(M,)` or `(P, M)`):
            Rewards to transform, of one prompt or of each of P.
        ref_rewards (`torch.Tensor` of shape `(N,)` or `(P, N)`):
            Rewards of samples of the reference for the same prompts, from which [`reward_normalizer`] computes
            `lambda`. Use at least 24 samples per prompt; measure them once and keep them.
        beta (`float`):
            Price of the divergence, in units of the reward, greater than 0.
        divergence (`str` or [`Divergence`]):
            `D_f(p || p_ref)`: an instance, or a name that [`get_divergence`] knows, including those that f-DPO
            refuses. Total variation is refused, as its score has no inverse.
        floor (`float`, *optional*, defaults to `-20.0`):
            Least `r_f / beta`, the log-ratio of the optimum to the reference, for divergences that give a low enough
            reward no probability at all (Pearson, Le Cam).
        cap (`float`, *optional*, defaults to `log(100)`):
            Largest `r_f / beta` for divergences whose score is bounded above (forward KL, JS, alpha, Hellinger,
            Neyman, Le Cam): a reward that is higher than the reference's samples allow for would be infinite. Log the
            share of transformed rewards at either end.

    Returns:
        `torch.Tensor` of the shape of `rewards`, in float32, or float64 if an input is, without gradient.

    Raises:
        ValueError: as for [`reward_normalizer`], if the prompts of `rewards` and `ref_rewards` differ in number, or if
            `floor` is not below 0 and `cap` above.

    Example: forward KL with rewards of 1 and 0 at beta 1. The ratios `1 / lambda` and `1 / (1 + lambda)` have the mean
    1 at `lambda = sqrt(1/2)`: the optimum's ratios to the reference, `exp(r_f / beta)`, are `sqrt 2` and `2 - sqrt 2`.

    ```python
    >>> rewards = torch.tensor([1.0, 0.0])
    >>> surrogate_reward(rewards, rewards, beta=1.0, divergence="forward_kl").exp()
    tensor([1.4142, 0.5858])
    ```
    """
    divergence = _invertible(divergence)
    _check_rewards("rewards", rewards)
    if rewards.dim() != ref_rewards.dim() or rewards.shape[:-1] != ref_rewards.shape[:-1]:
        raise ValueError(
            f"rewards and ref_rewards must have the same prompts, got the shapes {tuple(rewards.shape)} and "
            f"{tuple(ref_rewards.shape)}."
        )
    if not (is_number(floor) and is_number(cap) and floor < 0 < cap):
        raise ValueError(f"floor must be a number below 0 and cap one above, got {floor!r} and {cap!r}.")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, ref_rewards.dtype), torch.float32)
    working = _working_dtype(rewards.device)
    normalizer = reward_normalizer(ref_rewards.to(working), beta=beta, divergence=divergence).unsqueeze(-1)
    log_ratios = divergence.log_inverse_score((rewards.detach().to(working) - normalizer) / beta)
    if not divergence.admissible:
        log_ratios = log_ratios.clamp(min=floor)
    if divergence.bounded_above:
        log_ratios = log_ratios.clamp(max=cap)
    return (beta * log_ratios).to(dtype)


def _expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gives `values`, of shape `(B,)`, as many dimensions as `like`."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _root_bound(tensor: torch.Tensor) -> float:
    """Bound on two numbers up to which their products, and sums of products over a sample, are finite."""
    return math.sqrt(saturation(tensor.dtype) / max(tensor.shape[1:].numel(), 1))


def _require_noise(std: torch.Tensor) -> None:
    if not (std > 0).all():
        raise ValueError(
            f"Step {int((std > 0).int().argmin())} of the batch is deterministic (std 0): it has no density. Leave it "
            "out of loss and KL, or raise noise_level."
        )


def _check_rewards(name: str, rewards: torch.Tensor) -> None:
    if not rewards.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {rewards.dtype}.")
    if rewards.dim() not in (1, 2) or rewards.numel() == 0:
        raise ValueError(f"{name} must be of shape (N,) or (prompts, N) and not empty, got {tuple(rewards.shape)}.")
    if not rewards.isfinite().all():
        raise ValueError(f"{name} has {int((~rewards.isfinite()).sum())} values that are not finite. Leave them out.")


def _invertible(divergence: str | Divergence) -> Divergence:
    divergence = get_divergence(divergence, allow_inadmissible=True)
    if divergence.curvature == 0:
        raise ValueError(
            f"divergence {divergence.name!r} has no surrogate reward: its score has no inverse. Choose another one."
        )
    return divergence


def _standardized(rewards: torch.Tensor, counted: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Rewards divided by the standard deviation of their group, or 0 if it is 0. The mean is not subtracted."""
    mean = rewards.sum(1, keepdim=True) / count.clamp(min=1)
    deviation = (rewards - mean).masked_fill(~counted, 0.0)
    std = (deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(std > 0, rewards / torch.where(std > 0, std, 1.0), 0.0)


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(map(repr, PREDICTION_TYPES))}, got {prediction_type!r}."
        )


def _coefficients(level, next_level, *, noise_level, prediction_type, like: torch.Tensor) -> list[torch.Tensor]:
    """Factor of the sample and of the prediction in the mean, and the standard deviation, each of shape `(B,)`."""
    _check_prediction_type(prediction_type)
    flow = prediction_type == "flow"
    if not is_number(noise_level) or noise_level < 0 or (noise_level > 1 and not flow):
        raise ValueError(
            f"noise_level must be a number {'not below 0' if flow else 'in [0, 1]'}, got {noise_level!r}."
        )
    here, there = _levels(level=level, next_level=next_level, like=like)
    if flow:
        if not ((here <= 1) & (there < here) & (there >= 0)).all():
            raise ValueError(
                f"level and next_level of a flow must fall within [0, 1], got {level!r} and then {next_level!r}."
            )
        dt = there - here
        variance = noise_level**2 * here / (1 - torch.where(here == 1, there, here))
        drift = variance * dt / (2 * here)
        return [1 + drift, dt + drift * (1 - here), (variance * -dt).sqrt()]
    lowest = (here > 0) | (prediction_type == "v_prediction") & (here == 0)
    if not (lowest & (here < there) & (there <= 1)).all():
        raise ValueError(
            f"level and next_level are alphas_cumprod, which must rise within (0, 1], got {level!r} and then "
            f"{next_level!r}."
        )
    std = noise_level * ((1 - there) / (1 - here) * (1 - here / there)).clamp(min=0).sqrt()
    shrink = (there / here).sqrt()
    from_epsilon = (1 - there - std.square()).clamp(min=0).sqrt() - shrink * (1 - here).sqrt()
    if prediction_type == "epsilon":
        return [shrink, from_epsilon, std]
    from_sample, from_prediction = shrink + from_epsilon * (1 - here).sqrt(), from_epsilon * here.sqrt()
    # Their limits where the noise is all there is.
    pure = here == 0
    from_sample = torch.where(pure, (1 - there - std.square()).clamp(min=0).sqrt(), from_sample)
    return [from_sample, torch.where(pure, -there.sqrt(), from_prediction), std]


def _levels(*, like: torch.Tensor, **named) -> list[torch.Tensor]:
    """Levels of shape `(B,)`, in float64 where the device has it: their differences are small."""
    levels = []
    for name, value in named.items():
        value = torch.as_tensor(value, dtype=_working_dtype(like.device), device=like.device)
        if value.dim() > 1 or (value.dim() == 1 and value.shape != like.shape[:1]):
            raise ValueError(
                f"{name} must be a number or of shape ({len(like)},), one a sample, got {tuple(value.shape)}."
            )
        levels.append(value.expand(len(like)))
    return levels
