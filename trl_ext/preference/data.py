"""Checks of preference data before the first step, so that a bad row costs a message and not a run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset


logger = get_logger(__name__)

TOKENIZED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SIDES = ("chosen", "rejected")


def is_tokenized(columns: Iterable[str] | None) -> bool:
    """Whether a dataset already went through the trainer's tokenisation."""
    return set(TOKENIZED_COLUMNS) <= set(columns or ())


def check_not_empty_dataset(dataset, name: str) -> None:
    """Raises `ValueError` if a dataset, map-style or streaming, has no rows."""
    if isinstance(dataset, Dataset | IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(f"The {name} dataset has no rows. Check the split's name and any filter applied to it.")


def check_columns(columns: Iterable[str], name: str) -> None:
    """Raises `ValueError` if a preference column is missing."""
    columns = list(columns)
    missing = [side for side in SIDES if side not in columns]
    if missing and not is_tokenized(columns):
        raise ValueError(
            f"The {name} dataset has no column {' and no column '.join(f'`{side}`' for side in missing)}; it has "
            f"{sorted(columns)}. Preference data needs `chosen` and `rejected`, and usually `prompt`: rename yours "
            "with `dataset.rename_column(old, new)`."
        )


def check_dataset_types(eval_dataset) -> None:
    """Raises `TypeError` for evaluation sets in a container that nobody iterates over."""
    if isinstance(eval_dataset, list | tuple):
        raise TypeError(
            f"`eval_dataset` is a {type(eval_dataset).__name__}. Give a `datasets.Dataset`, or several as a dictionary from "
            "their names."
        )


def check_prompt(row: dict, name: str) -> None:
    """Raises `ValueError` for a row whose prompt cannot stand before its responses."""
    prompt, chosen = row.get("prompt", ""), row.get("chosen")
    if isinstance(prompt, str) and isinstance(chosen, list):
        raise ValueError(
            f"The {name} dataset has a text as `prompt` and messages as `chosen`. If `chosen` and `rejected` are whole "
            'dialogues, leave `prompt` out, and what they share becomes the prompt: `dataset.remove_columns("prompt")`. '
            "Otherwise make the prompt messages too."
        )
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise ValueError(
            f"The {name} dataset has messages as `prompt` and a text as `chosen`. Make both messages, or both texts."
        )


def check_eos_token(row: dict, tokenizer) -> None:
    """Raises `ValueError` if responses that are texts cannot be ended for want of an end-of-sequence token."""
    if tokenizer.eos_token is None and isinstance(row.get("chosen"), str):
        raise ValueError(
            "The tokenizer has no end-of-sequence token, with which responses end. Set one that the model knows: "
            "`tokenizer.eos_token = ...`, and pass it as `processing_class`."
        )


def _is_empty(completion) -> bool:
    """Whether a completion, text or messages, says nothing. Tool calls count as saying something."""
    if completion is None:
        return True
    if isinstance(completion, str):
        return not completion.strip()
    if isinstance(completion, list):
        return not any(message.get("tool_calls") or not _is_blank(message.get("content")) for message in completion)
    return False


def _is_blank(content) -> bool:
    """Whether a message's content, text or a list of parts, says nothing. A part that is no text says something."""
    if isinstance(content, list):
        return all(part.get("type", "text") == "text" and _is_blank(part.get("text")) for part in content)
    return not (content or "").strip()


def _raise_empty(name: str, side: str, rows: list[int]) -> None:
    shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    raise ValueError(
        f"Row {rows[0]} of the {name} dataset has an empty `{side}` completion ({len(rows)} such row(s): {shown}). A "
        "preference needs a response on both sides. Mend these rows, or set `drop_empty_completions=True` to leave them "
        "out."
    )


def check_completions(
    dataset: Dataset | IterableDataset, name: str, drop_empty: bool = False
) -> Dataset | IterableDataset:
    """
    Returns the dataset, having made sure that no `chosen` or `rejected` is empty and no `prompt` missing.

    A map-style dataset is read once, here; a streaming one as it streams.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with `chosen` and `rejected`, texts or messages, without their prompt.
        name (`str`):
            Name of the split, for messages.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Leave the rows out, with a warning, instead of raising.

    Raises:
        `ValueError`: If a completion is empty or a prompt missing, naming its row, the column and the fix.
    """
    check_prompt(next(iter(dataset)), name)
    if isinstance(dataset, IterableDataset):
        if drop_empty:
            return dataset.filter(lambda row: not any(_is_empty(row[side]) for side in SIDES))

        def check_row(row, index):
            for side in SIDES:
                if _is_empty(row[side]):
                    _raise_empty(name, side, [index])
            return row

        return dataset.map(check_row, with_indices=True)

    rows: dict[str, list[int]] = {side: [] for side in SIDES}
    start = 0
    prompts = ["prompt"] if "prompt" in dataset.column_names else []
    for batch in dataset.select_columns([*SIDES, *prompts]).with_format(None).iter(batch_size=1000):
        for i, prompt in enumerate(batch["prompt"] if prompts else ()):
            if prompt is None:
                raise ValueError(
                    f"Row {start + i} of the {name} dataset has `prompt=None`. Mend this row, or leave it out; an empty prompt "
                    "is ''."
                )
        for side in SIDES:
            rows[side] += [start + i for i, completion in enumerate(batch[side]) if _is_empty(completion)]
        start += len(batch["chosen"])
    empty = set(rows["chosen"] + rows["rejected"])
    if empty and drop_empty:
        logger.warning(f"Left out {len(empty)} of the {start} pairs of the {name} dataset: a response is empty.")
        return dataset.select([i for i in range(start) if i not in empty])
    for side in SIDES:
        if rows[side]:
            _raise_empty(name, side, rows[side])
    return dataset


def check_numbers(
    dataset: Dataset | IterableDataset,
    name: str,
    columns: Iterable[str],
    value_range: tuple[float, float] = (-math.inf, math.inf),
) -> Dataset | IterableDataset:
    """
    Returns the dataset, having made sure that each of `columns` is there and holds a finite number in every row, within
    `value_range`.

    A map-style dataset is read once, here; a streaming one as it streams.

    Raises:
        `ValueError`: If a column is missing, or a value is not such a number, naming its row and the fix.
    """
    columns = list(columns)
    if not columns:
        return dataset
    first = next(iter(dataset))
    for column in columns:
        if column not in first:
            raise ValueError(
                f"The {name} dataset has no column `{column}`, which the method was configured to read; it has "
                f"{sorted(first)}. Add the column, a number a pair, or configure the method without it."
            )
    if isinstance(dataset, IterableDataset):

        def check_row(row, index):
            for column in columns:
                _check_number(row[column], name, column, index, value_range)
            return row

        return dataset.map(check_row, with_indices=True)
    start = 0
    for batch in dataset.select_columns(columns).with_format(None).iter(batch_size=1000):
        for column in columns:
            for i, value in enumerate(batch[column]):
                _check_number(value, name, column, start + i, value_range)
        start += len(batch[columns[0]])
    return dataset


def _check_number(value, name: str, column: str, index: int, value_range: tuple[float, float]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(
            f"Row {index} of the {name} dataset has `{column}={value!r}`, which is not a finite number. Mend this row, or "
            "leave it out."
        )
    low, high = value_range
    if not low <= value <= high:
        raise ValueError(
            f"Row {index} of the {name} dataset has `{column}={value!r}`, which is not in [{low:g}, {high:g}]. Mend this "
            "row, or leave it out."
        )


@dataclass
class ColumnCollator:
    """
    A collator that also takes up numbers of the rows, which [`~trl.DPOTrainer`]'s collator leaves out.

    Args:
        collator (`Callable`):
            Collator of everything else.
        columns (`tuple[str, ...]`):
            Columns that become fp32 tensors `(B,)` under the batch's key `columns`.
        precomputed (`tuple[str, ...]`, *optional*, defaults to `()`):
            Columns that become fp32 tensors `(B,)` under their own names, where the rows have them.
    """

    collator: Callable[[list[dict]], dict]
    columns: tuple[str, ...]
    precomputed: tuple[str, ...] = ()

    def __call__(self, examples: list[dict]) -> dict:
        def tensors(names):
            return {name: torch.tensor([example[name] for example in examples], dtype=torch.float32) for name in names}

        found = tensors(self.columns)
        precomputed = tensors(name for name in self.precomputed if name in examples[0])
        batch = self.collator(examples)
        if found:
            batch["columns"] = found
        batch.update(precomputed)
        return batch


def list_column(column) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of an Arrow list column, without Python objects."""
    column = column.combine_chunks()
    return column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def check_tokenized(
    dataset: Dataset | IterableDataset, name: str, max_length: int | None, truncation_mode: str = "keep_start"
) -> None:
    """
    Makes sure that every tokenised completion has a token, and counts the pairs whose two sides are the same.

    A pair is identical if its two sides are the same after truncation: it then carries no preference. Such pairs are
    kept, as they do no harm beyond the compute they cost, and one warning says how many there are.

    Raises:
        `ValueError`: If a completion has no tokens.
    """
    if isinstance(dataset, IterableDataset):
        return
    empty: dict[str, list[int]] = {side: [] for side in SIDES}
    identical, start = [], 0
    tables = dataset.select_columns(list(TOKENIZED_COLUMNS)).with_format("arrow").iter(batch_size=1000)
    for table in tables:
        (_, prompts), (chosen, c), (rejected, r) = (list_column(table[column]) for column in TOKENIZED_COLUMNS)
        for side, offsets in zip(SIDES, (c, r), strict=True):
            empty[side] += (start + np.flatnonzero(np.diff(offsets) == 0)).tolist()
        for i, prompt_length in enumerate(np.diff(prompts)):
            if max_length is None:
                kept = slice(None)
            elif truncation_mode == "keep_end":
                kept = slice(-max_length, None)
            else:
                kept = slice(max(max_length - prompt_length, 0))
            if np.array_equal(chosen[c[i] : c[i + 1]][kept], rejected[r[i] : r[i + 1]][kept]):
                identical.append(start + i)
        start += len(c) - 1
    for side in SIDES:
        if empty[side]:
            _raise_empty(name, side, empty[side])
    if identical:
        shown = ", ".join(map(str, identical[:10])) + (", ..." if len(identical) > 10 else "")
        logger.warning(
            f"{len(identical)} of the {start} pairs of the {name} dataset have identical `chosen` and `rejected` "
            f"(after truncation to `max_length={max_length}`): rows {shown}. They are kept, but teach nothing. Raise "
            "`max_length` if truncation made them equal, or drop them."
        )
