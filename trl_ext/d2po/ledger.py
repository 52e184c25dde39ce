"""Record of all gold labels that were bought, written to disk before they are used."""

import hashlib
import json
import math
from pathlib import Path

from datasets import Dataset

from ..training.record_file import RecordError, RecordFile, check_probability, format_entry, parse_object


class LedgerError(RecordError):
    """The ledger could not be opened, locked or written to."""


def request_key(prompt_ids: list[int], first_ids: list[int], second_ids: list[int], columns: dict) -> str:
    """
    Identity of a comparison, whichever of the two completions comes first: the same prompt, completions and columns
    that the labeler sees give the same key, in any process and any run.
    """
    request = [list(prompt_ids), sorted([list(first_ids), list(second_ids)]), columns]
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Ledger(RecordFile):
    """
    Append-only record of gold labels: one JSON object a line, flushed and fsynced before [`append`] returns.

    A process that dies while it writes leaves at most one unfinished line, which was never used as a label and is cut
    off when the file is opened for writing again. Nothing else is ever changed or removed. A last line that is whole
    but for its line end, as editors leave it, is a label.

    Each entry has:
        - `key`: identity of the comparison ([`request_key`]).
        - `window`, `step`: when it was asked for: number of the window and of the optimizer steps taken.
        - `prompt`, `completion_a`, `completion_b`: what the labeler saw, in its order: text, or messages.
        - `prompt_ids`, `completion_a_ids`, `completion_b_ids`: the sampled tokens.
        - `scores`: the discriminator's scores of both completions when they were chosen, or `null` without one.
        - `verdict`: probability that `completion_a` is better; 0.5 is a tie, `null` no verdict.
        - `labeller`, `cost`: who gave it, and what it cost, in the labeler's unit.
        - `columns`: the further columns of the row that the labeler saw.

    Args:
        path (`str` or `Path`):
            File, made by [`open`] or when the first label is appended.
        read_only (`bool`, *optional*, defaults to `False`):
            Only read: an unfinished line stays where it is, and another process may be writing.

    Raises:
        `ValueError`: If a line other than an unfinished last one is not a gold label, naming the line.
        [`LedgerError`]: If the file cannot be opened for writing, or another process is writing to it.
    """

    _error = LedgerError
    _name = "ledger"
    _entry = "gold label"
    _place = "Set `ledger_file` to another file, or give this run an `output_dir` of its own."

    def _parse(self, line: bytes) -> dict:
        return parse_entry(line)

    def to_dataset(self, tokenized: bool = False) -> Dataset:
        """
        Returns the labels as a preference dataset: one row for each decisive verdict, in the order of purchase.

        Args:
            tokenized (`bool`, *optional*, defaults to `False`):
                Give the sampled tokens, as `prompt_ids`, `chosen_ids` and `rejected_ids`, which every trainer of this
                project takes. Otherwise `prompt`, `chosen` and `rejected`, text or messages, which any DPO trainer
                takes; such trainers append an end-of-sequence token, to truncated completions too.

        Returns:
            [`~datasets.Dataset`], whose column `confidence` is the probability that `chosen` is better.
        """
        rows, seen = [], set()
        for entry in self.entries:
            verdict, line = entry["verdict"], format_entry(entry)
            if verdict is None or verdict == 0.5 or line in seen:  # a line that stands twice is one label
                continue
            seen.add(line)
            chosen, rejected = ("a", "b") if verdict > 0.5 else ("b", "a")
            if tokenized:
                row = {"prompt_ids": entry["prompt_ids"]}
                row["chosen_ids"] = entry[f"completion_{chosen}_ids"]
                row["rejected_ids"] = entry[f"completion_{rejected}_ids"]
            else:
                row = {"prompt": entry["prompt"]}
                row["chosen"], row["rejected"] = entry[f"completion_{chosen}"], entry[f"completion_{rejected}"]
            rows.append({**row, "confidence": max(verdict, 1 - verdict)})
        return Dataset.from_list(rows)


def ledger_to_dataset(path: str | Path, tokenized: bool = False) -> Dataset:
    """Reads a ledger as a preference dataset; see [`Ledger.to_dataset`]."""
    if not Path(path).expanduser().exists():
        raise FileNotFoundError(f"There is no ledger at `{path}`.")
    return Ledger(path, read_only=True).to_dataset(tokenized)


# Field -> what it must be. Others are optional, as 0.1.0 and ledgers made by hand may lack them.
_TEXT = (str, list)
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "window": int,
    "prompt": _TEXT,
    "completion_a": _TEXT,
    "completion_b": _TEXT,
    "prompt_ids": list,
    "completion_a_ids": list,
    "completion_b_ids": list,
    "labeller": str,
}


def parse_entry(line: bytes) -> dict:
    """
    Returns the gold label of a line.

    Raises:
        `ValueError`: If it is not one, saying what is wrong.
    """
    entry = parse_object(line)
    check_probability(entry, "verdict")
    for name in ("verdict", *_REQUIRED):
        if name not in entry:
            raise ValueError(f"it has no {name!r}")
    for name, kind in _REQUIRED.items():
        if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
            raise ValueError(f"its {name!r} is {entry[name]!r}")
        if name.endswith("_ids") and not all(type(token) is int and token >= 0 for token in entry[name]):
            raise ValueError(f"its {name!r} are not token ids")
    if entry["window"] < 0:
        raise ValueError(f"its 'window' is {entry['window']!r}")
    cost = entry.get("cost")
    if cost is not None and (type(cost) not in (int, float) or not math.isfinite(cost)):
        raise ValueError(f"its 'cost' is {cost!r}, not a number")
    return entry
