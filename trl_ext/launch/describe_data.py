"""`trl-ext data`: describes a preference dataset and how training would use it."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


PROG = "trl-ext data"
SIDES = ("chosen", "rejected")
_PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0")
# Columns that are read of a text dataset; images beside a text are not decoded.
_READ = ("prompt", *SIDES, "tools", "chat_template_kwargs")


@dataclass
class Findings:
    """
    Findings in the rows of a dataset.

    Args:
        rows (`int`):
            Number of rows that were read.
        problems (`dict[str, list[int]]`):
            Problem -> the rows that have it, which training refuses.
        details (`dict[str, str]`):
            Problem -> the trainer's message for the first row that has it, where that says more.
        notes (`dict[str, list[int]]`):
            Note -> the rows that it concerns.
        lengths (`dict[str, list[int]]`):
            Part of a pair -> its length in each row.
    """

    rows: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def problem(self, what: str, row: int, detail: str | None = None) -> None:
        self.problems.setdefault(what, []).append(row)
        self.details.setdefault(what, detail or what)

    def note(self, what: str, row: int) -> None:
        self.notes.setdefault(what, []).append(row)


def kind_of(columns: Iterable[str], features: Any = None) -> str:
    """Kind of a dataset by its columns: `"pairs"`, `"images"`, `"tokens"`, `"prompts"`, or `"unknown"`."""
    from ..preference.data import is_tokenized

    columns = set(columns)
    if set(_PICKAPIC) <= columns:
        return "images"
    if set(SIDES) <= columns:
        feature = (features or {}).get("chosen")
        return "images" if type(feature).__name__ == "Image" else "pairs"
    if is_tokenized(columns):
        return "tokens"
    return "prompts" if "prompt" in columns else "unknown"


def names_files(dataset) -> bool:
    """Whether the responses of a dataset of pairs are names of image files."""
    from PIL import Image

    values = [dataset[0][side] for side in SIDES]
    known = Image.registered_extensions()
    return all(isinstance(value, str) and Path(value).suffix.lower() in known for value in values)


KINDS = {
    "images": "pairs of images",
    "tokens": "pairs, tokenized before",
    "prompts": "prompts",
    "unknown": "unknown",
}
METHODS_OF = {
    "pairs": "fdpo, tdpo, mallows, rainbowpo, simper, evaluate; d2po takes the prompts",
    "images": "diffusion_dpo, dspo",
    "tokens": "fdpo, tdpo, mallows, rainbowpo, simper",
    "prompts": "d2po",
    "unknown": "no method: preference data needs `chosen` and `rejected`, and usually `prompt`; d2po needs `prompt`",
}


def inspect_pairs(rows: Iterable[Mapping]) -> Findings:
    """Checks every pair as the trainers do, and measures it in characters."""
    from ..preference.rows import RowError, is_empty, with_prompt

    found = Findings()
    seen: dict[str, int] = {}
    prompts: Counter[str] = Counter()
    for number, row in enumerate(rows):
        found.rows += 1
        try:
            row = with_prompt(row)
        except RowError as error:
            found.problem(error.problem, number, str(error))
            continue
        for side in SIDES:
            if is_empty(row[side]):
                found.problem(
                    f"has an empty `{side}`",
                    number,
                    f"has an empty `{side}`. Fix it, or leave such rows out with `--drop_empty_completions true`",
                )
        texts = {name: as_text(row[name]) for name in ("prompt", *SIDES)}
        if row["chosen"] == row["rejected"]:
            found.note("`chosen` equals `rejected`: the pair teaches nothing", number)
        key = json.dumps([row[name] for name in ("prompt", *SIDES)], sort_keys=True, default=str)
        if key in seen:
            found.note(f"the same pair as row {seen[key]}", number)
        seen.setdefault(key, number)
        prompts[json.dumps(row["prompt"], sort_keys=True, default=str)] += 1
        for name, text in texts.items():
            found.lengths.setdefault(name, []).append(len(text))
    if 1 < len(prompts) < sum(prompts.values()):
        found.notes[f"{len(prompts):,} different prompts"] = []
    return found


def inspect_prompts(rows: Iterable[Mapping], tokenizer=None) -> Findings:
    """Checks every prompt as D2PO does, and measures it in characters."""
    from ..d2po.prompts import PromptError, check_prompt, tokenize_prompt

    found = Findings()
    prompts: Counter[str] = Counter()
    for number, row in enumerate(rows):
        found.rows += 1
        try:
            check_prompt(row["prompt"])
            empty = not (row["prompt"] if tokenizer is None else tokenize_prompt(row, tokenizer))
        except PromptError as error:
            found.problem(str(error), number)
            continue
        text = as_text(row["prompt"])
        if empty:
            found.problem("has an empty prompt. Leave it out, unless the tokenizer adds a first token", number)
        elif not text.strip():
            found.note("a blank prompt", number)
        prompts[json.dumps(row["prompt"], sort_keys=True, default=str)] += 1
        found.lengths.setdefault("prompt", []).append(len(text))
    if len(prompts) < sum(prompts.values()):
        found.notes[f"{len(prompts):,} different prompts"] = []
    return found


def as_text(value: Any) -> str:
    """A text, or the contents of messages."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return "" if value is None else str(value)
    parts = []
    for message in value:
        content = message.get("content", message.get("text", "")) if isinstance(message, Mapping) else message
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        parts += [as_text(content)] + ([json.dumps(calls, default=str)] if calls else [])
    return "\n".join(part for part in parts if part)


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


