"""
Applies judges to whole sets of responses: verdicts in both orders and their combination, win rates, rewards of
prompts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..judges.callables import Judge, as_judge, check_columns, judge_pairs
from ..judges.verdicts import JudgeError, as_completions
from . import win_rates as rates


@dataclasses.dataclass
class Judgements:
    """
    A judge's verdicts on `N` prompts.

    Args:
        first (array of shape `(N,)`):
            Scores with `a` shown first; NaN without a verdict.
        swapped (array of shape `(N,)`, *optional*):
            Verdicts with `b` shown first (1 if `b` wins); `None` if one order was asked for, or is enough.
    """

    first: np.ndarray
    swapped: np.ndarray | None = None

    @property
    def judged(self) -> np.ndarray:
        """Whether each prompt has a verdict in every order, boolean of shape `(N,)`."""
        missing = np.isnan(self.first)
        return ~(missing if self.swapped is None else missing | np.isnan(self.swapped))

    @property
    def scores(self) -> np.ndarray:
        """One score a prompt, orders combined, `(N,)`; NaN without a verdict."""
        if self.swapped is None:
            return self.first
        scores = np.full(len(self.first), np.nan)
        if self.judged.any():
            scores[self.judged] = rates.combine_orders(self.first[self.judged], self.swapped[self.judged])
        return scores

    def win_rate(self, confidence: float = 0.95) -> rates.WinRate:
        """Win rate of `a` over the prompts with a verdict."""
        if not self.judged.any():
            raise JudgeError("The judge gave no verdict on any prompt, so there is no win rate. Look at its replies.")
        return rates.win_rate(self.scores[self.judged], confidence=confidence)

    def order_consistency(self):
        """See [`~trl_ext.evaluation.order_consistency`]; `None` with one order."""
        if self.swapped is None or not self.judged.any():
            return None
        return rates.order_consistency(self.first[self.judged], self.swapped[self.judged])


def judge_responses(
    judge: Judge | Callable,
    prompts: Sequence,
    completions: Sequence,
    opponent_completions: Sequence,
    *,
    both_orders: bool = True,
    columns: Mapping[str, Sequence] | None = None,
) -> Judgements:
    """
    Asks a judge about each prompt's two completions, in both orders.

    Args:
        judge ([`~trl_ext.judges.Judge`] or `Callable`):
            A judge, or a function on pairs; see [`trl_ext.judges.callables`].
        prompts, completions, opponent_completions (`Sequence` of length `N`):
            The prompts, and one completion of each by the model and by its opponent. Texts as completions of prompts
            that are messages are made messages.
        both_orders (`bool`, *optional*, defaults to `True`):
            Ask again with the completions swapped. A symmetric judge is asked once.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the prompts' dataset, each of length `N`, for a judge that takes them.
    """
    judge = as_judge(judge)
    if not len(prompts) == len(completions) == len(opponent_completions):
        raise ValueError(
            f"`prompts`, `completions` and `opponent_completions` must have the same length, got {len(prompts)}, "
            f"{len(completions)} and {len(opponent_completions)}."
        )
    columns = {name: list(values) for name, values in (columns or {}).items()}
    check_columns(judge, columns)
    first, second = as_completions(prompts, completions), as_completions(prompts, opponent_completions)
    scores = judge_pairs(judge, prompts, first, second, columns)
    if not both_orders or judge.symmetric:
        return Judgements(scores)
    return Judgements(scores, judge_pairs(judge, prompts, second, first, columns))


def prompt_rewards(rewards: np.ndarray) -> np.ndarray:
    """
    Reward of each prompt, `(N,)`: that of its response `(N,)`, or the mean over its responses `(N, K)` that have a
    reward.
    """
    table = rewards.reshape(len(rewards), -1)
    given = ~np.isnan(table)
    means = np.full(len(table), np.nan)
    return np.divide(np.where(given, table, 0).sum(axis=1), given.sum(axis=1), out=means, where=given.any(axis=1))
