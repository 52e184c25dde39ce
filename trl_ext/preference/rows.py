"""
Checks and preparation of raw preference rows, texts or messages, before they are tokenized: a bad row costs a message,
not a run.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import extract_prompt

from .._trl import common_prefix_length, tokenize
from ..training.messages import check_template, shorten, warn_of_reasoning


logger = get_logger(__name__)

SIDES = ("chosen", "rejected")
COLUMNS = ("prompt", *SIDES)
_MESSAGE = '{"role": "user", "content": "..."}'
# Column that carries the text of an assistant's turn that the responses continue, from `_open_prefilled` to
# `_close_prefilled`.
PREFILL = "_trl_ext_prefill"


class RowError(ValueError):
    """
    A row that cannot be trained on. The message lacks the row's number and dataset, which its caller knows.

    Args:
        problem (`str`):
            What is wrong, with the column and without this row's values, so that equal problems can be counted.
        remedy (`str`):
            What to do about it.
        got (*optional*):
            The value, which the message shows.
    """

    def __init__(self, problem: str, remedy: str, *got):
        self.problem, self.remedy = problem, remedy
        shown = "".join(f", got {shorten(value)}" for value in got)
        super().__init__(f"{problem}{shown}{'' if remedy.startswith(':') else '. '}{remedy}")


# ---- One row --------------------------------------------------------------------------------------------------------


def check_row(row: Mapping) -> None:
    """
    Raises [`RowError`] unless the row's `prompt`, `chosen` and `rejected` are all texts or all messages, and the
    responses follow the prompt. Empty responses are left to [`is_empty`].
    """
    kinds = {column: _kind(row[column], column) for column in COLUMNS if column in row and row[column] is not None}
    if "prompt" in row and row["prompt"] is None:
        raise RowError("has `prompt=None`", "Fix this row, or leave it out; an empty prompt is ''")
    if len(set(kinds.values())) > 1:
        shown = " and ".join(f"{kind} as `{column}`" for column, kind in kinds.items())
        hint = ""
        if kinds.get("prompt") == "a text":
            hint = (
                ". If `chosen` and `rejected` are whole dialogues, leave `prompt` out, and what they share becomes "
                "the prompt: "
                '`dataset.remove_columns("prompt")`'
            )
        raise RowError(f"has {shown}", f"Make all of them messages, or all of them texts{hint}")
    check_template_options(row)
    if set(kinds.values()) == {"messages"} and "prompt" in row:
        _check_turns(row)


def check_template_options(row: Mapping) -> None:
    """
    Raises [`RowError`] unless `tools` is a list, possibly as JSON text, and `chat_template_kwargs` a dictionary, or
    both are missing.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(
                f"has `tools` that are not JSON ({error})", "Give a list of tools, or one as JSON"
            ) from None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"has a {type(tools).__name__} as `tools`", "Give a list of tools, or one as JSON", tools)
    options = row.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        remedy = "Give a dictionary: text is parsed with `json.loads`"
        raise RowError(f"has a {type(options).__name__} as `chat_template_kwargs`", remedy, options)


def with_prompt(row: Mapping) -> dict:
    """
    The row with its prompt in a column of its own: where there is none, what both responses begin with.

    Raises:
        [`RowError`]: For a row that is not a pair, before or after the prompt is split off.
    """
    check_row(row)
    if "prompt" in row:
        return dict(row)
    for side in SIDES:
        if row[side] is None:
            raise RowError(f"has `{side}=None`", "Fix this row, or leave it out")
    if row["chosen"] and row["rejected"]:
        row = {**row, **extract_prompt(row)}
    else:  # nothing is shared with a side that is empty, for which the row is refused or left out
        whole = row["chosen"] or row["rejected"]
        row = {**row, "prompt": "" if isinstance(whole, str) else whole[:-1]}
    check_row(row)
    return row


