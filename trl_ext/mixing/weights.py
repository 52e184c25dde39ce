r"""
Weights for policies that were each aligned to one preference.

Source: *MPO: An Efficient Post-Processing Framework for Mixing Diverse Preference Alignment*,
https://huggingface.co/papers/2502.18699.

Notation: `pi_k` are K policies trained from one reference with one beta, and `L_k(y) = log pi_k(y|x) - log
pi_ref(y|x)`, summed over the tokens of a response. `beta L_k` is the reward that policy k was trained for, normalized
so that the scales and offsets of the raw rewards drop out. The mixture of weights lambda on the simplex is `pi_lambda
proportional to prod_k pi_k^{lambda_k}`.

The mixture that maximizes the smallest of the K objectives,

    max_pi min_k { E_pi[beta L_k] - beta KL(pi || pi_ref) },

minimizes the convex function `F(lambda) = E_x log E_{y ~ pi_ref} exp(sum_k lambda_k L_k(y))`. F is at most 0, and 0 at
the corners; the objective's value is `beta F`. Its gradient is `E_x E_{y ~ pi_lambda}[L_k]`: at the optimum it is
equal for all k with a positive weight, and not smaller for the others.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Annotated, NamedTuple

import torch

from .._checks import above, at_least, check_value


# Median effective sample size below which weights from samples mean nothing.
LEAST_EFFECTIVE_SIZE = 2.0


@dataclasses.dataclass(frozen=True)
class MixtureWeights:
    """
    Weights of policies, and how far they can be trusted.

    Args:
        weights (`list[float]`):
            One per policy, summing to 1.
        value (`float`):
            Estimate of `beta F`: the smallest normalized objective of the mixture, at most about 0. Below 0 is normal:
            it is what the conflict between the preferences costs.
        objectives (`list[float]`):
            Normalized objective of the mixture for each policy's reward, `beta (E[L_k] - KL)`. Equal where the weight
            is positive.
        intervals (`list[list[float]]`):
            95 % bootstrap interval of each weight, over prompts.
        effective_size (`float`):
            Median over prompts of the effective sample size of the responses under the mixture.
        num_prompts, num_responses (`int`):
            Prompts, and responses to each of them.
        gap (`float`):
            Upper bound on `F - min F` of the samples, in nats: the accuracy of the solver, not of the estimate.
        source (`str`, *optional*, defaults to `"reference"`):
            What was sampled: `"reference"`, or `"mixture"`.
        num_rounds (`int`, *optional*, defaults to `1`):
            Rounds of sampling; more than one only with samples of the mixture.
    """

    weights: list[float]
    value: float
    objectives: list[float]
    intervals: list[list[float]]
    effective_size: float
    num_prompts: int
    num_responses: int
    gap: float
    source: str = "reference"
    num_rounds: int = 1

    @property
    def undetermined(self) -> bool:
        """Whether some weight's interval is almost all of [0, 1]: the policies hardly differ on these prompts."""
        return any(high - low > 0.9 for low, high in self.intervals)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the fields to a JSON file."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MixtureWeights":
        """
        Reads what [`save`](Self.save) wrote.

        Raises:
            ValueError: if the file does not hold these fields.
        """
        fields = json.loads(Path(path).read_text())
        expected = {field.name for field in dataclasses.fields(cls)}
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if not isinstance(fields, dict) or not needed <= set(fields) <= expected:
            raise ValueError(f"{os.fspath(path)!r} is not a file of mixture weights: its fields must be {expected}.")
        return cls(**fields)


