"""Win rates and intervals: symmetries, closed forms, coverage by simulation, length control, groups."""

import numpy as np
import pytest
from scipy import optimize, stats

from trl_ext.evaluation import (
    accuracy_difference,
    combine_orders,
    detectable_difference,
    length_controlled_win_rate,
    mcnemar,
    mean,
    order_consistency,
    paired_difference,
    proportion,
    win_rate,
)


def test_orders():
    """
    Three pairs. Judged (a, b): a, a, tie. Judged (b, a): b loses, b wins, b wins. So: win; the judge took the first
    both times, a tie; tie and loss, 1/4. Of the two pairs decided in both orders it stood by one verdict.
    """
    first, swapped = [1.0, 1.0, 0.5], [0.0, 1.0, 1.0]
    assert combine_orders(first, swapped).tolist() == [1.0, 0.5, 0.25]
    assert order_consistency(first, swapped).value == 0.5
    assert order_consistency([0.5], [1.0]) is None
    always_first = np.ones(37)
    assert win_rate(combine_orders(always_first, always_first)).win_rate.value == 0.5


def test_swapping_models_gives_one_minus():
    scores = np.random.default_rng(0).choice([0, 0.25, 0.5, 1], 83)
    rate, mirrored = win_rate(scores), win_rate(1 - scores)
    assert mirrored.win_rate.value == pytest.approx(1 - rate.win_rate.value)
    assert mirrored.win_rate.low == pytest.approx(1 - rate.win_rate.high)
    assert (mirrored.wins, mirrored.ties, mirrored.losses) == (rate.losses, rate.ties, rate.wins)
    assert rate.wins + rate.ties + rate.losses == 83


def test_the_win_rate_is_the_mean_score():
    """
    Scores 3/4, 1/4, 3/4, as of a win and a tie in the two orders: W = 7/12, with two wins and a loss. (wins + ties /
    2) / N would be 2/3; it is W only where every score is 0, 1/2 or 1.
    """
    rate = win_rate(combine_orders([1.0, 0.5, 0.5], [0.5, 1.0, 0.0]))
    assert rate.win_rate.value == pytest.approx(7 / 12)
    assert (rate.wins, rate.ties, rate.losses, rate.win_rate.n) == (2, 0, 1, 3)
    scores = np.random.default_rng(1).choice([0.0, 0.5, 1.0], 61)
    rate = win_rate(scores)
    assert rate.win_rate.value == pytest.approx((rate.wins + rate.ties / 2) / 61, abs=1e-15)
    assert (rate.wins, rate.ties, rate.losses) == tuple((scores == s).sum() for s in (1.0, 0.5, 0.0))


def test_wilson():
    """
    Without ties: Wilson's interval, here (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); never a point.
    """
    estimate = proportion([1.0] * 30 + [0.0] * 10)
    z, n, p = stats.norm.ppf(0.975), 40, 0.75
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (estimate.low, estimate.high) == pytest.approx((center - half, center + half))
    all_won = proportion(np.ones(20))
    assert (all_won.value, all_won.high) == (1.0, pytest.approx(1.0)) and 0.8 < all_won.low < 0.9
    # With a tie it is the same formula: one score of 1/2 among many hardly moves it.
    with_tie = proportion([1.0] * 30 + [0.0] * 9 + [0.5])
    assert with_tie.low == pytest.approx(estimate.low, abs=0.02) and with_tie.low > estimate.low
    p = 30.5 / 40
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (with_tie.low, with_tie.high) == pytest.approx((center - half, center + half))


def clustered(generator, rate, dependence, count, sizes):
    """
    Scores of `count` prompts whose own rates are Beta with mean `rate`; `dependence` is the correlation of two scores.
    """
    sizes = generator.choice(sizes, count)
    if dependence in (0, 1):
        rates = np.full(count, rate) if dependence == 0 else (generator.random(count) < rate).astype(float)
    else:
        spread = 1 / dependence - 1
        rates = generator.beta(rate * spread, (1 - rate) * spread, count)
    prompts = np.repeat(np.arange(count), sizes)
    return (generator.random(len(prompts)) < rates[prompts]).astype(float), prompts


def one_of(*cases):
    """The first case of a simulation of coverage runs always, the others with `--runslow`."""
    first, *others = cases
    return [
        first,
        *(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in others),
    ]


