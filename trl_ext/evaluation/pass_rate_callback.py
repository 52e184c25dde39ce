"""Callback that adds pass@k to each evaluation of a TRL trainer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from datasets import Dataset
from transformers import Trainer

from .._checks import at_least, check_value
from ..judges.callables import RewardFunctionJudge, judge_rewards
from ..judges.verdicts import JudgeError
from .callbacks import _EvaluationCallback
from .data import columns_of
from .generation import SamplingSettings, sample_responses
from .pass_rates import mean_pass_at_k


class PassAtKCallback(_EvaluationCallback):
    """
    Logs pass@k of the policy at each evaluation: how often at least one of k samples of a prompt is right.

    | logged | |
    |---|---|
    | `eval_pass@{k}` | mean of [`pass_at_k`] over the prompts, for each k |
    | `eval_pass@{k}/low`, `eval_pass@{k}/high` | its 95% interval |

    Each may be `metric_for_best_model`. Where a reward function fails ([`JudgeError`]) nothing is logged, and training
    goes on.

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions as [`~trl.GRPOTrainer`] takes them. They are given the dataset's columns.
        trainer ([`~transformers.Trainer`]):
            Any trainer of a causal language model.
        dataset ([`~datasets.Dataset`], *optional*):
            Data with `prompt`s, texts or messages; the trainer's `eval_dataset` by default.
        k (`Sequence[int]`, *optional*, defaults to `(1, 8)`):
            Samples that are allowed.
        num_samples (`int`, *optional*, defaults to `16`):
            Samples of each prompt, at least the largest `k`; twice as many reduce the variance.
        reward_threshold (`float`, *optional*, defaults to `1.0`):
            Least reward of a right sample. One without a reward is wrong.
        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions; all 1 by default.
        num_prompts (`int`, *optional*, defaults to `64`):
            Prompts, the dataset's first different ones.
        settings ([`SamplingSettings`], *optional*):
            How samples are drawn.
        batch_size (`int`, *optional*, defaults to `16`):
            Samples drawn at once.

    Raises:
        `ValueError`: If there is no `k`, or one that is below 1 or above `num_samples`.

    Example:

    ```python
    trainer = GRPOTrainer(..., eval_dataset=held_out)
    trainer.add_callback(PassAtKCallback(accuracy_reward, trainer, k=(1, 8), num_samples=16))
    ```
    """

    def __init__(
        self,
        reward_funcs: Callable | list[Callable],
        trainer: Trainer,
        dataset: Dataset | Iterable[dict] | None = None,
        *,
        k: Sequence[int] = (1, 8),
        num_samples: int = 16,
        reward_threshold: float = 1.0,
        reward_weights: list[float] | None = None,
        num_prompts: int = 64,
        settings: SamplingSettings | None = None,
        batch_size: int = 16,
    ):
        super().__init__(trainer, None, batch_size)
        self.judge = RewardFunctionJudge(reward_funcs, reward_weights)
        self.dataset = dataset
        self.num_samples = check_value("num_samples", num_samples, Annotated[int, at_least(1)])
        self.k = [check_value(f"k[{i}]", each, Annotated[int, at_least(1)]) for i, each in enumerate(k)]
        if not self.k or max(self.k) > self.num_samples:
            raise ValueError(
                f"`k={list(k)}` must name one number or more, none above `num_samples={num_samples}`. Raise "
                "`num_samples`, or lower `k`."
            )
        self.reward_threshold = check_value("reward_threshold", reward_threshold, float)
        self.num_prompts = check_value("num_prompts", num_prompts, Annotated[int, at_least(1)])
        self.settings = settings or SamplingSettings()
        self.NAMES = tuple(f"eval_pass@{each}{end}" for each in self.k for end in ("", "/low", "/high"))
        self._prompts: list | None = None
        self._columns: dict[str, list] = {}

    def prepare(self):
        rows = self._prompt_rows(self.dataset, self.num_prompts, self.judge)
        self._prompts = [row["prompt"] for row in rows]
        repeated = [row for row in rows for _ in range(self.num_samples)]
        self._columns = columns_of(repeated)

    def measure(self, state):
        if self._prompts is None:
            self.prepare()
        prompts = self._prompts or []
        options: dict[str, Any] = dict(num_samples=self.num_samples, batch_size=self.batch_size)
        samples = sample_responses(self.model, self.tokenizer, prompts, self.settings, **options)
        found = self._asked(lambda: judge_rewards(self.judge, samples.repeated_prompts, samples.texts, self._columns))
        rewards = np.array(self._gather(found.reshape(len(prompts), self.num_samples).tolist()))
        if np.isnan(rewards).all():
            raise JudgeError(f"The reward function {self.judge.name} gave no reward to any sample.")
        # Rewards are sums of floats: 0.1 + 0.2 is a right sample where 0.3 is asked for. NaN is none.
        right = rewards >= self.reward_threshold - 1e-6 * max(1.0, abs(self.reward_threshold))
        result: dict[str, float | None] = {}
        for k in self.k:
            estimate = mean_pass_at_k(self.num_samples, right.sum(1), k)
            values = {"": estimate.value, "/low": estimate.low, "/high": estimate.high}
            result |= {f"eval_pass@{k}{end}": value for end, value in values.items()}
        return result
