"""
From a batch to what a loss sees: per-token statistics of one forward, then per-response scores.

The loss never sees the batch. Whether a forward runs on TRL's padded rows or on one packed row, in which both
responses share their prompt, is known to `score_tokens` and nothing else.
"""

import contextlib
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..training.scoring_head import HeadStates, ScoringRequest
from ..training.shared_prompt import PackedRows, packed_forward


# What a method can read of the reference, one number a response; see `PreferenceTrainer.reference_statistics`.
REFERENCE_STATISTICS = ("logps", "entropy")

# Columns of a dataset, and keys of a batch, that hold them where they are precomputed.
REFERENCE_COLUMNS = {name: (f"ref_chosen_{name}", f"ref_rejected_{name}") for name in REFERENCE_STATISTICS}

# Keys of a batch that are not arguments of the model's forward.
NON_MODEL_KEYS = frozenset(
    {"completion_mask", "columns"} | {key for keys in REFERENCE_COLUMNS.values() for key in keys}
)


@dataclass
class TokenStatistics:
    """
    Statistics of every next-token prediction of a batch whose first half is chosen, second half rejected.

    Args:
        mask (`torch.Tensor` of shape `(2B, T-1)`):
            `True` where the predicted token belongs to the response (its EOS included).
        log_probs (`torch.Tensor` of shape `(2B, T-1)`):
            fp32 log-probability of each token in nats; 0 outside the mask.
        entropy (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            Entropy of each next-token distribution in nats; 0 outside the mask.
        mean_logits (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            Mean of the logits over the vocabulary, without gradient.
        is_top1 (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            Whether the token is the most likely one.
        aux_loss (`torch.Tensor` of shape `()`, *optional*):
            Load-balancing loss of a mixture-of-experts model.
        ref_log_probs (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            Log-probability of each token under the reference, where both models were scored in one pass.
        token_kl (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            KL(reference || policy) of each next-token distribution in nats, with gradient; 0 outside the mask. Of that
            pass, too.
        ref_entropy (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            Entropy of each next-token distribution of the reference in nats. Of that pass, if it was asked for.
    """

    mask: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    token_kl: torch.Tensor | None = None
    ref_entropy: torch.Tensor | None = None

    @property
    def reference(self) -> "TokenStatistics | None":
        """The reference's statistics, where both models were scored in one pass."""
        if self.ref_log_probs is None:
            return None
        return TokenStatistics(mask=self.mask, log_probs=self.ref_log_probs, entropy=self.ref_entropy)

    def per_response(self, name: str) -> torch.Tensor:
        """
        A statistic of each response, `(2B,)`, without gradient: `"logps"`, the sum of its tokens' log-probability,
        or `"entropy"`, the mean entropy of the next-token distributions that predict its tokens.
        """
        if name == "logps":
            return self.log_probs.detach().sum(dim=1)
        assert self.entropy is not None
        return self.entropy.detach().sum(dim=1) / self.mask.sum(dim=1).clamp(min=1)


_PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "ref_log_probs", "token_kl", "ref_entropy")


def score_tokens(
    model,
    inputs: dict,
    request: ScoringRequest | None = None,
    output_router_logits: bool = False,
    rows: PackedRows | None = None,
) -> TokenStatistics | HeadStates:
    """
    One forward of `model`, which must have a scoring head ([`~trl_ext.training.scoring_head.add_scoring_head`]): no
    logits are held.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to score with.
        inputs (`dict`):
            Batch with `input_ids`, `attention_mask` and `completion_mask`, each `(2B, T)`, and whatever else the
            model's forward takes.
        request ([`~trl_ext.training.scoring_head.ScoringRequest`], *optional*):
            What is wanted beside the log-probabilities; every statistic of one model by default.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Ask a mixture-of-experts model for its auxiliary loss.
        rows ([`~trl_ext.training.shared_prompt.PackedRows`], *optional*):
            The batch as one row, on which the model then runs. The statistics are the same.

    Returns:
        [`TokenStatistics`], or with `keep_states` the [`~trl_ext.training.scoring_head.HeadStates`] of the scored
        positions.
    """
    request = request or ScoringRequest()
    model_kwargs = {key: value for key, value in inputs.items() if key not in NON_MODEL_KEYS}
    if output_router_logits:
        # Vision-language wrappers honor this as a forward argument only, not from the config.
        model_kwargs["output_router_logits"] = True
    completion_mask = inputs["completion_mask"]
    labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
    request.mask = None if rows is None else rows.mask
    if rows is not None:
        model_kwargs.update(input_ids=rows.input_ids, attention_mask=rows.copies, position_ids=rows.position_ids)
        labels = rows.labels
    with contextlib.nullcontext() if rows is None else packed_forward(rows):
        outputs = model(**model_kwargs, use_cache=False, labels=labels, scoring=request)
    if request.keep_states:
        assert request.states is not None  # the head has left them there
        return request.states

    mask = completion_mask[:, 1:].bool()
    # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens.
    length = mask.size(1)
    per_token = {
        name: outputs[name][:, -length:].to(mask.device) for name in _PER_TOKEN if outputs.get(name) is not None
    }
    return TokenStatistics(mask=mask, aux_loss=outputs.get("aux_loss"), **per_token)


