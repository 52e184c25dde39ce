"""Rows of datasets, map-style, streaming, or plain lists."""

import itertools
import json
from collections.abc import Iterable


def head(dataset, count: int | None) -> list[dict]:
    """The first `count` rows, or all."""
    return list(itertools.islice(dataset, count))


def distinct_prompts(dataset: Iterable[dict], count: int) -> list[dict]:
    """
    The rows of a dataset that have its first `count` different prompts, each prompt's first row. Preference pairs that hold
    their prompt within both responses are taken apart, as they are for scoring.
    """
    found: dict[str, dict] = {}
    for row in dataset:
        if len(found) == count:
            break
        row = with_prompt(row)
        found.setdefault(json.dumps(row["prompt"], sort_keys=True), row)
    return list(found.values())


def with_prompt(row: dict) -> dict:
    """A row with its prompt in a column of its own."""
    if "prompt" in row:
        return row
    extracted = {}
    if "chosen" in row and "rejected" in row:
        from trl import extract_prompt

        extracted = extract_prompt(row)
    if not extracted.get("prompt"):
        raise ValueError(
            f"The dataset has no column `prompt` to sample responses to, and no `chosen` and `rejected` that begin with the "
            f"same one; it has {sorted(row)}. Use data with prompts, texts or messages."
        )
    return {**row, **extracted}


# Arguments of judges and reward functions that no column of this name may take the place of.
_ARGUMENTS = {"prompt", "prompts", "completion", "completions", "completions_a", "completions_b"}


def columns_of(rows: list[dict]) -> dict[str, list]:
    """The columns of rows that judges and reward functions are given by name: all but the prompts and the completions."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _ARGUMENTS)
    return {name: [row.get(name) for row in rows] for name in names}