def coverage(estimates, truth):
    return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])


@pytest.mark.parametrize("rate, dependence", one_of((0.9, 0.3), (0.9, 0), (0.9, 1), (0.6, 0), (0.6, 0.3), (0.6, 1)))
def test_coverage_with_several_pairs_a_prompt(rate, dependence):
    """
    400 experiments of 60 prompts with 2 to 6 pairs each, independent, correlated or all alike: a 95% interval over
    prompts holds the rate in 92% or more. Taking pairs for independent, it does so in less than 72% where they are
    alike.
    """
    generator = np.random.default_rng(10)
    samples = [clustered(generator, rate, dependence, 60, [2, 3, 4, 5, 6]) for _ in range(400)]
    assert 0.92 < coverage([proportion(scores, groups=prompts) for scores, prompts in samples], rate)
    naive = coverage([proportion(scores) for scores, _ in samples], rate)
    assert (naive > 0.92) if dependence == 0 else (naive < 0.87) if dependence == 0.3 else (naive < 0.72)


def test_groups_of_one_are_no_groups():
    scores = np.random.default_rng(11).choice([0.0, 0.5, 1.0], 50)
    labels = [f"prompt {i}" for i in range(50)]
    assert proportion(scores, groups=labels) == proportion(scores)
    assert proportion(scores > 0.5, groups=labels) == proportion(scores > 0.5)
    assert mean(scores, groups=labels) == mean(scores)
    assert paired_difference(scores, 1 - scores, groups=labels) == paired_difference(scores, 1 - scores)
    hits = scores > 0.5
    assert accuracy_difference(hits, ~hits, groups=labels) == accuracy_difference(hits, ~hits)


def test_effective_size_by_hand():
    """
    Two prompts of two pairs, 1 1 and 1 0: the mean is 3/4, the groups' deviations 1/2 and -1/2, so the variance
    between is (1/4 + 1/4) * 2 = 1 against (3 * 1/16 + 9/16) * 4/3 = 1 within: a design effect of 1. Three prompts of 1
    1, 0 0, 1 0: (1 + 1 + 0) * 3/2 = 3 against 6/4 * 6/5 = 1.8, an effect of 5/3.
    """
    z2 = stats.norm.ppf(0.975) ** 2

    def wilson(p, n):
        half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
        return (p + z2 / (2 * n)) / (1 + z2 / n) - half, (p + z2 / (2 * n)) / (1 + z2 / n) + half

    def few(pairs, groups):
        return (stats.t.ppf(0.975, pairs - 1) / stats.t.ppf(0.975, groups - 1)) ** 2

    estimate = proportion([1, 1, 1, 0], groups="aabb")
    assert (estimate.value, estimate.n) == (0.75, 2)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.75, 4 * few(4, 2)))
    estimate = proportion([1, 1, 0, 0, 1, 0], groups=[1, 1, 2, 2, 3, 3])
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.5, 6 / (5 / 3) * few(6, 3)))
    # No variance to compare: as if both pairs of a prompt said the same, three prompts (and t for few of them).
    estimate = proportion(np.ones(6), groups=[1, 1, 2, 2, 3, 3])
    assert (estimate.low, estimate.high) == (pytest.approx(wilson(1.0, 3 * few(6, 3))[0]), 1.0)
    # Groups that balance each other exactly are no more evidence than independent pairs.
    balanced = proportion([1, 0] * 30, groups=np.repeat(np.arange(30), 2))
    assert (balanced.low, balanced.high) == pytest.approx(wilson(0.5, 60 * few(60, 30)))
    # At another level both quantiles are that level's.
    z2 = stats.norm.ppf(0.9) ** 2
    size = 6 / (5 / 3) * (stats.t.ppf(0.9, 5) / stats.t.ppf(0.9, 2)) ** 2
    estimate = proportion([1, 1, 0, 0, 1, 0], groups=[1, 1, 2, 2, 3, 3], confidence=0.8)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.5, size))
    # One prompt says nothing about others.
    assert str(proportion([1, 1, 0], groups="aaa")) == "0.667 [0.000, 1.000]"


