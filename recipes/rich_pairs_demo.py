"""
Rich preference pairs that one can see: `python3 recipes/rich_pairs_demo.py` has a critic and an editor make pairs of
handwritten digits, and compares what a small pipeline learns from them with what it learns from the best and the worst
of its own samples, at equal numbers of pairs.

    python3 recipes/rich_pairs_demo.py [--output_dir DIR] [--seed N]

The pipeline is that of `recipes/diffusion_demo.py`, trained by the first run of either, which takes about 10 minutes of
a core; the rest takes about 15. `recipes/rich_pairs_demo.md` explains what is compared and shows what came out.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path


RECIPES = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPES))
INSIDE = "TRL_EXT_RICH_PAIRS_DEMO"

SAMPLES = 16  # of each training prompt, for critic and editor; best-and-worst pairs are made from twice as many
WIDE = 5.2  # pixels: the critic finds thinner strokes too thin
PEN = 0.45  # pixels by which the editor moves the outline of the ink outward
STRENGTH = 0.6  # share of the noise from which an image is drawn anew
THICKEN, REDRAW = "Thicken the strokes", "Redraw it as the digit {}"

OPTIONS = {"method": "diffusion_dpo", "beta": 2000.0, "safeguard_mu": 0.9}
BEST, RICH, SIGNED, TRIP = "best and worst", "critique and edit", "both through the editor", "editor's round trip only"


class RulerAndReader:
    """The critic: reads the digit and measures the strokes. It sees the column `digit` of the prompts."""

    def __init__(self, reader):
        self.reader = reader

    def __call__(self, prompts, images, digit):
        from digits import NAMES, stroke_width

        from trl_ext.diffusion import Critique

        papers = as_papers(images)
        critiques = []
        for read, width, wanted in zip(self.reader.read(papers), stroke_width(papers), digit, strict=True):
            if read != wanted:
                text = f"It reads as {NAMES[read]}."
                critiques.append(Critique(text, [REDRAW.format(NAMES[wanted])]))
            elif width < WIDE:
                critiques.append(Critique(f"The strokes are thin, {width:.1f} pixels.", [THICKEN]))
            else:
                critiques.append(Critique("Bold and legible."))
        return critiques


class DigitEditor:
    """
    The editor: moves the outline of the ink, or draws the digit anew from noise with the pipeline's own image-to-image
    sampler. An empty instruction moves the outline by nothing, which leaves the sharp edge of every edit.
    """

    def __init__(self, pipeline, settings):
        from diffusers import StableDiffusionImg2ImgPipeline

        self.pipeline = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.settings = settings

    def __call__(self, images, instructions, prompts):
        edits = []
        for image, instruction, prompt in zip(images, instructions, prompts, strict=True):
            if instruction in ("", THICKEN):
                edits.append(as_image(move_outline(as_papers([image])[0], PEN if instruction else 0.0)))
            else:
                edits.append(self._redraw(image, prompt))
        return edits

    def _redraw(self, image, prompt):
        import torch

        return self.pipeline(
            prompt,
            image=image,
            strength=STRENGTH,
            num_inference_steps=max(2, self.settings.inference_steps),
            guidance_scale=self.settings.guidance_scale,
            generator=torch.Generator().manual_seed(0),
        ).images[0]


def as_papers(images):
    """Pictures as arrays of shape `(N, H, W)`: 0 is ink and 1 is paper."""
    import numpy as np

    return np.stack([np.asarray(image.convert("RGB"), dtype=np.float32).mean(-1) / 255 for image in images])


def as_image(paper):
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.clip(paper, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")


def move_outline(paper, pen: float):
    """A drawing with the outline of its ink moved outward by `pen` pixels, drawn as `Digits.draw` draws it."""
    import numpy as np
    from digits import EDGE, FINE, SIZE
    from scipy import ndimage

    fine = ndimage.zoom(paper, FINE, order=1, grid_mode=True, mode="nearest")
    ink = fine < (fine.min() + fine.max()) / 2
    outline = (ndimage.distance_transform_edt(ink) - ndimage.distance_transform_edt(~ink)) / FINE + pen
    drawn = 1 / (1 + np.exp(np.clip(outline / EDGE, -30, 30)))
    return drawn.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))


class WidthIfRead:
    """The reward: the width of the strokes in pixels, -1 for an image that is not read as its digit."""

    name = "width_if_read"

    def __init__(self, reader):
        self.reader = reader

    def __call__(self, images, digit):
        import numpy as np
        from digits import stroke_width

        papers = as_papers(images)
        return np.where(self.reader.read(papers) == np.asarray(digit), stroke_width(papers), -1.0).tolist()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/rich-pairs-demo", help="folder for images, numbers, adapters")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--trial", action="store_true", help="a few seconds of each part, whose numbers mean nothing")
    return parser.parse_args()


def make_all_pairs(pipeline, reader, settings, folder: Path, first_seed: int, is_trial: bool):
    """Name of a run -> its pairs, all of one number; and the reports of those that were edited."""
    import numpy as np
    from datasets import Dataset
    from diffusion_demo import make_pairs, sample, training_prompts
    from digits import caption, stroke_width

    from trl_ext.diffusion import PipelineSampler, RichPairsReport, make_rich_pairs

    prompts = training_prompts()
    texts = [caption(*prompt) for prompt in prompts]
    dataset = Dataset.from_dict({"prompt": texts, "digit": [digit for digit, _ in prompts]})
    call = dict(num_inference_steps=settings.inference_steps, guidance_scale=settings.guidance_scale)
    samples = 2 if is_trial else SAMPLES
    parts = dict(
        sample=PipelineSampler(pipeline, batch_size=64, **call),
        critic=RulerAndReader(reader),
        editor=DigitEditor(pipeline, settings),
        # On a pipeline that has learned nothing nothing is read, and any edit will do.
        reward=None if is_trial else WidthIfRead(reader),
        keep="all" if is_trial else "either",
    )
    common = dict(samples_per_prompt=samples, batch_size=64, cache_dir=folder, seed=first_seed + 250_000)
    pairs, reports = {}, {}
    for name, options in ((RICH, {"round_trip_images": 10_000}), (SIGNED, {"round_trip_rejected": True})):
        reports[name] = RichPairsReport()
        pairs[name] = make_rich_pairs(dataset, **parts, **common, **options, report=reports[name])
    # What the editor does whatever it is told, preferred to the original.
    parts |= dict(critic=says_nothing, reward=None, keep="all")
    pairs[TRIP] = make_rich_pairs(dataset, **parts, **common)

    own = [prompt for prompt in prompts for _ in range(2 * samples)]
    texts = [caption(*prompt) for prompt in own]
    images = sample(pipeline, texts, range(first_seed, first_seed + len(own)), settings)
    widths = stroke_width(images)
    readable = reader.read(images) == [digit for digit, _ in own] if settings.readable_only else widths >= 0
    pairs[BEST], _ = make_pairs(images, texts, widths, readable)
    count = min(len(data) for data in pairs.values())
    order = np.random.default_rng(first_seed)
    chosen = {name: data.select(sorted(order.permutation(len(data))[:count])) for name, data in pairs.items()}
    return {name: chosen[name] for name in (BEST, RICH, SIGNED, TRIP)}, reports


def says_nothing(prompts, images):
    """A critic whose only instruction is the empty one."""
    from trl_ext.diffusion import Critique

    return [Critique("", [""]) for _ in images]


def facts_of(data) -> dict:
    """How the two images of the pairs differ."""
    import numpy as np
    from digits import stroke_width

    from trl_ext.diffusion.rich_pairs import pixel_distance

    chosen, rejected = as_papers(data["chosen"]), as_papers(data["rejected"])
    return {
        "distance": float(np.mean([pixel_distance(row["chosen"], row["rejected"]) for row in data])),
        "chosen_width": float(stroke_width(chosen).mean()),
        "rejected_width": float(stroke_width(rejected).mean()),
    }


def plot(path: Path, pairs: dict, images: dict, shown: list[int], results: dict) -> None:
    """Four pairs of each kind beside what the run makes of one held-out prompt of each digit."""
    import numpy as np
    from diffusion_demo import REFERENCE, _pyplot, _save

    plt = _pyplot()
    names, columns = list(images), 9 + len(shown)
    figure, axes = plt.subplots(
        len(names), columns, figsize=(0.6 * columns + 2.4, 0.68 * len(names) + 0.6), dpi=110,
        gridspec_kw={"width_ratios": [1] * 8 + [0.5] + [1] * len(shown)},
    )  # fmt: skip
    figure.subplots_adjust(left=0.185, right=0.99, top=1 - 0.5 / figure.get_figheight(), bottom=0.02, wspace=0.05)
    for row, name in zip(axes, names, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_axis_off()
        if name in pairs:
            step = max(1, len(pairs[name]) // 4)
            for k, example in enumerate(pairs[name].select(range(0, len(pairs[name]), step)[:4])):
                for j, side in enumerate(("rejected", "chosen")):
                    axis = row[2 * k + j]
                    axis.imshow(as_papers([example[side]])[0], cmap="gray", vmin=0, vmax=1)
        for axis, i in zip(row[9:], shown, strict=True):
            axis.imshow(np.asarray(images[name][i]), cmap="gray", vmin=0, vmax=1)
        result = results[name]
        label = f"stroke {result['stroke_width']:.2f} px, read {result['read'][0]:.0%}"
        if name != REFERENCE:
            label += f"\nwins {result['win_rate'][0]:.1%}"
        row[0].annotate(
            name, (-0.15, 0.75), xycoords="axes fraction", ha="right", weight="bold", annotation_clip=False
        )
        row[0].annotate(
            label, (-0.15, 0.6), xycoords="axes fraction", ha="right", va="top", fontsize=8, annotation_clip=False
        )
    axes[0][3].annotate("rejected and chosen, four pairs", (0.5, 1.1), xycoords="axes fraction", ha="center")
    axes[0][9 + len(shown) // 2].annotate("held-out prompts", (0.5, 1.1), xycoords="axes fraction", ha="center")
    _save(figure, path)


def report(results: dict, setup: dict) -> str:
    from diffusion_demo import REFERENCE

    lines = [
        f"{setup['images']} images of {setup['prompts']} held-out prompts; {setup['pairs']} pairs for every run.",
        "",
        f"  {'':<26}{'distance in pairs':<20}{'wins over reference':<26}{'stroke width':<14}{'read':<9}{'chosen gap':>10}",
    ]
    for name, result in results.items():
        distance = wins = gap = ""
        if name != REFERENCE:
            distance, (rate, low, high) = f"{result['pairs']['distance']:.3f}", result["win_rate"]
            wins, gap = f"{rate:6.1%} [{low:.1%}, {high:.1%}]", f"{result['eval'][-1]['gaps/chosen']:+.4f}"
        lines.append(
            f"  {name:<26}{distance:<20}{wins:<26}{result['stroke_width']:>5.2f} px      {result['read'][0]:<9.1%}"
            f"{gap:>10}".rstrip()
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    import numpy as np
    from diffusion_demo import (
        EVAL_METRICS,
        HELD_OUT_DIGITS,
        HELD_OUT_WORDINGS,
        REFERENCE,
        TRIAL,
        Settings,
        Stopwatch,
        Warnings,
        compare,
        held_out_prompts,
        load_pipeline,
        make_pairs,
        make_writer,
        quieten,
        sample,
        train,
    )
    from digits import caption, stroke_width

    quieten()
    warned = Warnings()
    settings = TRIAL if options.trial else Settings()
    watch = Stopwatch(5)
    output_dir, folder, _, _, reader = make_writer(options, settings, watch)
    reference = load_pipeline(folder)

    watch.begin("pairs", "Pairs: the critic looks, the editor draws; and the best and the worst of more samples")
    first_seed = 1_000_000 * options.seed
    pairs, reports = make_all_pairs(reference, reader, settings, output_dir / "rich", first_seed, options.trial)
    print("\n".join(f"      {line}" for line in str(reports[RICH]).splitlines()), flush=True)

    watch.begin("reference", "What the pipeline makes of held-out prompts")
    prompts = [prompt for prompt in held_out_prompts() for _ in range(settings.seeds_per_prompt)]
    texts = [caption(*prompt) for prompt in prompts]
    seeds = range(first_seed + 500_000, first_seed + 500_000 + len(prompts))
    labels = np.array([digit for digit, _ in prompts])
    groups = {"new digits": np.isin(labels, HELD_OUT_DIGITS), "known digits": ~np.isin(labels, HELD_OUT_DIGITS)}
    images = {REFERENCE: sample(reference, texts, seeds, settings)}
    widths, readings = stroke_width(images[REFERENCE]), reader.read(images[REFERENCE])
    readable = readings == labels if settings.readable_only else widths >= 0
    held_out_pairs, _ = make_pairs(images[REFERENCE], texts, widths, readable)
    results = {REFERENCE: compare(widths, widths, readings, labels, groups)}

    watch.begin("training", f"Aligning: {len(pairs)} runs of {settings.max_steps} steps from the same start")
    for name, data in pairs.items():
        own = data.select_columns(["prompt", "chosen", "rejected"])
        adapter, log = train(name, folder, own, held_out_pairs, output_dir, settings, options.seed, OPTIONS)
        images[name] = sample(load_pipeline(folder, adapter), texts, seeds, settings)
        evaluations = [
            {key: entry[f"eval_{key}"] for key in EVAL_METRICS} | {"step": entry["step"]}
            for entry in log
            if "eval_loss" in entry
        ]
        model_widths = stroke_width(images[name])
        compared = compare(model_widths, widths, reader.read(images[name]), labels, groups)
        results[name] = {**compared, "pairs": facts_of(data), "eval": evaluations}
        print(f"      {name}: strokes of {model_widths.mean():.2f} pixels", flush=True)
        warned.tell()

    watch.begin("report", "Report\n")
    setup = {
        "images": len(prompts),
        "prompts": len(held_out_prompts()),
        "pairs": len(pairs[BEST]),
        "rich_pairs": {name: asdict(each) for name, each in reports.items()},
        "options": OPTIONS,
        "settings": asdict(settings),
        "seed": options.seed,
    }
    shown = [i for i, prompt in enumerate(prompts) if prompt[1] == HELD_OUT_WORDINGS[0]][:: settings.seeds_per_prompt]
    plot(output_dir / "pairs.png", pairs, images, shown, results)
    watch.end()
    text = report(results, setup)
    (output_dir / "report.txt").write_text(text + "\n", encoding="utf-8")
    numbers = {"setup": setup, "results": results, "seconds": watch.seconds}
    (output_dir / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    minutes = (time.time() - watch.start) / 60
    print(f"{text}\n\n  {minutes:.1f} minutes; pairs and images: {output_dir / 'pairs.png'}; numbers: report.json")


def main() -> None:
    options = parse_args()
    if os.environ.get(INSIDE):
        return run(options)
    from setup_env import run_demo

    run_demo(__file__, INSIDE)


if __name__ == "__main__":
    main()
