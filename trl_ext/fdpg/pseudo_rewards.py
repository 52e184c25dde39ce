r"""
Pseudo-rewards of f-DPG and the estimates of the target's normalizer.

Source: *Aligning Language Models with Preferences through f-divergence Minimization*,
https://huggingface.co/papers/2302.08215.

Notation: the target is `p(y|x) = P(y|x) / Z(x)`, `w = log P - log pi` of a response that the policy sampled, and
`t = log pi - log p = log Z - w`. The gradient of `D_f(pi || p)` is `E_pi[f'(e^t) grad log pi]`, a policy gradient with
the pseudo-reward `-f'(e^t)`.
"""

import hashlib
import math
from typing import NamedTuple

import torch

from ..losses import Divergence


class PseudoRewards(NamedTuple):
    """
    What f-DPG makes of `N` responses.

    Args:
        log_target_ratio (`torch.Tensor` of shape `(N,)`): t, `+inf` for a response that the target forbids.
        values (`torch.Tensor` of shape `(N,)`): `-f'(e^t)`, bounded by the clip.
        clipped (`torch.Tensor` of shape `(N,)`): Whether the clip changed it.
        advantages (`torch.Tensor` of shape `(N,)`): Their difference from the mean of the others of the group.
    """

    log_target_ratio: torch.Tensor
    values: torch.Tensor
    clipped: torch.Tensor
    advantages: torch.Tensor


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """
    Weighted sum of the rewards `(N, functions)` of each response, `(N,)` in float64; NaN where no function gave one.

    Raises:
        `ValueError`: For a reward of `+inf`, or of `-inf` with a divergence that is infinite there.
    """
    if torch.isposinf(rewards).any() or (torch.isneginf(rewards).any() and not divergence.bounded_above):
        value = "inf" if torch.isposinf(rewards).any() else "-inf"
        remedy = (
            "Rewards are log-scores up to beta, and must be below infinity."
            if value == "inf"
            else "Use one that is bounded there, such as 'js', 'forward_kl' or 'total_variation'."
        )
        raise ValueError(
            f"A reward function returned {value}, for which the divergence {divergence!r} is infinite. {remedy}"
        )
    weights, given = weights.to(rewards.device).double(), rewards.double()
    total = torch.where(given.isnan() | (weights == 0), 0.0, given * weights).sum(1)
    return total.masked_fill(given.isnan().all(1), torch.nan)


def pseudo_rewards(
    log_weights: torch.Tensor,
    log_z: torch.Tensor,
    divergence: Divergence,
    group_size: int,
    max_pseudo_reward: float | None = None,
) -> PseudoRewards:
    """
    Pseudo-rewards and their advantages.

    Args:
        log_weights (`torch.Tensor` of shape `(N,)`):
            w, in float64, group by group; `-inf` for a response that the target forbids, NaN for one that has no
            reward and does not count.
        log_z (`torch.Tensor` of shape `(N,)`):
            Estimate of `log Z` for each response.
        divergence ([`~trl_ext.losses.Divergence`]):
            The divergence.
        group_size (`int`):
            Responses of a group.
        max_pseudo_reward (`float`, *optional*):
            Upper bound.

    Returns:
        [`PseudoRewards`]; the advantage of a response that does not count is 0.
    """
    counts = ~log_weights.isnan()
    # Where every response so far is forbidden, Z is 0 and nothing tells them apart.
    ratio = torch.where(torch.isneginf(log_weights), torch.inf, log_z - log_weights)
    # Forbidden responses have the limit of the score, which it reaches long before this bound.
    exact = -divergence.score(torch.where(counts, ratio, 0.0).clamp(max=1e9))
    values = exact if max_pseudo_reward is None else exact.clamp(max=max_pseudo_reward)
    grouped, kept = torch.where(counts, values, 0.0).view(-1, group_size), counts.view(-1, group_size)
    others = (kept.sum(1, keepdim=True) - 1).clamp(min=1)
    baseline = (grouped.sum(1, keepdim=True) - grouped) / others
    alone = kept.sum(1, keepdim=True) < 2
    advantages = torch.where(kept & ~alone, grouped - baseline, 0.0).view(-1)
    return PseudoRewards(ratio, values, (values != exact) & counts, advantages)


def group_log_mean(log_weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """`log` of the mean of `e^w` over the responses of each group that count, for each response `(N,)`."""
    grouped = log_weights.view(-1, group_size)
    kept = ~grouped.isnan()
    total = torch.where(kept, grouped, -torch.inf).logsumexp(1)
    return (total - kept.sum(1).clamp(min=1).log()).repeat_interleave(group_size)


def effective_share(log_weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """Effective share of each group's responses under the target, for each response `(N,)`; 0 if all are forbidden."""
    grouped = torch.where(log_weights.isnan(), -torch.inf, log_weights).view(-1, group_size)
    size = (2 * grouped.logsumexp(1) - (2 * grouped).logsumexp(1)).exp().nan_to_num(0.0)
    return (size / group_size).repeat_interleave(group_size)


class RunningPartition:
    """
    Running means of `e^w`, one for each key. Unbiased whatever policies sampled the responses, as each is weighted by
    its own policy.
    """

    def __init__(self):
        self.log_sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, keys: list[str], log_weights: torch.Tensor) -> None:
        """Adds responses; NaN does not count."""
        for key, value in zip(keys, log_weights.tolist(), strict=True):
            if math.isnan(value):
                continue
            self.log_sums[key] = _log_add(self.log_sums.get(key, -math.inf), value)
            self.counts[key] = self.counts.get(key, 0) + 1

    def log_means(self, keys: list[str]) -> torch.Tensor:
        """`log Z` of each key, float64; NaN where nothing is known."""
        known = [self.log_sums[key] - math.log(self.counts[key]) if key in self.counts else math.nan for key in keys]
        return torch.tensor(known, dtype=torch.float64)

    def state_dict(self) -> dict:
        return {"log_sums": dict(self.log_sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.log_sums, self.counts = dict(state["log_sums"]), dict(state["counts"])


def key_of(prompt: str | list) -> str:
    """Key of a prompt in a [`RunningPartition`]."""
    return hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]


def _log_add(first: float, second: float) -> float:
    high, low = max(first, second), min(first, second)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
