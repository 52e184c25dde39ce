"""Estimates with confidence intervals for numbers measured on a sample of prompts."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import Groups, as_array, as_vectors, check_between, check_count, group_codes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """
    A number measured on a sample, with its interval.

    Args:
        value (`float`):
            The estimate.
        low, high (`float`):
            Ends of the interval.
        n (`int`):
            Independent units that it was measured on: prompts or pairs, not samples of the same prompt. Where `groups`
            were given, these.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def _check_confidence(confidence: float) -> float:
    return check_between("confidence", confidence, 0, 1)


def _effective_size(values: np.ndarray, codes: np.ndarray | None, confidence: float) -> tuple[int, float]:
    """
    Number of independent units among `values`, and their effective sample size.

    With `G` groups: `N / deff * (t_{N-1} / t_{G-1})^2`. The design effect `deff` is the linearized variance of the
    mean when groups are drawn, over that when values are, not less than 1; the quantiles of Student's t are those of
    Korn and Graubard for few groups. Exactly `N` where every value is its own group.
    """
    from scipy import stats

    n = len(values)
    if codes is None:
        return n, float(n)
    sizes = np.bincount(codes)
    groups = len(sizes)
    if groups == 1:
        return 1, 0.0  # one prompt says nothing about others
    deviation = values - values.mean()
    if np.ptp(values) == 0:
        # No variance to compare: as if the values of a group said the same thing over again.
        effect = (sizes**2).sum() / n
    else:
        between = (np.bincount(codes, deviation) ** 2).sum() * groups / (groups - 1)
        effect = max(1.0, between / ((deviation**2).sum() * n / (n - 1)))
    quantiles = stats.t.ppf((1 + confidence) / 2, [n - 1, groups - 1])
    return groups, float(n / effect * (quantiles[0] / quantiles[1]) ** 2)