def _kind(value, column: str) -> str:
    if isinstance(value, str):
        if _holds_messages(value):
            remedy = f"Parse them: `dataset.map(lambda row: {{{column!r}: json.loads(row[{column!r}])}})`"
            raise RowError(f"has messages as JSON text in `{column}`", remedy, value)
        return "a text"
    if isinstance(value, Mapping):
        raise RowError(f"has one message as `{column}`", f"Put it into a list: `[{_MESSAGE}]`", value)
    if not isinstance(value, list):
        remedy = f"It must be a text, or a list of messages such as `{_MESSAGE}`"
        raise RowError(f"has a {type(value).__name__} as `{column}`", remedy, value)
    if not value:
        if column == "prompt":
            raise RowError("has no message in `prompt`", "Give it at least one, or leave the row out", value)
        return "messages"
    for number, message in enumerate(value):
        check_message(message, f"{column}[{number}]")
    return "messages"


def _holds_messages(text: str) -> bool:
    """Whether a text is messages as JSON, as a column of a CSV file holds them."""
    if not text.lstrip().startswith("[") or '"role"' not in text:
        return False
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(messages) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)


def check_message(message, where: str) -> None:
    """Raises [`RowError`] unless `message`, which stands at `where`, has a role and content."""
    form = f"A message is `{_MESSAGE}`"
    if not isinstance(message, Mapping):
        raise RowError(f"has a {type(message).__name__} as `{where}`", form, message)
    if "from" in message and "value" in message and message.get("role") is None:
        raise RowError(
            f"has a message in ShareGPT's form as `{where}`",
            "Convert the columns, for example with "
            '`[{"role": {"human": "user", "gpt": "assistant"}.get(m["from"], m["from"]), "content": m["value"]} for m '
            "in messages]`",
            message,
        )
    if not isinstance(message.get("role"), str) or not message["role"].strip():
        raise RowError(f"has a message without a role as `{where}`", form, message)
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RowError(
            f"has a message without content as `{where}`",
            ": a chat template would write 'None', or nothing. Give it a text, '' for none",
            message,
        )
    if content is not None and not isinstance(content, str | list):
        raise RowError(
            f"has a {type(content).__name__} as content of `{where}`",
            "Content is a text, or a list of parts",
            message,
        )


def _check_turns(row: Mapping) -> None:
    prompt = row["prompt"]
    for column in SIDES:
        response = row[column]
        if not response:
            continue
        if response[: len(prompt)] == prompt:
            raise RowError(
                f"has the whole dialogue in `{column}`, its prompt included, beside `prompt`",
                ": the prompt would be there twice. Leave `prompt` out, and what `chosen` and `rejected` share "
                'becomes the prompt: `dataset.remove_columns("prompt")`',
            )
        first = response[0]
        if prompt[-1]["role"] == "assistant" and isinstance(prompt[-1].get("content"), str):
            if first["role"] != "assistant" or not isinstance(first.get("content"), str):
                raise RowError(
                    f"has a `prompt` that ends in an assistant's turn, which `{column}` does not continue with a text",
                    f"Begin `{column}` with the assistant's turn, or leave that turn out of `prompt`",
                    first,
                )
        if first["role"] in ("user", "system", "developer"):
            raise RowError(
                f"has a `{column}` that begins with the turn of the {first['role']!r}, which would be trained as the "
                "response",
                "Move what precedes the assistant's turn into `prompt`",
                first,
            )
        if response[-1]["role"] in ("user", "system", "developer"):
            raise RowError(
                f"has a `{column}` that ends with the turn of the {response[-1]['role']!r}, which would be trained as "
                "the response",
                "Leave it out",
                response[-1],
            )


def is_empty(completion) -> bool:
    """Whether a completion, text or messages, is empty. A completion with tool calls is not."""
    if completion is None:
        return True
    if isinstance(completion, str):
        return not completion.strip()
    if isinstance(completion, list):
        return not any(message.get("tool_calls") or not _is_blank(message.get("content")) for message in completion)
    return False


