"""Answers before training: what is sampled, scored, kept on disk, counted and filtered."""

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from launching import TESTS, fork

from trl_ext.evaluation import pass_at_k
from trl_ext.rollout.pass_rates import (
    Answer,
    AnswerOptions,
    Answers,
    PassRates,
    filter_by_pass_rate,
    find_reward_threshold,
    is_right,
    measure_pass_rates,
)


OPTIONS = AnswerOptions(max_completion_length=4, batch_size=5)


@pytest.fixture(scope="module")
def model():
    return tiny.model().eval(), tiny.tokenizer()


def data(count: int = 20) -> Dataset:
    return tiny.dataset(count).select_columns(["prompt"]).add_column("parity", [i % 2 for i in range(count)])


def length_reward(prompts, completions, completion_ids, parity, **columns):
    """Right where the sum of the tokens has the row's parity: about half of the answers."""
    return [float(sum(ids) % 2 == p) for ids, p in zip(completion_ids, parity, strict=True)]


def answers_of(model, cache_dir=None, options=OPTIONS, dataset=None):
    return Answers(*model, data() if dataset is None else dataset, length_reward, options=options, cache_dir=cache_dir)


def test_answers_are_a_function_of_row_and_number(model):
    """An answer depends neither on the batch, nor on which other rows or numbers are asked for; numbers differ."""
    whole = answers_of(model)(range(20), range(3))
    part = answers_of(model, options=AnswerOptions(max_completion_length=4, batch_size=2))([7, 3], range(1, 3))
    for group, row in zip(part, (7, 3), strict=True):
        assert [answer.completion_ids for answer in group] == [a.completion_ids for a in whole[row][1:]]
        assert all(answer.row == row for answer in group)
    first = [tuple(group[0].completion_ids) for group in whole]
    assert len(set(first)) > 15 and all(group[0].completion_ids != group[1].completion_ids for group in whole)
    other = answers_of(model, options=AnswerOptions(max_completion_length=4, seed=1))(range(20), range(1))
    assert sum(a[0].completion_ids != b[0].completion_ids for a, b in zip(other, whole, strict=True)) > 15


def test_rewards_get_rows_and_tokens(model):
    """Columns, tokens and prompts reach the reward function in the order of the answers."""
    for row, group in enumerate(answers_of(model)(range(20), range(2))):
        for answer in group:
            assert answer.reward == float(sum(answer.completion_ids) % 2 == row % 2)
            assert model[1].decode(answer.completion_ids, skip_special_tokens=True) == answer.completion


def test_a_killed_collection_continues(model, tmp_path, monkeypatch):
    """What was sampled before an interruption is read from disk; the result is that of an uninterrupted collection."""
    whole = answers_of(model)(range(20), range(2))
    sampled = []
    original = Answers._sample

    def counting(self, rows, numbers):
        sampled.append(list(rows))
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return original(self, rows, numbers)

    monkeypatch.setattr(Answers, "_sample", counting)
    with pytest.raises(KeyboardInterrupt):
        answers_of(model, tmp_path)(range(20), range(2))
    again = answers_of(model, tmp_path)
    assert again(range(20), range(2)) == whole
    assert sampled == [list(range(16)), list(range(16, 20)), list(range(16, 20))]
    # Another model, other settings or other prompts find nothing.
    sampled.extend([None] * 3)
    other = tiny.model(seed=1).eval(), model[1]
    assert answers_of(other, tmp_path)(range(20), range(2)) != whole
    answers_of(model, tmp_path, AnswerOptions(max_completion_length=5))(range(20), range(2))
    answers_of(model, tmp_path, dataset=data().select(range(19, -1, -1)))(range(20), range(2))
    assert len(sampled) == 6 + 6


