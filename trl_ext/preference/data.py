"""Checks of preference data before the first step, so that a bad row costs a message and not a run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from .rows import SIDES, raise_rows


logger = get_logger(__name__)

TOKENIZED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def is_tokenized(columns: Iterable[str] | None) -> bool:
    """Whether a dataset already went through the trainer's tokenization."""
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
    """Raises `TypeError` if `eval_dataset` is a list or tuple; several sets are given as a dictionary."""
    if isinstance(eval_dataset, list | tuple):
        raise TypeError(
            f"`eval_dataset` is a {type(eval_dataset).__name__}. Give a `datasets.Dataset`, or several as a "
            "dictionary from their names."
        )


def check_eos_token(row: dict, tokenizer) -> None:
    """Raises `ValueError` if responses are texts and the tokenizer has no end-of-sequence token to end them."""
    if tokenizer.eos_token is None and isinstance(row.get("chosen"), str):
        raise ValueError(
            "The tokenizer has no end-of-sequence token, with which responses end. Set one that the model knows: "
            "`tokenizer.eos_token = ...`, and pass it as `processing_class`."
        )


def check_numbers(
    dataset: Dataset | IterableDataset,
    name: str,
    columns: Iterable[str],
    value_range: tuple[float, float] = (-math.inf, math.inf),
) -> Dataset | IterableDataset:
    """
    Returns the dataset after checking that each of `columns` exists and that every row holds a finite number within
    `value_range`.

    A map-style dataset is checked once, here; a streaming one row by row as it streams.

    Raises:
        `ValueError`: If a column is missing or a value is invalid. The message names the row and the fix.
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
            f"Row {index} of the {name} dataset has `{column}={value!r}`, which is not a finite number. Fix this row, "
            "or leave it out."
        )
    low, high = value_range
    if not low <= value <= high:
        raise ValueError(
            f"Row {index} of the {name} dataset has `{column}={value!r}`, which is not in [{low:g}, {high:g}]. Fix "
            "this row, or leave it out."
        )


@dataclass
class ColumnCollator:
    """
    Extends [`~trl.DPOTrainer`]'s collator, which drops numeric columns, by the columns a method reads.

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
    """Values and offsets of an Arrow list column, of any or of a fixed size, without Python objects."""
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        return column.flatten().to_numpy(zero_copy_only=False), np.arange(len(column) + 1) * size
    return column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def check_token_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """
    Raises `ValueError` if `prompt_ids`, `chosen_ids` or `rejected_ids` are not lists of integers: of a map-style
    dataset in any row, of a stream in its first.
    """
    remedy = "Give lists of token ids (integers), or texts in `prompt`, `chosen` and `rejected`."
    if isinstance(dataset, IterableDataset):
        first = next(iter(dataset))
        for column in TOKENIZED_COLUMNS:
            if not isinstance(first[column], list) or not all(type(token) is int for token in first[column]):
                raise ValueError(f"Row 0 of the {name} dataset has {first[column]!r} as `{column}`. {remedy}")
        return
    for column in TOKENIZED_COLUMNS:
        values = dataset.features[column]
        kind = getattr(getattr(values, "feature", None), "dtype", None)
        if not any(word in str(kind) for word in ("int", "null")):
            raise ValueError(f"`{column}` of the {name} dataset holds {dataset[0][column]!r} in row 0. {remedy}")
        for start, table in enumerate(dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)):
            chunk = table[column].combine_chunks()
            if chunk.null_count or chunk.flatten().null_count:
                rows = chunk.to_pylist()
                row = next(i for i, ids in enumerate(rows) if ids is None or None in ids)
                raise ValueError(
                    f"Row {1000 * start + row} of the {name} dataset has {rows[row]!r} as `{column}`. {remedy}"
                )