def proportion(scores: ArrayLike, *, groups: Groups = None, confidence: float = 0.95) -> Estimate:
    """
    Mean of scores in `[0, 1]` with the Wilson score interval, `{w : (mean - w)^2 <= z^2 w (1 - w) / N}`.

    With scores of 0 and 1 only this is Wilson's interval. `w (1 - w)` bounds the variance of every score in `[0, 1]`
    of mean `w`, so with ties (1/2) or probabilities the interval is too wide, never too narrow. Unlike mean +- 2
    standard errors it stays inside `[0, 1]` and does not shrink to a point where all scores are equal.

    Scores of the same prompt are no independent evidence. With `groups`, `N` in the interval is the effective sample
    size, `N / deff` with the design effect of these groups (and Korn and Graubard's correction for few groups): four
    pairs of a prompt that always agree count as one. The estimate remains the mean of all scores.

    Args:
        scores (array of shape `(N,)`):
            Scores, e.g. 1 for a win, 1/2 for a tie, 0 for a loss; or booleans.
        groups (sequence of `N` hashable labels, *optional*):
            What each score's prompt is. By default every score has its own.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval.

    Returns:
        [`Estimate`], whose `n` counts the groups.

    Raises:
        `ValueError`: For a score outside `[0, 1]`, no scores, NaN, another number of labels, or a `confidence` outside
            `(0, 1)`.
    """
    from scipy import stats

    confidence = _check_confidence(confidence)
    (scores,) = as_vectors(scores=scores)
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(f"`scores` must lie in [0, 1], got values from {scores.min()} to {scores.max()}.")
    codes = group_codes(groups, len(scores))
    average = float(scores.mean())
    units, n = _effective_size(scores, codes, confidence)
    if codes is None and set(np.unique(scores)) <= {0.0, 1.0}:
        interval = stats.binomtest(int(scores.sum()), units).proportion_ci(confidence, method="wilson")
        return Estimate(average, float(interval.low), float(interval.high), units, confidence)
    if n == 0:
        return Estimate(average, 0.0, 1.0, units, confidence)
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    center = (average + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (average * (1 - average) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Estimate(average, float(max(center - half, 0.0)), float(min(center + half, 1.0)), units, confidence)


def accuracy_difference(
    first: ArrayLike, second: ArrayLike, *, groups: Groups = None, confidence: float = 0.95
) -> Estimate:
    """
    Difference of two models' accuracies on the same pairs, `mean(first) - mean(second)`, with an interval.

    For ranking accuracies: `accuracy_difference(ranked_correctly(...), ranked_correctly(...))`. The interval is Bonett
    and Price's (2012) for paired proportions: with `n_10` and `n_01` pairs on which only one model is right, `p =
    (n_10 + 1) / (N + 2)`, `q = (n_01 + 1) / (N + 2)` and `p - q +- z sqrt((p + q - (p - q)^2) / (N + 2))`. Pairs on
    which both are right or both are wrong cancel; where there are only such, the interval is still not a point. The
    p-value of "both equally often" is [`mcnemar`]'s.

    Args:
        first, second (boolean arrays of shape `(N,)`):
            Whether each model is right on each pair, in the same order.
        groups (sequence of `N` hashable labels, *optional*):
            What each pair's prompt is, if some have several: `N` in the interval is then the effective sample size, as
            in [`proportion`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval.

    Returns:
        [`Estimate`], in `[-1, 1]`, whose `n` counts the groups.

    Raises:
        `ValueError`: For values other than 0 and 1, arrays of different length, another number of labels, or a
            `confidence` outside `(0, 1)`.
    """
    from scipy import stats

    confidence = _check_confidence(confidence)
    first, second = _hits(first, second)
    difference = first - second
    units, n = _effective_size(difference, group_codes(groups, len(difference)), confidence)
    gained, lost = (n * float((difference == sign).mean()) for sign in (1, -1))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    value = float(difference.mean())
    # The added pairs shrink the center: at a low `confidence` the interval could leave out the estimate itself.
    low, high = min(max(p - q - half, -1.0), value), max(min(p - q + half, 1.0), value)
    return Estimate(value, float(low), float(high), units, confidence)


def mean(
    values: ArrayLike, *, groups: Groups = None, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """
    Mean of values with a bootstrap interval over prompts (bias-corrected and accelerated, [`scipy.stats.bootstrap`]).

    A bootstrap knows only what it has seen: where all values are equal, the interval is a point, and below ten or so
    prompts it is too narrow. For hits, wins and scores in `[0, 1]`, [`proportion`] is right at any number.

    Args:
        values (array of shape `(N,)` or `(N, K)`):
            One value a prompt, or `K` samples of each prompt, which are averaged first: samples of one prompt are not
            independent, so prompts are what is drawn again. With an infinite one, the mean is infinite and the
            interval says nothing.
        groups (sequence of `N` hashable labels, *optional*):
            What each row's prompt is, if some have several rows: prompts are drawn again, with all of their rows. The
            estimate remains the mean of all rows.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Bootstrap samples, 100 or more.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap, which has its own random state.

    Returns:
        [`Estimate`], whose `n` counts the prompts. One prompt has an infinite interval.

    Raises:
        `ValueError`: For no values, NaN, infinities of both signs, another number of labels, or a setting out of its
        range.
    """
    from scipy import stats

    confidence = _check_confidence(confidence)
    num_resamples = check_count("num_resamples", num_resamples, 100)
    seed = check_count("seed", seed, 0)
    values = as_array("values", values, (1, 2))
    if values.size == 0:
        raise ValueError("`values` is empty: there is nothing to measure.")
    if np.isposinf(values).any() and np.isneginf(values).any():
        raise ValueError("`values` holds both inf and -inf, which have no mean. Find out where they come from.")
    values = values.mean(axis=1) if values.ndim == 2 else values
    codes = group_codes(groups, len(values))
    average = float(values.mean())
    # Sums and sizes of the groups: the mean of a draw is the quotient of their sums.
    sums, sizes = (values, None) if codes is None else (np.bincount(codes, values), np.bincount(codes).astype(float))
    n = len(sums)
    if n == 1 or math.isinf(average):
        return Estimate(average, -math.inf, math.inf, n, confidence)
    means = sums if sizes is None else sums / sizes
    if np.ptp(means) <= 1e-12 * np.abs(means).max():
        # Nothing to resample: equal values, but for the rounding of their means.
        return Estimate(average, average, average, n, confidence)
    interval = stats.bootstrap(
        (sums,) if sizes is None else (sums, sizes),
        np.mean if sizes is None else lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=sizes is not None,
        confidence_level=confidence,
        n_resamples=num_resamples,
        batch=max(1, 2**22 // n),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(average, float(interval.low), float(interval.high), n, confidence)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    groups: Groups = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """
    Mean of `first - second`, measured on the same prompts, with the bootstrap interval of [`mean`].

    Pairing takes out what the prompts share, and two overlapping intervals of the two means say little: look at this
    one. For hits and misses, [`accuracy_difference`] is right at small numbers too.

    Args:
        first, second (arrays of shape `(N,)` or `(N, K)`):
            The two models' values, prompt by prompt, finite.
        groups, confidence, num_resamples, seed (*optional*):
            As for [`mean`].

    Returns:
        [`Estimate`], whose `n` counts the prompts.

    Raises:
        `ValueError`: For different numbers of prompts, values that are not finite, or a setting out of its range.
    """
    first, second = as_array("first", first, (1, 2)), as_array("second", second, (1, 2))
    if len(first) != len(second):
        raise ValueError(f"`first` has {len(first)} prompts and `second` {len(second)}. Give the same ones, in order.")
    for name, array in (("first", first), ("second", second)):
        if array.size == 0:
            raise ValueError(f"`{name}` is empty: there is nothing to compare.")
        if np.isinf(array).any():
            raise ValueError(
                f"`{name}` has {int(np.isinf(array).sum())} infinite values of {array.size}: a difference with them "
                "says nothing. Drop these prompts from both."
            )
    first, second = (array.mean(axis=1) if array.ndim == 2 else array for array in (first, second))
    return mean(first - second, groups=groups, confidence=confidence, num_resamples=num_resamples, seed=seed)


def _hits(first, second) -> list[np.ndarray]:
    hits = as_vectors(first=first, second=second)
    for name, values in zip(("first", "second"), hits, strict=True):
        other = values[(values != 0) & (values != 1)]
        if len(other):
            raise ValueError(
                f"`{name}` must be hits and misses (booleans), got {other[0]} among them. Decide what a tie is first."
            )
    return hits


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """
    Exact McNemar test of two models' hits on the same prompts: the two-sided p-value of "both hit equally often".

    Only prompts where exactly one hits carry information; under the hypothesis each is a fair coin. The coins are
    independent: with several pairs of a prompt, look at [`accuracy_difference`] with `groups` instead. Size and
    interval of the difference are there too.

    Args:
        first, second (boolean arrays of shape `(N,)`):
            Whether each model wins (or ranks, or answers) each prompt correctly.

    Returns:
        `float`: the p-value; 1 where the models never differ.

    Raises:
        `ValueError`: For values other than 0 and 1, or arrays of different length.
    """
    from scipy import stats

    first, second = _hits(first, second)
    only_first, only_second = int((first > second).sum()), int((first < second).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)
