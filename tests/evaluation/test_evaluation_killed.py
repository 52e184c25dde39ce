"""`trl-ext evaluate` killed at any stage and repeated: the report of a run that was not, and no answer paid twice."""

import contextlib
import json
import threading
from collections import Counter

import pytest
import tiny
from judge_stub import endpoint, prefers_longer, shown
from killing import die, die_in_call, killed

from trl_ext import cli
from trl_ext.d2po import Gold
from trl_ext.evaluation import evaluate, report
from trl_ext.judges import EndpointJudge, JudgeError, RecordedJudge
from trl_ext.training.record_file import RecordError, RecordFile


PROMPTS = 6
CONCURRENCY = 8


class Server:
    """What a stub endpoint was asked. Questions after the first `limit` are held until `release`, and not answered."""

    def __init__(self):
        self.asked, self.answered, self.limit = Counter(), Counter(), None
        self.lock, self.released = threading.Lock(), threading.Event()

    def __call__(self, question, count):
        with self.lock:
            self.asked[question] += 1
            is_held = self.limit is not None and self.answered.total() >= self.limit
            if not is_held:
                self.answered[question] += 1
        if is_held:
            self.released.wait(30)
            return 503, {}, ""
        return prefers_longer(question)

    def release(self):
        with self.lock:
            self.limit = None
        self.released.set()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.write_models(tmp_path_factory.mktemp("killed"), PROMPTS)


@contextlib.contextmanager
def command(folders, output):
    """Arguments of the command with two models and a stub endpoint, and the endpoint's counts."""
    server = Server()
    with endpoint(server) as (url, _):
        words = ["evaluate", "--model", str(folders / "first"), str(folders / "second"), "--device", "cpu"]
        words += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
        words += ["--judge", f"endpoint:judge-1@{url}", "--output_dir", str(output)]
        words += ["--num_samples", "2", "--max_new_tokens", "6", "--distinct_length", "3"]
        try:
            yield words, server
        finally:
            server.release()


def read(output) -> dict:
    found = json.loads((output / "report.json").read_text())
    found["judge"]["name"] = found["judge"]["base_url"] = ""  # with the server's port
    return {**found, "created": 0, "seconds": 0}


@pytest.fixture(scope="module")
def whole(folders):
    """The report of a run that was not killed, and how many questions it asked."""
    with command(folders, folders / "whole") as (words, server):
        assert cli.main(words) == 0
    assert set(server.asked.values()) == {1}
    return read(folders / "whole"), server.asked.total()


def die_after_verdict(number: int) -> None:
    append, calls = RecordFile.append, []

    def counted(self, entries):
        append(self, entries)
        calls.append(None)
        if len(calls) == number:
            die()

    RecordFile.append = counted


