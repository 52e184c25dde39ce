"""
Judges: who says which of two responses is better.

A judge is any callable `judge(prompts, completions_a, completions_b, **columns)` on lists of equal length that gives one verdict
a pair: 1 if `a` is better, 0 if `b` is, 1/2 (or -1) for a tie, or the probability that `a` is better; `None` where it has none.
Completions are texts where the prompt is a text, and messages where it is messages, as TRL's reward functions get them. The
columns, if any, are those of the prompts' dataset; a function that does not name them is not given them.

The gold labellers of D2PO ([`~trl_ext.d2po.Labeller`]) are these judges too, with a price.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..evaluation import win_rates as rates


class JudgeError(RuntimeError):
    """A judge could not be asked, or answered in a form that nobody can read."""


# ---- Verdicts --------------------------------------------------------------------------------------------------------


class IndexedVerdict(NamedTuple):
    """A verdict with the index of its pair, from a judge whose answers come in any order."""

    index: int
    verdict: float | None


def normalize_verdict(value: Any) -> float | None:
    """
    A verdict as the probability that the first completion is better, 0.5 for a tie; `None` stays `None`.

    Raises:
        `ValueError`: If it is no verdict. The message wants the judge's name before it.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number == -1:
        return 0.5
    if not 0 <= number <= 1:  # NaN neither
        raise ValueError(
            f"gave the verdict {value!r}. A verdict is 1 (the first is better), 0 (the second), 1/2 or -1 (a tie), a "
            "probability that the first is better, or None."
        )
    return number


def as_text(value: Any) -> str:
    """A prompt or completion as one text; messages keep their roles where there are several."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return str(value[0].get("content") or "")
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in value)


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    """A function's parameters; `None` for what is written in C and may have none to look at."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _taken(function: Callable, columns: dict) -> dict:
    """Those of the columns that a function takes: one of prompts and completions alone need not know of any."""
    parameters = _parameters(function) if columns else []
    if parameters is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    names = {parameter.name for parameter in parameters}
    return {name: values for name, values in columns.items() if name in names}


def _needed(parameters: Iterable[inspect.Parameter] | None) -> set[str]:
    """The names of the parameters that have no default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in parameters or () if p.default is p.empty and p.kind not in kinds}


# ---- Judges ----------------------------------------------------------------------------------------------------------


class Judge:
    """
    Base of judges.

    Attributes:
        name (`str`):
            Who judges, for reports.
        symmetric (`bool`):
            Whether the order of the two responses can make no difference, so that one order is enough.
        has_rewards (`bool`):
            Whether it has [`rewards`] too.
    """

    name: str = ""
    symmetric: bool = False
    has_rewards: bool = False
    _error: type[JudgeError] = JudgeError

    def __call__(self, prompts: list, completions_a: list, completions_b: list, **columns) -> Iterable[float | None]:
        """One verdict a pair; see the top of this module."""
        raise NotImplementedError(f"`{type(self).__name__}` must define `__call__`.")

    def stream(self, prompts: list, completions_a: list, completions_b: list, **columns) -> Iterable:
        """
        The same verdicts for somebody who keeps each as it comes: a list, or an iterator over verdicts in the pairs' order
        or over [`IndexedVerdict`] in any.
        """
        return self(prompts, completions_a, completions_b, **_taken(self.__call__, columns))

    def rewards(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """One reward a completion, where the judge has such a thing; `None` where it has none for this one."""
        raise NotImplementedError(f"The judge {self.name} compares pairs and has no rewards.")

    def needed_columns(self) -> set[str]:
        """Columns of the prompts' dataset that it cannot do without; by default what `__call__` takes without a default."""
        return _needed((_parameters(self.__call__) or [])[3:])

    def describe(self) -> dict:
        """What a reader must know to repeat its verdicts; goes into reports."""
        return {"name": self.name, "kind": type(self).__name__}


