"""Calibration error, its floor, and diversity: closed forms and brute force."""

import itertools
import shutil
import sys

import numpy as np
import pytest
import torch

from trl_ext.evaluation import (
    ScoredResponses,
    distinct_n,
    embed_texts,
    embedding_diversity,
    expected_calibration_error,
    mean,
    predictive_entropy,
    preference_confidence,
    self_bleu,
)


def test_constant_confidence():
    """0.75 said, right half of the time: |0.5 - 0.75| = 0.25, in one bin."""
    result = expected_calibration_error(np.full(1000, 0.75), np.arange(1000) % 2)
    assert result.ece == pytest.approx(0.25)
    (full,) = (b for b in result.bins if b.count)
    assert (full.confidence, full.accuracy.value, full.count) == (0.75, 0.5, 1000)
    assert result.p_value < 0.001 and result.floor < 0.02


def test_certainty_is_in_the_last_bin():
    """p = 1 belongs to the tenth bin: nothing is dropped, and being wrong with certainty is an error of 1."""
    result = expected_calibration_error([1.0, 1.0], [0.0, 0.0])
    assert result.ece == 1.0
    assert [b.count for b in result.bins] == [0] * 9 + [2]
    assert sum(b.count for b in expected_calibration_error(np.linspace(0, 1, 57), np.ones(57)).bins) == 57


def test_perfect_calibration_tends_to_zero_and_floor_says_how_fast():
    """
    Uniform confidences that are exactly right: ECE 0.002 at N = 200 000, about 0.058 at N = 300, as the floor says.
    """
    generator = np.random.default_rng(0)
    confidence = generator.random(200_000)
    large = expected_calibration_error(confidence, generator.random(200_000) < confidence, num_simulations=20)
    assert large.ece < 0.004
    small = []
    for _ in range(100):
        confidence = generator.random(300)
        small.append(expected_calibration_error(confidence, generator.random(300) < confidence, num_simulations=1).ece)
    assert np.mean(small) == pytest.approx(0.058, abs=0.004)
    result = expected_calibration_error(confidence, generator.random(300) < confidence)
    assert result.floor == pytest.approx(np.mean(small), abs=0.004)
    assert result.floor < result.floor_95


def test_floor_is_the_expectation():
    """Against all 2^10 outcomes of ten confidences, each weighted by its probability."""
    confidence = np.array([0.05, 0.12, 0.18, 0.44, 0.47, 0.5, 0.71, 0.88, 0.93, 1.0])
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=10):
        outcome = np.array(outcome)
        probability = np.where(outcome == 1, confidence, 1 - confidence).prod()
        expected += probability * expected_calibration_error(confidence, outcome, num_simulations=1).ece
    found = expected_calibration_error(confidence, np.ones(10), num_simulations=20_000)
    assert found.floor == pytest.approx(expected, abs=0.003)


def test_p_value_is_uniform_where_calibrated():
    """Of 200 calibrated data sets about one in ten has a p-value below 0.1, and not many more."""
    generator = np.random.default_rng(1)
    p_values = []
    for _ in range(200):
        confidence = generator.random(150)
        p_values.append(
            expected_calibration_error(confidence, generator.random(150) < confidence, num_simulations=200).p_value
        )
    assert 0.04 < np.mean(np.array(p_values) < 0.1) < 0.17


def test_adaptive_bins():
    """Skewed confidences: uniform bins leave some almost empty, adaptive ones hold the same number each."""
    generator = np.random.default_rng(2)
    confidence = 0.5 + 0.5 * generator.random(1000) ** 6
    correct = generator.random(1000) < confidence
    options = dict(limits=(0.5, 1.0), num_simulations=10)
    uniform = [b.count for b in expected_calibration_error(confidence, correct, **options).bins]
    adaptive = [b.count for b in expected_calibration_error(confidence, correct, binning="adaptive", **options).bins]
    assert min(uniform) < 50 and max(uniform) > 600
    assert adaptive == [100] * 10
    # Equal confidences cannot be told apart: one bin, and every sample in it.
    same = expected_calibration_error(np.full(50, 0.7), np.ones(50), binning="adaptive", num_simulations=10)
    assert max(b.count for b in same.bins) == 50


