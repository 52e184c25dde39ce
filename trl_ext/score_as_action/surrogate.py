"""Rewards whose KL-regularized optimum is that of another divergence."""

from collections.abc import Sequence

import torch

from ..losses import Divergence, reward_normalizer, surrogate_reward


class SurrogateRewards:
    """
    Transforms the rewards of a window's images by [`~trl_ext.losses.surrogate_reward`], with the reference's rewards
    of each prompt, and logs the normalizer and the share of rewards at either end.

    Args:
        trainer ([`ScoreAsActionTrainer`]):
            The trainer.
        divergence ([`~trl_ext.losses.Divergence`]):
            The divergence.
    """

    def __init__(self, trainer, divergence: Divergence):
        self.trainer = trainer
        self.divergence = divergence

    def __call__(self, rewards: torch.Tensor, rows: Sequence[int], is_logged: bool = True) -> torch.Tensor:
        """
        Args:
            rewards (`torch.Tensor` of shape `(N,)`):
                Rewards of whole groups, divided by the reward scale; NaN for no opinion.
            rows (`Sequence[int]`):
                Row of the dataset of each group.
            is_logged (`bool`, *optional*, defaults to `True`):
                Whether they are the rewards that the log is about.
        """
        trainer, args, window = self.trainer, self.trainer.args, self.trainer._window["train"]
        trainer.reference_rewards.measure(rows, args.reference_images_per_prompt)
        scale = trainer.reference_rewards.spread if args.reward_scale == "reference" else 1.0
        transformed = torch.full_like(rewards, torch.nan)
        for group, row in enumerate(rows):
            reference = torch.tensor(trainer.reference_rewards.by_row[row], dtype=rewards.dtype, device=rewards.device)
            reference = reference[~reference.isnan()] / scale
            where = slice(group * args.num_generations, (group + 1) * args.num_generations)
            known = ~rewards[where].isnan()
            if not len(reference) or not known.any():
                continue
            options = dict(beta=args.beta, divergence=self.divergence)
            surrogate = surrogate_reward(rewards[where][known], reference, **options)
            transformed[where][known] = surrogate.to(rewards.dtype)
            if not is_logged:
                continue
            log_ratios = surrogate / args.beta
            window.add("divergence/normalizer", reward_normalizer(reference, **options).item() * scale)
            window.add("divergence/floored", (log_ratios <= -20.0 + 1e-4).sum().item(), len(log_ratios))
            window.add(
                "divergence/capped",
                (log_ratios >= torch.log(torch.tensor(100.0)) - 1e-4).sum().item(),
                len(log_ratios),
            )
        return transformed
