"""Verdicts of judges that cost money, kept in a file as they arrive, so that a repeated command asks for none again."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..training.interrupts import InterruptGuard
from ..training.record_file import RecordError, RecordFile, check_probability, format_entry, parse_object
from .callables import Judge, _accepted
from .verdicts import IndexedVerdict, JudgeError, normalize_verdict


logger = logging.getLogger(__name__)


class VerdictRecord(RecordFile):
    """
    Append-only file of a judge's answers, see [`~trl_ext.training.record_file.RecordFile`].

    Each entry has:
        - `key`: hash of the judge's identity, the prompt, the completions in their order, and the columns that the
          judge takes.
        - `judge`: its name.
        - `prompt`, `completion_a`, `completion_b`, `verdict`: probability that `completion_a` is better, `null`
          without a verdict. Or `prompt`, `completion`, `reward`.
    """

    _name = "record of verdicts"
    _entry = "verdict"
    _place = "Or give this run an `output_dir` of its own."

    def _parse(self, line: bytes) -> dict:
        entry = parse_object(line)
        if not isinstance(entry.get("key"), str):
            raise ValueError("it has no 'key'")
        if ("verdict" in entry) == ("reward" in entry):
            raise ValueError("it has no 'verdict' and no 'reward', or both")
        check_probability(entry, "verdict")
        reward = entry.get("reward")
        if reward is not None and (type(reward) not in (int, float) or not math.isfinite(reward)):
            raise ValueError(f"its 'reward' is {reward!r}, not a finite number or null")
        return entry


class RecordedJudge(Judge):
    """
    A judge whose answers are read from a record where they are in it; what is missing is asked for, each question
    once, and appended to the record as it arrives. Another judge, with other settings, or another question is asked
    anew.

    An answer that is under way when the process is killed is lost. After any other interruption, such as Ctrl-C, the
    judge sends no more questions, and the answers under way are kept; a second Ctrl-C does not wait for them.

    Args:
        judge ([`Judge`]):
            The judge. [`Judge.identity`] must tell it from others.
        path (`str` or `Path`):
            The file, opened and locked at once.

    Raises:
        `ValueError`: If a line of the file is not a verdict.
        [`~trl_ext.training.record_file.RecordError`]: If the file cannot be written, or another process writes to it.
    """

    def __init__(self, judge: Judge, path: str | Path):
        self.judge = judge
        self.name, self.symmetric, self.has_rewards = judge.name, judge.symmetric, judge.has_rewards
        self.is_free = judge.is_free
        self.record = VerdictRecord(path)
        self.record.open()
        self._known = {entry["key"]: entry for entry in self.record.entries}
        self._identity = judge.identity()

    def __call__(self, prompts, completions_a, completions_b, **columns):
        rows = {"prompt": prompts, "completion_a": completions_a, "completion_b": completions_b}
        taken = self.judge.taken_columns(columns)

        def ask(indices: list[int]) -> _Indexed:
            lists = [[values[i] for i in indices] for values in rows.values()]
            return _Indexed(lambda: self.judge.stream(*lists, **_rows(columns, indices)), len(indices), self.name)

        return self._answer("verdict", rows, taken, ask)

    def rewards(self, prompts, completions, **columns):
        rows = {"prompt": prompts, "completion": completions}
        columns = _accepted(self.judge.rewards, columns)

        def ask(indices: list[int]) -> _Indexed:
            lists = [[values[i] for i in indices] for values in rows.values()]
            return _Indexed(lambda: self.judge.rewards(*lists, **_rows(columns, indices)), len(indices), self.name)

        return self._answer("reward", rows, columns, ask)

    def _answer(
        self, field: str, rows: dict[str, list], columns: dict[str, list], ask: Callable[[list[int]], "_Indexed"]
    ) -> list:
        """One answer a row, those that the record lacks by `ask(indices)`."""
        count = len(rows["prompt"])
        shown = [{name: values[i] for name, values in rows.items()} for i in range(count)]
        taken = [{name: values[i] for name, values in sorted(columns.items())} for i in range(count)]
        keys = [self._key(field, row, own) for row, own in zip(shown, taken, strict=True)]
        first: dict[str, int] = {}  # a question that stands twice is asked once
        for i, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, i)
        missing = list(first.values())
        requests = [{"key": keys[i], "judge": self.name, **shown[i]} for i in missing]
        if missing:
            try:
                self.record.reserve(sum(len(format_entry(request)) + 40 for request in requests))
                self._ask(field, requests, ask(missing))
            except RecordError as error:
                raise JudgeError(str(error)) from error
        return [self._known[key][field] for key in keys]

    def _ask(self, field: str, requests: list[dict], answers: "_Indexed") -> None:
        given: set[int] = set()
        try:
            for index, answer in answers:
                self._keep(field, requests[index], answer)
                given.add(index)
            answers.check()
        except BaseException:
            self._keep_under_way(field, requests, answers)
            raise
        if len(given) < len(requests):
            raise JudgeError(f"The judge {self.name} gave {len(given)} answers to {len(requests)} questions.")

    def _keep(self, field: str, request: dict, answer: Any) -> None:
        try:
            value = normalize_verdict(answer) if field == "verdict" else _reward(answer)
        except ValueError as error:
            raise JudgeError(f"The judge {self.name} {error}") from None
        self.record.append([{**request, field: value}])
        self._known[request["key"]] = self.record.entries[-1]

    def _keep_under_way(self, field: str, requests: list[dict], answers: "_Indexed") -> None:
        """Has the judge send no more questions, and keeps the answers to those under way, which are paid for."""
        if not hasattr(answers, "call_off"):
            return
        answers.call_off()
        try:
            for index, answer in answers:
                self._keep(field, requests[index], answer)
        except Exception as error:  # why the run stops is known already
            logger.warning(f"The judge {self.name} failed ({type(error).__name__}: {error}).")

    def _key(self, field: str, row: dict, columns: dict) -> str:
        question = json.dumps([field, self._identity, row, columns], sort_keys=True, default=str)
        return hashlib.sha256(question.encode()).hexdigest()[:32]

    def taken_columns(self, columns):
        return self.judge.taken_columns(columns)

    def needed_columns(self):
        return self.judge.needed_columns()

    def identity(self):
        return self._identity

    def describe(self):
        return self.judge.describe()


class _Indexed(Iterator[tuple[int, Any]]):
    """Answers in any of the forms of [`Judge.stream`], each with its index; `call_off` if the judge's have it."""

    def __init__(self, ask: Callable[[], Iterable], count: int, name: str):
        self._guard = InterruptGuard(f"the answer of the judge {name}")
        # A judge that returns a list answers here; all of its answers are then at hand.
        answers = self._guard.run(ask)
        self._is_at_hand = hasattr(answers, "__len__")
        self._answers, self._count, self._name = iter(answers), count, name
        self._next = 0
        if hasattr(self._answers, "call_off"):
            self.call_off = self._answers.call_off

    def __next__(self) -> tuple[int, Any]:
        if self._is_at_hand or hasattr(self, "call_off"):
            answer = next(self._answers)
        else:
            answer = self._guard.run(lambda: next(self._answers))
        index, value = answer if isinstance(answer, IndexedVerdict) else (self._next, answer)
        self._next += 1
        if not 0 <= index < self._count:
            raise JudgeError(f"The judge {self._name} gave an answer to question {index} of {self._count}.")
        return index, value

    def check(self) -> None:
        """Raises the `KeyboardInterrupt` that came while the last answer was under way."""
        self._guard.check()


def _rows(columns: dict[str, list], indices: list[int]) -> dict[str, list]:
    return {name: [values[i] for i in indices] for name, values in columns.items()}


def _reward(value: Any) -> float | None:
    number = None if value is None else float(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"gave the reward {number!r}.")
    return number