@dataclass
class ResponseScores:
    """
    Scores of one side of the pairs, as the loss receives them. `B` is the number of pairs; everything is fp32 and in
    nats.

    Args:
        mask (`torch.Tensor` of shape `(B, T-1)`):
            `True` on the response's own tokens, EOS included.
        token_logps (`torch.Tensor` of shape `(B, T-1)`):
            The policy's log-probability of each token; 0 outside the mask.
        ref_token_logps (`torch.Tensor` of shape `(B, T-1)`, *optional*):
            The same under the reference. `None` for a reference-free method, and with precomputed references.
        ref_logps (`torch.Tensor` of shape `(B,)`, *optional*):
            The reference's log-probability of each response. `None` for a method that does not read it.
        ref_entropy (`torch.Tensor` of shape `(B,)`, *optional*):
            Mean, over the response's tokens, of the entropy of the reference's next-token distribution, without
            gradient. For a method that lists `"entropy"` in its `reference_statistics`.
        token_kl (`torch.Tensor` of shape `(B, T-1)`, *optional*):
            KL(reference || policy) of each next-token distribution; 0 outside the mask. For a method that sets
            `needs_token_kl`, and with `log_token_kl`.
        columns (`dict[str, torch.Tensor]`, *optional*):
            The pair's numbers from the dataset, each `(B,)`, by the name of their column: those in the trainer's
            `extra_columns`. Both sides of a pair have the same.
    """

    mask: torch.Tensor
    token_logps: torch.Tensor
    ref_token_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    ref_entropy: torch.Tensor | None = None
    token_kl: torch.Tensor | None = None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def num_tokens(self) -> torch.Tensor:
        """Number of scored tokens of each response, `(B,)`."""
        return self.mask.sum(dim=1)

    @cached_property
    def logps(self) -> torch.Tensor:
        """Log-probability of each response: the sum over its tokens, `(B,)`."""
        return self.token_logps.sum(dim=1)

    @cached_property
    def mean_logps(self) -> torch.Tensor:
        """Average log-probability per token of each response, `(B,)`."""
        return self.logps / self.num_tokens

    @cached_property
    def ref_mean_logps(self) -> torch.Tensor:
        """Average log-probability per token under the reference, `(B,)`."""
        return self._reference() / self.num_tokens

    @cached_property
    def logratios(self) -> torch.Tensor:
        """Log ratio log(policy / reference) of each response, `(B,)`."""
        return self.logps - self._reference()

    @cached_property
    def kl(self) -> torch.Tensor:
        """Sequential KL divergence of each response: the sum of `token_kl` over its tokens, `(B,)`."""
        if self.token_kl is None:
            raise ValueError(
                "This method asked for the token KL, but its trainer sets `needs_token_kl = False`. Set "
                "`needs_token_kl = True` on the trainer class."
            )
        return self.token_kl.sum(dim=1)

    def _reference(self) -> torch.Tensor:
        if self.ref_logps is None:
            raise ValueError(
                "This method asked for the reference's log-probability, but its trainer does not list it. Set "
                '`needs_reference = True` and put `"logps"` into `reference_statistics` on the trainer class.'
            )
        return self.ref_logps


@dataclass
class PairLoss:
    """
    What a method's `pair_loss` returns for a batch of `B` pairs.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            Loss of each pair, with gradient.
        chosen_rewards (`torch.Tensor` of shape `(B,)`):
            The method's implicit reward of the chosen response, logged as `rewards/*`.
        rejected_rewards (`torch.Tensor` of shape `(B,)`):
            The same for the rejected response.
        metrics (`dict[str, torch.Tensor]`, *optional*):
            Further values of shape `(B,)` to log, averaged over pairs and processes. The keys must not depend on the
            data: every process must give the same ones.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    metrics: dict[str, torch.Tensor] | None = None
