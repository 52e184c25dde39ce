"""The whole suite on models and a preference dataset: one dictionary, which is the JSON report and all that the HTML needs."""

import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import calibration, diversity, intervals, ranking, win_rates
from ._data import distinct_prompts, head
from .generation import Samples, SamplingSettings, sample_responses, score_samples
from .judges import Judge, as_judge, as_text, judge_responses, judge_rewards, load_judge
from .scoring import PairScores, score_pairs


SCHEMA = 1  # version of the report's layout


@dataclass
class EvaluationConfig:
    """
    What [`evaluate_models`] measures, and how. Every sample, every bootstrap and every simulation follows from `seed`, the same
    for all models.
    """

    num_pairs: int = field(default=300, metadata={"help": "Preference pairs to score: the dataset's first."})
    num_prompts: int = field(default=300, metadata={"help": "Prompts to answer: the first different ones."})
    num_samples: int = field(
        default=4, metadata={"help": "Samples of each prompt for KL, entropy and diversity; 0 leaves these out."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the samples for KL, entropy and diversity (no truncation)."}
    )
    judge_temperature: float = field(
        default=0.7, metadata={"help": "Temperature of the one response a prompt that is judged; 0 is greedy."}
    )
    judge_top_p: float = field(default=0.95, metadata={"help": "Top-p of the responses that are judged."})
    opponent: str = field(
        default="reference",
        metadata={
            "help": "Whom the models are judged against: 'reference', or a column of responses such as 'chosen'."
        },
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Beta of the implicit reward, for calibration and flip losses: the trained one."},
    )
    idealized_betas: list[float] = field(
        default_factory=lambda: [0.01, 0.1, 1.0, 5.0, 10.0],
        metadata={"help": "Betas of the idealised ranking accuracy; the paper's grid by default."},
    )
    epsilon: float = field(
        default=1e-3,
        metadata={"help": "Idealised ranking accuracy: one rating counts as an agreement of 1 - epsilon."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and response together when pairs are scored, the start kept."}
    )
    distinct_length: int = field(
        default=32, metadata={"help": "Distinct-n: tokens that count of each sample; shorter samples are left out."}
    )
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "Model of sentence-transformers (id or folder) for embedding diversity; left out by default."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Responses in a forward; twice as many are sampled at once."})
    shown_samples: int = field(default=20, metadata={"help": "Prompts whose responses the report shows."})
    seed: int = field(default=0, metadata={"help": "Of sampling, bootstraps and simulations."})

    def __post_init__(self):
        for name in ("num_pairs", "num_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        for name in ("num_samples", "shown_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)!r}.")
        if self.embedding_model is not None and self.num_samples < 2:
            raise ValueError(
                f"`embedding_model={self.embedding_model!r}` compares the samples of a prompt, and `num_samples` is "
                f"{self.num_samples}. Set it to 2 or more."
            )
        if self.beta <= 0:
            raise ValueError(f"`beta` must be greater than 0, got {self.beta!r}.")
        if self.temperature <= 0:
            raise ValueError(
                f"`temperature` must be greater than 0, got {self.temperature!r}: greedy samples have no KL. The responses "
                "that are judged have their own, `judge_temperature`."
            )

    @property
    def divergence_settings(self) -> SamplingSettings:
        return SamplingSettings(self.max_new_tokens, self.temperature, seed=self.seed)

    @property
    def judge_settings(self) -> SamplingSettings:
        return SamplingSettings(self.max_new_tokens, self.judge_temperature, self.judge_top_p, seed=self.seed)


def load_causal_lm(name: str, *, dtype: str = "float32", device: str | None = None, trust_remote_code: bool = False):
    """
    A causal language model by its Hub id or folder; a folder with an adapter gives its base model with the adapter.

    Args:
        name (`str`):
            Hub id or folder.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision. In bfloat16 the log-probabilities of whole responses are known to a few tenths of a nat only.
        device (`str`, *optional*):
            Where to put it; a CUDA device if there is one, by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.
    """
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Weights in other formats are pickles, which can run code.
    options = dict(dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True)
    return AutoModelForCausalLM.from_pretrained(name, **options).to(device)


def evaluate_models(
    models: Mapping[str, str | Callable | torch.nn.Module],
    reference,
    dataset,
    tokenizer,
    judge: Judge | Callable | str | None = None,
    config: EvaluationConfig | None = None,
    *,
    load: Callable[[str], torch.nn.Module] = load_causal_lm,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """
    Measures models against a reference on a preference dataset.

    Args:
        models (`Mapping[str, str or torch.nn.Module]`):
            Names for the report, and the models: instances, or ids and folders, of which one at a time is loaded.
        reference (`str` or [`~transformers.PreTrainedModel`]):
            The reference of all of them, usually the model that training started from.
        dataset (`Iterable[dict]`):
            Preference pairs, see [`score_pairs`], held out from training.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of all models.
        judge ([`Judge`], `Callable` or `str`, *optional*):
            See [`judge_responses`] and [`load_judge`]. Without one there is no win rate and no reward.
        config ([`EvaluationConfig`], *optional*):
            What is measured.
        load (`Callable[[str], torch.nn.Module]`, *optional*, defaults to [`load_causal_lm`]):
            Loads a model by its id or folder.
        progress (`Callable[[str], None]`, *optional*):
            Told what is being done.

    Returns:
        `dict` of plain values, for `json.dump` and [`render_report`].
    """
    config = config or EvaluationConfig()
    if not models:
        raise ValueError("`models` is empty: give at least one model to evaluate.")
    if isinstance(judge, str):
        judge = load_judge(judge)
    judge = None if judge is None else as_judge(judge)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    pairs = head(dataset, config.num_pairs)
    column = None if config.opponent == "reference" else config.opponent
    prompts, opponents = [], []
    if config.num_samples or judge:
        prompts, opponents = distinct_prompts(dataset, config.num_prompts, column)
    if judge and column and any(response is None for response in opponents):
        raise ValueError(f"`opponent={column!r}`: the dataset has no such column, or rows without a response.")

    reference_name = reference if isinstance(reference, str) else "reference"
    reference_model = load(reference) if isinstance(reference, str) else reference
    run = _Run(config, tokenizer, reference_model, pairs, prompts, judge, progress)
    progress("Reference: sampling")
    reference_result = run.evaluate_reference(opponents if column else None)
    results = {}
    for name, model in models.items():
        loaded = load(model) if isinstance(model, str) else model
        results[name] = run.evaluate(name, loaded)
        del loaded
        gc.collect()
    run.compare(results)
    return {
        "schema": SCHEMA,
        "created": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "device": _device_name(reference_model),
        "versions": _versions(),
        "config": dataclasses.asdict(config),
        "reference": {"name": reference_name, **reference_result},
        "judge": None if judge is None else judge.describe(),
        "num_pairs": len(run.pairs),
        "num_prompts": len(prompts),
        "models": results,
        "samples": run.shown(results),
    }


class _Run:
    """One evaluation: what is shared by its models."""

    def __init__(self, config, tokenizer, reference, pairs, prompts, judge, progress):
        self.config, self.tokenizer, self.reference = config, tokenizer, reference
        self.pairs, self.prompts, self.judge, self.progress = pairs, prompts, judge, progress
        self.responses: dict[str, Samples] = {}
        self.scores: dict[str, np.ndarray] = {}
        self.rewards: dict[str, np.ndarray] = {}
        self.opponent_texts: list[str] = []
        # Before anything is sampled: a package or a model that is not there should not be found out at the end.
        name = config.embedding_model
        self.encoder = None if name is None else diversity.load_encoder(name)

    # ---- One model -----------------------------------------------------------------------------------------------

    def evaluate_reference(self, opponents: list | None) -> dict:
        """The reference's own samples, and whatever the models are judged against."""
        found: dict = {}
        if self.config.num_samples:
            found |= self._of_samples(self._samples(self.reference), self.reference, None)
        if self.judge is not None:
            if opponents is None:
                responses = self._answers(self.reference)
                self.opponent_texts = responses.texts
            else:
                self.opponent_texts = [_plain_text(response, self.tokenizer) for response in opponents]
            if self.judge.has_rewards:
                self.opponent_rewards = np.array(self._rewards_of(self.opponent_texts))
                found["opponent_reward"] = self._mean(self.opponent_rewards)
        return found

    def evaluate(self, name: str, model) -> dict:
        self.progress(f"{name}: scoring {len(self.pairs)} pairs")
        scores = score_pairs(
            model,
            self.pairs,
            self.tokenizer,
            reference=self.reference,
            divergences=["forward_kl"],
            max_length=self.config.max_length,
            batch_size=self.config.batch_size,
        )
        found = self._of_pairs(scores)
        if self.config.num_samples:
            count = len(self.prompts) * self.config.num_samples
            self.progress(f"{name}: sampling {count} responses at temperature {self.config.temperature}")
            found |= self._of_samples(self._samples(model), model, self.reference)
        if self.judge is not None:
            self.progress(f"{name}: answering {len(self.prompts)} prompts, judged by {self.judge.name}")
            found |= self._of_judge(name, self._answers(model))
        return found

    def _mean(self, values) -> dict:
        return intervals.mean(values, seed=self.config.seed).to_dict()

    def _samples(self, model) -> Samples:
        options = dict(num_samples=self.config.num_samples, batch_size=2 * self.config.batch_size)
        return sample_responses(model, self.tokenizer, self.prompts, self.config.divergence_settings, **options)

    def _answers(self, model) -> Samples:
        options = dict(batch_size=2 * self.config.batch_size)
        return sample_responses(model, self.tokenizer, self.prompts, self.config.judge_settings, **options)

    def _rewards_of(self, texts: list[str]) -> list[float]:
        return judge_rewards(self.judge, self.prompts, texts)

    # ---- Its numbers -----------------------------------------------------------------------------------------------

    def _of_pairs(self, scores: PairScores) -> dict:
        config, chosen, rejected = self.config, scores.chosen, scores.rejected
        policy, reference = (chosen.logps, rejected.logps), (chosen.ref_logps, rejected.ref_logps)
        lengths = (chosen.lengths, rejected.lengths)
        options = dict(betas=config.idealized_betas, epsilon=config.epsilon)

        def accuracies(logps, sizes=()):
            return ranking.ranking_accuracy(*logps, *sizes).to_dict()

        def gap(sizes=()):
            gap = ranking.alignment_gap(*policy, *reference, *sizes, **options)
            return {"gap": gap.gap, "idealized": {str(beta): value for beta, value in gap.idealized.items()}}

        difficulty = ranking.pair_difficulty(*reference)
        confidence, correct = calibration.preference_confidence(chosen.logratios, rejected.logratios, beta=config.beta)
        # Bins of equal counts are for looking at: with few pairs, fewer of them, each with an interval that says something.
        num_bins = {"uniform": 10, "adaptive": max(2, min(10, len(confidence) // 15))}
        flipped, unflipped = (f(*policy, *reference) for f in (ranking.flipped, ranking.unflipped))
        margins = config.beta * (chosen.logratios - rejected.logratios)
        return {
            "ranking": {
                "accuracy": accuracies(policy),
                "accuracy_norm": accuracies(policy, lengths),
                "reference_accuracy": accuracies(reference),
                "reference_accuracy_norm": accuracies(reference, lengths),
                "reward_accuracy": ranking.reward_accuracy(chosen.logratios, rejected.logratios).to_dict(),
                "flipped": flipped and flipped.to_dict(),
                "unflipped": unflipped and unflipped.to_dict(),
                "alignment_gap": gap(),
                "alignment_gap_norm": gap(lengths),
                "dpo_loss": self._mean(np.logaddexp(0, -margins)),
                "chosen_logratio": self._mean(chosen.logratios),
                "rejected_logratio": self._mean(rejected.logratios),
                "chosen_sequential_kl": self._mean(chosen.divergence("forward_kl")),
                "rejected_sequential_kl": self._mean(rejected.divergence("forward_kl")),
            },
            "pairs": {
                "difficulty": _rounded(difficulty),
                "flip_loss": _rounded(ranking.flip_loss(difficulty, beta=config.beta)),
                "dpo_loss": _rounded(np.logaddexp(0, -margins)),
                "correct": ranking.ranked_correctly(*policy).tolist(),
                "reference_correct": ranking.ranked_correctly(*reference).tolist(),
            },
            "calibration": {
                binning: calibration.expected_calibration_error(
                    confidence,
                    correct,
                    num_bins=num_bins[binning],
                    binning=binning,
                    limits=(0.5, 1.0),
                    seed=config.seed,
                ).to_dict()
                for binning in calibration.BINNINGS
            },
        }

    def _of_samples(self, samples: Samples, model, reference) -> dict:
        config, shape = self.config, (len(self.prompts), self.config.num_samples)
        divergences = [] if reference is None else ["reverse_kl", "forward_kl", "js"]
        scores = score_samples(
            model, samples, reference=reference, divergences=divergences, batch_size=config.batch_size
        )
        groups = [samples.texts[i : i + shape[1]] for i in range(0, len(samples.texts), shape[1])]
        ids = [samples.response_ids[i : i + shape[1]] for i in range(0, len(samples.texts), shape[1])]
        found: dict = {
            "entropy": self._mean(scores.entropy.reshape(shape)),
            "sequence_entropy": self._mean(-scores.logps.reshape(shape)),
            "sample_length": self._mean(scores.lengths.reshape(shape)),
            "finished": float(np.mean(samples.finished)),
        }
        if shape[1] > 1:
            for n in (1, 2):
                options = dict(length=config.distinct_length, pooled=True, num_samples=2)  # of however many survive
                values = [diversity.distinct_n(group, n, **options) for group in ids]
                values = [value for value in values if value is not None]
                found[f"distinct_{n}"] = self._mean(values) if values else None
            found["self_bleu"] = None
            if importlib.util.find_spec("sacrebleu"):
                kept = [group for group in groups if sum(bool(text.strip()) for text in group) > 1]
                if kept:
                    found["self_bleu"] = self._mean([diversity.self_bleu(group) for group in kept])
            else:
                self.progress("Self-BLEU is left out: the package `sacrebleu` is not installed.")
            if self.encoder is not None:
                # Empty responses have no direction: left out, and with them prompts of fewer than two others.
                kept = [[text for text in group if text.strip()] for group in groups]
                kept = [group for group in kept if len(group) > 1]
                vectors = diversity.embed_texts([text for group in kept for text in group], self.encoder)
                ends = np.cumsum([len(group) for group in kept])[:-1]
                values = [diversity.embedding_diversity(group) for group in np.split(vectors, ends)] if kept else []
                found["embedding"] = self._mean(values) if values else None
        result: dict = {"diversity": found}
        if self.judge is not None and self.judge.has_rewards:
            rewards = np.array(judge_rewards(self.judge, samples.repeated_prompts, samples.texts))
            result["sample_reward"] = self._mean(rewards.reshape(shape))
        if reference is not None:
            kl = scores.divergence("reverse_kl")
            result["divergence"] = {
                "kl": self._mean(kl.reshape(shape)),
                "kl_k1": self._mean(scores.kl("k1").reshape(shape)),
                "kl_k3": self._mean(scores.kl("k3").reshape(shape)),
                "kl_per_token": float(kl.sum() / scores.lengths.sum()),
                "forward_kl_per_token": float(scores.divergence("forward_kl").sum() / scores.lengths.sum()),
                "js_per_token": float(scores.divergence("js").sum() / scores.lengths.sum()),
            }
        return result

    def _of_judge(self, name: str, answers: Samples) -> dict:
        judgements = judge_responses(self.judge, self.prompts, answers.texts, self.opponent_texts)
        judged, scores = judgements.judged, judgements.scores
        self.responses[name], self.scores[name] = answers, scores
        consistency = judgements.order_consistency()
        result = judgements.win_rate()
        lengths = np.array([[len(a), len(b)] for a, b in zip(answers.texts, self.opponent_texts, strict=True)])
        controlled = win_rates.length_controlled_win_rate(scores[judged], *lengths[judged].T)
        found = {
            "win_rate": {
                **result.to_dict(),
                "not_judged": int((~judged).sum()),
                "order_consistency": consistency and consistency.to_dict(),
                "length_controlled": controlled.to_dict(),
            },
            "responses": {
                "scores": [None if math.isnan(score) else float(score) for score in scores],
                "length_difference": (lengths[:, 0] - lengths[:, 1]).tolist(),
            },
        }
        if self.judge.has_rewards:
            rewards = np.array(self._rewards_of(answers.texts))
            self.rewards[name] = rewards
            gain = intervals.paired_difference(rewards, self.opponent_rewards, seed=self.config.seed)
            found["reward"] = {"mean": self._mean(rewards), "gain": gain.to_dict()}
        return found

    # ---- All of them -----------------------------------------------------------------------------------------------

    def compare(self, results: dict) -> None:
        """Adds to each model its difference from the first, prompt by prompt."""
        names = list(self.scores)
        for name in names[1:]:
            both = ~np.isnan(self.scores[name]) & ~np.isnan(self.scores[names[0]])
            if both.any():
                difference = intervals.paired_difference(
                    self.scores[name][both], self.scores[names[0]][both], seed=self.config.seed
                )
                results[name]["win_rate"]["difference_from_first"] = difference.to_dict()

    def shown(self, results: dict) -> list[dict]:
        """The first prompts with everybody's response."""
        rows = []
        for i in range(min(self.config.shown_samples, len(self.prompts)) if self.responses else 0):
            responses = {name: {"text": answers.texts[i]} for name, answers in self.responses.items()}
            for name, response in responses.items():
                score = self.scores[name][i]
                response["score"] = None if math.isnan(score) else float(score)
                if name in self.rewards:
                    response["reward"] = float(self.rewards[name][i])
            opponent = {"text": self.opponent_texts[i]}
            if self.judge.has_rewards:
                opponent["reward"] = float(self.opponent_rewards[i])
            rows.append({"prompt": _plain_text(self.prompts[i]), "opponent": opponent, "responses": responses})
        return rows


def _plain_text(value, tokenizer=None) -> str:
    text = as_text(value)
    eos = getattr(tokenizer, "eos_token", None)
    return text.removesuffix(eos) if eos else text


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("trl-ext", "trl", "transformers", "torch", "peft", "datasets", "numpy", "scipy", "sacrebleu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _device_name(model) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"


FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_pairs(name: str, split: str, config: str | None = None):
    """
    A split of a preference dataset: of the Hub, of a folder (of data files named after their splits, or written by
    `save_to_disk`), or one JSONL, JSON, Parquet or CSV file, which is taken whole.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(name)
    if path.is_file():
        suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix
        if suffix not in FILE_TYPES:
            raise ValueError(f"`dataset={name!r}` is a file of an unknown type; known: {', '.join(FILE_TYPES)}.")
        return load_dataset(FILE_TYPES[suffix], data_files={"train": str(path)}, split="train")
    saved = any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
    dataset = load_from_disk(name) if saved else load_dataset(name, name=config)
    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise ValueError(
            f"`split={split!r}`: the dataset {name} has {', '.join(map(repr, dataset))}. Give one of these."
        )
    return dataset[split]
