"""
Base class of judges, and judges made from functions.

A judge is any callable `judge(prompts, completions_a, completions_b, **columns)` on lists of equal length that gives
one verdict a pair: 1 if `a` is better, 0 if `b` is, 1/2 (or -1) for a tie, or the probability that `a` is better;
`None` where it has none. Completions are texts if the prompt is a text, and messages if it is messages, as in TRL's
reward functions. The columns, if any, are those of the prompts' dataset; a function receives only the columns that are
among its parameters.
"""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .verdicts import IndexedVerdict, JudgeError, as_completions, normalize_verdict


# ---- Signatures -----------------------------------------------------------------------------------------------------


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    """A function's parameters; `None` if they cannot be inspected, as for some functions written in C."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _accepted(function: Callable, columns: dict) -> dict:
    """The columns that a function accepts."""
    parameters = _parameters(function) if columns else []
    if parameters is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    names = {parameter.name for parameter in parameters}
    return {name: values for name, values in columns.items() if name in names}


def _required(parameters: Iterable[inspect.Parameter] | None) -> set[str]:
    """The names of the parameters without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in parameters or () if p.default is p.empty and p.kind not in kinds}


def is_reward_function(function: Callable) -> bool:
    """
    Whether a signature is that of a reward function as TRL calls them, by keyword, `f(prompts=..., completions=...,
    **columns)`, and cannot be that of a function on pairs.

    A parameter named `completions` decides: of `f(prompts, completions, answer)`, called on pairs, the opponent's
    completions would be taken for the answer. So does a function that takes keywords and fewer than three positional
    arguments.
    """
    parameters = _parameters(function)
    if parameters is None:
        return False
    if any(p.name == "completions" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return True
    takes_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return takes_keywords and not _takes_pairs(parameters) and _required(parameters) <= {"prompts"}


def _takes_pairs(parameters: list[inspect.Parameter]) -> bool:
    """Whether a function can be called with three positional arguments."""
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_position) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def code_of(function: Callable) -> str:
    """A function's source, or its name where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return f"{type(function).__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def code_around(function: Callable) -> str:
    """The source of the file that a function is from, as what it calls may be there; empty where there is none."""
    written = function if inspect.isroutine(function) else getattr(function, "func", type(function))
    try:
        return Path(inspect.getsourcefile(written) or "").read_text(encoding="utf-8")
    except (OSError, TypeError, UnicodeDecodeError):
        return ""


# ---- Judges ---------------------------------------------------------------------------------------------------------


class Judge:
    """
    Base of judges.

    Attributes:
        name (`str`):
            Name of the judge in reports.
        symmetric (`bool`):
            Whether verdicts cannot depend on the order of the two responses, so that one order is enough.
        has_rewards (`bool`):
            Whether [`rewards`] can be called.
        is_free (`bool`):
            Whether asking again costs nothing but time. `trl-ext evaluate` keeps the answers of a judge that is not
            free in a file, see [`RecordedJudge`].
    """

    name: str = ""
    symmetric: bool = False
    has_rewards: bool = False
    is_free: bool = True
    _error: type[JudgeError] = JudgeError

    def __call__(self, prompts: list, completions_a: list, completions_b: list, **columns) -> Iterable[float | None]:
        """One verdict a pair; see the top of this module."""
        raise NotImplementedError(f"`{type(self).__name__}` must define `__call__`.")

    def stream(self, prompts: list, completions_a: list, completions_b: list, **columns) -> Iterable:
        """
        The same verdicts for a caller that stores each as it arrives: a list, an iterator over verdicts in the order
        of the pairs, or an iterator over [`IndexedVerdict`] in any order. An iterator that asks several questions at
        once has a method `call_off`: it sends no more questions, and the iterator ends with the answers under way.
        """
        return self(prompts, completions_a, completions_b, **_accepted(self.__call__, columns))

    def rewards(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """One reward a completion; `None` where the judge has none for it."""
        raise NotImplementedError(f"The judge {self.name} compares pairs and has no rewards.")

    def needed_columns(self) -> set[str]:
        """
        Columns of the prompts' dataset that the judge requires; by default the parameters of `__call__` without a
        default.
        """
        return _required((_parameters(self.__call__) or [])[3:])

    def describe(self) -> dict:
        """Settings needed to reproduce the judge's verdicts; included in reports."""
        return {"name": self.name, "kind": type(self).__name__}

    def identity(self) -> dict:
        """Tells this judge from others that may answer differently: [`describe`], and the code of its functions or class."""
        return {**self.describe(), "code": code_of(type(self))}

    def taken_columns(self, columns: dict) -> dict:
        """Those of the columns that the judge takes."""
        return _accepted(self.__call__, columns)


