"""
Where gold labels come from: a judge, and what its labels cost.

A labeler is a judge of [`trl_ext.judges`], a function on pairs, a reward function as TRL takes them, or [`Gold`],
which states the cost of a label beside any of these.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..judges.callables import CallableJudge, Judge, RewardFunctionJudge, is_reward_function
from ..judges.endpoint import EndpointJudge
from ..judges.reward_models import RewardModelJudge
from ..judges.verdicts import JudgeError, as_text


class LabellerError(JudgeError):
    """
    Gold labels could not be obtained. The run can be resumed; labels that were already bought are not bought again.
    """


class Labeller(Judge):
    """
    Base of labelers: a [`~trl_ext.judges.Judge`] whose labels have a cost. [`Gold`] turns any judge into one.

    Attributes:
        name (`str`):
            Who labels: written into every entry of the ledger and onto the model card.
        cost (`float`):
            Cost of a label in a unit of your choice; written into the ledger.
        is_free (`bool`):
            Whether [`rewards`] may be computed for all completions, in training and evaluation, to be logged.
        is_interactive (`bool`):
            Whether a person is asked at the terminal, so that Ctrl-C does not wait for the answer under way.
    """

    cost: float = 1.0
    is_free: bool = False
    is_interactive: bool = False
    _error = LabellerError


class Gold(Labeller):
    """
    Gold labels by a judge, with the cost of a label.

    Args:
        judge ([`~trl_ext.judges.Judge`] or `Callable`):
            A judge, a function on pairs, `f(prompts, completions_a, completions_b, **columns)`, or a reward function
            as TRL takes them, `f(prompts, completions, **columns)`. The two kinds of functions are told apart by their
            signatures.
        cost (`float`, *optional*, defaults to `1.0`):
            Cost of a label.
        is_free (`bool`, *optional*):
            Whether the judge's rewards may also be computed for logging. By default `True` for reward functions and
            `False` for everything else. Set it to `False` for reward functions that cost money.
        name (`str`, *optional*):
            Who labels; the judge's name by default.

    Raises:
        `TypeError`: If `judge` is none of these, before any model is loaded.
        `ValueError`: If `is_free=True` and the judge has no rewards.
    """

    def __init__(self, judge: Any, cost: float = 1.0, is_free: bool | None = None, name: str | None = None):
        self.judge = _as_judge(judge)
        self.name = name or self.judge.name or type(self.judge).__name__
        self.has_rewards, self.symmetric = self.judge.has_rewards, self.judge.symmetric
        if is_free is None:  # a model's forwards take time
            is_free = isinstance(self.judge, RewardFunctionJudge) and not isinstance(self.judge, RewardModelJudge)
        if is_free and not self.has_rewards:
            raise ValueError(f"`is_free=True`: {self.name} compares pairs and has no rewards that could be logged.")
        self.cost, self.is_free = cost, is_free
        self.is_interactive = getattr(self.judge, "is_interactive", False)

    def __call__(self, prompts, completions_a, completions_b, **columns):
        return self.judge.stream(prompts, completions_a, completions_b, **columns)

    def needed_columns(self):
        return self.judge.needed_columns()

    def rewards(self, prompts, completions, **columns):
        # Rewards that are not finite are logged as they are: each process logs its own, and one of them must not stop
        # alone. A verdict made of one is refused when it is bought.
        if isinstance(self.judge, RewardFunctionJudge):
            return self.judge.raw_rewards(prompts, completions, **columns)
        return self.judge.rewards(prompts, completions, **columns)

    def describe(self):
        return {**self.judge.describe(), "name": self.name}

    def identity(self):
        return {**self.judge.identity(), "name": self.name}

    def taken_columns(self, columns):
        return self.judge.taken_columns(columns)


def _as_judge(labeller: Any) -> Judge:
    if isinstance(labeller, Judge):
        return labeller
    if isinstance(labeller, torch.nn.Module):
        raise TypeError(
            f"`gold_labeller` is a model (`{type(labeller).__name__}`). Give `RewardModelJudge(model, "
            "processing_class)` with it as `model`."
        )
    if not callable(labeller):
        raise TypeError(
            "`gold_labeller` must be a `Judge`, a function `(prompts, completions_a, completions_b, **columns)` or a "
            f"reward function `(prompts, completions, **columns)`, got a `{type(labeller).__name__}`."
        )
    if is_reward_function(labeller):
        return RewardFunctionJudge(labeller)
    try:
        return CallableJudge(labeller)
    except TypeError as error:
        raise TypeError(
            "`gold_labeller` is neither a function on pairs nor a reward function, `f(prompts, completions, "
            f"**columns)`. {error}"
        ) from None


def as_labeller(labeller: Any) -> Labeller:
    """Returns a [`Labeller`] from a judge, a function on pairs, or a reward function."""
    return labeller if isinstance(labeller, Labeller) else Gold(labeller)


# ---- Names of 0.1.0 -------------------------------------------------------------------------------------------------


def _warn_of_old_name(name: str, replacement: str) -> None:
    warnings.warn(
        f"`{name}` goes in the next release. Use {replacement}; `Gold(judge, cost=..., is_free=...)` states the cost "
        "of a label.",
        FutureWarning,
        stacklevel=3,
    )


class CallableLabeller(Gold):
    """Deprecated: use the function or judge as it is, or [`Gold`]. Unlike [`Gold`], refuses reward functions."""

    def __init__(self, function: Callable, name: str | None = None, cost: float = 1.0, is_free: bool = False):
        _warn_of_old_name("CallableLabeller", "the function or judge itself")
        super().__init__(function if isinstance(function, Judge) else CallableJudge(function), cost, is_free, name)


class RewardFunctionLabeller(Labeller, RewardFunctionJudge):
    """Deprecated: use the reward function as it is, or a [`~trl_ext.judges.RewardFunctionJudge`]."""

    def __init__(
        self,
        reward_funcs: Callable | list[Callable],
        reward_weights: list[float] | None = None,
        tie_margin: float = 0.0,
        name: str | None = None,
        cost: float = 1.0,
        is_free: bool = True,
    ):
        _warn_of_old_name("RewardFunctionLabeller", "the reward function itself, or a `RewardFunctionJudge`")
        super().__init__(reward_funcs, reward_weights, tie_margin, name)
        self.cost = cost
        self.is_free = is_free

    def rewards(self, prompts, completions, **columns):
        return self.raw_rewards(prompts, completions, **columns)  # see `Gold.rewards`


class RewardModelLabeller(RewardFunctionLabeller, RewardModelJudge):
    """Deprecated: use a [`~trl_ext.judges.RewardModelJudge`]."""

    def __init__(
        self,
        model: torch.nn.Module | str,
        processing_class: PreTrainedTokenizerBase | None = None,
        probability: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        name: str | None = None,
        cost: float = 1.0,
        is_free: bool = False,
        model_init_kwargs: dict | None = None,
        tie_margin: float = 0.0,
        device: str | None = None,
    ):
        _warn_of_old_name("RewardModelLabeller", "a `RewardModelJudge`")
        RewardModelJudge.__init__(
            self,
            model,
            processing_class,
            probability=probability,
            batch_size=batch_size,
            max_length=max_length,
            tie_margin=tie_margin,
            name=name,
            device=device,
            model_init_kwargs=model_init_kwargs,
        )
        self.cost = cost
        self.is_free = is_free


class JudgeLabeller(Labeller, EndpointJudge):
    """Deprecated: use an [`~trl_ext.judges.EndpointJudge`]."""

    def __init__(self, model: str, base_url: str = "https://api.openai.com/v1", *, cost: float = 1.0, **settings: Any):
        _warn_of_old_name("JudgeLabeller", "an `EndpointJudge`")
        super().__init__(model, base_url, **settings)
        self.cost = cost

    def __call__(self, prompts, completions_a, completions_b, **columns):
        return self.stream(prompts, completions_a, completions_b, **columns)


# ---- A person -------------------------------------------------------------------------------------------------------


class TerminalLabeller(Labeller):
    """
    Asks the person at the terminal, one pair at a time. Every answer is on disk before the next question.

    Args:
        name (`str`, *optional*, defaults to the user's login): Who labels.
        cost (`float`, *optional*, defaults to `1.0`): Cost of a label.
        read, write (`Callable`, *optional*): Replacements for `input` and `print`.
    """

    is_interactive = True

    def __init__(
        self, name: str | None = None, cost: float = 1.0, read: Callable[[str], str] = input, write: Callable = print
    ):
        if name is None:
            import getpass

            name = getpass.getuser()
        self.name = name
        self.cost = cost
        self.read = read
        self.write = write

    def __call__(self, prompts, completions_a, completions_b, **columns):
        answers = {"a": 1.0, "b": 0.0, "t": -1, "s": None}
        for number, (prompt, a, b) in enumerate(zip(prompts, completions_a, completions_b, strict=True), start=1):
            self.write(f"\n{'=' * 79}\nComparison {number} of {len(prompts)}\n\n{printable(as_text(prompt))}")
            self.write(f"\n--- A {'-' * 73}\n{printable(as_text(a))}\n\n--- B {'-' * 73}\n{printable(as_text(b))}\n")
            while True:
                try:
                    answer = self.read("Better: [a], [b], [t]ie, [s]kip, [q]uit: ").strip().lower()
                except EOFError:
                    answer = "q"
                if answer == "q":
                    raise LabellerError(f"{self.name} stopped labeling.")
                if answer in answers:
                    break
                self.write("Please answer a, b, t, s or q.")
            yield answers[answer]


def printable(text: str) -> str:
    """A model's text without control characters, which could rewrite what the terminal shows."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
