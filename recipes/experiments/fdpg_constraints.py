"""
f-DPG on a language model: how many completions satisfy a constraint, what that costs in KL and in diversity, by
divergence, with plain RLOO as control.

SmolLM2-135M-Instruct goes on with openings of film reviews. The constraint is that a completion is in the present tense
(it has the word "is" or "are"), and the target that four fifths of the completions satisfy it: the distribution nearest
to the reference with this moment, `pi_ref exp(lambda phi) / Z`. `fit_moments` finds lambda from samples of the reference
for the training prompts. All methods have this one target, with `beta=1` and lambda as the reward's weight: RLOO, whose
KL is in its reward (reverse KL), and f-DPG with other divergences.

Measured on openings that nothing was trained on, on samples at temperature 1: the share of completions that satisfy
the constraint, KL(policy || reference), and distinct-2 of all samples together. A policy with a share s of satisfied
completions, where the reference has s0, has at least the KL `s log(s / s0) + (1 - s) log((1 - s) / (1 - s0))`; only
the target's family attains it. What is above was paid for something else than the constraint.

Nothing was tuned on the held-out prompts. The learning rate was chosen by training samples of a seed that is not
reported.

    python recipes/experiments/fdpg_constraints.py --runs_dir outputs/fdpg
    python recipes/experiments/fdpg_constraints.py --plot_only      # table and plot again, from the results

Every run is kept in `--runs_dir`; an interrupted demonstration goes on where it was, and seeds made side by side
(`--seeds 0`, `--seeds 1`) are reported together by a last call with all of them. Writes `fdpg_constraints.json` and
`fdpg_constraints.png` into `--output_dir`.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# Name -> options of f-DPG; `None` is RLOO.
METHODS: dict[str, dict | None] = {
    "RLOO": None,
    "f-DPG, JS": {"divergence": "js"},
    "f-DPG, forward KL": {"divergence": "forward_kl"},
    "f-DPG, total variation": {"divergence": "total_variation"},
}
WANTED = 0.8  # share of completions that satisfy the constraint
SAMPLING_SEED = 1234


def satisfies(completions: list[str]) -> list[float]:
    """The feature: 1 for a text with "is" or "are"."""
    return [float(re.search(r"\b(is|are)\b", text) is not None) for text in completions]


def in_present_tense(prompts, completions, **columns) -> list[float]:
    """The same as a reward function."""
    return satisfies(completions)


# ---- Measuring ------------------------------------------------------------------------------------------------------


def sample(model, tokenizer, prompts: list[str], args, num_samples: int, seed: int):
    from trl_ext.evaluation import SamplingSettings, sample_responses

    settings = SamplingSettings(max_new_tokens=args.new_tokens, seed=seed)
    return sample_responses(model, tokenizer, prompts, settings, num_samples=num_samples, batch_size=64)


def measure(model, tokenizer, prompts: list[str], args) -> dict:
    """Per prompt: share of samples that satisfy the constraint, KL to the model without its adapter; distinct-2."""
    from trl_ext.evaluation import distinct_n, score_samples

    found = sample(model, tokenizer, prompts, args, args.samples, SAMPLING_SEED)
    shape = (len(prompts), args.samples)
    adapted = hasattr(model, "peft_config")
    kl = np.zeros(shape)
    if adapted:
        scores = score_samples(model, found, reference="base", divergences=["reverse_kl"], batch_size=32)
        kl = np.asarray(scores.divergence("reverse_kl")).reshape(shape)
    # Of all prompts together: a model that says the same to every opening has few distinct pairs of tokens.
    distinct = distinct_n(found.response_ids, 2, length=args.new_tokens - 1, pooled=True)
    return {
        "satisfied": np.array(satisfies(found.texts)).reshape(shape).mean(1).tolist(),
        "kl": kl.mean(1).tolist(),
        "distinct": distinct,
        "length": np.array([len(ids) for ids in found.response_ids]).reshape(shape).mean(1).tolist(),
        "texts": found.texts[:: args.samples],
    }


def least_kl(share: float, start: float) -> float:
    """The lowest KL at which a share of `start` can become `share`."""
    total = 0.0
    for new, old in ((share, start), (1 - share, 1 - start)):
        total += new * np.log(new / old) if new > 0 else 0.0
    return float(total)


# ---- Running --------------------------------------------------------------------------------------------------------


def reference_run(args) -> dict:
    """The exponent from training prompts, and the reference on held-out ones."""
    import torch
    from reviews import load, openings

    from trl_ext import fit_moments

    model, tokenizer = load(args.model, args.dtype)
    train = openings(args.prompts, "train", args.most_words)
    features = satisfies(sample(model, tokenizer, train, args, args.samples, SAMPLING_SEED + 1).texts)
    found = fit_moments(torch.tensor(features), WANTED)
    return {
        "exponent": found.exponents[0],
        "effective_size": found.effective_size,
        "train_share": float(np.mean(features)),
        "measured": measure(model, tokenizer, openings(args.prompts, "test", args.most_words), args),
    }


def train_run(options: dict | None, exponent: float, seed: int, args) -> dict:
    """Trains one method and measures it."""
    from datasets import Dataset
    from reviews import load, lora, openings
    from trl import RLOOConfig, RLOOTrainer

    from trl_ext import FDPGConfig, FDPGTrainer

    model, tokenizer = load(args.model, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            output_dir=folder,
            seed=seed,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=args.steps // 5,
            beta=1.0,
            reward_weights=[exponent],
            per_device_train_batch_size=args.completions,
            num_generations=8,
            max_completion_length=args.new_tokens,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if options is None:
            config, trainer_class = RLOOConfig(**common), RLOOTrainer
        else:
            config, trainer_class = FDPGConfig(**common, **options), FDPGTrainer
        prompts = openings(args.prompts, "train", args.most_words)
        trainer = trainer_class(
            model=model,
            reward_funcs=in_present_tense,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            peft_config=lora(model, args.rank, args.layers),
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "kl" in entry]
        trained = trainer.accelerator.unwrap_model(trainer.model)
        held_out = openings(args.prompts, "test", args.most_words)
        return {
            "training": [
                {
                    "satisfied": entry["rewards/in_present_tense/mean"],
                    "kl": entry["kl"],
                    "seconds": entry.get("step_time"),
                }
                for entry in log
            ],
            "measured": measure(trained, tokenizer, held_out, args),
        }


def run(args) -> dict:
    from reviews import kept

    settings = {name: getattr(args, name) for name in SETTINGS} | {"wanted": WANTED}
    folder = Path(args.runs_dir)
    reference = kept(folder, "reference", settings, lambda: reference_run(args))
    print(
        f"reference: {reference['train_share']:.2f} of the training prompts' samples satisfy the constraint, lambda = "
        f"{reference['exponent']:.3f}",
        flush=True,
    )
    runs: dict[str, dict] = {name: {} for name in args.methods}
    for seed in args.seeds:
        for name in args.methods:
            options = METHODS[name]
            found = kept(
                folder,
                f"{name}-{seed}".replace(",", ""),
                {**settings, "options": options, "seed": seed},
                lambda options=options, seed=seed: train_run(options, reference["exponent"], seed, args),
            )
            runs[name][str(seed)] = found
            shown = ", ".join(f"{key} {np.mean(found['measured'][key]):.2f}" for key in ("satisfied", "kl"))
            print(f"seed {seed}, {name}: {shown} ({found['cpu_seconds']} s)", flush=True)
    return {"settings": settings, "reference": reference, "runs": runs}


# ---- Reporting ------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Mean over prompts with its 95 % bootstrap interval; `values` are `(seeds, prompts)`, prompts are resampled."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(values.shape[1], size=(2000, values.shape[1]))
    means = values[:, drawn].mean(axis=(0, 2))
    return [float(values.mean()), *(float(end) for end in np.quantile(means, [0.025, 0.975]))]


def summary(results: dict) -> dict:
    """For each method: means over seeds and prompts with intervals over prompts, each seed's own, and the least KL."""
    start = results["reference"]["measured"]
    share = float(np.mean(start["satisfied"]))
    found = {"reference": {"satisfied": interval([start["satisfied"]]), "distinct": start["distinct"]}}
    for name, seeds in results["runs"].items():
        row = {"distinct by seed": [seed["measured"]["distinct"] for seed in seeds.values()]}
        for key in ("satisfied", "kl", "length"):
            values = [seed["measured"][key] for seed in seeds.values()]
            row[key] = interval(values)
            row[f"{key} by seed"] = [float(np.mean(each)) for each in values]
        row["least kl by seed"] = [least_kl(each, share) for each in row["satisfied by seed"]]
        found[name] = row
    found["target"] = {"satisfied": WANTED, "kl": least_kl(WANTED, share)}
    return found


