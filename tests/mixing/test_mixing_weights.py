"""
Maximin weights on enumerable outcomes: the expectations over the reference are exact sums, given as outcomes of equal
probability.
"""

import doctest
import json
import math

import pytest
import torch

from trl_ext.mixing import MixtureWeights, log_partition, match_betas, maximin_weights, weights


def policies(rewards, beta=0.5):
    """Log-ratios of the KL-regularized optima of `rewards` (N, m, K) under a reference of equal probabilities."""
    scores = rewards / beta
    return scores - (scores.logsumexp(1, keepdim=True) - math.log(scores.shape[1]))


def conflict(seed=0, prompts=40, outcomes=12):
    """Two rewards in conflict and one that both like a little: K = 3."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(prompts, outcomes, 3, generator=generator, dtype=torch.float64)
    first = noise[..., 0]
    second = -0.8 * first + 0.5 * noise[..., 1]
    third = 0.3 * (first + second) + 0.2 * noise[..., 2]
    return policies(torch.stack([first, second, third], -1))


def exact(logratios, **options):
    """The solution where the outcomes are all there are: no bias to remove."""
    return maximin_weights(logratios, jackknife=False, num_resamples=20, **options)


def mean_partition(logratios, lam):
    return log_partition(logratios, torch.as_tensor(lam, dtype=torch.float64)).mean().item()


def test_two_opposite_preferences_by_hand():
    """
    Two outcomes of probability 1/2, policies (p, 1-p) and (1-p, p): by symmetry weights of 1/2, at which the mixture
    is the uniform reference, F = log(2 sqrt(p (1-p))), and each objective is beta F.
    """
    p = 0.9
    logratios = torch.tensor([[[2 * p, 2 * (1 - p)], [2 * (1 - p), 2 * p]]], dtype=torch.float64).log().repeat(3, 1, 1)
    found = exact(logratios, beta=0.5)
    assert found.weights == pytest.approx([0.5, 0.5], abs=1e-6)
    value = 0.5 * math.log(2 * math.sqrt(p * (1 - p)))
    assert found.value == pytest.approx(value) and found.objectives == pytest.approx([value, value])
    assert found.effective_size == pytest.approx(2) and (found.num_prompts, found.num_responses) == (3, 2)


def test_corners_and_identical_policies():
    """F is 0 at every corner, and everywhere for identical policies; convex in between."""
    logratios = conflict()
    for corner in torch.eye(3, dtype=torch.float64):
        assert mean_partition(logratios, corner) == pytest.approx(0, abs=1e-12)
    same = logratios[..., :1].expand(-1, -1, 3)
    assert mean_partition(same, [0.2, 0.5, 0.3]) == pytest.approx(0, abs=1e-12)
    assert exact(same).value == pytest.approx(0, abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        a, b = torch.rand(2, 3, generator=generator, dtype=torch.float64)
        a, b = a / a.sum(), b / b.sum()
        middle = mean_partition(logratios, (a + b) / 2)
        assert middle <= (mean_partition(logratios, a) + mean_partition(logratios, b)) / 2 + 1e-12


def test_gradient_is_the_mean_log_ratio_of_the_mixture():
    logratios = conflict()
    lam = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_partition(logratios, lam).mean(), lam)
    mixture = (logratios @ lam).softmax(1)
    torch.testing.assert_close(gradient, (mixture.unsqueeze(-1) * logratios).sum(1).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_optimality(seed):
    """Equal objectives where the weight is positive, larger ones where it is 0; no other weights do better."""
    logratios = conflict(seed)
    found = exact(logratios, beta=0.5)
    lam = torch.tensor(found.weights, dtype=torch.float64)
    assert lam.sum().item() == pytest.approx(1) and found.gap < 1e-6
    assert found.value == pytest.approx(0.5 * mean_partition(logratios, lam))
    # The objectives, from the mixture itself: beta (E[L_k] - KL(mixture || reference)).
    log_mixture = (logratios @ lam).log_softmax(1)
    mixture = log_mixture.exp()
    divergence = (mixture * (log_mixture + math.log(12))).sum(1).mean()
    expected = 0.5 * ((mixture.unsqueeze(-1) * logratios).sum(1).mean(0) - divergence)
    assert found.objectives == pytest.approx(expected.tolist(), abs=1e-9)
    for weight, objective in zip(found.weights, found.objectives, strict=True):
        if weight > 0:
            assert objective == pytest.approx(found.value, abs=1e-6)
        else:
            assert objective >= found.value
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        other = -torch.rand(3, generator=generator, dtype=torch.float64).log()
        assert mean_partition(logratios, other / other.sum()) >= found.value / 0.5 - 1e-9


def test_a_policy_that_loses_to_nobody_gets_no_weight():
    """
    A third policy between two in conflict is the better compromise on its own reward, and its weight is exactly 0.
    """
    first = torch.tensor([2.0, -2.0, 0.3, -0.3], dtype=torch.float64)
    rewards = torch.stack([first, -first, torch.tensor([0.1, 0.1, -0.1, -0.1], dtype=torch.float64)], -1)
    found = exact(policies(rewards.expand(5, -1, -1)))
    assert found.weights == pytest.approx([0.5, 0.5, 0.0], abs=1e-6) and found.weights[2] == 0
    assert found.objectives[2] > found.value + 0.1


def test_two_policies_are_mixed_strictly():
    """K = 2: strictly inside unless the policies coincide, however unequal they are."""
    generator = torch.Generator().manual_seed(0)
    for strength in (0.01, 1.0, 3.0):
        rewards = torch.randn(10, 32, 2, generator=generator, dtype=torch.float64)
        rewards[..., 1] *= strength
        found = exact(policies(rewards))
        assert 0.01 < found.weights[0] < 0.99


def test_a_constant_of_one_prompt_is_normalized_away():
    """Rewards are defined up to a constant per prompt, which the policies do not know."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(10, 8, 3, generator=generator, dtype=torch.float64)
    shifted = rewards + torch.randn(10, 1, 3, generator=generator, dtype=torch.float64)
    assert exact(policies(rewards)).weights == pytest.approx(exact(policies(shifted)).weights, abs=1e-6)


