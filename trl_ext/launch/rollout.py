"""Methods that sample, on the command line: their reward functions, and what they read besides prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .scripts import Script


@dataclass
class RewardArguments:
    """
    Rewards.

    Args:
        reward (`list[str]`):
            Reward functions as `trl.GRPOTrainer` takes them: `FILE.py:FUNCTION` or `MODULE:FUNCTION`, such as
            `trl.rewards:accuracy_reward`. Their rewards are added, with `reward_weights` if given.
    """

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: FILE.py:FUNCTION or MODULE:FUNCTION, such as trl.rewards:accuracy_reward. "
            "`reward_weights` weighs them.",
            "nargs": "+",
        },
    )


def load_rewards(names: list[str] | str | None) -> list[Callable]:
    """
    The reward functions that the command line names.

    Raises:
        `ValueError`: If there is none, or one cannot be loaded.
    """
    from ..judges.loading import load_function

    if not names:
        raise ValueError(
            "`--reward` is required: FILE.py:FUNCTION of yours, or MODULE:FUNCTION, such as "
            "trl.rewards:accuracy_reward."
        )
    return [load_function(name, "reward") for name in ([names] if isinstance(names, str) else names)]


class RolloutScript(Script):
    """Script of the methods that sample from prompts."""

    arguments: tuple[type, ...] = (RewardArguments,)
    unit = "prompts"
    example = (
        "--config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_prompts.jsonl "
        "--reward my_rewards.py:is_right"
    )

    def trainer_arguments(self, *more) -> dict[str, Any]:
        reward_args: RewardArguments = more[0]
        return {"reward_funcs": load_rewards(reward_args.reward)}

    # ---- For `--dry_run` -------------------------------------------------------------------------------------------

    def describe_data(self, trainer) -> list[str]:
        args = trainer.args
        count = f"{len(trainer.train_dataset):,}" if hasattr(trainer.train_dataset, "__len__") else "streamed"
        return [
            f"training data      {count} prompts",
            f"samples            {args.num_generations} of each prompt, up to {args.max_completion_length} tokens; "
            f"{args.generation_batch_size:,} at once, every {args.steps_per_generation * args.num_iterations} "
            "micro-steps",
        ]

    def step_size(self, trainer) -> tuple[float, float]:
        args = trainer.args
        completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        # Each window of completions is trained on `num_iterations` times.
        return completions / (args.num_generations * args.num_iterations), float("nan")

    def example_row(self, trainer) -> list[str]:
        return ["first prompt", f"  {next(iter(trainer.train_dataset))['prompt']}"]


@dataclass
class RehearsalArguments:
    """
    Answers to rehearse.

    Args:
        rehearsal_dataset_name (`str`, *optional*):
            What `trl-ext rehearsal` wrote: `rehearsal.jsonl` in its `output_dir`; or any data with `prompt` and
            `completion`.
    """

    rehearsal_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Answers to rehearse: `rehearsal.jsonl` of `trl-ext rehearsal`, or data with `prompt` and "
            "`completion`."
        },
    )


class RehearsalScript(RolloutScript):
    """Script of DPH-RL."""

    arguments = (RewardArguments, RehearsalArguments)
    example = (
        "--config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name answers/exploration.jsonl "
        "--rehearsal_dataset_name answers/rehearsal.jsonl --reward my_rewards.py:is_right"
    )
    hints = (
        "",
        "The answers come from `trl-ext rehearsal`:",
        "",
        "  trl-ext rehearsal --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_prompts.jsonl "
        "--reward my_rewards.py:is_right --output_dir answers",
    )

    def trainer_arguments(self, *more) -> dict[str, Any]:
        from ..training.named_datasets import get_split, load_named_dataset

        rehearsal_args: RehearsalArguments = more[1]
        arguments = super().trainer_arguments(*more)
        name, option = rehearsal_args.rehearsal_dataset_name, "rehearsal_dataset_name"
        if name is not None:
            dataset = load_named_dataset(name, option=option)
            arguments["rehearsal_dataset"] = get_split(dataset, "train", option)
        return arguments