def test_preference_confidence():
    """beta 0.5, margins 2, -2, 0: sigmoid(1) twice, once right and once wrong, and 1/2, half right."""
    confidence, correct = preference_confidence([3.0, -1.0, 4.0], [1.0, 1.0, 4.0], beta=0.5)
    assert confidence == pytest.approx([1 / (1 + np.exp(-1))] * 2 + [0.5])
    assert correct.tolist() == [1.0, 0.0, 0.5]
    confidence, correct = preference_confidence([np.inf, 0.0, 5000.0], [0.0, np.inf, -5000.0], beta=0.5)
    assert (confidence == 1).all() and correct.tolist() == [1.0, 0.0, 1.0]


def test_a_bradley_terry_model_is_calibrated():
    """
    Raters who follow Bradley-Terry with the model's own rewards: the ECE is at its floor; at five times beta it is
    not.
    """
    generator = np.random.default_rng(3)
    first, second = generator.normal(0, 3, (2, 4000))
    prefer_first = generator.random(4000) < 1 / (1 + np.exp(-(first - second) * 0.3))
    chosen, rejected = np.where(prefer_first, [first, second], [second, first])
    results = [
        expected_calibration_error(
            *preference_confidence(chosen, rejected, beta=beta), limits=(0.5, 1.0), num_simulations=500
        )
        for beta in (0.3, 1.5)
    ]
    assert results[0].ece < results[0].floor_95 and results[0].p_value > 0.05
    assert results[1].ece > 3 * results[1].floor_95 and results[1].p_value < 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(confidence=[1.2], correct=[1]), "limits"),
        (dict(confidence=[0.2], correct=[2]), "`correct`"),
        (dict(confidence=[0.2], correct=[1], binning="quantile"), "`binning`"),
        (dict(confidence=[0.2], correct=[1], num_bins=0), "`num_bins`"),
        (dict(confidence=[0.2], correct=[1], num_bins=2.0), "`num_bins`"),
        (dict(confidence=[0.2], correct=[1], num_simulations=0), "`num_simulations` must be .* at least 1, got 0"),
        (dict(confidence=[0.2], correct=[1], seed=-1), "`seed`"),
        (dict(confidence=[0.2], correct=[1], limits=(1.0, 0.5)), "`limits` must be two numbers"),
        (dict(confidence=[0.5], correct=[1], limits=(0.5, 0.5)), "`limits` must be two numbers"),
        (dict(confidence=[0.2], correct=[1], limits=0.5), "`limits` must be two numbers"),
        (dict(confidence=[0.2], correct=[1], limits=(0.5, 1.0)), r"`limits=\(0.5, 1.0\)`"),
        (dict(confidence=[0.2], correct=[1], groups=[1, 2]), "`groups` has 2 labels"),
        (dict(confidence=[np.nan], correct=[1]), "`confidence` has 1 NaN"),
        (dict(confidence=[], correct=[]), "`confidence` is empty"),
    ],
)
def test_bad_calibration_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(**arguments)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([np.inf], [np.inf]), dict(beta=1.0), "`chosen_logratios` and `rejected_logratios` are both inf"),
        (([1.0], [0.0]), dict(beta=0.0), "`beta`"),
        (([1.0], [0.0, 1.0]), dict(beta=1.0), "same length"),
    ],
)
def test_bad_preference_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        preference_confidence(*arguments, **options)


