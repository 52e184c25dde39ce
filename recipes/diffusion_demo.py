"""
A visible demonstration of Diffusion-DPO and DSPO: `python3 recipes/diffusion_demo.py` trains a small text-to-image
pipeline on handwritten digits, aligns it to a preference for bold strokes, and shows and measures what changed.

    python3 recipes/diffusion_demo.py [--output_dir DIR] [--seed N]

Only Python packages are downloaded: the digits are scikit-learn's, the pipeline is trained by the script (and kept for
the next run), and the pairs are its own samples. A run takes less than 15 minutes on two CPU cores.
`recipes/diffusion_demo.md` explains how everything is measured.
"""

import argparse
import io
import json
import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


RECIPES = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPES))
INSIDE = "TRL_EXT_DIFFUSION_DEMO"

# Never in a pair: these digits, and these wordings of every digit.
HELD_OUT_DIGITS = (3, 6, 9)
HELD_OUT_WORDINGS = (1, 3)

# Learning rate and steps were chosen on the training prompts; the rest is as published for SD 1.5. The last run shows
# that it is the preference that is learned: the same pairs, chosen and rejected exchanged.
RUNS = {
    "Diffusion-DPO": {"method": "diffusion_dpo", "beta": 2000.0},
    "Diffusion-DPO, safeguard": {"method": "diffusion_dpo", "beta": 2000.0, "safeguard_mu": 0.9},
    "DSPO": {"method": "dspo"},
    "DSPO, safeguard": {"method": "dspo", "safeguard_mu": 0.2},
    "Diffusion-DPO, pairs swapped": {"method": "diffusion_dpo", "beta": 2000.0, "swap_pairs": True},
}
REFERENCE = "reference"
EVAL_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "gaps/chosen", "gaps/rejected")


@dataclass
class Settings:
    """Sizes of the demonstration."""

    pretraining: dict = field(default_factory=dict)  # of `PretrainingConfig`, where it differs
    images_per_prompt: int = 32  # sampled for each training prompt, to make pairs of
    readable_only: bool = True  # whether the annotator passes over images that are not read as their digit
    seeds_per_prompt: int = 8  # of each held-out prompt
    curve_seeds: int = 3  # of these, for the checkpoints
    inference_steps: int = 12
    guidance_scale: float = 3.0
    max_steps: int = 160
    checkpoint_steps: int = 40
    batch_size: int = 16
    learning_rate: float = 1e-3
    lora_rank: int = 16


# Everything once, in seconds, on a pipeline that has learned nothing.
TRIAL = Settings(
    pretraining={"vae_steps": 2, "unet_steps": 2, "unet_channels": (32, 32), "drawings": 1},
    images_per_prompt=4,
    readable_only=False,
    seeds_per_prompt=4,
    curve_seeds=1,
    inference_steps=2,
    max_steps=2,
    checkpoint_steps=1,
    batch_size=4,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/diffusion-demo", help="folder for images, numbers, adapters")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--trial", action="store_true", help="a few seconds of each part, whose numbers mean nothing")
    return parser.parse_args()


def training_prompts() -> list[tuple[int, int]]:
    """Digit and wording of the prompts that pairs are made for."""
    from digits import NAMES, WORDINGS

    return [
        (digit, wording)
        for digit in range(len(NAMES))
        for wording in range(len(WORDINGS))
        if digit not in HELD_OUT_DIGITS and wording not in HELD_OUT_WORDINGS
    ]


def held_out_prompts() -> list[tuple[int, int]]:
    """Digit and wording of the prompts that are measured: every digit in the held-out wordings, and held-out digits in
    all of them."""
    from digits import NAMES, WORDINGS

    known = set(training_prompts())
    return [(d, w) for d in range(len(NAMES)) for w in range(len(WORDINGS)) if (d, w) not in known]


# ---- The parts of the run -------------------------------------------------------------------------------------------


def sample(pipeline, prompts: Sequence[str], seeds: Sequence[int], settings: Settings):
    """One image for each prompt and seed, as an array of shape `(N, H, W)`, 0 is ink and 1 is paper."""
    import numpy as np
    import torch

    images = []
    for start in range(0, len(prompts), 64):
        part = slice(start, start + 64)
        # A generator an image, on the CPU: an image depends on its own seed only, not on its neighbors in the batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        output = pipeline(
            list(prompts[part]),
            num_inference_steps=settings.inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
            output_type="np",
        )
        images.append(output.images.mean(-1))
    return np.concatenate(images)