def test_mean_over_groups():
    """
    Rows of a prompt are drawn together: copies change nothing, not even in prompts of different sizes, where the mean
    is that of the rows. Its interval is that of the quotient of sums, by a plain bootstrap of 20 000 draws here.
    """
    generator = np.random.default_rng(12)
    values = generator.normal(1.0, 2.0, 60)
    once, copied = mean(values), mean(np.repeat(values, 4), groups=np.repeat(np.arange(60), 4))
    assert copied.n == 60 and (copied.value, copied.low, copied.high) == pytest.approx(
        (once.value, once.low, once.high)
    )
    sizes = generator.integers(1, 6, 60)
    prompts = np.repeat(np.arange(60), sizes)
    rows = values[prompts] + generator.normal(0, 0.5, len(prompts))
    estimate = mean(rows, groups=prompts)
    assert estimate.value == pytest.approx(rows.mean())
    sums = np.bincount(prompts, rows)
    draws = generator.integers(0, 60, (20_000, 60))
    by_hand = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    assert (estimate.low, estimate.high) == pytest.approx(by_hand, abs=0.1)
    width = mean(rows).high - mean(rows).low
    assert width < 0.8 * (estimate.high - estimate.low)
    paired = paired_difference(rows, np.zeros(len(rows)), groups=prompts)
    assert paired == estimate
    # Two samples a row are averaged first.
    assert mean(np.stack([rows + 1, rows - 1], axis=1), groups=prompts).low == pytest.approx(estimate.low)


@pytest.mark.parametrize("dependence", one_of(1, 0))
def test_coverage_of_the_mean_over_groups(dependence):
    generator = np.random.default_rng(13)
    samples = [clustered(generator, 0.4, dependence, 60, [2, 3, 4, 5, 6]) for _ in range(150)]
    options = dict(num_resamples=400)
    covered = coverage([mean(scores, groups=prompts, **options) for scores, prompts in samples], 0.4)
    assert covered > 0.9
    if dependence == 1:
        assert coverage([mean(scores, **options) for scores, _ in samples], 0.4) < 0.75


def test_accuracy_difference_by_hand():
    """
    Of 40 pairs the first alone is right on 9, the second alone on 3: 6/40, with p = 10/42, q = 4/42 in Bonett and
    Price's interval 6/42 +- 1.96 sqrt((14/42 - (6/42)^2) / 42) = [-0.027, 0.312].
    """
    first = np.array([1] * 9 + [0] * 3 + [1] * 20 + [0] * 8)
    second = np.array([0] * 9 + [1] * 3 + [1] * 20 + [0] * 8)
    estimate = accuracy_difference(first, second)
    half = stats.norm.ppf(0.975) * np.sqrt((14 / 42 - (6 / 42) ** 2) / 42)
    assert (estimate.value, estimate.n) == (pytest.approx(0.15), 40)
    assert (estimate.low, estimate.high) == pytest.approx((6 / 42 - half, 6 / 42 + half))
    mirrored = accuracy_difference(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))
    # Two models that never differ: 0, but not known exactly; and neither is a difference of 1.
    same = accuracy_difference([1, 0, 1], [1, 0, 1])
    assert same.value == 0 and same.low < -0.3 and same.high > 0.3
    assert accuracy_difference([1] * 5, [0] * 5).low < 0.8 and accuracy_difference([1] * 5, [0] * 5).high == 1.0
    copies = accuracy_difference(np.repeat(first, 3), np.repeat(second, 3), groups=np.repeat(np.arange(40), 3))
    assert copies.value == pytest.approx(0.15)
    assert (copies.low, copies.high) == pytest.approx((estimate.low, estimate.high), abs=0.01)


@pytest.mark.parametrize("count, dependence", one_of((12, 1), (12, 0), (80, 0), (80, 1)))
def test_coverage_of_the_accuracy_difference(count, dependence):
    """1000 experiments of two models, right in 0.7 and 0.6 of the pairs, two pairs a prompt: 93% or more of them."""
    generator = np.random.default_rng(14)
    estimates = []
    for _ in range(1000):
        # Which of the two are right: both, the first alone, the second alone, none.
        outcome = generator.choice(4, (count, 2), p=[0.5, 0.2, 0.1, 0.2])
        outcome = (outcome[:, [0, 0]] if dependence else outcome).ravel()
        hits = (outcome <= 1), (outcome % 2 == 0)
        estimates.append(accuracy_difference(*hits, groups=np.repeat(np.arange(count), 2)))
    assert coverage(estimates, 0.1) > 0.93


