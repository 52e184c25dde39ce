"""Callbacks that measure, at each evaluation of a TRL trainer, what its loss does not say."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerCallback

from . import intervals, ranking
from ._data import distinct_prompts, head
from .generation import SamplingSettings, reference_of, sample_responses, score_samples
from .judges import Judge, Judgements, RewardFunctionJudge, as_judge, judge_responses, judge_rewards
from .scoring import evaluating, score_responses, tokenize_pairs


class _EvaluationCallback(TrainerCallback):
    """
    What the callbacks below share: once an evaluation, measure, log, and leave training as it would have been.

    Sampling has its own random state and scoring needs none, so a run with the callback has the same weights, bit for bit, as
    one without. In several processes each takes a share of the prompts.
    """

    def __init__(self, trainer, reference=None, batch_size: int = 8):
        self.trainer = trainer
        self.given_reference = reference
        self.batch_size = batch_size
        self.history: list[dict] = []  # one entry an evaluation: the step and the logged numbers
        self._training = False
        self._last_step: int | None = None  # of this training
        self._check_whole_weights()

    def measure(self, state) -> dict[str, float | None]:
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._last_step = True, None
        # Its numbers are those of the weights at that step, which this run may not go through again.
        self.history = [entry for entry in self.history if entry["step"] <= state.global_step]

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # With several evaluation datasets this event comes once for each of them.
        if not (self._training and self._last_step == state.global_step):
            self._last_step = state.global_step
            with evaluating(self.model):  # a trainer's log is an evaluation's where its model is in evaluation mode
                found = {name: float(value) for name, value in self.measure(state).items() if value is not None}
                self.trainer.log(dict(found))
            self.history.append({"step": state.global_step, **found})
        if metrics is not None:  # so that `metric_for_best_model` can name them
            metrics.update({name: value for name, value in self.history[-1].items() if name != "step"})

    def _check_whole_weights(self) -> None:
        accelerator = self.trainer.accelerator
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        zero3 = plugin is not None and plugin.zero_stage == 3
        if zero3 or accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                f"`{type(self).__name__}` needs whole weights in every process, and {'ZeRO-3' if zero3 else 'FSDP'} shards "
                "them. Leave the callback out and run `trl-ext evaluate` on the checkpoints."
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

    def _need_reference(self):
        if self.reference is None:
            raise ValueError(
                f"`{type(self).__name__}` compares with a reference, and this `{type(self.trainer).__name__}` keeps none. "
                "Give the callback one: `reference=AutoModelForCausalLM.from_pretrained(...)`."
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

    def _share(self, items: Sequence) -> list:
        accelerator = self.trainer.accelerator
        return list(items)[accelerator.process_index :: accelerator.num_processes]

    def _gather(self, items: list) -> list:
        """What every process found, in the order of the processes."""
        return gather_object(items) if self.trainer.accelerator.num_processes > 1 else items


class RankingAccuracyCallback(_EvaluationCallback):
    r"""
    Logs the ranking accuracy of the policy at each evaluation: how often it would rather say the chosen response, which
    `rewards/accuracies` does not tell (https://huggingface.co/papers/2405.19534).

    | logged | |
    |---|---|
    | `eval_ranking/accuracy`, `eval_ranking/accuracy_norm` | of the policy, raw and length-normalised |
    | `eval_ranking/reference_accuracy`, `eval_ranking/reference_accuracy_norm` | of the reference |
    | `eval_ranking/reward_accuracy` | share of pairs with the greater log ratio on the chosen side |
    | `eval_ranking/flipped` | of the pairs that the reference ranks wrongly, the share that the policy ranks correctly |
    | `eval_ranking/unflipped` | of those that it ranks correctly, the share that the policy ranks wrongly |

    Those of the reference are left out where there is none.

    Args:
        trainer ([`~transformers.Trainer`]):
            Any trainer of a causal language model, TRL's or this project's.
        dataset ([`~datasets.Dataset`], *optional*):
            Preference pairs, as for [`score_pairs`]; the trainer's `eval_dataset` by default, its first where there are
            several.
        num_pairs (`int`, *optional*):
            Pairs to score, the dataset's first; all by default.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            The reference; by default the trainer's `ref_model`, or the model without its adapters. It is scored once.
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

    def __init__(self, trainer, dataset=None, *, num_pairs=None, reference=None, max_length=None, batch_size=8):
        super().__init__(trainer, reference, batch_size)
        self.dataset = dataset
        self.num_pairs = num_pairs
        self.max_length = getattr(trainer.args, "max_length", None) if max_length is None else max_length
        self._pairs = None
        self._ref_logps: list[np.ndarray] | None = None

    def _score(self, model) -> list[np.ndarray]:
        """Log-probabilities of both sides of this process's pairs."""
        prompts = [pair["prompt_ids"] for pair in self._pairs]
        sides = ([pair[side] for pair in self._pairs] for side in ("chosen_ids", "rejected_ids"))
        return [score_responses(model, prompts, ids, batch_size=self.batch_size).logps for ids in sides]

    def measure(self, state):
        if self._pairs is None:
            rows = head(self._rows(self.dataset), self.num_pairs)
            pairs = tokenize_pairs(rows, self.tokenizer, self.max_length)
            if len(pairs) < self.trainer.accelerator.num_processes:
                raise ValueError(f"{len(pairs)} pairs are too few for the number of processes. Raise `num_pairs`.")
            self._pairs = self._share(pairs)
        if self._ref_logps is None and self.reference is not None:
            with reference_of(self.model, self.reference) as reference:
                self._ref_logps = self._score(reference)
        columns = self._score(self.model)
        columns += [np.array([len(pair[side]) for pair in self._pairs]) for side in ("chosen_ids", "rejected_ids")]
        columns += self._ref_logps or []
        columns = np.array(self._gather(np.stack(columns, axis=1).tolist())).T
        logps, lengths, ref_logps = columns[:2], columns[2:4], columns[4:]
        found = {
            "eval_ranking/accuracy": ranking.ranking_accuracy(*logps),
            "eval_ranking/accuracy_norm": ranking.ranking_accuracy(*logps, *lengths),
        }
        if len(ref_logps):
            found |= {
                "eval_ranking/reference_accuracy": ranking.ranking_accuracy(*ref_logps),
                "eval_ranking/reference_accuracy_norm": ranking.ranking_accuracy(*ref_logps, *lengths),
                "eval_ranking/reward_accuracy": ranking.reward_accuracy(*(logps - ref_logps)),
                "eval_ranking/flipped": ranking.flipped(*logps, *ref_logps),
                "eval_ranking/unflipped": ranking.unflipped(*logps, *ref_logps),
            }
        return found


class WinRateCallback(_EvaluationCallback):
    """
    Logs the win rate of the policy over its reference, or over the dataset's responses, at each evaluation.

    | logged | |
    |---|---|
    | `eval_win_rate` | (wins + ties / 2) / prompts, over both orders |
    | `eval_win_rate/low`, `eval_win_rate/high` | its 95% interval |
    | `eval_win_rate/ties` | share of prompts without a winner |
    | `eval_win_rate/judged` | share of prompts on which the judge gave a verdict |
    | `eval_win_rate/length`, `eval_win_rate/opponent_length` | mean length of the responses, in characters |

    Args:
        judge ([`Judge`] or `Callable`):
            See [`judge_responses`].
        trainer ([`~transformers.Trainer`]):
            Any trainer of a causal language model, TRL's or this project's.
        dataset ([`~datasets.Dataset`], *optional*):
            Data with `prompt`s, texts or messages; the trainer's `eval_dataset` by default, its first where there are several.
        opponent (`str`, *optional*, defaults to `"reference"`):
            `"reference"`: one sample of the reference of each prompt, drawn once, with the same settings and seed. Or the name
            of a column of the dataset with responses, such as `"chosen"`.
        num_prompts (`int`, *optional*, defaults to `64`):
            Prompts, the dataset's first different ones. A win rate on 64 of them has a standard error of 6 points.
        settings ([`SamplingSettings`], *optional*):
            How responses are sampled.
        both_orders (`bool`, *optional*, defaults to `True`):
            Ask the judge about both orders, which takes out a preference for a position.
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

    def __init__(
        self,
        judge: Judge | Callable,
        trainer,
        dataset=None,
        *,
        opponent: str = "reference",
        num_prompts: int = 64,
        settings: SamplingSettings | None = None,
        both_orders: bool = True,
        reference=None,
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
        self._opponents: list | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.opponent == "reference":
            self._need_reference()

    def _sample(self, model) -> list[str]:
        options = dict(settings=self.settings, batch_size=self.batch_size)
        return sample_responses(model, self.tokenizer, self._prompts, **options).texts

    def _prepare(self) -> None:
        column = None if self.opponent == "reference" else self.opponent
        prompts, responses = distinct_prompts(self._rows(self.dataset), self.num_prompts, column)
        if len(prompts) < self.trainer.accelerator.num_processes:
            raise ValueError(f"{len(prompts)} prompts are too few for the number of processes. Raise `num_prompts`.")
        if column is not None and any(response is None for response in responses):
            raise ValueError(
                f"`opponent={self.opponent!r}`: the dataset has no such column, or one without a response."
            )
        self._prompts = self._share(prompts)
        if column is None:
            with reference_of(self.model, self._need_reference()) as reference:
                self._opponents = self._sample(reference)
        else:
            eos = self.tokenizer.eos_token or ""
            # A trainer's prepared dataset has the end-of-sequence token at the end of its texts.
            self._opponents = [r.removesuffix(eos) if isinstance(r, str) else r for r in self._share(responses)]

    def measure(self, state):
        if self._prompts is None:
            self._prepare()
        texts = self._sample(self.model)
        judgements = judge_responses(self.judge, self._prompts, texts, self._opponents, both_orders=self.both_orders)
        opponents = [r if isinstance(r, str) else "".join(m.get("content") or "" for m in r) for r in self._opponents]
        lengths = [[len(text), len(opponent)] for text, opponent in zip(texts, opponents, strict=True)]
        scores = np.array(self._gather(judgements.scores.tolist()))
        lengths = np.array(self._gather(lengths))
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
    Logs reward and divergence of the policy's own samples at each evaluation: one point of the frontier. Reward that grows
    while it is bought with ever more KL, or a gold reward that falls while KL grows, is over-optimisation.

    | logged | |
    |---|---|
    | `eval_frontier/reward` | mean reward of the samples |
    | `eval_frontier/kl` | KL(policy \\|\\| reference) in nats a response: the exact token KL summed over the samples' tokens |
    | `eval_frontier/kl_k1` | the same by the plain log ratio, as TRL's online trainers log it |
    | `eval_frontier/entropy` | mean entropy of the next-token distributions, in nats |
    | `eval_frontier/length` | mean length of the samples in tokens |

    The points are also in `frontier.json` in the trainer's output folder, with their intervals; a resumed run goes on with it.

    Args:
        reward (`Callable` or [`Judge`]):
            A reward function as [`~trl.GRPOTrainer`] takes it, or a judge that has rewards.
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

    def __init__(
        self,
        reward: Callable | Judge,
        trainer,
        dataset=None,
        *,
        num_prompts: int = 64,
        num_samples: int = 1,
        settings: SamplingSettings | None = None,
        reference=None,
        batch_size: int = 16,
    ):
        super().__init__(trainer, reference, batch_size)
        self.judge = reward if isinstance(reward, Judge) else RewardFunctionJudge(reward)
        if not self.judge.has_rewards:
            raise ValueError(f"`reward`: the judge {self.judge.name} compares pairs and has no rewards.")
        self.settings = settings or SamplingSettings()
        if self.settings.truncates:
            raise ValueError(
                f"`settings={self.settings}` truncate, so the samples' KL to the reference is infinite or another policy's. "
                "Use `top_p=1.0`, `top_k=0` and a temperature above 0."
            )
        self.dataset = dataset
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.points: list[dict] = []
        self._prompts: list | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._need_reference()
        path = self._path(args)
        self.points = []
        if state.global_step > 0 and path.exists():
            self.points = [point for point in json.loads(path.read_text()) if point["step"] <= state.global_step]

    @staticmethod
    def _path(args) -> Path:
        return Path(args.output_dir) / "frontier.json"

    def measure(self, state):
        if self._prompts is None:
            prompts, _ = distinct_prompts(self._rows(self.dataset), self.num_prompts)
            if len(prompts) < self.trainer.accelerator.num_processes:
                raise ValueError(
                    f"{len(prompts)} prompts are too few for the number of processes. Raise `num_prompts`."
                )
            self._prompts = self._share(prompts)
        options = dict(num_samples=self.num_samples, batch_size=self.batch_size)
        samples = sample_responses(self.model, self.tokenizer, self._prompts, self.settings, **options)
        rewards = judge_rewards(self.judge, samples.repeated_prompts, samples.texts)
        scores = score_samples(
            self.model,
            samples,
            reference=self._need_reference(),
            divergences=["reverse_kl"],
            batch_size=self.batch_size,
        )
        columns = {
            "reward": np.array(rewards),
            "kl": scores.divergence("reverse_kl"),
            "kl_k1": scores.kl("k1"),
            "entropy": scores.entropy,
            "length": scores.lengths,
        }
        table = np.stack(list(columns.values()), axis=1).reshape(len(self._prompts), self.num_samples, -1)
        table = np.array(self._gather(table.tolist()))
        estimates = {name: intervals.mean(table[:, :, i]) for i, name in enumerate(columns)}
        point = {"step": state.global_step, **{name: value.to_dict() for name, value in estimates.items()}}
        self.points.append(point)
        if self.trainer.is_world_process_zero():
            path = self._path(self.trainer.args)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.points, indent=1))
        return {f"eval_frontier/{name}": value for name, value in estimates.items()}
