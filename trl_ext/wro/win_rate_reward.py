r"""
The win rate as a reward function.

Source: *Preference learning made easy: Everything should be understood through win rate*,
https://huggingface.co/papers/2502.10505.

With p(y, y0) the judge's probability that y beats y0, an anchor distribution a, and an increasing h, the reward of y is
`q(y) = E_{y0 ~ a} h(p(y, y0))`. Maximizing `E_pi[q] - beta KL(pi || pi_ref)` has the optimum
`pi_ref exp(q / beta) / Z`: with h the identity IPO's target, with the logit and a Bradley-Terry judge RLHF's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from .._checks import at_least, between, check_value
from ..judges.callables import as_judge, check_columns, judge_pairs
from ..judges.verdicts import as_completions


ANCHORS = ("reference", "column", "self")
LINKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda p: p,
    "logit": lambda p: np.log(p) - np.log1p(-p),
    "log": np.log,
}


class Wins(NamedTuple):
    """
    What a judge said of `N` completions.

    Args:
        probabilities (`np.ndarray` of shape `(N,)`):
            Mean probability to beat an opponent; NaN without a verdict.
        rewards (`np.ndarray` of shape `(N,)`):
            The same after h; NaN without a verdict.
    """

    probabilities: np.ndarray
    rewards: np.ndarray


class WinRateReward:
    r"""
    A reward function for TRL's trainers: how often a completion beats anchors, as a judge sees it.

    ```python
    reward = WinRateReward(judge)  # a judge of `trl_ext.judges`, or a function on pairs
    trainer = RLOOTrainer(model, reward_funcs=reward, train_dataset=add_anchors(dataset, model, tokenizer), ...)
    ```

    [`WROTrainer`] samples the anchors itself. Use it, or `RLOOTrainer` with `beta > 0`, where a KL is wanted:
    `GRPOTrainer` has its KL in the loss, where a token gets no credit for the prefixes that it leads to, and by default
    divides by the spread of the rewards, which changes beta from prompt to prompt (`scale_rewards="none"` does not).

    Args:
        judge ([`~trl_ext.judges.Judge`] or `Callable`):
            Compares two completions; see [`trl_ext.judges`].
        anchors (`str`, *optional*, defaults to `"reference"`):
            What completions are compared with. `"reference"`: responses of the reference, in a column that
            [`add_anchors`] makes. `"column"`: responses of the data, such as `chosen`. `"self"`: the other completions
            of the group, whose fixed point is the regularized Nash policy.
        column (`str`, *optional*, defaults to `"anchors"`):
            Column that holds the anchors of each prompt: a list of completions, or one.
        h (`str`, *optional*, defaults to `"identity"`):
            `"identity"`, `"logit"` or `"log"`, applied to each probability. Other than the identity it needs a judge
            that gives probabilities: of a mean of votes it is biased.
        both_orders (`bool`, *optional*, defaults to `True`):
            Ask twice, with the completions swapped, and take the mean. A symmetric judge is asked once.
        clip (`float`, *optional*, defaults to `0.01`):
            Probabilities are held in `[clip, 1 - clip]` before an h other than the identity. Part of the objective.
        num_generations (`int`, *optional*):
            Size of a group; needed with `anchors="self"`. [`WROTrainer`] sets it.
        leave_one_out (`bool`, *optional*, defaults to `True`):
            With `anchors="self"`, whether the trainer's baseline is the mean of the other rewards of the group (RLOO)
            rather than that of all (GRPO). A leave-one-out baseline contains each completion's own results, which
            makes the advantage `G / (G - 1)` times too large, so that it trains at `beta (G - 1) / G`; rewards are
            multiplied by `(G - 1) / G` to undo that.

    Raises:
        `TypeError`: If `judge` cannot be called on pairs.
        `ValueError`: For unknown or unfitting options; when called, for rows without anchors, a column that is
            missing, a group that is not whole, or votes where h needs probabilities.
    """

    def __init__(
        self,
        judge: Any,
        *,
        anchors: str = "reference",
        column: str = "anchors",
        h: str = "identity",
        both_orders: bool = True,
        clip: float = 0.01,
        num_generations: int | None = None,
        leave_one_out: bool = True,
    ):
        self.judge = as_judge(judge)
        self.anchors = check_value("anchors", anchors, str, choices=ANCHORS)
        self.column = column
        self.h = check_value("h", h, str, choices=LINKS)
        self.both_orders = both_orders
        self.clip = check_value("clip", clip, Annotated[float, between(0, 0.5, "()")])
        self.num_generations = check_value("num_generations", num_generations, Annotated[int | None, at_least(2)])
        self.leave_one_out = leave_one_out
        if anchors == "self" and h == "log":
            raise ValueError(
                "`h='log'` is not supported with `anchors='self'`: the log of a win and that of a loss do not sum to a "
                "constant, so that the baseline, which contains a completion's own results, would be biased. Use "
                "'identity' or 'logit'."
            )
        self.__name__ = "win_rate"
        self.num_calls = 0
        self.last: Wins | None = None

    @property
    def metric(self) -> str:
        """Name of the mean win rate in logs: `win_rate/reference`, or that of the column."""
        return f"win_rate/{self.column if self.anchors == 'column' else self.anchors}"

    def __call__(self, prompts: list, completions: list, log_metric: Callable | None = None, **columns: Any) -> list:
        """Rewards of completions, `None` where the judge gave no verdict. `columns` are those of the dataset."""
        rows, opponents = self._opponents(prompts, completions, columns)
        data = {name: values for name, values in columns.items() if name not in _NOT_COLUMNS}
        check_columns(self.judge, data)
        asked = [prompts[row] for row in rows]
        first = [completions[row] for row in rows]
        opponents = as_completions(asked, opponents)
        pair_columns = {name: [values[row] for row in rows] for name, values in data.items()}
        forward = judge_pairs(self.judge, asked, first, opponents, pair_columns)
        calls = len(rows)
        metrics: dict[str, float] = {}
        probabilities = forward
        if self.both_orders and not self.judge.symmetric:
            backward = judge_pairs(self.judge, asked, opponents, first, pair_columns)
            calls *= 2
            decided = (forward != 0.5) & (backward != 0.5) & ~np.isnan(forward) & ~np.isnan(backward)
            if decided.any():
                consistent = (forward > 0.5) != (backward > 0.5)
                metrics["win_rate/order_consistency"] = float(consistent[decided].mean())
            probabilities = (forward + 1 - backward) / 2
        self._check_probabilities(forward)
        self.num_calls += calls
        failed = np.isnan(probabilities)
        if not failed.all():
            metrics["win_rate/ties"] = float((probabilities[~failed] == 0.5).mean())
        metrics |= {"judge/calls": float(calls), "judge/failed": float(failed.mean())}

        wins = self._wins(len(prompts), rows, probabilities)
        self.last = wins
        known = ~np.isnan(wins.probabilities)
        if known.any() and self.anchors != "self":  # against itself every policy wins half of the time
            metrics[self.metric] = float(wins.probabilities[known].mean())
            if self.h != "identity":
                metrics["win_rate/h"] = float(wins.rewards[known].mean())
        if log_metric is not None:
            for name, value in metrics.items():
                log_metric(name, value)
        return [None if math.isnan(value) else float(value) for value in wins.rewards]

    def _opponents(self, prompts: list, completions: list, columns: dict) -> tuple[list[int], list]:
        """Pairs to be judged: the row of each one's completion, and its opponent."""
        if self.anchors == "self":
            rows, opponents = [], []
            for group in self._groups(prompts):
                for i in group:
                    for j in group:
                        if i < j:
                            rows.append(i)
                            opponents.append(completions[j])
            return rows, opponents
        if self.column not in columns:
            given = ", ".join(sorted(set(columns) - _NOT_COLUMNS)) or "none"
            hint = "Make it with `add_anchors`" if self.anchors == "reference" else "Name one of them with `column`"
            raise ValueError(f"There is no column {self.column!r} of anchors; the data have {given}. {hint}.")
        rows, opponents = [], []
        for row, (prompt, anchors) in enumerate(zip(prompts, columns[self.column], strict=True)):
            anchors = _as_list(prompt, anchors)
            if not anchors:
                raise ValueError(f"The column {self.column!r} holds no anchor for the prompt {prompt!r}.")
            rows += [row] * len(anchors)
            opponents += anchors
        return rows, opponents

    def _groups(self, prompts: list) -> list[range]:
        size = self.num_generations
        if size is None:
            raise ValueError("`anchors='self'` needs `num_generations`, the trainer's completions of a prompt.")
        groups = [range(start, start + size) for start in range(0, len(prompts), size)]
        if len(prompts) % size or any(prompts[i] != prompts[group[0]] for group in groups for i in group):
            raise ValueError(
                f"`anchors='self'` compares the `num_generations={size}` completions of a prompt, and this process "
                f"holds a part of some: {len(prompts)} rows. Choose a number of rows a process (in training "
                "`per_device_train_batch_size` times `steps_per_generation`, in evaluation "
                f"`per_device_eval_batch_size`) that is a multiple of {size}, and `num_generations_eval` equal to "
                "`num_generations`."
            )
        return groups

    def _check_probabilities(self, verdicts: np.ndarray) -> None:
        known = verdicts[~np.isnan(verdicts)]
        is_vote = np.isin(known, (0.0, 1.0))
        if self.h != "identity" and is_vote.any() and (is_vote | (known == 0.5)).all():
            raise ValueError(
                f"`h={self.h!r}` needs a judge that gives probabilities, and all {known.size} verdicts of "
                f"{self.judge.name} are 0, 1/2 or 1. Use `h='identity'`, which is unbiased for votes."
            )

    def _wins(self, count: int, rows: list[int], probabilities: np.ndarray) -> Wins:
        """Means over each completion's opponents, of those with a verdict."""
        size = self.num_generations
        if self.anchors == "self":
            assert size is not None
            # Each pair was judged once; seen from the other side it is 1 - p.
            seconds = [
                j for start in range(0, count, size) for i in range(size) for j in range(start + i + 1, start + size)
            ]
            rows, probabilities = rows + seconds, np.concatenate([probabilities, 1 - probabilities])
        values = probabilities
        if self.h != "identity":
            values = LINKS[self.h](np.clip(probabilities, self.clip, 1 - self.clip))
        known = ~np.isnan(probabilities)
        index = np.array(rows)[known]
        number = np.bincount(index, minlength=count).astype(float)
        number[number == 0] = np.nan
        means = [
            np.bincount(index, weights=given[known], minlength=count) / number for given in (probabilities, values)
        ]
        if self.anchors == "self" and self.leave_one_out:
            assert size is not None
            means[1] = means[1] * (size - 1) / size
        return Wins(*means)


# What TRL gives to reward functions besides the columns of the dataset.
_NOT_COLUMNS = {"completion_ids", "trainer_state", "log_extra", "log_metric"}


def _as_list(prompt: Any, anchors: Any) -> Sequence:
    """The anchors of a prompt as a list of completions; one completion may stand alone."""
    if anchors is None:
        return []
    if isinstance(anchors, str) or (isinstance(prompt, list) and anchors and isinstance(anchors[0], dict)):
        return [anchors]
    return list(anchors)
