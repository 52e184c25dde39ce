"""The adapters: reward functions, a reward model, a judge behind a (local) endpoint, a person at a terminal."""

import functools
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from trl_ext.d2po import (
    CallableLabeller,
    Gold,
    JudgeLabeller,
    LabellerError,
    RewardFunctionLabeller,
    RewardModelLabeller,
    TerminalLabeller,
)
from trl_ext.d2po.labellers import as_labeller
from trl_ext.evaluation import EndpointJudge, Judge, RewardFunctionJudge, RewardModelJudge, judge_responses
from trl_ext.judges.endpoint import parse_verdict


MESSAGES = [{"role": "user", "content": "Hi"}]


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


# ---- Reward functions -----------------------------------------------------------------------------------------------


def test_reward_functions():
    """
    The higher reward wins, weights count, near rewards tie, no reward is no verdict, and columns go with both sides.
    """
    seen = {}

    def bonus(prompts, completions, number, **columns):
        seen.update(prompts=prompts, number=number)
        return [None if completion == "?" else float(n) for completion, n in zip(completions, number, strict=True)]

    labeller = RewardFunctionLabeller([length, bonus], reward_weights=[1.0, 0.5])
    given = labeller(["p", "q", "r", "s"], ["aa", "a", "aa", "?"], ["a", "aa", "bb", "b"], number=[1, 2, 3, 4])
    assert given == [1, 0, 0.5, None]
    assert seen == {"prompts": ["p", "q", "r", "s"] * 2, "number": [1, 2, 3, 4] * 2}
    assert labeller.name == "length+bonus" and labeller.is_free
    assert RewardFunctionLabeller(length, tie_margin=1.0)(["p", "p"], ["a", "a"], ["bb", "bbb"]) == [0.5, 0]


def test_reward_functions_that_are_wrong():
    with pytest.raises(ValueError, match="`reward_weights` has 1 entries for 2"):
        RewardFunctionLabeller([length, length], reward_weights=[1.0])
    with pytest.raises(ValueError, match="`tie_margin` must not be negative, got -1"):
        RewardFunctionLabeller(length, tie_margin=-1)
    with pytest.raises(LabellerError, match="gave 1 rewards for 2 completions"):
        RewardFunctionLabeller(lambda prompts, completions: [1.0])(["p"], ["a"], ["b"])
    with pytest.raises(TypeError, match="`gold_labeller` must be"):
        as_labeller("gpt-4")


async def coroutine(prompts, completions, **columns):
    return [1.0] * len(completions)


class Scorer:
    def __call__(self, completions, **columns):
        return [1.0] * len(completions)


@pytest.mark.parametrize(
    "function",
    [
        length,
        lambda prompts, completions: [1.0] * len(completions),
        lambda completions, **columns: [1.0] * len(completions),
        lambda **columns: [1.0] * len(columns["completions"]),
        lambda prompts, **columns: [1.0] * len(prompts),
        # Three parameters, but TRL gives `answer` by name.
        lambda prompts, completions, answer, **columns: [float(a == "x") for a in answer],
        lambda *, prompts, completions: [1.0] * len(completions),
        functools.partial(length),
        Scorer(),
        coroutine,
    ],
)
def test_reward_functions_are_labelers(function):
    """A reward function as TRL takes it is one by its signature; as a function on pairs it is refused at once."""
    labeller = as_labeller(function)
    assert list(labeller(["p", "q"], ["a", "b"], ["c", "d"], answer=["x", "y"], other=[0, 0])) == [0.5, 0.5]
    assert len(labeller.rewards(["p"], ["a"], answer=["x"], other=[0])) == 1
    assert labeller.is_free and labeller.has_rewards and labeller.cost == 1.0
    with pytest.raises(TypeError, match=r"`f\(prompts, completions_a, completions_b.*`RewardFunctionJudge\(f\)`"):
        CallableLabeller(function)


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda texts: [1.0], r"neither a function on pairs nor a reward function.*\(texts\)"),
        (lambda *, prompts, completions_a: [1.0], "neither a function on pairs nor a reward function"),
        (lambda prompts, answers, **columns: [1.0], "neither a function on pairs nor a reward function"),
        (torch.nn.Linear(1, 1), r"is a model \(`Linear`\).*`RewardModelJudge"),
        ([length], "got a `list`"),
        (None, "got a `NoneType`"),
    ],
)
def test_what_cannot_label(given, message):
    with pytest.raises(TypeError, match=f"`gold_labeller` .*{message}"):
        Gold(given)