class CallableJudge(Judge):
    """
    A judge from a function on pairs.

    Args:
        function (`Callable`): As described at the top of this module.
        name (`str`, *optional*): Defaults to the function's.

    Raises:
        `TypeError`: If the function's signature shows that it cannot be called with prompts and two lists of
            completions, or that it is a reward function as TRL calls them, with a parameter `completions`.
    """

    is_free = False  # the function may well ask a model that is paid
    _adapter = "RewardFunctionJudge"  # what to use for a reward function

    def __init__(self, function: Callable, name: str | None = None):
        self.function = function
        self.name: str = name or getattr(function, "__name__", None) or type(function).__name__
        self._check_takes_pairs()

    def _check_takes_pairs(self) -> None:
        if not callable(self.function):
            raise TypeError(
                "`function` must be a function `(prompts, completions_a, completions_b, **columns)` or a `Judge`, got "
                f"a `{type(self.function).__name__}`."
            )
        parameters = _parameters(self.function)
        is_reward = any(p.name == "completions" for p in parameters or ())
        if parameters is None or (_takes_pairs(parameters) and not is_reward):
            return
        what = (
            "It has a parameter `completions`, as a reward function has" if is_reward else "If it is a reward function"
        )
        raise TypeError(
            f"A judge is called with pairs, `f(prompts, completions_a, completions_b, **columns)`, but `{self.name}` "
            f"takes `({', '.join(map(str, parameters))})`. {what}: give `{self._adapter}(f)` with it as `f`."
            + (" Rename the parameter of a function that compares pairs." if is_reward else "")
        )

    def __call__(self, prompts, completions_a, completions_b, **columns):
        return self.function(prompts, completions_a, completions_b, **_accepted(self.function, columns))

    def needed_columns(self):
        return _required((_parameters(self.function) or [])[3:])

    def identity(self):
        return {**self.describe(), "function": code_of(self.function), "module": code_around(self.function)}

    def taken_columns(self, columns):
        return _accepted(self.function, columns)


def as_judge(judge: Any) -> Judge:
    """Returns a [`Judge`] from anything that can be called on pairs; refuses reward functions."""
    if isinstance(judge, Judge):
        return judge
    if not callable(judge):
        raise TypeError(
            f"`judge` must be a `Judge` or a function `(prompts, completions_a, completions_b)`, got a "
            f"`{type(judge).__name__}`. For a reward function use `RewardFunctionJudge(function)`."
        )
    return CallableJudge(judge)


def judge_from_function(function: Callable) -> Judge:
    """Returns a judge from a reward function or a function on pairs, told apart by their signatures."""
    if isinstance(function, Judge):
        return function
    return RewardFunctionJudge(function) if is_reward_function(function) else CallableJudge(function)


class RewardFunctionJudge(Judge):
    """
    A judge from reward functions as [`~trl.GRPOTrainer`] takes them, `f(prompts, completions, **columns)`: the
    completion with the higher reward is better. There is no verdict on a completion to which a function gives no
    reward (`None`).

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            One function or several, whose rewards are added. Each has the keyword arguments `prompts` and
            `completions` and returns one number a completion; coroutine functions are awaited.
        reward_weights (`list[float]`, *optional*):
            Their weights; all 1 by default.
        tie_margin (`float`, *optional*, defaults to `0.0`):
            Rewards that differ by no more than this are a tie.
        name (`str`, *optional*): Defaults to the functions'.
    """

    symmetric = True
    has_rewards = True

    def __init__(
        self,
        reward_funcs: Callable | list[Callable],
        reward_weights: list[float] | None = None,
        tie_margin: float = 0.0,
        name: str | None = None,
    ):
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.reward_weights = [1.0] * len(self.reward_funcs) if reward_weights is None else list(reward_weights)
        if len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"`reward_weights` has {len(self.reward_weights)} entries for {len(self.reward_funcs)} "
                "`reward_funcs`. Give one a function."
            )
        if not tie_margin >= 0:
            raise ValueError(f"`tie_margin` must not be negative, got {tie_margin!r}.")
        self.tie_margin = tie_margin
        self.name = name or "+".join(getattr(f, "__name__", type(f).__name__) for f in self.reward_funcs)

    def rewards(self, prompts, completions, **columns):
        return self._finite(self.raw_rewards(prompts, completions, **columns))

    def needed_columns(self):
        return set().union(*(_required(_parameters(function)) for function in self.reward_funcs)) - {
            "prompts",
            "completions",
        }

    def _finite(self, values: list[float | None]) -> list[float | None]:
        bad = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
        if bad:
            raise self._error(f"The reward function {self.name} gave {values[bad[0]]!r} for completion {bad[0]}.")
        return values

    def raw_rewards(self, prompts, completions, **columns) -> list[float | None]:
        """The functions' rewards, numbers that are not finite included."""
        totals: list[float | None] = [0.0] * len(completions)
        for function, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            accepted = _accepted(function, columns)
            values = list(_awaited(function(prompts=list(prompts), completions=list(completions), **accepted)))
            if len(values) != len(completions):
                raise self._error(
                    f"The reward function {getattr(function, '__name__', self.name)} gave {len(values)} rewards for "
                    f"{len(completions)} completions. Give one a completion, None where there is none."
                )
            # A completion without a reward from one function has none at all, rather than 0 from that function.
            totals = [
                None if total is None or value is None else total + weight * float(value)
                for total, value in zip(totals, values, strict=True)
            ]
        return totals

    def __call__(self, prompts, completions_a, completions_b, **columns):
        twice = {name: list(values) * 2 for name, values in columns.items()}
        rewards = self.raw_rewards(list(prompts) * 2, list(completions_a) + list(completions_b), **twice)
        pairs = zip(rewards[: len(prompts)], rewards[len(prompts) :], strict=True)
        return [self._compare(a, b) for a, b in pairs]

    def _compare(self, a: float | None, b: float | None) -> float | None:
        if a is None or b is None:
            return None
        if not math.isfinite(a) or not math.isfinite(b):
            return math.nan  # refused by the caller, who can keep the verdicts on the other pairs
        return 0.5 if abs(a - b) <= self.tie_margin else float(a > b)

    def describe(self):
        return {**super().describe(), "reward_weights": self.reward_weights, "tie_margin": self.tie_margin}

    def identity(self):
        return {**self.describe(), "functions": [code_of(function) for function in self.reward_funcs]}


