"""
The methods that learn from their own samples, and what most of their tests do.

A method joins the shared suite (`test_sampling_suite.py`), and one over TRL's samplers also the contract tests and the
bad-input tests, with one `Sampling(...)` line in `SAMPLING`. Mark one entry a trainer class `primary=True`: the expensive tests (two processes,
kills, quantization) run for that one. Then run `pytest tests/rollout/test_sampling_suite.py -k <id> --regen-golden`
once and commit the golden trajectory it writes.
"""

import dataclasses
import inspect
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import harness
import methods
import tiny
from datasets import Dataset
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import D2POTrainer, DPHRLTrainer
from trl_ext.fdpg import FDPGTrainer
from trl_ext.rollout import RolloutConfig, RolloutTrainer
from trl_ext.wro import WROTrainer


@dataclass
class PlainGRPOConfig(RolloutConfig, GRPOConfig):
    """The base alone, over GRPO."""


@dataclass
class PlainRLOOConfig(RolloutConfig, RLOOConfig):
    """The base alone, over RLOO."""


class PlainGRPOTrainer(RolloutTrainer, GRPOTrainer):
    config_class = PlainGRPOConfig


class PlainRLOOTrainer(RolloutTrainer, RLOOTrainer):
    config_class = PlainRLOOConfig


@dataclass(frozen=True)
class Sampling:
    """
    One entry of the suite.

    Args:
        id (`str`): Name in test ids and of the golden file.
        trainer, parent (`type`): The method's trainer, and TRL's that it descends from.
        make (`Callable`): Builds a trainer; by default one over TRL's GRPO or RLOO.
        options (`dict`): Arguments of the configuration.
        per_batch (`dict`): Arguments that are counts in a batch of 8; they are scaled with the batch.
        arguments (`Callable`): `() -> dict` of further arguments of the trainer.
        metrics (`tuple[str, ...]`): Logged values that the golden trajectory holds, beside TRL's.
        golden (`dict`): Options of the golden trajectory.
        recipe (`str`): Name of the script in `recipes/` and of its folder of configurations.
        primary (`bool`): Whether the expensive tests run for this entry.
        is_plain (`bool`): Whether it is the base alone, which must be TRL's trainer bit for bit.
    """

    id: str
    trainer: type
    parent: type
    options: dict = field(default_factory=dict)
    per_batch: dict = field(default_factory=dict)
    arguments: Callable[[], dict] = dict
    metrics: tuple[str, ...] = ()
    golden: dict = field(default_factory=dict)
    recipe: str = ""
    primary: bool = False
    is_plain: bool = False
    make: Callable | None = None

    @property
    def config(self) -> type:
        return self.trainer.config_class

    @property
    def keys(self) -> tuple[str, ...]:
        """What the golden trajectory holds."""
        return self.metrics if self.make else ("loss", "reward", "entropy", "grad_norm", *self.metrics)


def rehearsal(count: int = 12) -> Dataset:
    """Answers of several lengths, to the prompts of another seed."""
    rows = tiny.rows(count, seed=3)
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])


REHEARSAL_METRICS = tuple(f"rehearsal/{name}" for name in ("divergence", "kl", "logratio", "forgotten", "bounded"))


def longer_wins(prompts, completions_a, completions_b) -> list[float]:
    """A judge with probabilities, to which length is everything."""
    lengths = ((len(text_of(a)), len(text_of(b))) for a, b in zip(completions_a, completions_b, strict=True))
    return [1 / (1 + math.exp((b - a) / 20)) for a, b in lengths]


def d2po(method, model, folder, *, train_dataset=None, **options):
    """
    D2PO as in the suite of paired methods. It chooses its pairs from a window of completions, which takes the place of
    TRL's generation window.
    """
    paired = methods.BY_ID["d2po"]
    defaults = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_completion_length": 6}
    steps = options.pop("steps_per_generation", options.get("gradient_accumulation_steps", 1))
    given = {**defaults, **method.options, **options}
    size = given["per_device_train_batch_size"] * int(os.environ.get("WORLD_SIZE", 1))
    given.setdefault("window_size", size * steps)
    if train_dataset is None:
        train_dataset = prompts()
    return harness.trainer(paired, model, folder, train_dataset=train_dataset, **given)