def image_sizes(pairs, limit: int = 1000) -> str:
    """The most frequent sizes of the images of the first pairs, width x height."""
    read = range(min(limit, len(pairs)))
    sizes = Counter(size for index in read for size in pairs.pair(index).sizes)
    shown = ", ".join(f"{width} x {height} ({count:,})" for (height, width), count in sizes.most_common(5))
    where = "" if len(read) == len(pairs) else f", in the first {len(read):,} pairs"
    return f"{shown}{', ...' if len(sizes) > 5 else ''}{where}"


def inspect_images(dataset, split: str, image_dir: str | None, verify: bool) -> tuple[Findings, list[str]]:
    """Checks the pairs of images as the trainers do: the headers of up to 1,000 pairs, or with `verify` all images."""
    from ..diffusion.data import CHECKED_ROWS, ImagePreferenceDataset

    found = Findings(rows=len(dataset))
    try:
        pairs = ImagePreferenceDataset(dataset, 1, name=split, image_dir=image_dir, verify_images=verify)
    except (ValueError, TypeError) as error:
        found.problems[str(error)] = []
        return found, []
    lines = []
    if len(pairs) < len(dataset):
        lines.append(f"pairs              {len(pairs):,}: the other rows are ties or have no label")
    lines.append(f"image sizes        {image_sizes(pairs)}")
    if not verify:
        how = "the headers of 1,000 pairs" if len(pairs) > CHECKED_ROWS else "the header of every image"
        lines.append(f"checked            {how}; `--verify_images` decodes every image")
    return found, lines


def inspect_tokens(dataset, split: str, max_length: int | None) -> tuple[Findings, list[str]]:
    """Checks tokenized pairs as the trainers do."""
    from ..preference.data import TOKENIZED_COLUMNS, check_tokenized

    found = Findings(rows=len(dataset))
    try:
        check_tokenized(dataset.with_format(None), split, max_length)
    except ValueError as error:
        found.problems[str(error)] = []
        return found, []
    plain = dataset.with_format(None)
    lengths = {name.removesuffix("_ids"): [len(ids) for ids in plain[name]] for name in TOKENIZED_COLUMNS}
    return found, ["tokens", *describe_lengths(lengths, "tokens")]


def describe(
    dataset,
    split: str,
    tokenizer=None,
    max_length: int | None = None,
    image_dir: str | None = None,
    verify_images: bool = False,
) -> tuple[str, bool]:
    """
    A dataset's split as text for a terminal.

    Returns:
        `tuple[str, bool]`: The text, and whether training would take every row.
    """
    columns = dataset.column_names
    lines = [f"split              {split}, {len(dataset):,} rows", f"columns            {', '.join(columns)}"]
    if not len(dataset):
        return "\n".join([*lines, "", "It has no rows: nothing can be trained on it."]), False
    kind = kind_of(columns, dataset.features)
    if kind == "pairs" and names_files(dataset):
        kind = "images"
    if kind == "pairs":
        conversational = not isinstance(dataset[0]["chosen"], str)
        implicit = "" if "prompt" in columns else ", the prompt within both responses"
        lines.append(f"kind               pairs of {'dialogues (messages)' if conversational else 'texts'}{implicit}")
    else:
        lines.append(f"kind               {KINDS[kind]}")
    lines.append(f"for                {METHODS_OF[kind]}")
    if kind == "unknown":
        return "\n".join(lines), False
    if kind == "images":
        found, more = inspect_images(dataset, split, image_dir, verify_images)
    elif kind == "tokens":
        found, more = inspect_tokens(dataset, split, max_length)
    else:
        plain = dataset.select_columns([name for name in _READ if name in columns]).with_format(None)
        found = inspect_pairs(plain) if kind == "pairs" else inspect_prompts(plain, tokenizer)
        more = ["characters", *describe_lengths(found.lengths, "characters")] if found.lengths else []
    lines += more
    if found.problems:
        lines += ["", "problems: training refuses these rows"]
        for what, rows in found.problems.items():
            first, *rest = found.details.get(what, what).split("\n")
            lines += [f"  {_rows(rows)}{first}", *(f"  {line}" for line in rest)]
    if found.notes:
        lines += ["", "notes", *(f"  {_rows(rows)}{what}" for what, rows in found.notes.items())]
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
    parser.add_argument(
        "--image_dir", help="folder of relative image paths; the data file's own by default, as in training"
    )
    parser.add_argument("--verify_images", action="store_true", help="decode every image, not only its header")
    return parser


def main(arguments: list[str], write: Callable[[str], Any] = print) -> int:
    from ..training.named_datasets import folder_of_images, get_split, load_named_dataset

    options = make_parser().parse_args(arguments)
    try:
        if options.max_length is not None and options.tokenizer is None:
            raise ValueError("`--max_length` counts tokens: give `--tokenizer`, the id or folder of the model.")
        tokenizer = None
        if options.tokenizer is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        dataset = load_named_dataset(options.dataset, options.dataset_config, option="dataset")
        if not isinstance(dataset, dict):
            dataset = {"train": dataset}
        names = list(dataset) if options.split is None else [options.split]
        usable = True
        for i, name in enumerate(names):
            text, whole = describe(
                get_split(dataset, name, "split"),
                name,
                tokenizer,
                options.max_length,
                options.image_dir or folder_of_images(options.dataset),
                options.verify_images,
            )
            write(("\n" if i else "") + text)
            usable &= whole
    except (ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    return 0 if usable else 1
