"""
Preference pairs of images from critiques and edits: a critic names what is wrong with an image, an editor changes it,
and original and edit become a pair ([Rich Preference Optimization](https://huggingface.co/papers/2503.11720)).

The two images of such a pair differ in what the critique names and in little else, where two samples of a prompt
differ in everything. The loss is Diffusion-DPO's or DSPO's, unchanged.
"""

import hashlib
import inspect
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import torch
from PIL import Image

from .._checks import at_least, check_value
from ..judges.callables import code_of
from ..judges.verdicts import IndexedVerdict
from ..training.fingerprints import fingerprint
from ..training.record_file import RecordError, RecordFile, parse_object
from ..training.shards import is_intact, write_shard
from .data import to_rgb
from .rewards import ImageRewards, _accepted, _parameters_of
from .rich_parts import Critique


logger = logging.getLogger(__name__)

KEEP = ("either", "better", "all")

# Largest ratio of the aspect ratios of an image and its edit that resizing may repair: editors round a side to a
# multiple of up to 32 pixels.
MAX_EDIT_ASPECT = 1.1


class RichPairsError(RuntimeError):
    """A part of `make_rich_pairs` failed. What was answered before is in the ledger."""


class RichPairsLedger(RecordFile):
    """
    What the parts have answered: `key`, a hash of the question and of who was asked; `part`; and the answer, with
    images as names of files beside the ledger.
    """

    _name = "ledger of rich pairs"
    _entry = "answer"
    _place = "Or give another `cache_dir`."

    def _parse(self, line: bytes) -> dict:
        entry = parse_object(line)
        if not isinstance(entry.get("key"), str) or "answer" not in entry:
            raise ValueError("it has no 'key' or no 'answer'")
        return entry


@dataclass
class RichPairsReport:
    """
    What became of the images, filled in by [`make_rich_pairs`].

    Attributes:
        images (`int`):
            Images asked for: prompts times `samples_per_prompt`.
        dropped (`dict[str, int]`):
            Images that gave no pair, by reason: `"not sampled"`, `"black"`, `"no critique"`, `"nothing to improve"`,
            `"edit refused"`, `"edit changes nothing"`, `"no reward"`, `"below the margin"`, `"edit is worse"`.
        pairs (`int`):
            Pairs made.
        edited_chosen (`int`):
            Pairs in which the edit is the chosen image.
        gain, round_trip_gain (`tuple[float, float, int]`, *optional*):
            Reward of the edits minus that of their originals: mean, half of its 95 % interval, and number of edits;
            and the same of edits with an empty instruction, which are what the editor alone does to an image.
        pair_distance, sample_distance (`float`, *optional*):
            Mean absolute difference of the pixels, in [0, 1], within the pairs, and between two samples of a prompt.
    """

    images: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    edited_chosen: int = 0
    gain: tuple[float, float, int] | None = None
    round_trip_gain: tuple[float, float, int] | None = None
    pair_distance: float | None = None
    sample_distance: float | None = None

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def __str__(self) -> str:
        lines = [f"{self.pairs:,} pairs from {self.images:,} images; the edit is chosen in {self.edited_chosen:,}."]
        lines += [f"No pair: {reason}, {count:,}." for reason, count in self.dropped.items()]
        for gain, name in ((self.gain, "an edit"), (self.round_trip_gain, "an edit with an empty instruction")):
            if gain is not None:
                lines.append(f"Reward gained by {name}: {gain[0]:+.4g} +- {gain[1]:.2g} ({gain[2]:,} edits).")
        if self.pair_distance is not None:
            lines.append(f"Distance of the pixels within a pair: {self.pair_distance:.4f}.")
        if self.sample_distance is not None:
            lines.append(f"Distance of the pixels of two samples of a prompt: {self.sample_distance:.4f}.")
        return "\n".join(lines)

    def warn_of_signature(self) -> None:
        """Warns if an edit with an empty instruction gains as much as one with an instruction."""
        if self.gain is None or self.round_trip_gain is None:
            return
        (gain, spread, _), (empty, empty_spread, _) = self.gain, self.round_trip_gain
        if empty > 0 and gain - empty <= math.hypot(spread, empty_spread):
            logger.warning(
                f"Edits gain a reward of {gain:+.4g}, and edits with an empty instruction {empty:+.4g}: what the "
                "editor does to every image may be all that the pairs teach. Pass the originals through the editor, "
                "too, with `round_trip_rejected=True`, or use another editor."
            )


