"""
What the experiments share: one way to train a model from preference pairs, and one way to measure it.

A [`Run`] names a method, its options, data and seed; [`Laboratory.run`] trains it (LoRA on SmolLM2-135M-Instruct, the
sentiment pairs of the quickstart) and measures it on prompts and pairs that no run has trained on. What was measured
is kept, one JSON file a run, under a name that follows from everything that determines it: experiments share runs, and
an interrupted experiment goes on where it was.

Measured, always in float32 and with the same seeds for every run:

- on held-out pairs: log-probabilities and lengths of both responses (of the reference too), from which ranking
  accuracy, implicit rewards, calibration and difficulty follow; with `sequential_kl`, KL(reference || policy) summed
  over the tokens;
- on held-out prompts: one sample each at temperature 1 without truncation, its gold sentiment (VADER, -1 to 1),
  length, entropy, and KL(policy || reference) summed over its tokens.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

METHODS = {"fdpo": "FDPO", "tdpo": "TDPO", "mallows": "MallowsDPO", "rainbowpo": "RainbowPO", "simper": "SimPER"}


# What is kept of a run's log.
LOGGED = ("step", "loss", "grad_norm", "entropy", "kl/chosen", "kl/rejected", "rewards/accuracies", "rewards/margins")
LOGGED += ("logratios/chosen", "logratios/rejected", "ranking_accuracy/policy")


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment have in common."""

    max_steps: int = 24
    batch_size: int = 8  # pairs of a step
    learning_rate: float = 5e-4
    lora_rank: int = 16
    lora_layers: int = 10  # the last ones: the backward pass ends there
    max_length: int = 128
    held_out_pairs: int = 64
    held_out_prompts: int = 64
    max_new_tokens: int = 40
    model: str | None = None  # in place of SmolLM2-135M-Instruct


@dataclass(frozen=True)
class Run:
    """
    One training and its measurements.

    Args:
        method: A key of `METHODS`.
        options: Of the method's configuration, in place of the setting's.
        seed: Of adapter, order of the data, and simulated raters.
        raters: Whether chosen and rejected are as simulated raters would have it, see [`simulate_raters`].
        measure_at: Optimizer steps at which the model is measured besides the last.
        sequential_kl: Whether KL(reference || policy) on held-out pairs is measured.
        train_pairs: How many training pairs are measured like the held-out ones.
    """

    method: str
    options: dict = field(default_factory=dict)
    seed: int = 0
    raters: bool = False
    measure_at: tuple[int, ...] = ()
    sequential_kl: bool = False
    train_pairs: int = 0


def simulate_raters(rows: list[dict], seed: int) -> list[dict]:
    """
    The pairs as somebody would have collected them from one rater each, where raters agree on some prompts and not on
    others.

    Half of the prompts, drawn at random, are matters of fact and half are matters of taste. A rater prefers the
    response of the higher gold score with probability `sigmoid(sharpness * gap)`, with a sharpness of 6 in the first
    half and 0.5 in the second, so agreement varies with the gap, too. `dispersion`, 1 - |2p - 1|, is what many raters
    would have shown.
    """
    from sentiment import gold_scores

    generator = random.Random(f"raters {seed}")
    taste = {prompt: generator.random() < 0.5 for prompt in dict.fromkeys(row["prompt"] for row in rows)}
    rated = []
    for row in rows:
        chosen, rejected = gold_scores([row["chosen"], row["rejected"]])
        probability = 1 / (1 + math.exp(-(0.5 if taste[row["prompt"]] else 6.0) * (chosen - rejected)))
        if generator.random() >= probability:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        rated.append({**row, "dispersion": 1 - abs(2 * probability - 1), "taste": taste[row["prompt"]]})
    return rated