def test_bins_by_hand():
    """
    Edges 0, 1/4, 1/2, 3/4, 1. Confidences 0.1, 0.25 and 0.4, 0.5, 0.9, 1 with outcomes 0, 1, 1/2, 0, 1, 0: an edge
    belongs to the bin above it, so the bins hold 1, 2, 1, 2 and the ECE is (0.1 + |1.5 - 0.65| + 0.5 + |1 - 1.9|) / 6.
    """
    confidence, correct = [0.1, 0.25, 0.4, 0.5, 0.9, 1.0], [0, 1, 0.5, 0, 1, 0]
    result = expected_calibration_error(confidence, correct, num_bins=4, num_simulations=10)
    assert [b.count for b in result.bins] == [1, 2, 1, 2]
    assert [(b.low, b.high) for b in result.bins] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert [b.confidence for b in result.bins] == pytest.approx([0.1, 0.325, 0.5, 0.95])
    assert [b.accuracy.value for b in result.bins] == [0, 0.75, 0, 0.5]
    assert result.ece == pytest.approx((0.1 + 0.85 + 0.5 + 0.9) / 6) and result.n == 6
    # Half as wide over [0.5, 1].
    halved = expected_calibration_error([0.5, 0.6, 0.8], [1, 1, 1], num_bins=2, limits=(0.5, 1.0), num_simulations=10)
    assert [(b.low, b.high, b.count) for b in halved.bins] == [(0.5, 0.75, 2), (0.75, 1.0, 1)]


def test_floor_and_p_value_by_hand():
    """
    One sample of confidence 3/4: the error is 1/4 with probability 3/4, else 3/4. So the floor is 3/8 and its 95th
    percentile 3/4; an error of 1/4 or more is certain, and one of 3/4 happens in a quarter.
    """
    right = expected_calibration_error([0.75], [1], num_simulations=20_000)
    assert (right.ece, right.floor_95, right.p_value) == (0.25, 0.75, 1.0)
    assert right.floor == pytest.approx(0.375, abs=0.01)
    wrong = expected_calibration_error([0.75], [0], num_simulations=20_000)
    assert wrong.p_value == pytest.approx(0.25, abs=0.01)
    assert expected_calibration_error([1.0], [0], num_simulations=99).p_value == 0.01  # never 0
    # An error of 0.92 has a probability of 0.08: beyond the 90th percentile, and the 95th.
    assert expected_calibration_error([0.92], [1], num_simulations=20_000).floor_95 == pytest.approx(0.92)
    again = expected_calibration_error([0.75], [0], num_simulations=20_000, seed=1)
    assert again.floor != wrong.floor == expected_calibration_error([0.75], [0], num_simulations=20_000, seed=0).floor


def test_groups_reach_the_bins():
    """Copies of a pair are no evidence: the bin's interval is that of its prompts, the error is the same."""
    confidence, correct = np.full(20, 0.7), np.arange(20) % 2
    once = expected_calibration_error(confidence, correct, num_simulations=5)
    options = dict(num_simulations=5, groups=np.repeat(np.arange(20), 4))
    copied = expected_calibration_error(np.repeat(confidence, 4), np.repeat(correct, 4), **options)
    (first,), (second,) = ([b for b in result.bins if b.count] for result in (once, copied))
    assert (second.count, second.accuracy.n) == (80, 20) and copied.ece == pytest.approx(once.ece)
    assert second.accuracy.low == pytest.approx(first.accuracy.low, abs=0.02)
    # Labels follow their samples into the bins.
    split = expected_calibration_error([0.1, 0.9, 0.1, 0.9], [0, 1, 0, 1], num_simulations=5, groups="abac")
    assert [b.accuracy.n for b in split.bins if b.count] == [1, 2]


# ---- Diversity ------------------------------------------------------------------------------------------------------


def test_distinct():
    """Five times "aaaa": 1 distinct of 20 pooled, 1 of 4 within each. All different: 1. "abab": 2 of 3 bigrams."""
    copies = ["aaaa"] * 5
    assert distinct_n(copies, 1, pooled=True) == pytest.approx(1 / 20)
    assert distinct_n(copies, 1) == pytest.approx(1 / 4)
    assert distinct_n([[1, 2, 3], [4, 5, 6]], 2, pooled=True) == 1.0
    assert distinct_n(["abab"], 2) == pytest.approx(2 / 3)
    # Each response counts the same, and of each the first tokens.
    assert distinct_n(["ab", "aaaa"], 1) == pytest.approx((1 + 1 / 4) / 2)
    assert distinct_n(["aab"], 1, length=2) == 0.5


