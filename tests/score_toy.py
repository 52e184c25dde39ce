"""
Exact problems of Score as Action.

A one-dimensional diffusion on Stable Diffusion's schedule whose images are 1/2 N(-1.2, .35) + 1/2 N(1.2, .35), with a
reward that prefers the right mode: optimum and value of a policy are computed on a grid, by dynamic programming.

Chains whose predictions are affine, with polynomial rewards: expectations are computed by quadrature.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from trl_ext.losses import reward_advantages, step_kl, transition


GRID = np.linspace(-6, 6, 801)
BETA = 0.25

# Prediction of the noise at samples of shape (N, 1) and a level.
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]


def two_modes(steps: int) -> tuple[list[tuple[float, float]], Denoiser]:
    """Levels of the steps, and the exact noise prediction."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    times = (np.arange(steps) * (1000 // steps) + 1)[::-1]
    return [(alphas[t], alphas[max(t - 1000 // steps, 0)]) for t in times], exact_noise


def exact_noise(x, a):
    a = torch.as_tensor(a, dtype=x.dtype)
    variance = a * 0.35**2 + 1 - a
    modes = a.sqrt() * torch.tensor([-1.2, 1.2], dtype=x.dtype)
    share = (-(x - modes).square() / (2 * variance)).softmax(-1)
    return -(1 - a).sqrt() * (share * (modes - x) / variance).sum(-1, keepdim=True)


def toy_reward(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(6 * x)


def radial_features(x: torch.Tensor) -> torch.Tensor:
    """Features of shape `(N, 17)`, of which a policy's change of the prediction is a linear function."""
    centers = torch.linspace(-2.4, 2.4, 17, dtype=x.dtype)
    return (-((x - centers) / 0.3).square() / 2).exp()


def class_optimum(levels, epsilon: Denoiser, is_last_noisy: bool = True) -> float:
    """
    Best J with Gaussian steps of the sampler's variance: J_k(x) = max_mean E[J_{k+1}] - beta (mean - mean_ref)^2 / 2
    std^2. A step without noise is the reference's.
    """
    value = _reward_on_the_grid()
    for step, (here, there) in reversed(list(enumerate(levels))):
        noise_level = 1.0 if is_last_noisy or step < len(levels) - 1 else 0.0
        mean, std = _step(epsilon, here, there, noise_level)
        if std == 0:
            value = np.interp(mean, GRID, value)
        else:
            smoothed = _smoothed(value, GRID, std)
            value = (smoothed[None] - BETA * (GRID[None] - mean[:, None]) ** 2 / (2 * std**2)).max(1)
    return _from_noise(value)


def value_of_policy(levels, epsilon: Denoiser, policies: list[Denoiser]) -> tuple[float, float]:
    """J of a policy, a prediction for each step, and its share of images in the right mode. The last step is a mean."""
    value, share = _reward_on_the_grid(), (GRID > 0).astype(float)
    for step, (here, there) in reversed(list(enumerate(levels))):
        noise_level = 1.0 if step < len(levels) - 1 else 0.0
        mean, std = _step(policies[step], here, there, noise_level)
        if std == 0:
            value, share = np.interp(mean, GRID, value), np.interp(mean, GRID, share)
            continue
        x = torch.tensor(GRID).unsqueeze(-1)
        settings = dict(noise_level=1.0, prediction_type="epsilon")
        kl = step_kl(policies[step](x, here), epsilon(x, here), here, there, **settings).numpy()
        value, share = _smoothed(value, mean, std) - BETA * kl, _smoothed(share, mean, std)
    return _from_noise(value), _from_noise(share)


def _reward_on_the_grid() -> np.ndarray:
    return toy_reward(torch.tensor(GRID)).numpy()


def _step(epsilon: Denoiser, here: float, there: float, noise_level: float) -> tuple[np.ndarray, float]:
    x = torch.tensor(GRID).unsqueeze(-1)
    step = transition(x, epsilon(x, here), here, there, noise_level=noise_level, prediction_type="epsilon")
    return step.mean[:, 0].numpy(), step.std[0].item()


def _smoothed(value: np.ndarray, mean: np.ndarray, std: float) -> np.ndarray:
    """E[value] over normal variables around the means."""
    kernel = np.exp(-((GRID[None] - mean[:, None]) ** 2) / (2 * std**2))
    return kernel @ value / kernel.sum(1)


def _from_noise(value: np.ndarray) -> float:
    return float((np.exp(-(GRID**2) / 2) / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0]) * value).sum())


# ---- Affine chains --------------------------------------------------------------------------------------------------


class AffineChain:
    """
    A one-dimensional chain from N(0, 1) whose step k predicts the noise `p[k, 0] + p[k, 1] x`. Gauss-Hermite
    quadrature over the start and the noise of every step is exact for a quadratic reward.

    Args:
        levels: Level of each step and of the next.
        reference (`torch.Tensor` of shape `(K, 2)`): Parameters of the reference.
        reward: Of the end of the chain.
        beta, noise_level (`float`): As of the losses.
        nodes (`int`): Of the quadrature, of each variable.
    """

    def __init__(
        self,
        levels: Sequence[tuple[float, float]],
        reference: torch.Tensor,
        reward: Callable[[torch.Tensor], torch.Tensor],
        *,
        beta: float,
        noise_level: float,
        nodes: int,
    ):
        self.levels, self.reference, self.reward, self.beta = levels, reference, reward, beta
        self.settings = dict(noise_level=noise_level, prediction_type="epsilon")
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        points, weights = torch.tensor(points), torch.tensor(weights / weights.sum())
        self.noise = torch.cartesian_prod(*[points] * (len(levels) + 1))
        self.probability = torch.cartesian_prod(*[weights] * (len(levels) + 1)).prod(1)

    def objective(self, theta: torch.Tensor) -> torch.Tensor:
        """J, differentiable along the path."""
        x, kls = self.noise[:, :1], []
        one, zero = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, 1, dtype=x.dtype)
        for k, pair in enumerate(self.levels):
            prediction, ref_prediction = (p[k, 0] + p[k, 1] * x for p in (theta, self.reference))
            # `step_kl` lets no gradient through the reference, which here depends on theta through the state.
            factor = step_kl(one, zero, *pair, **self.settings).item()
            kls.append(factor * (prediction - ref_prediction).square()[:, 0])
            step = transition(x, prediction, *pair, **self.settings)
            x = step.mean + step.std.unsqueeze(-1) * self.noise[:, k + 1 : k + 2]
        return (self.probability * (self.reward(x)[:, 0] - self.beta * torch.stack(kls, 1).sum(1))).sum()

    def estimate(self, theta: torch.Tensor, values: Callable | None = None, **options) -> torch.Tensor:
        """
        The mean of the trainer's estimate of the gradient of J, over pairs of images that are each other's baseline.

        Args:
            theta (`torch.Tensor` of shape `(K, 2)`): Parameters, which require a gradient.
            values (`Callable`, *optional*): Of the state that a step starts from: what is taken from its return.
            options: Of `reward_advantages`.
        """
        x, log_probs, kls, starts = self.noise[:, :1], [], [], []
        for k, pair in enumerate(self.levels):
            starts.append(x[:, 0])
            prediction, ref_prediction = (p[k, 0] + p[k, 1] * x for p in (theta, self.reference))
            step = transition(x, prediction, *pair, **self.settings)
            kls.append(step_kl(prediction, ref_prediction.detach(), *pair, **self.settings))
            x = (step.mean + step.std.unsqueeze(-1) * self.noise[:, k + 1 : k + 2]).detach()
            log_probs.append(step.log_ratio(x, step.mean.detach()))
        kls, log_probs, n = torch.stack(kls, 1), torch.stack(log_probs, 1), len(x)
        rows = torch.stack([torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)], 1).flatten()
        if values is not None:
            options["values"] = values(torch.stack(starts, 1))[rows]
        advantages = reward_advantages(
            self.reward(x)[rows, 0], kls.detach()[rows], beta=self.beta, num_generations=2, **options
        )
        # The mean over the second image of the first one's advantage.
        advantages = (advantages[::2].view(n, n, -1) * self.probability.view(1, -1, 1)).sum(1)
        total = (self.probability.unsqueeze(-1) * (advantages * log_probs - self.beta * kls)).sum()
        return torch.autograd.grad(total, theta)[0]
