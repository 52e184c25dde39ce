"""`trl-ext data`: describes a preference dataset and how training would use it."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .configurations import ROOT


PROG = "trl-ext data"
SIDES = ("chosen", "rejected")
_PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0")


@dataclass
class Findings:
    """
    Findings in the rows of a dataset.

    Args:
        rows (`int`):
            Number of rows that were read.
        problems (`dict[str, list[int]]`):
            Problem -> the rows that have it.
        notes (`dict[str, list[int]]`):
            Note -> the rows that it concerns.
        lengths (`dict[str, list[int]]`):
            Part of a pair -> its length in each row.
    """

    rows: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def problem(self, what: str, row: int) -> None:
        self.problems.setdefault(what, []).append(row)

    def note(self, what: str, row: int) -> None:
        self.notes.setdefault(what, []).append(row)


def kind_of(columns: Iterable[str], features: Any = None) -> str:
    """Kind of a dataset by its columns: `"pairs"`, `"images"`, `"prompts"`, or `"unknown"`."""
    columns = set(columns)
    if set(_PICKAPIC) <= columns:
        return "images"
    if set(SIDES) <= columns:
        feature = (features or {}).get("chosen")
        return "images" if type(feature).__name__ == "Image" else "pairs"
    return "prompts" if "prompt" in columns else "unknown"


METHODS_OF = {
    "pairs": "fdpo, tdpo, mallows, rainbowpo, simper; prompts for d2po; `trl-ext evaluate`",
    "images": "diffusion_dpo, dspo",
    "prompts": "d2po",
    "unknown": "no method: preference data needs `chosen` and `rejected`, and usually `prompt`; D2PO needs `prompt`",
}


def inspect_rows(rows: Iterable[dict], kind: str) -> Findings:
    """Checks every row and measures it in characters."""
    found = Findings()
    seen: dict[str, int] = {}
    prompts: Counter[str] = Counter()
    for number, row in enumerate(rows):
        found.rows += 1
        if kind == "prompts":
            text = as_text(row["prompt"])
            prompts[text] += 1
            if not text.strip():
                found.problem("empty `prompt`", number)
            found.lengths.setdefault("prompt", []).append(len(text))
            continue
        texts = {name: as_text(row[name]) for name in ("prompt", *SIDES) if name in row}
        for side in SIDES:
            if not texts[side].strip():
                found.problem(f"empty `{side}`", number)
        if "prompt" in row and row["prompt"] is None:
            found.problem("`prompt` is None", number)
        if isinstance(row[SIDES[0]], str) != isinstance(row[SIDES[1]], str):
            found.problem("`chosen` and `rejected` differ in kind (text and messages)", number)
        elif "prompt" in row and isinstance(row["prompt"], str) != isinstance(row["chosen"], str):
            found.problem("`prompt` and `chosen` differ in kind (text and messages)", number)
        if texts["chosen"] == texts["rejected"]:
            found.note("`chosen` equals `rejected`: the pair teaches nothing", number)
        key = json.dumps(texts, sort_keys=True)
        if key in seen:
            found.note(f"the same pair as an earlier row (first: row {seen[key]})", number)
        seen.setdefault(key, number)
        prompts[texts.get("prompt", "")] += 1
        for name, text in texts.items():
            found.lengths.setdefault(name, []).append(len(text))
    repeated = sum(count - 1 for count in prompts.values())
    if repeated and (kind == "prompts" or len(prompts) > 1):
        found.notes[f"{len(prompts):,} different prompts"] = []
    return found


def as_text(value: Any) -> str:
    """A text, or the contents of messages."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = []
        for message in value:
            content = message.get("content", message.get("text", "")) if isinstance(message, dict) else message
            calls = message.get("tool_calls") if isinstance(message, dict) else None
            parts += [as_text(content)] + ([json.dumps(calls, default=str)] if calls else [])
        return "\n".join(part for part in parts if part)
    return str(value)


def describe_lengths(lengths: dict[str, list[int]], unit: str) -> list[str]:
    """A line for each part of a pair."""
    from .dry_run import Lengths

    return [f"  {name:<16} {Lengths(np.array(values))} {unit}" for name, values in lengths.items()]


def describe_tokens(rows: list[dict], tokenizer, max_length: int | None) -> list[str]:
    """Lengths in tokens, what `max_length` leaves out and cuts, and one example with its special tokens."""
    from ..evaluation.data import tokenize_and_count

    whole = tokenize_and_count(rows, tokenizer, None)
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    lengths = {name: [len(pair[ids]) for pair in whole.pairs] for name, ids in names.items()}
    lines = ["tokens"] + describe_lengths(lengths, "tokens")
    longest = np.array(lengths["prompt"]) + np.maximum(lengths["chosen"], lengths["rejected"])
    if max_length is None:
        lines.append(
            f"  max_length       {longest.max()} would cut nothing, {int(np.percentile(longest, 95))} one pair in 20"
        )
    else:
        lost = int((np.array(lengths["prompt"]) >= max_length).sum())
        cut = int((longest > max_length).sum()) - lost
        lines.append(f"  max_length={max_length}: {lost:,} pairs left out (the prompt alone fills it), {cut:,} cut")
    pair = whole.pairs[0]
    lines += ["", "first example, as the model reads it"]
    for name, ids in names.items():
        text = tokenizer.decode(pair[ids])
        lines += [f"  {name if i == 0 else '':<9}| {line}" for i, line in enumerate(text.split("\n"))]
    return lines