def test_distinct_needs_one_length():
    """The same source, uniform over 20 words: longer texts look less diverse, cut to one length they do not."""
    generator = np.random.default_rng(0)
    short, long = ([generator.integers(0, 20, length).tolist() for _ in range(200)] for length in (15, 60))
    assert distinct_n(short, 1) > distinct_n(long, 1) + 0.3
    assert distinct_n(short, 1, length=15) == pytest.approx(distinct_n(long, 1, length=15), abs=0.02)
    # Expected: 20 (1 - 0.95^15) / 15.
    assert distinct_n(long, 1, length=15) == pytest.approx(20 * (1 - 0.95**15) / 15, abs=0.02)
    assert distinct_n(short, 1, length=16) is None
    assert distinct_n([*short, *long], 1, length=60) == distinct_n(long, 1, length=60)


def test_pools_of_two_by_hand():
    """
    "ab", "bc", "de", "dd", "x" at length 2, two in a pool: 3 of 4 and 2 of 4 different letters; "x" is too short. "xy"
    makes a fifth, which is left over. All in one pool: 5 of 8.
    """
    responses = ["ab", "x", "bc", "de", "dd"]
    options = dict(length=2, pooled=True)
    assert distinct_n(responses, 1, num_samples=2, **options) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert distinct_n([*responses, "xy"], 1, num_samples=2, **options) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert distinct_n(responses, 1, **options) == pytest.approx(5 / 8)
    assert distinct_n(responses, 1, num_samples=4, **options) == pytest.approx(5 / 8)
    assert distinct_n(responses, 1, num_samples=5, **options) is None
    assert distinct_n(responses, 1, num_samples=1, **options) == distinct_n(responses, 1, length=2)
    # N-grams do not reach over from one response to the next, and only the first tokens count.
    assert distinct_n(["abz", "baz"], 2, num_samples=2, **options) == 1.0
    assert distinct_n(["aa", "aa", "bb"], 2, pooled=True) == pytest.approx(2 / 3)
    assert distinct_n([], 1, pooled=True) is None and distinct_n([], 1) is None