def test_conversations(model):
    """Messages go through the chat template, and an answer is an assistant's message."""
    dataset = tiny.dataset(3, conversational=True).select_columns(["prompt"]).add_column("parity", [0, 1, 0])
    groups = answers_of(model, dataset=dataset)(range(3), range(1))
    for group, prompt in zip(groups, dataset["prompt"], strict=True):
        text = f"<|user|>{prompt[0]['content']}<|end|><|assistant|>"
        assert group[0].prompt_ids == model[1](text)["input_ids"]
        assert group[0].completion[0]["role"] == "assistant"


def test_pass_rates_of_known_chances(model):
    """Answers that are right by known chances are counted per prompt, and give pass@k and the filter."""
    rates = measure_pass_rates(*model, data(), length_reward, samples=4, options=OPTIONS)
    groups = answers_of(model)(range(20), range(4))
    expected = [sum(int(answer.reward) for answer in group) for group in groups]
    assert rates.num_correct.tolist() == expected and rates.reward_threshold == 1.0
    assert rates.histogram() == [expected.count(i) for i in range(5)] and sum(rates.histogram()) == 20
    assert pass_at_k(rates.num_samples, rates.num_correct, 1).tolist() == pytest.approx(rates.rates.tolist())
    kept = filter_by_pass_rate(data(), rates)
    assert kept["prompt"] == [p for p, c in zip(data()["prompt"], expected, strict=True) if 0 < c < 4]
    assert 0 < len(kept) < 20
    easy = filter_by_pass_rate(data(), rates, above=0.5, below=2)
    assert len(easy) == sum(c > 2 for c in expected)
    assert str(rates.histogram()[2]) in rates.describe()


def test_two_processes(tiny_folder, tmp_path):
    """Two processes sample halves, and both get what one process gets."""
    script = TESTS / "scripts" / "collect_answers.py"
    fork(script, tiny_folder, str(tmp_path / "two"))
    fork(script, tiny_folder, str(tmp_path / "one"), processes=1)
    one = (tmp_path / "one-0.json").read_text()
    assert (tmp_path / "two-0.json").read_text() == (tmp_path / "two-1.json").read_text() == one


def answer(reward):
    return Answer(0, [1], [2], "a", reward)


def test_threshold():
    """The largest reward is that of a right answer unless another is given; rounding of a sum does not matter."""
    groups = [[answer(0.0), answer(0.1 + 0.2)], [answer(None), answer(0.3)]]
    limit = find_reward_threshold(groups, None)
    assert [is_right(a, limit) for group in groups for a in group] == [False, True, False, True]
    assert find_reward_threshold(groups, 0.0) == 0.0
    with pytest.raises(ValueError, match="All answers have the reward 1.*`reward_threshold`"):
        find_reward_threshold([[answer(1.0), answer(1.0)]], None)
    with pytest.raises(ValueError, match="no reward to any answer"):
        find_reward_threshold([[answer(None)]], None)


@pytest.mark.parametrize(
    "option, value", [("temperature", 0.0), ("top_p", 0.0), ("max_completion_length", 0), ("batch_size", 1.5)]
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be .*{value}"):
        AnswerOptions(**{option: value})


def test_bad_input(model):
    with pytest.raises(ValueError, match="column `prompt`.*parity"):
        answers_of(model, dataset=data().remove_columns("prompt"))
    with pytest.raises(ValueError, match="`dataset` is empty"):
        answers_of(model, dataset=data().select([]))
    with pytest.raises(ValueError, match="dataset has a transform"):
        answers_of(model, dataset=data().with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="needs the column `parity`"):
        answers_of(model, dataset=data().remove_columns("parity"))
    with pytest.raises(TypeError, match="`reward_funcs` must be functions"):
        Answers(*model, data(), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="`samples` must be"):
        measure_pass_rates(*model, data(), length_reward, samples=0)
    rates = PassRates(4, np.array([0, 4]), 1.0)
    with pytest.raises(ValueError, match="`rates` are of 2 prompts, and `dataset` has 20"):
        filter_by_pass_rate(data(), rates)
    with pytest.raises(ValueError, match="No prompt has a share of right answers above 0 and below 1"):
        filter_by_pass_rate(data(2), rates)