def maximin_weights(
    logratios: torch.Tensor,
    *,
    beta: float = 1.0,
    jackknife: bool = True,
    num_resamples: int = 100,
    seed: int = 0,
    log_offsets: torch.Tensor | None = None,
) -> MixtureWeights:
    r"""
    Weights that maximize the smallest normalized objective, from log-ratios of sampled responses.

    The mean over a prompt's m responses stands inside a logarithm, which biases F by O(1/m). The jackknife,
    `m f - (m-1) mean_j f_{-j}` of each prompt, removes the leading term.

    Responses are reweighted from what they were sampled from to the mixture, which works as long as their log-ratios
    differ by a few nats. Long responses of the reference (100 tokens and a nat each) leave an effective sample size
    near 1, at which the solution is a corner whatever the truth is; that is refused.

    Args:
        logratios (`torch.Tensor` of shape `(N, m, K)`):
            `L_k` in nats, summed over tokens, of m >= 2 responses to each of N prompts, sampled at temperature 1
            without truncation, for each of K >= 2 policies.
        beta (`float`, *optional*, defaults to `1.0`):
            The policies' common beta. It scales `value` and `objectives` and leaves the weights alone.
        jackknife (`bool`, *optional*, defaults to `True`):
            Whether to remove the bias of order 1/m.
        num_resamples (`int`, *optional*, defaults to `100`):
            Bootstrap samples of the prompts for the intervals.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap, which has its own random state.
        log_offsets (`torch.Tensor` of shape `(N, m)`, *optional*):
            `log pi_ref(y|x) - log q(y|x)` of responses that were sampled from another distribution q. By default they
            were sampled from the reference.

    Returns:
        [`MixtureWeights`]

    Raises:
        ValueError: if the shape or dtype does not fit, a log-ratio is not finite, a setting is out of its range, or
            the median effective sample size is below 2.

    Example: two policies with opposite log-ratios on two equally likely responses share the weight.

    ```python
    >>> logratios = torch.tensor([[[0.5, -1.0], [-1.0, 0.5]]]).repeat(4, 2, 1)
    >>> [round(weight, 3) for weight in maximin_weights(logratios).weights]
    [0.5, 0.5]
    ```
    """
    _check(logratios, beta, num_resamples, log_offsets)
    samples = Samples.of(logratios, log_offsets)
    prompts, responses, policies = samples.logratios.shape
    everything = torch.full((prompts,), 1 / prompts, dtype=torch.float64)
    start = torch.full((policies,), 1 / policies, dtype=torch.float64)
    weights, gap = _minimize(samples, everything, start, jackknife)

    effective = samples.effective_size(weights)
    if effective < min(LEAST_EFFECTIVE_SIZE, responses):
        raise ValueError(
            f"logratios have a median effective sample size of {effective:.2f} of {responses} responses at the "
            "solution: weights from them would be arbitrary. The policies are too far from what was sampled for "
            "responses of this length. Sample the mixture itself (`method='mixture'`), score shorter responses, or "
            "score more of them for each prompt."
        )

    value, gradient, _ = _expansion(samples, everything, weights, jackknife)
    divergence = weights @ gradient - value
    generator = torch.Generator().manual_seed(seed)
    resampled = []
    for _ in range(num_resamples):
        drawn = torch.randint(prompts, (prompts,), generator=generator)
        share = torch.bincount(drawn, minlength=prompts).double() / prompts
        resampled.append(_minimize(samples, share, weights, jackknife)[0])
    intervals = torch.stack(resampled).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T
    return MixtureWeights(
        weights=weights.tolist(),
        value=beta * value.item(),
        objectives=(beta * (gradient - divergence)).tolist(),
        intervals=intervals.tolist(),
        effective_size=effective,
        num_prompts=prompts,
        num_responses=responses,
        gap=gap,
    )