@pytest.mark.parametrize("n", [1, 2])
def test_pools_do_not_shift_with_short_samples(n):
    """
    The same source, uniform over 12 words, 4 samples of each of 600 prompts at 10 tokens. Where none, 40% or 70% of
    the samples are too short, pools of two score the same; everything that survives in one pool scores the higher, the
    shorter.
    """
    generator = np.random.default_rng(4)

    def measured(short, **options):
        values = []
        for _ in range(600):
            lengths = np.where(generator.random(4) < short, 5, 20)
            samples = [generator.integers(0, 12, length).tolist() for length in lengths]
            values.append(distinct_n(samples, n, length=10, pooled=True, **options))
        kept = [value for value in values if value is not None]
        return mean(kept)

    fixed = [measured(short, num_samples=2) for short in (0.0, 0.4, 0.7)]
    assert fixed[0].n == 600 and 120 < fixed[2].n < 300  # 0.348 of the prompts
    words = 12**n
    if n == 1:
        # 20 draws of 12 words: 12 (1 - (11/12)^20) / 20.
        assert all(
            estimate.value == pytest.approx(words * (1 - (1 - 1 / words) ** 20) / 20, abs=0.01) for estimate in fixed
        )
    assert max(e.value for e in fixed) - min(e.value for e in fixed) < 0.012
    free = [measured(short).value for short in (0.0, 0.4, 0.7)]
    assert free[2] - free[0] > (0.15 if n == 1 else 0.03)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: distinct_n(["ab"], 0), ValueError, "`n`"),
        (lambda: distinct_n(["ab"], 1.5), ValueError, "`n`"),
        (lambda: distinct_n(["ab"], 2, length=1), ValueError, "`length` must be an integer of at least 2, got 1"),
        (lambda: distinct_n(["ab"], 1, pooled=True, num_samples=0), ValueError, "`num_samples`"),
        (lambda: distinct_n(["ab"], 1, num_samples=2), ValueError, "`num_samples=2` .* `pooled=True`"),
        (lambda: distinct_n("ab", 1), TypeError, "`responses` is one text"),
        (lambda: self_bleu("one text"), TypeError, "`responses` is one text"),
        (lambda: self_bleu(["a", "b"], max_order=0), ValueError, "`max_order`"),
        (lambda: self_bleu(["a"]), ValueError, "`responses` needs at least 2"),
        (lambda: predictive_entropy([]), ValueError, "`logits` has the shape"),
        (lambda: predictive_entropy(1.0), ValueError, "`logits` has the shape"),
        (lambda: predictive_entropy([[np.nan, 0.0]]), ValueError, "`logits` has 1 NaN"),
        (lambda: predictive_entropy([[np.inf, 0.0]]), ValueError, "`logits` has .inf"),
        (lambda: predictive_entropy([[0.0, 0.0], [-np.inf, -np.inf]]), ValueError, "nothing but -inf"),
        (lambda: predictive_entropy([[0.0, 0.0]], [1, 1]), ValueError, "`mask` must have the shape"),
        (lambda: predictive_entropy(np.zeros((2, 3, 4)), average="samples"), ValueError, "`average` must be one of"),
        (lambda: predictive_entropy(np.zeros((3, 4)), average="responses"), ValueError, "`logits` must have 3 dim"),
        (
            lambda: predictive_entropy(np.zeros((2, 2, 3)), [[1, 0], [0, 0]], average="responses"),
            ValueError,
            "no position of response 1",
        ),
        (lambda: embedding_diversity([[1.0, 2.0]]), ValueError, "`embeddings` needs at least 2"),
        (lambda: embedding_diversity([[1.0], [np.inf]]), ValueError, "`embeddings` has infinite"),
        (lambda: embed_texts("one text", "some/encoder"), TypeError, "`texts` is one text"),
        (lambda: embed_texts(["a"], "some/encoder", batch_size=0), ValueError, "`batch_size`"),
    ],
)
def test_bad_diversity_input(call, error, message):
    pytest.importorskip("sacrebleu")
    with pytest.raises(error, match=message):
        call()


def test_self_bleu():
    pytest.importorskip("sacrebleu")
    same = ["the film was a slow and honest story of a small town"] * 3
    assert self_bleu(same) == pytest.approx(1.0)
    different = ["alpha beta gamma delta epsilon", "one two three four five", "red green blue white black"]
    assert self_bleu(different) < 0.1
    mixed = same[:2] + different[:1]
    assert self_bleu(different) < self_bleu(mixed) < self_bleu(same)


def test_self_bleu_by_hand():
    """
    "a b c d" against "a b x y", in both directions: 2 of 4 unigrams and 1 of 3 bigrams match, so with orders up to 2
    BLEU = sqrt(1/2 * 1/3); the lengths are equal.
    """
    pytest.importorskip("sacrebleu")
    assert self_bleu(["a b c d", "a b x y"], max_order=2, tokenize="none") == pytest.approx(np.sqrt(1 / 6))
    # "a,b" is one token without a tokenizer, and three with "13a"; orders beyond the text do not count.
    assert self_bleu(["a,b c", "a,d c"], max_order=1, tokenize="none") == pytest.approx(1 / 2)
    assert self_bleu(["a,b c", "a,d c"], max_order=1) == pytest.approx(3 / 4)
    assert self_bleu(["a b", "a b"]) == pytest.approx(1.0)