def _awaited(result: Any) -> Any:
    """
    Result of a reward function, which may be a coroutine; it is awaited in a thread, so a running event loop is no
    obstacle.
    """
    if not inspect.isawaitable(result):
        return result
    outcome: list = []

    async def wait():
        return await result

    def run():
        try:
            outcome.extend((asyncio.run(wait()), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    return value


# ---- Asking ---------------------------------------------------------------------------------------------------------


def check_columns(judge: Judge, columns: Iterable[str]) -> None:
    """
    Checks, before anything is sampled, that a judge will get the columns it needs.

    Raises:
        `ValueError`: If a judge needs a column that the data do not have.
    """
    missing = sorted(judge.needed_columns() - set(columns))
    if missing:
        raise ValueError(
            f"The judge {judge.name} needs the column{'s' * (len(missing) > 1)} "
            f"{', '.join(f'`{name}`' for name in missing)}, and the data have {', '.join(sorted(columns)) or 'none'} "
            "beside the prompts. Give data that have what it needs, or its parameter a default."
        )


def judge_pairs(judge: Judge, prompts: Sequence, completions_a: Sequence, completions_b: Sequence, columns: dict):
    """
    Asks a judge about pairs and checks its answer.

    Returns:
        Array of shape `(N,)`: verdicts as probabilities that `a` is better; NaN where there is none.

    Raises:
        [`JudgeError`]: For answers of the wrong number, and for one that is no verdict.
    """
    verdicts: list[Any] = list(
        judge(list(prompts), list(completions_a), list(completions_b), **_accepted(judge, columns))
    )
    if len(verdicts) != len(prompts):
        raise JudgeError(f"The judge {judge.name} gave {len(verdicts)} verdicts for {len(prompts)} pairs.")
    if any(isinstance(verdict, IndexedVerdict) for verdict in verdicts):
        verdicts = [verdict for _, verdict in sorted(verdicts, key=lambda given: given.index)]
    try:
        return np.array([np.nan if v is None else v for v in map(normalize_verdict, verdicts)])
    except ValueError as error:
        raise JudgeError(f"The judge {judge.name} {error}") from None


def judge_rewards(
    judge: Judge, prompts: Sequence, texts: Sequence, columns: Mapping[str, Sequence] | None = None
) -> np.ndarray:
    """
    A judge's reward of each text as the completion of its prompt, `(N,)`; NaN where it gives none (`None`).

    Args:
        judge ([`Judge`]):
            One that has rewards.
        prompts, texts (`Sequence` of length `N`):
            The prompts, and a completion of each.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the prompts' dataset, each of length `N`, for a judge that takes them.

    Raises:
        [`JudgeError`]: For a reward that is no finite number.
    """
    accepted = _accepted(judge.rewards, {name: list(values) for name, values in (columns or {}).items()})
    values = judge.rewards(list(prompts), as_completions(prompts, texts), **accepted)
    if len(values) != len(texts):
        raise JudgeError(f"The judge {judge.name} gave {len(values)} rewards for {len(texts)} completions.")
    bad = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
    if bad:
        raise JudgeError(f"The judge {judge.name} gave the reward {values[bad[0]]!r} for completion {bad[0]}.")
    return np.array([np.nan if value is None else float(value) for value in values])