def table(results: dict) -> str:
    def cell(triple):
        return "{:.2f} [{:.2f}, {:.2f}]".format(*triple)

    lines = [
        "| | satisfied | by seed | KL to the reference | least KL for that share | distinct-2 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary(results).items():
        if name == "reference":
            lines.append(f"| reference | {cell(row['satisfied'])} | | 0 | 0 | {row['distinct']:.2f} |")
        elif name == "target":
            lines.append(f"| target | {row['satisfied']:.2f} | | {row['kl']:.2f} | {row['kl']:.2f} | |")
        else:
            seeds = ", ".join(f"{value:.2f}" for value in row["satisfied by seed"])
            least = np.mean(row["least kl by seed"])
            distinct = ", ".join(f"{value:.2f}" for value in row["distinct by seed"])
            cells = [cell(row["satisfied"]), seeds, cell(row["kl"]), f"{least:.2f}", distinct]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in results["runs"]:
        if name != "RLOO" and "RLOO" in results["runs"]:
            differences = [f"{key} {cell(minus_rloo(results, name, key))}" for key in ("satisfied", "kl")]
            lines.append(f"\n{name} minus RLOO: " + ", ".join(differences))
    return "\n".join(lines)


def minus_rloo(results: dict, name: str, key: str) -> list[float]:
    """Mean difference of a method from RLOO, seed by seed and prompt by prompt, with its interval over prompts."""
    values = [[run["measured"][key] for run in results["runs"][each].values()] for each in (name, "RLOO")]
    return interval(np.subtract(*values))


def plot(results: dict, path: Path) -> None:
    """Satisfaction in training by step; satisfaction against KL and against diversity, held out, by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from reviews import COLORS

    numbers = summary(results)
    colors = dict(zip(METHODS, COLORS, strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), dpi=110)
    for name, seeds in results["runs"].items():
        values = np.array([[entry["satisfied"] for entry in seed["training"]] for seed in seeds.values()])
        width = min(4, values.shape[1])
        kernel = np.ones(width) / width
        smooth = np.convolve(values.mean(0), kernel, mode="valid")
        axes[0].plot(range(width, values.shape[1] + 1), smooth, color=colors[name], lw=1.8, label=name)
        row = numbers[name]
        axes[1].plot(row["kl by seed"], row["satisfied by seed"], "o", color=colors[name], ms=6, alpha=0.5, mew=0)
        axes[2].plot(
            row["distinct by seed"], row["satisfied by seed"], "o", color=colors[name], ms=6, alpha=0.5, mew=0
        )
        (x, left, right), (y, low, high) = row["kl"], row["satisfied"]
        ends = {"yerr": [[y - low], [high - y]]}
        axes[1].errorbar(x, y, xerr=[[x - left], [right - x]], **ends, color=colors[name], fmt="D", ms=6)
        axes[2].errorbar(np.mean(row["distinct by seed"]), y, **ends, color=colors[name], fmt="D", ms=6)
    start, target = numbers["reference"], numbers["target"]
    shares = np.linspace(start["satisfied"][0], 0.995, 100)
    farthest = max([target["kl"], *(max(numbers[name]["kl by seed"]) for name in results["runs"])])
    bound = [least_kl(share, start["satisfied"][0]) for share in shares]
    axes[1].plot(bound, shares, color="black", lw=1, ls="--", label="least KL for a share")
    axes[1].plot(target["kl"], target["satisfied"], "*", color="black", ms=12, label="target")
    axes[1].set_xlim(-0.03 * farthest, 1.15 * farthest)
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    axes[2].plot(start["distinct"], start["satisfied"][0], "s", color="black", ms=6, label="reference")
    axes[2].legend(frameon=False, fontsize=8, loc="lower left")
    axes[0].set(xlabel="step", ylabel="share in the present tense")
    axes[0].locator_params(axis="x", integer=True)
    axes[1].set(xlabel="KL(policy || reference), nats a completion")
    axes[2].set(xlabel="distinct-2 of all samples")
    axes[2].locator_params(axis="x", nbins=5)
    count = len(next(iter(results["runs"].values())))
    titles = (
        "training samples, mean of 4 steps and all seeds",
        "held-out prompts against KL",
        "held-out prompts against diversity",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    seeds = f"{count} seeds: dots; mean with interval: diamonds" if count > 1 else "1 seed"
    figure.suptitle(f"SmolLM2-135M-Instruct, 80% of completions are to be in the present tense ({seeds})", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    plt.close(figure)


SETTINGS = (
    "model",
    "dtype",
    "rank",
    "layers",
    "steps",
    "completions",
    "new_tokens",
    "learning_rate",
    "prompts",
    "most_words",
    "samples",
)


def main(arguments=None) -> None:
    from reviews import command_line, demonstrate

    parser = command_line("fdpg_constraints", __doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a run")
    parser.add_argument("--completions", type=int, default=16, help="completions of a step, in groups of 8")
    parser.add_argument("--new_tokens", type=int, default=6, help="tokens of a completion at most")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA adapter")
    parser.set_defaults(most_words=5)
    parser.add_argument("--layers", type=int, default=6, help="last layers that have an adapter; backward ends there")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the frozen weights")
    parser.add_argument("--prompts", type=int, default=8, help="training openings, and as many held-out ones")
    parser.add_argument("--samples", type=int, default=24, help="measured samples of an opening")
    demonstrate("fdpg_constraints", parser.parse_args(arguments), run, table, plot)


if __name__ == "__main__":
    main()
