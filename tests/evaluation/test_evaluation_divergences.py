"""Estimators of divergence: exact expectations over an enumerable model, bias included, and closed forms."""

import mpmath
import numpy as np
import pytest
import torch
from enumerable import EnumerableModel

from trl_ext.evaluation import best_of_n, kl_estimates, sampled_divergence, sequence_kl, token_divergences
from trl_ext.losses import DIVERGENCES, Divergence, TangentTail, get_divergence


@pytest.fixture(scope="module")
def models():
    reference = EnumerableModel(seed=0)
    return EnumerableModel(seed=1, scale=0.7, around=reference), reference


def test_zero_at_the_reference():
    for estimator in ("k1", "k2", "k3"):
        assert (kl_estimates(np.zeros(5), estimator) == 0).all()


def test_estimators_by_hand():
    """l = log 2: log 2, (log 2)^2 / 2 and 1/2 - 1 + log 2. l = -log 2: k3 is 2 - 1 - log 2."""
    log2 = np.log(2)
    assert kl_estimates([log2], "k1") == pytest.approx([log2])
    assert kl_estimates([log2], "k2") == pytest.approx([log2**2 / 2])
    assert kl_estimates([log2, -log2], "k3") == pytest.approx([log2 - 0.5, 1 - log2])
    assert kl_estimates([log2]) == kl_estimates([log2], "k1")
    given = np.array([log2])
    assert not np.shares_memory(kl_estimates(given, "k1"), given)
    # Policy -1, -2 and reference -2, -1 on two tokens: of the second response only the first counts.
    logps, ref_logps, mask = [[-1.0, -2.0], [-1.0, -9.0]], [[-2.0, -1.0], [-2.0, 9.0]], [[1, 1], [1, 0]]
    assert sequence_kl(logps, ref_logps, mask).tolist() == [0.0, 1.0]
    assert sequence_kl(logps, ref_logps, mask, "k2").tolist() == [1.0, 0.5]
    e = np.e
    assert sequence_kl(logps, ref_logps, mask, "k3") == pytest.approx([1 / e + e - 2, 1 / e])
    assert sequence_kl([[0.0]], [[5.0]], [[0]], "k3").tolist() == [0.0]


def test_expectations_over_all_sequences(models):
    """
    Over all 15 sequences, weighted by the policy: k1 and k3 have the mean KL exactly, of whole responses and summed
    over tokens; k2 has not. k3 and k2 are never negative; k1 is, for some.
    """
    policy, reference = models
    sequences = policy.sequences()
    p, q = (np.array([model.prob(s) for s in sequences]) for model in (policy, reference))
    assert p.sum() == pytest.approx(1) and len(sequences) == 15
    kl = (p * np.log(p / q)).sum()
    logps, mask = policy.padded(sequences)
    ref_logps, _ = reference.padded(sequences)
    for estimator, unbiased in (("k1", True), ("k2", False), ("k3", True)):
        whole = kl_estimates(np.log(p / q), estimator)
        by_token = sequence_kl(logps, ref_logps, mask, estimator)
        for values in (whole, by_token):
            assert bool((p * values).sum() == pytest.approx(kl, rel=1e-10)) is unbiased
            assert bool(values.min() >= 0) is (estimator != "k1")
    assert (p * kl_estimates(np.log(p / q), "k2")).sum() / kl == pytest.approx(1.0, abs=0.5)


