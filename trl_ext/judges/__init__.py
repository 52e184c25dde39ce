"""Who judges which of two responses is better, and what scores one: callables, reward functions, reward models, endpoints."""

from .endpoint import EndpointJudge
from .judges import Judge, JudgeError, Judgements, RewardFunctionJudge, RewardModelJudge, judge_responses, load_judge


__all__ = [
    "EndpointJudge",
    "Judge",
    "JudgeError",
    "Judgements",
    "RewardFunctionJudge",
    "RewardModelJudge",
    "judge_responses",
    "load_judge",
]
