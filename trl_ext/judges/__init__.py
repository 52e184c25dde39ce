"""Judges, which compare two responses or score one: callables, reward functions, reward models and endpoints."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callables import (
        CallableJudge as CallableJudge,
        Judge as Judge,
        RewardFunctionJudge as RewardFunctionJudge,
        as_judge as as_judge,
    )
    from .endpoint import EndpointJudge as EndpointJudge
    from .loading import load_judge as load_judge
    from .records import RecordedJudge as RecordedJudge
    from .reward_models import RewardModel as RewardModel, RewardModelJudge as RewardModelJudge
    from .verdicts import IndexedVerdict as IndexedVerdict, JudgeError as JudgeError

# Public name -> module that defines it; imported on first use, so that judges made of functions load no model library.
_PUBLIC = {
    "CallableJudge": "callables",
    "EndpointJudge": "endpoint",
    "IndexedVerdict": "verdicts",
    "Judge": "callables",
    "JudgeError": "verdicts",
    "RecordedJudge": "records",
    "RewardFunctionJudge": "callables",
    "RewardModel": "reward_models",
    "RewardModelJudge": "reward_models",
    "as_judge": "callables",
    "load_judge": "loading",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_ext.judges' has no attribute '{name}'. Names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
