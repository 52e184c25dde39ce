"""
A visible demonstration of online rewards: `python3 recipes/reward_demo.py` trains a small text-to-image pipeline on
handwritten digits, rewards its own images for bold strokes, and shows and measures what changed.

    python3 recipes/reward_demo.py [--output_dir DIR] [--seed N]

Only Python packages are downloaded: the digits are scikit-learn's, and the pipeline is trained by the script (and kept
for the next run; it is that of `diffusion_demo.py`). The reward is a ruler for strokes, which no gradient passes, less a
penalty for images that are not read as their digit. `recipes/reward_demo.md` explains how everything is measured.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path


RECIPES = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPES))
INSIDE = "TRL_EXT_REWARD_DEMO"

UNREADABLE = 0.0  # reward of an image that is not read as its digit: that of an image without a stroke
BEST_OF = (1, 2, 4, 8, 16)
REFERENCE = "reference"

# What each run changes of `Settings`. The reward of the second is the first one's with the sign flipped.
RUNS = {
    "bolder": {},
    "thinner": {"sign": -1.0},
    "beta x 4": {"beta_factor": 4.0},
    "noise too low": {"noise_level": 0.2},
}


@dataclass
class Settings:
    """Sizes of the demonstration."""

    pretraining: dict = field(default_factory=dict)  # of `PretrainingConfig`, where it differs
    max_steps: int = 30  # of the first run
    other_steps: int = 10  # of the others
    groups: int = 8  # prompts of a step
    num_generations: int = 8
    training_steps: int = 10  # of the stochastic sampler
    beta: float = 0.1
    learning_rate: float = 2e-3
    lora_rank: int = 16
    reference_images: int = 64
    eval_steps: int = 5  # optimizer steps between evaluations
    inference_steps: int = 12  # of the usual sampler, with guidance
    guidance_scale: float = 3.0
    seeds_per_prompt: int = 16  # of a held-out prompt, for best-of-n and the last measurement
    eval_prompts: int = 32  # held-out prompts of the curves, one image each
    penalizes_unreadable: bool = True  # whether an image must be read as its digit


# Everything once, in seconds, on a pipeline that has learned nothing.
TRIAL = Settings(
    pretraining={"vae_steps": 2, "unet_steps": 2, "unet_channels": (32, 32), "drawings": 1},
    max_steps=2,
    other_steps=1,
    groups=2,
    num_generations=2,
    training_steps=3,
    reference_images=4,
    eval_steps=1,
    inference_steps=2,
    seeds_per_prompt=2,
    eval_prompts=4,
    penalizes_unreadable=False,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/reward-demo", help="folder for images, numbers, adapters")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), help="some of the runs only")
    parser.add_argument("--trial", action="store_true", help="a few seconds of each part, whose numbers mean nothing")
    return parser.parse_args()


def make_reward(reader, sign: float, penalizes: bool = True):
    """
    Stroke width in pixels times `sign`, and `UNREADABLE` for an image that is not read as its digit, a column.
    """
    from digits import stroke_width

    def stroke(images, digit):
        import numpy as np

        pixels = np.stack([np.asarray(image.convert("L"), dtype=np.float32) / 255 for image in images])
        widths, read = stroke_width(pixels), reader.read(pixels)
        # A thin stroke's reward is negative; an unreadable image must be worse than the boldest.
        worst = UNREADABLE if sign > 0 else -6.0
        return [
            float(sign * width) if right or not penalizes else worst
            for width, right in zip(widths, read == np.asarray(digit), strict=True)
        ]

    return stroke


def best_of(rewards, count: int) -> float:
    """
    Mean over prompts of the expected best of `count` images, from more of them: `rewards` has a row for each prompt.
    """
    import numpy as np

    ordered = np.sort(rewards, axis=1)
    total = ordered.shape[1]
    # The i-th smallest is the best of `count` drawn without replacement if the others are below it.
    chance = np.array([math.comb(i, count - 1) for i in range(total)]) / math.comb(total, count)
    return float((ordered * chance).sum(1).mean())


def best_of_kl(count: int) -> float:
    """KL of the best of n images to one of them, in nats."""
    return math.log(count) - (count - 1) / count


def prompts_of(pairs: list[tuple[int, int]]):
    from datasets import Dataset
    from digits import caption

    return Dataset.from_dict({"prompt": [caption(*pair) for pair in pairs], "digit": [pair[0] for pair in pairs]})


def train(name: str, folder: Path, reader, training, held_out, output_dir: Path, settings: Settings, seed: int):
    """One run of the trainer; returns its folder and its log."""
    from diffusion_demo import one_line_progress
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from trl_ext import ScoreAsActionConfig, ScoreAsActionTrainer

    options = RUNS[name]
    steps = settings.max_steps if name == next(iter(RUNS)) else settings.other_steps
    args = ScoreAsActionConfig(
        output_dir=str(output_dir / "runs" / name.replace(" ", "-")),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_steps=steps,
        per_device_train_batch_size=settings.groups * settings.num_generations,
        per_device_eval_batch_size=64,
        num_generations=settings.num_generations,
        num_inference_steps=settings.training_steps,
        noise_level=options.get("noise_level"),
        beta=settings.beta * options.get("beta_factor", 1.0),
        num_reference_images=settings.reference_images,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        eval_on_start=True,
        eval_inference_steps=settings.inference_steps,
        eval_guidance_scale=settings.guidance_scale,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=seed,
    )
    trainer = ScoreAsActionTrainer(
        model=str(folder),
        reward_funcs=make_reward(reader, options.get("sign", 1.0), settings.penalizes_unreadable),
        args=args,
        train_dataset=training,
        eval_dataset=held_out,
        peft_config=LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(one_line_progress(name))
    trainer.train()
    trainer.save_model()
    return Path(args.output_dir), trainer.state.log_history


def curve_of(log: list[dict]) -> list[dict]:
    """
    Evaluated rewards over the run, each beside the KL of the images that the step's weights sampled: those of the next
    step, or for the last one those of the last step.
    """
    kls = {entry["step"]: entry["kl"] for entry in log if "kl" in entry}
    names = ("reward", "reward/low", "reward/high", "reward/gain")
    return [
        {
            "step": entry["step"],
            "kl": kls.get(entry["step"] + 1, kls[max(kls)]),
            **{key: entry[f"eval_{key}"] for key in names if f"eval_{key}" in entry},
        }
        for entry in log
        if "eval_reward" in entry
    ]


# ---- What a person looks at -----------------------------------------------------------------------------------------


def plot_grid(path: Path, rows: dict, titles: list[str]) -> None:
    """A row of images for each model, `label -> images`; a column for each prompt."""
    from diffusion_demo import _pyplot, _save

    plt = _pyplot()
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(0.82 * len(titles) + 2.6, 0.83 * len(rows) + 0.62), dpi=110, squeeze=False
    )
    figure.subplots_adjust(left=0.235, right=0.99, top=1 - 0.58 / figure.get_figheight(), bottom=0.02)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="#c8c8c8", linewidth=0.6)
        row[0].annotate(label, (-0.12, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9, weight="normal", pad=3)
    figure.suptitle(
        "Held-out prompts, the same seeds (the best of 16: of other seeds, too)",
        fontsize=10.5,
        weight="bold",
        y=1 - 0.1 / figure.get_figheight(),
    )
    _save(figure, path)


def plot_curves(path: Path, results: dict, baseline: list[dict]) -> None:
    """
    Reward over the steps, KL over the steps, and the reward gained against KL beside best-of-n of the reference: gained,
    as the curves have one image a prompt and best-of-n has more, whose means differ.
    """
    from diffusion_demo import _STYLES, _pyplot, _save

    plt = _pyplot()
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), dpi=110)
    for (name, result), (color, line) in zip(results.items(), _STYLES, strict=False):
        style = {"color": color, "ls": line, "marker": "o", "ms": 3.5, "label": name}
        curve, sign = result["curve"], result["sign"]
        steps, kls = [p["step"] for p in curve], [p["kl"] for p in curve]
        rewards = [sign * p["reward"] for p in curve]
        axes[0].plot(steps, rewards, **style)
        if "reward/low" in curve[0] and name == next(iter(results)):
            low, high = ([sign * p[f"reward/{end}"] for p in curve] for end in ("low", "high"))
            axes[0].fill_between(steps, low, high, color=color, alpha=0.12, lw=0)
        axes[1].plot(steps, kls, **style)
        if sign > 0:
            axes[2].plot(kls, [reward - rewards[0] for reward in rewards], **style)
    points = [(p["kl"], p["reward"] - baseline[0]["reward"]) for p in baseline]
    axes[2].plot(*zip(*points, strict=True), color="#222222", marker="s", ms=4, label="reference, best of n")
    for p, point in zip(baseline, points, strict=True):
        axes[2].annotate(f"n={p['n']}", point, (4, -9), textcoords="offset points", fontsize=7)
    axes[0].set(title="Reward of held-out prompts, usual sampler", xlabel="step")
    axes[1].set(title="KL of an image, in nats", xlabel="step")
    axes[2].set(title="Reward gained at equal KL", xlabel="nats")
    axes[0].legend(frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def report(results: dict, baseline: list[dict], setup: dict) -> str:
    """The table for the terminal."""
    lines = [
        f"{setup['images']} images of held-out prompts, the usual sampler, the same seeds for every model. 95 % "
        "intervals over prompts.",
        "",
        f"  {'':<16}{'reward':<24}{'stroke width':<15}{'read':<9}{'KL, nats':<11}{'best of n at that KL':<20}",
    ]
    for name, result in results.items():
        last = result["last"]
        at = f"{interpolate(baseline, result['kl']):.2f}" if result["sign"] > 0 and name != REFERENCE else ""
        lines.append(
            f"  {name:<16}{last['reward']:>6.2f} [{last['low']:.2f}, {last['high']:.2f}]".ljust(42)
            + f"{last['width']:>5.2f} px       {last['read']:<9.1%}{result['kl']:<11.2f}{at}"
        )
    lines += ["", "  Best of n images of the reference:"]
    lines += [f"    n = {p['n']:<3} {p['kl']:.2f} nats, reward {p['reward']:.2f}" for p in baseline]
    return "\n".join(lines)


def interpolate(baseline: list[dict], kl: float) -> float:
    """Reward of best-of-n at a KL between those of two n; beyond the last, that of the last."""
    import numpy as np

    return float(np.interp(kl, [p["kl"] for p in baseline], [p["reward"] for p in baseline]))


# ---- The run --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    import numpy as np
    from diffusion_demo import (
        Stopwatch,
        Warnings,
        held_out_prompts,
        load_pipeline,
        make_writer,
        quieten,
        sample,
        training_prompts,
    )

    quieten()
    warned = Warnings()
    from digits import NAMES, caption, stroke_width

    settings = TRIAL if options.trial else Settings()
    watch = Stopwatch(4)
    output_dir, folder, config, _, reader = make_writer(options, settings, watch)

    watch.begin("reference", "What the pipeline makes of held-out prompts, and the best of several")
    chosen = held_out_prompts()[:: max(1, len(held_out_prompts()) // settings.eval_prompts)][: settings.eval_prompts]
    each = settings.seeds_per_prompt
    prompts = [prompt for prompt in chosen for _ in range(each)]
    texts, labels = [caption(*prompt) for prompt in prompts], np.array([digit for digit, _ in prompts])
    seeds = range(1_000_000 * options.seed + 500_000, 1_000_000 * options.seed + 500_000 + len(prompts))

    def measured(images) -> dict:
        """Each image's reward, width, and whether it is read."""
        widths, read = stroke_width(images), reader.read(images) == labels
        counted = read | (not settings.penalizes_unreadable)
        return {"images": images, "widths": widths, "read": read, "rewards": np.where(counted, widths, UNREADABLE)}

    def summary(found: dict) -> dict:
        means = found["rewards"].reshape(-1, each).mean(1)
        half = 1.96 * means.std(ddof=1) / math.sqrt(len(means))
        mean = float(means.mean())
        return {
            "reward": mean,
            "low": mean - float(half),
            "high": mean + float(half),
            "width": float(found["widths"].mean()),
            "read": float(found["read"].mean()),
        }

    start = measured(sample(load_pipeline(folder), texts, seeds, settings))
    table = start["rewards"].reshape(-1, each)
    baseline = [{"n": n, "kl": best_of_kl(n), "reward": best_of(table, n)} for n in BEST_OF if n <= each]
    results = {REFERENCE: {"last": summary(start), "kl": 0.0, "sign": 1.0}}
    pictures = {REFERENCE: start["images"]}

    watch.begin("training", f"Rewards: {len(options.runs)} runs from the same start")
    training, held_out = prompts_of(training_prompts()), prompts_of(chosen)
    for name in options.runs:
        adapter, log = train(name, folder, reader, training, held_out, output_dir, settings, options.seed)
        found = measured(sample(load_pipeline(folder, adapter), texts, seeds, settings))
        curve = curve_of(log)
        results[name] = {
            "settings": RUNS[name],
            "sign": RUNS[name].get("sign", 1.0),
            "last": summary(found),
            "kl": curve[-1]["kl"],
            "curve": curve,
        }
        pictures[name] = found["images"]
        print(
            f"      {name}: reward {results[name]['last']['reward']:.2f}, {results[name]['kl']:.2f} nats", flush=True
        )
        warned.tell()

    watch.begin("report", "Report\n")
    shown = [next(i for i, (d, _) in enumerate(prompts) if d == digit) for digit in sorted(set(labels.tolist()))]
    rows = {}
    for name, images in pictures.items():
        last = results[name]["last"]
        rows[f"{name}\n{last['width']:.1f} px, read {last['read']:.0%}"] = [images[i] for i in shown]
        if name == REFERENCE:
            best = [i // each * each + int(table[i // each].argmax()) for i in shown]
            rows[f"reference, best of {each}\n{best_of_kl(each):.2f} nats"] = [images[i] for i in best]
    plot_grid(output_dir / "grid.png", rows, [NAMES[labels[i]] for i in shown])
    plot_curves(output_dir / "curves.png", {n: r for n, r in results.items() if n != REFERENCE}, baseline)
    watch.end()
    setup = {"images": len(prompts), "settings": asdict(settings), "pretraining": asdict(config), "seed": options.seed}
    text = report(results, baseline, setup)
    numbers = {"setup": setup, "best_of_n": baseline, "results": results, "seconds": watch.seconds}
    (output_dir / "report.txt").write_text(text + "\n", encoding="utf-8")
    (output_dir / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(text)
    minutes = sum(watch.seconds.values()) / 60
    print(
        f"\n  {minutes:.1f} minutes; images: {output_dir / 'grid.png'}, curves.png; numbers: report.json beside them"
    )


def main() -> None:
    options = parse_args()
    if os.environ.get(INSIDE):
        return run(options)
    from setup_env import run_demo

    run_demo(__file__, INSIDE)


if __name__ == "__main__":
    main()
