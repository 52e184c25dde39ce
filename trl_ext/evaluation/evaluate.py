"""
Runs all measurements on models and a preference dataset. The result is one dictionary, the JSON report, which the HTML
shows.
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..judges.callables import Judge, as_judge, check_columns, judge_rewards
from ..judges.loading import load_judge
from ..judges.verdicts import JudgeError, as_text
from ..losses import get_divergence
from . import calibration, diversity, intervals, ranking, win_rates
from .config import EvaluationConfig
from .data import TokenizedPairs, columns_of, distinct_prompts, template_options, tokenize_and_count, with_prompt
from .generation import Samples, sample_responses, score_samples
from .judging import judge_responses, prompt_rewards
from .loading import check_causal_lm, load_causal_lm, require
from .scoring import PairScores, score_pairs


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SCHEMA = 2  # version of the report's layout


def evaluate_models(
    models: Mapping[str, str | Callable | torch.nn.Module],
    reference: torch.nn.Module | str,
    dataset: Iterable[dict],
    tokenizer: "PreTrainedTokenizerBase",
    judge: Judge | Callable | str | None = None,
    config: EvaluationConfig | None = None,
    *,
    load: Callable[[str], torch.nn.Module] = load_causal_lm,
    check: Callable[[str], None] | None = None,
    progress: Callable[[str], None] = lambda message: None,
    save: Callable[[dict], None] = lambda report: None,
) -> dict:
    """
    Measures models against a reference on a preference dataset.

    Packages, configurations of models, the judge and the data are checked first. If the judge fails later, the report
    names it (`judge_failure`), the judge is not called again, and the rest is measured.

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
        check (`Callable[[str], None]`, *optional*):
            Raises an error for an id or folder that cannot be loaded, before anything is measured; [`check_causal_lm`]
            by default if `load` is not given.
        progress (`Callable[[str], None]`, *optional*):
            Called with a description of each step.
        save (`Callable[[dict], None]`, *optional*):
            Called with the report so far after each model, so that a failing model does not lose the results of the
            others. Models that are not measured yet are in `unfinished`. An error that it raises is a warning, as the
            disk may be full now and not later.

    Returns:
        `dict` of plain values, for `json.dump` and [`render_report`].
    """
    config = config or EvaluationConfig()
    if not models:
        raise ValueError("`models` is empty: give at least one model to evaluate.")
    require("scipy")
    if isinstance(judge, str):
        judge = load_judge(judge)
    judge = None if judge is None else as_judge(judge)
    judge_settings = None if judge is None else judge.describe()
    if check is None and load is load_causal_lm:
        check = check_causal_lm
    for name in [reference, *models.values()]:
        if check is not None and isinstance(name, str):
            check(name)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    sampled = bool(config.num_samples or judge)
    dataset = _needed_rows(dataset, config.num_pairs, config.num_prompts if sampled else 0)
    pairs = tokenize_and_count(dataset[: config.num_pairs], tokenizer, config.max_length)
    column = None if config.opponent == "reference" else config.opponent
    rows = distinct_prompts(dataset, config.num_prompts) if sampled else []
    opponents = [row.get(column) for row in rows] if column else None
    if judge:
        check_columns(judge, columns_of(rows))
    if judge and opponents and any(response is None for response in opponents):
        raise ValueError(f"`opponent={column!r}`: the dataset has no such column, or rows without a response.")

    reference_name = reference if isinstance(reference, str) else "reference"
    reference_model = load(reference) if isinstance(reference, str) else reference
    run = _Run(config, tokenizer, reference_model, pairs, rows, judge, progress)
    progress("Reference: sampling")
    reference_result = run.evaluate_reference(opponents)
    results: dict[str, dict] = {}

    def report() -> dict:
        run.compare(results)
        return {
            "schema": SCHEMA,
            "created": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 1),
            "device": _device_name(reference_model),
            "versions": _versions(),
            "config": dataclasses.asdict(config),
            "reference": {"name": reference_name, **reference_result},
            "opponent": None if judge is None else run.opponent,
            "judge": judge_settings,
            "judge_failure": run.judge_failure,
            "num_pairs": len(run.pairs),
            "dropped_pairs": {"no_room": pairs.no_room, "same_responses": pairs.same_responses},
            "num_prompts": len(rows),
            "unfinished": [name for name in models if name not in results],
            "models": results,
            "samples": run.shown(results),
        }

    for name, model in models.items():
        loaded = load(model) if isinstance(model, str) else model
        results[name] = run.evaluate(name, loaded)
        del loaded
        gc.collect()
        try:
            save(report())
        except Exception as error:
            message = f"The report so far was not saved ({type(error).__name__}: {error}). The evaluation goes on."
            progress(message)
            warnings.warn(message, stacklevel=2)
    return report()


def _needed_rows(dataset: Iterable[dict], num_pairs: int, num_prompts: int) -> list[dict]:
    """Reads as many rows as are needed, once, since a generator yields them only once."""
    rows: list[dict] = []
    prompts: set[str] = set()
    for row in dataset:
        if len(rows) >= num_pairs and len(prompts) >= num_prompts:
            break
        rows.append(row)
        if len(prompts) < num_prompts:
            prompts.add(json.dumps(with_prompt(row)["prompt"], sort_keys=True))
    return rows


class _Run:
    """The state that the models of one evaluation share."""

    def __init__(self, config, tokenizer, reference, pairs: TokenizedPairs, rows: list[dict], judge, progress):
        self.config, self.tokenizer, self.reference = config, tokenizer, reference
        self.judge, self.progress = judge, progress
        self.pairs, self.pair_prompts = pairs.pairs, pairs.prompts
        self.prompts = [row["prompt"] for row in rows]
        self.columns: dict[str, list] = columns_of(rows)  # of the prompts, for judges that take them
        self.template_options = [template_options(row) for row in rows]
        self.responses: dict[str, Samples] = {}
        self.scores: dict[str, np.ndarray] = {}
        self.rewards: dict[str, np.ndarray] = {}
        self.opponent_texts: list[str] = []
        self.opponent: dict = {"name": config.opponent}
        self.opponent_rewards: np.ndarray | None = None
        self.judge_failure: str | None = None
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
                self.opponent_rewards = self._rewards_of(self.opponent_texts)
                self.opponent["reward"] = self._mean_reward(self.opponent_rewards)
        return found

    def evaluate(self, name: str, model) -> dict:
        self.progress(f"{name}: scoring {len(self.pairs)} pairs")
        scores = score_pairs(
            model,
            self.pairs,
            self.tokenizer,
            reference=self.reference,
            divergences=["forward_kl"],
            batch_size=self.config.batch_size,
        )
        self._check_numbers(name, scores)
        found = self._of_pairs(scores)
        if self.config.num_samples:
            count = len(self.prompts) * self.config.num_samples
            self.progress(f"{name}: sampling {count} responses at temperature {self.config.temperature}")
            found |= self._of_samples(self._samples(model), model, self.reference)
        if self.judge is not None:
            self.progress(f"{name}: answering {len(self.prompts)} prompts, judged by {self.judge.name}")
            answers = self._answers(model)
            # Without a verdict until the judge gives one.
            self.responses[name], self.scores[name] = answers, np.full(len(self.prompts), np.nan)
            with self._asking():
                self._add_judgments(found, name, answers)
        return found

    def _check_numbers(self, name: str, scores: PairScores) -> None:
        sides = (scores.chosen, scores.rejected)
        for who, logps in (
            (name, [side.logps for side in sides]),
            ("The reference", [side.ref_logps for side in sides]),
        ):
            bad = int(np.isnan(np.stack(logps)).any(axis=0).sum())
            if bad:
                raise ValueError(
                    f"{who}: the log-probabilities of {bad} of {len(logps[0])} pairs are NaN. Its weights are "
                    "broken, or its activations overflow in this precision; try `dtype='float32'`."
                )

    @contextlib.contextmanager
    def _asking(self):
        """
        Context for calls of the judge: whatever error it raises, the other measurements are kept. The report names the
        error, and the judge is not called again.
        """
        try:
            yield
        except Exception as error:
            known = isinstance(error, JudgeError)
            self.judge_failure = str(error) if known else f"{type(error).__name__}: {error}"
            self.judge = None
            self.progress(f"The judge failed and is not asked again: {self.judge_failure}")
            warnings.warn(
                f"The judge failed; what it judges is missing from here on. {self.judge_failure}", stacklevel=2
            )

    def _mean(self, values, groups=None) -> dict:
        return intervals.mean(values, groups=groups, seed=self.config.seed).to_dict()

    def _samples(self, model) -> Samples:
        options = dict(num_samples=self.config.num_samples, batch_size=2 * self.config.batch_size)
        options["template_options"] = self.template_options
        return sample_responses(model, self.tokenizer, self.prompts, self.config.divergence_settings, **options)

    def _answers(self, model) -> Samples:
        options = dict(batch_size=2 * self.config.batch_size, template_options=self.template_options)
        return sample_responses(model, self.tokenizer, self.prompts, self.config.judge_settings, **options)

    def _rewards_of(self, texts: list[str], num_samples: int = 1) -> np.ndarray:
        """The rewards of so many responses to each prompt, `(N * K,)`; NaN for those that have none."""
        repeated = {
            name: [value for value in values for _ in range(num_samples)]
            for name, values in {"prompt": self.prompts, **self.columns}.items()
        }
        rewards = judge_rewards(self.judge, repeated.pop("prompt"), texts, repeated)
        if np.isnan(rewards).all():
            raise JudgeError(f"The judge {self.judge.name} gave no reward to any of {len(rewards)} responses.")
        return rewards

    def _mean_reward(self, rewards: np.ndarray) -> dict:
        """Over the prompts of which a response has a reward; `(N,)`, or `(N, K)` for several responses to each."""
        means = prompt_rewards(rewards)
        given = ~np.isnan(means)
        return {**self._mean(means[given]), "not_rewarded": int((~given).sum())}

    # ---- Its numbers -----------------------------------------------------------------------------------------------

    def _of_pairs(self, scores: PairScores) -> dict:
        config, chosen, rejected = self.config, scores.chosen, scores.rejected
        policy, reference = (chosen.logps, rejected.logps), (chosen.ref_logps, rejected.ref_logps)
        lengths = (chosen.lengths, rejected.lengths)
        groups = self.pair_prompts
        options = dict(betas=config.idealized_betas, epsilon=config.epsilon, groups=groups)

        def accuracies(logps, sizes=()):
            return ranking.ranking_accuracy(*logps, *sizes, groups=groups).to_dict()

        def gap(sizes=()):
            gap = ranking.alignment_gap(*policy, *reference, *sizes, **options)
            return {"gap": gap.gap, "idealized": {str(beta): value for beta, value in gap.idealized.items()}}

        difficulty = ranking.pair_difficulty(*reference)
        confidence, correct = calibration.preference_confidence(chosen.logratios, rejected.logratios, beta=config.beta)
        # Bins of equal counts are for looking at: with few pairs, fewer of them, each with an interval that says
        # something.
        num_bins = {"uniform": 10, "adaptive": max(2, min(10, len(confidence) // 15))}
        flipped, unflipped = (f(*policy, *reference, groups=groups) for f in (ranking.flipped, ranking.unflipped))
        margins = config.beta * (chosen.logratios - rejected.logratios)
        return {
            "ranking": {
                "accuracy": accuracies(policy),
                "accuracy_norm": accuracies(policy, lengths),
                "reference_accuracy": accuracies(reference),
                "reference_accuracy_norm": accuracies(reference, lengths),
                "reward_accuracy": ranking.reward_accuracy(
                    chosen.logratios, rejected.logratios, groups=groups
                ).to_dict(),
                "flipped": flipped and flipped.to_dict(),
                "unflipped": unflipped and unflipped.to_dict(),
                "alignment_gap": gap(),
                "alignment_gap_norm": gap(lengths),
                "dpo_loss": self._mean(np.logaddexp(0, -margins), groups),
                "chosen_logratio": self._mean(chosen.logratios, groups),
                "rejected_logratio": self._mean(rejected.logratios, groups),
                "chosen_sequential_kl": self._mean(chosen.divergence("forward_kl"), groups),
                "rejected_sequential_kl": self._mean(rejected.divergence("forward_kl"), groups),
            },
            "pairs": {
                "difficulty": _rounded(difficulty),
                "flip_loss": _rounded(ranking.flip_loss(difficulty, beta=config.beta)),
                "dpo_loss": _rounded(np.logaddexp(0, -margins)),
                "correct": ranking.ranked_correctly(*policy).tolist(),
                "correct_norm": ranking.ranked_correctly(*policy, *lengths).tolist(),
                "reference_correct": ranking.ranked_correctly(*reference).tolist(),
            },
            "calibration": {
                binning: calibration.expected_calibration_error(
                    confidence,
                    correct,
                    num_bins=num_bins[binning],
                    binning=binning,
                    limits=(0.5, 1.0),
                    groups=groups,
                    seed=config.seed,
                ).to_dict()
                for binning in calibration.BINNINGS
            },
        }

    def _of_samples(self, samples: Samples, model, reference) -> dict:
        config, shape = self.config, (len(self.prompts), self.config.num_samples)
        names = [get_divergence(name).name for name in config.divergences]
        divergences = [] if reference is None else ["reverse_kl", *(name for name in names if name != "reverse_kl")]
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
            # Of the reference it fails at the start, when nothing is lost yet.
            with self._asking() if reference is not None else contextlib.nullcontext():
                rewards = self._rewards_of(samples.texts, shape[1])
                result["sample_reward"] = self._mean_reward(rewards.reshape(shape))
        if reference is not None:
            kl = scores.divergence("reverse_kl")
            result["divergence"] = {
                "kl": self._mean(kl.reshape(shape)),
                **{f"kl_{k}": self._mean(scores.kl(k).reshape(shape)) for k in ("k1", "k2", "k3")},
                "kl_per_token": float(kl.sum() / scores.lengths.sum()),
                "exact": {
                    name: {
                        "response": self._mean(scores.divergence(name).reshape(shape)),
                        "per_token": float(scores.divergence(name).sum() / scores.lengths.sum()),
                    }
                    for name in names
                },
            }
        return result

    def _add_judgments(self, found: dict, name: str, answers: Samples) -> None:
        """Adds to `found` what the judge says, as it says it: rewards that fail do not lose the verdicts."""
        judgments = judge_responses(self.judge, self.prompts, answers.texts, self.opponent_texts, columns=self.columns)
        judged, scores = judgments.judged, judgments.scores
        self.responses[name], self.scores[name] = answers, scores
        consistency = judgments.order_consistency()
        result = judgments.win_rate()
        lengths = np.array([[len(a), len(b)] for a, b in zip(answers.texts, self.opponent_texts, strict=True)])
        controlled = win_rates.length_controlled_win_rate(scores[judged], *lengths[judged].T)
        found |= {
            "win_rate": {
                **result.to_dict(),
                "not_judged": int((~judged).sum()),
                "order_consistency": consistency and consistency.to_dict(),
                "length_controlled": controlled.to_dict(),
            },
            "responses": {
                "scores": [_number_or_none(score) for score in scores],
                "length_difference": (lengths[:, 0] - lengths[:, 1]).tolist(),
            },
        }
        if self.opponent_rewards is not None:
            rewards = self.rewards[name] = self._rewards_of(answers.texts)
            both = ~np.isnan(rewards) & ~np.isnan(self.opponent_rewards)
            found["reward"] = {"mean": self._mean_reward(rewards), "gain": None}
            if both.any():
                gain = intervals.paired_difference(rewards[both], self.opponent_rewards[both], seed=self.config.seed)
                found["reward"]["gain"] = gain.to_dict()

    # ---- All of them -----------------------------------------------------------------------------------------------

    def compare(self, results: dict) -> None:
        """Adds to each model its difference from the first, pair by pair and prompt by prompt."""
        names = list(results)
        for name in names[1:]:
            ranked = {}
            for metric, hits in (("accuracy", "correct"), ("accuracy_norm", "correct_norm")):
                both = [np.array(results[each]["pairs"][hits], dtype=float) for each in (name, names[0])]
                ranked[metric] = {
                    **intervals.accuracy_difference(*both, groups=self.pair_prompts).to_dict(),
                    "p_value": intervals.mcnemar(*both),
                }
            results[name]["ranking"]["difference_from_first"] = ranked
            if "win_rate" in results[name] and "win_rate" in results[names[0]]:
                both = ~np.isnan(self.scores[name]) & ~np.isnan(self.scores[names[0]])
                if both.any():
                    difference = intervals.paired_difference(
                        self.scores[name][both], self.scores[names[0]][both], seed=self.config.seed
                    )
                    results[name]["win_rate"]["difference_from_first"] = difference.to_dict()

    def shown(self, results: dict) -> list[dict]:
        """The first prompts with the response of each model."""
        rows = []
        for i in range(min(self.config.shown_samples, len(self.prompts)) if self.responses else 0):
            responses: dict[str, dict] = {name: {"text": answers.texts[i]} for name, answers in self.responses.items()}
            for name, response in responses.items():
                response["score"] = _number_or_none(self.scores[name][i])
                if name in self.rewards:
                    response["reward"] = _number_or_none(self.rewards[name][i])
            opponent: dict[str, Any] = {"text": self.opponent_texts[i]}
            if self.opponent_rewards is not None:
                opponent["reward"] = _number_or_none(self.opponent_rewards[i])
            rows.append({"prompt": _plain_text(self.prompts[i]), "opponent": opponent, "responses": responses})
        return rows


def _number_or_none(value) -> float | None:
    return float(value) if math.isfinite(value) else None


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