@pytest.mark.parametrize("ties", one_of(0.0, 0.6))
def test_coverage_of_the_win_rate(ties):
    """
    2000 experiments of 100 prompts at a win rate of 0.7: a 95% interval holds it in 93% or more, with ties even more.
    """
    generator = np.random.default_rng(1)
    p_win = (0.7 - ties / 2) / (1 - ties)
    covered = []
    for _ in range(2000):
        scores = np.where(generator.random(100) < ties, 0.5, generator.random(100) < p_win)
        estimate = proportion(scores)
        covered.append(estimate.low <= 0.7 <= estimate.high)
    assert np.mean(covered) > (0.99 if ties else 0.93)
    assert np.mean(covered) < 1 or ties


def test_mean_is_over_prompts():
    """
    Four copies of each prompt's value are no more evidence than one: same interval, n stays the number of prompts.
    """
    values = np.random.default_rng(2).normal(1.0, 2.0, 60)
    one, four = mean(values), mean(np.repeat(values[:, None], 4, axis=1))
    assert one == four and one.n == 60
    # Beside Student's interval, which is right for normal values.
    low, high = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert (one.low, one.high) == pytest.approx((low, high), abs=0.15)
    assert mean(values, seed=0) == mean(values, seed=0)
    assert mean([2.0, 2.0]).low == mean([2.0, 2.0]).high == 2.0
    assert (mean([2.0]).low, mean([2.0]).high) == (-np.inf, np.inf)
    # Equal but for the rounding of their means.
    assert mean([[0.1, 0.2], [0.3, 0.0], [0.15, 0.15]]).low == pytest.approx(0.15)
    assert mean([1.0, np.inf]).value == mean([1.0, np.inf]).high == np.inf and mean([1.0, np.inf]).low == -np.inf


def test_mean_covers():
    """
    300 experiments of 40 exponential values of mean 1: the interval holds it in 90% or more, at 50% in about half.
    """
    generator = np.random.default_rng(15)
    samples = [generator.exponential(1.0, 40) for _ in range(300)]
    assert coverage([mean(values, num_resamples=500) for values in samples], 1.0) > 0.9
    assert 0.4 < coverage([mean(values, num_resamples=500, confidence=0.5) for values in samples], 1.0) < 0.6


def test_pairing_takes_out_the_prompts():
    """A gain of 0.1 on prompts that differ by 5: the paired interval finds it, those of the two means overlap."""
    generator = np.random.default_rng(3)
    prompts = generator.normal(0, 5, 100)
    before, after = prompts, prompts + 0.1 + generator.normal(0, 0.1, 100)
    assert paired_difference(after, before).low > 0
    assert mean(after).low < mean(before).high


def test_mcnemar():
    """
    Nine against one of the discordant pairs: 2 (C(10,0) + C(10,1)) / 2^10 = 22 / 1024, whatever the concordant ones.
    """
    first = [1] * 9 + [0] + [1] * 50
    second = [0] * 9 + [1] + [1] * 50
    assert mcnemar(first, second) == pytest.approx(22 / 1024)
    assert mcnemar(second, first) == mcnemar(first, second)
    assert mcnemar([1, 0], [1, 0]) == 1.0


def test_detectable_difference():
    """(1.96 + 0.84) * sqrt(0.25 / 500) = 6.3 points; and 500 prompts do find it in 80 of 100 experiments."""
    assert detectable_difference(500) == pytest.approx(0.0626, abs=2e-4)
    wins = np.random.default_rng(4).binomial(500, 0.5 + detectable_difference(500), 4000) / 500
    found = np.abs(wins - 0.5) > stats.norm.ppf(0.975) * np.sqrt(0.25 / 500)
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    # At a rate of 0.8 the variance is 0.16; at power 1/2 only z of the level is left; (1.6449 + 0) sqrt(0.16 / 100).
    assert detectable_difference(100, rate=0.8, confidence=0.9, power=0.5) == pytest.approx(0.0657941, abs=1e-6)


