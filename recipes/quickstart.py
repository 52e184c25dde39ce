"""
The README's first command: `python3 recipes/quickstart.py` sets everything up, trains a real language model on the
preference pairs that ship with the project, and shows what changed.

    python3 recipes/quickstart.py [--method fdpo|simper|tdpo|mallows|rainbowpo] [--output_dir DIR] [--seed N]

It needs Python >= 3.11 and a package index; the Hugging Face Hub is used where it answers and not missed where it does
not. With a CUDA device the base model is held in 4 bits (QLoRA); without one the run takes minutes on two CPU cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path


RECIPES = Path(__file__).resolve().parent
PAIRS = RECIPES / "data" / "sentiment_pairs"
NUM_OPENINGS = 100  # held-out openings that the model completes before and after
TITLES = {
    "fdpo": "f-DPO (JS)",
    "simper": "SimPER",
    "tdpo": "TDPO2",
    "mallows": "Mallows-DPO",
    "rainbowpo": "RainbowPO",
}
INSIDE = "TRL_EXT_QUICKSTART"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(TITLES), default="fdpo", help="recipe to run")
    parser.add_argument("--output_dir", help="folder for the adapter, the report and the plot")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and sampling")
    parser.add_argument("--max_steps", type=int, help="fewer steps than the recipe's, for a trial")
    parser.add_argument("--openings", type=int, default=NUM_OPENINGS, help="held-out openings to complete")
    return parser.parse_args()


# ---- The parts of the run -------------------------------------------------------------------------------------------


def load_model(model: str, adapter: Path | None = None):
    """The base model as the recipe trains it, with the trained adapter if there is one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kwargs = {"dtype": torch.float32}
    if torch.cuda.is_available():
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        kwargs = {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": {"": 0}}
    loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    return loaded if adapter is None else PeftModel.from_pretrained(loaded, str(adapter))


def held_out_prompts(count: int) -> list[str]:
    with (PAIRS / "test.jsonl").open(encoding="utf-8") as file:
        prompts = dict.fromkeys(json.loads(line)["prompt"] for line in file)
    return list(prompts)[:count]


def sample(model: str, adapter: Path | None, prompts: list[str], seed: int) -> tuple[list[str], list[float]]:
    """One completion of each prompt, and its gold score."""
    from sentiment import gold_scores, sample_completions
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    completions = sample_completions(load_model(model, adapter), tokenizer, prompts, seed=seed)
    return completions, gold_scores(completions)


def train(method: str, output_dir: Path, seed: int, max_steps: int | None) -> None:
    """`accelerate launch recipes/<method>.py` with the embedded default."""
    from common import embedded_default

    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(os.cpu_count() or 1)]
    script = [f"recipes/{method}.py", *embedded_default(method), "--output_dir", str(output_dir), "--seed", str(seed)]
    if max_steps is not None:
        # Log and evaluate within it, however short the trial is.
        script += ["--max_steps", str(max_steps), "--eval_steps", str(max_steps), "--logging_steps", "1"]
    print(f"$ accelerate launch {' '.join(script)}\n", flush=True)
    result = subprocess.run([*launch, str(RECIPES / f"{method}.py"), *script[1:]], cwd=RECIPES.parent)
    if result.returncode != 0:
        sys.exit("Training failed; the message is above.")


def evaluations(output_dir: Path) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation entries of the trainer's log."""
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry], [entry for entry in log if "eval_loss" in entry]


def starts_at_reference(entry: dict) -> bool:
    """
    Whether an evaluation's rewards are all 0, those of a policy that is still its reference: no accuracy to show.
    """
    return entry["step"] == 0 and "eval_logratios/chosen" in entry


# ---- What a person looks at -----------------------------------------------------------------------------------------


def report(method: str, training: list[dict], evals: list[dict], before, after, prompts, seconds: float) -> tuple:
    """The report as text for the terminal, and as numbers."""
    from sentiment import mean_ci, opening_of

    first, last = evals[0], evals[-1]
    (texts_before, gold_before), (texts_after, gold_after) = before, after
    gains = [b - a for a, b in zip(gold_before, gold_after, strict=True)]
    gold = {
        name: mean_ci(scores) for name, scores in (("before", gold_before), ("after", gold_after), ("gain", gains))
    }

    def row(label, key, footnote=""):
        return f"  {label:<46}{first[key]:>10.3f}{last[key]:>10.3f}   {footnote}".rstrip()

    at_reference = "at the start policy = reference: no margin, so none counts" if starts_at_reference(first) else ""
    lines = [
        f"Held-out pairs ({TITLES[method]}, {int(last['step'])} steps, {seconds / 60:.1f} minutes)",
        f"  {'':<46}{'before':>10}{'after':>10}",
        row("reward accuracy", "eval_rewards/accuracies", at_reference),
        row("reward margin", "eval_rewards/margins"),
        row("ranking accuracy of the policy", "eval_ranking_accuracy/policy"),
        row("ranking accuracy of the policy, per token", "eval_ranking_accuracy/policy_norm"),
        "",
        f"Sampled completions of {len(prompts)} held-out openings, gold sentiment in [-1, 1] with 95 % interval",
    ]
    for name, label in (("before", "before"), ("after", "after"), ("gain", "gain, opening by opening")):
        mean, low, high = gold[name]
        lines.append(f"  {label:<46}{mean:>+10.3f}   [{low:+.3f}, {high:+.3f}]")
    lines += ["", "Three of them, same seed"]
    for i in range(min(3, len(prompts))):
        lines.append(f"  {opening_of(prompts[i])} ...")
        for name, text, score in (
            ("before", texts_before[i], gold_before[i]),
            ("after", texts_after[i], gold_after[i]),
        ):
            wrapped = textwrap.wrap(" ".join(text.split()), 92) or ["(nothing)"]
            lines.append(f"    {name:<6} {score:+.2f}  {wrapped[0]}")
            lines += [f"                  {line}" for line in wrapped[1:]]
        lines.append("")
    numbers = {"gold": gold, "eval_before": first, "eval_after": last, "training": training[-1]}
    return "\n".join(lines), numbers