class Samples(NamedTuple):
    """
    Sampled responses, in float64 on the CPU.

    Args:
        logratios (`torch.Tensor` of shape `(N, m, K)`): `log pi_k - log pi_ref`.
        log_offsets (`torch.Tensor` of shape `(N, m)`): `log pi_ref - log q`, q being what was sampled.
    """

    logratios: torch.Tensor
    log_offsets: torch.Tensor

    @classmethod
    def of(cls, logratios: torch.Tensor, log_offsets: torch.Tensor | None = None) -> "Samples":
        logratios = logratios.detach().double().cpu()
        if log_offsets is None:
            return cls(logratios, torch.zeros(logratios.shape[:2], dtype=torch.float64))
        return cls(logratios, log_offsets.detach().double().cpu())

    def log_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Logarithm of each response's importance weight under the mixture, up to the prompt's partition `(N, m)`."""
        return self.logratios @ weights + self.log_offsets

    def effective_size(self, weights: torch.Tensor) -> float:
        """Median over prompts of the effective number of responses under the mixture."""
        shares = self.log_weights(weights).log_softmax(1)
        return (-(2 * shares).logsumexp(1)).exp().median().item()

    def solve(self, jackknife: bool) -> torch.Tensor:
        """The weights that minimize F, without intervals or checks."""
        prompts, _, policies = self.logratios.shape
        share = torch.full((prompts,), 1 / prompts, dtype=torch.float64)
        return _minimize(self, share, torch.full((policies,), 1 / policies, dtype=torch.float64), jackknife)[0]


def log_partition(
    logratios: torch.Tensor,
    weights: torch.Tensor,
    *,
    jackknife: bool = False,
    log_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    `log E_{y ~ pi_ref} exp(sum_k lambda_k L_k(y))` of each prompt, whose mean over prompts is `F(lambda)`.

    Args:
        logratios (`torch.Tensor` of shape `(N, m, K)`):
            As for [`maximin_weights`].
        weights (`torch.Tensor` of shape `(K,)`):
            lambda.
        jackknife (`bool`, *optional*, defaults to `False`):
            Whether to remove the bias of order 1/m.
        log_offsets (`torch.Tensor` of shape `(N, m)`, *optional*):
            As for [`maximin_weights`].

    Returns:
        `torch.Tensor` of shape `(N,)`, in nats.
    """
    scores = logratios @ weights
    if log_offsets is not None:
        scores = scores + log_offsets
    responses = scores.shape[1]
    total = scores.logsumexp(1)
    plain = total - math.log(responses)
    if not jackknife:
        return plain
    # Without response j: log(e^total - e^score_j) - log(m - 1), where one response may be nearly everything.
    share = (scores - total.unsqueeze(1)).exp().clamp(max=1 - 1e-12)
    others = total.unsqueeze(1) + torch.log1p(-share) - math.log(responses - 1)
    return responses * plain - (responses - 1) * others.mean(1)


def match_betas(logratios: torch.Tensor, betas: list[float], beta: float) -> torch.Tensor:
    r"""
    Log-ratios as if every policy had been trained with the same `beta`, from those of policies with betas of their
    own.

    A policy trained for a reward with `beta_k` has `L_k = (r_k - const) / beta_k`. The optimum for the same reward at
    `beta` is `(beta_k / beta) L_k`, less the logarithm of its mean exponential under the reference, which normalizes
    it.

    Args:
        logratios (`torch.Tensor` of shape `(N, m, K)`):
            As for [`maximin_weights`].
        betas (`list[float]`):
            The K policies' betas, each greater than 0.
        beta (`float`):
            The common beta, greater than 0.

    Returns:
        `torch.Tensor` of shape `(N, m, K)`.

    Raises:
        ValueError: if a beta is not a finite number greater than 0, or there is not one for each policy.
    """
    if len(betas) != logratios.shape[-1]:
        raise ValueError(f"betas must hold one number per policy, {logratios.shape[-1]}, got {len(betas)}.")
    for name, value in (*((f"betas[{k}]", value) for k, value in enumerate(betas)), ("beta", beta)):
        check_value(name, value, Annotated[float, above(0)])
    scaled = logratios * (torch.tensor(betas, dtype=logratios.dtype, device=logratios.device) / beta)
    return scaled - (scaled.logsumexp(1, keepdim=True) - math.log(logratios.shape[1]))


