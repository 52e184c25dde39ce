"""Weights of a mixture from policies and prompts: sample the reference, score, solve."""

from collections.abc import Sequence
from typing import Annotated

import torch

from .._checks import at_least, check_value
from .mixture import Policy, PolicyMixture, policies_of
from .weights import MixtureWeights, match_betas, maximin_weights


def reference_logratios(
    model,
    prompts: Sequence,
    *,
    processing_class,
    adapters: Sequence[str] | None = None,
    reference: torch.nn.Module | None = None,
    responses: int = 8,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
) -> torch.Tensor:
    """
    Samples responses from the reference, at temperature 1 and without truncation, and scores them under the policies.

    A response that is cut at `max_new_tokens` counts as the prefix that it is, under all models alike. Keep the result
    (`torch.save`) to solve again with other settings: sampling and scoring are all the cost.

    Args:
        model (`peft.PeftModel` or a list of models):
            The policies, as in [`PolicyMixture`].
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts as text, or as messages, which get the chat template with a generation prompt.
        processing_class (`transformers.PreTrainedTokenizerBase`):
            The tokenizer, with a padding token.
        adapters (`list[str]`, *optional*):
            Names of the policies' adapters in `model`. The reference is then `model` without adapters.
        reference (`torch.nn.Module`, *optional*):
            The model that all policies were trained from; needed with policies that are models of their own.
        responses (`int`, *optional*, defaults to `8`):
            Responses to each prompt, at least 2.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest response, in tokens. The longer the responses, the fewer of them count.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses in a forward.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.

    Returns:
        `torch.Tensor` of shape `(prompts, responses, policies)`, float64, on the CPU: `log pi_k - log pi_ref` of each
        response, in nats.

    Raises:
        `ValueError`: If there are fewer than two policies, no prompts, no padding token, or no reference (or one
        beside
            adapters), or a setting is out of its range.
    """
    check_value("responses", responses, Annotated[int, at_least(2)])
    check_value("max_new_tokens", max_new_tokens, Annotated[int, at_least(1)])
    check_value("batch_size", batch_size, Annotated[int, at_least(1)])
    policies = policies_of(model, adapters)
    if len(policies) < 2:
        raise ValueError(f"A mixture needs two policies or more, got {len(policies)}.")
    if adapters is not None and reference is not None:
        raise ValueError("`reference` must be None with `adapters`: it is the model without them.")
    if adapters is None and reference is None:
        raise ValueError(
            "`reference` is needed with policies that are models of their own: give what they were trained from."
        )
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError("`prompts` must be a list of one prompt or more.")
    if processing_class.pad_token_id is None:
        raise ValueError("`processing_class` has no padding token. Set `processing_class.pad_token`.")
    base = Policy(model, None, True) if adapters is not None else Policy(reference)
    policies_of([base.model, *(policy.model for policy in policies)], None)  # one vocabulary

    sampler = PolicyMixture.of_one(base)
    generator = torch.Generator(sampler.device).manual_seed(seed)
    prompt_ids = [_tokenize(processing_class, prompt) for prompt in prompts]
    rows = [ids for ids in prompt_ids for _ in range(responses)]
    logratios = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, mask = _pad_left(batch, processing_class.pad_token_id)
        found = sampler.generate(
            ids, mask, max_new_tokens=max_new_tokens, pad_token_id=processing_class.pad_token_id, generator=generator
        )
        whole = torch.cat([ids.to(found.completion_ids.device), found.completion_ids], 1)
        whole_mask = torch.cat([mask.to(whole.device), found.completion_mask], 1)
        scores = [_score(policy, whole, whole_mask, found.completion_mask) for policy in (base, *policies)]
        logratios.append(torch.stack([score - scores[0] for score in scores[1:]], -1))
    return torch.cat(logratios).view(len(prompts), responses, len(policies))


def solve_mixture_weights(
    model,
    prompts: Sequence,
    *,
    processing_class,
    adapters: Sequence[str] | None = None,
    reference: torch.nn.Module | None = None,
    responses: int = 8,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    beta: float = 1.0,
    betas: Sequence[float] | None = None,
    jackknife: bool = True,
    seed: int = 0,
) -> MixtureWeights:
    """
    Weights of the mixture that maximizes the smallest normalized objective of its policies, from samples of the
    reference: [`reference_logratios`], then [`maximin_weights`].

    Args:
        model, prompts, processing_class, adapters, reference, responses, max_new_tokens, batch_size, seed:
            As for [`reference_logratios`].
        beta (`float`, *optional*, defaults to `1.0`):
            The policies' common beta. It scales the reported objectives and leaves the weights alone.
        betas (`list[float]`, *optional*):
            The policies' betas, if they were trained with different ones: see [`match_betas`].
        jackknife (`bool`, *optional*, defaults to `True`):
            Whether to remove the bias of few responses per prompt.

    Returns:
        [`MixtureWeights`], which [`PolicyMixture`] takes.

    Raises:
        `ValueError`: As [`reference_logratios`] and [`maximin_weights`]; the latter if the responses are so long, or
        the
            policies so far from the reference, that too few responses count.
    """
    logratios = reference_logratios(
        model,
        prompts,
        processing_class=processing_class,
        adapters=adapters,
        reference=reference,
        responses=responses,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    if betas is not None:
        logratios = match_betas(logratios, list(betas), beta)
    return maximin_weights(logratios, beta=beta, jackknife=jackknife, seed=seed)


def _tokenize(processing_class, prompt) -> list[int]:
    if isinstance(prompt, str):
        return list(processing_class(prompt)["input_ids"])
    text = processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(processing_class(text, add_special_tokens=False)["input_ids"])


def _pad_left(rows: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _score(policy: Policy, ids: torch.Tensor, mask: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of each completion, summed over its tokens, in float64 on the CPU."""
    logps = PolicyMixture.of_one(policy).log_probs(ids, mask).token_logps[:, -completion_mask.shape[1] :]
    # `where` and not a product: padding may have any log-probability.
    return torch.where(completion_mask.to(logps.device).bool(), logps.double(), 0.0).sum(1).cpu()
