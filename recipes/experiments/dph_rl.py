"""
Does rehearsal keep what reinforcement learning with verifiable rewards forgets?

A task made for the purpose, on which pass@k is exact and no sample is needed to measure it. A prompt is `a b m`, with
two digits below 6 and a marker; its answers are `A s` with s = a + b and `B t` with t = a * b, modulo 6. A one-layer
transformer is taught both rules, and then takes either with probability 1/2. The marker says what is right:

- `e`: both. The model masters these prompts: `collect_rehearsal` finds that, and collects answers to rehearse.
- `h`: one of the two, hidden: A for 13 of 18 training prompts and 13 of 18 held-out ones. These are trained on.
- `o`: only B. Never trained on, never rehearsed: what is kept here was not practiced.

Training on `h` rewards A more often than B, and GRPO spreads that preference over all prompts. The question is what
is left of B where only B is right (`o`), by pass@8, beside GRPO and GRPO with its KL.

    python recipes/experiments/dph_rl.py
    python recipes/experiments/dph_rl.py --plot_only     # table and plot again, from the results

Writes `dph_rl.json` and `dph_rl.png` into `--output_dir`: some eight minutes of one core for six seeds.
"""

import argparse
import json
import platform
import random
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
DIGITS = 6
WORDS = ["<eos>", *map(str, range(DIGITS)), "A", "B", "e", "h", "o"]
STEPS, EVERY = 50, 5

# Name -> what differs from GRPO.
METHODS = {
    "GRPO": {},
    "GRPO, KL 0.1": {"beta": 0.1},
    "DPH-RL, forward KL": {"rehearsal_coef": 1.0, "divergence": "forward_kl"},
    "DPH-RL, alpha 0.2": {"rehearsal_coef": 1.0, "divergence": "alpha", "alpha": 0.2},
    "DPH-RL, JS": {"rehearsal_coef": 1.0, "divergence": "js"},
    "DPH-RL, likelihood": {"rehearsal_coef": 1.0, "rehearsal_estimator": "nll"},
}
# Column -> marker, part of the prompts, k, and what it is.
COLUMNS = {
    "trained@1": ("h", "train", 1, "trained prompts"),
    "held-out@1": ("h", "test", 1, "held-out prompts of the trained kind"),
    "held-out@8": ("h", "test", 8, "held-out prompts of the trained kind"),
    "unpracticed@1": ("o", "all", 1, "only B is right, never trained on"),
    "unpracticed@8": ("o", "all", 8, "only B is right, never trained on"),
    "mastered@1": ("e", "all", 1, "both are right, rehearsed"),
}


# ---- The task -------------------------------------------------------------------------------------------------------

PAIRS = [(a, b) for a in range(DIGITS) for b in range(DIGITS)]
random.Random(1).shuffle(PAIRS)
PARTS = {"train": PAIRS[:18], "test": PAIRS[18:], "all": PAIRS}
HIDDEN = {pair: "A" if i < 13 else "B" for part in (PARTS["train"], PARTS["test"]) for i, pair in enumerate(part)}


def answer(pair: tuple[int, int], rule: str) -> str:
    a, b = pair
    return f"{rule} {(a + b) % DIGITS if rule == 'A' else (a * b) % DIGITS}"


def right_rules(pair: tuple[int, int], marker: str) -> str:
    return {"e": "AB", "o": "B", "h": HIDDEN[pair]}[marker]