class Laboratory:
    """
    Runs and their measurements; `folder` keeps them.

    Args:
        folder: Where measurements are kept: a folder, or a packed file of what the published plots need, which is only
        read. setting: What all runs have in common. make: Whether runs that are not there are made; otherwise they are
        an error.
    """

    def __init__(self, folder: Path, setting: Setting, *, make: bool = True):
        self.folder, self.setting, self.make = Path(folder), setting, make
        self._kept: dict = {}
        if self.folder.is_file():
            packed = json.loads(gzip.decompress(self.folder.read_bytes()))
            self._kept = {self.folder / name: record for name, record in packed.items()}
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def model_path(self) -> str:
        from quickstart_model import quickstart_model

        return self.setting.model or quickstart_model()

    # ---- Data ------------------------------------------------------------------------------------------------------

    @staticmethod
    def rows(split: str) -> list[dict]:
        from sentiment import PAIRS_DIR

        with (PAIRS_DIR / f"{split}.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def held_out_prompts(self) -> list[str]:
        prompts = list(dict.fromkeys(row["prompt"] for row in self.rows("test")))
        return random.Random("prompts").sample(prompts, min(self.setting.held_out_prompts, len(prompts)))

    def held_out_pairs(self, count: int) -> list[dict]:
        rows = self.rows("test")
        return random.Random("pairs").sample(rows, min(count, len(rows)))

    # ---- Running ----------------------------------------------------------------------------------------------------

    def path(self, run: Run | None) -> Path:
        """Where a run's measurements are kept; `None` is the reference."""
        what = {"run": run and dataclasses.asdict(run), "setting": dataclasses.asdict(self.setting)}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / f"{'reference' if run is None else f'{run.method}-{run.seed}'}-{digest}.json"

    def run(self, run: Run) -> dict:
        """Trains and measures, or reads what was measured."""
        return self._cached(run, lambda: self._train(run))

    def reference(self) -> dict:
        """What is measured of the untrained model, on all pairs."""
        return self._cached(None, self._measure_reference)

    def _cached(self, run: Run | None, make: Callable[[], dict]) -> dict:
        path = self.path(run)
        if path not in self._kept and not path.exists():
            if not self.make:
                raise FileNotFoundError(f"{path} is not there: {run}")
            if self.folder.is_file():
                raise ValueError(
                    f"`--runs_dir {self.folder}` is a packed file without the run {path.name}, and nothing is added "
                    "to it. Give a folder, such as `--runs_dir outputs/claims`."
                )
            started = time.time()
            record = {"run": run and dataclasses.asdict(run), **make()}
            record |= {"seconds": round(time.time() - started, 1), **provenance()}
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(record))
            temporary.replace(path)
        if path not in self._kept:
            self._kept[path] = json.loads(path.read_text())
        return self._kept[path]

    def _load(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32).to(device)
        return model, AutoTokenizer.from_pretrained(self.model_path)

    def _measure_reference(self) -> dict:
        model, tokenizer = self._load()
        return {
            "pairs": self._of_pairs(model, tokenizer, self.held_out_pairs(len(self.rows("test"))), None),
            "samples": self._of_samples(model, tokenizer, None),
        }

    def _trainer(self, run: Run, folder: str):
        import torch
        from datasets import Dataset
        from peft import LoraConfig

        import trl_ext

        setting, name = self.setting, METHODS[run.method]
        model, tokenizer = self._load()
        rows = self.rows("train")
        if run.raters:
            rows = simulate_raters(rows, run.seed)
        columns = {"prompt", "chosen", "rejected", run.options.get("dispersion_column")}
        dataset = Dataset.from_list([{k: v for k, v in row.items() if k in columns} for row in rows])
        last = model.config.num_hidden_layers
        lora = LoraConfig(
            r=setting.lora_rank,
            lora_alpha=2 * setting.lora_rank,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(max(0, last - setting.lora_layers), last)),
        )
        options = dict(
            output_dir=folder,
            seed=run.seed,
            max_steps=setting.max_steps,
            per_device_train_batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_length=setting.max_length,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        config = getattr(trl_ext, f"{name}Config")(**options | run.options)
        return getattr(trl_ext, f"{name}Trainer")(
            model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
        )

    def _train(self, run: Run) -> dict:
        from transformers import TrainerCallback

        measured = {}
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(run, folder)
            laboratory, tokenizer = self, trainer.processing_class

            class Measuring(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step in run.measure_at or state.global_step == state.max_steps:
                        model = trainer.accelerator.unwrap_model(trainer.model)
                        measured[state.global_step] = laboratory._measure(run, model, tokenizer)

            trainer.add_callback(Measuring())
            trainer.train()
            log = [{k: e[k] for k in LOGGED if k in e} for e in trainer.state.log_history if "loss" in e]
        return {"measured": measured, "log": log}

    # ---- Measuring --------------------------------------------------------------------------------------------------

    def _measure(self, run: Run, model, tokenizer) -> dict:
        reference = "base" if run.sequential_kl else None
        held_out = self.held_out_pairs(self.setting.held_out_pairs)
        found = {
            "pairs": self._of_pairs(model, tokenizer, held_out, reference),
            "samples": self._of_samples(model, tokenizer, "base"),
        }
        if run.train_pairs:
            # Those that a run over all of them sees are drawn without regard to its order.
            rows = random.Random("training pairs").sample(self.rows("train"), run.train_pairs)
            found["train_pairs"] = self._of_pairs(model, tokenizer, rows, "base")
        return found

    @staticmethod
    def _of_pairs(model, tokenizer, rows, reference) -> dict:
        from trl_ext.evaluation import score_pairs

        divergences = ["forward_kl"] if reference else []
        scores = score_pairs(model, rows, tokenizer, reference=reference, divergences=divergences, batch_size=16)
        found = {"keys": [pair_key(row) for row in rows]}
        for side in ("chosen", "rejected"):
            responses = getattr(scores, side)
            found[f"{side}_logps"], found[f"{side}_lengths"] = responses.logps, responses.lengths
            found[f"{side}_entropy"] = responses.entropy
            if reference:
                found[f"{side}_ref_logps"] = responses.ref_logps
                found[f"{side}_sequential_kl"] = responses.divergence("forward_kl")
        return {name: listed(values) for name, values in found.items()}

    def _of_samples(self, model, tokenizer, reference) -> dict:
        from sentiment import gold_scores

        from trl_ext.evaluation import SamplingSettings, distinct_n, sample_responses, score_samples

        settings = SamplingSettings(max_new_tokens=self.setting.max_new_tokens, seed=0)
        samples = sample_responses(model, tokenizer, self.held_out_prompts(), settings, batch_size=96)
        divergences = ["reverse_kl"] if reference else []
        scores = score_samples(model, samples, reference=reference, divergences=divergences, batch_size=16)
        found = {
            "gold": gold_scores(samples.texts),
            "length": scores.lengths,
            "entropy": scores.entropy,
        }
        if reference:
            found["kl"] = scores.divergence("reverse_kl")
        found = {name: listed(values) for name, values in found.items()}
        # Of all prompts together, at a fixed length: a model that says the same to every opening has few of them.
        distinct = distinct_n(samples.response_ids, 2, length=self.setting.max_new_tokens // 2, pooled=True)
        return found | {"distinct_2": distinct, "texts": samples.texts[:8]}

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def reference_logps(self, measured: dict) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the same pairs' chosen and rejected responses under the reference."""
        if "chosen_ref_logps" in measured:
            return np.array(measured["chosen_ref_logps"]), np.array(measured["rejected_ref_logps"])
        pairs = self.reference()["pairs"]
        at = {key: i for i, key in enumerate(pairs["keys"])}
        rows = [at[key] for key in measured["keys"]]
        return np.array(pairs["chosen_logps"])[rows], np.array(pairs["rejected_logps"])[rows]


def pair_key(row: dict) -> str:
    return hashlib.sha256(json.dumps([row["prompt"], row["chosen"], row["rejected"]]).encode()).hexdigest()[:12]


def listed(values) -> list:
    return [value if isinstance(value, str) else None if value is None else float(f"{value:.7g}") for value in values]


def provenance() -> dict:
    import torch

    packages = ("trl", "transformers", "torch", "peft", "vaderSentiment")
    cuda = torch.cuda.is_available()
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU ({platform.machine()}), {torch.get_num_threads()} threads",
    }
