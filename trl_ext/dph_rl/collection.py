"""The stage before training: which prompts the initial model masters, and answers to them to rehearse."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._checks import at_least, between, check_value
from ..rollout.pass_rates import (
    Answer,
    AnswerOptions,
    Answers,
    PassRates,
    find_reward_threshold,
    is_right,
    pass_rates_of,
)


logger = get_logger(__name__)

# Shares of prompts outside of which the near-perfect set is likely not what the method needs.
_FEW, _MANY = 0.01, 0.5


class Rehearsal(NamedTuple):
    """
    The result of [`collect_rehearsal`].

    Args:
        exploration ([`~datasets.Dataset`]):
            Prompts to train on, with their columns.
        near_perfect ([`~datasets.Dataset`]):
            Prompts that the initial model masters.
        rehearsal ([`~datasets.Dataset`]):
            Right answers to them: `prompt`, `completion`, `prompt_ids`, `completion_ids`, `reward`.
        rates ([`~trl_ext.rollout.pass_rates.PassRates`]):
            How often each prompt was answered right.
    """

    exploration: Dataset
    near_perfect: Dataset
    rehearsal: Dataset
    rates: PassRates


def collect_rehearsal(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    reward_funcs: Callable | Sequence[Callable],
    *,
    samples: int = 8,
    threshold: float = 1.0,
    extra: int = 1,
    reward_weights: Sequence[float] | None = None,
    reward_threshold: float | None = None,
    drop_hopeless: bool = False,
    options: AnswerOptions | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = False,
) -> Rehearsal:
    """
    Splits prompts into those that the model masters and those to train on, and collects answers to the former.

    `samples` answers to each prompt are sampled and scored. A prompt with a share of at least `threshold` right ones
    is mastered. Because these answers decided that, they are biased: `extra` more are sampled for each mastered
    prompt, and the right ones among them are the answers to rehearse.

    Args:
        model, processing_class, dataset, reward_funcs, reward_weights, options, cache_dir, show_progress:
            As in [`~trl_ext.rollout.pass_rates.Answers`]: an interrupted collection with a `cache_dir` continues.
        samples (`int`, *optional*, defaults to `8`):
            Answers to each prompt that decide whether it is mastered.
        threshold (`float`, *optional*, defaults to `1.0`):
            Share of right answers from which it is, in (0, 1].
        extra (`int`, *optional*, defaults to `1`):
            Further answers to each mastered prompt.
        reward_threshold (`float`, *optional*):
            Least reward of a right answer. Defaults to the largest reward of any answer.
        drop_hopeless (`bool`, *optional*, defaults to `False`):
            Leave prompts without any right answer out of the exploration set. GRPO learns nothing from them as long as
            that stays so.

    Returns:
        [`Rehearsal`]

    Raises:
        `ValueError`: For an option out of its range, if no answer has a reward, or if no prompt is mastered, or none is
            left to train on.
    """
    for name, value, allowed in (
        ("samples", samples, at_least(1)),
        ("extra", extra, at_least(1)),
        ("threshold", threshold, between(0, 1, "(]")),
    ):
        check_value(name, value, _annotated(float if name == "threshold" else int, allowed))
    answers = Answers(
        model,
        processing_class,
        dataset,
        reward_funcs,
        reward_weights=reward_weights,
        options=options,
        cache_dir=cache_dir,
        show_progress=show_progress,
    )
    first = answers(range(len(dataset)), range(samples))
    limit = find_reward_threshold(first, reward_threshold)
    rates = pass_rates_of(first, limit)
    # A share of 0.7 is reached by 7 of 10, whatever 0.7 is in binary.
    is_mastered = rates.num_correct >= threshold * samples - 1e-9
    is_explored = ~is_mastered & ((rates.num_correct > 0) | (not drop_hopeless))
    mastered = np.flatnonzero(is_mastered).tolist()
    _check_split(rates, len(mastered), int(is_explored.sum()), threshold)
    further = answers(mastered, range(samples, samples + extra))
    kept = [answer for group in further for answer in group if is_right(answer, limit)]
    if not kept:
        raise ValueError(
            f"None of the {extra} further answers to each of the {len(mastered)} mastered prompts is right, so there "
            "is nothing to rehearse. Raise `extra` or `samples`."
        )
    return Rehearsal(
        dataset.select(np.flatnonzero(is_explored)),
        dataset.select(mastered),
        Dataset.from_list([_as_row(dataset, answer) for answer in kept]),
        rates,
    )


def _annotated(kind: type, allowed):
    from typing import Annotated

    return Annotated[kind, allowed]


def _check_split(rates: PassRates, mastered: int, explored: int, threshold: float) -> None:
    total = len(rates.num_correct)
    if not mastered:
        raise ValueError(
            f"No prompt has a share of right answers of at least `threshold={threshold:g}`, so there is nothing to "
            f"rehearse. Lower it, or add easier prompts.\n{rates.describe()}"
        )
    if not explored:
        raise ValueError(
            f"No prompt is left to train on: all {mastered} are mastered. Add harder prompts, or raise `samples`.\n"
            f"{rates.describe()}"
        )
    if not _FEW <= mastered / total <= _MANY:
        logger.warning(
            f"{mastered} of {total} prompts ({mastered / total:.1%}) are mastered. Below {_FEW:.0%} the rehearsed "
            f"answers say little about the model, above {_MANY:.0%} most prompts teach nothing. {rates.describe()}"
        )


def _as_row(dataset: Dataset, answer: Answer) -> dict:
    return {
        "prompt": dataset[answer.row]["prompt"],
        "completion": answer.completion,
        "prompt_ids": answer.prompt_ids,
        "completion_ids": answer.completion_ids,
        "reward": answer.reward,
    }
