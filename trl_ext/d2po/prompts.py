"""Checks and tokenizes prompts, and collates them unchanged."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from .._trl import tokenize
from ..preference import data, rows
from ..training.arguments import without_format
from ..training.messages import check_template


logger = get_logger(__name__)

# Columns of a row that are not handed to the labeler.
PROMPT_COLUMNS = ("prompt", "prompt_ids", "chat_template_kwargs", "tools")
# Names of the arguments that a labeler is called with, beside the columns.
RESERVED_COLUMNS = ("self", "prompts", "completions", "completions_a", "completions_b")


def is_preference_data(columns) -> bool:
    """Whether rows hold pairs, raw or tokenized, rather than prompts."""
    return data.is_tokenized(columns) or set(data.SIDES) <= set(columns)


def prepare_prompts(dataset: Dataset, tokenizer, name: str, max_prompt_length: int | None, num_proc=None) -> Dataset:
    """
    Adds `prompt_ids` to a dataset of prompts, and drops prompts that leave no room for a completion.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompts, text or messages, in the column `prompt`; `tools` may be JSON text. Other columns stay.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's; messages go through its chat template.
        name (`str`):
            Name of the split, for messages.
        max_prompt_length (`int`, *optional*):
            Tokens of a prompt at most.
        num_proc (`int`, *optional*):
            Processes that tokenize.

    Raises:
        `TypeError`: If the dataset is streamed. `ValueError`: If it has no column `prompt`, holds pairs already, has a
            column with a reserved name, a row whose prompt is missing, empty or malformed, or no prompt that fits. The
            message names the row.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The {name} dataset is a `{type(dataset).__name__}`. D2PO draws its prompts a window at a time from a "
            "dataset of known length: give a `Dataset`, for instance `Dataset.from_list(list(stream.take(10000)))`."
        )
    dataset = without_format(dataset, name)
    columns = dataset.column_names
    if is_preference_data(columns):
        raise ValueError(
            f"The {name} dataset already has pairs (columns {columns}); D2PO samples its own. Keep its prompts with "
            "`dataset.select_columns(['prompt'])`, and give the pairs as `discriminator_dataset` if the discriminator "
            "is to learn from them."
        )
    if "prompt" not in columns:
        raise ValueError(
            f"The {name} dataset has no column `prompt`; it has {columns}. Rename yours with "
            "`dataset.rename_column(old, 'prompt')`."
        )
    reserved = [column for column in columns if column in RESERVED_COLUMNS]
    if reserved:
        raise ValueError(
            f"The {name} dataset has the column `{reserved[0]}`, which is the name of an argument of the labeler. "
            f"Rename it with `dataset.rename_column({reserved[0]!r}, ...)`, or remove it."
        )
    if "prompt_ids" not in columns:

        def add_ids(row: dict[str, Any], index: int) -> dict[str, Any]:
            try:
                return {"prompt_ids": tokenize_prompt(row, tokenizer)}
            except PromptError as error:
                raise ValueError(f"Row {index} of the {name} dataset {error}") from None

        dataset = dataset.map(add_ids, with_indices=True, num_proc=num_proc, desc=f"Tokenizing {name} prompts")
    for index, ids in enumerate(dataset["prompt_ids"]):
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(
                f"Row {index} of the {name} dataset has `prompt_ids` that are not a list of token ids: {ids!r}. "
                "Remove the column, and the prompts are tokenized here."
            )
    lengths = [len(ids) for ids in dataset["prompt_ids"]]
    if 0 in lengths:
        raise ValueError(f"Row {lengths.index(0)} of the {name} dataset has an empty prompt. Leave such rows out.")
    if max_prompt_length is None:
        return dataset
    kept = [i for i, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"Every prompt of the {name} dataset has more than {max_prompt_length} tokens, `max_length` less "
            "`max_completion_length`. Raise `max_length`, or lower `max_completion_length`."
        )
    if len(kept) < len(lengths):
        logger.warning(
            f"Left out {len(lengths) - len(kept)} of the {len(lengths)} prompts of the {name} dataset: they have more "
            f"than {max_prompt_length} tokens (`max_length` less `max_completion_length`)."
        )
        dataset = dataset.select(kept)
    return dataset


class PromptError(ValueError):
    """An invalid prompt. The caller prefixes the message with the row."""


def tokenize_prompt(row: Mapping[str, Any], tokenizer) -> list[int]:
    """The tokens of a row's prompt, messages by the chat template up to the assistant's turn."""
    prompt = row["prompt"]
    check_prompt(prompt)
    if isinstance(prompt, str):
        return tokenize(tokenizer, prompt)["input_ids"]
    _as_row(lambda: rows.check_template_options(row))
    check_template(prompt, tokenizer)
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    # The completions continue an assistant's turn that the prompt begins.
    is_begun = prompt[-1]["role"] == "assistant" and isinstance(prompt[-1].get("content"), str)
    options["continue_final_message" if is_begun else "add_generation_prompt"] = True
    return tokenize(tokenizer, prompt, **options)["input_ids"]


def check_prompt(prompt) -> None:
    """Raises [`PromptError`] unless a prompt is a text or messages with a role and content."""
    if prompt is None:
        raise PromptError("has `prompt=None`. Fix this row, or leave it out.")
    if isinstance(prompt, str):
        _as_row(lambda: rows.check_row({"prompt": prompt}))
        return
    if not isinstance(prompt, list) or not all(isinstance(message, Mapping) for message in prompt):
        raise PromptError(f"has a `prompt` that is neither a text nor a list of messages: {prompt!r}.")
    if not prompt:
        raise PromptError("has an empty conversation as `prompt`. Fix this row, or leave it out.")
    for number, message in enumerate(prompt):
        if not isinstance(message.get("role"), str) and "from" not in message:
            raise PromptError(f"has the role {message.get('role')!r} in message {number} of `prompt`. Give it a text.")
        if message.get("role") and message.get("content") is None and not message.get("tool_calls"):
            raise PromptError(
                f"has no content in message {number} (role {message['role']!r}) of `prompt`. Give it a text; an empty "
                "one is ''."
            )
        _as_row(lambda: rows.check_message(message, f"prompt[{number}]"))  # noqa: B023 - called at once


def _as_row(check: Callable[[], None]) -> None:
    try:
        check()
    except rows.RowError as error:
        raise PromptError(f"{error}.") from None


class PromptCollator:
    """
    Returns prompts unchanged, for the trainer to sample completions; collates pairs, such as those of an evaluation
    set.
    """

    def __init__(self, pair_collator):
        self.pair_collator = pair_collator

    def __call__(self, rows: list[dict]):
        return self.pair_collator(rows) if is_preference_data(rows[0]) else rows
