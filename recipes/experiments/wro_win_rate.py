"""
Win-rate optimization beside f-DPO: the win rate over the reference on held-out prompts, at equal KL.

A task made for the purpose, on which win rates and KL are exact. A prompt is three words out of four, a response at
most three: 85 responses, all enumerated. The reference is a one-layer transformer with random weights. A judge prefers
responses that repeat words of their prompt, the last one above all, and has a taste that goes round in a circle (a
beats b, b beats c, c beats a), so that no reward model describes it. It votes for one of two responses at random, with
its probability. 40 of the 64 prompts are trained on; everything is measured on the other 24.

- WRO: `WROTrainer`, four anchors a prompt, a vote for each pair of a completion and an anchor.
- f-DPO, its default divergence (DPO): pairs of responses of the reference, one vote a pair; with few labels, which it
  sees again and again, and with as many labels as WRO asks for votes, once each, at WRO's beta and at ten times that.
- The limit: the highest win rate that any policy can have at a KL, pi_ref exp(q / beta) for the mean probability q to
  win.

The learning rate was halved once, after three steps of a first trial at whose end the KL was 1. Nothing else was tuned.

    python recipes/experiments/wro_win_rate.py
    python recipes/experiments/wro_win_rate.py --plot_only     # table and plot again, from the results

Writes `wro_win_rate.json` and `wro_win_rate.png` into `--output_dir`.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

WORDS = ["<eos>", "a", "b", "c", "d"]
LENGTH = 3
PROMPTS = list(itertools.product(range(1, len(WORDS)), repeat=3))
random.Random(0).shuffle(PROMPTS)
TRAINED, HELD_OUT = PROMPTS[:40], PROMPTS[40:]

STEPS, EVERY, LEARNING_RATE = 100, 5, 1e-3
BATCH, ANCHORS = 64, 4
FEW_LABELS = 960
BETA = 0.1

# Name -> labels and beta of f-DPO; `None` is WRO.
METHODS: dict[str, dict | None] = {
    "WRO": None,
    "f-DPO, few labels": {"labels": FEW_LABELS, "beta": BETA},
    "f-DPO, many labels": {"labels": STEPS * BATCH * ANCHORS, "beta": BETA},
    "f-DPO, many labels, beta 1": {"labels": STEPS * BATCH * ANCHORS, "beta": 10 * BETA},
}


# ---- The judge ------------------------------------------------------------------------------------------------------


def merits(prompt: tuple[int, ...], response: list[int]) -> float:
    """How well a response repeats its prompt: 1 for each of its words, and 1 more for the last."""
    return sum(word in response for word in set(prompt)) + float(prompt[-1] in response)


def taste(first: list[int], second: list[int]) -> float:
    """1 if the first response begins with a word that beats the other's: a beats b, b beats c, c beats a."""
    one, other = first[0], second[0]
    if one == other or not {one, other} <= {1, 2, 3}:
        return 0.0
    return 1.0 if other == one % 3 + 1 else -1.0


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


def probability(prompt: tuple[int, ...], first: list[int], second: list[int]) -> float:
    """The probability that the judge votes for the first response."""
    return float(sigmoid(merits(prompt, first) - merits(prompt, second) + taste(first, second)))


def ids_of(text: str) -> list[int]:
    """Tokens of a response from its words; an empty one is its end."""
    return [WORDS.index(word) for word in text.split()] or [0]


class VotingJudge:
    """Votes for one of two responses at random, with its probability, and counts its votes."""

    def __init__(self, seed: int):
        self.generator, self.votes = random.Random(seed), 0

    def __call__(self, prompts, first, second) -> list[float]:
        self.votes += len(prompts)
        return [
            float(self.generator.random() < probability(tuple(ids_of(prompt)), ids_of(one), ids_of(other)))
            for prompt, one, other in zip(prompts, first, second, strict=True)
        ]


# ---- Measuring ------------------------------------------------------------------------------------------------------


class Ruler:
    """Exact win rate over the reference and exact KL to it, means over prompts."""

    def __init__(self, reference, prompts=HELD_OUT):
        import toy_model

        self.prompts, self.responses = prompts, toy_model.all_responses(len(WORDS), LENGTH)
        self.log_reference = self._log_probs(reference)
        tastes = np.array([[taste(one, other) for other in self.responses] for one in self.responses])
        found = np.array([[merits(prompt, response) for response in self.responses] for prompt in prompts])
        self.wins = sigmoid(found[:, :, None] - found[:, None, :] + tastes)
        # The probability of each response to beat one of the reference.
        self.merit = np.einsum("xij,xj->xi", self.wins, np.exp(self.log_reference))

    def _log_probs(self, model) -> np.ndarray:
        import torch
        import toy_model

        was_training = model.training
        model.eval()
        with torch.no_grad():
            found = toy_model.response_log_probs(model, self.prompts, self.responses).numpy()
        model.train(was_training)
        return found

    def measure(self, model) -> dict[str, float]:
        return self.of(self._log_probs(model))

    def of(self, log_policy: np.ndarray) -> dict[str, float]:
        policy = np.exp(log_policy)
        kl = (policy * (log_policy - self.log_reference)).sum(1)
        return {
            "win_rate": float((policy * self.merit).sum(1).mean()),
            "kl": float(kl.mean()),
            "self": float(np.einsum("xi,xij,xj->x", policy, self.wins, policy).mean()),
        }

    def limit(self) -> list[dict[str, float]]:
        """The highest win rate at each KL."""
        found = []
        for beta in np.geomspace(0.01, 10, 60):
            tilted = self.log_reference + self.merit / beta
            found.append({"beta": float(beta), **self.of(tilted - np.logaddexp.reduce(tilted, 1, keepdims=True))})
        return found[::-1]