def sampled(logratios, count, seed):
    """`count` draws of each prompt's outcomes, of equal probability."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(logratios.shape[1], (len(logratios), count), generator=generator)
    return logratios.gather(1, drawn.unsqueeze(-1).expand(-1, -1, logratios.shape[2]))


def test_jackknife_removes_the_bias():
    """
    The mean of the estimate over many samples of m responses misses F by c / m; twice as many, half as much. With the
    jackknife the rest is of order 1/m^2.
    """
    logratios = conflict(prompts=1)
    lam = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    truth = log_partition(logratios, lam).item()
    bias = {}
    for m in (8, 16):
        draws = sampled(logratios.expand(40_000, -1, -1), m, seed=m)
        for jackknife in (False, True):
            bias[m, jackknife] = log_partition(draws, lam, jackknife=jackknife).mean().item() - truth
    assert bias[8, False] / bias[16, False] == pytest.approx(2, abs=0.4)
    assert abs(bias[8, True]) < 0.25 * abs(bias[8, False]) and abs(bias[16, True]) < 0.25 * abs(bias[16, False])


def test_weights_from_few_samples():
    """8 responses to each of 40 prompts: the jackknife is nearer to the exact optimum than the plain estimate."""
    logratios = conflict()
    best = exact(logratios)
    gaps = {True: [], False: []}
    for seed in range(4):
        draws = sampled(logratios, 8, seed)
        for jackknife in gaps:
            found = maximin_weights(draws, jackknife=jackknife, num_resamples=20)
            gaps[jackknife].append(mean_partition(logratios, found.weights) - best.value)
    assert sum(gaps[True]) < sum(gaps[False])
    assert sum(gaps[True]) / 4 < 0.1


def test_mirror_descent_with_one_sample_ends_in_a_corner():
    """
    Negative control, the paper's procedure: steps of mirror descent on samples of the reference, weighted to the
    mixture within the samples of a step. With one sample a step nothing is weighted, and it goes to the policy that the
    reference's own samples like best, whatever the objectives are. The solution from as many samples is inside.
    """
    logratios = conflict()[..., :2]
    best = exact(logratios)
    assert all(0.2 < weight < 0.8 for weight in best.weights)
    generator = torch.Generator().manual_seed(0)

    def descend(responses, steps):
        lam = torch.full((2,), 0.5, dtype=torch.float64)
        for _ in range(steps):
            rows = torch.randint(len(logratios), (1,), generator=generator)
            columns = torch.randint(logratios.shape[1], (responses,), generator=generator)
            drawn = logratios[rows, columns]
            lam = (lam.log() - 0.1 * ((drawn @ lam).softmax(0) @ drawn)).softmax(0)
        return lam

    assert descend(responses=1, steps=1000).max() > 0.99
    found = maximin_weights(sampled(logratios, 25, seed=0), num_resamples=20)  # 40 prompts: 1000 samples
    assert found.weights == pytest.approx(best.weights, abs=0.1)


def test_lengths_do_not_divide():
    """
    Trap: log-ratios are of whole responses. Divided by their lengths, as where likelihoods are compared per token, those
    of a policy that judges long responses count for less, and the weights are no longer the best.
    """
    lengths = torch.tensor([1.0, 1.0, 12.0, 12.0], dtype=torch.float64)
    first = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)  # tells short responses apart
    second = torch.tensor([-0.5, 0.5, 2.0, -2.0], dtype=torch.float64)  # and long ones
    logratios = policies(torch.stack([first, second], -1).expand(3, -1, -1))
    divided = exact(logratios / lengths[:, None]).weights
    assert mean_partition(logratios, divided) > exact(logratios).value + 0.02


def test_intervals():
    """Over prompts: they hold the estimate, are reproducible, and shrink as prompts are added."""
    few, many = (maximin_weights(conflict(prompts=n), jackknife=False, num_resamples=40) for n in (10, 160))
    for found in (few, many):
        for weight, (low, high) in zip(found.weights, found.intervals, strict=True):
            assert 0 <= low <= weight + 1e-9 and weight - 1e-9 <= high <= 1
    width = [found.intervals[0][1] - found.intervals[0][0] for found in (few, many)]
    assert width[1] < 0.6 * width[0] and not many.undetermined
    state = torch.get_rng_state()
    again = maximin_weights(conflict(prompts=10), jackknife=False, num_resamples=40)
    assert again == few and torch.equal(state, torch.get_rng_state())


def test_undetermined():
    found = MixtureWeights([0.5, 0.5], 0.0, [0.0, 0.0], [[0.02, 0.98], [0.02, 0.98]], 8.0, 4, 8, 0.0)
    assert found.undetermined


def test_long_responses_are_refused():
    """Independent log-ratios of 10 nats, as of 100 tokens: one response has all the weight."""
    generator = torch.Generator().manual_seed(0)
    logratios = 10 * torch.randn(20, 8, 2, generator=generator, dtype=torch.float64)
    with pytest.raises(ValueError, match="effective sample size of 1.* of 8"):
        maximin_weights(logratios)


def test_match_betas():
    """The optimum of a reward at one beta, from the optimum at another."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 10, 2, generator=generator, dtype=torch.float64)
    mixed = torch.stack([policies(rewards, 0.5)[..., 0], policies(rewards, 0.2)[..., 1]], -1)
    torch.testing.assert_close(match_betas(mixed, [0.5, 0.2], 0.5), policies(rewards, 0.5), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="one number per policy, 2, got 1"):
        match_betas(mixed, [0.5], 0.5)
    with pytest.raises(ValueError, match=r"betas\[1\].*0"):
        match_betas(mixed, [0.5, 0.0], 0.5)