def test_length_control_of_a_judge_of_length():
    """
    A judge that only counts words, a model that writes more of them: it wins 84 of 100, 1/2 once length is controlled,
    and the stratum of similar lengths says so too.
    """
    generator = np.random.default_rng(5)
    opponent = generator.integers(50, 150, 600).astype(float)
    lengths = (opponent + generator.normal(40, 40, 600)).clip(1)
    scores = (lengths > opponent).astype(float)
    result = length_controlled_win_rate(scores, lengths, opponent)
    assert scores.mean() > 0.8
    assert result.win_rate.value == pytest.approx(0.5, abs=0.08)
    assert result.win_rate.low < 0.5 < result.win_rate.high
    assert result.length_coefficient > 5 and result.correlation > 0.5
    assert result.similar_length.win_rate.value < scores.mean() - 0.05


def test_length_control_leaves_a_judge_of_content_alone():
    generator = np.random.default_rng(6)
    opponent, lengths = generator.integers(50, 150, (2, 800)).astype(float)
    scores = (generator.random(800) < 0.7).astype(float)
    result = length_controlled_win_rate(scores, lengths, opponent)
    assert result.win_rate.value == pytest.approx(scores.mean(), abs=0.01)
    assert result.win_rate.low < 0.7 < result.win_rate.high
    assert abs(result.correlation) < 0.1


def test_length_control_recovers_what_made_the_data():
    """Scores drawn from the model itself, theta = 0.8 and phi = -1.5: the maximum of the likelihood finds both."""
    generator = np.random.default_rng(7)
    difference = generator.normal(0, 30, 20_000)
    features = np.tanh(difference / difference.std())
    scores = (generator.random(20_000) < 1 / (1 + np.exp(-(0.8 - 1.5 * features)))).astype(float)
    result = length_controlled_win_rate(scores, 500 + difference, np.full(20_000, 500.0))
    assert result.win_rate.value == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.01)
    assert result.length_coefficient == pytest.approx(-1.5, abs=0.06)


def test_length_control_without_variation():
    """All the same length: nothing to control, and no division by zero."""
    result = length_controlled_win_rate([1.0, 1.0, 0.0, 1.0] * 20, np.full(80, 9), np.full(80, 9))
    assert result.win_rate.value == pytest.approx(0.75)
    assert result.correlation is None and result.similar_length.win_rate.value == 0.75
    assert result.length_coefficient == 0.0


@pytest.mark.parametrize("scores", [[1.0] * 10, [0.0] * 10, [0.5] * 10, [1.0, 1.0], [1.0], [1.0] * 7 + [0.5, 0.0]])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_length_control_is_wilson_at_equal_lengths(scores, confidence):
    """
    Ten wins of ten are 1 [0.722, 1], not a point: without lengths that differ, rate and interval are the plain ones.
    """
    lengths = np.full(len(scores), 30)
    found = length_controlled_win_rate(scores, lengths, lengths, confidence=confidence).win_rate
    plain = win_rate(scores, confidence=confidence).win_rate
    assert (found.n, found.confidence) == (plain.n, plain.confidence)
    assert (found.value, found.low, found.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-9)


def test_length_control_is_the_maximum_of_the_likelihood():
    """
    Scores of all kinds: the rate and the coefficient are those of a maximum found by scipy's BFGS, and swapping the
    models mirrors the rate and leaves the coefficient.
    """
    generator = np.random.default_rng(16)
    lengths, opponent = generator.integers(20, 90, (2, 45)).astype(float)
    scores = generator.choice([0.0, 0.25, 0.5, 1.0], 45)
    x = np.tanh((lengths - opponent) / (lengths - opponent).std())

    def loss(parameters, ridge):
        odds = parameters[0] + parameters[1] * x
        return np.logaddexp(0, odds).sum() - scores @ odds + ridge / 2 * parameters[1] ** 2

    for ridge in (0.1, 5.0):
        theta, phi = optimize.minimize(loss, [0.0, 0.0], args=(ridge,), tol=1e-10).x
        result = length_controlled_win_rate(scores, lengths, opponent, ridge=ridge)
        assert result.win_rate.value == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-5)
        assert result.length_coefficient == pytest.approx(phi, abs=1e-4)
        mirrored = length_controlled_win_rate(1 - scores, opponent, lengths, ridge=ridge)
        assert mirrored.length_coefficient == pytest.approx(result.length_coefficient)
        found, other = result.win_rate, mirrored.win_rate
        assert (other.value, other.low, other.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))


