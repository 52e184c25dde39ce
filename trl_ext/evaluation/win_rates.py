"""
Win rate: how often a judge prefers one model's response, with ties, both orders, intervals and length control.

Source of the length control: *Length-Controlled AlpacaEval*, https://huggingface.co/papers/2404.04475.

A score is the judge's verdict on one prompt: 1 if `a` wins, 0 if `b` does, 1/2 for a tie, or the probability that `a`
is better.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from . import intervals
from ._arrays import as_vectors, check_between, check_count, check_positive
from .intervals import Estimate


def _scores(**named) -> list[np.ndarray]:
    """Vectors of the same length, of scores in `[0, 1]`."""
    arrays = as_vectors(**named)
    for name, array in zip(named, arrays, strict=True):
        if array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"`{name}` must lie in [0, 1], got values from {array.min()} to {array.max()}: 1 is a win, 0 a loss, "
                "1/2 a tie. Leave prompts without a verdict out."
            )
    return arrays


def combine_orders(scores: ArrayLike, swapped_scores: ArrayLike) -> np.ndarray:
    """
    Scores without position bias, from judging every pair twice: `(score of (a, b) + 1 - score of (b, a)) / 2`.

    If a judge prefers a position, its two verdicts contradict each other and the pair becomes a tie: a judge that
    always says "first" gives 1/2 to every pair. A win in one order and a tie in the other make 3/4.

    Args:
        scores (array of shape `(N,)`):
            Verdicts with `a` shown first, in `[0, 1]`: 1 if `a` wins.
        swapped_scores (array of shape `(N,)`):
            Verdicts with `b` shown first, in `[0, 1]`: 1 if `b` wins.

    Returns:
        Array of shape `(N,)`: scores of `a`, in `[0, 1]`.

    Raises:
        `ValueError`: For arrays of different length, none, NaN, or scores outside `[0, 1]`.
    """
    scores, swapped_scores = _scores(scores=scores, swapped_scores=swapped_scores)
    return (scores + 1 - swapped_scores) / 2


def order_consistency(scores: ArrayLike, swapped_scores: ArrayLike, *, confidence: float = 0.95) -> Estimate | None:
    """
    Share of pairs whose verdict stays the same when the responses change places, among the pairs without a tie in
    either order. Chance is 1/2.

    Args:
        scores, swapped_scores (arrays of shape `(N,)`):
            As for [`combine_orders`]: if the two verdicts are consistent, one is above 1/2 and the other below.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval (Wilson).

    Returns:
        [`Estimate`], whose `n` counts the pairs that were decided in both orders; `None` where there are none.

    Raises:
        `ValueError`: As [`combine_orders`], and for a `confidence` outside `(0, 1)`.
    """
    scores, swapped_scores = _scores(scores=scores, swapped_scores=swapped_scores)
    decided = (scores != 0.5) & (swapped_scores != 0.5)
    if not decided.any():
        return None
    return intervals.proportion(((scores > 0.5) != (swapped_scores > 0.5))[decided], confidence=confidence)


@dataclasses.dataclass(frozen=True)
class WinRate:
    """
    Win rate of `a` over `b`.

    Args:
        win_rate (`Estimate`):
            The mean score, with its interval over prompts.
        wins, ties, losses (`int`):
            Numbers of prompts with a score above, at and below 1/2. `(wins + ties / 2) / N` is the win rate only if
            all scores are 0, 1/2 or 1: a score of 3/4, from a win in one order and a tie in the other, counts as a
            win.
    """

    win_rate: Estimate
    wins: int
    ties: int
    losses: int

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def win_rate(scores: ArrayLike, *, confidence: float = 0.95) -> WinRate:
    """
    Win rate: the mean score, `W = sum_i s_i / N`; `W(b over a) = 1 - W(a over b)`. A win adds 1 and a tie 1/2. Scores
    in between, such as 3/4 for a win in one order and a tie in the other, add their value.

    Its standard error is at most `sqrt(W (1 - W) / N)`: 5 points at N = 100, 2.2 at N = 500.

    Args:
        scores (array of shape `(N,)`):
            One score a prompt, in `[0, 1]`; see [`combine_orders`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval (Wilson; with ties conservative).

    Returns:
        [`WinRate`].

    Raises:
        `ValueError`: For no scores, NaN, scores outside `[0, 1]`, or a `confidence` outside `(0, 1)`.
    """
    (scores,) = _scores(scores=scores)
    rate = intervals.proportion(scores, confidence=confidence)
    return WinRate(rate, int((scores > 0.5).sum()), int((scores == 0.5).sum()), int((scores < 0.5).sum()))


@dataclasses.dataclass(frozen=True)
class LengthControlledWinRate:
    """
    Win rate with the effect of length taken out.

    Args:
        win_rate (`Estimate`):
            Prediction of the fitted model at a length difference of 0, with its score interval.
        length_coefficient (`float`):
            Slope of the log-odds of winning in the tanh of the standardized length difference.
        correlation (`float`, *optional*):
            Pearson correlation of the length difference and the score; `None` if one of them is constant.
        similar_length (`WinRate`, *optional*):
            Win rate among the prompts whose two lengths differ by less than `similar` of the longer; `None` if there
            are none.
        similar (`float`):
            The share `similar` that was given.
        mean_length, mean_opponent_length (`float`):
            Mean lengths of the model's and the opponent's responses.
    """

    win_rate: Estimate
    length_coefficient: float
    correlation: float | None
    similar_length: WinRate | None
    similar: float
    mean_length: float
    mean_opponent_length: float

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class _LengthModel:
    """
    The logistic model `log-odds(score) = theta + phi x` as a function of `theta`: for each `theta`, `phi` maximizes
    the log-likelihood minus `ridge phi^2 / 2`.

    `theta` has no penalty, so without an effect of length the rate is the plain win rate.
    """

    LIMIT = 30.0  # of theta: a rate of 1e-13

    def __init__(self, x: np.ndarray, scores: np.ndarray, ridge: float):
        self.x, self.scores, self.ridge = x, scores, ridge
        # Where the derivative of the penalized likelihood has changed its sign for certain.
        self.widest = np.abs(x).sum() / ridge + 1

    def phi(self, theta: float) -> float:
        from scipy.optimize import brentq
        from scipy.special import expit

        def slope(phi):  # decreases strictly in phi
            return self.x @ (self.scores - expit(theta + phi * self.x)) - self.ridge * phi

        return brentq(slope, -self.widest, self.widest, xtol=1e-10) if self.x.any() else 0.0

    def score(self, theta: float) -> tuple[float, float]:
        """Derivative of the log-likelihood in theta, and its variance if theta is true and phi estimated."""
        from scipy.special import expit

        odds = theta + self.phi(theta) * self.x
        rates = expit(odds)
        weights = rates * expit(-odds)
        shared = weights @ self.x
        return (self.scores - rates).sum(), weights.sum() - shared**2 / (weights @ self.x**2 + self.ridge)

    def crossing(self, level: float) -> float:
        """The theta whose standardized score is `level`; infinite if there is none. Decreases in `level`."""
        from scipy.optimize import brentq

        def distance(theta):
            derivative, variance = self.score(theta)
            # The variance is positive, except for rounding if the effect of length explains every verdict.
            return derivative - level * np.sqrt(max(variance, 0.0))

        if distance(-self.LIMIT) <= 0:
            return -np.inf
        if distance(self.LIMIT) >= 0:
            return np.inf
        return brentq(distance, -self.LIMIT, self.LIMIT, xtol=1e-10)


def length_controlled_win_rate(
    scores: ArrayLike,
    lengths: ArrayLike,
    opponent_lengths: ArrayLike,
    *,
    similar: float = 0.15,
    ridge: float = 0.1,
    confidence: float = 0.95,
) -> LengthControlledWinRate:
    r"""
    Win rate as it would be if both responses had the same length.

    After length-controlled AlpacaEval: a logistic model `log-odds(score) = theta + phi tanh((len_a - len_b) / s)`,
    with `s` the standard deviation of the length differences, is fitted to the scores, and `sigmoid(theta)` is
    reported. The published model also has a term for the difficulty of each instruction, which is estimated from a
    leaderboard of models and cannot be estimated from one model.

    The interval is the score interval: all thetas whose score `U = sum_i (s_i - p_i)`, at the phi that fits best,
    has `U^2 <= z^2 Var(U)`. Without an effect of length it is Wilson's interval. Unlike a bootstrap interval it does
    not shrink to a point if all verdicts are equal, and it keeps its level at small `N`; with ties it is conservative.
    It assumes that the length model is true, and it is wide if few responses have similar lengths.

    The method corrects for length as a cause of winning. If a model's longer responses are longer because they are
    better, it corrects too much: read the rate beside the raw one and the one among pairs of similar length.

    Args:
        scores (array of shape `(N,)`):
            One score a prompt, in `[0, 1]`.
        lengths, opponent_lengths (arrays of shape `(N,)`):
            Lengths of the model's and the opponent's responses, in tokens or characters, but both in the same.
        similar (`float`, *optional*, defaults to `0.15`):
            Two lengths that differ by less than this share of the longer count as similar.
        ridge (`float`, *optional*, defaults to `0.1`):
            Weight of the penalty `phi^2 / 2`, in prompts. It keeps the fit finite where length decides every verdict.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the intervals.

    Returns:
        [`LengthControlledWinRate`].

    Raises:
        `ValueError`: For arrays of different length, none, NaN, scores outside `[0, 1]`, lengths that are negative or
            infinite, or a setting out of its range.
    """
    from scipy import stats
    from scipy.special import expit

    similar, ridge = check_between("similar", similar, 0, 1), check_positive("ridge", ridge)
    confidence = check_between("confidence", confidence, 0, 1)
    scores, lengths, opponent_lengths = as_vectors(scores=scores, lengths=lengths, opponent_lengths=opponent_lengths)
    _scores(scores=scores)
    for name, values in (("lengths", lengths), ("opponent_lengths", opponent_lengths)):
        wrong = values[(values < 0) | np.isinf(values)]
        if len(wrong):
            raise ValueError(
                f"`{name}` must be finite and not negative, got {wrong[0]:g}. Count tokens or characters."
            )
    difference = lengths - opponent_lengths
    spread = difference.std()
    # If every response is longer by the same amount, the data do not tell the rate at equal length, and the interval
    # is wide.
    model = _LengthModel(np.tanh(difference / spread) if spread else np.sign(difference), scores, ridge)
    z = stats.norm.ppf((1 + confidence) / 2)
    theta, low, high = (float(model.crossing(level)) for level in (0.0, z, -z))

    close = np.abs(difference) < similar * np.maximum(lengths, opponent_lengths)
    close |= difference == 0
    constant = spread == 0 or np.ptp(scores) == 0
    return LengthControlledWinRate(
        win_rate=Estimate(float(expit(theta)), float(expit(low)), float(expit(high)), len(scores), confidence),
        length_coefficient=model.phi(theta),
        correlation=None if constant else float(np.corrcoef(difference, scores)[0, 1]),
        similar_length=win_rate(scores[close], confidence=confidence) if close.any() else None,
        similar=similar,
        mean_length=float(lengths.mean()),
        mean_opponent_length=float(opponent_lengths.mean()),
    )


def detectable_difference(n: int, *, rate: float = 0.5, confidence: float = 0.95, power: float = 0.8) -> float:
    """
    Smallest difference of a win rate from `rate` that `n` prompts detect with probability `power`:
    `(z_{(1+confidence)/2} + z_power) sqrt(rate (1 - rate) / n)`, which is 6.3 points at n = 500.

    Args:
        n (`int`):
            Number of prompts.
        rate (`float`, *optional*, defaults to `0.5`):
            Win rate without a difference.
        confidence, power (`float`, *optional*, default to `0.95` and `0.8`):
            Confidence level of the test, and the probability of detecting the difference.

    Returns:
        `float`: the difference between the rates; 0.063 is 6.3 points.

    Raises:
        `ValueError`: For an `n` below 1, or a `rate`, `confidence` or `power` outside `(0, 1)`.
    """
    from scipy import stats

    n, rate = check_count("n", n, 1), check_between("rate", rate, 0, 1)
    confidence, power = check_between("confidence", confidence, 0, 1), check_between("power", power, 0, 1)
    return float((stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)) * np.sqrt(rate * (1 - rate) / n))