def _is_blank(content) -> bool:
    """Whether a message's content, text or a list of parts, is empty. Content with a part that is not text is not."""
    if isinstance(content, list):
        return all(part.get("type", "text") == "text" and _is_blank(part.get("text")) for part in content)
    return not (content or "").strip()


# ---- A dataset ------------------------------------------------------------------------------------------------------


def raise_rows(name: str, side: str, rows: list[int], why: str, remedy: str) -> None:
    """Raises `ValueError` for the given rows of the dataset called `name`; the message lists the first ten."""
    shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    raise ValueError(
        f"Row {rows[0]} of the {name} dataset has {why} `{side}` completion ({len(rows)} such row(s): {shown}). "
        f"{remedy}"
    )


_NO_RESPONSE = (
    "A preference needs a response on both sides. Fix these rows, or set `drop_empty_completions=True` to leave them "
    "out."
)


def split_prompts(dataset: Dataset | IterableDataset, name: str, map_kwargs: dict) -> Dataset | IterableDataset:
    """
    Returns a dataset of whole responses with the prompt that they share in a column of its own, as
    [`~trl.DPOTrainer`] does.

    Raises:
        `ValueError`: For a row that is not a pair. The message names the row, the column and the fix.
    """

    def split(row, index):
        try:
            return with_prompt(row)
        except RowError as error:
            raise _at_row(error, index, name) from None

    return dataset.map(split, with_indices=True, **map_kwargs)


def check_rows(dataset: Dataset | IterableDataset, name: str, drop_empty: bool = False) -> Dataset | IterableDataset:
    """
    Returns the dataset after checking that every row is one pair of responses to one prompt.

    A map-style dataset is checked once, here; a streaming one row by row as it streams.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with `chosen` and `rejected`, texts or messages, without their prompt.
        name (`str`):
            Name of the split, for messages.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Leave the rows in which a response is empty out, with a warning, instead of raising.

    Raises:
        `ValueError`: For a row that is not a pair. The message names the row, the column and the fix.
    """
    if isinstance(dataset, IterableDataset):
        is_text = isinstance(next(iter(dataset))["chosen"], str)

        def check(row, index):
            _checked(row, index, name)
            if any(row[side] is not None and isinstance(row[side], str) != is_text for side in SIDES):
                kinds = ("messages", "texts") if is_text else ("texts", "messages")
                raise ValueError(
                    f"Row {index} of the {name} dataset has {kinds[0]}, and its first row has {kinds[1]}. Make all of "
                    "them messages, or all of them texts."
                )
            for side in SIDES:
                if not drop_empty and is_empty(row[side]):
                    raise_rows(name, side, [index], "an empty", _NO_RESPONSE)
            return row

        dataset = dataset.map(check, with_indices=True)
        return dataset.filter(lambda row: not any(is_empty(row[side]) for side in SIDES)) if drop_empty else dataset

    empty: dict[str, list[int]] = {side: [] for side in SIDES}
    repeated, without_prompt = 0, 0
    read = (*COLUMNS, "tools", "chat_template_kwargs")
    columns = [column for column in read if column in dataset.column_names]
    for index, row in enumerate(_iterate(dataset, columns)):
        _checked(row, index, name)
        for side in SIDES:
            if is_empty(row[side]):
                empty[side].append(index)
        prompt = row.get("prompt")
        chosen, rejected = (row[side] for side in SIDES)
        without_prompt += "prompt" not in row and isinstance(chosen, str) and chosen[:1] != (rejected or "")[:1]
        repeated += (
            isinstance(prompt, str) and bool(prompt) and all(str(row[side]).startswith(prompt) for side in SIDES)
        )
    if 2 * repeated > len(dataset):
        logger.warning(
            f"In {repeated} of the {len(dataset)} rows of the {name} dataset both responses begin with the text of "
            "`prompt`, so that it is there twice. If `chosen` and `rejected` are whole texts, leave `prompt` out, and "
            "what they share becomes the "
            'prompt: `dataset.remove_columns("prompt")`.'
        )
    if 2 * without_prompt > len(dataset):
        others = [column for column in dataset.column_names if column not in columns]
        rename = f': `dataset.rename_column({others[0]!r}, "prompt")`' if others else ""
        logger.warning(
            f"The {name} dataset has no column `prompt`, and in {without_prompt} of its {len(dataset)} rows `chosen` and "
            "`rejected` have no beginning in common that would be the prompt: they are trained without one. If the "
            f"prompts are in another column ({', '.join(map(repr, others)) or 'there is none'}), rename it{rename}."
        )
    left_out = set(empty["chosen"] + empty["rejected"])
    if left_out and drop_empty:
        logger.warning(
            f"Left out {len(left_out)} of the {len(dataset)} pairs of the {name} dataset: a response is empty."
        )
        return dataset.select([i for i in range(len(dataset)) if i not in left_out])
    for side in SIDES:
        if empty[side]:
            raise_rows(name, side, empty[side], "an empty", _NO_RESPONSE)
    return dataset