def test_k2_bias_for_gaussians():
    """
    Unit normals one standard deviation apart: KL = 1/2, and the log ratio is normal with mean 1/2 and variance 1, so E
    k2 = (1 + 1/4) / 2 = 0.625: 25% too much, where 400 000 draws know it to 0.002. The relative standard deviation of
    k1 is 1 / (1/2) = 2, and k3's is smaller.
    """
    draws = np.random.default_rng(0).normal(1.0, 1.0, 400_000)
    logratio = (draws**2 - (draws - 1) ** 2) / 2
    means = {name: kl_estimates(logratio, name).mean() for name in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(0.5, abs=0.006)
    assert means["k3"] == pytest.approx(0.5, abs=0.006)
    assert means["k2"] == pytest.approx(0.625, abs=0.006)
    assert kl_estimates(logratio, "k1").std() / 0.5 == pytest.approx(2.0, rel=0.01)
    assert kl_estimates(logratio, "k3").std() < kl_estimates(logratio, "k1").std()


def test_exact_token_kl_has_the_same_mean_and_less_variance(models):
    """Rao-Blackwell: the sum of exact per-token KL has the mean of k1 over all sequences, and a smaller variance."""
    policy, reference = models
    sequences = policy.sequences()
    p, q = (np.array([model.prob(s) for s in sequences]) for model in (policy, reference))
    exact = np.array(
        [
            sum(token_divergences(policy.logits[s[:t]], reference.logits[s[:t]]) for t in range(len(s)))
            for s in sequences
        ]
    )
    k1 = np.log(p / q)
    kl = (p * k1).sum()
    assert (p * exact).sum() == pytest.approx(kl, rel=1e-10)
    assert (p * (exact - kl) ** 2).sum() < 0.5 * (p * (k1 - kl) ** 2).sum()


def test_padding_changes_nothing(models):
    policy, reference = models
    sequences = policy.sequences()
    logps, mask = policy.padded(sequences)
    ref_logps, _ = reference.padded(sequences)
    pad = np.full((len(sequences), 4), -np.inf)
    for estimator in ("k1", "k2", "k3"):
        padded = sequence_kl(
            np.hstack([logps, pad]), np.hstack([ref_logps, pad]), np.hstack([mask, 0 * np.isinf(pad)]), estimator
        )
        assert (padded == sequence_kl(logps, ref_logps, mask, estimator)).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence(name, models):
    """
    Exact token divergence = sum_v pi_ref f(pi / pi_ref) by plain sums; its estimate from samples of the policy has
    that mean over all tokens, and is never negative. Zero at the reference.
    """
    policy, reference = models
    for prefix in policy.logits:
        p, q = policy.next(prefix), reference.next(prefix)
        expected = (q * get_divergence(name).f(torch.tensor(p / q)).numpy()).sum()
        assert expected > 0
        exact = token_divergences(policy.logits[prefix], reference.logits[prefix], name)
        assert exact == pytest.approx(expected, rel=1e-9)
        sampled = sampled_divergence(np.log(p / q), name)
        assert sampled.min() >= -1e-12
        assert (p * sampled).sum() == pytest.approx(expected, rel=1e-9)
        assert token_divergences(policy.logits[prefix], policy.logits[prefix], name) == pytest.approx(0, abs=1e-12)


def test_directions():
    """
    Bernoulli 3/4 against 1/2: KL(pi || ref) = 3/4 log 3/2 + 1/4 log 1/2 = 0.1308; the other way 1/2 log 4/3 = 0.1438.
    """
    logits, ref = np.log([0.75, 0.25]), np.log([0.5, 0.5])
    assert token_divergences(logits, ref, "reverse_kl") == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert token_divergences(logits, ref, "forward_kl") == pytest.approx(0.5 * np.log(4 / 3))
    assert sampled_divergence(np.array([0.3, -2.0])) == pytest.approx(kl_estimates(np.array([0.3, -2.0]), "k3"))


def test_rounding_does_not_make_a_divergence_negative():
    """Logits that differ in the last digits: the terms cancel to something of either sign."""
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 3, (500, 40))
    near = logits + 1e-10 * generator.normal(size=logits.shape)
    for name in DIVERGENCES:
        assert token_divergences(logits, near, name).min() >= 0


def test_impossible_tokens():
    """
    A token that neither can say contributes nothing; one that only the policy can say makes KL(pi || ref) infinite.
    """
    logits, ref = np.array([0.0, 1.0, -np.inf]), np.array([0.5, 0.0, -np.inf])
    for name in ("reverse_kl", "forward_kl", "js"):
        assert token_divergences(logits, ref, name) == pytest.approx(token_divergences(logits[:2], ref[:2], name))
    assert token_divergences(np.zeros(2), np.array([0.0, -np.inf])) == np.inf
    assert token_divergences(np.array([0.0, -np.inf]), np.zeros(2)) == pytest.approx(np.log(2))


def test_far_apart_is_finite():
    """Logits 1e4 apart, both ways: KL is 1e4 times the probability, not NaN."""
    assert token_divergences([1e4, 0.0], [0.0, 1e4]) == pytest.approx(1e4)
    assert token_divergences([1e4, 0.0], [0.0, 1e4], "forward_kl") == pytest.approx(1e4)
    assert np.isfinite(token_divergences([1e4, 0.0], [0.0, 1e4], "js"))


def reference_generator(name, logratio, **params):
    """f(u) / max(u, 1) at u = e^logratio in 60 digits, from each divergence's definition as textbooks have it."""
    with mpmath.workdps(60):
        u, log = mpmath.exp(logratio), mpmath.log
        alpha, gamma, s = params.get("alpha", 0.5), params.get("gamma", 1.0), mpmath.mpf(params.get("skew", 0.5))
        value = {
            "reverse_kl": lambda: u * log(u) - u + 1,
            "forward_kl": lambda: -log(u) + u - 1,
            "js": lambda: u * log(u) - (u + 1) * log((u + 1) / 2),
            "alpha": lambda: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
            "hellinger": lambda: (mpmath.sqrt(u) - 1) ** 2,
            "jeffreys": lambda: (u - 1) * log(u),
            "skew_js": lambda: s * u * log(u) - (s * u + 1 - s) * log(s * u + 1 - s),
            "chi_po": lambda: (u - 1) ** 2 / 2 + gamma * (u * log(u) - u + 1),
            "neyman": lambda: (1 - u) ** 2 / u,
        }[name]()
        return value / max(u, 1)