class CallableJudge(Judge):
    """
    A judge from a function on pairs.

    Args:
        function (`Callable`): As described at the top of this module.
        name (`str`, *optional*): Defaults to the function's.

    Raises:
        `TypeError`: If the function's signature shows that it cannot be called with prompts and two lists of completions, or
            that it is a reward function as TRL calls them, with a parameter `completions`.
    """

    _adapter = "RewardFunctionJudge"  # what makes one of a reward function

    def __init__(self, function: Callable, name: str | None = None):
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self._check_takes_pairs()

    def _check_takes_pairs(self) -> None:
        """Refuses at once what no repetition of the call could heal: above all a reward function."""
        if not callable(self.function):
            raise TypeError(
                "`function` must be a function `(prompts, completions_a, completions_b, **columns)` or a `Judge`, got a "
                f"`{type(self.function).__name__}`."
            )
        parameters = _parameters(self.function)
        if parameters is None:
            return
        by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        takes_three = len(by_position) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        # TRL calls reward functions by keyword, so this name tells them: of `f(prompts, completions, answer)` the opponent's
        # completions would be taken for the answer.
        is_reward = any(p.name == "completions" for p in parameters)
        if takes_three and not is_reward:
            return
        what = (
            "It has a parameter `completions`, as a reward function has" if is_reward else "If it is a reward function"
        )
        raise TypeError(
            f"A judge is called with pairs, `f(prompts, completions_a, completions_b, **columns)`, but `{self.name}` takes "
            f"`({', '.join(map(str, parameters))})`. {what}: give `{self._adapter}(f)` with it as `f`."
            + (" Rename the parameter of a function that compares pairs." if is_reward else "")
        )

    def __call__(self, prompts, completions_a, completions_b, **columns):
        return self.function(prompts, completions_a, completions_b, **_taken(self.function, columns))

    def needed_columns(self):
        return _needed((_parameters(self.function) or [])[3:])


def as_judge(judge: Any) -> Judge:
    """A [`Judge`] from anything that can be called on pairs; a reward function is refused, since it cannot."""
    if isinstance(judge, Judge):
        return judge
    if not callable(judge):
        raise TypeError(
            f"`judge` must be a `Judge` or a function `(prompts, completions_a, completions_b)`, got a "
            f"`{type(judge).__name__}`. For a reward function use `RewardFunctionJudge(function)`."
        )
    return CallableJudge(judge)


