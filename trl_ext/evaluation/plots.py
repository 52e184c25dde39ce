"""Plots of a report, as SVG that needs nothing from outside."""

import io
import re

import numpy as np

from .divergences import best_of_n
from .intervals import proportion


# Okabe and Ito's colors, which are distinguishable with any color vision; markers encode the same information again.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
GREY, RIGHT, WRONG = "#7a7a7a", "#0072b2", "#d55e00"

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names of models may hold dollar signs
    "svg.fonttype": "path",  # the same in every browser, whatever its fonts
}


def short_names(names: list[str], longest: int = 28) -> list[str]:
    """
    Names for tables and legends, all different: paths and ids without the leading and trailing parts that they have in
    common, `/runs/tdpo/checkpoint-100` and `/runs/fdpo/checkpoint-100` as `tdpo` and `fdpo`. A single one is its last
    part, or its last two where the last is a checkpoint. Long ones lose first what they have in common, then their
    middle; where they cannot be told apart then, they are numbered.
    """
    parts = [printable(name).rstrip("/").split("/") if name.strip("/") else [name] for name in names]
    if len(parts) == 1:
        checkpoint = re.fullmatch(r"(checkpoint|step|epoch)[-_]?\d*|final|best|last", parts[0][-1])
        shown = ["/".join(parts[0][-2 if checkpoint else -1 :])]
    else:
        shown = ["/".join(kept) for kept in _without_common(parts)]
    if any(len(name) > longest for name in shown) and len(shown) > 1:
        shown = _where_they_differ(shown, longest)
    shown = [n if len(n) <= longest else f"{n[: longest // 2 - 1]}…{n[-longest // 2 :]}" for n in shown]
    if len(set(shown)) < len(shown):
        shown = [f"{number}: {name}" for number, name in enumerate(shown, start=1)]
    return shown


def _where_they_differ(names: list[str], longest: int) -> list[str]:
    """Names as the words that they differ in: with those between, or, where that is too long, without."""
    words = [re.findall(r"[^-_/]*[-_/]?", name)[:-1] or [""] for name in names]
    # One word of what they share stays for context: `beta-0.05` rather than `0.05`.
    kept = _without_common(words, context=1)
    shown = []
    for word, keep in zip(words, kept, strict=True):
        before = "…" if word[: len(keep)] != keep else ""
        after = "…" if word[len(word) - len(keep) :] != keep else ""
        shown.append(before + "".join(keep).rstrip("-_/") + after)
    if all(len(name) <= longest for name in shown) or len({len(word) for word in words}) > 1:
        return shown
    differ = [len(set(column)) > 1 for column in zip(*words, strict=True)]
    return ["…".join(w.rstrip("-_/") for w, d in zip(word, differ, strict=True) if d) for word in words]


def _without_common(sequences: list[list[str]], context: int = 0) -> list[list[str]]:
    """
    Sequences without their common beginning and end, except `context` items of the former; something of each is left.
    """
    most = min(map(len, sequences)) - 1

    def common(*items) -> int:
        count = 0
        while count < most and len({sequence[count] for sequence in items}) == 1:
            count += 1
        return count

    start = common(*sequences)
    end = min(common(*(sequence[::-1] for sequence in sequences)), most - start)
    return [sequence[max(start - context, 0) : len(sequence) - end] for sequence in sequences]


def printable(text: str) -> str:
    """A text without control characters, for which fonts have no glyphs."""
    return "".join(character if character.isprintable() else " " for character in text)