def inspect_images(dataset, limit: int = 1000) -> tuple[Findings, list[str]]:
    """Opens the images of up to `limit` rows: those that cannot be read, and the sizes of the others."""
    from ..diffusion.data import UnreadableImageError, open_image, upright_size

    columns = ("jpg_0", "jpg_1") if set(_PICKAPIC) <= set(dataset.column_names) else SIDES
    found = Findings()
    sizes: Counter[tuple[int, int]] = Counter()
    for number in range(min(limit, len(dataset))):
        row = dataset[number]
        found.rows += 1
        for column in columns:
            try:
                sizes[upright_size(open_image(row[column]))] += 1
            except UnreadableImageError as error:
                found.problem(f"`{column}` cannot be read ({error})", number)
    shown = ", ".join(f"{w} x {h} ({count})" for (h, w), count in sizes.most_common(5))
    return found, [f"sizes              {shown}{', ...' if len(sizes) > 5 else ''} in {found.rows:,} rows"]


def describe(dataset, split: str, tokenizer=None, max_length: int | None = None) -> tuple[str, bool]:
    """
    A dataset's split as text for a terminal.

    Returns:
        `tuple[str, bool]`: The text, and whether training would take every row.
    """
    columns = dataset.column_names
    kind = kind_of(columns, dataset.features)
    lines = [f"split              {split}, {len(dataset):,} rows", f"columns            {', '.join(columns)}"]
    if kind == "pairs":
        conversational = not isinstance(dataset[0]["chosen"], str)
        implicit = "" if "prompt" in columns else ", the prompt within both responses"
        lines.append(f"kind               pairs of {'dialogues (messages)' if conversational else 'texts'}{implicit}")
    else:
        lines.append(f"kind               {'pairs of images' if kind == 'images' else kind}")
    lines.append(f"for                {METHODS_OF[kind]}")
    if kind == "unknown":
        return "\n".join(lines), False
    if kind == "images":
        found, more = inspect_images(dataset)
        lines += more
    else:
        found = inspect_rows(dataset, kind)
        lines += ["characters", *describe_lengths(found.lengths, "characters")]
    for title, findings in (("problems", found.problems), ("notes", found.notes)):
        if findings:
            lines += ["", title, *(f"  {_rows(rows)}{what}" for what, rows in findings.items())]
    if not found.problems:
        lines += ["", "No problems were found."]
    if tokenizer is not None and kind == "pairs" and not found.problems:
        lines += ["", *describe_tokens(list(dataset), tokenizer, max_length)]
    return "\n".join(lines), not found.problems


def _rows(rows: list[int]) -> str:
    if not rows:
        return ""
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows):,} row{'s' * (len(rows) > 1)} ({shown}): "


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        allow_abbrev=False,
        description="Describe a preference dataset: its pairs, its lengths, and what training would leave out.",
    )
    parser.add_argument("dataset", help="a Hub id, a folder, or a JSONL, JSON, Parquet or CSV file")
    parser.add_argument("--split", help="one split; all of them by default")
    parser.add_argument("--dataset_config", help="configuration of a Hub dataset")
    parser.add_argument("--tokenizer", help="a model's id or folder: lengths in tokens, and an example as it is read")
    parser.add_argument("--max_length", type=int, help="count what this limit in tokens leaves out and cuts")
    return parser


def main(arguments: list[str], write: Callable[[str], Any] = print) -> int:
    from ..training.named_datasets import get_split, load_named_dataset

    options = make_parser().parse_args(arguments)
    try:
        if options.max_length is not None and options.tokenizer is None:
            raise ValueError("`--max_length` counts tokens: give `--tokenizer`, the id or folder of the model.")
        tokenizer = None
        if options.tokenizer is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        dataset = load_named_dataset(options.dataset, options.dataset_config, option="dataset", roots=(ROOT,))
        if not isinstance(dataset, dict):
            dataset = {"train": dataset}
        names = list(dataset) if options.split is None else [options.split]
        usable = True
        for i, name in enumerate(names):
            text, whole = describe(get_split(dataset, name, "split"), name, tokenizer, options.max_length)
            write(("\n" if i else "") + text)
            usable &= whole
    except (ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    return 0 if usable else 1
