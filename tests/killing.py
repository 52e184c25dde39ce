"""Runs that end by SIGKILL at a chosen moment, in a forked process."""

import os
import signal
from collections.abc import Callable

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    """Dies at an event (`"on_step_end"`, ...) of a step."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.check)

    def check(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_in_call(owner, name: str, number: int = 1) -> None:
    """From now on, this process dies in the `number`-th call of a function of a module, a class or an object."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        return die() if len(calls) == number else original(*args, **kwargs)

    setattr(owner, name, counted)


def die_in_a_checkpoint(number: int) -> None:
    """
    From now on, this process dies in its `number`-th checkpoint: before the last file, which marks it as complete.
    """
    die_in_call(TrainerState, "save_to_json", number)


def killed(run: Callable[[], object]) -> None:
    """Runs `run` in a forked process, which must die by it."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)  # it was not killed
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run was not killed where it should be"