def look(index: int) -> dict:
    """Color and marker of a model: the first 49 have a pair of their own."""
    count = len(COLORS)
    return dict(color=COLORS[index % count], marker=MARKERS[(index + index // count) % len(MARKERS)])


PANEL_COLUMNS = 3


def panel_size(models: int) -> tuple[float, float]:
    """Size of a figure with one panel a model, and room for a legend."""
    columns, rows = min(models, PANEL_COLUMNS), -(-models // PANEL_COLUMNS)
    return max(3.7 * columns + 1.6, 6.4), 3.7 * rows


def _panels(figure, models: dict) -> list:
    """One panel a model, with its name, in rows of three."""
    columns, rows = min(len(models), PANEL_COLUMNS), -(-len(models) // PANEL_COLUMNS)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel().tolist()
    for axes in panels[len(models) :]:
        axes.remove()
    return panels[: len(models)]


def draw(function, *args, size: tuple[float, float], title: str) -> str:
    """`function(figure, *args)` on a fresh figure, as an SVG element."""
    import matplotlib
    from matplotlib.figure import Figure

    # The salt keeps the ids of several plots on one page apart, and the same report the same file.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's `matplotlibrc` asks for, such as texts set by LaTeX
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": title})
        figure = Figure(figsize=size)
        function(figure, *args)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Scaled to the page by its view box, and named for those who hear the page.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _bars(estimate: dict) -> np.ndarray:
    """Lengths of the two error bars of an estimate, `(2, 1)`; none where there is no interval."""
    ends = np.array([[estimate["value"] - estimate["low"]], [estimate["high"] - estimate["value"]]])
    return np.where(np.isfinite(ends), np.maximum(ends, 0), 0)


def frontier(figure, report: dict) -> None:
    """Reward of samples, or else win rate, against KL; one point for each model, and the reference."""
    axes = figure.subplots()
    models = report["models"]
    rewarded = all("sample_reward" in result for result in models.values())
    measured = [result for result in models.values() if rewarded or "win_rate" in result]
    kls = [result["divergence"]["kl"] for result in measured]
    ends = [kl["high"] if np.isfinite(kl["high"]) else kl["value"] for kl in kls]
    farthest = max([end for end in ends if np.isfinite(end)], default=0.0)

    def point(x: float, y: float, *bars, **style):
        drawn = axes.errorbar(x, y, *bars, capsize=3, ls="", **style)
        for artist in drawn.get_children():
            artist.set_clip_on(False)  # a marker at KL = 0 stands on the axis, whole

    if rewarded:
        reference = report["reference"]["sample_reward"]
        point(0, reference["value"], _bars(reference), color=GREY, marker="*", ms=12, label="reference")
    elif report["config"]["opponent"] == "reference":
        point(0, 0.5, color=GREY, marker="*", ms=12, label="reference")
        points = np.array([best_of_n(n) for n in range(1, 200)])
        points = points[points[:, 0] <= 1.1 * farthest]
        if len(points) > 1:
            label = "best of 1, 2, 3, …\nof the reference"
            axes.plot(*points.T, color=GREY, lw=1, ls="--", marker=".", ms=4, label=label)
    for i, (name, result) in enumerate(zip(short_names(list(models)), models.values(), strict=True)):
        if not rewarded and "win_rate" not in result:
            continue
        y = result["sample_reward"] if rewarded else result["win_rate"]["win_rate"]
        x = result["divergence"]["kl"]
        point(x["value"], y["value"], _bars(y), _bars(x), **look(i), ms=8, label=name)
    axes.set(
        xlabel="KL(model || reference), nats a response",
        ylabel=printable(f"reward of samples ({report['judge']['name']})")
        if rewarded
        else printable(f"win rate over {report['config']['opponent']}"),
        xlim=(0, 1.08 * farthest if farthest > 0 else 1),  # KL is never negative
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def ranking(figure, report: dict) -> None:
    """Ranking accuracy of the reference and of each model, raw and length-normalized."""
    axes = figure.subplots()
    models = report["models"]
    names = short_names(list(models))
    groups = (("accuracy", "reference_accuracy", "raw"), ("accuracy_norm", "reference_accuracy_norm", "per token"))
    rows = len(models) + 1
    for group, (after, before, _) in enumerate(groups):
        for i, result in enumerate([None, *models.values()]):
            position = group * (rows + 1) + i
            estimate = next(iter(models.values()))["ranking"][before] if result is None else result["ranking"][after]
            style = dict(color=GREY, marker="*", ms=12) if result is None else dict(**look(i - 1), ms=8)
            label = ("reference" if result is None else names[i - 1]) if group == 0 else None
            axes.errorbar(estimate["value"], position, xerr=_bars(estimate), capsize=4, ls="", label=label, **style)
            axes.annotate(
                f"{estimate['value']:.2f}",
                (estimate["high"], position),
                (6, 0),
                textcoords="offset points",
                va="center",
            )
    ticks = [group * (rows + 1) + (rows - 1) / 2 for group in range(len(groups))]
    axes.set_yticks(ticks, [label for *_, label in groups])
    axes.grid(False, axis="y")
    axes.axvline(0.5, color=GREY, lw=0.8, ls="--")
    axes.set_ylim(len(groups) * (rows + 1) - 1.3, -0.7)  # from top to bottom, with room for the markers
    axes.set(xlim=(0, 1.08), xlabel="ranking accuracy: share of pairs with the chosen response more probable")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def reliability(figure, report: dict) -> None:
    """Accuracy against confidence of the implicit preference model, one panel a model."""
    models = report["models"]
    panels = _panels(figure, models)
    for i, (axes, name, result) in enumerate(zip(panels, short_names(list(models)), models.values(), strict=True)):
        found = result["calibration"]["adaptive"]
        bins = [b for b in found["bins"] if b["count"]]
        axes.plot([0.5, 1], [0.5, 1], color=GREY, lw=1, ls="--", label="calibrated")
        x = [b["confidence"] for b in bins]
        y = [b["accuracy"]["value"] for b in bins]
        errors = np.hstack([_bars(b["accuracy"]) for b in bins])
        axes.errorbar(x, y, errors, **look(i), ms=6, capsize=3, lw=1, label="bins of equal count")
        axes.set(xlim=(0.48, 1.02), ylim=(-0.03, 1.03), xlabel="confidence")
        axes.set_title(
            f"{name}\nECE of these bins {found['ece']:.3f}, by chance {found['floor']:.3f}, p = "
            f"{found['p_value']:.2g}",
            fontsize=9,
        )
        axes.legend(loc="lower right", fontsize=8)
    for axes in panels[::PANEL_COLUMNS]:
        axes.set_ylabel("share of pairs predicted right")


def difficulty(figure, report: dict) -> None:
    """Difficulty of the pairs, by whether the model ranks them correctly, one panel a model."""
    models = report["models"]
    panels = _panels(figure, models)
    # A pair one of whose responses is impossible has none; in JSON it is `null`.
    values = np.array(next(iter(models.values()))["pairs"]["difficulty"], dtype=float)
    measured = np.isfinite(values)
    # The few pairs far out would leave the rest one bar: they are counted in the outermost ones.
    reach = max(np.quantile(np.abs(values[measured]), 0.98) if measured.any() else 0.0, 1e-6)
    edges = np.linspace(-reach, reach, 31)
    for axes, name, result in zip(panels, short_names(list(models)), models.values(), strict=True):
        correct = np.array(result["pairs"]["correct"], dtype=bool)
        parts = [values[measured & side].clip(-reach, reach) for side in (correct, ~correct)]
        axes.hist(parts, bins=edges, stacked=True, color=[RIGHT, WRONG], label=["ranked correctly", "ranked wrongly"])
        axes.axvline(0, color="black", lw=1)
        axes.set(xlabel="difficulty c, nats")
        axes.set_title(name, fontsize=9)
        axes.annotate("reference right", (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=8, color=GREY)
        axes.annotate(
            "reference wrong", (0.98, 0.98), xycoords="axes fraction", va="top", ha="right", fontsize=8, color=GREY
        )
        axes.margins(y=0.22)
    for axes in panels[::PANEL_COLUMNS]:
        axes.set_ylabel("pairs")
    panels[min(len(panels), PANEL_COLUMNS) - 1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def length(figure, report: dict) -> None:
    """Win rate against the difference of lengths, in bins of equal size."""
    axes = figure.subplots()
    axes.axhline(0.5, color=GREY, lw=1, ls="--")
    axes.axvline(0, color=GREY, lw=1, ls="--")
    models = report["models"]
    for i, (name, result) in enumerate(zip(short_names(list(models)), models.values(), strict=True)):
        if "win_rate" not in result:
            continue
        points = [
            (difference, score)
            for difference, score in zip(
                result["responses"]["length_difference"], result["responses"]["scores"], strict=True
            )
            if score is not None
        ]
        rows = np.array(sorted(points))
        if len(rows) == 0:
            continue
        parts = np.array_split(rows, max(1, min(6, len(rows) // 10)))
        estimates = [proportion(part[:, 1]).to_dict() for part in parts]
        x = [part[:, 0].mean() for part in parts]
        errors = np.hstack([_bars(estimate) for estimate in estimates])
        axes.errorbar(x, [e["value"] for e in estimates], errors, **look(i), ms=6, capsize=3, lw=1, label=name)
    axes.set(
        xlabel="length of the model's response minus its opponent's, characters",
        ylabel=printable(f"win rate over {report['config']['opponent']}"),
        ylim=(-0.03, 1.03),
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