class Pairs:
    def __call__(self, prompts, first, second, **columns):
        return [0.5] * len(prompts)


class Opaque:
    """Whose signature cannot be told, as of some functions that are written in C."""

    __signature__ = "unknown"

    def __call__(self, *given, **columns):
        return [0.5] * len(given[0])


def with_default(prompts, completions_a, completions_b, strictness=1.0):
    return [0.5] * len(prompts)


def with_required_column(prompts, completions_a, completions_b, *, number):
    return [0.5] * len(number)


def with_column_by_position(prompts, completions_a, completions_b, number):
    return [0.5] * len(number)


@pytest.mark.parametrize(
    "function",
    [
        Pairs(),
        Opaque(),
        Pairs().__call__,
        with_default,
        with_required_column,
        with_column_by_position,
        functools.partial(with_default, strictness=2.0),
        lambda *given, **columns: [0.5] * len(given[0]),
        lambda prompts, *pair: [0.5] * len(prompts),
        lambda p, a, b, /: [0.5] * len(p),
    ],
)
def test_functions_on_pairs_are_labellers(function):
    assert as_labeller(function)(["p"], ["a"], ["b"], number=[1]) == [0.5]


# ---- A reward model -------------------------------------------------------------------------------------------------


def reward_model(num_labels=1):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=num_labels,
        initializer_range=0.5,
    )
    return Qwen2ForSequenceClassification(config)


def test_reward_model():
    """
    Scores are the model's on what `trl.RewardTrainer` gives it: prompt and completion with the end-of-sequence token,
    or by the chat template for messages. They do not depend on the batch; a probability is sigmoid(r_a - r_b).
    """
    tokenizer = tiny.tokenizer()
    labeller = RewardModelLabeller(reward_model(), tokenizer, batch_size=2, name="rm")
    completions = [" The film was bright.", " A dull scene, sadly.", " ok"]
    rewards = labeller.rewards(["Q?"] * 3, completions)
    for completion, reward in zip(completions, rewards, strict=True):
        text = "Q?" + completion + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert reward == pytest.approx(labeller.model(ids).logits.item(), abs=1e-5)
    assert labeller(["Q?"], completions[:1], completions[1:2]) == [float(rewards[0] > rewards[1])]
    answer = [{"role": "assistant", "content": "bright"}]
    text = tokenizer.apply_chat_template(MESSAGES + answer, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert labeller.rewards([MESSAGES], [answer]) == pytest.approx([labeller.model(ids).logits.item()], abs=1e-5)
    soft = RewardModelLabeller(labeller.model, tokenizer, probability=True)
    expected = torch.sigmoid(torch.tensor(rewards[0] - rewards[1])).item()
    assert soft(["Q?"], completions[:1], completions[1:2]) == pytest.approx([expected], abs=1e-6)
    assert not labeller.is_free
    with pytest.raises(ValueError, match="has 2 outputs"):
        RewardModelLabeller(reward_model(num_labels=2), tokenizer)


# ---- A judge --------------------------------------------------------------------------------------------------------


class Endpoint:
    """An OpenAI-compatible server on this machine whose answers are a function of the question."""

    def __init__(self, answer):
        self.requests = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, dict(self.headers), body))
                result = answer(body["messages"][0]["content"], len(endpoint.requests))
                if isinstance(result, int):
                    self.send_response(result)
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                    self.end_headers()
                    return
                content = (
                    result
                    if isinstance(result, bytes)
                    else json.dumps({"choices": [{"message": {"role": "assistant", "content": result}}]}).encode()
                )
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

        self.server.handle_error = lambda *args: None  # a client that gave up waiting

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def judge(endpoint, **options):
    labeller = JudgeLabeller("judge-1", base_url=endpoint.url, api_key_env="D2PO_TEST_KEY", **options)
    labeller.retry_delay = 0.0
    return labeller


