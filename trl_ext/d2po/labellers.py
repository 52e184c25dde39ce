"""
Where gold labels come from.

A labeller is any callable `labeller(prompts, completions_a, completions_b, **columns)` on lists of equal length that gives
one verdict a pair, as a list or one after another: 1 if `a` is better, 0 if `b` is, 1/2 or -1 for a tie, or the probability that
`a` is better; `None` where there is no verdict. That is what a judge of [`trl_ext.evaluation`] is, so any of those will do; the
adapters here are the same judges with a price, and a person at a terminal.
"""

from collections.abc import Callable
from typing import Any

from ..judges.endpoint import EndpointJudge
from ..judges.judges import CallableJudge, Judge, JudgeError, RewardFunctionJudge, RewardModelJudge, as_text


class LabellerError(JudgeError):
    """Gold labels could not be had. The run has stopped and can be resumed: no label that was bought is bought again."""


class Labeller(Judge):
    """
    Base of labellers: a [`~trl_ext.evaluation.Judge`] whose labels cost something.

    Attributes:
        name (`str`):
            Who labels: written into every entry of the ledger and onto the model card.
        cost (`float`):
            Cost of a label, in whatever unit you count in; written into the ledger.
        is_free (`bool`):
            Whether it may also be asked where nothing is bought: [`rewards`] is then logged for all completions, in
            training and evaluation.
    """

    cost: float = 1.0
    is_free: bool = False
    _error = LabellerError


class CallableLabeller(Labeller, CallableJudge):
    """
    A labeller from a function on pairs.

    Args:
        function (`Callable` or [`~trl_ext.evaluation.Judge`]):
            As described at the top of this module. A judge's verdicts are kept as they come.
        name (`str`, *optional*): Defaults to the function's.
        cost (`float`, *optional*, defaults to `1.0`): Cost of a label.
        is_free (`bool`, *optional*, defaults to `False`):
            Whether a judge's rewards may also be computed for logging. It must have them.

    Raises:
        `TypeError`: As [`~trl_ext.judges.judges.CallableJudge`], before any model is loaded.
    """

    _adapter = "RewardFunctionLabeller"

    def __init__(self, function: Callable, name: str | None = None, cost: float = 1.0, is_free: bool = False):
        is_judge = isinstance(function, Judge)
        if is_judge:
            super().__init__(function.stream, name or function.name or type(function).__name__)
        else:
            super().__init__(function, name)
        self.judge = function if is_judge else None
        self.has_rewards = is_judge and function.has_rewards
        self.symmetric = is_judge and function.symmetric
        if is_free and not self.has_rewards:
            raise ValueError(f"`is_free=True`: {self.name} compares pairs and has no rewards that could be logged.")
        self.cost = cost
        self.is_free = is_free

    def needed_columns(self):
        return (self.judge or super()).needed_columns()

    def rewards(self, prompts, completions, **columns):
        if isinstance(self.judge, RewardFunctionJudge):
            return self.judge.raw_rewards(prompts, completions, **columns)
        return (self.judge or super()).rewards(prompts, completions, **columns)

    def describe(self):
        return {**(self.judge or super()).describe(), "name": self.name}


def as_labeller(labeller: Any) -> Labeller:
    """A [`Labeller`] from anything that can be called on pairs, judges among them."""
    if isinstance(labeller, Labeller):
        return labeller
    if not callable(labeller):
        raise TypeError(
            f"`gold_labeller` must be a `Labeller` or a function `(prompts, completions_a, completions_b, **columns)`, such "
            f"as a `Judge`, got a `{type(labeller).__name__}`."
        )
    # As of labellers: functions are free unless it is said that they are not, a model's forwards are not.
    is_free = isinstance(labeller, RewardFunctionJudge) and not isinstance(labeller, RewardModelJudge)
    return CallableLabeller(labeller, is_free=is_free)


