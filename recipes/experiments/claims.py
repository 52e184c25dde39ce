"""
Claims of the literature, tested on SmolLM2-135M-Instruct and the sentiment pairs of the quickstart.

    python recipes/experiments/claims.py --plot_only                            # from the measurements that are here
    python recipes/experiments/claims.py --runs_dir outputs/claims              # everything: hours on two CPU cores
    python recipes/experiments/claims.py --runs_dir outputs/claims --part 1/2   # and, beside it, --part 2/2

| claim | question |
| --- | --- |
| fdpo | Do divergences trade reward against entropy in the order that theory gives, and does calibration differ? |
| fdpo_longer | The same over 64 steps, almost an epoch: does the order hold, and does the calibration error rise? |
| tdpo | Does TDPO2 hold the sequential KL back, and at what price in reward? |
| mallows | Where raters' agreement varies, does dispersion help, and does the reference's entropy find it? |
| simper | Does SimPER need less tuning of the learning rate than DPO and SimPO? |
| rainbowpo | What does each component of RainbowPO do? |
| ranking | Do few wrongly ranked pairs flip although DPO's loss falls, and does difficulty say which? |

Runs are kept in `--runs_dir` (see `laboratory.py`) and never made twice; those of the published numbers come with the
project. Writes `<claim>.json` and `<claim>.png` into `--output_dir`, for every claim whose runs are all there.
`recipes/experiments/README.md` reads them.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from laboratory import Laboratory, Run, Setting  # noqa: E402
from quickstart_model import BASE_MODEL  # noqa: E402


CACHED = {"precompute_ref_log_probs": True}  # the same numbers, and a forward of the reference less in every step
LEARNING_RATES = (1e-4, 5e-4, 2e-3)
DPO = "DPO"


# ---- Runs -----------------------------------------------------------------------------------------------------------


def half_way(seed: int) -> tuple[int, ...]:
    """The first seed's runs are measured at half their steps, too: a second point of the frontier."""
    return (12,) if seed == 0 else ()


def dpo(seed: int) -> Run:
    """The common baseline: f-DPO's reverse KL, which is `trl.DPOTrainer`'s loss."""
    return Run("fdpo", {"log_token_kl": True}, seed, measure_at=half_way(seed), sequential_kl=True)


# All at DPO's gradient in the reference: equal beta times curvature.
DIVERGENCES = {
    "JS": {"divergence": "js", "normalize_curvature": True},
    "alpha 0.5": {"divergence": "alpha", "alpha": 0.5, "normalize_curvature": True},
    "forward KL": {"divergence": "forward_kl", "normalize_curvature": True},
}
REVERSE_KL = "reverse KL (DPO)"


def fdpo_runs(seed: int) -> dict[str, Run]:
    return {REVERSE_KL: dpo(seed)} | {
        name: Run("fdpo", {**options, **CACHED}, seed, measure_at=half_way(seed))
        for name, options in DIVERGENCES.items()
    }


def fdpo_longer_runs(seed: int) -> dict[str, Run]:
    return {REVERSE_KL: ranking_runs(seed)[DPO]} | {
        name: Run("fdpo", {**options, "max_steps": 64, **CACHED}, seed, measure_at=(16,))
        for name, options in DIVERGENCES.items()
    }


def tdpo_runs(seed: int) -> dict[str, Run]:
    variants = {"TDPO2": {"variant": "tdpo2"}, "TDPO1": {"variant": "tdpo1"}}
    return {DPO: dpo(seed)} | {
        name: Run("tdpo", options, seed, measure_at=half_way(seed), sequential_kl=True)
        for name, options in variants.items()
    }


def mallows_runs(seed: int) -> dict[str, Run]:
    return {
        DPO: Run("fdpo", CACHED, seed, raters=True),
        "Mallows-DPO, known dispersion": Run(
            "mallows", {"dispersion_column": "dispersion", **CACHED}, seed, raters=True
        ),
        "Mallows-DPO, entropy": Run("mallows", CACHED, seed, raters=True),
    }