def is_right(prompts, completions, **columns) -> list[float]:
    """The reward: 1 for a right answer."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        a, b, marker = prompt.split()
        pair = int(a), int(b)
        right = {answer(pair, rule) for rule in right_rules(pair, marker)}
        found.append(float(" ".join(completion.split()) in right))
    return found


def make_tokenizer():
    import toy_model

    return toy_model.make_tokenizer(WORDS)


def make_base(folder: Path, seed: int) -> float:
    """Teaches a model both rules for every prompt and saves it; returns its last loss, at best log(2) / 3 a token."""
    import torch
    import toy_model

    model = toy_model.make_model(len(WORDS), hidden_size=48, num_heads=4, initializer_range=0.1, seed=seed)
    tokenizer = make_tokenizer()
    texts = [f"{a} {b} {m} {answer((a, b), rule)} <eos>" for a, b in PAIRS for m in "eho" for rule in "AB"]
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    labels = ids.clone()
    labels[:, :3] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 600)
    for _ in range(600):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


# ---- Measuring ------------------------------------------------------------------------------------------------------


def chances(model, pairs, marker: str) -> np.ndarray:
    """Exact probabilities of the answers by rule A and by rule B, of shape `(prompts, 2)`."""
    import torch

    tokenizer, columns = make_tokenizer(), []
    for rule in "AB":
        texts = [f"{a} {b} {marker} {answer((a, b), rule)} <eos>" for a, b in pairs]
        ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.double().log_softmax(-1)
        columns.append(logprobs[:, 2:5].gather(2, ids[:, 3:6, None]).squeeze(-1).sum(1).exp().numpy())
    return np.stack(columns, axis=1)


def measure(model) -> dict[str, float]:
    """Exact pass@k of every column, 1 - (1 - p)^k, and the share of rule A on each kind of prompt."""
    was_training = model.training
    model.eval()
    found = {}
    for name, (marker, part, k, _) in COLUMNS.items():
        pairs = PARTS[part]
        right = np.array([[rule in right_rules(pair, marker) for rule in "AB"] for pair in pairs])
        chance = (chances(model, pairs, marker) * right).sum(axis=1)
        found[name] = float((1 - (1 - chance) ** k).mean())
    for marker in "heo":
        found[f"share of A, {marker}"] = float(chances(model, PAIRS, marker)[:, 0].mean())
    model.train(was_training)
    return {name: round(value, 5) for name, value in found.items()}


# ---- Running --------------------------------------------------------------------------------------------------------


def train(name: str, options: dict, base: Path, exploration, rehearsal, seed: int) -> list[dict]:
    """One run; returns its measurements by step."""
    import toy_model
    from transformers import TrainerCallback

    from trl_ext import DPHRLConfig, DPHRLTrainer

    curve = []

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % EVERY == 0:
                curve.append({"step": state.global_step, **measure(model)})

    with tempfile.TemporaryDirectory() as folder:
        args = DPHRLConfig(
            folder,
            **{"rehearsal_coef": 0.0, **options},
            rehearsal_batch_size=16,  # beside 64 completions
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=3,
            learning_rate=2e-3,
            **toy_model.quiet_options(STEPS, seed),
        )
        trainer = DPHRLTrainer(
            model=str(base),
            reward_funcs=is_right,
            args=args,
            train_dataset=exploration,
            processing_class=make_tokenizer(),
            rehearsal_dataset=rehearsal,
            callbacks=[Measure()],
        )
        curve.append({"step": 0, **measure(trainer.model)})
        trainer.train()
    return sorted(curve, key=lambda entry: entry["step"])


def run_seed(seed: int, methods: dict[str, dict]) -> dict:
    """Base, collection, and every method from one seed."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from trl_ext import collect_rehearsal
    from trl_ext.rollout import AnswerOptions

    with tempfile.TemporaryDirectory() as folder:
        loss = make_base(Path(folder), seed)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompts = [f"{a} {b} e" for a, b in PAIRS] + [f"{a} {b} h" for a, b in PARTS["train"]]
        collected = collect_rehearsal(
            model,
            make_tokenizer(),
            Dataset.from_dict({"prompt": prompts}),
            is_right,
            reward_threshold=1.0,
            options=AnswerOptions(max_completion_length=3, batch_size=512, seed=seed),
        )
        runs = {}
        for name, options in methods.items():
            start = time.perf_counter()
            curve = train(name, options, Path(folder), collected.exploration, collected.rehearsal, seed)
            runs[name] = {"curve": curve, "seconds": round(time.perf_counter() - start, 1)}
            shown = ", ".join(f"{column} {curve[-1][column]:.3f}" for column in COLUMNS)
            print(f"seed {seed}, {name}: {shown} ({runs[name]['seconds']} s)", flush=True)
        return {
            "base_loss": loss,
            "mastered": len(collected.near_perfect),
            "explored": len(collected.exploration),
            "rehearsed": len(collected.rehearsal),
            "histogram": collected.rates.histogram(),
            "runs": runs,
        }


