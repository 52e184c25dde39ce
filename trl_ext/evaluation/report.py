"""Renders the report as one self-contained HTML file."""

import json
import math
import os
import re
from pathlib import Path

from . import plots
from .win_rates import detectable_difference


TEMPLATE = "report_template.html"
REPORT_FILES = ("report.json", "report.html")

PERCENT, NATS, PLAIN = "percent", "nats", "plain"


def format_number(value: float, unit: str = PLAIN, signed: bool = False, extra_digits: int = 0) -> str:
    """A number for readers: shares in percent, others with three significant digits; zero has no sign."""
    if not math.isfinite(value):
        return "–"
    if unit == PERCENT:
        text = f"{100 * value:.{1 + extra_digits}f}"
    else:
        text = f"{value:.{3 + extra_digits}g}" if abs(value) < 1000 else f"{value:.{extra_digits}f}"
    if float(text) == 0:
        return text.removeprefix("-")
    return f"+{text}" if signed and value > 0 else text


def _interval(low: float, high: float, unit: str, signed: bool) -> str | None:
    """An interval, with as many digits as it takes to tell its ends apart."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    if low == high:
        return "all equal"
    for extra_digits in range(4):
        ends = [format_number(end, unit, signed, extra_digits) for end in (low, high)]
        if ends[0] != ends[1]:
            return " to ".join(ends)
    return "all nearly equal"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


_ABSENT = object()  # not asked for, in contrast to `None`: asked for, but there is no such number


def _cell(value, unit: str = PLAIN, signed: bool = False, reason: str | None = None) -> dict | None:
    """A table cell: the number, and below it its interval or the reason why there is no number."""
    if value is _ABSENT:
        return None
    if value is None:
        return {"text": "–", "interval": reason}
    if not isinstance(value, dict):
        return {"text": format_number(value, unit, signed), "interval": None}
    interval = _interval(value["low"], value["high"], unit, signed)
    if "p_value" in value:  # the p-value of a test belongs to the number as its interval does
        interval = f"{interval}, {_p(value['p_value'])}" if interval else _p(value["p_value"])
    return {"text": format_number(value["value"], unit, signed), "interval": interval}


def _pick(source, *keys):
    for key in keys:
        if source is None:
            return None
        if key not in source:
            return _ABSENT
        source = source[key]
    return source


# Section, then rows: label, unit, where it is in a model's result, where in the reference's, and what it says.
_ROWS = (
    (
        "What the judge prefers",
        (
            ("Win rate", PERCENT, ("win_rate", "win_rate"), None, "mean score, in %: 1 for a win, 1/2 for a tie; a win in one order and a tie in the other is 3/4"),
            ("… length controlled", PERCENT, ("win_rate", "length_controlled", "win_rate"), None, "as if lengths were equal"),
            ("… at similar length", PERCENT, ("win_rate", "length_controlled", "similar_length", "win_rate"), None, "lengths within 15%"),
            ("… minus the first model's", PERCENT, ("win_rate", "difference_from_first"), None, "prompt by prompt, in points"),
            ("Judge's consistency", PERCENT, ("win_rate", "order_consistency"), None, "same verdict with the responses swapped; chance is 50"),
            ("Reward of judged responses", PLAIN, ("reward", "mean"), ("opponent", "reward"), "mean over prompts; left: the opponent's"),
            ("Reward gain", PLAIN, ("reward", "gain"), None, "judged responses minus the opponent's, prompt by prompt"),
        ),
    ),
    (
        "What it costs in drift",
        (
            ("Reward of samples", PLAIN, ("sample_reward",), ("sample_reward",), "mean over the samples below, not the judged responses; the reward of the figure"),
            ("KL to the reference", NATS, ("divergence", "kl"), None, "KL(model || reference), nats a response: exact token KL, summed over own samples"),
            ("… by log ratios (k1)", NATS, ("divergence", "kl_k1"), None, "the same expectation, noisier"),
            ("… by k2", NATS, ("divergence", "kl_k2"), None, "half the squared log ratios of tokens: less noise, but biased"),
            ("… by k3", NATS, ("divergence", "kl_k3"), None, "the same expectation as KL, never negative"),
            ("KL per token", NATS, ("divergence", "kl_per_token"), None, "nats: mean over the tokens of all samples"),
            "divergences",
            ("Log ratio, chosen", NATS, ("ranking", "chosen_logratio"), None, "nats; negative: chosen responses are less probable than under the reference"),
            ("Log ratio, rejected", NATS, ("ranking", "rejected_logratio"), None, "nats"),
        ),
    ),
    (
        "What it would rather say",
        (
            ("Ranking accuracy", PERCENT, ("ranking", "accuracy"), "reference_accuracy", "% of pairs whose chosen response is the more probable one"),
            ("… minus the first model's", PERCENT, ("ranking", "difference_from_first", "accuracy"), None, "pair by pair, in points; p by McNemar's exact test"),
            ("… per token", PERCENT, ("ranking", "accuracy_norm"), "reference_accuracy_norm", "the same, length-normalized"),
            ("… per token, minus the first model's", PERCENT, ("ranking", "difference_from_first", "accuracy_norm"), None, "pair by pair, in points; p by McNemar's exact test"),
            ("Reward accuracy", PERCENT, ("ranking", "reward_accuracy"), None, "% of pairs with the greater log ratio on the chosen side (TRL's rewards/accuracies)"),
            ("Flipped to right", PERCENT, ("ranking", "flipped"), None, "% of the pairs that the reference ranks wrongly"),
            ("Flipped to wrong", PERCENT, ("ranking", "unflipped"), None, "% of the pairs that the reference ranks correctly"),
            ("Alignment gap", PERCENT, ("ranking", "alignment_gap", "gap"), None, "points below DPO's exact optimum; depends on epsilon and the betas"),
        ),
    ),
    (
        "Calibration and diversity",
        (
            ("ECE, bins of equal width", PLAIN, ("calibration", "uniform"), None, "expected calibration error of the implicit preference model, 10 bins; p: how often a calibrated model does as badly"),
            ("… by chance alone", PLAIN, ("calibration", "uniform", "floor"), None, "what a perfectly calibrated model scores on as many pairs in these bins"),
            ("ECE, bins of equal count", PLAIN, ("calibration", "adaptive"), None, "the same in the figure's bins, which hold equally many pairs"),
            ("… by chance alone", PLAIN, ("calibration", "adaptive", "floor"), None, "what a perfectly calibrated model scores on as many pairs in these bins"),
            ("Token entropy", NATS, ("diversity", "entropy"), ("diversity", "entropy"), "nats, of own samples: mean over a response's tokens, then over responses, so that a short one counts as much"),
            ("Distinct-1", PERCENT, ("diversity", "distinct_1"), ("diversity", "distinct_1"), "% different tokens in pools of two samples of a prompt, each cut to distinct_length tokens"),
            ("Distinct-2", PERCENT, ("diversity", "distinct_2"), ("diversity", "distinct_2"), "% different token pairs"),
            ("Self-BLEU", PERCENT, ("diversity", "self_bleu"), ("diversity", "self_bleu"), "likeness of the samples of a prompt: higher is less diverse"),
            ("Embedding diversity", PLAIN, ("diversity", "embedding"), ("diversity", "embedding"), "1 minus mean cosine of the samples of a prompt"),
            ("Sample length", PLAIN, ("diversity", "sample_length"), ("diversity", "sample_length"), "tokens"),
            ("Finished samples", PERCENT, ("diversity", "finished"), ("diversity", "finished"), "% that ended before max_new_tokens"),
        ),
    ),
)  # fmt: skip


# Why a number that was asked for may not exist.
_REASONS = {
    ("win_rate", "order_consistency"): "none in both orders",
    ("win_rate", "length_controlled", "similar_length", "win_rate"): "no such prompts",
    ("reward", "gain"): "no prompt with both rewards",
    ("ranking", "flipped"): "the reference ranks all correctly",
    ("ranking", "unflipped"): "the reference ranks all wrongly",
    ("diversity", "distinct_1"): "samples too short",
    ("diversity", "distinct_2"): "samples too short",
    ("diversity", "self_bleu"): "sacrebleu missing, or samples empty",
    ("diversity", "embedding"): "samples empty",
}

# Names of divergences for readers, and what they are where the name alone may mislead.
_DIVERGENCES = {
    "reverse_kl": ("Reverse KL", "KL(model || reference)"),
    "forward_kl": ("Forward KL", "KL(reference || model)"),
    "js": ("Jensen-Shannon", "twice the textbook's divergence, f-DPO's convention"),
    "alpha": ("Alpha", ""),
    "hellinger": ("Squared Hellinger", ""),
    "jeffreys": ("Jeffreys", "sum of both KLs"),
    "skew_js": ("Skew Jensen-Shannon", ""),
    "chi_po": ("Chi-PO", "chi-squared plus KL"),
    "neyman": ("Neyman chi-squared", ""),
}


def _rows_of(report: dict, rows: tuple) -> list[tuple]:
    """Rows with one for each divergence that the report was asked for in the place of `"divergences"`."""
    found = []
    for row in rows:
        if row != "divergences":
            found.append(row)
            continue
        asked = dict.fromkeys(
            name for result in report["models"].values() for name in result.get("divergence", {}).get("exact", {})
        )
        for name in asked:
            label, meaning = _DIVERGENCES.get(name, (name, ""))
            meaning = f"nats a response, exact, summed over own samples{meaning and ': ' + meaning}"
            found.append((label, NATS, ("divergence", "exact", name, "response"), None, meaning))
    return found


def _table(report: dict) -> list[dict]:
    sections = []
    for title, rows in _ROWS:
        kept = []
        for label, unit, path, reference_path, meaning in _rows_of(report, rows):
            signed = "minus" in label or "gain" in label or "gap" in label or "Log ratio" in label
            values = [_pick(result, *path) for result in report["models"].values()]
            if path[0] == "calibration" and len(path) == 2:  # an error with its test, but no interval
                values = [{"value": v["ece"], "low": -math.inf, "high": math.inf, **v} for v in values]
            reason = _REASONS.get(path, "not measured")
            cells = [_cell(value, unit, signed, reason) for value in values]
            if isinstance(reference_path, str):  # measured with every model, and the same in each
                reference = _pick(next(iter(report["models"].values())), "ranking", reference_path)
            else:
                measured = {**report["reference"], "opponent": report.get("opponent")}
                reference = _pick(measured, *reference_path) if reference_path else _ABSENT
            if any(cells):
                kept.append(
                    {"label": label, "cells": [_cell(reference, unit, reason=reason), *cells], "meaning": meaning}
                )
        if kept:
            sections.append({"title": title, "rows": kept})
    return sections


def _of_the_report(report: dict) -> list[str]:
    """Remarks on the report as a whole."""
    found = []
    if report["unfinished"]:
        found.append(f"Not measured yet: {', '.join(report['unfinished'])}.")
    if report["judge_failure"]:
        found.append(f"The judge failed; its numbers are missing from there on. {report['judge_failure']}")
    dropped = report["dropped_pairs"]
    if any(dropped.values()):
        scored = report["num_pairs"]
        parts = []
        if dropped["no_room"]:
            parts.append(
                f"{dropped['no_room']} whose prompt alone fills max_length = {report['config']['max_length']}"
            )
        if dropped["same_responses"]:
            cut = "" if report["config"]["max_length"] is None else " once they are cut to max_length"
            parts.append(f"{dropped['same_responses']} whose two responses are the same{cut}")
        found.append(
            f"Of {scored + sum(dropped.values())} pairs {scored} were scored; left out were {' and '.join(parts)}."
        )
    diversity = [result.get("diversity", {}) for result in [report["reference"], *report["models"].values()]]
    if any("self_bleu" in each for each in diversity) and "sacrebleu" not in report["versions"]:
        found.append("Self-BLEU was not measured: the package sacrebleu is not installed.")
    short = [name for name in ("distinct_1", "distinct_2") if any(each.get(name, 0) is None for each in diversity)]
    if short:
        found.append(
            f"Distinct-n was not measured where no prompt has two samples of at least distinct_length = "
            f"{report['config']['distinct_length']} tokens. Lower distinct_length, or raise max_new_tokens."
        )
    return found


def _of_model(result: dict, report: dict) -> list[str]:
    """
    Remarks on one model. Models that share a remark are named together, so a number belongs in only where it helps.
    """
    found: list[str] = []
    rate, config = result.get("win_rate"), report["config"]
    if rate:
        estimate = rate["win_rate"]
        if estimate["low"] <= 0.5 <= estimate["high"]:
            smallest = 100 * detectable_difference(estimate["n"])
            found.append(
                f"The win rate is not distinguishable from 50%: {estimate['n']} prompts show differences of about "
                f"{smallest:.0f} points or more."
            )
        controlled = rate["length_controlled"]
        change = estimate["value"] - controlled["win_rate"]["value"]
        if abs(change) > 0.05:
            found.append(
                f"At equal lengths the win rate would be about {100 * controlled['win_rate']['value']:.0f}%, not "
                f"{100 * estimate['value']:.0f}%: the responses have {controlled['mean_length']:.0f} characters on "
                f"average, the opponent's {controlled['mean_opponent_length']:.0f}."
            )
        consistency = rate["order_consistency"]
        if consistency and consistency["value"] < 0.75:
            found.append(
                f"With the responses swapped the judge repeats its verdict in only "
                f"{100 * consistency['value']:.0f}% of the cases. Contradictions count as ties."
            )
        if rate["not_judged"]:
            found.append(f"{rate['not_judged']} prompts have no verdict and are left out of the win rate.")
    missing = result.get("reward", {}).get("mean", {}).get("not_rewarded")
    if missing:
        found.append(f"{missing} of the judged responses have no reward and are left out of the mean.")
    by_chance = [binning for binning in ("uniform", "adaptive") if result["calibration"][binning]["p_value"] > 0.05]
    if by_chance:
        bins = {"uniform": "of equal width", "adaptive": "of equal count"}
        found.append(
            f"The calibration error in bins {' and '.join(bins[binning] for binning in by_chance)} is not "
            f"distinguishable from that of a calibrated model on {result['calibration']['uniform']['n']} pairs."
        )
    finished = result.get("diversity", {}).get("finished")
    if finished is not None and finished < 0.5:
        found.append(
            f"Most samples were cut at {config['max_new_tokens']} tokens, so KL and lengths are those of cut "
            "responses."
        )
    logratio = result["ranking"]["chosen_logratio"]
    if logratio["high"] < 0:
        found.append(
            f"The chosen responses are less probable than under the reference, by "
            f"{format_number(-logratio['value'])} nats on average."
        )
    return found


def _remarks(report: dict) -> list[tuple[str, list[str]]]:
    """Caveats about the numbers, each once, with the names of the models that it concerns."""
    names = plots.short_names(list(report["models"]))
    concerned: dict[str, list[str]] = {}
    for name, result in zip(names, report["models"].values(), strict=True):
        for remark in _of_model(result, report):
            concerned.setdefault(remark, []).append(name)
    grouped: dict[str, list[str]] = {"": _of_the_report(report)}
    for remark, models in concerned.items():
        title = "All models" if len(models) == len(names) > 1 else ", ".join(models)
        grouped.setdefault(title, []).append(remark)
    return [(title, found) for title, found in grouped.items() if found]


def _figures(report: dict) -> list[dict]:
    models, config = report["models"], report["config"]
    judged = any("win_rate" in result for result in models.values())
    sampled = all("divergence" in result for result in models.values())
    rewarded = all("sample_reward" in result for result in models.values())
    wide = plots.panel_size(len(models))
    wanted = []
    if sampled and (rewarded or judged):
        what = (
            "Reward and KL are measured on the same samples."
            if rewarded
            else "KL is measured on samples without truncation, the win rate on the judged responses."
        )
        wanted.append(
            (
                plots.frontier,
                (8.4, 4.4),
                "Reward against drift from the reference",
                "Up is better, left is closer to the reference: of two models with the same reward, the left one "
                f"drifted less. {what} Bars are 95% intervals over prompts.",
            )
        )
    wanted.append(
        (
            plots.ranking,
            (8.4, 1.6 + 0.55 * (len(models) + 1)),
            "Ranking accuracy before and after training",
            "How often the chosen response is more probable than the rejected one, which a high reward accuracy does "
            "not imply. Bars are 95% intervals.",
        )
    )
    wanted.append(
        (
            plots.difficulty,
            wide,
            "Which pairs were flipped",
            "Difficulty is how much more probable the reference finds the rejected response, in nats. To the right of "
            "0 it ranks the pair wrongly; blue there means that the model has flipped it. Outliers are in the "
            "outermost bars.",
        )
    )
    wanted.append(
        (
            plots.reliability,
            wide,
            "Calibration of the implicit preference model",
            f"Of the pairs predicted with a confidence (sigmoid of beta = {config['beta']:g} times the margin of log "
            "ratios), the share predicted right; on the dashed line it keeps what it promises. The bins hold equally "
            "many pairs each, and the ECE above a panel is of these bins; the table has that of bins of equal width "
            "too. p is the probability that a calibrated model does as badly.",
        )
    )
    if judged:
        wanted.append(
            (
                plots.length,
                (8.4, 4.0),
                "Win rate and length",
                "A line that rises from lower left to upper right says that longer responses win, whatever else is in "
                "them.",
            )
        )
    return [
        {
            "svg": plots.draw(function, report, size=size, title=title),
            "title": title,
            "caption": caption,
            "width": round(105 * size[0]),
        }
        for function, size, title, caption in wanted
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def render_report(report: dict) -> str:
    """
    The HTML of a report.

    Text from models, datasets and judges is escaped, so it cannot add markup or scripts. The page has no scripts and
    loads no external resources.

    Args:
        report (`dict`):
            What [`evaluate_models`] returned, or the JSON file that [`write_report`] wrote of it.
    """
    from .evaluate import SCHEMA
    from .loading import require

    require("jinja2", "matplotlib", "scipy")
    import jinja2

    if report.get("schema") != SCHEMA:
        raise ValueError(
            f"`report` has the layout {report.get('schema')!r}, and this version shows {SCHEMA}: evaluate the models "
            "again, or render it with the version that wrote it."
        )
    report = _restored(_plain(report))  # as if it came from `report.json`
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    judge = report["judge"]
    names = plots.short_names(list(report["models"]))
    reference = plots.short_names([report["reference"]["name"]])[0]
    settings = {
        "models": list(report["models"]),
        "reference": report["reference"]["name"],
        **({"dataset": report["dataset"]} if "dataset" in report else {}),
        **report["config"],
    }
    page = environment.get_template(TEMPLATE).render(
        report=report,
        names=names,
        shortened=any("…" in name for name in names)
        or any(name not in full for name, full in zip(names, report["models"], strict=True)),
        reference=f"{reference} (reference)" if reference in names else reference,
        table=_table(report),
        remarks=_remarks(report),
        figures=_figures(report),
        settings=json.dumps(settings, indent=1, ensure_ascii=False),
        judge=None if judge is None else json.dumps(judge, indent=1, ensure_ascii=False),
        number=format_number,
        took=_duration(report["seconds"]),
    )
    # Models sample control characters, and names may hold lone surrogates: neither is valid HTML.
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", page)


def write_report(report: dict, folder: str | Path) -> tuple[Path, Path]:
    """
    Writes a report as `report.json` and `report.html`, in this order and each atomically.

    Args:
        report (`dict`):
            What [`evaluate_models`] returned.
        folder (`str` or `Path`):
            Where to; made if need be.

    Returns:
        `(Path, Path)`: the two files.
    """
    return write_numbers(report, folder), write_page(report, folder)


def write_numbers(report: dict, folder: str | Path) -> Path:
    """Writes `report.json`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, REPORT_FILES[0])
    _write_whole(path, numbers_as_json(report))
    return path


def write_page(report: dict, folder: str | Path) -> Path:
    """Writes `report.html`."""
    path = Path(folder, REPORT_FILES[1])
    _write_whole(path, render_report(report))
    return path


def numbers_as_json(report: dict) -> str:
    """The report as JSON, whatever models, data and judges have put into it."""
    text = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (half of a split character) has no UTF-8 form; JSON's own escape keeps it.
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _write_whole(path: Path, text: str) -> None:
    """Writes to a temporary file and renames it, so that an interrupted write leaves the older file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _plain(value):
    """
    A value as JSON has it: numbers that are not finite as `null`, NumPy's numbers and arrays as Python's, and what else
    there may be in the description of a judge of the user's as text.
    """
    if hasattr(value, "tolist"):  # NumPy and torch
        value = value.tolist()
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _restored(value):
    """Reverses [`_plain`] in estimates: their infinite ends, and a value that is no number."""
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    lost = {"value": math.nan, "low": -math.inf, "high": math.inf} if {"value", "low", "high"} <= value.keys() else {}
    return {key: lost[key] if item is None and key in lost else _restored(item) for key, item in value.items()}