def plot(path: Path, training: list[dict], evals: list[dict], gold_before, gold_after, method: str) -> None:
    """Curves of the run and the distribution of the gold score, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, gray = "#3b6fb6", "#d9822b", "#8a8a8a"
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure, ((top_left, top_right), (bottom_left, bottom_right)) = plt.subplots(2, 2, figsize=(10, 7), dpi=130)

    top_left.plot([e["step"] for e in training], [e["loss"] for e in training], color=blue, label="training")
    top_left.plot(
        [e["step"] for e in evals], [e["eval_loss"] for e in evals], color=orange, marker="o", ms=4, label="held out"
    )
    top_left.set(title="Loss", xlabel="step")
    top_left.legend(frameon=False)

    steps = [e["step"] for e in evals]
    curves = (
        ("reward accuracy", "eval_rewards/accuracies", orange),
        ("ranking accuracy, per token", "eval_ranking_accuracy/policy_norm", blue),
    )
    for label, key, color in curves:
        points = [(e["step"], e[key]) for e in evals if "rewards" not in key or not starts_at_reference(e)]
        top_right.plot(*zip(*points, strict=True), color=color, marker="o", ms=4, label=label)
    top_right.axhline(0.5, color=gray, lw=0.8, ls="--")
    top_right.set(title="Held-out pairs in the right order", xlabel="step", ylim=(0, 1))
    top_right.legend(frameon=False, loc="lower right")

    for side, color in (("chosen", blue), ("rejected", orange)):
        bottom_left.plot(steps, [e[f"eval_rewards/{side}"] for e in evals], color=color, marker="o", ms=4, label=side)
    bottom_left.set(title="Held-out reward", xlabel="step")
    bottom_left.legend(frameon=False)

    bins = [i / 10 for i in range(-10, 11)]
    for scores, color, label in ((gold_before, gray, "before"), (gold_after, blue, "after")):
        mean = sum(scores) / len(scores)
        bottom_right.hist(scores, bins=bins, color=color, alpha=0.55, label=f"{label}, mean {mean:+.2f}")
        bottom_right.axvline(mean, color=color, lw=1.5)
    bottom_right.set(title="Gold sentiment of sampled completions", xlabel="sentiment", ylabel="completions")
    bottom_right.legend(frameon=False, loc="upper left")
    figure.suptitle(f"SmolLM2-135M-Instruct learns from preferences: {TITLES[method]}", fontsize=12)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def run(options: argparse.Namespace) -> None:
    import torch
    from quickstart_model import describe_source, quickstart_model
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = time.time()
    output_dir = Path(options.output_dir or f"outputs/quickstart-{options.method}").resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"

    print(f"[1/5] Model: SmolLM2-135M-Instruct, on {device}", flush=True)
    model = quickstart_model()
    print(f"      It is {describe_source(model)}.", flush=True)
    prompts = held_out_prompts(options.openings)
    print(f"[2/5] Completing {len(prompts)} held-out openings with the untrained model", flush=True)
    before = sample(model, None, prompts, options.seed)
    print("[3/5] Training", flush=True)
    train(options.method, output_dir, options.seed, options.max_steps)
    print("\n[4/5] Completing the same openings with the trained model, same seed and settings", flush=True)
    after = sample(model, output_dir, prompts, options.seed)
    print("[5/5] Report\n", flush=True)

    training, evals = evaluations(output_dir)
    text, numbers = report(options.method, training, evals, before, after, prompts, time.time() - start)
    samples = [
        {"prompt": prompt, "before": b, "gold_before": gb, "after": a, "gold_after": ga}
        for prompt, b, gb, a, ga in zip(prompts, *before, *after, strict=True)
    ]
    plot(output_dir / "report.png", training, evals, before[1], after[1], options.method)
    (output_dir / "report.txt").write_text(text + "\n", encoding="utf-8")
    (output_dir / "report.json").write_text(json.dumps({**numbers, "samples": samples}, indent=2), encoding="utf-8")
    print(text)
    print(f"Plot:    {output_dir / 'report.png'}")
    print(f"Numbers: {output_dir / 'report.json'}")
    print(f"Adapter: {output_dir} (load it with `AutoPeftModelForCausalLM.from_pretrained`)")


def main() -> None:
    options = parse_args()
    if os.environ.get(INSIDE):
        return run(options)
    sys.path.insert(0, str(RECIPES))
    from setup_env import run_in_environment

    run_in_environment(
        __file__,
        # 4-bit weights are for CUDA devices; elsewhere their package only costs a download.
        "quickstart,quantization" if shutil.which("nvidia-smi") else "quickstart",
        **{INSIDE: "1"},
        TRL_EXT_COMPACT_LOG="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        OMP_NUM_THREADS=str(os.cpu_count() or 1),
    )


if __name__ == "__main__":
    main()