SAMPLING = [
    Sampling("plain_grpo", PlainGRPOTrainer, GRPOTrainer, primary=True, is_plain=True),
    Sampling("plain_rloo", PlainRLOOTrainer, RLOOTrainer, options={"beta": 0.1}, is_plain=True),
    Sampling(
        "dph_rl",
        DPHRLTrainer,
        GRPOTrainer,
        options={"rehearsal_coef": 1.0},
        per_batch={"rehearsal_batch_size": 8},
        arguments=lambda: {"rehearsal_dataset": rehearsal()},
        metrics=REHEARSAL_METRICS,
        recipe="dph_rl",
        primary=True,
    ),
    Sampling(
        "fdpg",
        FDPGTrainer,
        RLOOTrainer,
        options={"partition": "prompt", "max_pseudo_reward": 5.0},
        metrics=("fdpg/divergence", "fdpg/log_z", "fdpg/ess", "fdpg/clipped"),
        recipe="fdpg",
        primary=True,
    ),
    Sampling(
        "wro",
        WROTrainer,
        RLOOTrainer,
        options={"num_anchors": 2},
        arguments=lambda: {"judge": longer_wins},
        metrics=("win_rate/reference",),
        recipe="wro",
        primary=True,
    ),
    Sampling(
        "d2po",
        D2POTrainer,
        DPOTrainer,
        make=d2po,
        metrics=("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy"),
        # As in 0.1.0.
        golden=dict(
            train_dataset=tiny.dataset().select_columns(["prompt"]),
            per_device_train_batch_size=4,
            max_completion_length=8,
            learning_rate=1e-3,
        ),
        recipe="d2po",
        primary=True,
    ),
]
# Over TRL's samplers, with rewards, groups and generation windows.
ROLLOUTS = [method for method in SAMPLING if issubclass(method.trainer, RolloutTrainer)]

PRIMARY = [method for method in SAMPLING if method.primary]
PLAIN = [method for method in SAMPLING if method.is_plain]
BY_ID = {method.id: method for method in SAMPLING}


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def reward(prompts, completions, **columns) -> list[float]:
    """A reward that differs between almost any two completions."""
    return [zlib.crc32(text_of(completion).encode()) % 97 / 97 for completion in completions]


def prompts(count: int = 16, conversational: bool = False, seed: int = 0) -> Dataset:
    return tiny.dataset(count, conversational, seed).select_columns(["prompt"])


def options_of(method: Sampling, folder, **options) -> dict:
    """Options of a short run that generates four completions of two prompts at once."""
    defaults = {
        **harness.defaults(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
    }
    given = {**defaults, **method.options, **options}
    size = given["per_device_train_batch_size"]
    scaled = {name: max(1, count * size // 8) for name, count in method.per_batch.items() if isinstance(size, int)}
    return {**scaled, **given}


_TRAINER_ARGUMENTS = {"eval_dataset", "callbacks", "optimizers", "quantization_config", "processing_class"}


def trainer(method: Sampling, model, folder, *, train_dataset=None, peft_config=None, reward_funcs=reward, **options):
    """A trainer over 16 tiny prompts; trainer arguments are recognized by name, the rest is the configuration's."""
    if method.make is not None:
        return method.make(method, model, folder, train_dataset=train_dataset, peft_config=peft_config, **options)
    fields = {option.name for option in dataclasses.fields(method.config)}
    own = _TRAINER_ARGUMENTS | set(inspect.signature(method.trainer.__init__).parameters) - fields
    arguments = {**method.arguments(), **{name: options.pop(name) for name in list(options) if name in own}}
    return method.trainer(
        model=model,
        reward_funcs=reward_funcs,
        args=method.config(**options_of(method, folder, **options)),
        train_dataset=prompts() if train_dataset is None else train_dataset,
        peft_config=peft_config,
        **arguments,
    )


def fix_samples(trained) -> None:
    """
    Replaces sampling by completions that depend on the prompt, on which of its completions it is, and on the step:
    what is trained on is then the same however it is split over batches and processes.
    """
    if not isinstance(trained, RolloutTrainer):
        return  # whose samples do not depend on them

    def generate(self, prompt_ids, *args, **kwargs):
        seen: dict[tuple, int] = {}
        completions = []
        for ids in prompt_ids:
            copy = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
            start = zlib.crc32(repr((ids, copy, self.state.global_step)).encode())
            # Ending tokens have ids below 5.
            completions.append([5 + (start // (k + 1)) % 370 for k in range(2 + start % 4)])
        return completions if isinstance(self, RLOOTrainer) else (completions, None)

    trained._generate_single_turn = generate.__get__(trained)
