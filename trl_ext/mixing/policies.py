"""Policies of one reference: what samples responses, scores them, and keeps both on disk."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase

from .._checks import at_least, between, check_value
from ..training.fingerprints import reference_fingerprint
from ..training.sampling import end_token_ids
from ..training.seeds import derive_seed
from ..training.tensor_cache import TensorCache
from .mixture import Policy, PolicyMixture, policies_of


class ScoredResponses(NamedTuple):
    """
    `m` responses to each of `N` prompts, sampled from one distribution q and scored by the reference and K policies.

    Args:
        response_ids (`list[list[list[int]]]` of lengths `N`, `m`):
            Token ids without padding, the end-of-sequence token included.
        log_q (`torch.Tensor` of shape `(N, m)`):
            `log q`, token by token, in nats.
        log_weights (`torch.Tensor` of shape `(N, m)`):
            `sum_t log Z_t`: logarithm of a response's weight under the mixture of whole responses. 0 where one policy
            was sampled.
        log_reference (`torch.Tensor` of shape `(N, m)`):
            `log pi_ref`.
        logratios (`torch.Tensor` of shape `(N, m, K)`):
            `L_k = log pi_k - log pi_ref`.
    """

    response_ids: list[list[list[int]]]
    log_q: torch.Tensor
    log_weights: torch.Tensor
    log_reference: torch.Tensor
    logratios: torch.Tensor


class AlignedPolicies:
    """
    Policies that were aligned apart, from one reference.

    Args:
        model (`peft.PeftModel` or a list of models):
            The policies, as in [`PolicyMixture`].
        processing_class (`transformers.PreTrainedTokenizerBase`):
            The tokenizer, with a padding token.
        adapters (`list[str]`, *optional*):
            Names of the policies' adapters in `model`. The reference is then `model` without adapters.
        reference (`torch.nn.Module`, *optional*):
            The model that all policies were trained from; needed with policies that are models of their own.
        responses (`int`, *optional*, defaults to `8`):
            Responses to each prompt, at least 2.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest response, in tokens. A response that is cut there counts as the prefix that it is, under all models
            alike.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses in a forward. What is sampled depends on it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        cache_dir (`str` or `Path`, *optional*):
            Folder that keeps samples and scores, so that an interrupted run resumes and another run reuses them. They
            are found by what they depend on: the weights of the models, the prompts' tokens and the settings.

    Raises:
        `ValueError`: If there are fewer than two policies, no padding token, or no reference (or one beside adapters),
            the vocabularies differ, or a setting is out of its range.
    """

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        *,
        processing_class: PreTrainedTokenizerBase,
        adapters: Sequence[str] | None = None,
        reference: torch.nn.Module | None = None,
        responses: int = 8,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ):
        self.responses = check_value("responses", responses, Annotated[int, at_least(2)])
        self.max_new_tokens = check_value("max_new_tokens", max_new_tokens, Annotated[int, at_least(1)])
        self.batch_size = check_value("batch_size", batch_size, Annotated[int, at_least(1)])
        self.seed = check_value("seed", seed, Annotated[int, between(0, 2**63 - 1)])
        self.policies = policies_of(model, adapters)
        if len(self.policies) < 2:
            raise ValueError(f"A mixture needs two policies or more, got {len(self.policies)}.")
        if adapters is not None and reference is not None:
            raise ValueError("`reference` must be None with `adapters`: it is the model without them.")
        if adapters is None and reference is None:
            raise ValueError(
                "`reference` is needed with policies that are models of their own: give what they were trained from."
            )
        if processing_class.pad_token_id is None:
            raise ValueError("`processing_class` has no padding token. Set `processing_class.pad_token`.")
        self.base = Policy(model, None, True) if adapters is not None else Policy(reference)
        policies_of([self.base.model, *(policy.model for policy in self.policies)], None)  # one vocabulary
        self.processing_class = processing_class
        self.cache = TensorCache(cache_dir)
        self._fingerprints: dict[Policy, str] = {}

    def mixture(self, weights: Sequence[float]) -> PolicyMixture:
        """The mixture of these weights."""
        return PolicyMixture.of(self.policies, weights)

    def reference_mixture(self) -> PolicyMixture:
        """The reference, sampled as a mixture is."""
        return PolicyMixture.of_one(self.base)

    def sample(self, prompts: Sequence, mixture: PolicyMixture, *purpose) -> ScoredResponses:
        """
        Samples a mixture at temperature 1 without truncation, and scores the responses.

        Args:
            prompts (`list[str]` or `list[list[dict]]` of length `N`):
                Prompts as text, or as messages, which get the chat template with a generation prompt.
            mixture ([`PolicyMixture`]):
                What to sample.
            purpose:
                Distinguishes random numbers that are to differ although the seed is one.

        Returns:
            [`ScoredResponses`]

        Raises:
            `ValueError`: If there are no prompts.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError("`prompts` must be a list of one prompt or more.")
        rows = [ids for prompt in prompts for ids in [self.prompt_ids(prompt)] for _ in range(self.responses)]
        batches = [
            (start, rows[start : start + self.batch_size], mixture, purpose)
            for start in range(0, len(rows), self.batch_size)
        ]
        sampled = [self._sample_batch(*batch) for batch in batches]
        scores = torch.stack([self.score(rows, sampled, policy) for policy in (self.base, *self.policies)], -1)
        ids = [
            [token for token, kept in zip(row, mask, strict=True) if kept]
            for found in sampled
            for row, mask in zip(found["ids"].tolist(), found["mask"].tolist(), strict=True)
        ]
        shape, m = (len(prompts), self.responses), self.responses
        reference = scores[:, 0]
        return ScoredResponses(
            response_ids=[ids[i : i + m] for i in range(0, len(ids), m)],
            log_q=torch.cat([found["log_q"] for found in sampled]).view(shape),
            log_weights=torch.cat([found["log_weights"] for found in sampled]).view(shape),
            log_reference=reference.view(shape),
            logratios=(scores[:, 1:] - reference.unsqueeze(1)).view(*shape, -1),
        )

    def score_responses(self, prompts: Sequence, responses: ScoredResponses, policy: Policy) -> torch.Tensor:
        """Log-probability of each response under another policy `(N, m)`, in nats."""
        rows = [ids for prompt in prompts for ids in [self.prompt_ids(prompt)] for _ in range(self.responses)]
        flat = [ids for group in responses.response_ids for ids in group]
        batches = []
        for start in range(0, len(flat), self.batch_size):
            batch = flat[start : start + self.batch_size]
            length = max(map(len, batch))
            pad = self.processing_class.pad_token_id
            batches.append(
                {
                    "ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in batch]),
                    "mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch]),
                }
            )
        return self.score(rows, batches, policy).view(len(prompts), self.responses)

    def score(self, rows: list[list[int]], batches: list[dict[str, torch.Tensor]], policy: Policy) -> torch.Tensor:
        """Log-probability of each response, summed over its tokens, in float64 on the CPU."""
        scores = []
        for index, batch in enumerate(batches):
            prompts = rows[index * self.batch_size : (index + 1) * self.batch_size]
            key = ("scores", self._fingerprint(policy), prompts, batch["ids"].tolist(), batch["mask"].tolist())
            compute = functools.partial(self._score_batch, prompts, batch, policy)
            scores.append(self.cache(compute, *key))
        return torch.cat([found["logps"] for found in scores])

    def texts(self, responses: ScoredResponses) -> list[str]:
        """The `N * m` responses as texts without special tokens."""
        flat = [ids for group in responses.response_ids for ids in group]
        return self.processing_class.batch_decode(flat, skip_special_tokens=True)

    def _sample_batch(self, start: int, rows: list[list[int]], mixture: PolicyMixture, purpose: tuple):
        parts = [(self._fingerprint(policy), weight) for policy, weight in mixture.parts]
        ends = end_token_ids(self.base.model, self.processing_class)
        pad = self.processing_class.pad_token_id

        def compute() -> dict[str, torch.Tensor]:
            ids, mask = _pad_left(rows, pad)
            found = mixture.generate(
                ids,
                mask,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=pad,
                generator=torch.Generator(mixture.device).manual_seed(derive_seed(self.seed, *purpose, start)),
            )
            return {
                "ids": found.completion_ids,
                "mask": found.completion_mask,
                "log_q": found.log_probs[:, 0],
                "log_weights": found.log_weights[:, 0],
            }

        return self.cache(compute, "samples", parts, rows, ends, pad, self.max_new_tokens, self.seed, purpose, start)

    def _score_batch(self, rows: list[list[int]], batch: dict[str, torch.Tensor], policy: Policy) -> dict:
        scorer = PolicyMixture.of_one(policy)
        ids, mask = _pad_left(rows, self.processing_class.pad_token_id)
        whole, whole_mask = torch.cat([ids, batch["ids"]], 1), torch.cat([mask, batch["mask"]], 1)
        length = batch["ids"].shape[1]
        logps = scorer.log_probs(whole, whole_mask).token_logps[:, -length:].double().cpu()
        # `where` and not a product: padding may have any log-probability.
        return {"logps": torch.where(batch["mask"].bool(), logps, 0.0).sum(1)}

    def _fingerprint(self, policy: Policy) -> str:
        """Hash of a policy's weights; empty where nothing is kept."""
        if self.cache.folder is None:
            return ""
        if policy not in self._fingerprints:
            adapter = policy.adapter
            if not policy.switch and is_peft_model(policy.model):
                adapter = policy.model.active_adapter
            self._fingerprints[policy] = reference_fingerprint(policy.model, adapter, (), PartialState())
        return self._fingerprints[policy]

    def prompt_ids(self, prompt) -> list[int]:
        """Token ids of a prompt given as text or as messages."""
        if isinstance(prompt, str):
            return list(self.processing_class(prompt)["input_ids"])
        text = self.processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return list(self.processing_class(text, add_special_tokens=False)["input_ids"])


def _pad_left(rows: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