class RewardFunctionJudge(Judge):
    """
    A judge from reward functions as [`~trl.GRPOTrainer`] takes them, `f(prompts, completions, **columns)`: the completion with
    the higher reward is better. There is no verdict on a completion to which a function gives no reward (`None`).

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            One function or several, whose rewards are added. Each has the keyword arguments `prompts` and `completions` and
            returns one number a completion.
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
                f"`reward_weights` has {len(self.reward_weights)} entries for {len(self.reward_funcs)} `reward_funcs`. "
                "Give one a function."
            )
        if not tie_margin >= 0:
            raise ValueError(f"`tie_margin` must not be negative, got {tie_margin!r}.")
        self.tie_margin = tie_margin
        self.name = name or "+".join(getattr(f, "__name__", type(f).__name__) for f in self.reward_funcs)

    def rewards(self, prompts, completions, **columns):
        return self._finite(self.raw_rewards(prompts, completions, **columns))

    def needed_columns(self):
        return set().union(*(_needed(_parameters(function)) for function in self.reward_funcs)) - {
            "prompts",
            "completions",
        }

    def _finite(self, values: list[float | None]) -> list[float | None]:
        bad = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
        if bad:
            raise self._error(f"The reward function {self.name} gave {values[bad[0]]!r} for completion {bad[0]}.")
        return values

    def raw_rewards(self, prompts, completions, **columns) -> list[float | None]:
        """What the functions gave, numbers that are not finite included."""
        totals: list[float | None] = [0.0] * len(completions)
        for function, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            taken = _taken(function, columns)
            values = list(function(prompts=list(prompts), completions=list(completions), **taken))
            if len(values) != len(completions):
                raise self._error(
                    f"The reward function {getattr(function, '__name__', self.name)} gave {len(values)} rewards for "
                    f"{len(completions)} completions. Give one a completion, None where there is none."
                )
            # A reward that one function does not give is no reward of 0: the completion has none.
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
            return math.nan  # refused by whoever asked, who can keep the verdicts on the other pairs
        return 0.5 if abs(a - b) <= self.tie_margin else float(a > b)

    def describe(self):
        return {**super().describe(), "reward_weights": self.reward_weights, "tie_margin": self.tie_margin}


class RewardModelJudge(RewardFunctionJudge):
    """
    A judge from a reward model: a sequence classifier with one output, as [`~trl.RewardTrainer`] trains it. It reads what that
    trainer gives it: messages by the chat template, and text with the end-of-sequence token after it.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or what `from_pretrained` loads it from.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from where the model was by default.
        probability (`bool`, *optional*, defaults to `False`):
            Give the Bradley-Terry probability, sigmoid(r_a - r_b), instead of 1, 0 or a tie.
        batch_size (`int`, *optional*, defaults to `8`): Completions in a forward.
        max_length (`int`, *optional*): Tokens kept of prompt and completion, from the end.
        tie_margin (`float`, *optional*, defaults to `0.0`): As for [`RewardFunctionJudge`].
        name (`str`, *optional*): Defaults to the model's.
        device (`str`, *optional*): Where a model that is loaded here is put; a CUDA device if there is one, by default.
        model_init_kwargs (`dict`, *optional*): Of `from_pretrained`. By default only weights in safetensors are loaded.
    """

    def __init__(
        self,
        model,
        processing_class=None,
        probability: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        tie_margin: float = 0.0,
        name: str | None = None,
        device: str | None = None,
        model_init_kwargs: dict | None = None,
    ):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source = model if isinstance(model, str) else None
        if source:
            kwargs = {"use_safetensors": True, "trust_remote_code": False, **(model_init_kwargs or {})}
            model = AutoModelForSequenceClassification.from_pretrained(source, **kwargs)
            if device is None and not kwargs.keys() & {"device_map", "quantization_config"}:  # they say where
                device = default_device()
            model = model if device is None else model.to(device)
        if not hasattr(model, "config") or not hasattr(model, "parameters"):
            raise TypeError(
                f"`model` must be a sequence-classification model or its name, got a `{type(model).__name__}`."
            )
        source = source or getattr(model.config, "_name_or_path", "")
        name = name or source or type(model).__name__
        outputs = getattr(model.config, "num_labels", None)
        if outputs != 1:
            raise ValueError(
                f"A reward model has one output; {name} has {outputs} outputs (`num_labels={outputs}`). Wrap it in a "
                "function that makes one number of them, and use it as a reward function."
            )
        if processing_class is None:
            if not source:
                raise ValueError(
                    f"`processing_class` is needed: a `{type(model).__name__}` built in memory says nothing of its tokenizer."
                )
            processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self.model, self.processing_class = model, processing_class
        self.probability = probability
        self.batch_size, self.max_length = batch_size, max_length
        super().__init__(self._score, tie_margin=tie_margin, name=name)

    def _ids(self, prompt, completion) -> list[int]:
        tokenizer = self.processing_class
        if not isinstance(completion, str) and getattr(tokenizer, "chat_template", None):
            messages = list(prompt) + list(completion)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        else:
            is_text = isinstance(completion, str)
            text = prompt + completion if is_text else f"{as_text(prompt)}\n\n{as_text(completion)}"
            eos = tokenizer.eos_token or ""
            ids = tokenizer(text=text + ("" if text.endswith(eos) else eos))["input_ids"]
        return list(ids) if self.max_length is None else list(ids)[-self.max_length :]

    def _score(self, prompts, completions):
        import torch

        from ..evaluation.scoring import evaluating

        sequences = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        device = next(self.model.parameters()).device
        scores = [0.0] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # alike in length: little padding
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = [sequences[i] for i in rows]
                pad = _unused_token(batch, self.model.config.get_text_config().vocab_size)
                longest = len(batch[0])
                # On the right, no token of a causal model sees it, and none of another attends to it.
                input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch], device=device)
                mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=device)
                with _scored_before(self.model, pad):
                    logits = self.model(input_ids=input_ids, attention_mask=mask).logits
                for i, value in zip(rows, logits[:, 0].float().tolist(), strict=True):
                    scores[i] = value
        return scores

    def _compare(self, a, b):
        verdict = super()._compare(a, b)
        if not self.probability or verdict is None or math.isnan(verdict):
            return verdict
        return 1 / (1 + math.exp(-max(min(a - b, 500.0), -500.0)))

    def describe(self):
        found = {**super().describe(), "probability": self.probability, "max_length": self.max_length}
        del found["reward_weights"]  # of one function, the model
        return found


def _unused_token(batch: list[list[int]], vocabulary: int) -> int:
    """A token id that no text of a batch has; where together they have all, one that none of them ends with."""
    for used in (set().union(*batch), {ids[-1] for ids in batch}):
        unused = next((token for token in range(vocabulary) if token not in used), None)
        if unused is not None:
            return unused
    raise ValueError(f"A vocabulary of {vocabulary} tokens leaves none to pad with. Use `batch_size=1`.")


@contextlib.contextmanager
def _scored_before(model, pad: int):
    """
    A classifier reads its score at the last token that is not its configuration's pad token, which may be missing, or be the
    end-of-sequence token that a text ends with. With a pad token that no text has, that is each text's last one.
    """
    config = model.config.get_text_config()
    original, config.pad_token_id = config.pad_token_id, pad
    try:
        yield
    finally:
        config.pad_token_id = original


def default_device() -> str:
    """Where models go that are loaded here: a CUDA device if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- Judging ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Judgements:
    """
    A judge's verdicts on `N` prompts.

    Args:
        first (array of shape `(N,)`):
            Scores with `a` shown first; NaN without a verdict.
        swapped (array of shape `(N,)`, *optional*):
            Verdicts with `b` shown first (1 if `b` wins); `None` if one order was asked for, or is enough.
    """

    first: np.ndarray
    swapped: np.ndarray | None = None

    @property
    def judged(self) -> np.ndarray:
        """Whether each prompt has a verdict in every order, boolean of shape `(N,)`."""
        missing = np.isnan(self.first)
        return ~(missing if self.swapped is None else missing | np.isnan(self.swapped))

    @property
    def scores(self) -> np.ndarray:
        """One score a prompt, orders combined, `(N,)`; NaN without a verdict."""
        if self.swapped is None:
            return self.first
        scores = np.full(len(self.first), np.nan)
        if self.judged.any():
            scores[self.judged] = rates.combine_orders(self.first[self.judged], self.swapped[self.judged])
        return scores

    def win_rate(self, confidence: float = 0.95) -> rates.WinRate:
        """Win rate of `a` over the prompts with a verdict."""
        if not self.judged.any():
            raise JudgeError("The judge gave no verdict on any prompt, so there is no win rate. Look at its replies.")
        return rates.win_rate(self.scores[self.judged], confidence=confidence)

    def order_consistency(self):
        """See [`~trl_ext.evaluation.order_consistency`]; `None` with one order."""
        if self.swapped is None or not self.judged.any():
            return None
        return rates.order_consistency(self.first[self.judged], self.swapped[self.judged])


