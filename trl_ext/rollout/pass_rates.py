"""How often a model answers each prompt right, measured before training: answers, rewards, and a filter of prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._checks import above, at_least, between, check_value
from .._trl import tokenize
from ..judges import RewardFunctionJudge
from ..judges.callables import check_columns
from ..training.arguments import without_format
from ..training.fingerprints import reference_fingerprint
from ..training.sampling import pack, sample_tokens, unpack
from ..training.tensor_cache import TensorCache


# Prompts whose answers are one file of the cache.
_PROMPTS_A_FILE = 16


@dataclass(frozen=True)
class AnswerOptions:
    """
    How answers are sampled; the defaults sample the model's own distribution.

    Args:
        max_completion_length (`int`, *optional*, defaults to `512`):
            Tokens of an answer at most. An answer that is cut there is scored as it is.
        temperature, top_p, top_k, min_p:
            Shape of the sampled distribution.
        seed (`int`, *optional*, defaults to `42`):
            An answer depends on it, on its row and on its number, and not on the batch or the process.
        batch_size (`int`, *optional*, defaults to `32`):
            Answers that are sampled at once.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template, as in [`~trl.GRPOConfig`].
    """

    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    seed: int = 42
    batch_size: int = 32
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        checks = {
            "max_completion_length": at_least(1),
            "temperature": above(0),
            "top_p": between(0, 1, "(]"),
            "top_k": at_least(0),
            "min_p": between(0, 1),
            "batch_size": at_least(1),
        }
        for name, allowed in checks.items():
            value = getattr(self, name)
            if value is not None or name != "min_p":
                kind = int if name in ("max_completion_length", "top_k", "batch_size") else float
                check_value(name, value, _annotated(kind, allowed))

    @property
    def sampled(self) -> dict[str, Any]:
        """What the tokens of an answer depend on, beside model, prompt, row and number."""
        names = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "seed")
        return {name: getattr(self, name) for name in names}


def _annotated(kind: type, allowed) -> Any:
    from typing import Annotated

    return Annotated[kind, allowed]


@dataclass(frozen=True)
class Answer:
    """
    One answer of a model to a prompt.

    Args:
        row (`int`): The prompt's row in the dataset.
        prompt_ids, completion_ids (`list[int]`): Tokens without padding; an answer that the model ended has its
            end-of-sequence token.
        completion (`str` or `list[dict]`): Text, or an assistant's message where the prompt is a conversation.
        reward (`float`, *optional*): Sum of the rewards; `None` if a function gave none.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str | list[dict[str, str]]
    reward: float | None


