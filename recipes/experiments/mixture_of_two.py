"""
A mixture of two policies on a language model: one was aligned to positive reviews, one to short ones.

Both are adapters of SmolLM2-135M-Instruct, trained with f-DPO's defaults (DPO, beta 0.1) and the same settings on the
same pairs of completions, which ship with the project: one prefers the more positive of a pair, one the shorter. Then
`trl-ext mix` solves for the weights that maximize the smaller of the two normalized objectives, on training openings,
and measures on held-out openings: the reference, each policy, their uniform mixture, the maximin mixture, and the
linear merge of the adapters with its weights. The objective of a policy's reward is `beta (E[L] - KL)`, L being the
policy's log-ratio to the reference: 0 for the policy itself, the smaller the worse.

Nothing was tuned on the held-out openings.

    python recipes/experiments/mixture_of_two.py --runs_dir outputs/mixture
    python recipes/experiments/mixture_of_two.py --plot_only      # table and plot again, from the results

Adapters, samples and scores are kept in `--runs_dir`; an interrupted demonstration goes on where it was. Writes
`mixture_of_two.json` and `mixture_of_two.png` into `--output_dir`.
"""

import json
import sys
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

BETA = 0.1
PREFERENCES = ("positive", "short")
MEASURED = ("reference", *PREFERENCES, "uniform mixture", "mixture", "merged")
NAMES = {"mixture": "maximin mixture", "merged": "linear merge"}
MOST_WORDS, LEAST_DIFFERENCE = 28, 3  # of the completions of a pair


def sentiment(prompts, completions, **columns) -> list[float]:
    """Reward: VADER's sentiment, -1 to 1."""
    from sentiment import gold_scores

    return gold_scores(completions)


def words(prompts, completions, **columns) -> list[float]:
    """Words of a completion; fewer are better."""
    return [float(len(text.split())) for text in completions]


# ---- Data -----------------------------------------------------------------------------------------------------------


def pairs(preference: str) -> list[dict]:
    """Training pairs: the same completions for both preferences, in the order of one of them."""
    from sentiment import PAIRS_DIR, opening_of

    with (PAIRS_DIR / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for row in rows:
        lengths = [len(row[side].split()) for side in ("chosen", "rejected")]
        if max(lengths) > MOST_WORDS or abs(lengths[0] - lengths[1]) < LEAST_DIFFERENCE:
            continue
        chosen, rejected = row["chosen"], row["rejected"]
        if preference == "short" and lengths[1] < lengths[0]:
            chosen, rejected = rejected, chosen
        found.append({"prompt": opening_of(row["prompt"]), "chosen": chosen, "rejected": rejected})
    return found


def write_prompts(folder: Path, args) -> Path:
    """The openings that the weights are solved on, and the held-out ones, as a data set of two splits."""
    from reviews import openings

    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.prompts), ("test", args.test_prompts)):
        rows = openings(count, split, args.most_words)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
    return folder


# ---- Running --------------------------------------------------------------------------------------------------------


def train_adapter(preference: str, seed: int, folder: Path, args) -> dict:
    """Trains one adapter with f-DPO's defaults and saves it."""
    from datasets import Dataset
    from reviews import load, lora

    from trl_ext import FDPOConfig, FDPOTrainer

    model, tokenizer = load(args.model, args.dtype)
    config = FDPOConfig(
        str(folder),
        beta=BETA,
        seed=seed,
        max_steps=args.steps,
        per_device_train_batch_size=args.pairs_a_step,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = FDPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(pairs(preference)),
        processing_class=tokenizer,
        peft_config=lora(model),
    )
    trainer.train()
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = log[-4:]
    return {
        "loss": [entry["loss"] for entry in log],
        "reward_accuracy": float(np.mean([entry["rewards/accuracies"] for entry in last])),
    }


def curve(args, base: str, adapters: list[Path], cache: Path, prompts: list[str]) -> list[dict]:
    """Both objectives by weight, from the samples of the reference and of both policies that were measured."""
    import torch
    from peft import PeftModel
    from reviews import load

    from trl_ext.mixing import AlignedPolicies

    model, tokenizer = load(base, args.dtype)
    model = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=PREFERENCES[0])
    model.load_adapter(str(adapters[1]), adapter_name=PREFERENCES[1])
    policies = AlignedPolicies(
        model,
        processing_class=tokenizer,
        adapters=list(PREFERENCES),
        responses=args.responses,
        max_new_tokens=args.new_tokens,
        batch_size=args.batch_size,
        cache_dir=cache,
    )
    sampled = [policies.reference_mixture(), policies.mixture([1.0, 0.0]), policies.mixture([0.0, 1.0])]
    return objectives_by_weight(
        torch.cat([policies.sample(prompts, each, "measure").logratios for each in sampled], dim=1)
    )


