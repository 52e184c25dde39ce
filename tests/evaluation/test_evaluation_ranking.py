"""Ranking accuracy, its ideal, and difficulty: closed forms, brute force over an enumerable model, and limits."""

import numpy as np
import pytest
import torch
from enumerable import EnumerableModel

from trl_ext.evaluation import (
    alignment_gap,
    flip_loss,
    flipped,
    idealized_ranked_correctly,
    idealized_ranking_accuracy,
    pair_difficulty,
    ranked_correctly,
    ranking_accuracy,
    reward_accuracy,
    unflipped,
)


@pytest.fixture(scope="module")
def logps():
    """Chosen and rejected log-probabilities and lengths of policy and reference for 4000 pairs."""
    generator = np.random.default_rng(0)
    policy, reference = generator.normal(-40, 12, (2, 4000)), generator.normal(-40, 12, (2, 4000))
    return policy, reference, generator.integers(1, 60, (2, 4000))


def test_worked_example():
    """
    Log-probabilities -4, -6, -5 against -5, -5, -5 in 2, 3, 5 and 5, 2, 5 tokens. Raw: right, wrong, tie = right: 2/3.
    Per token: -2 against -1 is wrong, -2 against -2.5 right, a tie right: 2/3 again, but of other pairs.
    """
    chosen, rejected = [-4.0, -6.0, -5.0], [-5.0, -5.0, -5.0]
    assert ranked_correctly(chosen, rejected).tolist() == [True, False, True]
    assert ranked_correctly(chosen, rejected, [2, 3, 5], [5, 2, 5]).tolist() == [False, True, True]
    assert ranking_accuracy(chosen, rejected).value == pytest.approx(2 / 3)
    # Strict, as TRL's: the tie counts as wrong.
    assert reward_accuracy(chosen, rejected).value == pytest.approx(1 / 3)


def test_invariances(logps):
    (chosen, rejected), _, (long, short) = logps
    accuracy = ranking_accuracy(chosen, rejected)
    assert ranking_accuracy(3.7 * chosen, 3.7 * rejected) == accuracy
    assert ranking_accuracy(chosen, rejected, long, long) == accuracy
    assert ranking_accuracy(torch.tensor(chosen), torch.tensor(rejected, requires_grad=True)) == accuracy
    assert ranking_accuracy(rejected, chosen).value == pytest.approx(1 - accuracy.value)  # no ties among these
    assert ranking_accuracy(chosen, rejected, long, short).value != accuracy.value


def test_difficulty_is_exact(logps):
    """
    Theorem 4.1: a pair is ranked correctly exactly where its DPO loss is at most -log sigmoid(beta c). No exception.
    """
    (chosen, rejected), (ref_chosen, ref_rejected), _ = logps
    for beta in (0.01, 0.1, 1.0):
        difficulty = pair_difficulty(ref_chosen, ref_rejected)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        losses = np.logaddexp(0, -margin)
        # Where the losses differ by rounding only, the order is a matter of rounding.
        threshold = flip_loss(difficulty, beta=beta)
        clear = np.abs(losses - threshold) > 1e-9 * threshold
        assert clear.mean() > 0.99
        below = losses <= threshold
        assert (below == ranked_correctly(chosen, rejected))[clear].all()
        assert 0.4 < below.mean() < 0.6


def test_flip_loss_closed_form():
    """log 2 at c = 0; log(1 + e^-10) = 4.54e-5 at beta c = 10; beta |c| where the reference is right by far."""
    values = flip_loss([0.0, 100.0, -5000.0], beta=0.1)
    assert values == pytest.approx([np.log(2), 4.539889921686465e-05, 500.0], rel=1e-12)


def test_proposition_2_6(logps):
    """The reference is right and the loss is at most 0.6: then the policy is right."""
    (chosen, rejected), (ref_chosen, ref_rejected), _ = logps
    losses = np.logaddexp(0, -0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    premise = ranked_correctly(ref_chosen, ref_rejected) & (losses <= 0.6)
    assert premise.sum() > 100
    assert ranked_correctly(chosen, rejected)[premise].all()


def test_ideal_is_the_optimum_of_dpo():
    """
    Against the optimum itself: with Bradley-Terry raters of rewards r, the optimal policy is pi_ref e^{r / beta} / Z
    over the 15 sequences, and the raters agree by alpha = sigmoid(r_w - r_l). Its own ranking accuracy is the
    idealized one.
    """
    reference = EnumerableModel(seed=3)
    sequences = reference.sequences()
    probs = np.array([reference.prob(s) for s in sequences])
    assert probs.sum() == pytest.approx(1.0)
    rewards = np.random.default_rng(1).normal(size=len(sequences))
    chosen, rejected = np.array([(i, j) for i in range(15) for j in range(15) if rewards[i] > rewards[j]]).T
    agreement = 1 / (1 + np.exp(rewards[rejected] - rewards[chosen]))
    seen = []
    for beta in (0.3, 1.0, 3.0):
        optimum = probs * np.exp(rewards / beta)
        optimum /= optimum.sum()
        expected = optimum[chosen] > optimum[rejected]
        found = idealized_ranked_correctly(
            np.log(probs[chosen]), np.log(probs[rejected]), beta=beta, agreement=agreement
        )
        assert (found == expected).all()
        seen.append(found.mean())
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0] - 0.1