def as_float(value) -> float:
    return float(value) if value < 1e307 else np.inf


CASES = [(name, {}) for name in DIVERGENCES]
CASES += [("alpha", dict(alpha=alpha)) for alpha in (0.1, 0.9, 1.5, 3.0)]
CASES += [("skew_js", dict(skew=0.1)), ("chi_po", dict(gamma=0.3))]


@pytest.mark.parametrize("name, params", CASES)
def test_far_apart_is_exact(name, params):
    """Log ratios from -5000 to 5000 nats against 60 digits; beyond the range of float64 it is inf, and never NaN."""
    log2 = np.log(2)
    for x in (-5000, -900, -700, -301, -299, -40, -1, 1, 40, 299, 301, 700, 900, 5000):
        value = reference_generator(name, x, **params)
        sampled = as_float(value if x > 0 else value * mpmath.exp(-x))  # f(u) / u
        assert sampled_divergence([float(x)], name, **params)[0] == pytest.approx(sampled, rel=1e-8), x
        if abs(x) < 40:
            continue
        # (1/2, 1/2) against (1, e^-|x|): one token's log ratio is log 2, the other's |x| - log 2, with the signs of x.
        even, sure, sign = [0.0, 0.0], [0.0, -abs(float(x))], np.sign(x)
        expected = as_float(reference_generator(name, -sign * log2, **params))
        expected += as_float(reference_generator(name, x - sign * log2, **params)) / 2
        sides = (even, sure) if x > 0 else (sure, even)
        assert token_divergences(*sides, name, **params) == pytest.approx(expected, rel=1e-8), x