@dataclass
class _Row:
    """An image on its way to a pair."""

    prompt: str
    seed: int
    columns: dict[str, Any]
    where: str
    image: Image.Image | None = None
    critique: Critique | None = None
    instruction: str = ""
    edited: Image.Image | None = None
    round_trip: Image.Image | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)


def make_rich_pairs(
    dataset: datasets.Dataset,
    *,
    sample: Callable,
    critic: Callable,
    editor: Callable,
    reward: Callable | Sequence[Callable] | None = None,
    margin: float = 0.0,
    keep: str = "either",
    max_edits: int = 1,
    samples_per_prompt: int = 1,
    min_distance: float = 1e-3,
    round_trip_images: int = 16,
    round_trip_rejected: bool = False,
    batch_size: int = 8,
    cache_dir: str | os.PathLike | None = None,
    seed: int = 0,
    report: RichPairsReport | None = None,
) -> datasets.Dataset:
    """
    Makes preference pairs from critiques and edits of a model's own samples.

    Each prompt is sampled; the critic says what to change; the editor changes it; a reward orders the two images.
    Whatever gives no pair is counted by reason, in the log, in `report` and in the dataset's `info.description`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompts, in a column `prompt`. Its other columns are handed to critic and reward.
        sample (`Callable`):
            `(prompts, seeds) -> images`, e.g. [`~trl_ext.diffusion.rich_parts.PipelineSampler`].
        critic (`Callable`):
            `(prompts, images, **columns)` -> a list of [`~trl_ext.diffusion.rich_parts.Critique`], e.g.
            [`~trl_ext.diffusion.rich_parts.EndpointCritic`]; columns are those among its parameters. If it has a
            method `stream`, which yields [`~trl_ext.judges.IndexedVerdict`] of critiques, each is kept as it arrives.
        editor (`Callable`):
            `(images, instructions, prompts) -> images`, e.g. [`~trl_ext.diffusion.rich_parts.PipelineEditor`]. An edit
            of another size is resized to the original's.
        reward (`Callable` or list, *optional*):
            Reward functions of images, as of the online trainer: `(prompts, images, **columns)` -> numbers. Report
            results with another one than the pairs were made with.
        margin (`float`, *optional*, defaults to `0.0`):
            Least difference of the two rewards of a pair.
        keep (`str`, *optional*, defaults to `"either"`):
            `"either"`: the image with the larger reward is chosen, so that a failed edit is rejected; `"better"`: only
            pairs whose edit has the larger reward; `"all"`: the edit is chosen whatever the reward, as the critic is
            trusted, with a warning.
        max_edits (`int`, *optional*, defaults to `1`):
            Instructions of a critique that are applied, one after the other.
        samples_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt.
        min_distance (`float`, *optional*, defaults to `1e-3`):
            Least mean absolute difference of the pixels, in [0, 1], below which an edit has changed nothing.
        round_trip_images (`int`, *optional*, defaults to `16`):
            Images that are also edited with an empty instruction, as a control, if there is a reward: the report has
            their gain beside that of the edits.
        round_trip_rejected (`bool`, *optional*, defaults to `False`):
            Put the original through the editor with an empty instruction before it enters a pair, so that both images
            bear the editor's signature.
        batch_size (`int`, *optional*, defaults to `8`):
            Images that go through the parts together.
        cache_dir (`str`, *optional*):
            Folder of the ledger, in which every answer is kept before it is used. A run that was killed goes on there
            without repeating one; another sampler, critic, editor or reward is asked anew. Without it nothing is kept.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first image; it increases by one for each.
        report ([`RichPairsReport`], *optional*):
            Filled in.

    Any part may return `None` for an image, which then gives no pair. A part is told from another one by its method
    `identity()` if it has one, otherwise by its source, and an object's plain attributes and modules.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen` and `rejected`, for `DiffusionDPOTrainer` and `DSPOTrainer`, and,
        to look at, `critique`, `instruction`, `reward_chosen`, `reward_rejected`, `edited_is` and `seed`.

    Raises:
        `ValueError`: For options out of range or without effect; if no pair is left, with the counts.
        [`RichPairsError`]: If a part fails, or gives an answer of a wrong kind or an edit of another aspect ratio; the
            message names the row.
    """
    check_value("keep", keep, str, choices=KEEP)
    for name, value, kind in (
        ("margin", margin, Annotated[float, at_least(0)]),
        ("max_edits", max_edits, Annotated[int, at_least(1)]),
        ("samples_per_prompt", samples_per_prompt, Annotated[int, at_least(1)]),
        ("min_distance", min_distance, Annotated[float, at_least(0)]),
        ("round_trip_images", round_trip_images, Annotated[int, at_least(0)]),
        ("batch_size", batch_size, Annotated[int, at_least(1)]),
    ):
        check_value(name, value, kind)
    if reward is None and keep != "all":
        raise ValueError(
            f"`keep={keep!r}` orders a pair by its rewards, and there is no `reward`. Give one, or set `keep='all'` to "
            "trust the critic."
        )
    if keep == "all":
        if margin:
            raise ValueError(f"`margin={margin!r}` has no effect with `keep='all'`. Leave it at 0, or choose another.")
        logger.warning("`keep='all'`: every edit is chosen over its original, also where it is worse.")
    if not isinstance(dataset, datasets.Dataset) or "prompt" not in dataset.column_names:
        raise ValueError("`dataset` must be a `datasets.Dataset` with a column `prompt`.")
    maker = _Maker(sample, critic, editor, reward, dataset, max_edits, cache_dir)
    report = RichPairsReport() if report is None else report
    rows, made = _rows(dataset, samples_per_prompt, seed), []
    report.images = len(rows)
    trips = len(rows) if round_trip_rejected else round_trip_images if reward is not None else 0
    gains: list[float] = []
    empty_gains: list[float] = []
    distances: dict[str, list[float]] = {"pairs": [], "samples": []}
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            edited = maker.run(batch, report, min_distance, trips - len(empty_gains))
            distances["samples"] += _sample_distances(batch)
            for row in edited:
                pair = _pair(row, keep, margin, round_trip_rejected, report, (gains, empty_gains))
                if pair is not None:
                    made.append(pair)
                    distances["pairs"].append(pixel_distance(pair["chosen"], pair["rejected"]))
            for row in batch:  # the pairs have what is needed of the images
                row.image = row.edited = row.round_trip = None
    finally:
        maker.close()
    report.pairs = len(made)
    report.edited_chosen = sum(pair["edited_is"] == "chosen" for pair in made)
    report.gain, report.round_trip_gain = _mean_of(gains), _mean_of(empty_gains)
    means = {name: float(np.mean(values)) if values else None for name, values in distances.items()}
    report.pair_distance, report.sample_distance = means["pairs"], means["samples"]
    if not made:
        raise ValueError(f"No pair is left.\n{report}\nLower `margin`, or see why images were dropped.")
    logger.info(str(report))
    report.warn_of_signature()
    if cache_dir is not None:
        (Path(cache_dir) / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    image, number, text = datasets.Image(), datasets.Value("float64"), datasets.Value("string")
    features = datasets.Features(
        prompt=text, chosen=image, rejected=image, critique=text, instruction=text, reward_chosen=number
    )
    features |= datasets.Features(reward_rejected=number, edited_is=text, seed=datasets.Value("int64"))
    result = datasets.Dataset.from_list(made, features=features)
    result.info.description = str(report)
    return result


def _rows(dataset: datasets.Dataset, samples: int, seed: int) -> list[_Row]:
    rows = []
    for number, values in enumerate(dataset):
        prompt = values["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"Row {number}: the prompt must be a text, got {prompt!r}.")
        columns = {name: value for name, value in values.items() if name != "prompt"}
        for i in range(samples):
            rows.append(_Row(prompt, seed + number * samples + i, columns, f"row {number} ({prompt!r})"))
    return rows


def pixel_distance(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of the pixels of two images of one size, in [0, 1]."""
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (first, second))
    return float(np.abs(a - b).mean() / 255)


def _sample_distances(rows: list[_Row]) -> list[float]:
    return [
        pixel_distance(a.image, b.image)
        for a, b in zip(rows, rows[1:], strict=False)
        if a.where == b.where and a.image is not None and b.image is not None and a.image.size == b.image.size
    ]


def _mean_of(values: list[float]) -> tuple[float, float, int] | None:
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), 1.96 * spread / math.sqrt(len(values)), len(values)


def _pair(
    row: _Row, keep: str, margin: float, round_trip: bool, report: RichPairsReport, gains: tuple[list, list]
) -> dict | None:
    before, after = row.rewards.get("image"), row.rewards.get("edited")
    empty = row.rewards.get("round_trip")
    if before is not None and empty is not None:
        gains[1].append(empty - before)
    if before is not None and after is not None:
        gains[0].append(after - before)
    original = row.image
    if round_trip:
        original, before = row.round_trip, empty
    if original is None:
        report.drop("edit refused")
        return None
    if keep != "all" and (before is None or after is None):
        report.drop("no reward")
        return None
    difference = 1.0 if keep == "all" else after - before  # type: ignore[operator]  # both are there
    if difference == 0 or abs(difference) < margin:
        report.drop("below the margin")
        return None
    if difference < 0 and keep == "better":
        report.drop("edit is worse")
        return None
    is_chosen = difference > 0
    images, rewards = (row.edited, original), (after, before)
    assert row.critique is not None
    return {
        "prompt": row.prompt,
        "chosen": images[not is_chosen],
        "rejected": images[is_chosen],
        "critique": row.critique.text,
        "instruction": row.instruction,
        "reward_chosen": rewards[not is_chosen],
        "reward_rejected": rewards[is_chosen],
        "edited_is": "chosen" if is_chosen else "rejected",
        "seed": row.seed,
    }


class _Maker:
    """The parts, asked for what the ledger lacks."""

    _names: ClassVar[tuple[str, ...]] = ("sampler", "critic", "editor", "reward")

    def __init__(self, sample, critic, editor, reward, dataset, max_edits: int, cache_dir):
        self.sample, self.critic, self.editor, self.max_edits = sample, critic, editor, max_edits
        columns = [name for name in dataset.column_names if name != "prompt"]
        self.rewards = None if reward is None else ImageRewards(reward, columns=columns)
        functions = [] if self.rewards is None else self.rewards.functions
        identities = [_identity(sample), _identity(critic), _identity(editor), [_identity(f) for f in functions]]
        self._identities = dict(zip(self._names, identities, strict=True))
        self.folder = None if cache_dir is None else Path(cache_dir).expanduser()
        self.ledger = None if self.folder is None else RichPairsLedger(self.folder / "ledger.jsonl")
        if self.ledger is not None:
            self.ledger.open()
        self._known = {} if self.ledger is None else {entry["key"]: entry["answer"] for entry in self.ledger.entries}
        self._images: dict[str, Image.Image] = {}  # without a folder

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()

    # ---- The parts -------------------------------------------------------------------------------------------------

    def run(self, rows: list[_Row], report: RichPairsReport, min_distance: float, round_trips: int) -> list[_Row]:
        """Takes rows through sampler, critic, editor and reward; returns those that are edited."""
        left = rows
        names = self._ask("sampler", left, [[row.prompt, row.seed] for row in left], self._samples)
        left = self._keep_images(left, names, "image", "not sampled", report)
        asked = [[row.prompt, _pixels(row.image), row.columns] for row in left]
        answers = self._ask("critic", left, asked, self._critiques)
        for row, answer in zip(left, answers, strict=True):
            row.critique = None if answer is None else Critique(**answer)
        left = self._drop(left, [row.critique is None for row in left], "no critique", report)
        left = self._drop(left, [not _instructions_of(row) for row in left], "nothing to improve", report)
        left = self._edits(left, report)
        is_same = [pixel_distance(row.image, row.edited) < min_distance for row in left]
        left = self._drop(left, is_same, "edit changes nothing", report)
        self._round_trips(left[: max(0, round_trips)])
        if self.rewards is not None:
            for name in ("image", "edited", "round_trip"):
                own = [row for row in left if getattr(row, name) is not None]
                asked = [[row.prompt, _pixels(getattr(row, name)), row.columns] for row in own]
                given = self._ask("reward", own, asked, lambda missing, name=name: self._scores(missing, name))
                for row, value in zip(own, given, strict=True):
                    row.rewards[name] = value
        return left

    def _samples(self, rows: list[_Row]) -> Iterable:
        images = self.sample([row.prompt for row in rows], [row.seed for row in rows])
        return [self._kept_image(image) for image in _checked("sampler", images, len(rows))]

    def _critiques(self, rows: list[_Row]) -> Iterable:
        prompts, images = [row.prompt for row in rows], [row.image for row in rows]
        columns = {name: [row.columns[name] for row in rows] for name in rows[0].columns}
        if hasattr(self.critic, "stream"):
            return self.critic.stream(prompts, images, **columns)
        return _checked(
            "critic", self.critic(prompts, images, **_accepted(_parameters_of(self.critic), columns)), len(rows)
        )

    def _edits(self, rows: list[_Row], report: RichPairsReport) -> list[_Row]:
        for row in rows:
            row.edited = row.image
        for turn in range(self.max_edits):
            own = [row for row in rows if turn < len(_instructions_of(row))]
            texts = [_instructions_of(row)[turn] for row in own]
            asked = [[row.prompt, _pixels(row.edited), text] for row, text in zip(own, texts, strict=True)]
            names = self._ask("editor", own, asked, lambda missing, turn=turn: self._edit(missing, turn))
            refused = [row for row, name in zip(own, names, strict=True) if name is None]
            for row, name, text in zip(own, names, texts, strict=True):
                row.edited = self._image(name)
                row.instruction = f"{row.instruction}; {text}" if row.instruction else text
            rows = self._drop(rows, [any(row is other for other in refused) for row in rows], "edit refused", report)
            rows = self._drop(rows, [_is_black(row.edited) for row in rows], "black", report)
        return rows

    def _edit(self, rows: list[_Row], turn: int) -> Iterable:
        texts = [_instructions_of(row)[turn] for row in rows]
        return self._edited(rows, [row.edited for row in rows], texts)

    def _round_trips(self, rows: list[_Row]) -> None:
        asked = [[row.prompt, _pixels(row.image), ""] for row in rows]
        names = self._ask(
            "editor",
            rows,
            asked,
            lambda missing: self._edited(missing, [row.image for row in missing], [""] * len(missing)),
        )
        for row, name in zip(rows, names, strict=True):
            row.round_trip = self._image(name)

    def _edited(self, rows: list[_Row], images: list, instructions: list[str]) -> list[str | None]:
        edits = _checked("editor", self.editor(images, instructions, [row.prompt for row in rows]), len(rows))
        return [self._kept_image(_fitted(edit, row)) for edit, row in zip(edits, rows, strict=True)]

    def _scores(self, rows: list[_Row], name: str) -> Iterable:
        values: list[float | None] = [None] * len(rows)
        images = [getattr(row, name) for row in rows]
        for size in {image.size for image in images}:
            own = [i for i, image in enumerate(images) if image.size == size]
            arrays = np.stack([np.asarray(images[i]) for i in own])
            pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
            columns = {key: [rows[i].columns[key] for i in own] for key in rows[0].columns}
            sums, _ = self.rewards([rows[i].prompt for i in own], pixels, **columns)  # type: ignore[misc]
            for i, value in zip(own, sums.tolist(), strict=True):
                values[i] = None if math.isnan(value) else value
        return values

    # ---- The ledger ------------------------------------------------------------------------------------------------

    def _ask(self, part: str, rows: list[_Row], questions: list[list], ask: Callable) -> list:
        """The answers to `questions`, one a row: those that are not known by `ask(rows)`, each kept as it comes."""
        keys = [_key(part, self._identities[part], question) for question in questions]
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key not in self._known or not self._has(part, self._known[key]):
                first.setdefault(key, i)
        missing = list(first.values())
        if missing:
            answers: Any = None
            try:
                answers = iter(ask([rows[i] for i in missing]))
                for position, answer in enumerate(answers):
                    if isinstance(answer, IndexedVerdict):
                        position, answer = answer.index, answer.verdict
                    self._record(part, keys[missing[position]], rows[missing[position]], answer)
            except BaseException as error:
                self._record_under_way(part, [keys[i] for i in missing], [rows[i] for i in missing], answers)
                if not isinstance(error, Exception) or isinstance(error, (RichPairsError, RecordError)):
                    raise
                where = rows[missing[0]].where + (f" to {rows[missing[-1]].where}" if len(missing) > 1 else "")
                kept = "" if self.ledger is None else f" What was answered before is in `{self.ledger.path}`."
                raise RichPairsError(
                    f"The {part} failed at {where}: {type(error).__name__}: {str(error).rstrip('.')}.{kept}"
                ) from error
        return [self._known[key] for key in keys]

    def _record(self, part: str, key: str, row: _Row, answer: Any) -> None:
        if part == "critic" and answer is not None:
            if not isinstance(answer, Critique):
                raise RichPairsError(f"The critic gave {answer!r} for {row.where}. Return a `Critique`, or None.")
            answer = asdict(answer)
        if self.ledger is not None:
            self.ledger.append([{"key": key, "part": part, "prompt": row.prompt, "seed": row.seed, "answer": answer}])
        self._known[key] = answer

    def _record_under_way(self, part: str, keys: list[str], rows: list[_Row], answers: Any) -> None:
        """Has the critic send no more questions, and keeps the answers to those under way, which are paid for."""
        if not hasattr(answers, "call_off"):
            return
        answers.call_off()
        try:
            for answer in answers:
                self._record(part, keys[answer.index], rows[answer.index], answer.verdict)
        except Exception as error:  # why the run stops is known already
            logger.warning(f"The {part} failed ({type(error).__name__}: {error}).")

    def _has(self, part: str, answer: Any) -> bool:
        """Whether an answer of the ledger can be used: an image's file is there, and is what was written."""
        if part not in ("sampler", "editor") or answer is None or answer in self._images:
            return True
        try:
            return is_intact(self._path(answer))
        except OSError:
            return False

    # ---- Images ----------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "images" / name

    def _kept_image(self, image: Any) -> str | None:
        """Name of the image in the folder, or in memory without one."""
        if image is None:
            return None
        if not isinstance(image, Image.Image):
            raise RichPairsError(f"An image must be a `PIL.Image.Image`, got a `{type(image).__name__}`.")
        rgb = to_rgb(image)
        if self.folder is None:
            name = _pixels(rgb)
            self._images[name] = rgb
            return name
        buffer = io.BytesIO()
        rgb.save(buffer, format="PNG")
        return write_shard(self.folder / "images", "image", ".png", buffer.getvalue()).name

    def _image(self, name: str | None) -> Image.Image | None:
        if name is None or self.folder is None:
            return None if name is None else self._images[name]
        with Image.open(self._path(name)) as image:
            return image.convert("RGB")

    def _keep_images(self, rows, names, attribute: str, reason: str, report: RichPairsReport) -> list[_Row]:
        for row, name in zip(rows, names, strict=True):
            setattr(row, attribute, self._image(name))
        rows = self._drop(rows, [getattr(row, attribute) is None for row in rows], reason, report)
        return self._drop(rows, [_is_black(getattr(row, attribute)) for row in rows], "black", report)

    @staticmethod
    def _drop(rows: list[_Row], where: list[bool], reason: str, report: RichPairsReport) -> list[_Row]:
        for is_dropped in where:
            if is_dropped:
                report.drop(reason)
        return [row for row, is_dropped in zip(rows, where, strict=True) if not is_dropped]


def _instructions_of(row: _Row) -> list[str]:
    assert row.critique is not None
    return row.critique.instructions


def _fitted(edit: Image.Image | None, row: _Row) -> Image.Image | None:
    """An edit at its original's size."""
    image = row.image
    if edit is None or image is None or edit.size == image.size:
        return edit
    ratio = (edit.width / edit.height) / (image.width / image.height)
    if max(ratio, 1 / ratio) > MAX_EDIT_ASPECT:
        raise RichPairsError(
            f"The editor made {edit.width} x {edit.height} pixels of an image of {image.width} x {image.height}, at "
            f"{row.where}: another aspect ratio shows another part of the scene. Have it keep the ratio."
        )
    return edit.resize(image.size, Image.Resampling.LANCZOS)


def _is_black(image: Image.Image | None) -> bool:
    """Whether it is what a safety filter leaves."""
    return image is not None and not image.getbbox()


def _pixels(image: Image.Image | None) -> str:
    assert image is not None
    return hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()[:32]


def _key(part: str, identity: Any, question: list) -> str:
    text = json.dumps([part, identity, question], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identity(part: Any) -> Any:
    """What tells a part from others: its own word, its source, or for an object its class, settings and weights."""
    if hasattr(part, "identity"):
        return part.identity()
    if not hasattr(part, "__dict__") or inspect.isroutine(part):
        return code_of(part)
    settings = {name: v for name, v in vars(part).items() if isinstance(v, (str, int, float, bool, type(None)))}
    modules = [v for _, v in sorted(vars(part).items()) if isinstance(v, torch.nn.Module)]
    return [code_of(type(part)), settings, fingerprint(*modules)]


def _checked(part: str, answers: Any, count: int) -> list:
    answers = list(answers)
    if len(answers) != count:
        raise RichPairsError(
            f"The {part} gave {len(answers)} answers for {count} images. Give one each, None for none."
        )
    return answers