def simper_runs(seed: int) -> dict[str, Run]:
    methods = {
        "SimPER": ("simper", {}),
        DPO: ("fdpo", CACHED),
        "SimPO": ("rainbowpo", {"mixing_alpha": 0.0, "contextual_scaling": False, "beta": 2.5, "gamma": 0.5}),
    }
    runs = {
        f"{name}, {rate:g}": Run(method, {**options, "learning_rate": rate}, seed)
        for name, (method, options) in methods.items()
        for rate in LEARNING_RATES
    }
    return runs | {f"{DPO}, {Setting.learning_rate:g}": dpo(seed)}


def rainbowpo_runs(seed: int) -> dict[str, Run]:
    plain = {"length_normalization": False, "mixing_alpha": 1.0, "contextual_scaling": False, "beta": 0.1}
    normalized = {"length_normalization": True, "beta": 2.5}
    components = {
        "+ length normalization": plain | normalized,
        "+ mixed reference": plain | {"mixing_alpha": 0.25},
        "+ dispersion": plain | {"contextual_scaling": True},
        "RainbowPO (all)": plain | normalized | {"mixing_alpha": 0.25, "contextual_scaling": True},
    }
    runs = {name: Run("rainbowpo", {**options, **CACHED}, seed) for name, options in components.items()}
    return {DPO: dpo(seed)} | runs


def ranking_runs(seed: int) -> dict[str, Run]:
    options = {"max_steps": 64, **CACHED}
    return {DPO: Run("fdpo", options, seed, measure_at=(16,), train_pairs=64)}


# Claim -> its runs of a seed.
RUNS = {
    "fdpo": fdpo_runs,
    "fdpo_longer": fdpo_longer_runs,
    "tdpo": tdpo_runs,
    "mallows": mallows_runs,
    "ranking": ranking_runs,
    "rainbowpo": rainbowpo_runs,
    "simper": simper_runs,
}


# ---- Reading runs ---------------------------------------------------------------------------------------------------


def measured(record: dict, step: str | None = None) -> dict:
    """What was measured at a step, at the end by default."""
    return record["measured"][step or max(record["measured"], key=int)]


def of_prompts(records: list[dict], name: str) -> np.ndarray:
    """A measurement of the samples, averaged over the seeds, one number a held-out prompt."""
    return np.mean([measured(record)["samples"][name] for record in records], axis=0)


def interval(values) -> list[float]:
    """Mean and its 95% interval over prompts or pairs (bootstrap)."""
    from trl_ext.evaluation import mean

    found = mean(values)
    return [round(number, 4) for number in (found.value, found.low, found.high)]


def share(hits) -> list[float]:
    """Share of pairs, hits averaged over the seeds, and its 95% interval (Wilson)."""
    from trl_ext.evaluation import proportion

    found = proportion(np.mean(hits, axis=0))
    return [round(number, 4) for number in (found.value, found.low, found.high)]


def difference(values, baseline) -> list[float]:
    """Mean difference and its 95% interval, prompt by prompt."""
    from trl_ext.evaluation import paired_difference

    found = paired_difference(np.asarray(values), np.asarray(baseline))
    return [round(number, 4) for number in (found.value, found.low, found.high)]


def log_ratios(laboratory: Laboratory, found: dict) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = laboratory.reference_logps(found)
    return np.array(found["chosen_logps"]) - chosen, np.array(found["rejected_logps"]) - rejected


def accuracies(laboratory: Laboratory, records: list[dict]) -> dict:
    """Shares of held-out pairs in the right order, averaged over the seeds, with intervals over pairs."""
    by_kind: dict[str, list] = {"reward_accuracy": [], "ranking_accuracy": [], "ranking_accuracy_norm": []}
    for record in records:
        found = measured(record)["pairs"]
        chosen, rejected = (np.array(found[f"{side}_logps"]) for side in ("chosen", "rejected"))
        lengths = np.array(found["chosen_lengths"]), np.array(found["rejected_lengths"])
        ratios = log_ratios(laboratory, found)
        by_kind["reward_accuracy"].append(ratios[0] > ratios[1])
        by_kind["ranking_accuracy"].append(chosen >= rejected)
        by_kind["ranking_accuracy_norm"].append(chosen / lengths[0] >= rejected / lengths[1])
    return {kind: share(values) for kind, values in by_kind.items()}