def _iterate(dataset: Dataset, columns: list[str]) -> Iterable[dict]:
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _checked(row: Mapping, index: int, name: str) -> None:
    try:
        check_row(row)
    except RowError as error:
        raise _at_row(error, index, name) from None


def _at_row(error: RowError, index: int, name: str) -> ValueError:
    return ValueError(f"Row {index} of the {name} dataset {error}.")


# ---- What the tokenizer would get wrong -----------------------------------------------------------------------------


def ready_to_tokenize(dataset: Dataset | IterableDataset, tokenizer, map_kwargs: dict) -> Dataset | IterableDataset:
    """
    Returns the rows in the form that [`~trl.DPOTrainer`] tokenizes correctly.

    - `chat_template_kwargs` that are `None` in a row become an empty dictionary.
    - Texts that were rendered before keep one beginning-of-sequence token, where the tokenizer adds one itself, and
      one end-of-sequence token, where the template wrote white space behind it.
    - A prompt that ends in an assistant's turn is continued: see [`settle_tokens`].
    """
    first = next(iter(dataset))
    steps: list[Callable[[dict], dict]] = []
    if "chat_template_kwargs" in first:
        if isinstance(dataset, Dataset) and getattr(dataset.features["chat_template_kwargs"], "dtype", None) == "null":
            dataset = dataset.remove_columns("chat_template_kwargs")
        else:
            # Arrow gives every row all keys, `None` where the row has none, and so this does as well.
            steps.append(lambda row: {"chat_template_kwargs": row["chat_template_kwargs"] or {}})
    if not isinstance(first["prompt"], str):
        check_template(_messages_of(first) + _calling_messages(dataset, first), tokenizer)
        warn_of_reasoning([message for side in SIDES for message in first[side]], tokenizer)
    if isinstance(first["prompt"], str):
        steps.append(_Rendered(tokenizer))
    elif any(row["prompt"][-1]["role"] == "assistant" for row in _some(dataset)):
        steps.append(_open_prefilled)
    for step in steps:
        dataset = dataset.map(step, **map_kwargs)
    return dataset


def _messages_of(row: Mapping) -> list[Mapping]:
    return [message for column in COLUMNS for message in row[column]]


def _calling_messages(dataset: Dataset | IterableDataset, first: Mapping) -> list[Mapping]:
    """One message with tool calls if there is any; of a stream, in its first 100 rows."""
    # Arrow gives every message the keys of all.
    if isinstance(dataset, Dataset) and not any("tool_calls" in message for message in _messages_of(first)):
        return []
    read = _iterate(dataset, list(COLUMNS)) if isinstance(dataset, Dataset) else dataset.take(100)
    calling = (message for row in read for message in _messages_of(row) if message.get("tool_calls"))
    return list(itertools.islice(calling, 1))


