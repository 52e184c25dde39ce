r"""
The mixture of policies `pi_lambda proportional to prod_k pi_k^{lambda_k}`, its decoding and its log-probabilities.

Token by token, `q(v | prefix) proportional to prod_k pi_k(v | prefix)^{lambda_k}` can be sampled, but it is not the
mixture of whole responses: it normalizes at every token, the mixture once. The difference is known while sampling.
With

    Z_t = sum_v prod_k pi_k(v | prefix)^{lambda_k},

`prod_k pi_k(y)^{lambda_k} = q(y) prod_t Z_t`, so a response of q has the weight `prod_t Z_t` under the mixture, and
one of several responses, drawn by these weights, follows the mixture up to the number of candidates.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from .._checks import at_least, check_value
from ..training.adapters import use_adapter
from ..training.modes import evaluation_mode
from .weights import MixtureWeights


class MixtureLogProbs(NamedTuple):
    """
    Log-probabilities of given tokens.

    Args:
        token_logps (`torch.Tensor` of shape `(B, T)`): `log q` of each token, in nats.
        log_normalizers (`torch.Tensor` of shape `(B, T)`): `log Z_t` at each token. Summed over a response, the
            logarithm of its weight under the mixture of whole responses; at most 0 for weights on the simplex.
    """

    token_logps: torch.Tensor
    log_normalizers: torch.Tensor


class MixtureSamples(NamedTuple):
    """
    One response to each prompt, and the candidates that it was drawn from.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`): The responses, padded on the right.
        completion_mask (`torch.Tensor` of shape `(B, T)`): 1 on their tokens, EOS included.
        log_weights (`torch.Tensor` of shape `(B, n)`): `sum_t log Z_t` of each candidate.
        chosen (`torch.Tensor` of shape `(B,)`): Which candidate each response is.
        effective_size (`torch.Tensor` of shape `(B,)`): Effective number of candidates. Near 1 where n is larger: the
            token-level mixture is far from that of whole responses, and more candidates would help.
        log_probs (`torch.Tensor` of shape `(B, n)`): `log q` of each candidate, float64.
    """

    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    log_weights: torch.Tensor
    chosen: torch.Tensor
    effective_size: torch.Tensor
    log_probs: torch.Tensor


class Policy(NamedTuple):
    """
    A model, and which of its adapters make the policy.

    Args:
        model (`torch.nn.Module`): The model.
        adapter (`str`, *optional*): Adapter that is active; `None` with `switch` for none.
        switch (`bool`, *optional*, defaults to `False`): Whether adapters are switched at all, or left as they are.
    """

    model: torch.nn.Module
    adapter: str | None = None
    switch: bool = False

    @contextlib.contextmanager
    def active(self):
        """Evaluation mode with this policy's adapter; what was there before is restored on exit."""
        switched = use_adapter(self.model, self.adapter) if self.switch else contextlib.nullcontext()
        with evaluation_mode(self.model), switched:
            yield


def policies_of(model, adapters: Sequence[str] | None) -> list[Policy]:
    """
    The policies that `model` and `adapters` stand for, as in [`PolicyMixture`].

    Raises:
        `ValueError`: If an adapter is unknown, or the models' vocabularies differ.
    """
    if adapters is not None:
        known = getattr(model, "peft_config", {})
        unknown = [name for name in adapters if name not in known]
        if unknown:
            names = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"`adapters` must be names of adapters of the model, which has {names}, got {unknown}.")
        return [Policy(model, name, True) for name in adapters]
    policies = [Policy(one) for one in (model if isinstance(model, (list, tuple)) else [model])]
    sizes = {policy.model.get_output_embeddings().weight.shape[0] for policy in policies}
    if len(sizes) > 1:
        raise ValueError(f"The policies must share one vocabulary, got heads of {sorted(sizes)} tokens.")
    return policies


class PolicyMixture:
    """
    A mixture of policies: adapters of one base model, or models of one vocabulary. A token costs one forward per
    policy with a weight other than 0, each with a cache of its own.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel` or a list of models):
            A PEFT model that holds `adapters`, or the policies themselves.
        adapters (`list[str]`, *optional*):
            Names of the policies' adapters in `model`.
        weights (`list[float]` or [`MixtureWeights`]):
            One weight per policy. Weights outside the simplex extrapolate, with a warning.

    Raises:
        `ValueError`: If the number of weights is not that of the policies, a weight is not finite, none differs from
            0, an adapter is unknown, or the models' vocabularies differ.

    Example:

    ```python
    mixture = PolicyMixture(peft_model, adapters=["positive", "short"], weights=[0.6, 0.4])
    samples = mixture.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=64)
    tokenizer.batch_decode(samples.completion_ids, skip_special_tokens=True)
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        *,
        weights: Sequence[float] | MixtureWeights,
        adapters: Sequence[str] | None = None,
    ):
        weights = weights.weights if isinstance(weights, MixtureWeights) else list(weights)
        policies = policies_of(model, adapters)
        if len(weights) != len(policies):
            raise ValueError(f"`weights` must hold one number per policy, {len(policies)}, got {len(weights)}.")
        for k, weight in enumerate(weights):
            check_value(f"weights[{k}]", weight, Annotated[float, at_least(-torch.inf)])
        if not any(weights):
            raise ValueError("`weights` are all 0, so there is nothing to mix.")
        if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            warnings.warn(
                f"`weights` {weights} do not lie on the simplex: the mixture extrapolates beyond its policies.",
                stacklevel=2,
            )
        self.weights = [float(weight) for weight in weights]
        self._policies = policies

    @classmethod
    def of_one(cls, policy: Policy) -> "PolicyMixture":
        """One policy, sampled and scored as a mixture is."""
        return cls.of([policy], [1.0])

    @classmethod
    def of(cls, policies: Sequence[Policy], weights: Sequence[float]) -> "PolicyMixture":
        """Policies with weights that have been checked."""
        mixture = cls.__new__(cls)
        mixture.weights, mixture._policies = [float(weight) for weight in weights], list(policies)
        return mixture

    @property
    def parts(self) -> list[tuple[Policy, float]]:
        """The policies that count, each with its weight."""
        return [part for part in zip(self._policies, self.weights, strict=True) if part[1] != 0]

    @property
    def device(self) -> torch.device:
        """Device of the first policy, where samples and log-probabilities are returned."""
        return next(self._policies[0].model.parameters()).device

    def log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MixtureLogProbs:
        """
        Log-probabilities of every token but the first, without gradient.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`):
                Prompts and responses, padded on either side.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                1 on tokens, 0 on padding. By default all are tokens.

        Returns:
            [`MixtureLogProbs`], of shape `(B, L - 1)`: entry t is for token `t + 1`. Entries of padding are to be
            masked.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = [_State() for _ in self._policies]
        log_q, log_z = self._advance(states, input_ids[:, :-1], mask[:, :-1], last=False, use_cache=False)
        labels = input_ids[:, 1:].to(log_q.device).unsqueeze(-1)
        return MixtureLogProbs(log_q.gather(-1, labels).squeeze(-1), log_z)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        candidates: int = 1,
        do_sample: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        generator: torch.Generator | None = None,
    ) -> MixtureSamples:
        """
        Samples responses, at temperature 1 and without truncation, which the exact weights need.

        Args:
            input_ids (`torch.Tensor` of shape `(B, P)`):
                Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*):
                1 on tokens, 0 on padding. By default all are tokens.
            max_new_tokens (`int`):
                Longest response, in tokens.
            candidates (`int`, *optional*, defaults to `1`):
                Responses sampled for each prompt, of which one is drawn by its weight. With 1 the samples are those of
                the token-level mixture; the more, the nearer they are to the mixture of whole responses.
            do_sample (`bool`, *optional*, defaults to `True`):
                `False` takes the most likely token of q, with `candidates=1`.
            eos_token_id (`int` or `list[int]`, *optional*):
                Tokens that end a response. By default those of the first policy's generation configuration.
            pad_token_id (`int`, *optional*, defaults to `0`):
                Fills responses behind their end.
            generator (`torch.Generator`, *optional*):
                Random state, on the device of the first policy. By default the global one.

        Returns:
            [`MixtureSamples`]

        Raises:
            `ValueError`: If prompts are padded on the right, or a setting is out of its range.
        """
        check_value("max_new_tokens", max_new_tokens, Annotated[int, at_least(1)])
        check_value("candidates", candidates, Annotated[int, at_least(1)])
        if not do_sample and candidates > 1:
            raise ValueError(
                f"`candidates={candidates}` would all be the same with do_sample=False. Use candidates=1."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError("`input_ids` must be padded on the left, but the last token of some prompt is padding.")
        if eos_token_id is None:
            eos_token_id = self._policies[0].model.generation_config.eos_token_id
        ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        ends = torch.tensor(ends, dtype=torch.long, device=self.device)

        prompts = len(input_ids)
        tokens = input_ids.to(self.device).repeat_interleave(candidates, 0)
        mask = mask.to(self.device).repeat_interleave(candidates, 0)
        states = [_State() for _ in self._policies]
        running = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        log_weights, log_probs = torch.zeros(2, len(tokens), dtype=torch.float64, device=self.device)
        completion, completion_mask = [], []
        for _ in range(max_new_tokens):
            log_q, log_z = self._advance(states, tokens, mask, last=True, use_cache=True)
            log_q, log_z = log_q[:, -1], log_z[:, -1]
            drawn = torch.multinomial(log_q.exp(), 1, generator=generator) if do_sample else log_q.argmax(-1, True)
            log_weights += torch.where(running, log_z.double(), 0.0)
            log_probs += torch.where(running, log_q.gather(1, drawn)[:, 0].double(), 0.0)
            completion.append(torch.where(running, drawn[:, 0], pad_token_id))
            completion_mask.append(running.long())
            tokens = completion[-1].unsqueeze(1)
            mask = torch.cat([mask, completion_mask[-1].unsqueeze(1).to(mask.dtype)], 1)
            running = running & ~torch.isin(drawn[:, 0], ends)
            if not running.any():
                break

        log_weights, log_probs = log_weights.view(prompts, candidates), log_probs.view(prompts, candidates)
        shares = log_weights.softmax(1)
        chosen = torch.multinomial(shares, 1, generator=generator)[:, 0]
        rows = torch.arange(prompts, device=self.device) * candidates + chosen
        ids, kept = torch.stack(completion, 1)[rows], torch.stack(completion_mask, 1)[rows]
        length = int(kept.sum(1).max())
        effective_size = 1 / shares.square().sum(1)
        return MixtureSamples(ids[:, :length], kept[:, :length], log_weights, chosen, effective_size, log_probs)

    def merge(self, adapter_name: str) -> None:
        """
        Adds an adapter to the PEFT model whose weight change is the weighted sum of the policies': one forward a
        token, and an approximation of the mixture to first order in the weight changes. [`measure_policies`] measures
        its distance from the mixture.

        Args:
            adapter_name (`str`):
                Name of the new adapter. Its rank is the sum of the policies' ranks.

        Raises:
            `ValueError`: If the policies are no adapters of one model.
        """
        names = [policy.adapter for policy in self._policies]
        if None in names:
            raise ValueError("Only adapters of one model can be merged; these policies are models of their own.")
        # Concatenated factors give exactly the sum of the changes; "linear" would combine the factors one by one.
        self._policies[0].model.add_weighted_adapter(names, self.weights, adapter_name, combination_type="cat")

    @torch.no_grad()
    def _advance(self, states, input_ids, mask, *, last: bool, use_cache: bool):
        """
        `log q` over the vocabulary `(B, T, V)` and `log Z` `(B, T)` for these new tokens (or the last one of them).
        """
        total = 0.0
        for policy, weight, state in zip(self._policies, self.weights, states, strict=True):
            if weight == 0:
                continue
            device = next(policy.model.parameters()).device
            attention = mask.to(device)
            positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            with policy.active():
                output = policy.model(
                    input_ids=input_ids.to(device),
                    attention_mask=attention,
                    position_ids=positions,
                    past_key_values=state.cache,
                    use_cache=use_cache,
                )
            state.cache = output.past_key_values if use_cache else None
            logits = output.logits[:, -1:] if last else output.logits
            # float64 where the logits are: sums of log-probabilities over a response should not lose digits.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = total + weight * logits.log_softmax(-1).to(self.device)
        assert isinstance(total, torch.Tensor)  # there are policies
        log_z = total.logsumexp(-1)
        return total - log_z.unsqueeze(-1), log_z


class _State:
    """The cache of one policy."""

    def __init__(self):
        self.cache = None