def test_entropy():
    """Uniform logits: log |V|. Certainty: 0. Only masked positions count."""
    assert predictive_entropy(np.zeros((2, 3, 7))) == pytest.approx(np.log(7))
    assert predictive_entropy([[0.0, -np.inf, -np.inf]]) == 0.0
    logits = torch.tensor([[[0.0, 0.0], [0.0, 50.0]]], dtype=torch.bfloat16)
    assert predictive_entropy(logits) == pytest.approx(np.log(2) / 2)
    assert predictive_entropy(logits, [[1, 0]]) == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="no position"):
        predictive_entropy(logits, [[0, 0]])


def test_two_means_of_the_entropy():
    """
    One response of a token with entropy log 2, one of three tokens with log 8: the mean over tokens is
    (log 2 + 3 log 8) / 4 = 5/2 log 2, over responses (log 2 + log 8) / 2 = 2 log 2. What padding says does not count.
    """
    even = np.zeros(8)
    coin = np.where(np.arange(8) < 2, 0.0, -np.inf)
    logits, mask = [[coin, even, even], [even, even, even]], [[1, 0, 0], [1, 1, 1]]
    assert predictive_entropy(logits, mask) == pytest.approx(2.5 * np.log(2))
    assert predictive_entropy(logits, mask, average="tokens") == pytest.approx(2.5 * np.log(2))
    assert predictive_entropy(logits, mask, average="responses") == pytest.approx(2 * np.log(2))
    assert predictive_entropy(logits, average="responses") == pytest.approx(predictive_entropy(logits))
    # The latter is what scored responses give.
    entropies = np.where(mask, np.log([[2, 1, 1], [8, 8, 8]]), 0)
    scores = ScoredResponses(mask=np.array(mask), token_logps=np.zeros((2, 3)), token_entropy=entropies)
    assert scores.entropy.mean() == pytest.approx(predictive_entropy(logits, mask, average="responses"))


def test_entropy_has_a_base_and_a_temperature():
    """Logits 0 and log 3: probabilities 1/4 and 3/4, in nats; adding 1000 to both changes nothing."""
    expected = 0.25 * np.log(4) + 0.75 * np.log(4 / 3)
    assert predictive_entropy([0.0, np.log(3)]) == pytest.approx(expected)
    assert predictive_entropy([1000.0, 1000 + np.log(3)]) == pytest.approx(expected)


def test_embedding_diversity():
    """Identical: 0. Orthogonal: 1. Any vectors: one minus the mean of all pairs' cosines, whatever their lengths."""
    assert embedding_diversity(np.ones((4, 3))) == pytest.approx(0.0, abs=1e-12)
    assert embedding_diversity(5 * np.eye(3)) == pytest.approx(1.0)
    assert embedding_diversity([[1.0, 0.0], [-3.0, 0.0]]) == pytest.approx(2.0)
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(6) for j in range(i)]
    assert embedding_diversity(vectors) == pytest.approx(1 - np.mean(pairs))
    with pytest.raises(ValueError, match="length 0"):
        embedding_diversity(np.zeros((2, 2)))


def test_embed_texts(encoder_folder):
    """The real library on a tiny encoder, beside the mean of the last states of one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["The film was bright.", "A dull story, sadly.", "The film was bright.", "script"]
    vectors = embed_texts(texts, encoder_folder, batch_size=3)
    model, tokenizer = AutoModel.from_pretrained(encoder_folder).eval(), AutoTokenizer.from_pretrained(encoder_folder)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    np.testing.assert_allclose(vectors, torch.stack(states).numpy(), atol=1e-5)
    assert embedding_diversity(vectors[[0, 2]]) == pytest.approx(0, abs=1e-6)
    assert embedding_diversity(vectors[:2]) > 1e-4


def test_encoder_without_safetensors_is_refused(encoder_folder, tmp_path):
    """A pickle that comes with an encoder is not opened."""
    folder = tmp_path / "encoder"
    shutil.copytree(encoder_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        embed_texts(["a"], str(folder))


def test_embedding_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"trl-ext\[embeddings\]"):
        embed_texts(["a"], "some/encoder")
