"""Ctrl-C while something is under way that has been paid for."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar


logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class InterruptGuard:
    """
    Runs steps so that Ctrl-C loses the result of none: the first one is held back until the step under way has ended,
    and raised in place of the next step. A second one is raised at once.

    Signals reach the main thread only, and only a handler of Python's own is replaced, for as long as a step runs.

    Args:
        what (`str`):
            What is waited for, for the message.
    """

    def __init__(self, what: str):
        self.what = what
        self._came = False

    def run(self, step: Callable[[], _Result]) -> _Result:
        """Returns `step()`; if that raises after Ctrl-C, `KeyboardInterrupt` is raised in its place."""
        self.check()
        with self._holding():
            try:
                return step()
            except Exception as error:
                if self._came:
                    raise KeyboardInterrupt from error
                raise

    def check(self) -> None:
        """Raises the `KeyboardInterrupt` that was held back."""
        if self._came:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hold(self, number, frame) -> None:
        if self._came:
            signal.default_int_handler(number, frame)
        self._came = True
        logger.warning(f"Waiting for {self.what}, which is paid for. Press Ctrl-C again to stop at once.")