def _expansion(
    samples: Samples, share: torch.Tensor, weights: torch.Tensor, jackknife: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    F at these weights, with its gradient `(K,)` and Hessian `(K, K)`; `share` is each prompt's weight in the mean.
    """
    logratios, log_offsets = samples
    mixture = samples.log_weights(weights).softmax(1).unsqueeze(-1)  # (N, m, 1)
    mean = (mixture * logratios).sum(1)
    outer = logratios.unsqueeze(-1) * logratios.unsqueeze(-2)
    second = (mixture.unsqueeze(-1) * outer).sum(1)
    gradient, hessian = mean, second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    if jackknife:
        # The same of the m responses without each one.
        rest = (1 - mixture).clamp(min=1e-12)
        means = (mean.unsqueeze(1) - mixture * logratios) / rest
        seconds = (second.unsqueeze(1) - mixture.unsqueeze(-1) * outer) / rest.unsqueeze(-1)
        m = logratios.shape[1]
        gradient = m * gradient - (m - 1) * means.mean(1)
        hessian = m * hessian - (m - 1) * (seconds - means.unsqueeze(-1) * means.unsqueeze(-2)).mean(1)
    value = share @ log_partition(logratios, weights, jackknife=jackknife, log_offsets=log_offsets)
    return value, share @ gradient, torch.einsum("n,nij->ij", share, hessian)


def _minimize(
    samples: Samples, share: torch.Tensor, start: torch.Tensor, jackknife: bool
) -> tuple[torch.Tensor, float]:
    """
    The minimum of F over the simplex, and the bound `lambda . g - min_k g_k` on the distance of its value from the
    least.

    Newton's method on the weights that are free, with a line search: a weight that a step brings to 0 stays there
    until its gradient says that it should grow.
    """
    weights = start.clone()
    value, gradient, hessian = _expansion(samples, share, weights, jackknife)
    for _ in range(100):
        gap = weights @ gradient - gradient.min()
        if gap < 1e-12:
            break
        direction = _newton_direction(weights, gradient, hessian)
        slope = gradient @ direction
        if slope > -1e-14 * (1 + value.abs()):
            break  # the step would change less than the value's rounding
        falling = direction < 0
        longest = (-weights[falling] / direction[falling]).min().item() if falling.any() else 1.0
        step, accepted = min(1.0, longest), None
        while step > 1e-12:
            moved = (weights + step * direction).clamp(min=0)
            moved = torch.where(moved < 1e-12, 0.0, moved)
            moved = moved / moved.sum()
            accepted = _expansion(samples, share, moved, jackknife)
            if accepted[0] <= value + 1e-4 * step * slope:
                break
            step, accepted = step / 2, None
        if accepted is None:
            break  # no descent left in this precision
        weights, (value, gradient, hessian) = moved, accepted
    return weights, (weights @ gradient - gradient.min()).clamp(min=0).item()


def _newton_direction(weights, gradient, hessian) -> torch.Tensor:
    """Minimizes the quadratic model over changes of sum 0 that leave no weight below 0 to first order."""
    free = (weights > 0) | (gradient < weights @ gradient)
    direction = torch.zeros_like(weights)
    while free.sum() > 1:
        count = int(free.sum())
        values, vectors = torch.linalg.eigh(hessian[free][:, free])
        # The jackknife's estimate need not be convex.
        curvature = vectors @ torch.diag(values.abs().clamp(min=1e-9 * values.abs().max() + 1e-12)) @ vectors.T
        system = torch.ones(count + 1, count + 1, dtype=weights.dtype)
        system[:count, :count], system[count, count] = curvature, 0.0
        right = torch.cat([-gradient[free], torch.zeros(1, dtype=weights.dtype)])
        direction = torch.zeros_like(weights)
        direction[free] = torch.linalg.solve(system, right)[:count]
        blocked = free & (weights == 0) & (direction < 0)
        if not blocked.any():
            break
        free = free & ~blocked
    return direction


def _check(logratios: torch.Tensor, beta: float, num_resamples: int, log_offsets: torch.Tensor | None) -> None:
    if logratios.dim() != 3 or not logratios.is_floating_point():
        raise ValueError(
            "logratios must be a floating-point tensor of shape (prompts, responses, policies), got "
            f"{logratios.dtype} of shape {tuple(logratios.shape)}."
        )
    prompts, responses, policies = logratios.shape
    if prompts < 1 or responses < 2 or policies < 2:
        raise ValueError(
            f"logratios must hold at least 1 prompt, 2 responses and 2 policies, got {prompts}, {responses} and "
            f"{policies}."
        )
    if not logratios.isfinite().all():
        raise ValueError(
            f"logratios has {int((~logratios.isfinite()).sum())} values that are not finite. A policy that gives a "
            "response of the reference no probability cannot be mixed."
        )
    if log_offsets is not None and (log_offsets.shape != logratios.shape[:2] or not log_offsets.isfinite().all()):
        raise ValueError(
            f"log_offsets must be finite and of shape {tuple(logratios.shape[:2])}, one for each response, got the "
            f"shape {tuple(log_offsets.shape)}."
        )
    check_value("beta", beta, Annotated[float, above(0)])
    check_value("num_resamples", num_resamples, Annotated[int, at_least(20)])
