"""Weights of a mixture from policies and prompts: sample, score, solve."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch

from .._checks import at_least, check_value
from .policies import AlignedPolicies
from .weights import LEAST_EFFECTIVE_SIZE, MixtureWeights, Samples, match_betas, maximin_weights


METHODS = ("auto", "reference", "mixture")


def reference_logratios(
    model: torch.nn.Module | Sequence[torch.nn.Module], prompts: Sequence, **sampling: Any
) -> torch.Tensor:
    """
    Samples responses from the reference, at temperature 1 and without truncation, and scores them under the policies.

    Keep the result (`torch.save`, or `cache_dir`) to solve again with other settings: sampling and scoring are all the
    cost.

    Args:
        model (`peft.PeftModel` or a list of models), **sampling:
            The policies, and how they are sampled, as for [`AlignedPolicies`].
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts as text, or as messages, which get the chat template with a generation prompt.

    Returns:
        `torch.Tensor` of shape `(prompts, responses, policies)`, float64, on the CPU: `log pi_k - log pi_ref` of each
        response, in nats.

    Raises:
        `ValueError`: As [`AlignedPolicies`], or if there are no prompts.
    """
    policies = AlignedPolicies(model, **sampling)
    return policies.sample(prompts, policies.reference_mixture(), "reference").logratios


def solve_mixture_weights(
    model: torch.nn.Module | Sequence[torch.nn.Module] | AlignedPolicies,
    prompts: Sequence,
    *,
    method: str = "auto",
    beta: float = 1.0,
    betas: Sequence[float] | None = None,
    jackknife: bool = True,
    max_rounds: int = 10,
    **sampling: Any,
) -> MixtureWeights:
    """
    Weights of the mixture that maximizes the smallest normalized objective of its policies, from samples.

    Args:
        model (`peft.PeftModel`, a list of models or [`AlignedPolicies`]), **sampling:
            The policies, and how they are sampled, as for [`AlignedPolicies`]; or these themselves.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts as text, or as messages, which get the chat template with a generation prompt.
        method (`str`, *optional*, defaults to `"auto"`):
            What is sampled. `"reference"`: the reference, once. `"mixture"`: the mixture, in rounds that follow the
            weights. `"auto"`: the reference, and if fewer than a quarter of its responses count at the solution, the
            mixture.
        beta (`float`, *optional*, defaults to `1.0`):
            The policies' common beta. It scales the reported objectives and leaves the weights alone.
        betas (`list[float]`, *optional*):
            The policies' betas, if they were trained with different ones: see [`match_betas`]. With `method` other
            than `"mixture"` only.
        jackknife (`bool`, *optional*, defaults to `True`):
            Whether to remove the bias of few responses per prompt.
        max_rounds (`int`, *optional*, defaults to `10`):
            Most rounds of sampling the mixture.

    Returns:
        [`MixtureWeights`], which [`PolicyMixture`] takes.

    Raises:
        `TypeError`: For settings of the sampling beside [`AlignedPolicies`].
        `ValueError`: As [`AlignedPolicies`] and [`maximin_weights`]; the latter if the responses are so long, or the
            policies so far from what was sampled, that too few responses count. With samples of the mixture also if
            the weights have not settled after `max_rounds`.
    """
    policies = model if isinstance(model, AlignedPolicies) else AlignedPolicies(model, **sampling)
    if policies is model and sampling:
        raise TypeError(
            f"{', '.join(f'`{name}`' for name in sampling)} cannot be given with `AlignedPolicies`, which were made with "
            "their own."
        )
    check_value("method", method, str, choices=METHODS)
    check_value("max_rounds", max_rounds, Annotated[int, at_least(1)])
    if betas is not None and method == "mixture":
        raise ValueError(
            "`betas` with `method='mixture'` is not supported: the mixture that is sampled consists of the policies "
            "as they were trained. Use `method='reference'`."
        )
    options: dict[str, Any] = dict(beta=beta, jackknife=jackknife, seed=policies.seed)
    if method != "mixture":
        logratios = policies.sample(prompts, policies.reference_mixture(), "reference").logratios
        if betas is not None:
            logratios = match_betas(logratios, list(betas), beta)
        samples = Samples.of(logratios)
        enough = max(policies.responses / 4, LEAST_EFFECTIVE_SIZE)
        if method == "reference" or betas is not None or samples.effective_size(samples.solve(jackknife)) >= enough:
            return maximin_weights(logratios, **options)
    return _from_mixture(policies, prompts, max_rounds, **options)


def _from_mixture(policies: AlignedPolicies, prompts: Sequence, max_rounds: int, **options: Any) -> MixtureWeights:
    """
    Samples the mixture of the current weights and solves as with the reference's responses, each with its importance
    weight. Where the solution is so far from the current weights that fewer than half of the responses still count,
    the weights go only as far as half do, and the mixture is sampled again.
    """
    weights = torch.full((len(policies.policies),), 1 / len(policies.policies), dtype=torch.float64)
    for number in range(1, max_rounds + 1):
        found = policies.sample(prompts, policies.mixture(weights.tolist()), "mixture", number)
        # The mixture's own density is log q, with which the token-level mixture was sampled.
        samples = Samples.of(found.logratios, found.log_reference - found.log_q)
        solution = samples.solve(options["jackknife"])
        least = samples.effective_size(weights) / 2
        step = 1.0
        while step > 1e-3 and samples.effective_size(weights + step * (solution - weights)) < least:
            step /= 2
        if step == 1:
            result = maximin_weights(samples.logratios, log_offsets=samples.log_offsets, **options)
            return dataclasses.replace(result, source="mixture", num_rounds=number)
        weights = weights + step * (solution - weights)
    raise ValueError(
        f"The weights have not settled after `max_rounds={max_rounds}` rounds; they stand at "
        f"{[round(weight, 3) for weight in weights.tolist()]}. Raise `max_rounds`, sample more `responses`, or use "
        "shorter ones (`max_new_tokens`)."
    )
