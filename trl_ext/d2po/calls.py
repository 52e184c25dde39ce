"""One call of the labeler: its answers as they arrive, in this thread or in one of its own."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from ..judges.verdicts import IndexedVerdict
from ..training.interrupts import InterruptGuard
from .labellers import Labeller, LabellerError


class Answers(Iterator[list[tuple[int, Any]]]):
    """
    The verdicts of one call of the labeler with their indices: all at once from a list, one by one from an iterator.

    Ctrl-C in the main thread lets the verdict under way arrive, and is raised in place of the next; a second one is
    raised at once. A labeler that is asked several questions at once is interrupted at once: see [`call_off`].

    Args:
        labeller ([`Labeller`]): Who is asked.
        requests (`list[dict]`): What is asked; see [`GoldLabels._request`].
    """

    def __init__(self, labeller: Labeller, requests: list[dict]):
        self._labeller, self._requests = labeller, requests
        self._given: set[int] = set()
        self._stream: Iterator | None = None
        self._is_done = False
        self._guard = InterruptGuard(f"the answer of the labeler {labeller.name}")

    def __next__(self) -> list[tuple[int, Any]]:
        self._guard.check()
        if self._is_done:
            raise StopIteration
        name, count = self._labeller.name, len(self._requests)
        if self._stream is None:
            answer = self._guard.run(self._call)
            if hasattr(answer, "__len__"):
                self._is_done = True
                if len(answer) == count:
                    return list(enumerate(answer))
                raise LabellerError(
                    f"The labeler {name} gave {len(answer)} verdicts for {count} pairs, so it is not known which "
                    "belongs to which. Nothing was kept. Give one a pair, in their order, and None where there is "
                    "none."
                )
            self._stream = iter(answer)
        try:
            verdict = self._next_of(self._stream)
        except StopIteration:
            self._is_done = True
            raise
        index, value = verdict if isinstance(verdict, IndexedVerdict) else (len(self._given), verdict)
        if not 0 <= index < count or index in self._given:
            self._is_done = True
            raise LabellerError(
                f"The labeler {name} gave more than {count} verdicts for {count} pairs, or two for one."
            )
        self._given.add(index)
        return [(index, value)]

    def _next_of(self, stream: Iterator) -> Any:
        if hasattr(stream, "call_off") or self.is_interactive:
            return next(stream)
        return self._guard.run(lambda: next(stream))

    def _call(self) -> Any:
        requests = self._requests
        arguments = [[request[name] for request in requests] for name in ("prompt", "completion_a", "completion_b")]
        columns = {name: [request["columns"][name] for request in requests] for name in requests[0]["columns"]}
        answer = self._labeller(*arguments, **columns)
        if isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__iter__"):
            raise LabellerError(
                f"The labeler {self._labeller.name} gave a `{type(answer).__name__}`, not a list of {len(requests)} "
                "verdicts. Nothing was kept."
            )
        return answer

    @property
    def is_interactive(self) -> bool:
        """Whether a person is asked, whose answer costs nothing before it is given."""
        return self._labeller.is_interactive

    def call_off(self) -> bool:
        """
        Has the labeler send no more questions. Returns whether answers to questions under way, which are paid for,
        are still to come: between two verdicts only a labeler that asks several at once has any. From any thread.
        """
        call_off = getattr(self._stream, "call_off", None)
        if call_off is None or self._is_done:
            return False
        call_off()
        return True


class Call:
    """
    A call of the labeler in a thread of its own, so that the wait for its answers can be limited.

    A running call cannot be stopped from outside. It is therefore never repeated, and its late answers are kept.

    Args:
        requests (`list[dict]`): What is asked; see [`GoldLabels._request`].
        answers ([`Answers`]): The answers: lists of indices into `requests` and verdicts.
    """

    def __init__(self, requests: list[dict], answers: Answers):
        self.requests = requests
        self.given: set[int] = set()
        self.is_called_off = False  # nothing more is asked for after the answer under way
        self._answers = answers
        self._received: queue.Queue = queue.Queue()
        # A daemon, so that a call that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for answers in self._answers:
                self._received.put((answers, None))
                if self.is_called_off:
                    break
            self._received.put((None, None))
        except BaseException as error:
            self._received.put((None, error))

    def call_off(self) -> bool:
        """Asks nothing more after the answer under way. Returns whether answers are still to come."""
        if not self._answers.call_off():  # otherwise it ends by itself
            self.is_called_off = True
        return not self._answers.is_interactive and (self._thread.is_alive() or not self._received.empty())

    def receive(self, timeout: float | None) -> list | None:
        """
        Returns the next answers, or `None` after the last ones. Waits up to `timeout` seconds; `None` does not wait.

        Raises:
            `queue.Empty`: If no answer has arrived yet.
            `BaseException`: The labeler's own exception.
        """
        answers, error = self._received.get(block=timeout is not None, timeout=timeout)
        if error is not None:
            raise error
        return answers
