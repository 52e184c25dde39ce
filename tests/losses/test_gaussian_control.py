"""
Closed forms of E[reward] - beta KL for a Gaussian reference N(m, v). The optimum of many small steps converges to them,
and the policy gradient is 0 at the optimum.
"""

import math

import pytest
import torch
from score_toy import AffineChain

from trl_ext.losses import step_kl, transition


BETA, MEAN, VARIANCE = 0.5, 0.3, 0.6
SETTINGS = dict(noise_level=1.0, prediction_type="epsilon")


def levels_of(steps: int) -> torch.Tensor:
    """Levels of the nodes from nearly pure noise to nearly the image alone, of shape `(steps + 1,)`."""
    time = torch.linspace(1e-3, 1, steps + 1, dtype=torch.float64)
    return (math.pi / 2 * time).sin().square().clamp(max=1 - 1e-9)


def reference_of(levels: torch.Tensor, mean: float) -> torch.Tensor:
    """The exact prediction of the noise, intercept and slope at each node, `(steps, 2)`."""
    a = levels[:-1]
    slope = (1 - a).sqrt() / (a * VARIANCE + 1 - a)
    return torch.stack([-slope * a.sqrt() * mean, slope], 1)


class Steps:
    """Means of all steps as affine functions of x, under the reference, and what the prediction adds to them."""

    def __init__(self, levels: torch.Tensor, reference: torch.Tensor):
        self.pairs = levels[:-1], levels[1:]
        zero = torch.zeros(len(reference), 1, dtype=torch.float64)
        at_zero = transition(zero, reference[:, :1], *self.pairs, **SETTINGS)
        at_one = transition(zero + 1, reference.sum(1, keepdim=True), *self.pairs, **SETTINGS)
        self.intercept, self.std = at_zero.mean[:, 0], at_zero.std
        self.slope = at_one.mean[:, 0] - self.intercept
        self.from_prediction = transition(zero, zero + 1, *self.pairs, **SETTINGS).mean[:, 0]

    def run(self, control: torch.Tensor) -> tuple[float, float, float]:
        """Mean and variance of the image if `control`, intercept and slope, is added to the means; and the KL."""
        mean, variance, kl = 0.0, 1.0, 0.0
        change = control / self.from_prediction[:, None]
        ones = torch.ones(1, 1, dtype=torch.float64)
        for k, (shift, gain) in enumerate(control.tolist()):
            pair = self.pairs[0][k].item(), self.pairs[1][k].item()
            # KL at a prediction that differs by 1, times the mean square of the difference.
            factor = step_kl(ones, 0 * ones, *pair, **SETTINGS).item()
            at_mean = (change[k, 0] + change[k, 1] * mean).item()
            kl += factor * (at_mean**2 + change[k, 1].item() ** 2 * variance)
            mean = self.intercept[k].item() + shift + (self.slope[k].item() + gain) * mean
            variance = (self.slope[k].item() + gain) ** 2 * variance + self.std[k].item() ** 2
        return mean, variance, kl


def linear_control(steps: Steps, slope_of_reward: float) -> torch.Tensor:
    """The value is linear, so a step's mean is moved by std^2 / beta times the slope of the value after it."""
    control, slope = torch.zeros(len(steps.std), 2, dtype=torch.float64), slope_of_reward
    for k in reversed(range(len(control))):
        control[k, 0] = slope * steps.std[k] ** 2 / BETA
        slope = slope * steps.slope[k].item()
    return control


def quadratic_control(steps: Steps, curvature_of_reward: float) -> torch.Tensor:
    """
    The value is -p x^2 / 2, and the best mean beta / (beta + p std^2) times the reference's, which is through 0 here.
    """
    control, p = torch.zeros(len(steps.std), 2, dtype=torch.float64), curvature_of_reward
    for k in reversed(range(len(control))):
        factor = BETA / (BETA + p * steps.std[k].item() ** 2)
        control[k, 1] = (factor - 1) * steps.slope[k]
        p = p * factor * steps.slope[k].item() ** 2
    return control


def gradient_at(levels, reference, control, reward) -> float:
    """Largest entry of the mean policy gradient with that control, relative to the one without."""
    steps = Steps(levels, reference)
    pairs = list(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True))
    chain = AffineChain(pairs, reference, reward, beta=BETA, noise_level=1.0, nodes=4)
    theta = (reference + control / steps.from_prediction[:, None]).requires_grad_()
    found, without = chain.estimate(theta), chain.estimate(reference.clone().requires_grad_())
    return (found.abs().max() / without.abs().max()).item()


def test_linear_reward_shifts_the_mean():
    """r = c x: the optimum is N(m + c v / beta, v), and J* = c m + c^2 v / (2 beta)."""
    c, errors = 0.8, []
    for count in (200, 400, 800):
        levels = levels_of(count)
        steps = Steps(levels, reference_of(levels, MEAN))
        mean, variance, kl = steps.run(linear_control(steps, c))
        found = torch.tensor([mean, variance, c * mean - BETA * kl])
        expected = torch.tensor([MEAN + c * VARIANCE / BETA, VARIANCE, c * MEAN + c**2 * VARIANCE / (2 * BETA)])
        errors.append((found - expected).abs().max().item())
    assert errors[2] < 0.01 and errors[2] < 0.6 * errors[1] < 0.6**2 * errors[0]


def test_quadratic_reward_narrows_the_image():
    """r = -q x^2 / 2 with m = 0: the optimum has the variance 1 / (1 / v + q / beta)."""
    q, errors = 1.5, []
    for count in (200, 400, 800):
        levels = levels_of(count)
        steps = Steps(levels, reference_of(levels, 0.0))
        _, variance, _ = steps.run(quadratic_control(steps, q))
        errors.append(abs(variance - 1 / (1 / VARIANCE + q / BETA)))
    assert errors[2] < 0.01 and errors[2] < 0.6 * errors[1] < 0.6**2 * errors[0]


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_policy_gradient_is_zero_at_the_optimum(kind):
    """In few steps, too, where the optimum is that of Gaussian steps; halfway to it, it is not."""
    levels = levels_of(3)
    if kind == "linear":
        reference, reward = reference_of(levels, MEAN), lambda x: 0.8 * x
        control = linear_control(Steps(levels, reference), 0.8)
    else:
        reference, reward = reference_of(levels, 0.0), lambda x: -0.75 * x.square()
        control = quadratic_control(Steps(levels, reference), 1.5)
    assert gradient_at(levels, reference, control, reward) < 1e-6
    assert gradient_at(levels, reference, control / 2, reward) > 0.1
