"""pass@k: closed forms, enumeration of all choices, and the binomial that it estimates."""

import itertools
import math

import harness
import numpy as np
import pytest
import tiny
from methods import BY_ID

from trl_ext.evaluation import (
    PassAtKCallback,
    RewardFunctionJudge,
    SamplingSettings,
    mean_pass_at_k,
    pass_at_k,
    proportion,
    sample_responses,
)


def test_equals_the_formula():
    for n, k in itertools.product(range(1, 13), range(1, 13)):
        if k > n:
            continue
        c = np.arange(n + 1)
        expected = [1 - math.comb(n - correct, k) / math.comb(n, k) for correct in c]
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_by_hand_and_by_enumeration():
    """
    2 of 4 right: of the 6 pairs one has none. c/n at k = 1, 1 where fewer than k are wrong, 0 where none is right.
    """
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6) and isinstance(pass_at_k(4, 2, 2), float)
    right = [True, True, False, False]
    assert np.mean([any(pair) for pair in itertools.combinations(right, 2)]) == pytest.approx(pass_at_k(4, 2, 2))
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 8) == 1.0 and pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k([4, 8], [2, 0], 2) == pytest.approx([5 / 6, 0])


def test_unbiased():
    """
    Over the binomial of n samples at a success rate p the mean is 1 - (1 - p)^k; that of 1 - (1 - c/n)^k is below.
    """
    n, k, p = 9, 4, 0.17
    c = np.arange(n + 1)
    weights = np.array([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in c])
    assert (weights * pass_at_k(n, c, k)).sum() == pytest.approx(1 - (1 - p) ** k, rel=1e-12)
    assert (weights * (1 - (1 - c / n) ** k)).sum() < 1 - (1 - p) ** k - 0.02


def test_large_numbers():
    """
    One right sample of a million at k = 3 has the chance 3e-6, without cancellation; a thousand of k = 1000 nearly 1 -
    1/e.
    """
    assert pass_at_k(10**6, 1, 3) == pytest.approx(3e-6, rel=1e-12)
    expected = 1 - math.comb(10**6 - 1000, 1000) / math.comb(10**6, 1000)
    assert pass_at_k(10**6, 1000, 1000) == pytest.approx(expected, rel=1e-10)


def test_interval():
    """The interval is over prompts, and does not shrink with the samples of a prompt."""
    correct = [0, 1, 4, 8, 8, 2, 0, 0]
    estimate = mean_pass_at_k(8, correct, 2)
    assert estimate == proportion(pass_at_k(8, correct, 2))
    assert estimate.value == pytest.approx(np.mean(pass_at_k(8, correct, 2))) and estimate.n == 8
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    grouped = mean_pass_at_k(8, correct * 4, 2, groups=list(range(8)) * 4)
    assert grouped.n == 8 and grouped.high - grouped.low > 0.9 * (estimate.high - estimate.low)
    all_right = mean_pass_at_k(8, [8] * 5, 1)
    assert all_right.value == 1 and all_right.low < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 0), "`k`"),
        ((4, 2, 1.5), "`k`"),
        ((4, 2, True), "`k`"),
        ((4, 2, 5), "k=5 with 4 samples"),
        (([8, 3], [1, 1], 4), "k=4 with 3 samples"),
        ((4, 5, 2), "`num_correct` must be from 0 to `num_samples`, got 5"),
        ((4, -1, 2), "`num_correct` .* got -1"),
        ((4, [1, 0.5], 2), "`num_correct` must be an integer"),
        ((4, math.nan, 2), "`num_correct` must be an integer"),
        (("4", 1, 2), "`num_samples` must be an integer"),
        (([4, 4, 4], [1, 2], 2), r"broadcast, got \(3,\) and \(2,\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


# ---- In training ----------------------------------------------------------------------------------------------------


def right(prompts, completions, level, **columns):
    """Known shares of right samples: by row always, never, or by the text; none for some."""
    known = {0: 1.0, 1: 0.2, 3: None}
    return [
        known[row] if row in known else 0.1 + 0.9 * (len(c) % 2) for row, c in zip(level, completions, strict=True)
    ]


def build(folder, tmp_path, **options):
    data = tiny.dataset(4, seed=1).add_column("level", list(range(4)))
    trainer = harness.trainer(BY_ID["simper"], folder, tmp_path, eval_dataset=data, max_steps=1)
    settings = SamplingSettings(max_new_tokens=3, seed=5)
    given = dict(k=(1, 3), num_samples=6, settings=settings) | options
    callback = PassAtKCallback(right, trainer, data, **given)
    trainer.add_callback(callback)
    return trainer, callback


def test_pass_at_k_in_an_evaluation(tiny_folder, tmp_path):
    """The mean over prompts of the unbiased estimate, recomputed from samples of the same seed, with its interval."""
    trainer, callback = build(tiny_folder, tmp_path)
    logged = trainer.evaluate()
    prompts = [row["prompt"] for row in tiny.rows(4, seed=1)]
    samples = sample_responses(trainer.model, trainer.processing_class, prompts, callback.settings, num_samples=6)
    odd = sum(len(text) % 2 for text in samples.texts[12:18])
    assert 0 < odd < 6
    for k in (1, 3):
        expected = mean_pass_at_k(6, [6, 0, odd, 0], k)
        assert logged[f"eval_pass@{k}"] == pytest.approx(expected.value)
        assert logged[f"eval_pass@{k}/low"] == pytest.approx(expected.low)
        assert logged[f"eval_pass@{k}/high"] == pytest.approx(expected.high)
    # A sum of floats: 0.1 + 0.9 is right where 1 is asked for. At a lower threshold more is right.
    (point,) = callback.history
    assert point["eval_pass@1"] == logged["eval_pass@1"]
    lower, _ = build(tiny_folder, tmp_path / "lower", reward_threshold=0.1)
    assert lower.evaluate()["eval_pass@1"] == pytest.approx(0.75)


def test_a_reward_function_that_fails_loses_a_measurement(tiny_folder, tmp_path, caplog):
    trainer, callback = build(tiny_folder, tmp_path)
    callback.judge = RewardFunctionJudge(lambda prompts, completions, **columns: [None] * len(completions))
    logged = trainer.evaluate()
    assert not any("pass@" in name for name in logged) and "gave no reward to any sample" in caplog.text


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(k=()), "`k="),
        (dict(k=(1, 7)), "`num_samples=6`"),
        (dict(k=(0,)), r"`k\[0\]` must be"),
        (dict(num_samples=0), "`num_samples` must be"),
        (dict(num_prompts=0), "`num_prompts` must be"),
        (dict(reward_threshold="1"), "`reward_threshold` must be"),
    ],
    ids=str,
)
def test_bad_options_of_the_callback(options, told, tiny_folder, tmp_path):
    with pytest.raises((ValueError, TypeError), match=told):
        build(tiny_folder, tmp_path, **options)