# ---- Reporting ------------------------------------------------------------------------------------------------------


def finals(results: dict, method: str, column: str) -> np.ndarray:
    """Values at the last step, one a seed."""
    return np.array([seed["runs"][method]["curve"][-1][column] for seed in results["seeds"].values()])


def table(results: dict) -> str:
    """Means over seeds, with the lowest and the highest."""
    first = next(iter(results["seeds"].values()))
    rows = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    base = [
        np.mean([next(iter(s["runs"].values()))["curve"][0][c] for s in results["seeds"].values()]) for c in COLUMNS
    ]
    rows.append("| start | " + " | ".join(f"{value:.2f}" for value in base) + " |")
    for method in first["runs"]:
        cells = []
        for column in COLUMNS:
            values = finals(results, method, column)
            cells.append(f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]")
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(results: dict, path: Path) -> None:
    """By step, means of the seeds: what is trained, and what is kept; and each seed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(next(iter(results["seeds"].values()))["runs"])
    colors = dict(zip(methods, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), sharey=True)
    for axis, column in zip(axes, ("trained@1", "unpracticed@8"), strict=False):
        for method in methods:
            curves = [seed["runs"][method]["curve"] for seed in results["seeds"].values()]
            steps = [entry["step"] for entry in curves[0]]
            values = np.array([[entry[column] for entry in curve] for curve in curves]).mean(axis=0)
            axis.plot(steps, values, color=colors[method], label=method, linewidth=1.8)
        axis.set_xlabel("step")
    for place, method in enumerate(methods):
        values = finals(results, method, "unpracticed@8")
        axes[2].scatter([place] * len(values), values, color=colors[method], alpha=0.75, s=36, linewidth=0)
        axes[2].hlines(values.mean(), place - 0.3, place + 0.3, color=colors[method], linewidth=2)
    axes[2].set_xticks(range(len(methods)), methods, rotation=25, ha="right", fontsize=8)
    titles = ("pass@1 on the trained prompts", "pass@8 where only B is right, never trained on")
    for axis, title in zip(axes, (*titles, "the same after the last step, each seed"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(methods), fontsize=8, frameon=False)
    seeds = len(results["seeds"])
    figure.suptitle(f"A task made for the purpose; exact pass@k, means of {seeds} seeds", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output_dir", default=str(HERE))
    parser.add_argument("--plot_only", action="store_true", help="table and plot from the results that are there")
    args = parser.parse_args(arguments)
    folder = Path(args.output_dir)
    path = folder / "dph_rl.json"
    if not args.plot_only:
        import torch
        import transformers
        import trl

        import trl_ext

        warnings.filterwarnings("ignore", category=FutureWarning)
        start = time.perf_counter()
        methods = {name: METHODS[name] for name in args.methods}
        seeds = {str(seed): run_seed(seed, methods) for seed in args.seeds}
        versions = {package.__name__: package.__version__ for package in (trl_ext, trl, transformers, torch)}
        results = {
            "settings": {"steps": STEPS, "learning_rate": 2e-3, "completions": 64, "rehearsed_a_step": 16},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": versions,
            "seconds": round(time.perf_counter() - start, 1),
            "seeds": seeds,
        }
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    print(table(results))
    plot(results, folder / "dph_rl.png")


if __name__ == "__main__":
    main()
