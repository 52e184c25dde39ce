"""Buying labels: budget, replay, retries, and labelers that misbehave."""

import errno
import logging
import tempfile
import threading
import time

import pytest
from accelerate import Accelerator

from trl_ext.d2po import CallableLabeller, LabellerError, Ledger, TerminalLabeller
from trl_ext.d2po.labellers import as_labeller
from trl_ext.d2po.labelling import STREAK, GoldLabels, normalize_verdict
from trl_ext.d2po.window import Completion, Pair
from trl_ext.evaluation import Judge, JudgeError
from trl_ext.judges.endpoint import _Answers, _CalledOff


def pair(number: int, columns=None) -> Pair:
    first, second = (Completion([number, side, 7], f"{number} {side}") for side in (1, 2))
    return Pair(f"prompt {number}", [number], first, second, columns or {}, scores=[0.5, -0.5])


def first_of_the_numbers(prompts, completions_a, completions_b):
    """Prefers the side 1, wherever it is shown."""
    return [1 if a.endswith("1") else 0 for a in completions_a]


def gold(labeller, tmp_path, **options) -> GoldLabels:
    settings = dict(budget=None, batch_size=4, retries=0, retry_delay=0.0, timeout=None, seed=0)
    labels = GoldLabels(
        CallableLabeller(labeller) if not hasattr(labeller, "name") else labeller,
        tmp_path / "gold.jsonl",
        accelerator=Accelerator(cpu=True),
        show_progress=False,
        **{**settings, **options},
    )
    labels.begin()
    return labels


# ---- What is bought -------------------------------------------------------------------------------------------------


def test_entries_and_order_of_showing(tmp_path):
    """
    Each entry says what was shown, in random order, and what came back; the labels are found again by comparison.
    """
    labels = gold(first_of_the_numbers, tmp_path)
    pairs = [pair(i, {"answer": i}) for i in range(40)]
    labels.labeller.function = lambda prompts, a, b, answer: first_of_the_numbers(prompts, a, b)
    entries = labels.label(pairs, window=3, step=12)
    shown_first = [entry["completion_a"] == p.first.text for entry, p in zip(entries, pairs, strict=True)]
    assert 10 <= sum(shown_first) <= 30
    for entry, p, is_first in zip(entries, pairs, shown_first, strict=True):
        a, b = (p.first, p.second) if is_first else (p.second, p.first)
        assert entry["completion_a_ids"] == a.ids and entry["completion_b_ids"] == b.ids
        assert entry["scores"] == ([0.5, -0.5] if is_first else [-0.5, 0.5])
        assert entry["verdict"] == float(is_first) and entry["window"] == 3 and entry["step"] == 12
        assert entry["labeller"] == "first_of_the_numbers" and entry["cost"] == 1.0
        assert entry["columns"] == {"answer": int(p.prompt.split()[1])}
        assert labels.known(p) == entry
    assert Ledger(labels.path, read_only=True).entries == labels.entries
    assert labels.counts() == {"first_of_the_numbers": 40}


def test_nothing_is_bought_twice(tmp_path):
    """
    A run that begins again uses the ledger where it asks for the same, in any order of the two completions, and what
    nobody asks for again goes to the discriminator one window later.
    """
    asked = []

    def labeller(prompts, a, b):
        asked.extend(prompts)
        return first_of_the_numbers(prompts, a, b)

    labels = gold(labeller, tmp_path)
    first = labels.label([pair(1), pair(2), pair(3)], window=0, step=0)
    labels.close()

    again = gold(labeller, tmp_path)
    assert again.used == [] and again.known(pair(1)) is None  # not known before it is asked for
    swapped = pair(2)
    swapped.first, swapped.second = swapped.second, swapped.first
    entries = again.label([swapped, pair(4)], window=0, step=0)
    assert entries[0] == first[1] and asked == ["prompt 1", "prompt 2", "prompt 3", "prompt 4"]
    assert again.used == [1, 3]
    again.absorb_unclaimed(0)
    assert again.used == [1, 3]
    again.absorb_unclaimed(1)
    assert sorted(again.used) == [0, 1, 2, 3] and again.known(pair(3)) is not None
    state = again.state_dict()
    again.close()

    resumed = GoldLabels(None, again.path, None, 4, 0, 0.0, None, 0, Accelerator(cpu=True))
    resumed.begin(**state)
    assert resumed.used == state["used"] and resumed.known(pair(4))["prompt"] == "prompt 4"
    with pytest.raises(ValueError, match="after 10 gold labels, but the ledger .* holds 4"):
        resumed.begin(used=[9])