def check_tokenized(
    dataset: Dataset | IterableDataset,
    name: str,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    known: Callable[[int, str], None] = lambda token, where: None,
) -> Dataset | IterableDataset:
    """
    Checks that every tokenized response has a scored token, and counts the pairs whose two sides are identical.

    The first token of a sequence is never scored, as nothing predicts it. A pair is identical if its two sides are the
    same after truncation: it then carries no preference. Such pairs are kept, as they do no harm beyond the compute
    they cost, and one warning says how many there are. A map-style dataset is read once, here; a streaming one as it
    streams.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized pairs.
        name (`str`):
            Name of the split, for messages.
        max_length (`int`, *optional*), truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            What the collator cuts.
        known (`Callable`, *optional*):
            `known(token, where)` raises for a token that the model does not know: called with the largest of a
            streaming row.

    Raises:
        `ValueError`: If a response has no tokens, or none that is scored.
    """
    if isinstance(dataset, IterableDataset):

        def check(row, index):
            ids = [row[column] for column in TOKENIZED_COLUMNS]
            for side, response in zip(SIDES, ids[1:], strict=True):
                if _num_scored(len(ids[0]), len(response), max_length, truncation_mode) < 1:
                    _raise_unscored(name, side, [index], len(response), max_length)
            every = [token for tokens in ids for token in tokens]
            for token in (min(every), max(every)):
                known(token, f"the {name} dataset (row {index})")
            return row

        return dataset.map(check, with_indices=True)
    unscored: dict[str, list[int]] = {side: [] for side in SIDES}
    identical, start, beginning, empty = [], 0, 0, 0
    tables = dataset.select_columns(list(TOKENIZED_COLUMNS)).with_format("arrow").iter(batch_size=1000)
    for table in tables:
        (_, prompts), (chosen, c), (rejected, r) = (list_column(table[column]) for column in TOKENIZED_COLUMNS)
        beginning += int((np.diff(prompts) == 0).sum())
        for side, offsets in zip(SIDES, (c, r), strict=True):
            for i, (prompt_length, length) in enumerate(zip(np.diff(prompts), np.diff(offsets), strict=True)):
                if _num_scored(prompt_length, length, max_length, truncation_mode) < 1:
                    unscored[side].append(start + i)
                    empty = length if len(unscored[side]) == 1 else empty
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
        if unscored[side]:
            _raise_unscored(name, side, unscored[side], empty, max_length)
    if beginning:
        logger.warning(
            f"{beginning} of the {start} rows of the {name} dataset have no token before their responses, whose first "
            "token is then not scored: nothing predicts it. Give a prompt, or a tokenizer that begins sequences with "
            "a token of its own."
        )
    if identical:
        shown = ", ".join(map(str, identical[:10])) + (", ..." if len(identical) > 10 else "")
        logger.warning(
            f"{len(identical)} of the {start} pairs of the {name} dataset have identical `chosen` and `rejected` "
            f"(after truncation to `max_length={max_length}`): rows {shown}. They are kept, but teach nothing. Raise "
            "`max_length` if truncation made them equal, or drop them."
        )
    return dataset


def _num_scored(prompt_length: int, length: int, max_length: int | None, truncation_mode: str) -> int:
    """Number of a response's tokens that remain after truncation and are not the first of their sequence."""
    total = prompt_length + length
    if max_length is None or total <= max_length:
        return length - (prompt_length == 0)
    if truncation_mode == "keep_end":
        return min(length, max_length - 1)
    return max_length - max(prompt_length, 1)


def _raise_unscored(name: str, side: str, rows: list[int], length: int, max_length: int | None) -> None:
    if length == 0:
        raise_rows(
            name,
            side,
            rows,
            "an empty",
            "A preference needs a response on both sides. Fix these rows, or set `drop_empty_completions=True` to "
            "leave them out.",
        )
    raise_rows(
        name,
        side,
        rows,
        "no scored token in its",
        f"The first token of a sequence has nothing before it that would predict it, and `max_length={max_length}` "
        "cuts the rest. Give these rows a prompt, or a tokenizer that begins sequences with a token of its own; or "
        "raise `max_length`.",
    )


def extreme_tokens(dataset: Dataset) -> list[tuple[int, int]]:
    """The smallest and the largest token id of a tokenized dataset, each with its row; nothing if it has no tokens."""
    found, start = [], 0
    for table in dataset.select_columns(list(TOKENIZED_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        for column in TOKENIZED_COLUMNS:
            values, offsets = list_column(table[column])
            values = values[offsets[0] : offsets[-1]]
            for place in (values.argmin(), values.argmax()) if len(values) else ():
                row = int(np.searchsorted(offsets, offsets[0] + place, side="right")) - 1
                found.append((int(values[place]), start + row))
        start += len(table)
    return [min(found), max(found)] if found else []


def check_known(token: int, where: str, num_embeddings: int | None, tokenizer) -> None:
    """
    Raises `ValueError` for a token without an embedding in the model. On CUDA, the first step would fail with a
    device-side assertion.

    Args:
        token (`int`):
            The token's id.
        where (`str`):
            Where the token was found, for the message.
        num_embeddings (`int`, *optional*):
            Rows of the model's embedding; `None` if they are not known.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Converts the id to a token for the message.
    """
    if token < 0:
        raise ValueError(
            f"Token {token} of {where} is negative, and no token. Labels such as -100 belong to a loss, not to "
            "`prompt_ids`, `chosen_ids` and `rejected_ids`. Give token ids."
        )
    if num_embeddings is not None and token >= num_embeddings:
        raise ValueError(
            f"Token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) of {where} is beyond the model's embedding, "
            f"which has {num_embeddings} rows; the tokenizer has {len(tokenizer)} tokens. Resize the model before "
            "training, `model.resize_token_embeddings(len(tokenizer))`, or use the tokenizer that it was trained with."
        )


@dataclass
class VisionCollator:
    """
    A collator of images and texts that refuses a batch in which a response has no token left.

    Args:
        collator (`Callable`):
            The collator.
        max_length (`int`, *optional*):
            Length to which the collator truncates sequences.
    """

    collator: Callable[[list[dict]], dict]
    max_length: int | None

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        scored = batch["completion_mask"][:, 1:].sum(dim=1)
        if (scored == 0).any():
            row = int((scored == 0).nonzero()[0]) % len(examples)
            raise ValueError(
                f"`max_length={self.max_length}` is too short: it cuts image placeholders, or all of a response, off "
                f"the row with the prompt {str(examples[row].get('prompt'))[:200]!r}. Raise `max_length`, set it to "
                "`None`, or leave such rows out."
            )
        return batch