# ---- Running --------------------------------------------------------------------------------------------------------


def label_pairs(reference, count: int, seed: int):
    """Pairs of different responses of the reference to trained prompts, in the order of one vote each."""
    import toy_model
    from datasets import Dataset

    generator, judge, rows = np.random.default_rng(seed), VotingJudge(seed), []
    responses = toy_model.all_responses(len(WORDS), LENGTH)
    shares = np.exp(reference) / np.exp(reference).sum(1, keepdims=True)
    while len(rows) < count:
        index = int(generator.integers(len(TRAINED)))
        one, other = generator.choice(len(responses), size=2, p=shares[index])
        if one == other:
            continue
        texts = [" ".join(WORDS[token] for token in responses[i] if token) for i in (one, other)]
        prompt = " ".join(WORDS[word] for word in TRAINED[index])
        if not judge([prompt], texts[:1], texts[1:])[0]:
            one, other = other, one
        rows.append(
            {"prompt_ids": list(TRAINED[index]), "chosen_ids": responses[one], "rejected_ids": responses[other]}
        )
    return Dataset.from_list(rows), judge.votes


def train(options: dict | None, base: Path, ruler: Ruler, reference: np.ndarray, seed: int, steps: int) -> dict:
    """One run: measurements by step, and the votes that it cost."""
    from datasets import Dataset
    from toy_model import make_tokenizer, quiet_options
    from transformers import AutoModelForCausalLM, TrainerCallback

    from trl_ext import FDPOConfig, FDPOTrainer, WROConfig, WROTrainer

    curve = []

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % EVERY == 0 or state.global_step == steps:
                curve.append({"step": state.global_step, **ruler.measure(model)})

    with tempfile.TemporaryDirectory() as folder:
        common = dict(learning_rate=LEARNING_RATE, **quiet_options(steps, seed))
        shared = dict(processing_class=make_tokenizer(WORDS), callbacks=[Measure()])
        if options is None:
            judge = VotingJudge(seed)
            args = WROConfig(
                folder,
                beta=BETA,
                num_anchors=ANCHORS,
                both_orders=False,  # the judge does not mind the order
                per_device_train_batch_size=BATCH,
                num_generations=8,
                max_completion_length=LENGTH,
                **common,
            )
            prompts = Dataset.from_dict({"prompt": [" ".join(WORDS[word] for word in x) for x in TRAINED]})
            trainer = WROTrainer(str(base), [], args, train_dataset=prompts, judge=judge, **shared)
        else:
            pairs, votes = label_pairs(reference, options["labels"], seed)
            # A step sees as many pairs as WRO asks for votes.
            args = FDPOConfig(
                folder, beta=options["beta"], per_device_train_batch_size=BATCH * ANCHORS, max_length=None, **common
            )
            model = AutoModelForCausalLM.from_pretrained(base)
            trainer = FDPOTrainer(model, None, args, train_dataset=pairs, **shared)
        curve.append({"step": 0, **ruler.measure(trainer.model)})
        trainer.train()
        if options is None:
            votes = judge.votes
    return {"curve": sorted(curve, key=lambda entry: entry["step"]), "votes": votes}


def run_seed(seed: int, methods: list[str], steps: int) -> dict:
    """A reference and every method, from one seed."""
    import toy_model

    with tempfile.TemporaryDirectory() as folder:
        base = toy_model.make_model(len(WORDS), hidden_size=48, num_heads=4, initializer_range=0.3, seed=seed)
        base.save_pretrained(folder)
        toy_model.make_tokenizer(WORDS).save_pretrained(folder)
        ruler = Ruler(base)
        reference = Ruler(base, TRAINED).log_reference
        runs = {}
        for name in methods:
            start = time.process_time()
            runs[name] = train(METHODS[name], Path(folder), ruler, reference, seed, steps)
            runs[name]["cpu_seconds"] = round(time.process_time() - start, 1)
            last = runs[name]["curve"][-1]
            print(
                f"seed {seed}, {name}: win rate {last['win_rate']:.3f} at KL {last['kl']:.2f}, {runs[name]['votes']} "
                f"votes ({runs[name]['cpu_seconds']} s)",
                flush=True,
            )
        return {"limit": ruler.limit(), "runs": runs}


# ---- Reporting ------------------------------------------------------------------------------------------------------


def limit_at(seed: dict, kl: float) -> float:
    """The highest win rate at a KL."""
    kls, wins = ([entry[name] for entry in seed["limit"]] for name in ("kl", "win_rate"))
    return float(np.interp(kl, kls, wins))