def test_budget_counts_everything_in_the_ledger(tmp_path):
    """
    Ties and missing verdicts cost as well; what an earlier run bought counts; beyond the budget nothing is asked.
    """
    verdicts = iter([1, -1, None, 0])
    labels = gold(lambda prompts, a, b: [next(verdicts) for _ in prompts], tmp_path, budget=4)
    assert labels.remaining == 4
    entries = labels.label([pair(i) for i in range(3)], 0, 0)
    assert [entry["verdict"] for entry in entries] == [1.0, 0.5, None] and labels.remaining == 1
    labels.close()
    other = gold(lambda prompts, a, b: [1 for _ in prompts], tmp_path, budget=4)
    entries = other.label([pair(i) for i in range(10, 14)], 0, 0)
    assert [entry is not None for entry in entries] == [True, False, False, False]
    assert len(Ledger(other.path, read_only=True)) == 4


# ---- Labelers that misbehave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2, -0.5, -2, "A", [1], {}], ids=repr)
def test_verdicts_that_are_none(value):
    with pytest.raises(LabellerError, match="me gave the verdict"):
        normalize_verdict(value, "me")


def test_verdicts():
    import numpy
    import torch

    values = [1, 0, -1, 0.3, True, None, numpy.float32(1), torch.tensor(0)]
    assert [normalize_verdict(value, "me") for value in values] == [1.0, 0.0, 0.5, 0.3, 1.0, None, 1.0, 0.0]


@pytest.mark.parametrize(
    "labeller, message, kept",
    [
        (lambda p, a, b: [1] * (len(p) - 1), "gave 3 verdicts for 4 pairs", 0),
        (lambda p, a, b: [1] * (len(p) + 1), "gave 5 verdicts for 4 pairs", 0),
        (lambda p, a, b: [1, 0, float("nan"), 1], "gave the verdict nan", 2),
        (lambda p, a, b: (v for v in (1, 0, "first")), "gave the verdict 'first'", 2),
        (lambda p, a, b: (v for v in (1, 0)), "gave no more verdicts after 2 of 4", 2),
        (lambda p, a, b: (1 for _ in range(9)), "gave more than 4 verdicts for 4 pairs", 4),
        (lambda p, a, b: 1, "gave a `int`, not a list of 4 verdicts", 0),
        (lambda p, a, b: "AABB", "gave a `str`, not a list", 0),
        (lambda p, a, b: None, "gave a `NoneType`, not a list", 0),
    ],
)
def test_answers_that_cannot_be_used(labeller, message, kept, tmp_path):
    """
    The run stops with a sentence; the good verdicts before it are in the ledger, and the message says how to go on.
    """
    labels = gold(labeller, tmp_path, retries=3)
    with pytest.raises(LabellerError, match=message) as error:
        labels.label([pair(i) for i in range(4)], 0, 0)
    assert f"{kept} gold labels are in" in str(error.value) and "resume_from_checkpoint=True" in str(error.value)
    path = tmp_path / "gold.jsonl"
    assert (len(Ledger(path, read_only=True)) if path.exists() else 0) == kept