def test_sampled_divergence_is_never_nan():
    """Whatever the log ratio: k3 of 800 nats is 799."""
    logratios = np.array([-1e9, -800.0, -1e-300, 0.0, 1e-300, 800.0, 1e9, np.inf])
    for name, params in CASES:
        values = sampled_divergence(logratios, name, **params)
        assert not np.isnan(values).any() and values.min() >= 0
        assert (values[2:5] < 1e-12).all() and (values[[0, 1]] == np.inf).all()
    assert sampled_divergence([800.0]) == pytest.approx([799.0])
    assert sampled_divergence([np.inf]) == np.inf and sampled_divergence([np.inf], "forward_kl") == 1.0
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimates([np.inf], estimator) == np.inf
    assert kl_estimates([-800.0], "k3") == np.inf


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("bound", [5.0, 400.0])
def test_bounded_divergences_far_apart(name, bound):
    """A bounded divergence: f by quadrature of its score, f(u) = int g(t) e^t dt, at 310 and 900 nats from 0."""
    divergence = TangentTail(get_divergence(name), max_log_weight=bound)
    lower, upper = divergence.lower, divergence.upper

    def score(t):
        nearest = min(max(t, lower), upper)
        slope = mpmath.diff(lambda v: reference_generator(name, v) * max(mpmath.exp(v), 1), nearest)
        return slope / mpmath.exp(nearest) + (mpmath.exp(bound) * (t - nearest) if t != nearest else 0)

    for x in (310.0, 900.0):  # over u: int_0^inf g(x - s) e^{-s} ds, of which the first 200 nats are all
        ends = {0, 1, 5, 20, 60, 200} | ({x - upper} if 0 < x - upper < 200 else set())
        expected = as_float(mpmath.quad(lambda s, x=x: score(x - s) * mpmath.exp(-s), sorted(ends)))
        assert divergence.scaled_value(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(
            expected, rel=1e-6
        )
    for x in (-310.0, -900.0):
        start = max(lower, x)
        expected = reference_generator(name, start)
        if start > x:
            grid = [start - distance for distance in (200, 60, 20, 5, 1, 0) if start - distance > x]
            expected -= mpmath.quad(lambda t: score(t) * mpmath.exp(t), [x, *grid])
        found = divergence.scaled_value(torch.tensor(x, dtype=torch.float64)).item()
        assert found == pytest.approx(as_float(expected), rel=1e-6)


def test_own_divergence_far_apart():
    """
    Divergences of one's own, of which nothing but f and the score is known: KL to the even mixture, and reverse KL.
    """

    class KLToMixture(Divergence):
        name = "kl_to_mixture"

        def score(self, logratio):
            x = torch.sigmoid(-logratio)
            return np.log(2) + torch.nn.functional.logsigmoid(logratio) + x - 0.5

        def log_weight(self, logratio):
            return 2 * torch.nn.functional.logsigmoid(-logratio)

        def f(self, u):
            return u * (2 * u / (1 + u)).log() - (u - 1) / 2 if u.min() > 0 else torch.full_like(u, 0.5)

    values = sampled_divergence([900.0, 40.0], KLToMixture())
    assert values == pytest.approx([np.log(2) - 0.5] * 2)

    class Plain(Divergence):
        """Reverse KL without being known as such."""

        name = "plain"

        def score(self, logratio):
            return logratio

        def log_weight(self, logratio):
            return torch.zeros_like(logratio)

        def f(self, u):
            return torch.xlogy(u, u) - u + 1

    logratios = np.array([-350.0, -2.0, 2.0, 250.0, 5000.0])
    assert sampled_divergence(logratios, Plain()) == pytest.approx(sampled_divergence(logratios))
    far = token_divergences([0.0, 0.0], [0.0, -5000.0], Plain())
    assert far == pytest.approx(token_divergences([0.0, 0.0], [0.0, -5000.0]))


def test_jeffreys_is_infinite_where_it_is():
    """Bernoulli 1/2 against e^-900: (1/2 - e^-900) 900 = 450. Against 0 it is infinite, in both directions."""
    even, far, never = [0.0, 0.0], [0.0, -900.0], [0.0, -np.inf]
    assert token_divergences(even, far, "jeffreys") == pytest.approx(450.0)
    assert token_divergences(far, even, "jeffreys") == pytest.approx(450.0)
    for name, forth, back in (
        ("jeffreys", np.inf, np.inf),
        ("reverse_kl", np.inf, np.log(2)),
        ("forward_kl", np.log(2), np.inf),
        ("neyman", 1.0, np.inf),
        ("js", 0.4315231086776714, 0.4315231086776714),
    ):
        assert token_divergences(even, never, name) == pytest.approx(forth)
        assert token_divergences(never, even, name) == pytest.approx(back)


def test_sequence_kl_of_what_the_reference_cannot_say():
    for estimator in ("k1", "k2", "k3"):
        found = sequence_kl([[-1.0, -1.0], [-1.0, -1.0]], [[-1.0, -np.inf], [-1.0, -1.0]], np.ones((2, 2)), estimator)
        assert found.tolist() == [np.inf, 0.0]


def test_best_of_n():
    """n = 4: log 4 - 3/4 = 0.636 nats and a win rate of 0.8; against 100 000 draws of uniform rewards."""
    assert best_of_n(1) == (0.0, 0.5)
    kl, rate = best_of_n(4)
    assert (kl, rate) == pytest.approx((np.log(4) - 0.75, 0.8))
    rewards = np.random.default_rng(0).random((100_000, 5))
    assert (rewards[:, :4].max(1) > rewards[:, 4]).mean() == pytest.approx(rate, abs=0.005)
    # The best of n has the density n F^{n-1}: its KL by quadrature over the quantiles F.
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    density = 4 * quantiles**3
    assert (density * np.log(density)).mean() == pytest.approx(kl, abs=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kl_estimates([0.0], "k4"), "`estimator`"),
        (lambda: sequence_kl(np.zeros((2, 3)), np.zeros((2, 2)), np.ones((2, 3))), "same shape"),
        (lambda: token_divergences(np.zeros(3), np.zeros(4)), "same shape"),
        (lambda: token_divergences(np.zeros(3), np.zeros(3), "total_variation"), "total_variation"),
        (lambda: token_divergences([np.nan, 0.0], [0.0, 0.0]), "`logits` has NaN"),
        (lambda: token_divergences([0.0, 0.0], [np.inf, 0.0]), "`ref_logits` has NaN, .inf"),
        (lambda: token_divergences([-np.inf, -np.inf], [0.0, 0.0]), "`logits` has .* nothing but -inf"),
        (lambda: token_divergences([], []), "`logits` has the shape"),
        (lambda: token_divergences(np.zeros((0, 3)), np.zeros((0, 3))), "`logits` has the shape"),
        (lambda: token_divergences(0.0, 0.0), "`logits` has the shape"),
        (lambda: sampled_divergence([0.0, -np.inf]), "`logratios` has 1 values of -inf"),
        (lambda: sampled_divergence([np.nan]), "`logratios` has 1 NaN"),
        (lambda: kl_estimates([-np.inf], "k3"), "`logratios`"),
        (lambda: sequence_kl([[-np.inf]], [[0.0]], [[1]]), "`token_logps` has 1 infinite"),
        (lambda: sequence_kl([[0.0]], [[np.inf]], [[1]]), "`ref_token_logps` has 1 infinite"),
        (lambda: best_of_n(0), "`n`"),
        (lambda: best_of_n(2.0), "`n`"),
        (lambda: best_of_n(True), "`n`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