def load_pipeline(folder: Path, adapter: Path | None = None):
    """The pipeline, with a trained LoRA as `load_lora_weights` reads it."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
        if not pipeline.get_list_adapters():  # diffusers passes over files that it does not recognize
            raise RuntimeError(f"No LoRA was loaded from {adapter}.")
    return pipeline


def choose_pairs(widths, readable, count: int) -> list[tuple[int, int]]:
    """
    Chosen and rejected among the images of one prompt: of those that can be read, ordered by stroke width, the widest
    `count` against the narrowest `count`, fewer if there are not enough.
    """
    order = sorted((i for i in range(len(widths)) if readable[i]), key=lambda i: widths[i])
    count = min(count, len(order) // 2)
    return list(zip(order[len(order) - count :], order[:count], strict=True))


def make_pairs(images, prompts, widths, readable):
    """
    A preference dataset, `prompt`, `chosen`, `rejected`: of each prompt's images the boldest quarter over the
    thinnest.
    """
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    rows, indices = [], []
    for prompt in dict.fromkeys(prompts):
        own = np.flatnonzero([p == prompt for p in prompts])
        pairs = choose_pairs(widths[own], readable[own], len(own) // 4)
        indices += [(own[chosen], own[rejected]) for chosen, rejected in pairs]
    pixels = (images * 255).round().astype(np.uint8)
    for chosen, rejected in indices:
        rows.append(
            {
                "prompt": prompts[chosen],
                "chosen": Image.fromarray(pixels[chosen]),
                "rejected": Image.fromarray(pixels[rejected]),
            }
        )
    return Dataset.from_list(rows), np.array(indices)


def train(
    name: str,
    pipeline: Path,
    pairs,
    held_out_pairs,
    output_dir: Path,
    settings: Settings,
    seed: int,
    options: dict | None = None,
):
    """One run of the trainer, with the options of `RUNS` unless others are given; returns its folder and its log."""
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer, DSPOConfig, DSPOTrainer

    options = dict(RUNS[name] if options is None else options)
    trainer_class, config_class = {
        "diffusion_dpo": (DiffusionDPOTrainer, DiffusionDPOConfig),
        "dspo": (DSPOTrainer, DSPOConfig),
    }[options.pop("method")]
    if options.pop("swap_pairs", False):
        exchanged = {"chosen": "rejected", "rejected": "chosen"}
        pairs, held_out_pairs = pairs.rename_columns(exchanged), held_out_pairs.rename_columns(exchanged)
    args = config_class(
        output_dir=str(output_dir / "runs" / name.lower().replace(", ", "-").replace(" ", "-")),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.max_steps // 16,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        max_steps=settings.max_steps,
        save_steps=settings.checkpoint_steps,
        save_only_model=True,
        eval_strategy="steps",
        eval_steps=settings.checkpoint_steps,
        eval_on_start=True,
        # The runs share what is computed once.
        cache_latents=True,
        cache_dir=str(output_dir / "latent_cache"),
        logging_steps=max(1, settings.checkpoint_steps // 4),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=seed,
        **options,
    )
    trainer = trainer_class(
        model=str(pipeline),
        args=args,
        train_dataset=pairs,
        eval_dataset=held_out_pairs,
        peft_config=LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(one_line_progress(name))
    trainer.train()
    trainer.save_model()
    return Path(args.output_dir), trainer.state.log_history


def one_line_progress(name: str):
    """A bar that disappears when the run is over."""
    from digits_pipeline import progress
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = progress(state.max_steps, name)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(1)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


# ---- Measures -------------------------------------------------------------------------------------------------------


def wilson(successes: float, trials: int) -> tuple[float, float, float]:
    """A proportion with Wilson's 95 % interval."""
    z = 1.959964
    p = successes / trials
    center = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    return p, max(0.0, center - half), min(1.0, center + half)


def compare(widths, reference_widths, readings, labels, groups: dict) -> dict:
    """
    What one model's images are like beside the reference's from the same prompts and seeds.

    A win is a wider stroke than the reference's image of the same prompt and seed has; an equal one is half a win.

    Args:
        widths, reference_widths (`np.ndarray` of shape `(N,)`):
            Stroke widths in pixels.
        readings, labels (`np.ndarray` of shape `(N,)`):
            Digits that were read, and that the prompts name.
        groups (`dict[str, np.ndarray]`):
            Name -> which of the images to report by themselves.
    """
    import numpy as np

    wins = (widths > reference_widths) + 0.5 * (widths == reference_widths)
    read = readings == labels
    return {
        "win_rate": wilson(float(wins.sum()), len(wins)),
        "win_rate_and_read": wilson(float((wins * read).sum()), len(wins)),
        "win_rate_by_group": {name: wilson(float(wins[rows].sum()), int(rows.sum())) for name, rows in groups.items()},
        "read": wilson(int(read.sum()), len(read)),
        "read_by_group": {name: wilson(int(read[rows].sum()), int(rows.sum())) for name, rows in groups.items()},
        "stroke_width": float(np.mean(widths)),
        "stroke_width_gain": float(np.mean(widths - reference_widths)),
    }


