"""The win rate over an evaluation set, with a confidence interval, and who judges it."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather
from transformers import TrainerCallback

from ..judges import Judge
from .win_rate_reward import Wins


logger = get_logger(__name__)


class EvaluatedWins:
    """Collects the judge's verdicts on the completions of an evaluation, of all processes."""

    def __init__(self):
        self.batches: list[torch.Tensor] = []

    def add(self, wins: Wins | None, device: torch.device, rows: int | None) -> None:
        """Adds this process's `wins` of a batch; only its first `rows`, over all processes, belong to the dataset."""
        if wins is not None:
            found = gather(torch.as_tensor(wins.probabilities, dtype=torch.float32, device=device))
            self.batches.append(found[:rows].cpu())

    def clear(self) -> None:
        self.batches.clear()

    def metrics(self, name: str, num_generations: int) -> dict[str, float]:
        """The win rate as `name` and the ends of its interval, over groups of `num_generations`. Clears the wins."""
        if not self.batches:
            return {}
        wins = torch.cat(self.batches).view(-1, num_generations).double().numpy()
        self.clear()
        return _with_interval(name, wins)


def warn_of_one_judge(judge: Judge, callbacks: Iterable[TrainerCallback]) -> None:
    """Warns if a callback evaluates with the judge whose verdicts are optimized: a policy learns its mistakes."""
    for callback in callbacks:
        other = getattr(callback, "judge", None)
        if other is None or not (other is judge or _function_of(other) is _function_of(judge)):
            continue
        logger.warning(
            f"`{type(callback).__name__}` evaluates with {judge.name}, the judge whose verdicts are optimized: a policy "
            "also learns to please its mistakes. Give it another judge, if you have one."
        )


def _function_of(judge: Judge):
    return getattr(judge, "function", None) or judge


def _with_interval(name: str, wins: np.ndarray) -> dict[str, float]:
    """The mean of wins `(N, G)` with the ends of its 95 % interval, Student's t over the N prompts."""
    known = ~np.isnan(wins)
    counts = known.sum(1)
    means = np.where(known, wins, 0).sum(1)[counts > 0] / counts[counts > 0]
    if not len(means):
        return {}
    value = float(means.mean())
    found = {name: value}
    if len(means) > 1:
        # The quantile of Student's t by its expansion around the normal one.
        z, df = 1.959964, len(means) - 1
        quantile = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        quantile += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
        half = float(quantile * means.std(ddof=1) / math.sqrt(len(means)))
        found |= {f"{name}_low": max(0.0, value - half), f"{name}_high": min(1.0, value + half)}
    return found
