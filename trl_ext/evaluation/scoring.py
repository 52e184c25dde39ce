"""
Scores responses under a model and a reference without materializing the logits of either.

The backbones run once a batch, and the heads over tiles of the response positions only, by the trainers' scoring head
([`~trl_ext.training.scoring_head.ScoringRequest`]). A model whose head is not one linear layer (several layers, or
LoRA on the head) is scored from its full logits. Softmax, entropies and divergences are float32, sums over a response
float64. The logits have the model's own precision: load models in float32 to rank responses whose log-probabilities
are close.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel

from ..losses import Divergence, get_divergence
from ..training.adapters import use_reference_adapter
from ..training.modes import evaluating
from ..training.scoring_head import ScoringRequest, require_linear_head, scoring_head
from ..training.shared_prompt import PackedRows, SharedPrompts, packed_forward
from .data import tokenize_pairs
from .divergences import divergence_of_log_probs, sequence_kl


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# Elements of a tile of logits: 64 MB of float32 for each model, and a few times that while divergences are computed.
TILE_ELEMENTS = 2**24


def without_adapters(model):
    """
    Context in which a model computes as its base model, without its adapters. If TRL keeps the adapter that training
    started from as `"ref"`, that adapter is the reference, as in training. See
    [`~trl_ext.training.adapters.use_adapter`].

    Raises:
        `ValueError`: If the model has no adapters.
    """
    # The attribute has a class default, so it does not tell.
    if not isinstance(model, PeftModel) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f'`reference="base"` means the model without its adapters, but this `{type(model).__name__}` has none. '
            "Give the reference model itself."
        )
    return use_reference_adapter(model)


class _FullLogits:
    """Logits in full, of a model whose head is not one linear layer, in the form of [`HeadStates`]."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def logits(self, positions: slice) -> torch.Tensor:
        return self.values[positions].float()


def _head_states(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, prompts: SharedPrompts
):
    """
    What the logits at the positions that predict a label follow from: hidden states and head, or the logits
    themselves.
    """
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        require_linear_head(base)
    except ValueError:
        # Prompt-learning adapters put virtual tokens in front.
        logits = model(**inputs, use_cache=False).logits[:, -input_ids.size(1) :]
        return _FullLogits(logits[:, :-1][labels[:, 1:].to(logits.device) != -100])

    def forward(rows: PackedRows | None, **options) -> tuple[ScoringRequest, Any]:
        if rows is None:
            request = ScoringRequest(**options)
            return request, model(**inputs, labels=labels, scoring=request).get("log_probs")
        request = ScoringRequest(**options, mask=rows.mask)
        places = dict(input_ids=rows.input_ids, attention_mask=rows.copies, position_ids=rows.position_ids)
        with packed_forward(rows):
            return request, model(**places, labels=rows.labels, scoring=request).get("log_probs")

    batch = dict(inputs, completion_mask=labels != -100)
    learns_prompt = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    refusal = "an adapter learns a prompt, which it puts in front of every row" if learns_prompt else None
    with scoring_head(base):
        prompts.check(base, batch, lambda rows: forward(rows, outputs=())[1][batch["completion_mask"][:, 1:]], refusal)
        request, _ = forward(prompts.rows(base, batch), keep_states=True)
    return request.states