def objectives_by_weight(logratios) -> list[dict]:
    """
    Both objectives for weights from (0, 1) to (1, 0). `logratios` `(N, m, 2)` are of as many samples of the reference
    as of each policy: together samples of the mean of the three, beside which no response can be more than three times
    as likely under a mixture.
    """
    import torch

    from trl_ext.mixing import log_partition

    of_reference = torch.zeros_like(logratios[..., :1])
    offsets = float(np.log(3)) - torch.cat([of_reference, logratios], dim=-1).logsumexp(-1)
    found = []
    for weight in np.linspace(0, 1, 21):
        weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        shares = (logratios @ weights + offsets).softmax(1)
        means = (shares.unsqueeze(-1) * logratios).sum(1).mean(0)
        # KL(pi_lambda || pi_ref) = lambda . E[L] - log E_ref exp(lambda . L)
        kl = weights @ means - log_partition(logratios, weights, log_offsets=offsets).mean()
        found.append({"weight": float(weight), "objectives": (BETA * (means - kl)).tolist()})
    return found


def run_seed(seed: int, args) -> dict:
    """Two adapters, their weights, and everything that is measured, from one seed."""
    from reviews import kept, load, openings

    from trl_ext.launch.mix import main as mix

    settings = {name: getattr(args, name) for name in SETTINGS} | {"seed": seed}
    training = {name: settings[name] for name in ("seed", *TRAINING)}
    folder = Path(args.runs_dir)
    base = load(args.model)[0].config._name_or_path
    trained, adapters = {}, []
    for preference in PREFERENCES:
        adapters.append(folder / f"{preference}-{seed}")
        trained[preference] = kept(
            folder,
            f"trained-{preference}-{seed}",
            training,
            lambda preference=preference, path=adapters[-1]: train_adapter(preference, seed, path, args),
        )
        print(f"seed {seed}, {preference}: reward accuracy {trained[preference]['reward_accuracy']:.2f}", flush=True)

    cache = folder / "cache"

    def solve_and_measure() -> dict:
        output = folder / f"mixture-{seed}"
        command = ["--policy", *map(str, adapters), "--base", base, "--output_dir", str(output)]
        command += ["--dataset", str(write_prompts(folder / "prompts", args)), "--test_split", "test"]
        command += ["--num_prompts", str(args.prompts), "--num_test_prompts", str(args.test_prompts)]
        command += ["--responses", str(args.responses), "--max_new_tokens", str(args.new_tokens)]
        command += ["--beta", str(BETA), "--merge", "true", "--batch_size", str(args.batch_size), "--device", "cpu"]
        command += ["--dtype", args.dtype]
        # Samples of the reference are the same for all seeds, and are sampled once.
        command += ["--cache_dir", str(cache), "--reward", f"{__file__}:sentiment", f"{__file__}:words"]
        if mix(command):
            raise SystemExit("`trl-ext mix` failed; its message is above.")
        report = json.loads((output / "report.json").read_text())
        measured = report["measurements"]
        names = dict(zip(report["policies"], PREFERENCES, strict=True))
        return {
            "weights": report["weights"],
            "measured": {names.get(name, name): values for name, values in measured.items()},
        }

    def draw_curve() -> dict:
        return {"curve": curve(args, base, adapters, cache, openings(args.test_prompts, "test", args.most_words))}

    found = kept(folder, f"mixed-{seed}", settings, solve_and_measure)
    drawn = kept(folder, f"curve-{seed}", settings, draw_curve)
    return {"trained": trained, **found, "curve": drawn["curve"]}


def run(args) -> dict:
    return {
        "settings": {name: getattr(args, name) for name in SETTINGS} | {"beta": BETA},
        "seeds": {str(seed): run_seed(seed, args) for seed in args.seeds},
    }


# ---- Reporting ------------------------------------------------------------------------------------------------------


def reward_of(measured: dict, name: str) -> dict:
    """A measured reward by the function's name."""
    return next(values for key, values in measured["rewards"].items() if name in key)


