"""
What a gold label buys: D2PO, online DPO with gold, online DPO with a fixed discriminator, and offline DPO, at equal
numbers of gold labels, on the word collector (SmolLM2-135M).

    python recipes/experiments/d2po_word_collector.py --output_dir outputs/d2po-word-collector

Every arm of a seed may spend `--labels` gold comparisons:

- `offline`: DPO on that many pairs sampled from the initial policy and labeled.
- `static`: a discriminator trained on the same pairs, then online DPO in its order.
- `d2po`: a discriminator trained on the first `--warm_start` of them, then D2PO, which buys the rest as it goes.
- `online`: online DPO, every pair labeled by gold, until the labels are used up.

All but `online`, which ends with its labels, take the same number of optimizer steps. The gold reward (words
collected, 0 to 30) is measured on held-out prompts, the same for all, on `--eval_samples` completions each, sampled as
in training.

A seed takes about three quarters of an hour of one CPU core; with `OMP_NUM_THREADS=1`, two seeds run side by side
(`--seeds 0` and `--seeds 1`, the same folder).

Writes `results.json` (every number), `results.png` and a table. Runs that are in `results.json` are not repeated, and
an interrupted one goes on from its last checkpoint.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

ARMS = ("d2po", "online", "static", "offline")
TITLES = {
    "d2po": "D2PO",
    "online": "online DPO, gold on every pair",
    "static": "online DPO, fixed discriminator",
    "offline": "offline DPO",
}

REQUESTS = (
    "Explain {} to a beginner.",
    "Give me advice about {}.",
    "What should I know about {}?",
    "Write a short note on {}.",
    "How do I get better at {}?",
    "List a few facts about {}.",
    "Why does {} matter?",
    "Help me plan my time for {}.",
)
SUBJECTS = (
    "gardening|chess|cooking pasta|learning Spanish|saving money|running|photography|writing emails|the water "
    "cycle|volcanoes|public speaking|job interviews|reading more books|healthy sleep|repairing a bicycle|training a "
    "dog|playing the guitar|the history of Rome|black holes|baking bread|hiking|time management|online "
    "safety|recycling|making friends|meditation|solar power|painting|mathematics exams|writing poems|the human "
    "heart|computer programs|travel in winter|coffee|bees|first aid|swimming|electric cars|keeping a diary|house "
    "plants|learning the piano|moving to a new city|cleaning windows|football|astronomy|family "
    "meals|spreadsheets|camping with children"
).split("|")
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def make_prompts() -> tuple[list[str], list[str]]:
    """Training and held-out prompts; no subject is in both."""
    held_out = SUBJECTS[::6]
    rows = {False: [], True: []}
    for subject in SUBJECTS:
        for request in REQUESTS:
            rows[subject in held_out].append(PROMPT.format(request.format(subject)))
    return rows[False], rows[True]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/d2po-word-collector")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--labels", type=int, default=96, help="gold comparisons of each arm")
    parser.add_argument("--warm_start", type=int, default=32, help="of these, bought before D2PO begins")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parser.add_argument("--window", type=int, default=16, help="pairs of a window")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--discriminator_learning_rate", type=float, default=5e-4)
    parser.add_argument("--discriminator_epochs", type=int, default=1, help="passes over each window's labels")
    parser.add_argument("--warm_start_epochs", type=int, default=3)
    parser.add_argument("--eval_every", type=int, default=8, help="steps")
    parser.add_argument("--eval_prompts", type=int, default=64)
    parser.add_argument("--eval_samples", type=int, default=2)
    parser.add_argument("--model", help="in place of SmolLM2-135M-Instruct")
    parser.add_argument("--plot_only", action="store_true")
    arguments = parser.parse_args()
    if arguments.labels % arguments.pairs or arguments.window % arguments.pairs:
        parser.error(f"--labels and --window must be multiples of --pairs ({arguments.pairs})")
    if not 0 < arguments.warm_start < arguments.labels:
        parser.error("--warm_start must be between 0 and --labels")
    online_steps = arguments.steps * arguments.pairs // arguments.window
    arguments.labels_per_window = max(1, round((arguments.labels - arguments.warm_start) / online_steps))
    return arguments


class Experiment:
    """The runs of one setting; `folder` holds everything they write."""

    def __init__(self, arguments):
        from quickstart_model import quickstart_model

        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = arguments.model or quickstart_model()
        self.train_prompts, held_out = make_prompts()
        self.held_out = held_out[: arguments.eval_prompts]
        self.path = self.folder / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    # ---- What the arms share ----------------------------------------------------------------------------------------

    def _prompts(self):
        from datasets import Dataset

        return Dataset.from_dict({"prompt": self.train_prompts})

    def _settings(self, name: str, seed: int, **options) -> dict:
        import torch

        arguments, cuda = self.arguments, torch.cuda.is_available()
        return dict(
            output_dir=str(self.folder / f"{name}-{seed}"),
            seed=seed,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.pairs,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant",
            beta=arguments.beta,
            max_length=96 + arguments.new_tokens,
            gradient_checkpointing=False,
            use_cpu=not cuda,
            bf16=cuda,
            logging_steps=1,
            save_strategy="steps",
            save_steps=arguments.eval_every,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            **options,
        )

    def _online_settings(self, name: str, seed: int, **options) -> dict:
        arguments = self.arguments
        options = {
            "window_size": arguments.window,
            "discriminator_learning_rate": arguments.discriminator_learning_rate,
            "discriminator_batch_size": 8,
            "discriminator_epochs": arguments.discriminator_epochs,
            "warm_start_epochs": arguments.warm_start_epochs,
            **options,
        }
        return self._settings(name, seed, max_completion_length=arguments.new_tokens, **options)

    @staticmethod
    def _lora():
        from peft import LoraConfig

        return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")

    @staticmethod
    def _gold():
        from trl_ext.d2po.gold_tasks import word_collector

        return word_collector

    def _offline_pairs(self, seed: int):
        """
        The labeled pairs of the initial policy, which are one window of an online run that does not learn; with the
        ties, which cost labels as well.
        """
        from datasets import Dataset

        from trl_ext import D2POConfig, D2POTrainer
        from trl_ext.d2po import Ledger

        labels, folder = self.arguments.labels, self.folder / f"labels-{seed}"
        ledger = folder / "gold_labels.jsonl"
        if not ledger.exists() or len(Ledger(ledger, read_only=True)) < labels:
            options = dict(window_size=labels, labels_per_window=labels, discriminator="none", max_steps=1)
            settings = {
                **self._online_settings("labels", seed),
                **options,
                "learning_rate": 0.0,
                "save_strategy": "no",
            }
            trainer = D2POTrainer(
                self.model,
                args=D2POConfig(**settings),
                train_dataset=self._prompts(),
                peft_config=self._lora(),
                gold_labeller=self._gold(),
            )
            trainer.train(resume_from_checkpoint=True)

        def decisive(count: int):
            rows = []
            for entry in Ledger(ledger, read_only=True).entries[:count]:
                if entry["verdict"] in (0.0, 1.0):
                    chosen, rejected = ("a", "b") if entry["verdict"] else ("b", "a")
                    row = {"prompt_ids": entry["prompt_ids"], "chosen_ids": entry[f"completion_{chosen}_ids"]}
                    rows.append({**row, "rejected_ids": entry[f"completion_{rejected}_ids"]})
            return Dataset.from_list(rows)

        return decisive

    # ---- The arms ---------------------------------------------------------------------------------------------------

    def _make_trainer(self, arm: str, seed: int):
        from trl_ext import D2POConfig, D2POTrainer, FDPOConfig, FDPOTrainer

        arguments = self.arguments
        if arm == "offline":
            data = self._offline_pairs(seed)(arguments.labels)
            return FDPOTrainer(
                self.model,
                args=FDPOConfig(**self._settings(arm, seed)),
                train_dataset=data,
                peft_config=self._lora(),
            )
        common = dict(train_dataset=self._prompts(), peft_config=self._lora())
        if arm == "online":
            settings = self._online_settings(
                arm, seed, discriminator="none", labels_per_window=arguments.window, label_budget=arguments.labels
            )
            return D2POTrainer(self.model, args=D2POConfig(**settings), gold_labeller=self._gold(), **common)
        pairs = self._offline_pairs(seed)
        if arm == "static":
            settings = self._online_settings(arm, seed, label_budget=0)
            # Gold is free here, so its agreement with the discriminator can be logged; nothing is bought.
            return D2POTrainer(
                self.model,
                args=D2POConfig(**settings),
                gold_labeller=self._gold(),
                discriminator_dataset=pairs(arguments.labels),
                **common,
            )
        settings = self._online_settings(
            arm,
            seed,
            labels_per_window=arguments.labels_per_window,
            label_budget=arguments.labels - arguments.warm_start,
        )
        return D2POTrainer(
            self.model,
            args=D2POConfig(**settings),
            gold_labeller=self._gold(),
            discriminator_dataset=pairs(arguments.warm_start),
            **common,
        )

    def run(self, arm: str, seed: int) -> None:
        from laboratory import provenance
        from transformers import TrainerCallback

        from trl_ext.d2po.generation import CompletionSampler
        from trl_ext.d2po.gold_tasks import word_collector

        arguments, key = self.arguments, f"{arm}-{seed}"
        if key in self.results:
            return
        started = time.time()
        trainer = self._make_trainer(arm, seed)
        tokenizer = trainer.processing_class
        sampler = CompletionSampler(
            trainer,
            tokenizer,
            max_new_tokens=arguments.new_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=None,
            settings={},
            batch_size=64,
        )
        prompt_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in self.held_out]
        # Beside the checkpoints, so that a resumed run has what was measured before.
        measured_path = Path(trainer.args.output_dir) / "held_out.json"
        measured = json.loads(measured_path.read_text()) if measured_path.exists() else {}

        def labels() -> int:
            bought = len(trainer.gold.used) if arm in ("d2po", "online") else 0
            return bought + {"d2po": arguments.warm_start, "online": 0}.get(arm, arguments.labels)

        def measure(step: int) -> None:
            groups = sampler(prompt_ids, arguments.eval_samples, [("held out", i) for i in range(len(prompt_ids))])
            rewards = [statistics.fmean(word_collector(None, [c.text for c in group])) for group in groups]
            measured[str(step)] = {"labels": labels(), "rewards": rewards}
            measured_path.parent.mkdir(parents=True, exist_ok=True)
            measured_path.write_text(json.dumps(measured))
            print(f"{key}: step {step}, {labels()} labels, gold reward {statistics.fmean(rewards):.2f}", flush=True)

        class HeldOut(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % arguments.eval_every == 0 or state.global_step == state.max_steps:
                    measure(state.global_step)

            def on_train_end(self, args, state, control, **kwargs):
                if str(state.global_step) not in measured:
                    measure(state.global_step)

        if "0" not in measured:
            measure(0)
        trainer.add_callback(HeldOut())
        if arm == "offline":
            from transformers.trainer_utils import get_last_checkpoint

            folder = Path(trainer.args.output_dir)
            trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
        else:
            trainer.train(resume_from_checkpoint=True)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged = ("d2po/gold_labels", "d2po/gold_accuracy", "d2po/silver_accuracy", "d2po/gold_reward", "d2po/kl")
        record = {
            "arm": arm,
            "seed": seed,
            "held_out": {step: measured[step] for step in sorted(measured, key=int)},
            "log": [{"step": e["step"], **{name: e[name] for name in logged if name in e}} for e in history],
            "seconds": round(time.time() - started, 1),
            "settings": {
                name: value for name, value in vars(arguments).items() if name not in ("output_dir", "model")
            },
            **provenance(),
        }
        # Another process may have added its seed's runs since.
        self.results = (json.loads(self.path.read_text()) if self.path.exists() else {}) | {key: record}
        self.path.write_text(json.dumps(self.results, indent=1))


# ---- What came out --------------------------------------------------------------------------------------------------


def averaged(results: dict, arm: str) -> list[tuple[int, int, list[float]]]:
    """
    Step, labels and each held-out prompt's reward, averaged over the seeds, at every measurement that all seeds have.
    """
    runs = [run["held_out"] for run in results.values() if run["arm"] == arm]
    if not runs:
        return []
    steps = sorted(set.intersection(*(set(run) for run in runs)), key=int)
    return [
        (
            int(step),
            round(statistics.fmean(run[step]["labels"] for run in runs)),
            [statistics.fmean(values) for values in zip(*(run[step]["rewards"] for run in runs), strict=True)],
        )
        for step in steps
    ]


def accuracy_by_windows(runs: list[dict], group: int = 4) -> list[tuple[float, float, float]]:
    """
    The discriminator's accuracy on fresh pairs of `group` windows at a time, all seeds together: step, mean and
    standard error. Without the first window, whose prompts and policy are those of the labels that it was trained on
    before.
    """
    points = []
    for run in runs:
        found = {e["step"]: e["d2po/silver_accuracy"] for e in run["log"] if "d2po/silver_accuracy" in e}
        per_window = run["settings"]["window"] // run["settings"]["pairs"]
        points += [(step // per_window, step, value) for step, value in found.items() if step % per_window == 0]
    grouped: dict[int, list] = {}
    for window, step, value in points:
        if window > 1:
            grouped.setdefault((window - 1) // group, []).append((step, value))
    return [
        (
            statistics.fmean(step for step, _ in found),
            statistics.fmean(value for _, value in found),
            statistics.stdev(value for _, value in found) / len(found) ** 0.5 if len(found) > 1 else 0.0,
        )
        for _, found in sorted(grouped.items())
    ]


def report(folder: Path, results: dict) -> None:
    """Prints a table and draws the plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sentiment import mean_ci

    figure, (by_labels, by_step, accuracy) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    print("\n| arm | gold labels | steps | gold reward, held out (95% interval over prompts) | by seed |")
    print("| --- | ---: | ---: | --- | --- |")
    for color, arm in enumerate(ARMS):
        rows = averaged(results, arm)
        if not rows:
            continue
        style = {"color": f"C{color}", "label": TITLES[arm], "marker": "o", "markersize": 3}
        intervals = [mean_ci(rewards) for _, _, rewards in rows]
        means = [mean for mean, _, _ in intervals]
        bands = [low for _, low, _ in intervals], [high for _, _, high in intervals]
        steps, labels = [row[0] for row in rows], [row[1] for row in rows]
        by_step.plot(steps, means, **style)
        by_step.fill_between(steps, *bands, alpha=0.15, color=style["color"])
        if arm in ("d2po", "online"):
            by_labels.plot(labels, means, **style)
            by_labels.fill_between(labels, *bands, alpha=0.15, color=style["color"])
        else:
            mean, low, high = intervals[-1]
            by_labels.errorbar([labels[-1]], [mean], yerr=[[mean - low], [high - mean]], capsize=3, **style)
        runs = [run for run in results.values() if run["arm"] == arm]
        points = accuracy_by_windows(runs)
        if points:
            at, values, errors = zip(*points, strict=True)
            accuracy.errorbar(at, values, yerr=errors, capsize=3, **style)
        finals = ", ".join(f"{statistics.fmean(list(run['held_out'].values())[-1]['rewards']):.2f}" for run in runs)
        mean, low, high = intervals[-1]
        print(f"| {TITLES[arm]} | {labels[-1]} | {steps[-1]} | {mean:.2f} ({low:.2f} to {high:.2f}) | {finals} |")
    collected = "words collected on held-out prompts"
    by_labels.set(xlabel="gold labels bought", ylabel=collected, title="Reward against labels\n(95% intervals)")
    by_step.set(xlabel="optimizer step", ylabel=collected, title="Reward against steps\n(95% intervals)")
    accuracy.set(xlabel="optimizer step", ylabel="share of fresh pairs in gold's order", ylim=(0.3, 0.9))
    accuracy.set_title("Accuracy of the discriminators\n(four windows a point, one standard error)")
    accuracy.axhline(0.5, color="gray", linewidth=0.8)
    by_step.legend(fontsize=8)
    for axis in figure.axes:
        axis.title.set_fontsize(11)
    figure.savefig(folder / "results.png", dpi=150, bbox_inches="tight", pad_inches=0.15)
    print(f"\nPlot and numbers are in {folder}.")


def main() -> None:
    arguments = parse_arguments()
    folder = Path(arguments.output_dir)
    if not arguments.plot_only:
        experiment = Experiment(arguments)
        for seed in arguments.seeds:
            for arm in arguments.arms:
                experiment.run(arm, seed)
    report(folder, json.loads((folder / "results.json").read_text()))


if __name__ == "__main__":
    main()