@dataclasses.dataclass
class ScoredResponses:
    """
    Statistics of `N` responses under one model or two, token by token, in nats. `T` is the longest response's length;
    shorter ones are padded with 0 on the right.

    Args:
        mask (array of shape `(N, T)`):
            `True` on tokens, `False` on padding.
        token_logps (array of shape `(N, T)`):
            Log-probability of each token.
        token_entropy (array of shape `(N, T)`):
            Entropy of each next-token distribution.
        ref_token_logps (array of shape `(N, T)`, *optional*):
            Log-probability of each token under the reference.
        token_divergences (`dict[str, array of shape (N, T)]`):
            Divergences of each next-token distribution from the reference's.
    """

    mask: np.ndarray
    token_logps: np.ndarray
    token_entropy: np.ndarray
    ref_token_logps: np.ndarray | None = None
    token_divergences: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def some(self, rows: slice) -> "ScoredResponses":
        """The statistics of some of the responses, as wide as the longest of these."""
        width = self.mask[rows].sum(axis=1).max()
        return ScoredResponses(
            self.mask[rows, :width],
            self.token_logps[rows, :width],
            self.token_entropy[rows, :width],
            None if self.ref_token_logps is None else self.ref_token_logps[rows, :width],
            {name: value[rows, :width] for name, value in self.token_divergences.items()},
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, `(N,)`."""
        return self.mask.sum(axis=1)

    @cached_property
    def logps(self) -> np.ndarray:
        """Log-probability of each response, `(N,)`."""
        return self.token_logps.sum(axis=1)

    @cached_property
    def ref_logps(self) -> np.ndarray:
        """Log-probability of each response under the reference, `(N,)`."""
        if self.ref_token_logps is None:
            raise ValueError(
                "These responses were scored without a reference. Give `reference` to the scoring function."
            )
        return self.ref_token_logps.sum(axis=1)

    @cached_property
    def logratios(self) -> np.ndarray:
        """Log ratio log(policy / reference) of each response, `(N,)`."""
        return self.logps - self.ref_logps

    @cached_property
    def entropy(self) -> np.ndarray:
        """Mean entropy per token of each response, `(N,)`."""
        return self.token_entropy.sum(axis=1) / self.lengths

    def divergence(self, name: str) -> np.ndarray:
        """Sum over the response of a token divergence that was asked for, `(N,)`."""
        if name not in self.token_divergences:
            raise ValueError(
                f"The divergence {name!r} was not computed; computed: {', '.join(self.token_divergences) or 'none'}. "
                "Name it in `divergences` of the scoring function."
            )
        return self.token_divergences[name].sum(axis=1)

    def kl(self, estimator: str = "k1") -> np.ndarray:
        """
        Estimates of KL(policy || reference) of each response `(N,)`, if the policy sampled it; see
        [`~trl_ext.evaluation.sequence_kl`].
        """
        self.ref_logps  # noqa: B018 (raises without a reference)
        assert self.ref_token_logps is not None
        return sequence_kl(self.token_logps, self.ref_token_logps, self.mask, estimator)


def _check_ids(prompt_ids, response_ids) -> None:
    if len(prompt_ids) != len(response_ids):
        raise ValueError(f"`prompt_ids` has {len(prompt_ids)} entries and `response_ids` {len(response_ids)}.")
    if not prompt_ids:
        raise ValueError("`prompt_ids` is empty: there is nothing to score.")
    for name, sequences in (("prompt_ids", prompt_ids), ("response_ids", response_ids)):
        empty = [i for i, ids in enumerate(sequences) if len(ids) == 0]
        if empty:
            hint = (
                "a beginning-of-sequence token makes the shortest prompt" if name == "prompt_ids" else "leave it out"
            )
            raise ValueError(f"`{name}[{empty[0]}]` has no tokens ({len(empty)} such entries): {hint}.")


def score_responses(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    *,
    reference: torch.nn.Module | str | None = None,
    divergences: Iterable[str | Divergence] = (),
    temperature: float = 1.0,
    batch_size: int = 8,
) -> ScoredResponses:
    """
    Log-probabilities, entropies and divergences of responses under a model and its reference.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy. Its mode is left as it was, and no random state is touched.
        prompt_ids, response_ids (`Sequence[Sequence[int]]`):
            Token ids, without padding; a response's end-of-sequence token is part of it.
        reference ([`~transformers.PreTrainedModel`] or `"base"`, *optional*):
            The reference model; `"base"` is `model` without its adapters.
        divergences (`Iterable[str or Divergence]`, *optional*):
            Divergences from the reference to compute exactly at each position, by the names of
            [`~trl_ext.losses.get_divergence`]: `"reverse_kl"` is KL(policy || reference).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models, for responses that were sampled at another temperature.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses in a forward.
    """
    _check_ids(prompt_ids, response_ids)
    if temperature <= 0:
        raise ValueError(
            f"`temperature` must be greater than 0, got {temperature!r}: greedy decoding has no entropy or KL."
        )
    resolved = [get_divergence(divergence) for divergence in divergences]
    if resolved and reference is None:
        raise ValueError("`divergences` are from the reference: give `reference` too, a model or 'base'.")
    if len({divergence.name for divergence in resolved}) < len(resolved):
        raise ValueError(f"`divergences` has two of the same name: {resolved}. Score them one after the other.")

    shape = (len(response_ids), max(map(len, response_ids)))
    names = ["token_logps", "token_entropy"] + ["ref_token_logps"] * (reference is not None)
    results = {name: np.zeros(shape) for name in [*names, *(divergence.name for divergence in resolved)]}
    order, prompts = _long_prompts_together_first(prompt_ids, response_ids), SharedPrompts(report=logger.info)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if reference is not None and reference != "base":
            stack.enter_context(evaluating(reference))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            rows = rows[::2] + rows[1::2]  # responses to one prompt in the two halves, as packed rows share them
            statistics = _score_batch(
                model,
                reference,
                [list(prompt_ids[i]) for i in rows],
                [list(response_ids[i]) for i in rows],
                resolved,
                temperature,
                prompts,
            )
            lengths = [len(response_ids[i]) for i in rows]
            for name, flat in statistics.items():
                for i, values in zip(rows, torch.split(flat, lengths), strict=True):
                    results[name][i, : len(values)] = values.double().cpu().numpy()
    mask = np.arange(shape[1]) < np.array([len(ids) for ids in response_ids])[:, None]
    kept = {name: results.pop(name) for name in names}
    return ScoredResponses(mask=mask, token_divergences=results, **kept)


def _long_prompts_together_first(prompt_ids, response_ids) -> list[int]:
    """
    An order of the responses: those to one prompt follow each other, and long ones come first, so that there is less
    padding, and it shows at once if memory is short.
    """
    prompts = [tuple(ids) for ids in prompt_ids]
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, response_ids, strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    return sorted(range(len(prompts)), key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i]))


def _score_batch(
    model, reference, prompts, responses, divergences, temperature, sharing: SharedPrompts
) -> dict[str, torch.Tensor]:
    """Statistics of the response tokens of a batch, flat and in order."""
    device = next(model.parameters()).device
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        # Padding on the right: no position depends on it, and the mask marks it whatever its id.
        input_ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        attention_mask[row, : len(prompt) + len(response)] = 1
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)

    def run(scored):
        where = next(scored.parameters()).device
        return _head_states(scored, input_ids.to(where), attention_mask.to(where), labels.to(where), sharing)

    states, ref_states = run(model), None
    if reference == "base":
        with without_adapters(model):
            ref_states = run(model)
    elif reference is not None:
        ref_states = run(reference)
    targets = labels[labels != -100]

    tiles: dict[str, list[torch.Tensor]] = {}
    vocabulary = model.config.get_text_config().vocab_size
    for rows in torch.arange(len(targets)).split(max(1, TILE_ELEMENTS // vocabulary)):
        tile = slice(int(rows[0]), int(rows[-1]) + 1)
        log_probs = (states.logits(tile) / temperature).log_softmax(-1)
        target = targets[tile, None].to(log_probs.device)
        values = {
            "token_logps": log_probs.gather(-1, target)[:, 0],
            "token_entropy": torch.special.entr(log_probs.exp()).sum(-1),
        }
        if ref_states is not None:
            ref_log_probs = (ref_states.logits(tile) / temperature).log_softmax(-1).to(log_probs.device)
            if ref_log_probs.size(-1) != log_probs.size(-1):
                raise ValueError(
                    f"The vocabulary of `reference` has {ref_log_probs.size(-1)} entries, that of the model "
                    f"{log_probs.size(-1)}: their distributions cannot be compared. Use models that share a tokenizer."
                )
            values["ref_token_logps"] = ref_log_probs.gather(-1, target)[:, 0]
            for divergence in divergences:
                values[divergence.name] = divergence_of_log_probs(log_probs, ref_log_probs, divergence)
        for name, value in values.items():
            tiles.setdefault(name, []).append(value.to(device))
    return {name: torch.cat(values) for name, values in tiles.items()}


@dataclasses.dataclass
class PairScores:
    """Scores of the two sides of `N` pairs; see [`ScoredResponses`]."""

    chosen: ScoredResponses
    rejected: ScoredResponses


def score_pairs(
    model: torch.nn.Module,
    dataset: Iterable[dict],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    reference: torch.nn.Module | str | None = None,
    divergences: Iterable[str | Divergence] = (),
    max_length: int | None = None,
    batch_size: int = 8,
) -> PairScores:
    """
    Scores of a preference dataset under a model and its reference.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        dataset (`Iterable[dict]`):
            Preference pairs; see [`tokenize_pairs`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The models' tokenizer.
        reference ([`~transformers.PreTrainedModel`] or `"base"`, *optional*):
            The reference model; `"base"` is `model` without its adapters.
        divergences, batch_size:
            As for [`score_responses`]; `"forward_kl"` is TDPO's sequential KL.
        max_length (`int`, *optional*):
            As for [`tokenize_pairs`].
    """
    pairs = tokenize_pairs(dataset, tokenizer, max_length)
    prompts = [pair["prompt_ids"] for pair in pairs]
    resolved = list(divergences)
    # Both sides in one call, which computes their common prompt once.
    both = score_responses(
        model,
        prompts * 2,
        [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs],
        reference=reference,
        divergences=resolved,
        batch_size=batch_size,
    )
    return PairScores(both.some(slice(len(pairs))), both.some(slice(len(pairs), None)))