@pytest.mark.parametrize("ridge, confidence", [(0.1, 0.95), (3.0, 0.8)])
def test_ends_of_the_length_controlled_interval(ridge, confidence):
    """
    At both ends U^2 = z^2 Var(U), here by a general minimizer for phi and the inverse of the whole information matrix,
    of which Var(U) is one over the corner.
    """
    generator = np.random.default_rng(18)
    difference = generator.normal(20, 40, 35)
    x = np.tanh(difference / difference.std())
    scores = (generator.random(35) < 1 / (1 + np.exp(-0.4 - 1.2 * x))).astype(float)
    options = dict(ridge=ridge, confidence=confidence)
    found = length_controlled_win_rate(scores, 500 + difference, np.full(35, 500.0), **options).win_rate
    design = np.stack([np.ones(35), x], axis=1)
    for end, sign in ((found.low, 1), (found.high, -1)):
        theta = np.log(end / (1 - end))

        def loss(phi, theta=theta):
            odds = theta + phi * x
            return np.logaddexp(0, odds).sum() - scores @ odds + ridge / 2 * phi**2

        odds = theta + optimize.minimize_scalar(loss, options=dict(xtol=1e-12)).x * x
        rates = 1 / (1 + np.exp(-odds))
        information = design.T @ (design * (rates * (1 - rates))[:, None]) + np.diag([0, ridge])
        standardized = (scores - rates).sum() * np.sqrt(np.linalg.inv(information)[0, 0])
        assert standardized == pytest.approx(sign * stats.norm.ppf((1 + confidence) / 2), rel=1e-4)