def test_failures_are_retried_and_answers_kept(tmp_path, caplog):
    """A labeler that breaks off is asked again, for what is missing only."""
    asked = []

    def flaky(prompts, a, b):
        asked.append(list(prompts))
        for i in range(len(prompts)):
            if len(asked) == 1 and i == 2:
                raise ConnectionError("line dropped")
            yield 1

    labels = gold(flaky, tmp_path, retries=1)
    assert len(labels.label([pair(i) for i in range(4)], 0, 0)) == 4
    assert asked == [[f"prompt {i}" for i in range(4)], ["prompt 2", "prompt 3"]]
    assert "line dropped" in caplog.text

    def broken(prompts, a, b):
        raise ConnectionError("line dropped")

    labels.labeller = CallableLabeller(broken)
    with pytest.raises(LabellerError, match="broken failed 2 times, at last with ConnectionError: line dropped"):
        labels.label([pair(9)], 0, 0)
    # The labels of the call are used when the run goes on with a labeler that works.
    labels.labeller = CallableLabeller(first_of_the_numbers)
    assert labels.label([pair(9)], 0, 0)[0]["verdict"] in (0.0, 1.0)


def test_a_judge_that_gives_up_is_not_asked_again(tmp_path):
    """It has repeated what may be repeated. What it answered before is kept, and the message says how to go on."""
    calls = []

    class Tired(Judge):
        name = "tired"

        def __call__(self, prompts, completions_a, completions_b):
            calls.append(len(prompts))
            yield 1.0
            raise JudgeError("The judge tired did not answer.")

    labels = gold(as_labeller(Tired()), tmp_path, retries=3)
    with pytest.raises(
        LabellerError, match="tired did not answer. 1 gold labels are in .*resume_from_checkpoint=True"
    ):
        labels.label([pair(i) for i in range(4)], 0, 0)
    assert calls == [4] and len(Ledger(labels.path, read_only=True)) == 1


def test_timeout(tmp_path):
    """The time is that of one verdict: a slow but steady labeler is not stopped, a hanging one is."""

    def steady(prompts, a, b):
        for _ in prompts:
            time.sleep(0.03)
            yield 1

    def hanging(prompts, a, b):
        yield 0
        time.sleep(3)
        yield 0

    labels = gold(steady, tmp_path, timeout=0.5)
    assert len(labels.label([pair(i) for i in range(4)], 0, 0)) == 4
    labels.labeller, labels.timeout = CallableLabeller(hanging), 0.1
    with pytest.raises(LabellerError, match="no verdict within `label_timeout=0.1` seconds"):
        labels.label([pair(i) for i in range(10, 14)], 0, 0)
    assert len(labels.entries) == 5


@pytest.mark.parametrize("verdict, position", [(1, "first"), (0, "second"), (0.9, "first")])
def test_always_the_same_position(verdict, position, tmp_path):
    """The order of showing is random, so a labeler that always names the same place does not look."""
    labels = gold(lambda p, a, b: [verdict] * len(p), tmp_path)
    assert len(labels.label([pair(i) for i in range(STREAK - 1)], 0, 0)) == STREAK - 1
    with pytest.raises(LabellerError, match=f"preferred the {position} completion {STREAK} times in a row"):
        labels.label([pair(STREAK)], 0, 0)
    # One that looks never gets there, though the same completion always wins.
    honest = gold(first_of_the_numbers, tmp_path / "honest")
    assert len(honest.label([pair(i) for i in range(3 * STREAK)], 0, 0)) == 3 * STREAK


def test_always_a_tie(tmp_path, caplog):
    labels = gold(lambda p, a, b: [-1] * len(p), tmp_path)
    with caplog.at_level(logging.WARNING):
        labels.label([pair(i) for i in range(STREAK)], 0, 0)
    assert "were all ties or none at all" in caplog.text


# ---- The ledger fails -----------------------------------------------------------------------------------------------