def verdicts(labeller, prompts, a, b):
    """The verdicts in the order of the questions."""
    return [verdict for _, verdict in sorted(labeller(prompts, a, b))]


def longer_is_better(question, number):
    a, b = question.split("### Response A\n")[1].split("\n\n### Response B\n")
    b = b.split("\n\n### Verdict")[0]
    return "T" if len(a) == len(b) else f" {'A' if len(a) > len(b) else 'B'}."


def test_judge(monkeypatch, caplog):
    """The request is that of chat completions, with the key from the environment; the answers come in order."""
    monkeypatch.setenv("D2PO_TEST_KEY", "sk-very-secret")
    caplog.set_level(logging.DEBUG)
    with Endpoint(longer_is_better) as endpoint:
        labeller = judge(endpoint, concurrency=3, extra_body={"seed": 1})
        prompts, a, b = ["Q"] * 3, ["aaa", "a", "aa"], ["b", "bbb", "bb"]
        assert verdicts(labeller, prompts, a, b) == [1.0, 0.0, 0.5]
        path, headers, body = endpoint.requests[0]
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-very-secret"
        assert body["model"] == "judge-1" and body["temperature"] == 0.0 and body["seed"] == 1
        answers = [[{"role": "assistant", "content": text}] for text in ("long reply", "short")]
        assert verdicts(labeller, [MESSAGES], answers[:1], answers[1:]) == [1.0]
        assert "Hi" in endpoint.requests[-1][2]["messages"][0]["content"]
        monkeypatch.delenv("D2PO_TEST_KEY")
        list(labeller(["Q"], ["a"], ["b"]))
        assert "Authorization" not in endpoint.requests[-1][1]
    assert labeller.name == f"judge-1 at {endpoint.url.split('/')[2]}"
    assert "sk-very-secret" not in caplog.text + repr(vars(labeller))


@pytest.mark.parametrize(
    "answers, requests, outcome",
    [
        ([500, 429, "A"], 3, [1.0]),  # passing trouble is waited out
        ([b"not json", b'{"choices": []}', "B"], 3, [0.0]),
        (["Both are fine.", "Hm.", "A"], 3, [1.0]),  # an answer that says nothing is asked again
        (["Hm."] * 9, 3, [None]),
        (
            [401] * 9,
            1,
            "HTTP 401 the key in the variable D2PO_TEST_KEY is missing or wrong",
        ),  # trouble that stays is not
        ([404] * 9, 1, "HTTP 404 no such address or model"),
        ([302] * 9, 3, "a redirect, which is not followed"),
        ([500] * 9, 3, "HTTP 500"),
        ([b"<html>"] * 9, 3, "its answer is not a chat completion"),
    ],
    ids=str,
)
def test_judge_in_trouble(answers, requests, outcome, monkeypatch):
    monkeypatch.setenv("D2PO_TEST_KEY", "sk-very-secret")
    with Endpoint(lambda question, number: answers[number - 1]) as endpoint:
        labeller = judge(endpoint, max_retries=2)
        if isinstance(outcome, list):
            assert verdicts(labeller, ["Q"], ["a"], ["b"]) == outcome
        else:
            with pytest.raises(LabellerError, match=outcome) as error:
                list(labeller(["Q"], ["a"], ["b"]))
            assert "sk-very-secret" not in str(error.value)
            assert error.value.__cause__ is None  # whose traceback would hold the request
        assert len(endpoint.requests) == (requests if outcome != "a redirect, which is not followed" else 1)


