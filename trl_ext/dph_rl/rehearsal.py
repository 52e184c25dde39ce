"""The rehearsed answers: their tokens, their order, and their log-probabilities under what training started from."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from datasets import Dataset
from safetensors.torch import save_file

from .._trl import pad, tokenize
from ..training.arguments import without_format


REFERENCE_FILE = "rehearsal_reference.safetensors"


@dataclass(frozen=True)
class RehearsedAnswer:
    """
    One answer to rehearse.

    Args:
        prompt_ids, completion_ids (`list[int]`): Tokens without padding.
        completion_mask (`list[int]`): 1 for a token that the model wrote, 0 for one that it was given (a tool's
            result). Only the former are rehearsed.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[int]


def read_rehearsal(
    dataset: Dataset, processing_class, max_tokens: int | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[RehearsedAnswer]:
    """
    Reads and checks the answers to rehearse.

    Args:
        dataset ([`~datasets.Dataset`]):
            Columns `prompt_ids` and `completion_ids`, as [`collect_rehearsal`] writes them; or `prompt` and
            `completion`, texts or messages. A text gets the tokenizer's end-of-sequence token. `completion_mask` is
            optional beside `completion_ids`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        max_tokens (`int`, *optional*):
            Tokens that the model can read.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template.

    Raises:
        `TypeError`: If it is no `Dataset`. `ValueError`: If it is empty, lacks a column, has images, or a row that
            cannot be rehearsed; the message names the row.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`rehearsal_dataset` must be a `datasets.Dataset`, got a `{type(dataset).__name__}`: its rows are drawn "
            "in an order of their own, many times."
        )
    columns = set(dataset.column_names)
    if not len(dataset):
        raise ValueError(
            "`rehearsal_dataset` is empty, so there is nothing to rehearse. Collect answers with `collect_rehearsal`, "
            "or set `rehearsal_coef=0`, which is GRPO."
        )
    images = sorted(columns & {"image", "images"})
    if images:
        raise ValueError(
            f"`rehearsal_dataset` has the column `{images[0]}`: answers about images cannot be rehearsed. Leave these "
            "rows out."
        )
    is_tokenized = {"prompt_ids", "completion_ids"} <= columns
    if not is_tokenized and not {"prompt", "completion"} <= columns:
        raise ValueError(
            "`rehearsal_dataset` needs the columns `prompt` and `completion`, or `prompt_ids` and `completion_ids`; it "
            f"has {sorted(columns)}."
        )
    answers = []
    for number, row in enumerate(without_format(dataset, "rehearsal")):
        try:
            answer = _from_ids(row) if is_tokenized else _from_text(row, processing_class, chat_template_kwargs or {})
            _check_answer(answer, max_tokens)
        except _RowError as error:
            raise ValueError(f"Row {number} of `rehearsal_dataset` {error}") from None
        answers.append(answer)
    return answers


class _RowError(ValueError):
    """An answer that cannot be rehearsed. The caller prefixes the message with the row."""


def _from_ids(row: dict[str, Any]) -> RehearsedAnswer:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    mask = row.get("completion_mask") or [1] * len(completion or ())
    for name, ids in (("prompt_ids", prompt), ("completion_ids", completion), ("completion_mask", mask)):
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise _RowError(f"has `{name}` that are not a list of token ids: {ids!r}.")
    if len(mask) != len(completion):
        raise _RowError(f"has {len(mask)} values in `completion_mask` for {len(completion)} `completion_ids`.")
    return RehearsedAnswer(prompt, completion, [int(bool(value)) for value in mask])


def _from_text(row: dict[str, Any], processing_class, options: Mapping[str, Any]) -> RehearsedAnswer:
    prompt, completion = row["prompt"], row["completion"]
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise _RowError("has an empty `completion`. Leave it out.")
        end = tokenizer.eos_token
        if end and not completion.endswith(end):
            completion += end
        prompt_ids = tokenize(processing_class, prompt)["input_ids"]
        ids = tokenize(processing_class, prompt + completion)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:  # tokens across the boundary
            ids = prompt_ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt, list) and isinstance(completion, list):
        if any(message.get("role") == "tool" for message in completion):
            raise _RowError(
                "has the result of a tool in `completion`, which the model did not write. Give `prompt_ids`, "
                "`completion_ids` and a `completion_mask` that is 0 there."
            )
        prompt_ids = tokenize(processing_class, prompt, add_generation_prompt=True, **options)["input_ids"]
        ids = tokenize(processing_class, prompt + completion, **options)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise _RowError(
                "has messages whose chat template changes the prompt once there is an answer. Give `prompt_ids` and "
                "`completion_ids`, as `collect_rehearsal` does."
            )
    else:
        raise _RowError(f"has neither two texts nor two lists of messages: {prompt!r} and {completion!r}.")
    return RehearsedAnswer(prompt_ids, ids[len(prompt_ids) :], [1] * (len(ids) - len(prompt_ids)))


def _check_answer(answer: RehearsedAnswer, max_tokens: int | None) -> None:
    if not answer.prompt_ids or not answer.completion_ids or not any(answer.completion_mask):
        raise _RowError("has no prompt, or no answer of the model to rehearse. Leave it out.")
    length = len(answer.prompt_ids) + len(answer.completion_ids)
    if max_tokens is not None and length > max_tokens:
        raise _RowError(f"has {length} tokens, more than the {max_tokens} that the model reads. Leave it out.")


def fingerprint(answers: Sequence[RehearsedAnswer]) -> str:
    """Hash of the answers, in their order."""
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(repr((answer.prompt_ids, answer.completion_ids, answer.completion_mask)).encode())
    return digest.hexdigest()


class RehearsalOrder:
    """
    Which answers a micro-step takes: a function of its number and of the seed, so it needs no state to resume.

    The answers are passed through again and again, each time in another order; a step's processes and micro-steps take
    consecutive ones, so the answers of an optimizer step do not depend on how it is divided.

    Args:
        count (`int`): Number of answers.
        batch_size (`int`): Answers that a process takes in a micro-step.
        processes (`int`): Number of processes.
        seed (`int`): Seed of the orders.
    """

    def __init__(self, count: int, batch_size: int, processes: int, seed: int):
        self.count, self.batch_size, self.processes, self.seed = count, batch_size, processes, seed
        self._orders: dict[int, list[int]] = {}

    def rows(self, micro_step: int, process: int) -> list[int]:
        """The answers of one process in one micro-step."""
        start = (micro_step * self.processes + process) * self.batch_size
        return [self._at(position) for position in range(start, start + self.batch_size)]

    def rows_of_all(self, micro_steps: Iterable[int]) -> list[int]:
        """The answers of all processes in several micro-steps."""
        return [row for step in micro_steps for process in range(self.processes) for row in self.rows(step, process)]

    def _at(self, position: int) -> int:
        number, place = divmod(position, self.count)
        if number not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + number)
            self._orders = {k: v for k, v in self._orders.items() if k >= number - 1}
            self._orders[number] = torch.randperm(self.count, generator=generator).tolist()
        return self._orders[number][place]


def collate(answers: Sequence[RehearsedAnswer], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """
    A batch as TRL scores it: prompts padded on the left, completions on the right.

    Returns:
        `dict` of `input_ids` and `attention_mask`, `(B, P + C)`, and `completion_mask`, `(B, C)`.
    """
    prompts = [torch.tensor(answer.prompt_ids) for answer in answers]
    completions = [torch.tensor(answer.completion_ids) for answer in answers]
    masks = [torch.tensor(answer.completion_mask) for answer in answers]
    ones = [torch.ones_like(ids) for ids in (*prompts, *completions)]
    left = dict(padding_side="left")
    right = dict(padding_side="right")
    input_ids = [pad(prompts, padding_value=pad_id, **left), pad(completions, padding_value=pad_id, **right)]
    attention = [
        pad(ones[: len(answers)], padding_value=0, **left),
        pad(ones[len(answers) :], padding_value=0, **right),
    ]
    return {
        "input_ids": torch.cat(input_ids, dim=1).to(device),
        "attention_mask": torch.cat(attention, dim=1).to(device),
        "completion_mask": pad(masks, padding_value=0, **right).to(device),
    }


# ---- Log-probabilities on disk --------------------------------------------------------------------------------------


def save_reference(folder: Path, logps: Sequence[torch.Tensor], described: dict[str, str]) -> None:
    """Writes the log-probabilities of every answer's tokens, and what they were computed from."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = torch.tensor([len(values) for values in logps])
    path = folder / REFERENCE_FILE
    temporary = path.with_suffix(".writing")
    save_file({"logps": torch.cat(list(logps)), "lengths": lengths}, temporary, metadata=described)
    temporary.replace(path)


def load_reference(folders: Iterable[Path], described: dict[str, str]) -> list[torch.Tensor]:
    """
    Reads what [`save_reference`] wrote.

    Raises:
        `ValueError`: If it is in none of the folders, or was computed from other answers, in another precision or at
            another temperature.
    """
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    path = next((folder / REFERENCE_FILE for folder in folders if (folder / REFERENCE_FILE).is_file()), None)
    if path is None:
        raise ValueError(
            f"`{REFERENCE_FILE}`, the log-probabilities of the rehearsed answers under what training started from, is "
            f"in none of {', '.join(f'`{folder}`' for folder in folders)}. They cannot be computed from a resumed "
            "model: copy the file from the run's `output_dir`, or start a new run."
        )
    with safetensors.safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
        logps, lengths = file.get_tensor("logps"), file.get_tensor("lengths")
    names = {"answers": "`rehearsal_dataset`", "dtype": "precision", "temperature": "`temperature`"}
    for key, value in described.items():
        if found.get(key) != value:
            raise ValueError(
                f"{names[key]} is not that of the run: `{path}` was computed with {found.get(key)}, and this run has "
                f"{value}. Resume with the settings of the run."
            )
    return list(logps.split(lengths.tolist()))
