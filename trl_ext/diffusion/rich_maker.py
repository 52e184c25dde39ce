"""The parts of `make_rich_pairs`, each asked for what the ledger lacks, with every answer kept before it is used."""

import hashlib
import inspect
import io
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ..judges.callables import code_of
from ..judges.verdicts import IndexedVerdict
from ..training.fingerprints import fingerprint
from ..training.record_file import RecordError, RecordFile, parse_object
from ..training.shards import is_intact, write_shard
from .data import to_rgb
from .rewards import ImageRewards, _accepted, _parameters_of
from .rich_parts import Critique
from .rich_report import RichPairsReport


logger = logging.getLogger(__name__)

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
class Row:
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


class Maker:
    """The parts, asked for what the ledger lacks."""

    _names: ClassVar[tuple[str, ...]] = ("sampler", "critic", "instructor", "editor", "reward")

    def __init__(self, sample, critic, instructor, editor, reward, dataset, max_edits: int, cache_dir):
        self.sample, self.critic, self.instructor, self.editor = sample, critic, instructor, editor
        self.max_edits = max_edits
        columns = [name for name in dataset.column_names if name != "prompt"]
        self.rewards = None if reward is None else ImageRewards(reward, columns=columns)
        functions = [] if self.rewards is None else self.rewards.functions
        identities = [identity_of(part) for part in (sample, critic, instructor, editor)]
        identities.append([identity_of(function) for function in functions])
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

    def run(self, rows: list[Row], report: RichPairsReport, min_distance: float, round_trips: int) -> list[Row]:
        """Takes rows through sampler, critic, instructor, editor and reward; returns those that are edited."""
        left = rows
        names = self._ask("sampler", left, [[row.prompt, row.seed] for row in left], self._samples)
        left = self._keep_images(left, names, "image", "not sampled", report)
        asked = [[row.prompt, _pixels(row.image), row.columns] for row in left]
        answers = self._ask("critic", left, asked, self._critiques)
        for row, answer in zip(left, answers, strict=True):
            row.critique = None if answer is None else Critique(**answer)
        left = self._drop(left, [row.critique is None for row in left], "no critique", report)
        self._complete(left)
        left = self._drop(left, [_critique_of(row).instructions is None for row in left], "no instructions", report)
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

    def _samples(self, rows: list[Row]) -> Iterable:
        images = self.sample([row.prompt for row in rows], [row.seed for row in rows])
        return [self._kept_image(image) for image in _checked("sampler", images, len(rows))]

    def _critiques(self, rows: list[Row]) -> Iterable:
        return self._viewed("critic", self.critic, rows)

    def _complete(self, rows: list[Row]) -> None:
        """Asks the instructor about the critiques that have no instructions."""
        own = [row for row in rows if _critique_of(row).instructions is None]
        if not own:
            return
        if self.instructor is None:
            raise RichPairsError(
                f"The critic gave no instructions for {own[0].where}, and there is no `instructor`. Give one, or have "
                "the critic return a `Critique` with `instructions`, an empty list if there is nothing to improve."
            )
        asked = [[row.prompt, _pixels(row.image), _critique_of(row).text, row.columns] for row in own]
        answers = self._ask("instructor", own, asked, self._instructions)
        for row, answer in zip(own, answers, strict=True):
            row.critique = Critique(_critique_of(row).text, answer)

    def _instructions(self, rows: list[Row]) -> Iterable:
        return self._viewed("instructor", self.instructor, rows, [_critique_of(row).text for row in rows])

    def _viewed(self, name: str, part: Any, rows: list[Row], *texts: list[str]) -> Iterable:
        """Answers of a part that is shown images, as they arrive if it can tell."""
        arguments = ([row.prompt for row in rows], [row.image for row in rows], *texts)
        columns = {name: [row.columns[name] for row in rows] for name in rows[0].columns}
        if hasattr(part, "stream"):
            return part.stream(*arguments, **columns)
        return _checked(name, part(*arguments, **_accepted(_parameters_of(part), columns)), len(rows))

    def _edits(self, rows: list[Row], report: RichPairsReport) -> list[Row]:
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

    def _edit(self, rows: list[Row], turn: int) -> Iterable:
        texts = [_instructions_of(row)[turn] for row in rows]
        return self._edited(rows, [row.edited for row in rows], texts)

    def _round_trips(self, rows: list[Row]) -> None:
        asked = [[row.prompt, _pixels(row.image), ""] for row in rows]
        names = self._ask(
            "editor",
            rows,
            asked,
            lambda missing: self._edited(missing, [row.image for row in missing], [""] * len(missing)),
        )
        for row, name in zip(rows, names, strict=True):
            row.round_trip = self._image(name)

    def _edited(self, rows: list[Row], images: list, instructions: list[str]) -> list[str | None]:
        edits = _checked("editor", self.editor(images, instructions, [row.prompt for row in rows]), len(rows))
        return [self._kept_image(_fitted(edit, row)) for edit, row in zip(edits, rows, strict=True)]

    def _scores(self, rows: list[Row], name: str) -> Iterable:
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

    def _ask(self, part: str, rows: list[Row], questions: list[list], ask: Callable) -> list:
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

    def _record(self, part: str, key: str, row: Row, answer: Any) -> None:
        if part == "critic" and answer is not None:
            if not isinstance(answer, Critique):
                raise RichPairsError(f"The critic gave {answer!r} for {row.where}. Return a `Critique`, or None.")
            answer = asdict(answer)
        if part == "instructor" and answer is not None:
            if not isinstance(answer, (list, tuple)) or not all(isinstance(text, str) for text in answer):
                raise RichPairsError(
                    f"The instructor gave {answer!r} for {row.where}. Return a list of commands to the editor, or "
                    "None."
                )
            answer = list(answer)
        if self.ledger is not None:
            self.ledger.append([{"key": key, "part": part, "prompt": row.prompt, "seed": row.seed, "answer": answer}])
        self._known[key] = answer

    def _record_under_way(self, part: str, keys: list[str], rows: list[Row], answers: Any) -> None:
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

    def _keep_images(self, rows, names, attribute: str, reason: str, report: RichPairsReport) -> list[Row]:
        for row, name in zip(rows, names, strict=True):
            setattr(row, attribute, self._image(name))
        rows = self._drop(rows, [getattr(row, attribute) is None for row in rows], reason, report)
        return self._drop(rows, [_is_black(getattr(row, attribute)) for row in rows], "black", report)

    @staticmethod
    def _drop(rows: list[Row], where: list[bool], reason: str, report: RichPairsReport) -> list[Row]:
        for is_dropped in where:
            if is_dropped:
                report.drop(reason)
        return [row for row, is_dropped in zip(rows, where, strict=True) if not is_dropped]


def _critique_of(row: Row) -> Critique:
    assert row.critique is not None
    return row.critique


def _instructions_of(row: Row) -> list[str]:
    instructions = _critique_of(row).instructions
    assert instructions is not None
    return instructions


def _fitted(edit: Image.Image | None, row: Row) -> Image.Image | None:
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


def identity_of(part: Any) -> Any:
    """What tells a part from others: its own word, its source, or for an object its class, settings and weights."""
    if part is None:
        return None
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


def pixel_distance(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of the pixels of two images of one size, in [0, 1]."""
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (first, second))
    return float(np.abs(a - b).mean() / 255)