def test_judge_that_is_slow_or_away():
    with Endpoint(lambda question, number: time.sleep(0.5) or "A") as endpoint:
        with pytest.raises(LabellerError, match="no answer within 0.05 s"):
            list(judge(endpoint, timeout=0.05, max_retries=0)(["Q"], ["a"], ["b"]))
        url = endpoint.url
    labeller = JudgeLabeller("judge-1", base_url=url, max_retries=0)
    with pytest.raises(LabellerError, match="no connection"):
        list(labeller(["Q"], ["a"], ["b"]))


def test_judge_keeps_what_was_answered():
    """What is under way when one question fails is waited for; what has not been sent is not."""

    under_way = threading.Barrier(3)  # the refusal comes once all of the first three have been sent

    def answer(question, number):
        if any(f"no {i}" in question for i in range(3)):
            under_way.wait(timeout=30)
        if "no 1" in question:
            return 401
        time.sleep(0.2)
        return "A"

    with Endpoint(answer) as endpoint:
        given = set()
        with pytest.raises(LabellerError, match="401"):
            for index, verdict in judge(endpoint, concurrency=3)([f"no {i}" for i in range(9)], ["a"] * 9, ["b"] * 9):
                assert verdict == 1.0
                given.add(index)
        # Every request but the one refused was answered and kept.
        assert {0, 2} <= given and len(given) == len(endpoint.requests) - 1 < 8


def test_judge_settings():
    with pytest.raises(ValueError, match="`base_url` must be an http or https address"):
        JudgeLabeller("m", base_url="ftp://x")
    with pytest.raises(ValueError, match=r"`template` lacks \{completion_b\}"):
        JudgeLabeller("m", template="{prompt} {completion_a}")
    with pytest.raises(ValueError, match="user name or password") as error:
        JudgeLabeller("m", base_url="https://user:secret@host/v1")
    assert "secret" not in str(error.value)
    expected = {
        "A": 1.0,
        "B.": 0.0,
        "T": 0.5,
        "Tie": 0.5,
        "I say: B": 0.0,
        "neither": 0.5,
        "a close call": None,
        "": None,
    }
    assert {answer: parse_verdict(answer) for answer in expected} == expected


# ---- Judges are labellers, and labellers judges ---------------------------------------------------------------------


def test_a_judge_labels():
    """
    Any judge will do: its name, its rewards where it has them, its verdicts as they come; columns only if it takes
    them.
    """

    class Shorter(Judge):
        def __call__(self, prompts, completions_a, completions_b):
            return [float(len(a) < len(b)) for a, b in zip(completions_a, completions_b, strict=True)]

    labeller = as_labeller(Shorter())
    assert list(labeller(["p"], ["a"], ["bb"], number=[1])) == [1.0]
    assert (labeller.name, labeller.cost, labeller.is_free, labeller.has_rewards) == ("Shorter", 1.0, False, False)

    labeller = as_labeller(RewardFunctionJudge(lambda prompts, completions: length(prompts, completions), name="rule"))
    assert list(labeller(["p"], ["aa"], ["b"], number=[1])) == [1.0]
    assert labeller.rewards(["p"], ["aa"], number=[1]) == [2.0] and labeller.is_free and labeller.name == "rule"
    assert not as_labeller(RewardModelJudge(reward_model(), tiny.tokenizer())).is_free
    with pytest.raises(ValueError, match="`is_free=True`: Shorter compares pairs"):
        CallableLabeller(Shorter(), is_free=True)

    with Endpoint(longer_is_better) as endpoint:
        labeller = CallableLabeller(EndpointJudge("judge-1", endpoint.url, api_key_env=None), cost=0.01)
        assert verdicts(labeller, ["Q", "Q"], ["aaa", "a"], ["b", "bbb"]) == [1.0, 0.0]
        assert labeller.name.startswith("judge-1 at 127.0.0.1:") and labeller.cost == 0.01


def test_a_labeller_judges():
    """Verdicts that come in any order are each their pair's."""

    def answer(question, number):
        time.sleep(0.2 if "slow" in question else 0)
        return longer_is_better(question, number)

    with Endpoint(answer) as endpoint:
        result = judge_responses(judge(endpoint), ["slow", "Q"], ["aa", "a"], ["b", "bbb"])
    assert result.first.tolist() == [1.0, 0.0] and result.swapped.tolist() == [0.0, 1.0]
    assert judge_responses(RewardFunctionLabeller(length), ["Q"], ["aa"], ["b"]).swapped is None