def test_settings_reach_the_interval():
    values, other = np.random.default_rng(19).exponential(1.0, (2, 30))
    assert mean(values, seed=0) != mean(values, seed=1)
    assert mean(values, num_resamples=100) != mean(values)
    for options in (dict(seed=1), dict(num_resamples=100), dict(confidence=0.5)):
        assert paired_difference(values, other, **options) == mean(values - other, **options)
        assert paired_difference(values, other, **options) != paired_difference(values, other)
    hits = values > 1
    wide, narrow = (accuracy_difference(hits, other > 1, confidence=confidence) for confidence in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    verdicts = [1.0] * 9 + [0.0]
    wide, narrow = (order_consistency(verdicts, [0.0] * 10, confidence=confidence) for confidence in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_details_of_length_control():
    """
    Lengths 100 against 80, 90, 110, 100 and 300 against 100: with `similar=0.1` the differences of 10 of 100 (not less
    than a tenth) and of 20 are out, 10 of 110 and 0 are in.
    """
    scores, lengths, opponent = [1.0, 0.0, 1.0, 0.5, 1.0], [100, 100, 100, 100, 300], [80, 90, 110, 100, 100]
    result = length_controlled_win_rate(scores, lengths, opponent, similar=0.1)
    similar = result.similar_length
    assert (similar.wins, similar.ties, similar.losses, result.similar) == (1, 1, 0, 0.1)
    assert length_controlled_win_rate(scores, lengths, opponent, similar=0.11).similar_length.losses == 1
    assert (result.mean_length, result.mean_opponent_length) == (140.0, 96.0)
    difference = np.array(lengths) - opponent
    assert result.correlation == pytest.approx(stats.pearsonr(difference, scores).statistic)
    assert length_controlled_win_rate([1.0, 0.0], [10, 20], [100, 200]).similar_length is None
    assert length_controlled_win_rate([1.0, 1.0], [10, 20], [100, 20]).correlation is None
    # Two empty responses have similar lengths.
    assert length_controlled_win_rate([1.0, 0.0], [0, 10], [0, 100]).similar_length.wins == 1
    stratum = length_controlled_win_rate(scores, lengths, opponent, similar=0.1, confidence=0.5).similar_length
    assert stratum.win_rate.confidence == 0.5 and stratum.win_rate.low > similar.win_rate.low


def test_length_control_without_similar_lengths():
    """
    Every response longer by half: all won, and nothing says how it would be at equal length. The interval admits it.
    """
    for longer in (np.full(30, 50.0), np.linspace(40, 60, 30)):
        result = length_controlled_win_rate(np.ones(30), 100 + longer, np.full(30, 100.0)).win_rate
        assert result.low < 0.5 and result.high == pytest.approx(1.0)
        mixed = length_controlled_win_rate([1.0, 1.0, 0.0] * 10, 100 + longer, np.full(30, 100.0)).win_rate
        assert mixed.low < 0.1 and mixed.high > 0.9


@pytest.mark.parametrize("rate, effect", one_of((0.95, 1.5), (0.95, 0.0), (0.5, 0.0), (0.5, 2.0), (0.75, -3.0)))
@pytest.mark.parametrize("count", one_of(10, 30))
def test_coverage_of_length_control(count, rate, effect):
    """
    250 experiments, with and without an effect of length, of responses that tend to be longer: a 95% interval holds
    the rate in 92% or more even at 10 prompts and a rate of 0.95 (0.92 is two standard errors of such a count below
    0.95).
    """
    generator = np.random.default_rng(17)
    estimates = []
    for _ in range(250):
        difference = generator.normal(15, 50, count)
        odds = np.log(rate / (1 - rate)) + effect * np.tanh(difference / difference.std())
        scores = (generator.random(count) < 1 / (1 + np.exp(-odds))).astype(float)
        estimates.append(length_controlled_win_rate(scores, 500 + difference, np.full(count, 500.0)).win_rate)
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in estimates)
    assert coverage(estimates, rate) >= 0.92
    # Not by being wide: at 30 prompts narrower than a bound for any proportion with an effect to estimate.
    assert np.median([estimate.high - estimate.low for estimate in estimates]) < (0.75 if count == 10 else 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: win_rate([1.5]), r"\[0, 1\]"),
        (lambda: win_rate([]), "empty"),
        (lambda: win_rate([np.nan]), "`scores` has 1 NaN"),
        (lambda: win_rate([1.0], confidence=1.0), "`confidence`"),
        (lambda: combine_orders([2.0], [1.0]), r"`scores` must lie in \[0, 1\]"),
        (lambda: order_consistency([1.0], [-1.0]), r"`swapped_scores` must lie in \[0, 1\]"),
        (lambda: order_consistency([1.0], [0.0], confidence=0), "`confidence`"),
        (lambda: mcnemar([0.5], [1]), "`first` must be hits and misses .* tie"),
        (lambda: mcnemar([1], [0.5]), "`second` must be hits and misses"),
        (lambda: accuracy_difference([0.5], [1]), "tie"),
        (lambda: accuracy_difference([1], [1], confidence=95), "`confidence`"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "same ones"),
        (lambda: paired_difference([1.0, np.inf], [1.0, np.inf]), "`first` has 1 infinite"),
        (lambda: paired_difference([], []), "`first` is empty"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0], groups=[1]), "`groups` has 1 labels for 2 rows"),
        (lambda: mean([]), "`values` is empty"),
        (lambda: mean([np.inf, -np.inf]), "`values` holds both"),
        (lambda: mean([1.0, 2.0], num_resamples=0), "`num_resamples` must be an integer of at least 100, got 0"),
        (lambda: mean([1.0, 2.0], num_resamples=500.0), "`num_resamples`"),
        (lambda: mean([1.0, 2.0], seed=-1), "`seed`"),
        (lambda: mean([1.0, 2.0], confidence=0), "`confidence`"),
        (lambda: proportion([1.0], confidence=95), "`confidence` must be .*, got 95"),
        (lambda: proportion([1.0], confidence="95%"), "`confidence`"),
        (lambda: proportion(["won"]), "`scores` must be numbers"),
        (lambda: detectable_difference(0), "`n`"),
        (lambda: detectable_difference(100, rate=1.0), "`rate`"),
        (lambda: detectable_difference(100, power=80), "`power`"),
        (lambda: detectable_difference(100, confidence=95), "`confidence`"),
        (lambda: length_controlled_win_rate([1.5], [1], [1]), r"`scores` must lie in \[0, 1\]"),
        (lambda: length_controlled_win_rate([1.0], [-1], [1]), "`lengths` must be finite and not negative, got -1"),
        (lambda: length_controlled_win_rate([1.0], [1], [np.inf]), "`opponent_lengths`"),
        (lambda: length_controlled_win_rate([1.0], [1], [1], ridge=0), "`ridge`"),
        (lambda: length_controlled_win_rate([1.0], [1], [1], similar=15), "`similar`"),
        (lambda: length_controlled_win_rate([1.0], [1], [1], confidence=95), "`confidence`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
