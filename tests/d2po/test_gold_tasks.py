"""The gold functions against their definitions, worked by hand."""

import pytest

from trl_ext.d2po.gold_tasks import (
    COLLECTED_WORDS,
    GOLD_TASKS,
    MATH_FAILURE,
    edit_distance,
    evaluate_expression,
    expand_math,
    film_sentiment,
    math_expansion,
    math_problems,
    unique_nouns,
    word_collector,
)


def collect(text: str) -> float:
    return word_collector(["Q"], [text])[0]


def test_word_collector():
    """Nothing, all thirty, each once; case, parts of words, compounds and punctuation as NLTK's tokens have it."""
    assert len(set(COLLECTED_WORDS)) == 30
    assert collect("") == 0
    assert collect(" ".join(COLLECTED_WORDS)) == 30
    assert collect(" ".join(word.capitalize() for word in COLLECTED_WORDS)) == 0
    assert collect("data data data") == 1
    assert collect("database data-driven data/code metadata data_set") == 0
    assert collect('(data), "code"; two. help! your? data\'s first...') == 6
    assert word_collector([[{}]], [[{"role": "assistant", "content": "safe and happy"}]]) == [2.0]


def test_unique_nouns():
    """Different tokens tagged NN*, case told apart: film, story, Paris; the second film adds nothing."""
    pytest.importorskip("textblob")
    texts = ["The film told a story of Paris, and the film was long.", "", "It was slow and quietly sad."]
    assert unique_nouns([""] * 3, texts) == [3.0, 0.0, 0.0]


def test_expression_evaluator():
    """Integers, + - * and parentheses; everything else, and what could hang or overflow, is refused."""
    assert evaluate_expression("2+3*(4-5)") == -1
    assert evaluate_expression(" -6*2 ") == -12
    assert evaluate_expression("5--6") == 11
    for bad in (
        "2**3",
        "9**9**9",
        "1/2",
        "a",
        "__import__('os')",
        "",
        "1+",
        "(1",
        "1,2",
        "1.5",
        "1_0.",
        "True",
        "1 if 1 else 2",
    ):
        with pytest.raises(ValueError):
            evaluate_expression(bad)
    with pytest.raises(ValueError, match="200 characters"):
        evaluate_expression("1+" * 200 + "1")
    with pytest.raises(ValueError):
        evaluate_expression("*".join(["999"] * 6))
    with pytest.raises(ValueError):
        evaluate_expression("(" * 99 + "1" + ")" * 99 + "-" * 3)


def test_expand_math():
    """(2+3)*(4-1): the leftmost parenthesis, then the other, then what is left; nested ones from the inside."""
    assert expand_math("(2+3)*(4-1)") == ["5*(4-1)", "5*3", "15"]
    assert expand_math("((1+2)*3)-4") == ["(3*3)-4", "9-4", "5"]
    assert expand_math("7-(2*5)") == ["7-10", "-3"]
    assert expand_math("(4+4)") == ["8"]
    assert expand_math("3*3") == ["9"]


def test_edit_distance():
    for first, second, distance in (("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("5*3", "5 * 3", 2)):
        assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_math_expansion():
    """
    For (2+3)*(4-1) the steps have 7, 3 and 2 characters. The chain itself: 0. Nothing: -12. One wrong digit: -1. A
    space inside a step: -1. Steps beyond the last: free. Words are dropped. No expression: -200.
    """

    def reward(completion, prompt="(2+3)*(4-1) = "):
        return math_expansion([prompt], [completion])[0]

    assert reward("5*(4-1) = 5*3 = 15") == 0
    assert reward("") == -12
    assert reward("5*(4-1) = 5*3 = 16") == -1
    assert reward("5*(4-1) = 5* 3 = 15") == -1
    assert reward("5*(4-1) = 5*3 = 15 = 15 = 99") == 0
    assert reward("first 5*(4-1) = then 5*3 = so 15") == 0
    assert reward("5*(4-1)") == -5
    assert reward("1", prompt="2**3 = ") == MATH_FAILURE
    assert reward("1", prompt="no numbers = ") == MATH_FAILURE
    assert math_expansion([[{"role": "user", "content": "3*3 = "}]], [[{"role": "assistant", "content": "9"}]]) == [0]


def test_math_problems():
    """Every problem can be expanded, and its own chain is worth 0; the seed decides, and different seeds differ."""
    problems = math_problems(200, seed=1)
    assert problems == math_problems(200, seed=1) != math_problems(200, seed=2)
    for problem in problems:
        assert problem.endswith(" = ") and abs(int(expand_math(problem[:-3])[-1])) < 99
    chains = [" = ".join(expand_math(problem[:-3])) for problem in problems]
    assert set(math_expansion(problems, chains)) == {0.0}
    assert len(set(problems)) > 100


def test_film_sentiment():
    pytest.importorskip("vaderSentiment")
    good, bad, empty = film_sentiment([""] * 3, ["A wonderful, moving film.", "A dull, horrible mess.", " "])
    assert good > 0.5 and bad < -0.5 and empty == 0


def test_every_task_is_a_reward_function():
    """Each takes what TRL passes and gives one number a completion."""
    for name, task in GOLD_TASKS.items():
        if name == "unique_nouns":
            pytest.importorskip("textblob")
        rewards = task(prompts=["1+1 = "] * 2, completions=["2", "data"], completion_ids=None, trainer_state=None)
        assert len(rewards) == 2 and all(isinstance(reward, float) for reward in rewards)
