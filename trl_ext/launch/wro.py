"""`trl-ext wro`: the judge, and further rewards."""

from dataclasses import dataclass, field
from typing import Any

from .rollout import RewardArguments, RolloutScript, load_rewards


@dataclass
class JudgeArguments:
    """
    The judge.

    Args:
        judge (`str`):
            `FILE.py:FUNCTION` or `MODULE:FUNCTION`, a function on pairs or a reward function;
            `reward_model:ID_OR_FOLDER`, or `endpoint:MODEL@URL`.
    """

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Who compares completions: FILE.py:FUNCTION or MODULE:FUNCTION (a function on pairs, or a reward "
            "function), reward_model:ID_OR_FOLDER, or endpoint:MODEL@URL."
        },
    )


class JudgeScript(RolloutScript):
    """Script of win-rate optimization."""

    arguments = (RewardArguments, JudgeArguments)
    example = (
        "--config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_prompts.jsonl "
        "--judge my_judge.py:prefers"
    )

    def trainer_arguments(self, *more) -> dict[str, Any]:
        from ..judges import load_judge

        reward_args, judge_args = more
        if not judge_args.judge:
            raise ValueError(
                "`--judge` is required: FILE.py:FUNCTION of yours, reward_model:ID_OR_FOLDER, or endpoint:MODEL@URL."
            )
        rewards = load_rewards(reward_args.reward) if reward_args.reward else []
        return {"reward_funcs": rewards, "judge": load_judge(judge_args.judge)}