def check_columns(judge: Judge, columns: Iterable[str]) -> None:
    """
    To be asked before anything is sampled.

    Raises:
        `ValueError`: If a judge needs a column that the data do not have.
    """
    missing = sorted(judge.needed_columns() - set(columns))
    if missing:
        raise ValueError(
            f"The judge {judge.name} needs the column{'s' * (len(missing) > 1)} {', '.join(f'`{name}`' for name in missing)}, "
            f"and the data have {', '.join(sorted(columns)) or 'none'} beside the prompts. Give data that have what it needs, "
            "or its parameter a default."
        )


def _verdicts(judge: Judge, prompts, completions_a, completions_b, columns: dict) -> np.ndarray:
    verdicts = list(judge(list(prompts), list(completions_a), list(completions_b), **_taken(judge, columns)))
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
    taken = _taken(judge.rewards, {name: list(values) for name, values in (columns or {}).items()})
    values = judge.rewards(list(prompts), as_completions(prompts, texts), **taken)
    if len(values) != len(texts):
        raise JudgeError(f"The judge {judge.name} gave {len(values)} rewards for {len(texts)} completions.")
    bad = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
    if bad:
        raise JudgeError(f"The judge {judge.name} gave the reward {values[bad[0]]!r} for completion {bad[0]}.")
    return np.array([np.nan if value is None else float(value) for value in values])