class RewardFunctionLabeller(Labeller, RewardFunctionJudge):
    """
    A labeller from reward functions as [`~trl.GRPOTrainer`] takes them, `f(prompts, completions, **columns)`: the completion
    with the higher reward is better. See [`~trl_ext.evaluation.RewardFunctionJudge`].

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            One function or several, whose rewards are added.
        reward_weights (`list[float]`, *optional*):
            Their weights; all 1 by default.
        tie_margin (`float`, *optional*, defaults to `0.0`):
            Rewards that differ by no more than this are a tie.
        name (`str`, *optional*): Defaults to the functions'.
        cost (`float`, *optional*, defaults to `1.0`): Cost of a label.
        is_free (`bool`, *optional*, defaults to `True`):
            Whether the rewards may also be computed for logging. Set it to `False` for functions that cost money.
    """

    def __init__(self, reward_funcs, reward_weights=None, tie_margin=0.0, name=None, cost=1.0, is_free=True):
        super().__init__(reward_funcs, reward_weights, tie_margin, name)
        self.cost = cost
        self.is_free = is_free

    def rewards(self, prompts, completions, **columns):
        # Not checked: here they are logged, each process its own, and one of them must not stop alone. What no verdict can be
        # made of is refused when it is bought.
        return self.raw_rewards(prompts, completions, **columns)


class RewardModelLabeller(RewardFunctionLabeller, RewardModelJudge):
    """
    A labeller from a reward model: a sequence classifier with one output, as [`~trl.RewardTrainer`] trains it. See
    [`~trl_ext.evaluation.RewardModelJudge`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or what `from_pretrained` loads it from.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from where the model was by default.
        probability (`bool`, *optional*, defaults to `False`):
            Give the Bradley-Terry probability, sigmoid(r_a - r_b), instead of 1, 0 or a tie.
        batch_size (`int`, *optional*, defaults to `8`): Completions in a forward.
        max_length (`int`, *optional*): Tokens kept, from the end.
        name, cost, is_free: As for [`RewardFunctionLabeller`]; `is_free` is `False` by default.
        model_init_kwargs (`dict`, *optional*): Of `from_pretrained`.
        tie_margin (`float`, *optional*, defaults to `0.0`): As for [`RewardFunctionLabeller`].
        device (`str`, *optional*): Where a model that is loaded here is put.
    """

    def __init__(
        self,
        model,
        processing_class=None,
        probability=False,
        batch_size=8,
        max_length=None,
        name=None,
        cost=1.0,
        is_free=False,
        model_init_kwargs=None,
        tie_margin=0.0,
        device=None,
    ):
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
    """
    A labeller that asks a language model behind an OpenAI-compatible endpoint: an [`~trl_ext.evaluation.EndpointJudge`] whose
    verdicts are on disk one by one, as the answers come. `template` may name columns of the prompts' dataset.

    The replies' order is randomised by the trainer, so a judge that favours a position adds noise and no bias.

    Args:
        model (`str`):
            Name of the model, as the endpoint knows it.
        base_url (`str`, *optional*, defaults to `"https://api.openai.com/v1"`):
            The endpoint.
        cost (`float`, *optional*, defaults to `1.0`): Cost of a label.
        settings:
            The other arguments of [`~trl_ext.evaluation.EndpointJudge`]: `api_key_env`, `template`, `parse`, `temperature`,
            `max_tokens`, `timeout`, `max_retries`, `retry_delay`, `concurrency`, `extra_body`.

    Raises:
        [`LabellerError`]: Where an `EndpointJudge` raises a `JudgeError`.
    """

    def __init__(self, model, base_url="https://api.openai.com/v1", *, cost=1.0, **settings):
        super().__init__(model, base_url, **settings)
        self.cost = cost

    def __call__(self, prompts, completions_a, completions_b, **columns):
        return self.stream(prompts, completions_a, completions_b, **columns)


class TerminalLabeller(Labeller):
    """
    Asks the person at the terminal, one pair at a time. Every answer is on disk before the next question.

    Args:
        name (`str`, *optional*, defaults to the user's login): Who labels.
        cost (`float`, *optional*, defaults to `1.0`): Cost of a label.
        read, write (`Callable`, *optional*): In place of `input` and `print`.
    """

    def __init__(self, name=None, cost=1.0, read: Callable[[str], str] = input, write: Callable = print):
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
                    raise LabellerError(f"{self.name} stopped labelling.")
                if answer in answers:
                    break
                self.write("Please answer a, b, t, s or q.")
            yield answers[answer]


def printable(text: str) -> str:
    """A model's text without control characters, which could rewrite what the terminal shows."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