# ---- What a person looks at -----------------------------------------------------------------------------------------


def report(results: dict, setup: dict) -> str:
    """The table for the terminal."""
    lines = [
        f"{setup['images']} images of {setup['prompts']} held-out prompts, the same seeds for every model. A win is a "
        "wider",
        "stroke than the reference's image of the same prompt and seed; 95 % interval in brackets.",
        "",
        f"  {'':<30}{'wins over reference':<26}{'stroke width':<14}{'read as its digit':<20}{'chosen gap':>10}",
    ]
    for name, result in results.items():
        wins = gap = ""
        if name != REFERENCE:
            rate, low, high = result["win_rate"]
            wins = f"{rate:6.1%} [{low:.1%}, {high:.1%}]"
            gap = f"{result['eval'][-1]['gaps/chosen']:+.4f}"
        read = f"{result['read'][0]:.1%}"
        lines.append(f"  {name:<30}{wins:<26}{result['stroke_width']:>5.2f} px      {read:<20}{gap:>10}".rstrip())
    real = setup["real_digits_read"]
    lines += [
        "",
        f"  Of real digits that it has not seen, the reader reads {real:.1%}. The chosen gap is the policy's "
        "denoising error",
        "  at held-out chosen images minus the reference's: above 0 it has become worse at what it is to prefer.",
    ]
    return "\n".join(lines)


_STYLES = (("#3b6fb6", "-"), ("#79a6dc", "--"), ("#d9822b", "-"), ("#b0413e", "--"), ("#8a8a8a", "-."))


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.grid": False})
    return plt