def prompt_rewards(rewards: np.ndarray) -> np.ndarray:
    """The reward of each prompt, `(N,)`, of one response `(N,)` or the mean of those of several `(N, K)` that have one."""
    table = rewards.reshape(len(rewards), -1)
    given = ~np.isnan(table)
    means = np.full(len(table), np.nan)
    return np.divide(np.where(given, table, 0).sum(axis=1), given.sum(axis=1), out=means, where=given.any(axis=1))


def judge_responses(
    judge,
    prompts: Sequence,
    completions: Sequence,
    opponent_completions: Sequence,
    *,
    both_orders: bool = True,
    columns: Mapping[str, Sequence] | None = None,
) -> Judgements:
    """
    Asks a judge about each prompt's two completions, in both orders.

    Args:
        judge ([`Judge`] or `Callable`):
            As described at the top of this module.
        prompts, completions, opponent_completions (`Sequence` of length `N`):
            The prompts, and one completion of each by the model and by its opponent. Texts as completions of prompts that are
            messages are made messages.
        both_orders (`bool`, *optional*, defaults to `True`):
            Ask again with the completions swapped. Needless for a judge that is symmetric, which is asked once.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the prompts' dataset, each of length `N`, for a judge that takes them.
    """
    judge = as_judge(judge)
    if not len(prompts) == len(completions) == len(opponent_completions):
        raise ValueError(
            f"`prompts`, `completions` and `opponent_completions` must have the same length, got {len(prompts)}, "
            f"{len(completions)} and {len(opponent_completions)}."
        )
    columns = {name: list(values) for name, values in (columns or {}).items()}
    check_columns(judge, columns)
    first, second = as_completions(prompts, completions), as_completions(prompts, opponent_completions)
    scores = _verdicts(judge, prompts, first, second, columns)
    if not both_orders or judge.symmetric:
        return Judgements(scores)
    return Judgements(scores, _verdicts(judge, prompts, second, first, columns))


def as_completions(prompts: Sequence, texts: Sequence) -> list:
    """Texts as completions in their prompts' form: an assistant's message where the prompt is messages."""
    return [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) and isinstance(text, str) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def load_judge(spec: str, *, device: str | None = None) -> Judge:
    """
    A judge from a word on a command line.

    Args:
        spec (`str`):
            `rewards.py:name` or `package.module:name`: a reward function of yours (its file is executed), or a [`Judge`].
            `reward_model:ID_OR_FOLDER`: a reward model.
            `endpoint:MODEL@https://host/v1`: a model behind an OpenAI-compatible endpoint, its key in `OPENAI_API_KEY`.
        device (`str`, *optional*):
            Where a reward model is put.
    """
    from .endpoint import EndpointJudge

    kind, _, rest = spec.partition(":")
    model, _, url = rest.rpartition("@")
    if kind == "reward_model" and rest:
        return RewardModelJudge(rest, device=device)
    if kind == "endpoint" and model and url:
        return EndpointJudge(model, url)
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier() or kind in ("reward_model", "endpoint"):
        raise ValueError(
            f"`judge={spec!r}` is none of `FILE.py:FUNCTION`, `MODULE:FUNCTION`, `reward_model:ID_OR_FOLDER` and "
            "`endpoint:MODEL@URL`."
        )
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"`judge={spec!r}`: there is no file {source}.")
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    if not hasattr(module, name):
        raise ValueError(f"`judge={spec!r}`: {source} has no {name}.")
    found = getattr(module, name)
    return found if isinstance(found, Judge) else RewardFunctionJudge(found)