def counted(asked):
    def labeller(prompts, a, b):
        asked.extend(prompts)
        return [len(asked) % 2] * len(prompts)

    return labeller


def test_a_second_run_asks_nobody(tmp_path):
    """Two runs that begin with a ledger that is not there yet: the second is refused before it asks."""
    pytest.importorskip("fcntl")
    first = gold(counted([]), tmp_path)
    with pytest.raises(RuntimeError, match="is being written by another process"):
        gold(counted([]), tmp_path)
    first.close()
    gold(counted([]), tmp_path).close()


@pytest.mark.parametrize("fails", ["reserve", "append"])
def test_a_disk_that_is_full(fails, tmp_path, monkeypatch):
    """
    Without room for the answers nobody is asked. A write that fails all the same stops the run, without asking again;
    what was answered is in the ledger or in the file that the message names.
    """
    asked = []
    labels = gold(counted(asked), tmp_path, retries=3)
    labels.label([pair(i) for i in range(4)], 0, 0)
    no_room = OSError(errno.ENOSPC, "No space left on device")
    if fails == "reserve":

        def full(*args, **kwargs):
            raise no_room

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
    else:
        write, written = labels._ledger._write, []

        def second_fails(line):
            if written:
                raise no_room
            written.append(line)
            write(line)

        monkeypatch.setattr(labels._ledger, "_write", second_fails)
    with pytest.raises(LabellerError, match="gold.jsonl` cannot be written .*No space left.*resume_from_checkpoint"):
        labels.label([pair(i) for i in range(4, 8)], 1, 1)
    assert len(asked) == (4 if fails == "reserve" else 8)
    kept = [entry["prompt"] for path in tmp_path.glob("*.jsonl") for entry in Ledger(path, read_only=True).entries]
    assert sorted(kept) == sorted(asked)


class Concurrent(Judge):
    """Asks up to three questions at once, as an endpoint is asked, and counts what it has sent."""

    name = "concurrent"

    def __init__(self):
        self.sent, self.release = [], threading.Event()

    def _ask(self, prompt, stop):
        if stop.is_set():
            raise _CalledOff
        self.stop = stop
        self.sent.append(prompt)
        if prompt != "prompt 0":  # the first answer comes while the others are under way
            self.release.wait(5)
        return 1.0

    def stream(self, prompts, completions_a, completions_b):
        return _Answers(self._ask, prompts, 3)


@pytest.mark.parametrize("timeout", [None, 5], ids=["here", "in a thread"])
@pytest.mark.parametrize("why", ["disk", "no verdict", "interrupt"])
def test_labels_under_way_are_kept(why, timeout, tmp_path, monkeypatch):
    """
    The run stops while questions are under way: nothing more is asked, what was asked is paid for, and is in the
    ledger or in the file that the message names. A run that goes on asks for the rest alone.
    """
    judge = Concurrent()
    labels = gold(as_labeller(judge), tmp_path, timeout=timeout, batch_size=8)
    pairs = [pair(i) for i in range(8)]
    original = labels._keep

    def fails(answers, requests, given, bar=None):
        monkeypatch.setattr(labels, "_keep", original)
        while len(judge.sent) < 4:  # one has come, three are under way
            time.sleep(0.01)
        threading.Timer(0.1, judge.release.set).start()
        if why == "disk":
            write = labels._ledger._write

            def full(line):
                monkeypatch.setattr(labels._ledger, "_write", write)
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(labels._ledger, "_write", full)
        elif why == "no verdict":
            answers = [(index, 17.5) for index, _ in answers]
        original(answers, requests, given, bar)
        if why == "interrupt":
            raise KeyboardInterrupt

    monkeypatch.setattr(labels, "_keep", fails)
    expected, message = {
        "disk": (LabellerError, "No space left.*rescued"),
        "no verdict": (LabellerError, "gave the verdict 17.5"),
        "interrupt": (KeyboardInterrupt, None),
    }[why]
    with pytest.raises(expected, match=message):
        labels.label(pairs, 0, 0)
    labels.close()
    assert len(judge.sent) == 4
    kept = [entry["prompt"] for path in tmp_path.glob("*.jsonl") for entry in Ledger(path, read_only=True).entries]
    lost = {"prompt 0"} if why == "no verdict" else set()
    assert sorted(kept) == sorted(set(judge.sent) - lost)
    for rescued in tmp_path.glob("*rescued*"):
        labels.path.write_bytes(labels.path.read_bytes() + rescued.read_bytes())
    again = gold(as_labeller(judge), tmp_path, batch_size=8)
    assert all(again.label(pairs, 0, 0)) and len(judge.sent) == 8 + len(lost)
    again.close()


