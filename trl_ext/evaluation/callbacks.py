"""Callbacks that add measurements to each evaluation of a TRL trainer."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..judges.callables import Judge, RewardFunctionJudge, as_judge, check_columns, judge_rewards
from ..judges.verdicts import JudgeError
from ..training.sharding import whole_weights
from . import intervals, ranking
from .data import columns_of, distinct_prompts, head, tokenize_pairs
from .generation import SamplingSettings, reference_of, sample_responses, score_samples
from .judging import Judgements, judge_responses, prompt_rewards
from .loading import require
from .scoring import score_responses


logger = logging.getLogger(__name__)


class _EvaluationCallback(TrainerCallback):
    """
    Base of the callbacks below: measures and logs once per evaluation without affecting training.

    Sampling has its own random state and scoring needs none, so a run with the callback has the same weights, bit for
    bit, as one without. With several processes, each handles a share of the prompts. Weights that FSDP2 shards are
    gathered for the measurement: every process then holds the whole model, in the data type that training computes in.
    If a judge fails, one measurement is lost, not the run.
    """

    NAMES: tuple[str, ...] = ()  # what it logs

    def __init__(self, trainer: Trainer, reference: torch.nn.Module | str | None = None, batch_size: int = 8):
        require("scipy", needed_by=f"`{type(self).__name__}`")
        self.trainer = trainer
        self.given_reference = reference
        self.batch_size = batch_size
        self.history: list[dict] = []  # one entry an evaluation: the step and the logged numbers
        self._training = False
        self._last_step: int | None = None  # of this training
        self._last: dict[str, float | None] = {}  # what was found there
        self._check_whole_weights()

    def prepare(self) -> None:
        """Reads and checks the data without a model; called before the first step, or when it is first needed."""

    def measure(self, state) -> dict[str, float | None]:
        """
        Returns the metrics; `None` for those that the data lack. Either all processes raise a [`JudgeError`] or none
        does.
        """
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._last_step = True, None
        # Its numbers are those of the weights at that step, which this run may not go through again.
        self.history = [entry for entry in self.history if entry["step"] <= state.global_step]
        self.prepare()

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_prediction_step(self, args, state, control, **kwargs):
        """
        Moves these callbacks to the front, so that e.g. [`~transformers.EarlyStoppingCallback`] finds their metrics
        whatever the order in which callbacks were added.
        """
        handler = self.trainer.callback_handler
        ours = [callback for callback in handler.callbacks if isinstance(callback, _EvaluationCallback)]
        if handler.callbacks[: len(ours)] != ours:
            # A new list: the handler is still iterating over the old one.
            handler.callbacks = ours + [callback for callback in handler.callbacks if callback not in ours]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # With several evaluation datasets this event comes once for each of them.
        if not (self._training and self._last_step == state.global_step):
            self._last_step = state.global_step
            self._last = self._look(state)
        if metrics is None:
            return
        metrics.update({name: value for name, value in self._last.items() if value is not None})
        best = args.metric_for_best_model
        if best is not None:
            best = best if best.startswith("eval_") else f"eval_{best}"
            if best in self._last:
                # Without it the trainer would end the run. Not a number is no better than any.
                metrics.setdefault(best, math.nan)

    def _look(self, state) -> dict[str, float | None]:
        try:
            with whole_weights(self.model, self.reference):
                measured = self.measure(state)
            found = {name: None if value is None else float(value) for name, value in measured.items()}
        except JudgeError as error:
            if self.trainer.is_world_process_zero():
                logger.warning(
                    "`%s` measured nothing at step %d, and training goes on: %s",
                    *(type(self).__name__, state.global_step, error),
                )
            return dict.fromkeys(self.NAMES)
        numbers = {name: value for name, value in found.items() if value is not None}
        # Not the trainer's own `log`: that of TRL's trainers adds what they have gathered of their batches, which has
        # been logged with this evaluation, and prints the table of completions again.
        Trainer.log(self.trainer, dict(numbers))
        self.history.append({"step": state.global_step, **numbers})
        return found

    def _check_whole_weights(self) -> None:
        accelerator = self.trainer.accelerator
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        engine = None
        if plugin is not None and plugin.zero_stage == 3:
            engine = (
                "DeepSpeed ZeRO-3, which gathers weights layer by layer in forwards that all processes run together"
            )
        elif accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            engine = "FSDP1, which flattens them"
        if engine is not None:
            raise ValueError(
                f"`{type(self).__name__}` needs whole weights in every process, and cannot have them under {engine}. "
                "Use FSDP2 (`fsdp_version: 2`) or ZeRO-2; or leave the callback out and run `trl-ext evaluate` on the "
                "checkpoints."
            )

    @property
    def model(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def tokenizer(self):
        processing_class = self.trainer.processing_class
        return getattr(processing_class, "tokenizer", processing_class)

    @property
    def reference(self):
        """The reference model, `"base"` for a model with adapters, or `None`."""
        if self.given_reference is not None:
            return self.given_reference
        reference = getattr(self.trainer, "ref_model", None)
        if reference is not None:
            return reference
        return "base" if hasattr(self.model, "peft_config") else None

    @property
    def _reference_moves(self) -> bool:
        return self.given_reference is None and getattr(self.trainer.args, "sync_ref_model", False)

    def _need_reference(self):
        if self.reference is None:
            raise ValueError(
                f"`{type(self).__name__}` compares with a reference, and this `{type(self.trainer).__name__}` keeps "
                "none. Give the callback one: `reference=AutoModelForCausalLM.from_pretrained(...)`."
            )
        return self.reference

    def _rows(self, dataset) -> Iterable[dict]:
        if dataset is None:
            dataset = self.trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        if dataset is None:
            raise ValueError(
                f"`{type(self).__name__}` has no data: give it `dataset`, or the trainer an `eval_dataset`."
            )
        return dataset

    def _prompt_rows(self, dataset, count: int, judge: Judge, opponent: str | None = None) -> list[dict]:
        """
        This process's share of the rows that have the dataset's first different prompts. They are checked as a whole,
        so that a process does not stop alone.
        """
        rows = distinct_prompts(self._rows(dataset), count)
        check_columns(judge, columns_of(rows))
        if opponent is not None and any(row.get(opponent) is None for row in rows):
            raise ValueError(f"`opponent={opponent!r}`: the dataset has no such column, or one without a response.")
        # A trainer's prepared dataset has the end-of-sequence token at the end of its texts.
        eos = self.tokenizer.eos_token or ""
        rows = [
            {k: v.removesuffix(eos) if isinstance(v, str) and k != "prompt" else v for k, v in row.items()}
            for row in rows
        ]
        return self._share(rows, "num_prompts")

    def _share(self, items: Sequence, option: str) -> list:
        accelerator = self.trainer.accelerator
        if len(items) < accelerator.num_processes:
            raise ValueError(
                f"{len(items)} rows are too few for {accelerator.num_processes} processes. Raise `{option}`."
            )
        return list(items)[accelerator.process_index :: accelerator.num_processes]

    def _gather(self, items: list) -> list:
        """Gathers the values of all processes, in process order."""
        return gather_object(items) if self.trainer.accelerator.num_processes > 1 else items

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """Calls the judge in this process. If it fails in one process, all raise, so that none waits for another."""
        answer = failure = None
        try:
            answer = ask()
        except Exception as error:
            failure = error
        told = [] if failure is None else [(isinstance(failure, JudgeError), f"{type(failure).__name__}: {failure}")]
        failures = self._gather(told)
        if failure is not None and not isinstance(failure, JudgeError):
            raise failure
        broken = [message for is_judge, message in failures if not is_judge]
        if broken:
            raise RuntimeError(f"The judge raised in another process: {broken[0]}") from failure
        if failures:
            raise JudgeError(failures[0][1].removeprefix("JudgeError: ")) from failure
        return answer


class RankingAccuracyCallback(_EvaluationCallback):
    r"""
    Logs the ranking accuracy of the policy at each evaluation: how often the chosen response is the more likely one,
    which `rewards/accuracies` does not show (https://huggingface.co/papers/2405.19534).

    | logged | |
    |---|---|
    | `eval_ranking/accuracy`, `eval_ranking/accuracy_norm` | of the policy, raw and length-normalized |
    | `eval_ranking/reference_accuracy`, `eval_ranking/reference_accuracy_norm` | of the reference |
    | `eval_ranking/reward_accuracy` | share of pairs with the greater log ratio on the chosen side |
    | `eval_ranking/flipped` | share of the pairs ranked wrongly by the reference that the policy ranks correctly |
    | `eval_ranking/unflipped` | share of the pairs ranked correctly by the reference that the policy ranks wrongly |

    Those of the reference are left out where there is none. With `precompute_ref_log_probs` they are of the
    log-probabilities in the evaluation dataset's columns, which have the precision that training has. With
    `sync_ref_model` the reference is scored anew at each evaluation, as it is by then; give `reference` to compare
    with where training began.

    Models whose weights are float32 are scored in float32, whatever precision they are trained in. Where the weights
    themselves are bfloat16, log-probabilities of responses are known to a few tenths of a nat only, and pairs that are
    closer than that may be ranked either way.

    Args:
        trainer ([`~transformers.Trainer`]):
            Any trainer of a causal language model, TRL's or this project's.
        dataset ([`~datasets.Dataset`], *optional*):
            Preference pairs, as for [`score_pairs`]; the trainer's `eval_dataset` by default, its first where there
            are several.
        num_pairs (`int`, *optional*):
            Pairs to score, the dataset's first; all by default.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            The reference; by default the trainer's `ref_model`, or the model without its adapters. It is scored once,
            unless it moves.
        max_length (`int`, *optional*):
            Longest prompt and response together; by default the trainer's `max_length`.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses in a forward.

    Example:

    ```python
    trainer = DPOTrainer(..., eval_dataset=pairs)
    trainer.add_callback(RankingAccuracyCallback(trainer))
    ```
    """

    NAMES = tuple(
        f"eval_ranking/{name}"
        for name in (
            "accuracy",
            "accuracy_norm",
            "reference_accuracy",
            "reference_accuracy_norm",
            "reward_accuracy",
            "flipped",
            "unflipped",
        )
    )

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset | Iterable[dict] | None = None,
        *,
        num_pairs: int | None = None,
        reference: torch.nn.Module | str | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
    ):
        super().__init__(trainer, reference, batch_size)
        self.dataset = dataset
        self.num_pairs = num_pairs
        self.max_length = getattr(trainer.args, "max_length", None) if max_length is None else max_length
        self._pairs: list[dict] | None = None
        self._ref_logps: list[np.ndarray] | None = None

    def _score(self, model) -> list[np.ndarray]:
        """Log-probabilities of both sides of this process's pairs."""
        pairs = self._pairs or []
        prompts = [pair["prompt_ids"] for pair in pairs]
        sides = ([pair[side] for pair in pairs] for side in ("chosen_ids", "rejected_ids"))
        return [score_responses(model, prompts, ids, batch_size=self.batch_size).logps for ids in sides]

    def prepare(self):
        rows = head(self._rows(self.dataset), self.num_pairs)
        pairs = tokenize_pairs(rows, self.tokenizer, self.max_length)
        if self.reference is None:
            stored = self._stored_logps(rows)
            if stored is not None:
                pairs = [{**pair, "ref_logps": logps} for pair, logps in zip(pairs, stored, strict=True)]
            elif (
                getattr(self.trainer.args, "precompute_ref_log_probs", False) and self.trainer.is_world_process_zero()
            ):
                logger.warning(
                    "`%s` leaves out what compares with the reference: with `precompute_ref_log_probs=True` the "
                    "trainer keeps no reference, and these data have no log-probabilities of it that are of the same "
                    "tokens. Leave out `dataset`, so that the trainer's `eval_dataset` is used, with its `max_length` "
                    "and `truncation_mode='keep_start'`; or give the callback a `reference`.",
                    type(self).__name__,
                )
        self._pairs = self._share(pairs, "num_pairs")
        if self._pairs and "ref_logps" in self._pairs[0]:
            self._ref_logps = list(np.array([pair["ref_logps"] for pair in self._pairs], dtype=np.float64).T)

    def _stored_logps(self, rows: list[dict]) -> list[tuple[float, float]] | None:
        """
        The reference's log-probabilities of the pairs, where the dataset has them, of the tokens that are scored here.
        """
        names = ("ref_chosen_logps", "ref_rejected_logps")
        if not all(name in row for row in rows for name in (*names, "prompt_ids", "chosen_ids", "rejected_ids")):
            return None
        args, limit = self.trainer.args, self.max_length
        theirs = getattr(args, "max_length", None)
        alike = limit == theirs and getattr(args, "truncation_mode", "keep_start") == "keep_start"
        longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
        if not alike and any(bound is not None and longest > bound for bound in (limit, theirs)):
            return None
        kept = [row for row in rows if limit is None or len(row["prompt_ids"]) < limit]
        return [(float(row[names[0]]), float(row[names[1]])) for row in kept]

    def measure(self, state):
        if self._pairs is None:
            self.prepare()
        if self.reference is not None and (self._ref_logps is None or self._reference_moves):
            with reference_of(self.model, self.reference) as reference:
                self._ref_logps = self._score(reference)
        pairs, own = self._pairs or [], self._score(self.model)
        own += [np.array([len(pair[side]) for pair in pairs]) for side in ("chosen_ids", "rejected_ids")]
        own += self._ref_logps or []
        # Several pairs of one prompt are not independent; by its tokens a prompt is the same in every process.
        groups = self._gather([json.dumps(pair["prompt_ids"]) for pair in pairs])
        columns = np.array(self._gather(np.stack(own, axis=1).tolist())).T
        logps, lengths, ref_logps = columns[:2], columns[2:4], columns[4:]
        found: dict[str, intervals.Estimate | None] = {
            "eval_ranking/accuracy": ranking.ranking_accuracy(*logps, groups=groups),
            "eval_ranking/accuracy_norm": ranking.ranking_accuracy(*logps, *lengths, groups=groups),
        }
        if len(ref_logps):
            found |= {
                "eval_ranking/reference_accuracy": ranking.ranking_accuracy(*ref_logps, groups=groups),
                "eval_ranking/reference_accuracy_norm": ranking.ranking_accuracy(*ref_logps, *lengths, groups=groups),
                "eval_ranking/reward_accuracy": ranking.reward_accuracy(*(logps - ref_logps), groups=groups),
                "eval_ranking/flipped": ranking.flipped(*logps, *ref_logps, groups=groups),
                "eval_ranking/unflipped": ranking.unflipped(*logps, *ref_logps, groups=groups),
            }
        return found


class WinRateCallback(_EvaluationCallback):
    """
    Logs the win rate of the policy over its reference, or over the dataset's responses, at each evaluation.

    | logged | |
    |---|---|
    | `eval_win_rate` | mean score of the prompts: 1 for a win, 1/2 for a tie, over both orders |
    | `eval_win_rate/low`, `eval_win_rate/high` | its 95% interval |
    | `eval_win_rate/ties` | share of prompts without a winner |
    | `eval_win_rate/judged` | share of prompts on which the judge gave a verdict |
    | `eval_win_rate/length`, `eval_win_rate/opponent_length` | mean length of the responses, in characters |

    Where the judge fails ([`JudgeError`]: its endpoint does not answer, or it gives no verdict at all), nothing is
    logged, a warning says why, and training goes on. If `metric_for_best_model` names one of these, it is NaN then,
    which is no better than any.

    Args:
        judge ([`Judge`] or `Callable`):
            See [`judge_responses`]. It is given the dataset's columns that it names.
        trainer ([`~transformers.Trainer`]):
            Any trainer of a causal language model, TRL's or this project's.
        dataset ([`~datasets.Dataset`], *optional*):
            Data with `prompt`s, texts or messages; the trainer's `eval_dataset` by default, its first where there are
            several.
        opponent (`str`, *optional*, defaults to `"reference"`):
            `"reference"`: one sample of the reference of each prompt, drawn once, with the same settings and seed;
            drawn anew at each evaluation of a trainer whose reference moves (`sync_ref_model`). Or the name of a
            column of the dataset with responses, such as `"chosen"`.
        num_prompts (`int`, *optional*, defaults to `64`):
            Prompts, the dataset's first different ones. A win rate on 64 of them has a standard error of 6 points.
        settings ([`SamplingSettings`], *optional*):
            How responses are sampled.
        both_orders (`bool`, *optional*, defaults to `True`):
            Ask the judge about both orders, which cancels a preference for a position.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            The reference; by default the trainer's `ref_model`, or the model without its adapters.
        batch_size (`int`, *optional*, defaults to `16`):
            Responses sampled at once.

    Example:

    ```python
    trainer = DPOTrainer(..., eval_dataset=pairs)
    judge = EndpointJudge("Qwen/Qwen2.5-7B-Instruct", "http://localhost:8000/v1")
    trainer.add_callback(WinRateCallback(judge, trainer, num_prompts=200))
    ```
    """

    NAMES = ("eval_win_rate",) + tuple(
        f"eval_win_rate/{name}" for name in ("low", "high", "ties", "judged", "length", "opponent_length")
    )

    def __init__(
        self,
        judge: Judge | Callable,
        trainer: Trainer,
        dataset: Dataset | Iterable[dict] | None = None,
        *,
        opponent: str = "reference",
        num_prompts: int = 64,
        settings: SamplingSettings | None = None,
        both_orders: bool = True,
        reference: torch.nn.Module | str | None = None,
        batch_size: int = 16,
    ):
        super().__init__(trainer, reference, batch_size)
        self.judge = as_judge(judge)
        self.dataset = dataset
        self.opponent = opponent
        self.num_prompts = num_prompts
        self.settings = settings or SamplingSettings()
        self.both_orders = both_orders
        self._prompts: list | None = None
        self._columns: dict[str, list] = {}
        self._opponents: list | None = None

    def prepare(self):
        column = None if self.opponent == "reference" else self.opponent
        if column is None:
            self._need_reference()
        rows = self._prompt_rows(self.dataset, self.num_prompts, self.judge, column)
        self._prompts, self._columns = [row["prompt"] for row in rows], columns_of(rows)
        self._opponents = None if column is None else [row[column] for row in rows]

    def _sample(self, model) -> list[str]:
        prompts, batch_size = self._prompts or [], self.batch_size
        return sample_responses(model, self.tokenizer, prompts, settings=self.settings, batch_size=batch_size).texts

    def measure(self, state):
        if self._prompts is None:
            self.prepare()
        if self.opponent == "reference" and (self._opponents is None or self._reference_moves):
            with reference_of(self.model, self._need_reference()) as reference:
                self._opponents = self._sample(reference)
        texts, prompts, opponents = self._sample(self.model), self._prompts or [], self._opponents or []
        options: dict[str, Any] = dict(both_orders=self.both_orders, columns=self._columns)
        judgments = self._asked(lambda: judge_responses(self.judge, prompts, texts, opponents, **options))
        plain = [r if isinstance(r, str) else "".join(m.get("content") or "" for m in r) for r in opponents]
        own = [[len(text), len(opponent)] for text, opponent in zip(texts, plain, strict=True)]
        scores = np.array(self._gather(judgments.scores.tolist()))
        lengths = np.array(self._gather(own))
        gathered = Judgements(scores)
        result = gathered.win_rate()
        return {
            "eval_win_rate": result.win_rate,
            "eval_win_rate/low": result.win_rate.low,
            "eval_win_rate/high": result.win_rate.high,
            "eval_win_rate/ties": result.ties / result.win_rate.n,
            "eval_win_rate/judged": gathered.judged.mean(),
            "eval_win_rate/length": lengths[:, 0].mean(),
            "eval_win_rate/opponent_length": lengths[:, 1].mean(),
        }


class FrontierCallback(_EvaluationCallback):
    """
    Logs reward and divergence of the policy's own samples at each evaluation: one point of the frontier. Reward that
    grows while it is bought with ever more KL, or a gold reward that falls while KL grows, is over-optimization.

    | logged | |
    |---|---|
    | `eval_frontier/reward` | mean reward of the samples that have one |
    | `eval_frontier/reverse_kl` | exact KL(policy \\|\\| reference), summed over the tokens, in nats a response |
    | `eval_frontier/reverse_kl_k1` | the same by the plain log ratio, as TRL's online trainers log it |
    | `eval_frontier/entropy` | mean entropy of the next-token distributions, in nats |
    | `eval_frontier/length` | mean length of the samples in tokens |

    The points are also in `frontier.json` in the trainer's output folder, one a step, with their intervals. A resumed
    run and later evaluations go on with it; training from the start begins anew. `eval_frontier/kl` and
    `eval_frontier/kl_k1` are the names in 0.1.0, logged and written beside the new ones for one release. Of a reward
    function that fails ([`JudgeError`]), see [`WinRateCallback`]. With `sync_ref_model` the reference is the one of
    that step.

    Args:
        reward (`Callable` or [`Judge`]):
            A reward function as [`~trl.GRPOTrainer`] takes it, which is given the dataset's columns that it names, or
            a judge that has rewards.
        trainer ([`~transformers.Trainer`]):
            Any trainer of a causal language model, TRL's or this project's.
        dataset ([`~datasets.Dataset`], *optional*):
            Data with `prompt`s; the trainer's `eval_dataset` by default, its first where there are several.
        num_prompts (`int`, *optional*, defaults to `64`):
            Prompts, the dataset's first different ones.
        num_samples (`int`, *optional*, defaults to `1`):
            Samples of each.
        settings ([`SamplingSettings`], *optional*):
            How they are sampled: without truncation.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            The reference; by default the trainer's `ref_model`, or the model without its adapters.
        batch_size (`int`, *optional*, defaults to `16`):
            Responses at once.
    """

    _NAMES_OF_0_1 = {"reverse_kl": "kl", "reverse_kl_k1": "kl_k1"}
    NAMES = tuple(
        f"eval_frontier/{name}"
        for name in ("reward", "reverse_kl", "reverse_kl_k1", "entropy", "length", *_NAMES_OF_0_1.values())
    )

    def __init__(
        self,
        reward: Callable | Judge,
        trainer: Trainer,
        dataset: Dataset | Iterable[dict] | None = None,
        *,
        num_prompts: int = 64,
        num_samples: int = 1,
        settings: SamplingSettings | None = None,
        reference: torch.nn.Module | str | None = None,
        batch_size: int = 16,
    ):
        super().__init__(trainer, reference, batch_size)
        self.judge = reward if isinstance(reward, Judge) else RewardFunctionJudge(reward)
        if not self.judge.has_rewards:
            raise ValueError(f"`reward`: the judge {self.judge.name} compares pairs and has no rewards.")
        self.settings = settings or SamplingSettings()
        if self.settings.truncates:
            raise ValueError(
                f"`settings={self.settings}` truncate, so the samples' KL to the reference is infinite or another "
                "policy's. Use `top_p=1.0`, `top_k=0` and a temperature above 0."
            )
        self.dataset = dataset
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.points: list[dict] = []
        self._points_known = False  # whether those are here that the file has
        self._prompts: list | None = None
        self._columns: dict[str, list] = {}

    def prepare(self):
        self._need_reference()
        rows = self._prompt_rows(self.dataset, self.num_prompts, self.judge)
        self._prompts, columns = [row["prompt"] for row in rows], columns_of(rows)
        self._columns = {
            name: [v for v in values for _ in range(self.num_samples)] for name, values in columns.items()
        }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step > 0:
            self.points = self._stored()
        # What comes after belongs to weights that this run may not go through again, or to another run.
        self.points = [point for point in self.points if point["step"] <= state.global_step]
        self._points_known = True

    @property
    def _path(self) -> Path:
        return Path(self.trainer.args.output_dir) / "frontier.json"

    def _stored(self) -> list[dict]:
        return json.loads(self._path.read_text()) if self._path.exists() else []

    def _keep(self, point: dict) -> None:
        if not self._points_known:
            self.points, self._points_known = self._stored(), True
        others = [other for other in self.points if other["step"] != point["step"]]
        self.points = sorted([*others, point], key=lambda point: point["step"])
        if self.trainer.is_world_process_zero():
            written = self._path.with_suffix(".tmp")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                written.write_text(json.dumps(self.points, indent=1, allow_nan=False))
                os.replace(written, self._path)  # atomic write
            except OSError as error:
                logger.warning(
                    f"`{self._path}` was not written, and training goes on: {error}. Its points are in the log, and "
                    "are written with the next one."
                )

    def measure(self, state):
        if self._prompts is None:
            self.prepare()
        prompts = self._prompts or []
        options: dict[str, Any] = dict(num_samples=self.num_samples, batch_size=self.batch_size)
        samples = sample_responses(self.model, self.tokenizer, prompts, self.settings, **options)
        rewards = self._asked(
            lambda: judge_rewards(self.judge, samples.repeated_prompts, samples.texts, self._columns)
        )
        scores = score_samples(
            self.model,
            samples,
            reference=self._need_reference(),
            divergences=["reverse_kl"],
            batch_size=self.batch_size,
        )
        columns = {
            "reward": rewards,
            "reverse_kl": scores.divergence("reverse_kl"),
            "reverse_kl_k1": scores.kl("k1"),
            "entropy": scores.entropy,
            "length": scores.lengths,
        }
        table = np.stack(list(columns.values()), axis=1).reshape(len(prompts), self.num_samples, -1)
        table = np.array(self._gather(table.tolist()))
        rewards = prompt_rewards(table[:, :, 0])
        if np.isnan(rewards).all():
            raise JudgeError(f"The judge {self.judge.name} gave no reward to any sample.")
        estimates = {name: intervals.mean(table[:, :, i]) for i, name in enumerate(columns) if name != "reward"}
        estimates = {"reward": intervals.mean(rewards[~np.isnan(rewards)]), **estimates}
        estimates |= {old: estimates[new] for new, old in self._NAMES_OF_0_1.items()}
        point = {name: _finite(value.to_dict()) for name, value in estimates.items()}
        self._keep({"step": state.global_step, **point})
        return {f"eval_frontier/{name}": value for name, value in estimates.items()}


def _finite(estimate: dict) -> dict:
    """An estimate as JSON has it: one prompt has no interval, whose ends are infinite."""
    return {name: value if math.isfinite(value) else None for name, value in estimate.items()}