def table(results: dict) -> str:
    def cell(values: list[dict], digits: int = 3) -> str:
        mean = np.mean([value["value"] for value in values])
        if len(values) == 1:
            return f"{mean:.{digits}f} [{values[0]['low']:.{digits}f}, {values[0]['high']:.{digits}f}]"
        return f"{mean:.{digits}f} (" + ", ".join(f"{value['value']:.{digits}f}" for value in values) + ")"

    seeds = list(results["seeds"].values())
    lines = [
        "| | objective of positive | objective of short | smaller | KL | sentiment | words | KL of the mixture to it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in MEASURED:
        rows = [seed["measured"][name] for seed in seeds]
        cells = [cell([row["objectives"][k] for row in rows]) for k in range(2)]
        cells += [cell([row["smallest"] for row in rows]), cell([row["kl"] for row in rows], 2)]
        cells += [cell([reward_of(row, "sentiment") for row in rows], 2)]
        cells += [cell([reward_of(row, "words") for row in rows], 1)]
        distances = [row["distance"] for row in rows]
        cells.append("" if distances[0] is None else cell(distances, 2))
        lines.append(f"| {NAMES.get(name, name)} | " + " | ".join(cells) + " |")
    for number, seed in results["seeds"].items():
        weight, (low, high) = seed["weights"]["weights"][0], seed["weights"]["intervals"][0]
        lines.append(f"\nseed {number}: weight of positive {weight:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """The objectives by weight, the smaller one of each policy, and what the samples are like."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from reviews import COLORS

    seeds = results["seeds"]
    first = next(iter(seeds.values()))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), dpi=110)
    for seed in seeds.values():
        alpha = 1.0 if seed is first else 0.3
        for k, preference in enumerate(PREFERENCES):
            weights = [entry["weight"] for entry in seed["curve"]]
            label = f"objective of {preference!r}" if seed is first else None
            values = [entry["objectives"][k] for entry in seed["curve"]]
            axes[0].plot(weights, values, color=COLORS[k], lw=1.8, alpha=alpha, label=label)
        weight, (low, high) = seed["weights"]["weights"][0], seed["weights"]["intervals"][0]
        axes[0].axvline(weight, color="black", lw=1, ls="--", alpha=alpha)
        if seed is first:
            axes[0].axvspan(low, high, color="black", alpha=0.07, lw=0, label="solution, 95% interval")
    places = np.arange(len(MEASURED))
    labels = [NAMES.get(name, name) for name in MEASURED]
    width = 0.8 / (2 * len(seeds))
    for index, seed in enumerate(seeds.values()):
        for k, preference in enumerate(PREFERENCES):
            found = [seed["measured"][name]["objectives"][k] for name in MEASURED]
            values = np.array([each["value"] for each in found])
            ends = np.array([[each["value"] - each["low"], each["high"] - each["value"]] for each in found]).T
            at = places + (2 * index + k - len(seeds) + 0.5) * width
            axes[1].errorbar(
                at, values, yerr=ends.clip(min=0), fmt="o", ms=4, color=COLORS[k], capsize=2, alpha=0.9,
                label=f"objective of {preference!r}" if index == 0 else None,
            )  # fmt: skip
        for place, name in enumerate(MEASURED):
            row = seed["measured"][name]
            x, y = reward_of(row, "words"), reward_of(row, "sentiment")
            axes[2].errorbar(
                x["value"], y["value"], xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
                yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]], fmt="o", ms=5, color=COLORS[place],
                elinewidth=0.8, alpha=0.9, label=labels[place] if index == 0 else None,
            )  # fmt: skip
    axes[0].set(xlabel="weight of 'positive'", ylabel="normalized objective")
    axes[1].set_xticks(places, labels, rotation=20, ha="right", fontsize=8)
    axes[1].axhline(0, color="#8a8a8a", lw=0.8)
    axes[2].set(xlabel="words of a completion", ylabel="sentiment")
    titles = ("held-out openings, by weight", "held-out openings", "held-out openings: the raw rewards")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, loc="lower center")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    axes[2].legend(frameon=False, fontsize=8, loc="best")
    count = len(seeds)
    figure.suptitle(
        f"Two adapters of SmolLM2-135M-Instruct and their mixtures ({count} seed{'s' * (count > 1)})", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


TRAINING = ("model", "dtype", "steps", "pairs_a_step", "learning_rate")
SETTINGS = (*TRAINING, "prompts", "test_prompts", "most_words", "responses", "new_tokens", "batch_size")


def main(arguments=None) -> None:
    from reviews import command_line, demonstrate

    parser = command_line("mixture_of_two", __doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of an adapter")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the frozen weights")
    parser.add_argument("--pairs_a_step", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=12, help="openings that the weights are solved on")
    parser.add_argument("--test_prompts", type=int, default=12, help="held-out openings")
    parser.add_argument("--responses", type=int, default=6, help="responses to each opening")
    parser.add_argument("--new_tokens", type=int, default=24, help="tokens of a response at most")
    parser.add_argument("--batch_size", type=int, default=36, help="responses in a forward")
    demonstrate("mixture_of_two", parser.parse_args(arguments), run, table, plot)


if __name__ == "__main__":
    main()
