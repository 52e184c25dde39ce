"""Rows of preference data: prompts, columns for judges, and token ids."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def head(dataset, count: int | None) -> list[dict]:
    """The first `count` rows, or all."""
    return list(itertools.islice(dataset, count))


def distinct_prompts(dataset: Iterable[dict], count: int) -> list[dict]:
    """
    The rows of a dataset that have its first `count` different prompts, each prompt's first row. Preference pairs that
    hold their prompt within both responses are taken apart, as they are for scoring.
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
            "The dataset has no column `prompt` to sample responses to, and no `chosen` and `rejected` that begin "
            f"with the same one; it has {sorted(row)}. Use data with prompts, texts or messages."
        )
    return {**row, **extracted}


# Arguments of judges and reward functions that no column of this name may take the place of.
_ARGUMENTS = {"prompt", "prompts", "completion", "completions", "completions_a", "completions_b"}


def columns_of(rows: list[dict]) -> dict[str, list]:
    """
    The columns of rows that judges and reward functions are given by name: all but the prompts and the completions.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in _ARGUMENTS)
    return {name: [row.get(name) for row in rows] for name in names}


def _token_ids(tokenizer, value, **kwargs) -> list[int]:
    if isinstance(value, str):
        return list(tokenizer(text=value)["input_ids"])
    return list(tokenizer.apply_chat_template(value, tokenize=True, return_dict=True, **kwargs)["input_ids"])


def _common_prefix(*sequences: list[int]) -> int:
    count = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        count += 1
    return count


def template_options(row: dict) -> dict:
    """Arguments of the chat template in a row: `tools`, which may be JSON, and `chat_template_kwargs`, as in TRL."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(row.get("chat_template_kwargs") or {})}


@dataclasses.dataclass
class TokenizedPairs:
    """
    Preference pairs as token ids, and the number of pairs that were left out.

    Args:
        pairs (`list[dict]`):
            `prompt_ids`, `chosen_ids` and `rejected_ids` of each pair that is left.
        prompts (`list[str]`):
            A label for the prompt of each of them: several pairs of one prompt are not independent.
        no_room (`int`):
            Pairs left out whose prompt alone fills `max_length`, as in training.
        same_responses (`int`):
            Pairs left out whose responses are the same tokens, most often as `max_length` cut them before they differ:
            every model ranks them "correctly", as a tie counts as correct.
    """

    pairs: list[dict]
    prompts: list[str] = dataclasses.field(default_factory=list)
    no_room: int = 0
    same_responses: int = 0


def tokenize_and_count(
    dataset: Iterable[dict], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> TokenizedPairs:
    """[`tokenize_pairs`], with the number of the pairs that were left out."""
    from trl import extract_prompt, is_conversational

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = TokenizedPairs([])
    for number, row in enumerate(dataset):
        if not all(name in row for name in names):
            missing = [f"`{side}`" for side in ("chosen", "rejected") if side not in row]
            if missing:
                raise ValueError(
                    f"The dataset has no column {' and no column '.join(missing)}; it has {sorted(row)}. Preference "
                    "data needs `chosen` and `rejected`, and usually `prompt`."
                )
            if "prompt" not in row:
                row = {**row, **extract_prompt(row)}
            if is_conversational(row):
                kwargs = template_options(row)
                prompt = _token_ids(tokenizer, row["prompt"], add_generation_prompt=True, **kwargs)
                sides = [_token_ids(tokenizer, row["prompt"] + row[s], **kwargs) for s in ("chosen", "rejected")]
            else:
                eos = tokenizer.eos_token
                if eos is None:
                    raise ValueError(
                        "The tokenizer has no end-of-sequence token, with which training ends each response. Set "
                        "`tokenizer.eos_token` to the token that the model was trained to end with."
                    )
                prompt = _token_ids(tokenizer, row["prompt"])
                sides = [
                    _token_ids(tokenizer, row["prompt"] + row[s] + ("" if row[s].endswith(eos) else eos))
                    for s in ("chosen", "rejected")
                ]
            length = min(_common_prefix(prompt, side) for side in sides)
            label = json.dumps(row["prompt"], sort_keys=True)
            row = dict(zip(names, (prompt[:length], *(side[length:] for side in sides)), strict=True))
        else:
            label = json.dumps(row.get("prompt", list(row["prompt_ids"])), sort_keys=True)
        ids = {name: list(row[name]) for name in names}
        if max_length is not None:
            room = max_length - len(ids["prompt_ids"])
            if room <= 0:
                found.no_room += 1
                continue
            ids |= {name: ids[name][:room] for name in names[1:]}
        for name in names:
            if not ids[name]:
                raise ValueError(f"`{name}` of row {number} is empty. Leave the row out, or give it a text.")
        if ids["chosen_ids"] == ids["rejected_ids"]:
            found.same_responses += 1
            continue
        found.pairs.append(ids)
        found.prompts.append(label)
    if not found.pairs:
        raise ValueError(
            f"No pair is left of the dataset (`max_length={max_length}`): the prompts of {found.no_room} pairs fill "
            f"`max_length` alone, and {found.same_responses} have twice the same response. "
            + ("Raise `max_length`." if max_length is not None else "Give pairs whose responses differ.")
        )
    return found


def tokenize_pairs(
    dataset: Iterable[dict], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> list[dict]:
    """
    Token ids of preference pairs as [`~trl.DPOTrainer`] makes them: plain text gets the end-of-sequence token,
    messages go through the chat template with the row's `tools` and `chat_template_kwargs`, and a response begins
    where it leaves the tokens of the prompt.

    Args:
        dataset (`Iterable[dict]`):
            Rows with `chosen` and `rejected` and usually `prompt`, text or messages. Rows that are tokenized already
            (`prompt_ids`, `chosen_ids`, `rejected_ids`: a trainer's prepared dataset) are taken as they are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The models' tokenizer.
        max_length (`int`, *optional*):
            Longest prompt and response together, the start kept, as in training. A pair whose prompt alone is as long
            is left out. So is one whose two responses are the same tokens, cut or not: it has no order to be ranked
            by.

    Returns:
        `list[dict]` with `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    return tokenize_and_count(dataset, tokenizer, max_length).pairs