def nearest(curve: list[dict], kl: float) -> dict:
    """The measurement whose KL is nearest, of those after some training."""
    return min(curve[1:], key=lambda entry: abs(entry["kl"] - kl))


def summary(results: dict) -> dict:
    """For each method, one value a seed: at the end, at the KL nearest to WRO's end, and the best of the run."""
    found = {}
    for name in next(iter(results["seeds"].values()))["runs"]:
        rows = []
        for seed in results["seeds"].values():
            curve = seed["runs"][name]["curve"]
            target = seed["runs"]["WRO"]["curve"][-1]["kl"] if "WRO" in seed["runs"] else curve[-1]["kl"]
            at = nearest(curve, target)
            rows.append(
                {
                    "win_rate": curve[-1]["win_rate"],
                    "kl": curve[-1]["kl"],
                    "win_rate_at_kl": at["win_rate"],
                    "nearest_kl": at["kl"],
                    "limit_at_kl": limit_at(seed, at["kl"]),
                    "votes": seed["runs"][name]["votes"],
                }
            )
        found[name] = rows
    return found


def table(results: dict) -> str:
    """Means over seeds, with the lowest and the highest."""

    def cell(values, digits=2):
        return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    lines = [
        "| | votes | win rate after the last step | its KL | win rate at the KL nearest to WRO's | that KL | limit there |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in summary(results).items():
        columns = ("win_rate", "kl", "win_rate_at_kl", "nearest_kl", "limit_at_kl")
        cells = [cell([row[column] for row in rows]) for column in columns]
        lines.append(f"| {name} | {rows[0]['votes']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Win rate by step, win rate against KL with the limit, and each seed at WRO's KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = list(results["seeds"].values())
    methods = list(seeds[0]["runs"])
    colors = dict(zip(METHODS, ("#3b6fb6", "#d9822b", "#4c9a5f", "#9ccba7"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), dpi=110)
    for name in methods:
        curves = [seed["runs"][name]["curve"] for seed in seeds]
        steps = [entry["step"] for entry in curves[0]]
        wins = np.array([[entry["win_rate"] for entry in curve] for curve in curves])
        axes[0].plot(steps, wins.mean(0), color=colors[name], lw=1.8, label=name)
        axes[0].fill_between(steps, wins.min(0), wins.max(0), color=colors[name], alpha=0.12, lw=0)
        for curve in curves:
            kls, points = zip(*((entry["kl"], entry["win_rate"]) for entry in curve), strict=True)
            axes[1].plot(kls, points, color=colors[name], lw=0.9, alpha=0.8, marker="o", ms=2.5)
    for number, seed in enumerate(seeds):
        kls, points = zip(*((entry["kl"], entry["win_rate"]) for entry in seed["limit"]), strict=True)
        label = "limit (each seed has its own)" if number == 0 else None
        axes[1].plot(kls, points, color="black", lw=1, ls="--", alpha=0.7, label=label)
    farthest = max(entry["kl"] for seed in seeds for run in seed["runs"].values() for entry in run["curve"])
    axes[1].set_xlim(-0.05, min(6.0, 1.05 * farthest))
    for place, (name, rows) in enumerate(summary(results).items()):
        for row in rows:
            axes[2].plot([place] * 2, [row["win_rate_at_kl"], row["limit_at_kl"]], color=colors[name], lw=1, alpha=0.5)
            axes[2].plot(place, row["win_rate_at_kl"], "o", color=colors[name], ms=6)
            axes[2].plot(place, row["limit_at_kl"], "_", color="black", ms=12)
    axes[2].set_xticks(range(len(methods)), methods, rotation=20, ha="right", fontsize=8)
    axes[0].set(xlabel="step", ylabel="win rate over the reference")
    axes[1].set(xlabel="KL(policy || reference), nats a response")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    titles = (
        "mean of the seeds by step, and their range",
        "against KL, by run",
        "at the KL nearest to WRO's last; bars: the limit there",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(methods), fontsize=8, frameon=False)
    figure.suptitle(
        f"A task made for the purpose; exact win rates on held-out prompts, {len(seeds)} seeds", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of reference, labels and training")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--output_dir", default=str(HERE), help="folder for results and plot")
    parser.add_argument("--plot_only", action="store_true", help="table and plot from the results that are there")
    args = parser.parse_args(arguments)
    folder = Path(args.output_dir)
    path = folder / "wro_win_rate.json"
    if not args.plot_only:
        from laboratory import provenance

        warnings.filterwarnings("ignore", category=FutureWarning)
        start, cpu = time.perf_counter(), time.process_time()
        results = {
            "settings": {
                "steps": args.steps,
                "learning_rate": LEARNING_RATE,
                "completions": BATCH,
                "anchors": ANCHORS,
                "beta": BETA,
                "pairs_a_step": BATCH * ANCHORS,
            },
            "seeds": {str(seed): run_seed(seed, args.methods, args.steps) for seed in args.seeds},
        }
        results |= {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            **provenance(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    print(table(results))
    plot(results, folder / "wro_win_rate.png")


if __name__ == "__main__":
    main()