def test_an_interrupt_while_waiting_loses_nothing(tmp_path, ctrl_c):
    """Ctrl-C comes while the main thread waits for an answer, in its own thread or in another's."""
    for timeout in (None, 5):
        judge = Concurrent()
        labels = gold(as_labeller(judge), tmp_path / str(timeout), timeout=timeout, batch_size=8)

        def interrupt(judge=judge):
            while len(judge.sent) < 4:
                time.sleep(0.01)
            ctrl_c()
            while not judge.stop.is_set():
                time.sleep(0.01)
            judge.release.set()

        timer = threading.Thread(target=interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            labels.label([pair(i) for i in range(8)], 0, 0)
        timer.join()
        labels.close()
        assert len(judge.sent) == len(Ledger(labels.path, read_only=True)) < 8


@pytest.mark.parametrize("timeout", [None, 5], ids=["here", "in a thread"])
@pytest.mark.parametrize("kind", ["one by one", "all at once"])
def test_an_interrupt_waits_for_the_answer_under_way(kind, timeout, tmp_path, ctrl_c):
    """A labeler that asks one question at a time: the answer under way is kept, and no other question is asked."""
    asked = []

    def ask(prompt):
        asked.append(prompt)
        if len(asked) == 2:
            time.sleep(0.1)
            ctrl_c()
            time.sleep(0.2)
        return 1

    def one_by_one(prompts, a, b):
        yield from map(ask, prompts)

    def all_at_once(prompts, a, b):
        return [ask(prompt) for prompt in prompts]

    labeller = one_by_one if kind == "one by one" else all_at_once
    labels = gold(labeller, tmp_path, timeout=timeout, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        labels.label([pair(i) for i in range(6)], 0, 0)
    labels.close()
    kept = [entry["prompt"] for entry in Ledger(labels.path, read_only=True).entries]
    assert sorted(kept) == sorted(asked) and len(asked) == (2 if kind == "one by one" else 3)
    again = gold(labeller, tmp_path, batch_size=3)
    assert all(again.label([pair(i) for i in range(6)], 0, 0)) and len(asked) == 6
    again.close()


@pytest.mark.parametrize("timeout", [None, 5], ids=["here", "in a thread"])
def test_a_second_interrupt_stops_at_once(timeout, tmp_path, ctrl_c):
    """What had come before is kept. A person at the terminal is not waited for at all."""
    released = threading.Event()

    def hangs(prompts, a, b):
        yield 1
        for _ in range(2):
            released.wait(0.2)
            ctrl_c()
        released.wait(20)
        yield 1

    labels, start = gold(hangs, tmp_path, timeout=timeout), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        labels.label([pair(i) for i in range(4)], 0, 0)
    assert time.monotonic() - start < 10 and len(labels._ledger) == 1
    released.set()
    labels.close()

    def read(question):
        ctrl_c()
        time.sleep(0.2)
        return "a"

    person = gold(TerminalLabeller("me", read=read, write=lambda text: None), tmp_path / "person")
    with pytest.raises(KeyboardInterrupt):
        person.label([pair(0)], 0, 0)
    assert len(person._ledger) == 0
    person.close()


def test_texts_with_line_separators_are_labels(tmp_path):
    asked = []
    labels = gold(counted(asked), tmp_path, budget=4)
    odd = pair(0, {"note": "a\u2028b\ud800"})
    odd.first.text = "one\u2028two"
    others = [pair(i, {"note": ""}) for i in (1, 2, 3)]
    assert all(labels.label([odd, *others], 0, 0)) and labels.remaining == 0 and len(asked) == 4


# ---- Nothing is paid twice ------------------------------------------------------------------------------------------


def test_the_same_comparison_is_bought_once(tmp_path):
    """Twice in a call, and again in a later one, in either order of the completions."""
    asked = []
    labels = gold(counted(asked), tmp_path, budget=3)
    swapped = pair(1)
    swapped.first, swapped.second = swapped.second, swapped.first
    entries = labels.label([pair(1), pair(2), swapped, pair(1)], 0, 0)
    assert entries[0] == entries[2] == entries[3] and len(asked) == 2 and labels.used == [0, 1]
    assert labels.label([pair(2)], 1, 1) == [entries[1]] and len(asked) == 2 and labels.remaining == 1


def test_a_doubled_line_counts_once(tmp_path, caplog):
    """A line that stands twice in the ledger is used, and counted in the budget, once, with a warning."""
    labels = gold(counted([]), tmp_path, budget=5)
    labels.label([pair(i) for i in range(4)], 0, 0)
    labels.close()
    lines = labels.path.read_bytes().splitlines(keepends=True)
    labels.path.write_bytes(b"".join([*lines, lines[0]]))
    asked = []
    again = gold(counted(asked), tmp_path, budget=5)
    assert "1 lines of the ledger" in caplog.text and "holds 4 gold labels that were bought before" in caplog.text
    again.absorb_unclaimed(1)
    assert again.used == [0, 1, 2, 3] and again.counts() == {"labeller": 4}
    assert [e is not None for e in again.label([pair(8), pair(9)], 1, 1)] == [True, False] and len(asked) == 1


def test_late_answers_are_kept(tmp_path):
    """
    A late call is waited for, not repeated; what it answers after the run has stopped is in the ledger, and used.
    """
    asked, go_on = [], threading.Event()

    def slow(prompts, a, b):
        for prompt in prompts:
            asked.append(prompt)
            if len(asked) == 2:
                go_on.wait(5)
            yield 1

    labels = gold(slow, tmp_path, timeout=0.1, retries=1)
    with pytest.raises(LabellerError, match="no verdict within `label_timeout=0.1` seconds, waited for 2"):
        labels.label([pair(i) for i in range(4)], 0, 0)
    assert len(labels.entries) == 1
    go_on.set()
    labels.timeout = 5
    entries = labels.label([pair(i) for i in range(4)], 0, 0)
    assert all(entries) and sorted(asked) == [f"prompt {i}" for i in range(4)]
    labels.close()
    assert len(Ledger(labels.path, read_only=True)) == 4


def test_what_has_come_when_the_run_ends_is_kept(tmp_path):
    go_on, done = threading.Event(), threading.Event()

    def late(prompts, a, b):
        go_on.wait(5)
        yield 1
        done.set()
        yield 0

    labels = gold(late, tmp_path, timeout=0.05)
    with pytest.raises(LabellerError, match="no verdict within"):
        labels.label([pair(0), pair(1)], 0, 0)
    go_on.set()
    for _ in range(100):
        if labels._call._received.qsize():
            break
        time.sleep(0.02)
    labels.close()
    assert len(Ledger(labels.path, read_only=True)) == 1 and not done.is_set()  # and nothing more was asked
    # A card says so whether or not the run has begun.
    assert (
        GoldLabels(None, labels.path, None, 4, 0, 0.0, None, 0, Accelerator(cpu=True)).describe()
        == "1 by late (cost 1)"
    )
