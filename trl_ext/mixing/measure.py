"""Measures policies and their mixtures on samples of their own."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch

from .._checks import above, check_value
from .mixture import PolicyMixture
from .policies import AlignedPolicies, ScoredResponses


NUM_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class MeanWithInterval:
    """A mean over prompts with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class PolicyMeasurement:
    """
    One policy or mixture, measured on responses of its own.

    Args:
        objectives (`list[MeanWithInterval]`):
            `E[beta L_k] - beta KL` for each policy k: its normalized reward with the cost of the distance from the
            reference. 0 for a policy that was trained to the optimum on its own objective, below 0 for others.
        smallest (`MeanWithInterval`):
            The smallest of these means.
        kl (`MeanWithInterval`):
            KL to the reference, in nats a response.
        length (`MeanWithInterval`):
            Tokens of a response.
        rewards (`dict[str, MeanWithInterval]`):
            Rewards by name.
        effective_size (`float`):
            Median over prompts of the effective number of responses, of those sampled: below, the token-level mixture
            that was sampled is far from the mixture of whole responses.
        distance (`MeanWithInterval`, *optional*):
            KL of the mixture that was asked about to this policy, in nats a response.
    """

    objectives: list[MeanWithInterval]
    smallest: MeanWithInterval
    kl: MeanWithInterval
    length: MeanWithInterval
    rewards: dict[str, MeanWithInterval]
    effective_size: float
    distance: MeanWithInterval | None = None


def measure_policies(
    policies: AlignedPolicies,
    prompts: Sequence,
    mixtures: Mapping[str, PolicyMixture],
    *,
    beta: float = 1.0,
    rewards: Mapping[str, Callable[[list, list[str]], Sequence[float]]] | None = None,
    distance_of: str | None = None,
) -> dict[str, PolicyMeasurement]:
    """
    Samples each mixture and measures its normalized objectives, KL, lengths and rewards. Responses of a mixture are
    weighted by their exact weights, so the numbers are those of the mixture of whole responses.

    Args:
        policies ([`AlignedPolicies`]):
            The policies whose rewards count, and how to sample.
        prompts (`list[str]` or `list[list[dict]]` of length `N`):
            Prompts that nothing was fitted on.
        mixtures (`dict[str, PolicyMixture]`):
            What is measured, by name: mixtures, single policies, the reference, a merged adapter.
        beta (`float`, *optional*, defaults to `1.0`):
            The policies' common beta.
        rewards (`dict[str, Callable]`, *optional*):
            Functions of the `N * m` prompts and their responses as texts; one number each.
        distance_of (`str`, *optional*):
            A name in `mixtures`. Its KL to every single policy is measured too, from its own samples: what a merged
            adapter loses.

    Returns:
        `dict[str, PolicyMeasurement]`

    Raises:
        `ValueError`: If `beta` is not above 0, a reward function returns another number of values, or `distance_of` is
            not in `mixtures`.
    """
    check_value("beta", beta, Annotated[float, above(0)])
    if distance_of is not None and distance_of not in mixtures:
        raise ValueError(f"`distance_of={distance_of!r}` is not one of the mixtures: {', '.join(mixtures)}.")
    sampled = {name: policies.sample(prompts, mixture, "measure") for name, mixture in mixtures.items()}
    distances: dict[str, MeanWithInterval] = {}
    if distance_of is not None:
        target = sampled[distance_of]
        for name, mixture in mixtures.items():
            if name != distance_of and [weight for _, weight in mixture.parts] == [1.0]:
                scored = policies.score_responses(prompts, target, mixture.parts[0][0])
                distances[name] = _mean(_divergence(target, scored))
    return {
        name: _measure(policies, prompts, found, beta, rewards or {}, distances.get(name))
        for name, found in sampled.items()
    }


def _measure(policies, prompts, found: ScoredResponses, beta, rewards, distance) -> PolicyMeasurement:
    shares = found.log_weights.softmax(1)
    kl = _divergence(found, found.log_reference)
    objectives = beta * ((shares.unsqueeze(-1) * found.logratios).sum(1) - kl.unsqueeze(1))
    lengths = torch.tensor([[len(ids) for ids in group] for group in found.response_ids], dtype=torch.float64)
    texts = policies.texts(found)
    repeated = [prompt for prompt in prompts for _ in range(policies.responses)]
    values = {}
    for name, reward in rewards.items():
        given = list(reward(repeated, texts))
        if len(given) != len(texts):
            raise ValueError(f"The reward {name!r} returned {len(given)} values for {len(texts)} responses.")
        values[name] = _mean((shares * torch.tensor(given, dtype=torch.float64).view_as(shares)).sum(1))
    return PolicyMeasurement(
        objectives=[_mean(column) for column in objectives.T],
        smallest=_mean(objectives, smallest=True),
        kl=_mean(kl),
        length=_mean((shares * lengths).sum(1)),
        rewards=values,
        effective_size=(1 / shares.square().sum(1)).median().item(),
        distance=distance,
    )


def _divergence(found: ScoredResponses, log_other: torch.Tensor) -> torch.Tensor:
    """
    KL of the sampled mixture to another distribution, prompt by prompt `(N,)`: `log pi_lambda = log q + w - log E_q
    e^w`.
    """
    weights = found.log_weights
    log_partition = weights.logsumexp(1) - math.log(weights.shape[1])
    return (weights.softmax(1) * (found.log_q + weights - log_other)).sum(1) - log_partition


def _mean(values: torch.Tensor, smallest: bool = False) -> MeanWithInterval:
    """Mean over prompts (of the columns' means the smallest), with a bootstrap over prompts."""
    values = values if values.dim() == 2 else values.unsqueeze(1)
    drawn = torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    resampled = values[drawn].mean(1).amin(1) if smallest else values[drawn].mean(1)[:, 0]
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    value = values.mean(0).min() if smallest else values[:, 0].mean()
    return MeanWithInterval(value.item(), low, high)