def summary(laboratory: Laboratory, records: list[dict]) -> dict:
    """What every table shows of a run, or of the runs of several seeds."""
    names = ("gold", "kl", "entropy", "length")
    return {
        "seeds": len(records),
        **{name: interval(of_prompts(records, name)) for name in names},
        "gold_by_seed": [round(statistics.fmean(measured(record)["samples"]["gold"]), 4) for record in records],
        "distinct_2": round(statistics.fmean(measured(record)["samples"]["distinct_2"] for record in records), 4),
        **accuracies(laboratory, records),
        "seconds": [record["seconds"] for record in records],
    }


class Claim:
    """The runs of a claim, its numbers and its plot."""

    def __init__(self, name: str, laboratory: Laboratory, seeds: list[int]):
        self.name, self.laboratory, self.seeds = name, laboratory, seeds
        runs = [RUNS[name](seed) for seed in seeds]
        self.arms = {arm: [laboratory.run(by_arm[arm]) for by_arm in runs] for arm in runs[0]}

    def table(self, baseline: str) -> dict:
        rows = {arm: summary(self.laboratory, records) for arm, records in self.arms.items()}
        for arm, records in self.arms.items():
            if arm != baseline:
                for key in ("gold", "kl", "entropy"):
                    base = self.arms[baseline]
                    rows[arm][f"{key}_minus_{baseline}"] = difference(of_prompts(records, key), of_prompts(base, key))
                    # A seed's difference includes what another training would have changed; the interval does not.
                    rows[arm][f"{key}_minus_{baseline}_by_seed"] = [
                        round(float(np.mean(of_prompts([one], key) - of_prompts([other], key))), 4)
                        for one, other in zip(records, base, strict=True)
                    ]
        return rows

    def series(self, arm: str, name: str, window: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """A logged value over the steps, averaged over seeds and `window` steps."""
        values = np.mean([[float(e[name]) for e in record["log"]] for record in self.arms[arm]], axis=0)
        values = values[: len(values) // window * window].reshape(-1, window).mean(1)
        return np.arange(1, len(values) + 1) * window, values

    def reference(self, name: str) -> list[float]:
        return interval(self.laboratory.reference()["samples"][name])


# ---- The claims -----------------------------------------------------------------------------------------------------


def calibration_of(confidence, correct):
    from trl_ext.evaluation import expected_calibration_error

    return expected_calibration_error(confidence, correct, num_bins=6, binning="adaptive", limits=(0.5, 1.0))


def preferences(laboratory: Laboratory, records: list[dict], step: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    How sure the implicit rewards are of each held-out pair at a step, and whether they are right, one of both a seed.
    """
    from torch import tensor

    from trl_ext.evaluation import preference_confidence
    from trl_ext.losses import get_divergence

    found = []
    for record in records:
        options = record["run"]["options"]
        name = options.get("divergence", "reverse_kl")
        divergence = get_divergence(name, **{k: v for k, v in options.items() if k == "alpha"})
        # The implicit reward is beta f'(u), so this stands where the log ratio stands in DPO.
        ratios = log_ratios(laboratory, measured(record, step)["pairs"])
        scores = [divergence.score(tensor(values)).numpy() for values in ratios]
        found.append(preference_confidence(*scores, beta=0.1 / divergence.curvature))
    return found


def fdpo(claim: Claim, axes) -> dict:
    result = {"arms": claim.table(REVERSE_KL)}
    frontier, against_kl, calibration = axes
    for color, (arm, records) in enumerate(claim.arms.items()):
        row, by_step = result["arms"][arm], {}
        # Steps at which every seed was measured; the first seed may have more.
        for step in sorted(set.intersection(*(set(record["measured"]) for record in records)), key=int):
            found = preferences(claim.laboratory, records, step)
            errors = [calibration_of(*each) for each in found]
            samples = [measured(record, step)["samples"] for record in records]
            averages = {name: float(np.mean([each[name] for each in samples])) for name in ("gold", "kl", "entropy")}
            by_step[step] = {
                **{name: round(value, 4) for name, value in averages.items()},
                "ece": round(statistics.fmean(each.ece for each in errors), 4),
                "ece_by_seed": [round(each.ece, 4) for each in errors],
                "ece_floor": round(statistics.fmean(each.floor for each in errors), 4),
                "ece_floor_95": round(statistics.fmean(each.floor_95 for each in errors), 4),
                "mean_confidence": round(float(np.mean([confidence for confidence, _ in found])), 4),
                "reward_accuracy": round(float(np.mean([correct for _, correct in found])), 4),
            }
        row["by_step"] = by_step
        for number, record in enumerate(records):
            points = [measured(record, step)["samples"] for step in sorted(record["measured"], key=int)]
            gold = [statistics.fmean(point["gold"]) for point in points]
            style = {"color": f"C{color}", "marker": "osv^"[number % 4], "label": None if number else arm}
            frontier.plot([statistics.fmean(point["entropy"]) for point in points], gold, **style)
            against_kl.plot([statistics.fmean(point["kl"]) for point in points], gold, **style)
        pooled = calibration_of(*(np.concatenate(each) for each in zip(*found, strict=True)))
        bins = [b for b in pooled.bins if b.count]
        calibration.plot([b.confidence for b in bins], [b.accuracy.value for b in bins], f"C{color}o-", markersize=4)
    start = claim.reference("entropy")[0], claim.reference("gold")[0]
    frontier.plot(*start, "k*", label="reference")
    against_kl.plot(0, start[1], "k*", label="reference")
    calibration.plot([0.5, 1], [0.5, 1], color="gray", linewidth=0.8)
    frontier.set(
        xlabel="entropy of a token (nats)",
        ylabel="gold sentiment",
        title="Reward against entropy\n(one marker shape a seed)",
    )
    against_kl.set(
        xlabel="KL(policy || reference) (nats)",
        ylabel="gold sentiment",
        title="Reward against KL\n(one marker shape a seed)",
    )
    calibration.set(xlabel="confidence", ylabel="share right", title="Calibration on held-out pairs\n(all seeds)")
    frontier.legend(fontsize=7)
    return result


def tdpo(claim: Claim, axes) -> dict:
    result = {"arms": claim.table(DPO)}
    over_training, frontier, entropy = axes
    for color, (arm, records) in enumerate(claim.arms.items()):
        row, pairs = result["arms"][arm], [measured(record)["pairs"] for record in records]
        for side in ("chosen", "rejected"):
            row[f"sequential_kl_{side}"] = interval(np.mean([p[f"{side}_sequential_kl"] for p in pairs], axis=0))
            if arm != DPO:
                base = [measured(record)["pairs"][f"{side}_sequential_kl"] for record in claim.arms[DPO]]
                row[f"sequential_kl_{side}_minus_DPO"] = difference(
                    np.mean([p[f"{side}_sequential_kl"] for p in pairs], axis=0), np.mean(base, axis=0)
                )
            steps, values = claim.series(arm, f"kl/{side}")
            style = {"color": f"C{color}", "linestyle": "-" if side == "rejected" else "--"}
            over_training.plot(steps, values, label=f"{arm}, {side}", **style)
        margins = [np.array(p["rejected_sequential_kl"]) - np.array(p["chosen_sequential_kl"]) for p in pairs]
        row["sequential_kl_margin"] = interval(np.mean(margins, axis=0))
        for number, record in enumerate(records):
            found = [measured(record, step) for step in sorted(record["measured"], key=int)]
            kl = [statistics.fmean(m["pairs"]["rejected_sequential_kl"]) for m in found]
            gold = [statistics.fmean(m["samples"]["gold"]) for m in found]
            frontier.plot(kl, gold, color=f"C{color}", marker="o", label=arm if number == 0 else None)
        entropy.plot(*claim.series(arm, "entropy"), color=f"C{color}", label=arm)
    frontier.plot(0, claim.reference("gold")[0], "k*", label="reference")
    over_training.set(xlabel="step", ylabel="nats", title="KL(reference || policy)\non training pairs")
    frontier.set(
        xlabel="KL(reference || policy), held-out rejected (nats)",
        ylabel="gold sentiment",
        title="Reward against\nKL(reference || policy)",
    )
    entropy.set(xlabel="step", ylabel="nats", title="Entropy of a token\non training pairs")
    for axis in axes:
        axis.legend(fontsize=7)
    for axis in (over_training, entropy):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return result


def mallows(claim: Claim, axes) -> dict:
    from laboratory import pair_key, simulate_raters
    from scipy import stats

    laboratory = claim.laboratory
    result = {"arms": claim.table(DPO)}
    labels = {}
    for seed in claim.seeds:
        before, after = laboratory.rows("train"), simulate_raters(laboratory.rows("train"), seed)
        turned = np.array([a["chosen"] != b["chosen"] for a, b in zip(after, before, strict=True)])
        taste = np.array([row["taste"] for row in after])
        labels[seed] = {
            "turned": round(float(turned.mean()), 3),
            "turned_in_taste": round(float(turned[taste].mean()), 3),
        }
        labels[seed]["turned_in_fact"] = round(float(turned[~taste].mean()), 3)
    result["labels_by_seed"] = labels
    # Does the proxy find the disagreement? On held-out pairs, whose entropies under the reference are there.
    pairs = laboratory.reference()["pairs"]
    entropy = {
        key: (a + b) / 2
        for key, a, b in zip(pairs["keys"], pairs["chosen_entropy"], pairs["rejected_entropy"], strict=True)
    }
    rows = laboratory.rows("test")
    proxy = np.array([entropy[pair_key(row)] for row in rows])
    found = {}
    for seed in claim.seeds:
        rated = simulate_raters(rows, seed)
        dispersion = np.array([row["dispersion"] for row in rated])
        taste = np.array([row["taste"] for row in rated])
        low, high = stats.bootstrap(
            (proxy, dispersion),
            lambda x, y: stats.spearmanr(x, y).statistic,
            paired=True,
            vectorized=False,
            n_resamples=1000,
            rng=np.random.default_rng(0),
            method="percentile",
        ).confidence_interval
        found[seed] = {
            "spearman": [round(float(v), 3) for v in (stats.spearmanr(proxy, dispersion).statistic, low, high)],
            "within_fact": round(float(stats.spearmanr(proxy[~taste], dispersion[~taste]).statistic), 3),
        }
    result["entropy_against_dispersion"] = found
    gold, accuracy, scatter = axes
    bars(gold, result["arms"], "gold", claim.reference("gold")[0])
    bars(accuracy, result["arms"], "reward_accuracy", 0.5)
    scatter.scatter(dispersion, proxy, s=6, c=np.where(taste, "C1", "C0"))
    gold.set(title="Gold sentiment\non held-out prompts")
    accuracy.set(title="Reward accuracy on held-out pairs\n(true order)", xlim=(0.4, 1))
    scatter.set(
        xlabel="true dispersion",
        ylabel="reference's entropy (nats)",
        title="Entropy as a proxy of dispersion\n(orange: matters of taste)",
    )
    return result


def simper(claim: Claim, axes) -> dict:
    result = {"arms": {arm: summary(claim.laboratory, records) for arm, records in claim.arms.items()}}
    methods = list(dict.fromkeys(arm.rpartition(", ")[0] for arm in claim.arms))
    result["methods"] = {}
    for color, method in enumerate(methods):
        rows = {rate: result["arms"][f"{method}, {rate:g}"] for rate in LEARNING_RATES}
        by_gold = sorted(rows, key=lambda rate: rows[rate]["gold"][0])
        result["methods"][method] = {
            "best": {"learning_rate": by_gold[-1], "gold": rows[by_gold[-1]]["gold"]},
            "worst": {"learning_rate": by_gold[0], "gold": rows[by_gold[0]]["gold"]},
            "range": difference(
                of_prompts(claim.arms[f"{method}, {by_gold[-1]:g}"], "gold"),
                of_prompts(claim.arms[f"{method}, {by_gold[0]:g}"], "gold"),
            ),
        }
        for axis, key in zip(axes, ("gold", "kl", "reward_accuracy"), strict=True):
            means, lows, highs = np.array([rows[rate][key] for rate in LEARNING_RATES]).T
            axis.plot(LEARNING_RATES, means, color=f"C{color}", marker="o", label=method)
            axis.fill_between(LEARNING_RATES, lows, highs, color=f"C{color}", alpha=0.12)
    for axis, title in zip(axes, ("Gold sentiment", "KL(policy || reference)", "Reward accuracy"), strict=True):
        axis.set(xscale="log", xlabel="learning rate", title=title)
    axes[1].set_yscale("symlog", linthresh=0.005)
    axes[1].set_ylim(bottom=0.005, top=1.5 * axes[1].get_ylim()[1])
    axes[0].axhline(claim.reference("gold")[0], color="gray", linewidth=0.8, linestyle=":", label="reference")
    axes[0].legend(fontsize=7)
    return result


def rainbowpo(claim: Claim, axes) -> dict:
    result = {"arms": claim.table(DPO)}
    titles = {"gold": "Gold sentiment", "kl": "KL(policy || reference) (nats)", "reward_accuracy": "Reward accuracy"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        bars(axis, result["arms"], key, claim.reference("gold")[0] if key == "gold" else None)
        axis.set(title=title)
    return result


def ranking(claim: Claim, axes) -> dict:
    from trl_ext.evaluation import flip_loss, pair_difficulty

    records = claim.arms[DPO]
    last = max(records[0]["measured"], key=int)
    result: dict = {"steps": {}}
    shares, by_difficulty, by_loss = axes
    for step in sorted(records[0]["measured"], key=int):
        row = result["steps"][step] = {}
        for part in ("train_pairs", "pairs"):
            found = [record["measured"][step][part] for record in records]
            references = claim.laboratory.reference_logps(found[0])
            chosen, rejected = (np.array([each[f"{side}_logps"] for each in found]) for side in ("chosen", "rejected"))
            # Difficulty is the reference's, (pairs,); what follows is of every seed, (seeds, pairs).
            difficulty = pair_difficulty(*references)
            margin = 0.1 * (chosen - references[0] - rejected + references[1])
            loss, right, before = np.logaddexp(0, -margin), chosen >= rejected, difficulty <= 0
            threshold = np.broadcast_to(flip_loss(difficulty, beta=0.1), loss.shape)
            of_all = np.broadcast_to(difficulty, loss.shape)
            row[part] = {
                "pairs": len(difficulty),
                "seeds": len(records),
                "dpo_loss": interval(loss.mean(0)),
                "reward_accuracy": share(margin > 0),
                "ranking_accuracy": share(right),
                "reference_ranking_accuracy": share([before]),
                "wrong_at_first": int((~before).sum()),
                "of_these_right_now": share(right[:, ~before]),
                "of_these_right_now_by_seed": [round(float(each.mean()), 4) for each in right[:, ~before]],
                "right_at_first_wrong_now_by_seed": [int(each.sum()) for each in ~right[:, before]],
                # Theorem 4.1, pair by pair: right if and only if the loss is at most what its difficulty asks for.
                "theorem_violations": int((right != (loss <= threshold)).sum()),
                "difficulty_of_flipped": _median(of_all[~before & right]),
                "difficulty_of_unflipped": _median(of_all[~before & ~right]),
            }
            if part == "train_pairs" and step == last:
                bins = np.linspace(np.percentile(difficulty, 1), np.percentile(difficulty, 99), 24)
                by_difficulty.hist([of_all[right], of_all[~right]], bins, stacked=True, color=["C0", "C1"])
                by_difficulty.axvline(0, color="gray", linewidth=0.8)
                by_loss.scatter(threshold, loss, s=8, c=np.where(right, "C0", "C1").ravel())
                limits = [1e-3, 10]
                by_loss.plot(limits, limits, color="gray", linewidth=0.8)
                by_loss.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    steps = [0, *map(int, result["steps"])]
    for part, style in (
        ("train_pairs", {"linestyle": "-"}),
        ("pairs", {"linestyle": "--", "markerfacecolor": "white"}),
    ):
        rows = [row[part] for row in result["steps"].values()]
        title = "training" if part == "train_pairs" else "held out"
        flipped = [0, *(row["of_these_right_now"][0] for row in rows)]
        shares.plot(steps, flipped, color="C1", marker="o", **style, label=f"wrong pairs that flipped, {title}")
        losses = [np.log(2), *(row["dpo_loss"][0] for row in rows)]
        shares.plot(steps, losses, color="C2", marker="o", **style, label=f"DPO loss, {title}")
        rewards = [row["reward_accuracy"][0] for row in rows]
        shares.plot(steps[1:], rewards, color="C0", marker="o", **style, label=f"reward accuracy, {title}")
    shares.set(xlabel="step", ylim=(0, 1.5), title="Loss and ranking")
    shares.legend(fontsize=7, loc="upper left", handlelength=4)
    by_difficulty.set(
        xlabel="difficulty c (nats)",
        ylabel="training pairs" if len(records) == 1 else "training pairs, all seeds",
        title="Ranked correctly (blue) and\nwrongly (orange) at the end",
    )
    by_loss.set(
        xlabel="loss that the pair needs",
        ylabel="its loss",
        title="Ranked correctly (blue) where\nthe loss is below the line",
    )
    return result


def _median(values: np.ndarray) -> float | None:
    return round(float(np.median(values)), 2) if len(values) else None


def bars(axis, rows: dict, key: str, line: float | None) -> None:
    names = list(rows)[::-1]
    means, lows, highs = np.array([rows[name][key] for name in names]).T
    axis.barh(names, means, xerr=[means - lows, highs - means], color="C0", alpha=0.75, capsize=3)
    axis.tick_params(axis="y", labelsize=8, labelleft=axis.get_subplotspec().is_first_col())
    if line is not None:
        axis.axvline(line, color="gray", linewidth=0.8, linestyle=":")


TITLES = {
    "fdpo": "f-DPO: divergences at equal beta times curvature",
    "fdpo_longer": "f-DPO: the same divergences over 64 steps",
    "tdpo": "TDPO and DPO",
    "mallows": "Mallows-DPO and DPO where raters' agreement varies",
    "simper": "SimPER, DPO and SimPO over one grid of learning rates",
    "rainbowpo": "RainbowPO's components, one at a time",
    "ranking": "DPO and ranking accuracy",
}


READERS = {
    "fdpo": fdpo,
    "fdpo_longer": fdpo,
    "tdpo": tdpo,
    "mallows": mallows,
    "simper": simper,
    "rainbowpo": rainbowpo,
    "ranking": ranking,
}


def write(name: str, laboratory: Laboratory, folder: Path, seeds: list[int]) -> None:
    """The numbers and the plot of a claim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    claim = Claim(name, laboratory, seeds)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    result = READERS[name](claim, axes)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.suptitle(TITLES[name], fontsize=12)
    figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight", pad_inches=0.15)
    pyplot.close(figure)
    record = next(iter(claim.arms.values()))[0]
    result = {
        "claim": TITLES[name],
        "reference": {key: claim.reference(key) for key in ("gold", "entropy", "length")},
        **result,
        "setting": vars(laboratory.setting) | {"model": laboratory.setting.model or BASE_MODEL},
        "runs": {arm: [run["run"] for run in records] for arm, records in claim.arms.items()},
        "minutes": round(sum(run["seconds"] for records in claim.arms.values() for run in records) / 60, 1),
        "versions": record["versions"],
        "device": record["device"],
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {folder / name}.json and .png")


def parse_args(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs_dir", default=str(HERE / "results" / "measurements.json.gz"))
    parser.add_argument("--output_dir", default=str(HERE / "results"))
    parser.add_argument("--part", default="1/1", help="K/N: make every N-th run, from the K-th")
    parser.add_argument("--plot_only", action="store_true", help="make no run")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_args()
    part, parts = map(int, options.part.split("/"))
    laboratory = Laboratory(options.runs_dir, Setting(), make=not options.plot_only)
    if not options.plot_only:
        runs = {}  # by where they are kept: claims share some
        for seed in options.seeds:
            for name in options.claims:
                runs |= {laboratory.path(run): (name, arm, run) for arm, run in RUNS[name](seed).items()}
        for number, (name, arm, run) in enumerate(runs.values()):
            if number % parts == part - 1:
                record = laboratory.run(run)
                gold = statistics.fmean(measured(record)["samples"]["gold"])
                print(f"{name}: {arm}, seed {run.seed}: gold {gold:.3f}, {record['seconds']:.0f} s", flush=True)
        laboratory.reference()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(options.runs_dir, Setting(), make=False)
    for name in options.claims:
        try:
            write(name, laboratory, Path(options.output_dir), options.seeds)
        except FileNotFoundError as missing:
            print(f"{name}: not written, a run is missing ({missing})")


if __name__ == "__main__":
    main()