class Answers:
    """
    Samples answers of a model to the prompts of a dataset and scores them. Sampled tokens are kept on disk, so that an
    interrupted collection continues; rewards are computed again.

    In several processes each samples a part of the prompts, and all get everything.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, on the device where it should run.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset ([`~datasets.Dataset`]):
            Prompts, text or messages, in the column `prompt`; the reward functions get the other columns.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions as [`~trl.GRPOTrainer`] takes them, coroutine functions included.
        reward_weights (`list[float]`, *optional*):
            Their weights; all 1 by default.
        options ([`AnswerOptions`], *optional*):
            How answers are sampled.
        cache_dir (`str` or `Path`, *optional*):
            Where sampled tokens are kept; nowhere by default.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: For a dataset without prompts, or without a column that a reward function needs.
    """

    def __init__(
        self,
        model,
        processing_class,
        dataset: Dataset,
        reward_funcs: Callable | Sequence[Callable],
        *,
        reward_weights: Sequence[float] | None = None,
        options: AnswerOptions | None = None,
        cache_dir: str | Path | None = None,
        show_progress: bool = False,
    ):
        functions: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not functions or not all(callable(f) and not isinstance(f, torch.nn.Module) for f in functions):
            raise TypeError(
                f"`reward_funcs` must be functions `(prompts, completions, **columns)`, got {reward_funcs!r}. Wrap a "
                "reward model in a function that calls it."
            )
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            raise ValueError(
                f"`dataset` must be a `datasets.Dataset` with a column `prompt`, got {_described(dataset)}."
            )
        if not len(dataset):
            raise ValueError("`dataset` is empty. Give at least one prompt.")
        self.model = model
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.processing_class = processing_class
        self.dataset = without_format(dataset, "given")
        self.judge = RewardFunctionJudge(functions, None if reward_weights is None else list(reward_weights))
        self.columns = [name for name in self.dataset.column_names if name not in _NOT_COLUMNS]
        check_columns(self.judge, {*self.columns, "completion_ids"})
        self.options = AnswerOptions() if options is None else options
        self.cache = TensorCache(cache_dir)
        self.show_progress = show_progress
        self.state = PartialState()
        self.prompt_ids = [self._tokenize(prompt) for prompt in self.dataset["prompt"]]
        self._fingerprint: str | None = None

    def _tokenize(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            return tokenize(self.processing_class, prompt)["input_ids"]
        options = self.options.chat_template_kwargs
        return tokenize(self.processing_class, prompt, add_generation_prompt=True, **options)["input_ids"]

    @property
    def fingerprint(self) -> str:
        """Hash of the model, part of the name of what is kept."""
        if self._fingerprint is None:
            adapter = self.model.active_adapter if is_peft_model(self.model) else None
            precision = (str(next(self.model.parameters()).dtype),)
            self._fingerprint = reference_fingerprint(self.model, adapter, precision, self.state)
        return self._fingerprint

    def __call__(self, rows: Sequence[int], numbers: range) -> list[list[Answer]]:
        """
        The answers with these numbers to the prompts in these rows.

        Args:
            rows (`Sequence[int]`):
                Rows of the dataset.
            numbers (`range`):
                Numbers of the answers to each prompt: others are independent of them.

        Returns:
            `list[list[Answer]]`: One list a row.
        """
        rows = list(rows)
        files = [rows[start : start + _PROMPTS_A_FILE] for start in range(0, len(rows), _PROMPTS_A_FILE)]
        mine = files[self.state.process_index :: self.state.num_processes]
        found = []
        for part in tqdm(mine, desc="Answers", unit="file", disable=not (self.show_progress and self._is_main)):
            found += self._tokens(part, numbers)
        if self.state.num_processes > 1:
            found = gather_object(found)
        tokens = {(row, number): ids for row, number, ids in found}
        return self._scored(rows, numbers, tokens)

    @property
    def _is_main(self) -> bool:
        return self.state.is_local_main_process

    def _tokens(self, rows: list[int], numbers: range) -> list[tuple[int, int, list[int]]]:
        prompts = [self.prompt_ids[row] for row in rows]
        settings = self.options.sampled
        kept = self.cache(
            lambda: self._sample(rows, numbers), "answers", self.fingerprint, settings, rows, prompts, list(numbers)
        )
        keys = [(row, number) for row in rows for number in numbers]
        return [(*key, ids) for key, ids in zip(keys, unpack(kept), strict=True)]

    def _sample(self, rows: list[int], numbers: range) -> dict[str, torch.Tensor]:
        options = self.options
        keys = [(row, number) for row in rows for number in numbers]
        sampled = sample_tokens(
            self.model,
            self.tokenizer,
            [self.prompt_ids[row] for row, _ in keys],
            [(options.seed, "answer", row, number) for row, number in keys],
            max_new_tokens=options.max_completion_length,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            batch_size=options.batch_size,
        )
        return pack(sampled)

    def _scored(self, rows, numbers, tokens) -> list[list[Answer]]:
        keys = [(row, number) for row in rows for number in numbers]
        if not keys:
            return [[] for _ in rows]
        prompts = self.dataset["prompt"]
        texts = self.tokenizer.batch_decode([tokens[key] for key in keys], skip_special_tokens=True)
        completions = [
            text if isinstance(prompts[row], str) else [{"role": "assistant", "content": text}]
            for (row, _), text in zip(keys, texts, strict=True)
        ]
        columns = {name: [self.dataset[row][name] for row, _ in keys] for name in self.columns}
        columns["completion_ids"] = [tokens[key] for key in keys]
        rewards = iter(self.judge.rewards([prompts[row] for row, _ in keys], completions, **columns))
        answers = iter(
            Answer(row, self.prompt_ids[row], tokens[row, number], completion, reward)
            for (row, number), completion, reward in zip(keys, completions, rewards, strict=True)
        )
        return [[next(answers) for _ in numbers] for _ in rows]


# Columns that reward functions get under another name, or not at all.
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class PassRates:
    """
    How often each prompt of a dataset was answered right.

    Args:
        num_samples (`int`):
            Answers to each prompt.
        num_correct (`numpy.ndarray` of shape `(prompts,)`):
            The right ones among them: [`~trl_ext.evaluation.pass_at_k`] takes both.
        reward_threshold (`float`):
            Least reward of a right answer.
    """

    num_samples: int
    num_correct: np.ndarray
    reward_threshold: float

    @property
    def rates(self) -> np.ndarray:
        """Share of right answers to each prompt."""
        return self.num_correct / self.num_samples

    def histogram(self) -> list[int]:
        """Number of prompts with 0, 1, ..., `num_samples` right answers."""
        return np.bincount(self.num_correct, minlength=self.num_samples + 1).tolist()

    def describe(self) -> str:
        """The histogram in lines of text."""
        counts = self.histogram()
        width = max(counts)
        lines = [f"right answers of {self.num_samples}, and prompts with so many:"]
        for right, count in enumerate(counts):
            lines.append(f"{right:>4}  {count:>7}  {'#' * round(40 * count / max(1, width))}".rstrip())
        return "\n".join(lines)


def find_reward_threshold(answers: Sequence[Sequence[Answer]], given: float | None) -> float:
    """
    Least reward of a right answer: the one that was given, or the largest among `answers`.

    Raises:
        `ValueError`: If no answer has a reward, or if the largest reward is also the smallest and none was given.
    """
    rewards = [answer.reward for group in answers for answer in group if answer.reward is not None]
    if not rewards:
        raise ValueError("The reward functions gave no reward to any answer, so nothing is known about the prompts.")
    if given is not None:
        return given
    if min(rewards) == max(rewards):
        raise ValueError(
            f"All answers have the reward {rewards[0]:g}, so it is not known whether it is that of a right one. Give "
            "`reward_threshold`, the least reward of a right answer."
        )
    return max(rewards)


def is_right(answer: Answer, reward_threshold: float) -> bool:
    """Whether an answer is right. One without a reward is not."""
    # Rewards are sums of floats: 0.1 + 0.2 is a right answer where 0.3 is asked for.
    return answer.reward is not None and answer.reward >= reward_threshold - 1e-6 * max(1.0, abs(reward_threshold))


def pass_rates_of(answers: Sequence[Sequence[Answer]], reward_threshold: float) -> PassRates:
    """[`PassRates`] of answers to each prompt."""
    correct = [sum(is_right(answer, reward_threshold) for answer in group) for group in answers]
    return PassRates(len(answers[0]), np.array(correct), reward_threshold)


def measure_pass_rates(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_funcs: Callable | Sequence[Callable],
    *,
    samples: int = 8,
    reward_weights: Sequence[float] | None = None,
    reward_threshold: float | None = None,
    options: AnswerOptions | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = False,
) -> PassRates:
    """
    Measures how often a model answers each prompt of a dataset right.

    Args:
        model, processing_class, dataset, reward_funcs, reward_weights, options, cache_dir, show_progress:
            As in [`Answers`].
        samples (`int`, *optional*, defaults to `8`):
            Answers to each prompt.
        reward_threshold (`float`, *optional*):
            Least reward of a right answer. Defaults to the largest reward of any answer.

    Returns:
        [`PassRates`]
    """
    samples = check_value("samples", samples, _annotated(int, at_least(1)))
    answers = Answers(
        model,
        processing_class,
        dataset,
        reward_funcs,
        reward_weights=reward_weights,
        options=options,
        cache_dir=cache_dir,
        show_progress=show_progress,
    )(range(len(dataset)), range(samples))
    return pass_rates_of(answers, find_reward_threshold(answers, reward_threshold))


def filter_by_pass_rate(dataset: Dataset, rates: PassRates, *, above: float = 0.0, below: float = 1.0) -> Dataset:
    """
    The prompts whose share of right answers is above `above` and below `below`: by default those that have an
    advantage, as they are answered right sometimes and not always.

    Args:
        dataset ([`~datasets.Dataset`]):
            The prompts that were measured.
        rates ([`PassRates`]):
            The result of [`measure_pass_rates`] for this dataset.
        above (`float`, *optional*, defaults to `0.0`), below (`float`, *optional*, defaults to `1.0`):
            Bounds, which are themselves excluded; -1 or 2 bounds nothing.

    Raises:
        `ValueError`: If `rates` are those of another number of prompts, or no prompt is left.
    """
    if len(dataset) != len(rates.num_correct):
        raise ValueError(
            f"`rates` are of {len(rates.num_correct)} prompts, and `dataset` has {len(dataset)}. Measure this dataset."
        )
    rows = np.flatnonzero((rates.rates > above) & (rates.rates < below))
    if not len(rows):
        raise ValueError(
            f"No prompt has a share of right answers above {above:g} and below {below:g}:\n{rates.describe()}"
        )
    return dataset.select(rows)


def _described(dataset) -> str:
    columns = f" with {list(dataset.column_names)}" if hasattr(dataset, "column_names") else ""
    return f"a `{type(dataset).__name__}`{columns}"
