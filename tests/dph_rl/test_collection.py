"""The stage before training: the near-perfect set, the answers to rehearse, and the unbiased extra draw."""

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from trl_ext import collect_rehearsal
from trl_ext.dph_rl.rehearsal import read_rehearsal
from trl_ext.rollout.pass_rates import AnswerOptions, Answers


OPTIONS = AnswerOptions(max_completion_length=3, seed=46)
SAMPLES = 4


def correct(ids) -> float:
    return float(sum(ids) % 3 > 0)


def reward(completions, completion_ids, chance, **columns):
    """Right with the row's known chance: always at 2, never at 0, otherwise for two thirds of the tokens' sums."""
    return [{0: 0.0, 2: 1.0}.get(c, correct(ids)) for ids, c in zip(completion_ids, chance, strict=True)]


@pytest.fixture(scope="module")
def model():
    return tiny.model().eval(), tiny.tokenizer()


def data() -> Dataset:
    rows = tiny.dataset(24).select_columns(["prompt"])
    return rows.add_column("chance", [0, 2, 1, 1] * 6).add_column("answer", [f"a{i}" for i in range(24)])


def collect(model, **options):
    return collect_rehearsal(*model, data(), reward, **{"samples": SAMPLES, "options": OPTIONS, **options})


def outcomes(model, numbers) -> list[list[bool]]:
    """Whether each answer of each row is right, sampled anew."""
    groups = Answers(*model, data(), reward, options=OPTIONS)(range(24), numbers)
    return [[answer.reward == 1 for answer in group] for group in groups]


def test_split_is_exact(model):
    """
    Prompts whose answers are all right are mastered; an answer to rehearse is the next one, kept if it is right; the
    answers that decided are never rehearsed. Columns of the prompts stay.
    """
    exploration, near_perfect, rehearsal, rates = collect(model)
    first, further = outcomes(model, range(SAMPLES)), outcomes(model, range(SAMPLES, SAMPLES + 1))
    mastered = [all(row) for row in first]
    assert near_perfect["answer"] == [f"a{i}" for i in range(24) if mastered[i]]
    assert exploration["answer"] == [f"a{i}" for i in range(24) if not mastered[i]]
    assert rates.num_correct.tolist() == [sum(row) for row in first]
    kept = [i for i in range(24) if mastered[i] and further[i][0]]
    assert rehearsal["prompt"] == [data()["prompt"][i] for i in kept]
    lucky = [i for i in range(24) if mastered[i] and data()["chance"][i] == 1]
    assert lucky and len(kept) < sum(mastered)  # some are mastered by chance, and some of their further answers wrong
    assert all(score == 1 for score in rehearsal["reward"])
    drawn = Answers(*model, data(), reward, options=OPTIONS)(kept, range(SAMPLES, SAMPLES + 1))
    assert rehearsal["completion_ids"] == [group[0].completion_ids for group in drawn]


def test_more_extra_answers_and_a_lower_threshold(model):
    """`extra` answers to each mastered prompt, of which the right ones stay; `threshold` is a share of right ones."""
    result = collect(model, threshold=0.75, extra=3)
    first, further = outcomes(model, range(SAMPLES)), outcomes(model, range(SAMPLES, SAMPLES + 3))
    mastered = [sum(row) >= 3 for row in first]
    assert len(result.near_perfect) == sum(mastered) < 24
    assert len(result.rehearsal) == sum(sum(row) for row, there in zip(further, mastered, strict=True) if there)


def test_the_extra_answer_removes_the_selections_bias(model):
    """
    Negative control: among mastered prompts the answers that decided are all right, also where the model is right by
    chance; the extra ones are right as often as the model is.
    """
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.5, 1.0, size=20000)
    first, extra = rng.random((20000, 8)) < chance[:, None], rng.random(20000) < chance
    mastered = first.all(axis=1)
    assert first[mastered].mean() == 1 and extra[mastered].mean() == pytest.approx(chance[mastered].mean(), abs=0.01)
    assert extra[mastered].mean() < 0.96


def test_hopeless_prompts(model):
    """Prompts without a right answer are in the exploration set unless they are to be dropped."""
    kept, dropped = collect(model), collect(model, drop_hopeless=True)
    hopeless = sum(not any(row) for row in outcomes(model, range(SAMPLES)))
    assert hopeless >= 6 and len(dropped.exploration) == len(kept.exploration) - hopeless
    assert 0 not in dropped.exploration["chance"]


def test_what_is_collected_can_be_rehearsed(model):
    """The trainer reads the very tokens that were sampled."""
    rehearsal = collect(model).rehearsal
    answers = read_rehearsal(rehearsal, model[1], 512)
    assert [answer.completion_ids for answer in answers] == rehearsal["completion_ids"]
    assert [answer.prompt_ids for answer in answers] == [model[1](p)["input_ids"] for p in rehearsal["prompt"]]


def test_an_interrupted_collection_continues(model, tmp_path, monkeypatch):
    """Killed in the extra draw, it samples only what is missing, and the result is the same."""
    expected = collect(model)
    calls = []
    original = Answers._sample

    def interrupted(self, rows, numbers):
        calls.append(list(numbers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, rows, numbers)

    monkeypatch.setattr(Answers, "_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(model, cache_dir=tmp_path)
    again = collect(model, cache_dir=tmp_path)
    assert calls == [[0, 1, 2, 3], [0, 1, 2, 3], [4], [4]]
    assert again.rehearsal.to_list() == expected.rehearsal.to_list()


def test_shares_that_are_likely_wrong_are_told(model, caplog):
    """Few or very many mastered prompts draw a warning with the histogram."""

    def easy(completions, chance, **columns):
        return [float(c != 0) for c in chance]

    collect_rehearsal(*model, data(), easy, samples=2, options=OPTIONS)
    assert "18 of 24 prompts (75.0%) are mastered" in caplog.text and "prompts with so many" in caplog.text


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(samples=0), "`samples` must be"),
        (dict(extra=0), "`extra` must be"),
        (dict(threshold=0.0), "`threshold` must be"),
        (dict(threshold=1.5), "`threshold` must be"),
        (dict(reward_threshold=2.0), "No prompt has a share of right answers"),
        (dict(reward_threshold=0.0), "No prompt is left to train on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, told, model):
    with pytest.raises(ValueError, match=told):
        collect(model, **options)


def test_nothing_to_rehearse(model):
    """Answers that decided do not count: a prompt that is mastered by luck alone leaves nothing."""
    calls = []

    def lucky(completions, chance, **columns):
        calls.append(1)
        return [float(len(calls) == 1 and c == 2) for c in chance]

    with pytest.raises(ValueError, match="None of the 1 further answers to each of the 6 mastered prompts"):
        collect_rehearsal(*model, data(), lucky, samples=2, options=OPTIONS, reward_threshold=1.0)


def test_model_is_left_as_it_was(model):
    """Sampling leaves modes, gradients and the random state alone."""
    policy = tiny.model().train()
    state = torch.get_rng_state()
    collect_rehearsal(policy, model[1], data(), reward, samples=2, options=OPTIONS)
    assert policy.training and torch.equal(torch.get_rng_state(), state)