def test_columns_in_a_question():
    """
    The template may name columns; what models and datasets wrote is never read as a template; an unknown name is
    refused.
    """
    seen = []
    template = 'Right: {answer}. {{prompt}} {"json": 1}\n{prompt}\nA: {completion_a}\nB: {completion_b}'
    with Endpoint(lambda question, number: seen.append(question) or "A") as endpoint:
        labeller = judge(endpoint, template=template)
        assert list(labeller(["{answer}"], ["{prompt}"], ["{}"], answer=[7], number=["{x}"])) == [(0, 1.0)]
        with pytest.raises(
            LabellerError, match=r"has the field \{answer\}, and there is no such column .columns: number"
        ):
            labeller(["Q"], ["a"], ["b"], number=[1])
    assert seen == ['Right: 7. {prompt} {"json": 1}\n{answer}\nA: {prompt}\nB: {}']


def test_judge_that_nobody_waits_for():
    """Whoever stops reading the answers pays for those under way and for no others."""
    with Endpoint(lambda question, number: time.sleep(0.1) or "A") as endpoint:
        answers = judge(endpoint, concurrency=2)(["Q"] * 20, ["a"] * 20, ["b"] * 20)
        next(answers)
        answers.close()
        assert len(endpoint.requests) <= 5


# ---- A person -------------------------------------------------------------------------------------------------------


def test_terminal():
    """
    One question at a time, each answered before the next; nonsense is asked again; control characters are not shown.
    """
    typed, shown = iter(["a", "x", "B ", "t", "s", "q"]), []
    labeller = TerminalLabeller("Ann", read=lambda question: next(typed), write=shown.append)
    answers = labeller(["Q1", MESSAGES, "Q3", "Q4", "Q5"], ["\x1b[2Jyes\x07"] * 5, ["no"] * 5)
    assert next(answers) == 1.0 and len(shown) == 2
    assert [next(answers), next(answers), next(answers)] == [0.0, -1, None]
    with pytest.raises(LabellerError, match="Ann stopped"):
        next(answers)
    text = "\n".join(shown)
    assert "\x1b" not in text and "\x07" not in text and "yes" in text and "Hi" in text
    assert "Please answer" in text and "Comparison 2 of 5" in text

    def closed(question):
        raise EOFError

    with pytest.raises(LabellerError, match="Ann stopped"):
        next(TerminalLabeller("Ann", read=closed, write=shown.append)(["Q"], ["a"], ["b"]))


# ---- Names of 0.1.0 -------------------------------------------------------------------------------------------------


def test_old_names_warn_and_do_the_same():
    """The four adapters of 0.1.0 are judges with a price; `Gold` states the price of any judge."""
    model, tokenizer = reward_model(), tiny.tokenizer()
    pairs = (["Q?", "Q?"], [" yes", " a film"], [" no, a bright one", " ok"])
    for make, judge in (
        (lambda: RewardFunctionLabeller(length, cost=2.0), RewardFunctionJudge(length)),
        (lambda: RewardModelLabeller(model, tokenizer, cost=2.0), RewardModelJudge(model, tokenizer)),
        (lambda: CallableLabeller(with_default, cost=2.0), with_default),
    ):
        with pytest.warns(FutureWarning, match=r"goes in the next release.*`Gold\(judge, cost=..., is_free=...\)`"):
            old = make()
        new = Gold(judge, cost=2.0)
        assert list(old(*pairs)) == list(new(*pairs))
        assert (old.name, old.cost, old.is_free, old.symmetric) == (new.name, new.cost, new.is_free, new.symmetric)
    with pytest.warns(FutureWarning, match="an `EndpointJudge`"):
        assert isinstance(JudgeLabeller("m", "http://127.0.0.1:9/v1"), EndpointJudge)
    assert Gold(length, is_free=False).is_free is False and Gold(length, name="rule").name == "rule"
