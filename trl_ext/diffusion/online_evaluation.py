"""
Rewards of an evaluation's images: fixed prompts and seeds, the pipeline's own sampler, policy beside reference.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..training.seeds import derive_seed
from ..training.sharding import whole_weights
from .prompt_data import PromptDataset
from .prompts import without_truncation_warnings
from .validation import sample_pixels


if TYPE_CHECKING:  # what the mixin expects to be mixed into
    from .image_trainer import ImageTrainer as _Trainer
    from .rewards import ImageRewards
else:
    _Trainer = object

# Half the width of a 95 % interval, in standard errors.
_INTERVAL = 1.959964


class RewardEvaluation(_Trainer):
    """
    Mixin of a trainer of images whose evaluation samples prompts and rewards the images.

    The images are those that users will have: of the pipeline's own scheduler and guidance, and, with a moving
    average, of the averaged weights. Their seeds depend on the numbers of prompt and image alone, so two evaluations,
    of two runs as well, differ by the weights. The reference's images of the same seeds are rewarded once.
    """

    rewards: "ImageRewards"
    # (row, generation) -> rewards of the policy's image: the sum, and those of the functions
    _evaluated: dict[tuple[int, int], list[float]]
    _evaluated_prompts: PromptDataset

    def _init_metrics(self) -> None:
        super()._init_metrics()
        self._evaluated = {}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._evaluated_prompts = dataloader.dataset
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        keys = list(zip(inputs["row"].tolist(), inputs["generation"].tolist(), strict=True))
        known = self._evaluated_prompts.reference_rewards
        ref_sums = torch.tensor([known.get(key, math.nan) for key in keys], dtype=torch.float64)
        with whole_weights(self.policy, self.policy.reference):
            sums, rewards = self._reward_of(inputs, keys)
            if any(key not in known for key in keys):
                ref_sums, _ = self._reward_of(inputs, keys, reference=True)
        numbers = torch.tensor(keys, dtype=torch.float64)
        table = self.gather(torch.cat([numbers, ref_sums[:, None], sums[:, None], rewards], 1))
        for row, generation, reference, *found in table.tolist():
            # In several processes the last batch is filled up with rows that were there before.
            known[int(row), int(generation)] = reference
            self._evaluated[int(row), int(generation)] = found
        return None, None, None

    def _reward_of(self, inputs, keys, reference: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        args = self.args
        with self.accelerator.autocast(), without_truncation_warnings(self.family.pipeline):
            pixels = sample_pixels(
                self.policy,
                self.family.sampling_conditioning(list(inputs["prompt"])),
                self.image_size,
                seeds=[derive_seed("evaluation", *key) for key in keys],
                num_inference_steps=args.eval_inference_steps,
                guidance_scale=args.eval_guidance_scale,
                reference=reference,
                batch_size=len(keys),
            )
        return self.rewards(list(inputs["prompt"]), pixels, **inputs["columns"])

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = super()._pop_metrics(mode)
        if mode == "eval" and self._evaluated:
            metrics.update(self._reward_statistics())
            self._evaluated.clear()
        return metrics

    def _clear_metrics(self, mode: str) -> None:
        super()._clear_metrics(mode)
        if mode == "eval":
            self._evaluated.clear()

    def _reward_statistics(self) -> dict[str, float]:
        known = self._evaluated_prompts.reference_rewards
        keys = sorted(self._evaluated)
        rows = np.array([row for row, _ in keys])
        found = np.array([self._evaluated[key] for key in keys])
        gains = found[:, 0] - np.array([known[key] for key in keys])
        metrics: dict[str, Any] = {
            **_with_interval("reward", found[:, 0], rows),
            **_with_interval("reward/gain", gains, rows),
            "reward_std": float(np.nanstd(found[:, 0], ddof=1)) if np.isfinite(found[:, 0]).sum() > 1 else 0.0,
        }
        for i, name in enumerate(self.rewards.names):
            column = found[:, 1 + i]
            if np.isfinite(column).any():
                metrics[f"rewards/{name}/mean"] = float(np.nanmean(column))
        return metrics


def _with_interval(name: str, values: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """
    Mean over prompts of their images' mean, and its 95 % interval, from the spread between prompts: images of one
    prompt are no independent observations.
    """
    known = np.isfinite(values)
    means = np.array([values[known & (rows == row)].mean() for row in np.unique(rows[known])])
    if not len(means):
        return {}
    metrics = {name: float(means.mean())}
    if len(means) > 1:
        half = _INTERVAL * float(means.std(ddof=1)) / math.sqrt(len(means))
        metrics |= {f"{name}/low": metrics[name] - half, f"{name}/high": metrics[name] + half}
    return metrics