def _save(figure, path: Path) -> None:
    """A PNG of 256 colors, a third of the size."""
    import matplotlib.pyplot as plt
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def plot_grid(path: Path, images: dict, columns: list[int], prompts: list[tuple[int, int]], results: dict) -> None:
    """The first seed of one held-out prompt of each digit: a row a model, the reference on top."""
    from digits import NAMES

    plt = _pyplot()
    figure, axes = plt.subplots(
        len(images), len(columns), figsize=(0.82 * len(columns) + 2.6, 0.83 * len(images) + 0.62), dpi=110
    )
    figure.subplots_adjust(left=0.235, right=0.99, top=1 - 0.58 / figure.get_figheight(), bottom=0.02)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    for row, (name, pictures) in zip(axes, images.items(), strict=True):
        for axis, column in zip(row, columns, strict=True):
            axis.imshow(pictures[column], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            new = prompts[column][0] in HELD_OUT_DIGITS
            axis.spines[:].set(color="#d9822b" if new else "#c8c8c8", linewidth=1.2 if new else 0.6)
        label = f"stroke {results[name]['stroke_width']:.1f} px, read {results[name]['read'][0]:.1%}"
        if name != REFERENCE:
            label += f"\nwins {results[name]['win_rate'][0]:.1%}"
        row[0].annotate(name, (-0.12, 0.72), xycoords="axes fraction", ha="right", weight="bold")
        row[0].annotate(label, (-0.12, 0.60), xycoords="axes fraction", ha="right", va="top", fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(NAMES[prompts[column][0]], fontsize=9, weight="normal", pad=3)
    figure.suptitle(
        "Bold strokes preferred over thin: the same prompts and seeds (orange: digits that are in no pair)",
        fontsize=10.5,
        weight="bold",
        y=1 - 0.1 / figure.get_figheight(),
    )
    _save(figure, path)


def plot_curves(path: Path, results: dict, count: int) -> None:
    """Preference, legibility and the gap of the chosen images, over the training."""
    plt = _pyplot()
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.5), dpi=110)
    reference = results[REFERENCE]
    for (name, result), (color, line) in zip(list(results.items())[1:], _STYLES, strict=True):
        style = {"color": color, "marker": "o", "ms": 3.5, "ls": line, "label": name}
        curve = result["curve"]
        steps = [point["step"] for point in curve]
        axes[0].plot(steps, [100 * point["win_rate"][0] for point in curve], **style)
        axes[1].plot(steps, [point["stroke_width"] for point in curve], **style)
        axes[2].plot(steps, [100 * point["read"][0] for point in curve], **style)
        axes[3].plot(
            [entry["step"] for entry in result["eval"]], [entry["gaps/chosen"] for entry in result["eval"]], **style
        )
    axes[0].axhline(50, color="#8a8a8a", lw=0.8, ls=":")
    axes[0].set(title="Wins over the reference (%)", ylim=(0, 103))
    axes[1].set(title="Stroke width (pixels)")
    axes[2].axhline(100 * reference["curve"][0]["read"][0], color="#8a8a8a", lw=0.8, ls=":")
    axes[2].set(title="Read as their digit (%)", ylim=(0, 103))
    axes[3].axhline(0, color="#8a8a8a", lw=0.8, ls=":")
    axes[3].set(title="Chosen gap (denoising error)")
    for axis in axes:
        axis.set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
    figure.suptitle(f"{count} images of held-out prompts at each checkpoint, the same seeds throughout", fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    _save(figure, path)


# ---- The run --------------------------------------------------------------------------------------------------------


def quieten() -> None:
    """Silences messages of the libraries about their own options."""
    import warnings

    import datasets
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Warnings(logging.Handler):
    """Collects the trainers' warnings, to print them later."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        logging.getLogger("trl_ext").addHandler(self)
        logging.getLogger("trl_ext").propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def tell(self) -> None:
        for message in self.messages:
            print(textwrap.indent(textwrap.fill(f"its warning: {message}", 108), " " * 8))
        self.messages.clear()


class Stopwatch:
    """Announces the parts of the run and records how long each took."""

    def __init__(self, parts: int):
        self.parts, self.seconds, self.start = parts, {}, time.time()

    def begin(self, name: str, text: str) -> None:
        self.end()
        self._current, self._since = name, time.time()
        print(f"[{len(self.seconds) + 1}/{self.parts}] {text}", flush=True)

    def end(self) -> None:
        if hasattr(self, "_current"):
            self.seconds[self._current] = round(time.time() - self._since, 1)
            del self._current


def make_writer(options: argparse.Namespace, settings, watch: Stopwatch) -> tuple:
    """
    The first part of every demonstration on digits: a pipeline that writes them, from the cache if it is there.

    Returns:
        `tuple`: The output folder, the pipeline's folder, the settings of its training, the digits, and their reader.
    """
    from digits import Digits, Reader
    from digits_pipeline import PretrainingConfig, make_pipeline, pipeline_folder
    from quickstart_model import cache_root

    output_dir = Path(options.output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    config = PretrainingConfig(seed=options.seed, **settings.pretraining)
    folder = pipeline_folder(output_dir if options.trial else cache_root(), config)
    how = "trained by an earlier run" if folder.exists() else "training it on scikit-learn's (minutes; kept for later)"
    watch.begin("pipeline", f"A pipeline that writes digits: {how}")
    digits = Digits(options.seed)
    reader = Reader(digits, options.seed)
    make_pipeline(folder, digits, config)
    return output_dir, folder, config, digits, reader


def run(options: argparse.Namespace) -> None:
    import numpy as np

    quieten()
    warned = Warnings()
    from digits import caption, stroke_width

    settings = TRIAL if options.trial else Settings()
    watch = Stopwatch(5)
    output_dir, folder, config, digits, reader = make_writer(options, settings, watch)
    reference = load_pipeline(folder)
    real = digits.draw(digits.test, np.random.default_rng(options.seed).uniform(-1.2, 1.2, len(digits.test)))
    real_read = float(np.mean(reader.read(real) == digits.labels[digits.test]))

    watch.begin("pairs", "Preference pairs from its own samples: bold over thin, for some digits and wordings")
    # Seeds of training images, of held-out images and of different runs do not overlap.
    first_seed = 1_000_000 * options.seed
    training = [prompt for prompt in training_prompts() for _ in range(settings.images_per_prompt)]
    samples = sample(
        reference, [caption(*p) for p in training], range(first_seed, first_seed + len(training)), settings
    )
    widths = stroke_width(samples)
    readable = reader.read(samples) == [digit for digit, _ in training] if settings.readable_only else widths >= 0
    pairs, chosen = make_pairs(samples, [caption(*p) for p in training], widths, readable)
    print(
        f"      {len(pairs)} pairs for {len(training_prompts())} prompts; strokes of "
        f"{widths[chosen[:, 0]].mean():.1f} pixels over {widths[chosen[:, 1]].mean():.1f}",
        flush=True,
    )

    watch.begin("reference", "What the pipeline makes of held-out prompts")
    prompts = [prompt for prompt in held_out_prompts() for _ in range(settings.seeds_per_prompt)]
    texts = [caption(*prompt) for prompt in prompts]
    seeds = range(first_seed + 500_000, first_seed + 500_000 + len(prompts))
    labels = np.array([digit for digit, _ in prompts])
    new_digit = np.isin(labels, HELD_OUT_DIGITS)
    groups = {"known digits in new words": ~new_digit, "new digits": new_digit}
    images = {REFERENCE: sample(reference, texts, seeds, settings)}
    reference_widths, readings = stroke_width(images[REFERENCE]), reader.read(images[REFERENCE])
    readable = readings == labels if settings.readable_only else reference_widths >= 0
    held_out_pairs, _ = make_pairs(images[REFERENCE], texts, reference_widths, readable)
    in_curve = np.arange(len(prompts)) % settings.seeds_per_prompt < settings.curve_seeds

    def point(step: int, model_images) -> dict:
        model_widths = stroke_width(model_images)
        rows = {name: group[in_curve] for name, group in groups.items()}
        return {
            "step": step,
            **compare(model_widths, reference_widths[in_curve], reader.read(model_images), labels[in_curve], rows),
        }

    start = point(0, images[REFERENCE][in_curve])
    results = {
        REFERENCE: {**compare(reference_widths, reference_widths, readings, labels, groups), "curve": [start]},
    }

    watch.begin("training", f"Aligning: {len(RUNS)} runs of {settings.max_steps} steps from the same start")
    curve_texts = [text for text, keep in zip(texts, in_curve, strict=True) if keep]
    curve_seeds = [seed for seed, keep in zip(seeds, in_curve, strict=True) if keep]
    for name in RUNS:
        since = time.time()
        adapter, log = train(name, folder, pairs, held_out_pairs, output_dir, settings, options.seed)
        train_seconds = time.time() - since
        curve = [start]
        for step in range(settings.checkpoint_steps, settings.max_steps + 1, settings.checkpoint_steps):
            policy = load_pipeline(folder, adapter / f"checkpoint-{step}")
            curve.append(point(step, sample(policy, curve_texts, curve_seeds, settings)))
        images[name] = sample(load_pipeline(folder, adapter), texts, seeds, settings)
        model_widths = stroke_width(images[name])
        evaluations = [
            {key: entry[f"eval_{key}"] for key in EVAL_METRICS} | {"step": entry["step"]}
            for entry in log
            if "eval_loss" in entry
        ]
        results[name] = {
            "settings": RUNS[name],
            **compare(model_widths, reference_widths, reader.read(images[name]), labels, groups),
            "curve": curve,
            "eval": evaluations,
            "seconds": round(train_seconds, 1),
        }
        print(
            f"      {name}: trained in {train_seconds:.0f} s, sampled in {time.time() - since - train_seconds:.0f} s",
            flush=True,
        )
        warned.tell()

    watch.begin("report", "Report\n")
    setup = {
        "images": len(prompts),
        "prompts": len(held_out_prompts()),
        "pairs": len(pairs),
        "held_out_pairs": len(held_out_pairs),
        "chosen_stroke_width": float(widths[chosen[:, 0]].mean()),
        "rejected_stroke_width": float(widths[chosen[:, 1]].mean()),
        "real_digits_read": real_read,
        "held_out": {"digits": HELD_OUT_DIGITS, "wordings": HELD_OUT_WORDINGS},
        "settings": asdict(settings),
        "pretraining": asdict(config),
        "seed": options.seed,
    }
    # One prompt of each digit, in a held-out wording, its first seed.
    shown = [i for i, prompt in enumerate(prompts) if prompt[1] == HELD_OUT_WORDINGS[0]][:: settings.seeds_per_prompt]
    plot_grid(output_dir / "grid.png", images, shown, prompts, results)
    plot_curves(output_dir / "curves.png", results, len(curve_texts))
    watch.end()
    text = report(results, setup)
    minutes = (time.time() - watch.start) / 60
    numbers = {"setup": setup, "results": results, "seconds": watch.seconds}
    (output_dir / "report.txt").write_text(text + "\n", encoding="utf-8")
    (output_dir / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(text)
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