def test_limits_of_the_ideal(logps):
    """
    alpha = 1/2, or beta to infinity: the reference's accuracy. beta to 0: the share of pairs with alpha above 1/2.
    Never increasing in beta where alpha is at least 1/2. Ties of the reference count as wrong at alpha = 1/2 (strict).
    """
    _, (chosen, rejected), _ = logps
    agreement = np.random.default_rng(2).uniform(0.2, 1.0, len(chosen))
    reference = ranking_accuracy(chosen, rejected).value

    def ideal(beta, agreement):
        return idealized_ranking_accuracy(chosen, rejected, beta=beta, agreement=agreement).value

    assert ideal(0.1, 0.5) == reference
    assert ideal(1e9, agreement) == reference
    assert ideal(1e-9, agreement) == (agreement > 0.5).mean()
    values = [ideal(beta, np.maximum(agreement, 0.5)) for beta in (0.01, 0.1, 1, 10, 100)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.1
    assert idealized_ranking_accuracy([-1.0], [-1.0], beta=1.0, agreement=0.5).value == 0.0


def test_epsilon_decides_single_ratings():
    """
    One rating, alpha = 1: log(0.999 / 0.001) / 0.1 = 69.07 nats are added, so a reference wrong by 69.0 is forgiven.
    """
    options = dict(beta=0.1)
    assert idealized_ranked_correctly([-69.0, -69.1], [0.0, 0.0], **options).tolist() == [True, False]
    assert idealized_ranked_correctly([-69.0], [0.0], epsilon=1e-2, **options).tolist() == [False]
    # And unanimity against the chosen one takes as much from a reference that prefers it.
    assert idealized_ranked_correctly([69.0, 69.1], [0.0, 0.0], agreement=0.0, **options).tolist() == [False, True]


def test_alignment_gap(logps):
    (chosen, rejected), (ref_chosen, ref_rejected), _ = logps
    gap = alignment_gap(chosen, rejected, ref_chosen, ref_rejected)
    by_hand = [(ref_chosen - ref_rejected + np.log(999) / beta > 0).mean() for beta in (0.01, 0.1, 1, 5, 10)]
    assert list(gap.idealized.values()) == pytest.approx(by_hand)
    assert gap.gap == pytest.approx(np.median(by_hand) - (chosen >= rejected).mean())


def test_flipped():
    """
    Reference wrong on pairs 0, 1, 2 and right on 3, 4; the policy is right on 1, 3: one of three flipped, one of two
    lost.
    """
    reference = ([0.0, 0, 0, 1, 1], [1.0, 1, 1, 0, 0])
    policy = ([0.0, 2, 0, 2, 0], [1.0, 0, 5, 0, 1])
    assert flipped(*policy, *reference).value == pytest.approx(1 / 3)
    assert unflipped(*policy, *reference).value == pytest.approx(1 / 2)
    assert flipped([1.0], [0.0], [1.0], [0.0]) is None
    assert unflipped([1.0], [0.0], [0.0], [1.0]) is None


def test_flipped_of_ties_and_groups():
    """
    A tie of the reference counts as correct: nothing to flip, and lost where the policy has it wrong. Labels go with
    the pairs that are left: of prompts a, a, b, c the reference is wrong on the last two, which are two prompts.
    """
    assert flipped([1.0], [0.0], [2.0], [2.0]) is None
    assert unflipped([0.0], [1.0], [2.0], [2.0]).value == 1.0
    policy, reference = ([1.0, 1, 1, 0], [0.0, 0, 0, 1]), ([1.0, 1, 0, 0], [0.0, 0, 1, 1])
    found = flipped(*policy, *reference, groups="aabc")
    assert (found.value, found.n) == (0.5, 2)
    assert unflipped(*policy, *reference, groups="aabc").n == 1


def test_lengths_decide_the_ideal_too():
    """
    Three pairs: -6 in 6 tokens against -4 in 2 is -2 in sum and +1 per token; -4 in 4 against -4 in 2 is 0 and +1; -6
    in 2 against -5 in 5 is -1 and -2. At agreement 1/2 these alone decide, strictly. Agreement e / (1 + e), of logit
    1, adds 1/2 at beta 2, which turns the tie, and 5/2 at beta 0.4, which turns the last one even per token.
    """
    chosen, rejected, lengths = [-6.0, -4.0, -6.0], [-4.0, -4.0, -5.0], ([6, 4, 2], [2, 2, 5])
    even = dict(beta=2.0, agreement=0.5)
    assert idealized_ranked_correctly(chosen, rejected, **even).tolist() == [False, False, False]
    assert idealized_ranked_correctly(chosen, rejected, *lengths, **even).tolist() == [True, True, False]
    tilted = dict(beta=2.0, agreement=np.e / (1 + np.e))
    assert idealized_ranked_correctly(chosen, rejected, **tilted).tolist() == [False, True, False]
    assert idealized_ranked_correctly(chosen, rejected, *lengths, **tilted).tolist() == [True, True, False]
    assert idealized_ranking_accuracy(chosen, rejected, *lengths, beta=0.4, agreement=tilted["agreement"]).value == 1.0
    assert idealized_ranking_accuracy(chosen, rejected, *lengths, **even).value == pytest.approx(2 / 3)


def test_alignment_gap_normalizes_both(logps):
    """
    By hand with lengths: the policy's accuracy per token, and the ideal's, at epsilon 0.01 and an agreement a pair.
    """
    (chosen, rejected), (ref_chosen, ref_rejected), (first, second) = logps
    agreement = np.random.default_rng(9).uniform(0, 1, len(chosen))
    clipped = agreement.clip(0.01, 0.99)
    logit = np.log(clipped / (1 - clipped))
    betas = (0.5, 1.0, 30.0, 60.0)
    by_hand = [(ref_chosen / first - ref_rejected / second + logit / beta > 0).mean() for beta in betas]
    options = dict(betas=betas, agreement=agreement, epsilon=0.01)
    gap = alignment_gap(chosen, rejected, ref_chosen, ref_rejected, first, second, **options)
    assert list(gap.idealized) == list(betas) and list(gap.idealized.values()) == pytest.approx(by_hand)
    accuracy = (chosen / first >= rejected / second).mean()
    assert (gap.accuracy.value, gap.epsilon) == (accuracy, 0.01)
    assert gap.gap == pytest.approx((sorted(by_hand)[1] + sorted(by_hand)[2]) / 2 - accuracy)
    assert len(set(by_hand)) == 4


def test_impossible_responses():
    """A response that a model cannot say loses to any other, and makes the pair infinitely hard, or easy."""
    assert ranked_correctly([-np.inf, -5.0], [-5.0, -np.inf]).tolist() == [False, True]
    assert pair_difficulty([-np.inf, -5.0], [-5.0, -np.inf]).tolist() == [np.inf, -np.inf]
    assert flip_loss([np.inf, -np.inf], beta=0.1).tolist() == [0.0, np.inf]
    assert reward_accuracy([np.inf, 0.0], [0.0, np.inf]).value == 0.5
    assert idealized_ranked_correctly([-np.inf], [-5.0], beta=0.1).tolist() == [False]


def test_difficulty_has_a_sign():
    assert pair_difficulty([-7.0, -2.0], [-4.0, -2.5]).tolist() == [3.0, -0.5]


def test_confidence_reaches_the_interval(logps):
    (chosen, rejected), reference, _ = logps
    chosen, rejected, reference = chosen[:50], rejected[:50], reference[:, :50]
    for call in (
        lambda **options: ranking_accuracy(chosen, rejected, **options),
        lambda **options: reward_accuracy(chosen, rejected, **options),
        lambda **options: idealized_ranking_accuracy(*reference, beta=1.0, agreement=0.5, **options),
        lambda **options: flipped(chosen, rejected, *reference, **options),
        lambda **options: unflipped(chosen, rejected, *reference, **options),
    ):
        wide, narrow = call(confidence=0.99), call(confidence=0.5)
        assert wide.low < narrow.low < narrow.high < wide.high


def test_pairs_of_a_prompt_are_not_independent(logps):
    """Four copies of each pair are no more evidence than one: the share stays, the interval is that of the prompts."""
    (chosen, rejected), reference, _ = (part[..., :80] for part in logps)
    repeated = [np.repeat(values, 4) for values in (chosen, rejected, *reference)]
    prompts = [("prompt", i) for i in range(80) for _ in range(4)]
    calls = (
        lambda arrays, **options: ranking_accuracy(arrays[0], arrays[1], **options),
        lambda arrays, **options: reward_accuracy(arrays[0], arrays[1], **options),
        lambda arrays, **options: idealized_ranking_accuracy(arrays[2], arrays[3], beta=1.0, agreement=0.5, **options),
        lambda arrays, **options: alignment_gap(*arrays, betas=[1.0], **options).accuracy,
        lambda arrays, **options: flipped(*arrays, **options),
        lambda arrays, **options: unflipped(*arrays, **options),
    )
    for call in calls:
        once, grouped = call([chosen, rejected, *reference]), call(repeated, groups=prompts)
        assert (grouped.value, grouped.n) == (pytest.approx(once.value), once.n)
        # Student's t for few groups makes it a little wider, by a few hundredths of its width.
        assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=0.01)
        assert call(repeated).high - call(repeated).low < 0.6 * (once.high - once.low)
        assert call([chosen, rejected, *reference], groups=list(range(80))) == once


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ranking_accuracy([1.0, 2.0], [1.0]), "same length"),
        (lambda: ranking_accuracy([], []), "empty"),
        (lambda: ranking_accuracy([np.nan], [1.0]), "NaN"),
        (lambda: ranking_accuracy([1.0], [1.0], [3]), "neither"),
        (lambda: ranking_accuracy([1.0], [1.0], None, [3]), "`chosen_lengths` is missing"),
        (lambda: ranking_accuracy([1.0], [1.0], [3], [0]), "`rejected_lengths` must be 1 or more"),
        (lambda: ranking_accuracy([1.0], [1.0], [0.5], [1]), "`chosen_lengths` must be 1 or more"),
        (lambda: ranking_accuracy([np.inf], [1.0]), "`chosen_logps` has 1 infinite"),
        (lambda: ranking_accuracy([-np.inf], [-np.inf]), "`chosen_logps` and `rejected_logps` are both -inf"),
        (lambda: ranking_accuracy([[1.0]], [[1.0]]), "`chosen_logps` must have 1 dimension"),
        (lambda: ranking_accuracy(["a"], [1.0]), "`chosen_logps` must be numbers"),
        (lambda: ranking_accuracy([1.0], [1.0], groups=["a", "b"]), "`groups` has 2 labels for 1 rows"),
        (lambda: ranking_accuracy([1.0], [1.0], groups=[["a"]]), "`groups` must be hashable"),
        (lambda: reward_accuracy([np.inf], [np.inf]), "`chosen_logratios` and `rejected_logratios` are both inf"),
        (lambda: pair_difficulty([-np.inf], [-np.inf]), "`ref_chosen_logps` and `ref_rejected_logps` are both -inf"),
        (lambda: pair_difficulty([0.0], [np.inf]), "`ref_rejected_logps` has 1 infinite"),
        (lambda: flip_loss([0.0], beta=-1), "`beta`"),
        (lambda: flip_loss([0.0], beta=np.inf), "`beta`"),
        (lambda: flip_loss([0.0], beta="0.1"), "`beta`"),
        (lambda: flipped([1.0], [0.0], [1.0, 2.0], [0.0, 0.0]), "policy has 1 pairs and the reference"),
        (lambda: unflipped([1.0], [0.0], [1.0, 2.0], [0.0, 0.0]), "policy has 1 pairs and the reference"),
        (lambda: alignment_gap([1.0], [0.0], [1.0, 2.0], [0.0, 0.0]), "policy has 1 pairs and the reference"),
        (lambda: alignment_gap([1.0], [0.0], [1.0], [0.0], betas=[]), "`betas` is empty"),
        (lambda: idealized_ranking_accuracy([1.0], [1.0], beta=1.0, epsilon=0.5), "`epsilon`"),
        (lambda: idealized_ranking_accuracy([1.0], [1.0], beta=1.0, agreement=[0.5, 0.5]), "`agreement` has 2 values"),
        (lambda: idealized_ranking_accuracy([np.nan], [1.0], beta=1.0), "`ref_chosen_logps` has 1 NaN"),
        (lambda: idealized_ranking_accuracy([1.0], [1.0], beta=0.0), "`beta`"),
        (lambda: idealized_ranking_accuracy([1.0], [1.0], beta=1.0, epsilon=0.0), "`epsilon`"),
        (lambda: idealized_ranking_accuracy([1.0], [1.0], beta=1.0, agreement=1.5), "`agreement`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_of_0_1_0():
    """The old name of the scores still works, and says what to use."""
    import trl_ext.evaluation

    with pytest.warns(FutureWarning, match="ResponseScores.*ScoredResponses"):
        assert trl_ext.evaluation.ResponseScores is trl_ext.evaluation.ScoredResponses