STAGES = {
    "before sampling": lambda: die_in_call(evaluate, "sample_responses", 1),
    "in the middle of judging": lambda: die_after_verdict(5),
    "between models": lambda: die_in_call(evaluate, "score_pairs", 2),
    "while the first report is written": lambda: die_in_call(report.Path, "replace", 1),
    "between the last report's files": lambda: die_in_call(report.Path, "replace", 4),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed(stage, folders, whole, tmp_path, capsys):
    """
    Killed with SIGKILL and repeated: the report is the one of the run that was not killed, to the bit but for time and
    port; no question that was answered is asked again, and at most those under way when the process died are.
    """
    expected, questions = whole
    with command(folders, tmp_path) as (words, server):
        is_judging = stage == "in the middle of judging"
        server.limit = 5 if is_judging else None

        def run():
            STAGES[stage]()
            cli.main(words)

        killed(run)
        before = server.answered.total()
        held = server.asked - server.answered
        server.release()
        assert (before > 0) == (stage != "before sampling")
        assert held.total() <= (CONCURRENCY if is_judging else 0)
        assert cli.main(words) == 0
        output = capsys.readouterr().out
        assert set(server.answered.values()) == {1} and server.answered.total() == questions
        assert server.asked - server.answered == held
        if is_judging:  # once more: nothing is asked
            assert cli.main(words) == 0 and server.answered.total() == questions
    assert str(tmp_path / "verdicts.jsonl") in output
    assert json.dumps(read(tmp_path)) == json.dumps(expected)
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == questions


def ask(judge, completions=("a long one", "s"), opponents=("short", "longer")):
    return judge(["p0", "p1"], list(completions), list(opponents), answer=["x", "y"])


def test_what_is_asked_anew(tmp_path):
    """
    Another model, template, setting, parser, response or order is another question; a column that the template does
    not show is not. A question that stands twice in a call is asked once.
    """
    server = Server()

    def parse(reply):
        return {"A": 1.0, "B": 0.0}.get(reply)

    with endpoint(server) as (url, _):

        def asked(judge, *rows) -> int:
            before, recorded = server.asked.total(), RecordedJudge(judge, tmp_path / "verdicts.jsonl")
            assert ask(recorded, *rows) == ask(judge, *rows)
            recorded.record.close()
            return server.asked.total() - before - 2  # without those of the judge by itself

        template = "{prompt}\n### Response A\n{completion_a}\n\n### Response B\n{completion_b}\n\n### Verdict {answer}"
        judge = EndpointJudge("judge-1", url)
        assert [asked(judge), asked(judge)] == [2, 0]
        assert [asked(judge, ("short", "longer"), ("a long one", "s"))] == [2]
        assert [asked(judge, ("a long one", "new"))] == [1]
        for other in (
            EndpointJudge("judge-2", url),
            EndpointJudge("judge-1", url, max_tokens=9),
            EndpointJudge("judge-1", url, template=template),
            EndpointJudge("judge-1", url, parse=parse),
            Gold(judge, name="me"),
        ):
            judged = RecordedJudge(other, tmp_path / "verdicts.jsonl")
            before = server.asked.total()
            first = list(ask(judged))
            assert server.asked.total() - before == 2 and list(ask(judged)) == first
            assert server.asked.total() - before == 2
            judged.record.close()
        twice, before = RecordedJudge(judge, tmp_path / "twice.jsonl"), server.asked.total()
        assert twice(["p"] * 3, ["aa"] * 3, ["b"] * 3) == [1.0] * 3 and server.asked.total() - before == 1
    assert shown("### Response A\na\n\n### Response B\nb\n\n### Verdict") == ("a", "b")


def test_a_judge_that_fails_keeps_its_answers(tmp_path):
    """Answers that came before a failure, or with it, are in the record."""
    with endpoint(lambda question, count: (400, {}, "") if "bad" in question else "A") as (url, seen):
        judge = RecordedJudge(EndpointJudge("judge-1", url, concurrency=1), tmp_path / "verdicts.jsonl")
        with pytest.raises(JudgeError, match="HTTP 400"):
            judge(["p"] * 3, ["one", "bad", "three"], ["x"] * 3)
        assert judge(["p"], ["one"], ["x"]) == [1.0] and len(seen) == 2


@pytest.mark.parametrize(
    "line",
    ["{}", "[1]", '{"key": "k"}', '{"key": "k", "verdict": 17.5}', '{"key": "k", "verdict": NaN}',
     '{"key": "k", "reward": Infinity}', '{"key": 1, "verdict": 0}'],
)  # fmt: skip
def test_a_record_is_checked(line, tmp_path):
    """A line that is no verdict is named, and a record that another run writes is refused, before anybody is asked."""
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"key": "k", "verdict": 0.5}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*verdicts\.jsonl"):
        RecordedJudge(EndpointJudge("judge-1", "http://localhost:1"), path)
    path.unlink()
    first = RecordedJudge(EndpointJudge("judge-1", "http://localhost:1"), path)
    with pytest.raises(RecordError, match="another process"):
        RecordedJudge(EndpointJudge("judge-1", "http://localhost:1"), path)
    first.record.close()


PAIRS = """
from __future__ import annotations
import dataclasses, pathlib, signal, threading

LONGER = 1.0

@dataclasses.dataclass  # looks its module up
class Counts:
    asked: int = 0

counts = Counts()

def ask(prompts, a, b):
    for x, y in zip(a, b):
        counts.asked += 1
        with open(__file__ + ".log", "a") as log:
            log.write("asked\\n")
        if pathlib.Path(__file__ + ".stop").exists() and counts.asked == 3:
            signal.raise_signal(signal.SIGINT)
        yield LONGER if len(x) > len(y) else 1 - LONGER
"""


def test_a_function_on_pairs_may_be_paid(folders, tmp_path, capsys, ctrl_c):
    """
    `FILE.py:NAME`: its verdicts are kept as they arrive, also the one that is under way at Ctrl-C. The same file is
    asked nothing twice, a file that was changed is asked anew.
    """
    judge, stop = tmp_path / "json.py", tmp_path / "json.py.stop"
    judge.write_text(PAIRS)
    stop.touch()
    words = ["evaluate", "--model", str(folders / "first"), "--device", "cpu", "--num_samples", "1"]
    words += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
    words += ["--judge", f"{judge}:ask", "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "6"]

    def asked() -> int:
        return (tmp_path / "json.py.log").read_text().count("asked")

    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    verdicts = tmp_path / "out" / "verdicts.jsonl"
    assert asked() == 3 == len(verdicts.read_text().splitlines())
    stop.unlink()
    assert cli.main(words) == 0 and str(verdicts) in capsys.readouterr().out
    whole = asked()
    assert whole == len(verdicts.read_text().splitlines()) > 3
    assert cli.main(words) == 0 and asked() == whole
    judge.write_text(PAIRS.replace("LONGER = 1.0", "LONGER = 0.75"))
    assert cli.main(words) == 0 and asked() == 2 * whole