def test_save_and_load(tmp_path):
    found = exact(conflict(prompts=5))
    found.save(tmp_path / "weights.json")
    assert MixtureWeights.load(tmp_path / "weights.json") == found
    (tmp_path / "other.json").write_text(json.dumps({"weights": [1.0]}))
    with pytest.raises(ValueError, match="other.json.*not a file of mixture weights"):
        MixtureWeights.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("logratios", "options", "message"),
    [
        (torch.zeros(4, 8), {}, r"shape \(prompts, responses, policies\), got .*\(4, 8\)"),
        (torch.zeros(4, 8, 2, dtype=torch.long), {}, "floating-point"),
        (torch.zeros(4, 1, 2), {}, "2 responses and 2 policies, got 4, 1 and 2"),
        (torch.zeros(4, 8, 1), {}, "2 responses and 2 policies, got 4, 8 and 1"),
        (torch.full((4, 8, 2), -math.inf), {}, "logratios has 64 values that are not finite"),
        (torch.zeros(4, 8, 2), dict(beta=0.0), "beta.*0.0"),
        (torch.zeros(4, 8, 2), dict(num_resamples=5), "num_resamples.*5"),
    ],
)
def test_bad_input(logratios, options, message):
    with pytest.raises(ValueError, match=message):
        maximin_weights(logratios, **options)


def test_example_in_the_documentation():
    text = maximin_weights.__doc__.replace("```python", "").replace("```", "")
    names = vars(weights) | {"torch": torch}
    example = doctest.DocTestParser().get_doctest(text, dict(names), "maximin_weights", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