def _some(dataset) -> Iterable[dict]:
    """Every row of a map-style dataset; the first 100 of a stream."""
    if isinstance(dataset, Dataset):
        return _iterate(dataset, ["prompt"])
    return dataset.take(100)


def _added_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer itself puts before and behind every text."""
    plain, whole = (list(tokenizer(text="a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:before], whole[before + len(plain) :]


class _Rendered:
    """Removes special tokens from texts where tokenization would add them a second time."""

    def __init__(self, tokenizer):
        self.eos = tokenizer.eos_token
        before, _ = _added_tokens(tokenizer)
        self.bos = tokenizer.convert_ids_to_tokens(before[0]) if before else None

    def __call__(self, row: dict) -> dict:
        changed = {}
        if self.bos:
            while row["prompt"].startswith(self.bos):
                row["prompt"] = changed["prompt"] = row["prompt"].removeprefix(self.bos)
        for side in SIDES:
            if self.eos and row[side].rstrip().endswith(self.eos):
                text = row[side].rstrip()
                while text.endswith(self.eos):
                    text = text.removesuffix(self.eos)
                changed[side] = text + self.eos
        return {**{column: row[column] for column in COLUMNS}, **changed}


def _open_prefilled(row: dict) -> dict:
    """Moves the assistant's turn that ends a prompt to the front of its responses, which continue it."""
    prompt = row["prompt"]
    if prompt[-1]["role"] != "assistant":
        return {**{column: row[column] for column in COLUMNS}, PREFILL: None}
    begun, opened = prompt[-1]["content"], {}
    for side in SIDES:
        first, *rest = row[side]
        if first["role"] != "assistant" or not isinstance(begun, str) or not isinstance(first.get("content"), str):
            raise ValueError(
                f"A prompt ends in an assistant's turn, {shorten(prompt[-1])}, which `{side}` has to continue with a "
                f"text, got {shorten(first)}. Begin `{side}` with the assistant's turn, or leave that turn out of "
                "`prompt`."
            )
        opened[side] = [{**first, "content": begun + first["content"]}, *rest]
    return {"prompt": prompt[:-1], **opened, PREFILL: begun}


def settle_tokens(dataset: Dataset | IterableDataset, processing_class, tokenizer, map_kwargs: dict):
    """
    Completes, after tokenization, what [`ready_to_tokenize`] prepared.

    - The tokens of an assistant's turn that the prompt began are counted as the prompt's: the responses are what
      continues it. TRL would close that turn and begin another.
    - A tokenizer that ends every sequence itself leaves one end-of-sequence token, not two.
    """
    first: dict[str, Any] = next(iter(dataset), {})  # truncation may have left nothing
    if PREFILL in first:
        dataset = dataset.map(
            _close_prefilled, fn_kwargs={"processing_class": processing_class}, remove_columns=[PREFILL], **map_kwargs
        )
    eos = tokenizer.eos_token_id
    if isinstance(first.get("prompt"), str) and _added_tokens(tokenizer)[1][:1] == [eos]:
        dataset = dataset.map(_end_once, fn_kwargs={"eos": eos}, **map_kwargs)
    return dataset


def _end_once(row: dict, eos: int) -> dict:
    names = [f"{side}_ids" for side in SIDES]
    return {name: row[name][:-1] if row[name][-2:] == [eos, eos] else row[name] for name in names}


def _close_prefilled(row: dict, processing_class) -> dict:
    if row[PREFILL] is None:
        return {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    begun = [*row["prompt"], {"role": "assistant", "content": row[PREFILL]}]
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    ids = list(tokenize(processing_class, begun, continue_final_message=True, **options)["input_ids"])
    sides = [list(row["prompt_ids"]) + list(row[f"{side}_ids"]) for side in SIDES]
    length = max(min(common_prefix_length(ids, side) for side in sides), len(row["prompt_ids"]))
    return {"prompt_ids": sides[0][:length], **{f"{n}_ids": s[length:] for n, s in zip(SIDES, sides, strict=True)}}
