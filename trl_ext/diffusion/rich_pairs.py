"""
Preference pairs of images from critiques and edits: a critic names what is wrong with an image, an instructor says
what to change, an editor changes it, and original and edit become a pair
([Rich Preference Optimization](https://huggingface.co/papers/2503.11720)).

The two images of such a pair differ in what the critique names and in little else, where two samples of a prompt
differ in everything. The loss is Diffusion-DPO's or DSPO's, unchanged.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np

from .._checks import at_least, check_value
from .rich_maker import Maker, Row, pixel_distance
from .rich_report import RichPairsReport


logger = logging.getLogger(__name__)

KEEP = ("either", "better", "all")


def make_rich_pairs(
    dataset: datasets.Dataset,
    *,
    sample: Callable,
    critic: Callable,
    instructor: Callable | None = None,
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

    Each prompt is sampled; the critic says what is wrong and the instructor what to change; the editor changes it; a
    reward orders the two images.
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
        instructor (`Callable`, *optional*):
            `(prompts, images, critiques, **columns)` -> a list of lists of commands to the editor, e.g.
            [`~trl_ext.diffusion.rich_parts.EndpointInstructor`], with columns and `stream` as of the critic. It is
            asked about critiques without instructions, whose texts it gets. Not needed for a critic that gives both.
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
        [`~trl_ext.diffusion.rich_maker.RichPairsError`]: If a part fails, or gives an answer of a wrong kind or an
            edit of another aspect ratio; the message names the row.
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
    _check_instructor(critic, instructor)
    if not isinstance(dataset, datasets.Dataset) or "prompt" not in dataset.column_names:
        raise ValueError("`dataset` must be a `datasets.Dataset` with a column `prompt`.")
    maker = Maker(sample, critic, instructor, editor, reward, dataset, max_edits, cache_dir)
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


def _check_instructor(critic: Callable, instructor: Callable | None) -> None:
    needs_one = getattr(critic, "needs_instructor", None)
    if needs_one and instructor is None:
        raise ValueError(
            f"`critic` is a `{type(critic).__name__}` that gives no instructions, and there is no `instructor`. Give "
            "one, such as `EndpointInstructor`, or a critic with `with_instructions=True`."
        )
    if needs_one is False and instructor is not None:
        raise ValueError(
            f"`instructor` has no effect: the `{type(critic).__name__}` gives instructions itself. Leave it out, or "
            "set `with_instructions=False` of the critic."
        )


def _rows(dataset: datasets.Dataset, samples: int, seed: int) -> list[Row]:
    rows = []
    for number, values in enumerate(dataset):
        prompt = values["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"Row {number}: the prompt must be a text, got {prompt!r}.")
        columns = {name: value for name, value in values.items() if name != "prompt"}
        for i in range(samples):
            rows.append(Row(prompt, seed + number * samples + i, columns, f"row {number} ({prompt!r})"))
    return rows


def _sample_distances(rows: list[Row]) -> list[float]:
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
    row: Row, keep: str, margin: float, round_trip: bool, report: RichPairsReport, gains: tuple[list, list]
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
