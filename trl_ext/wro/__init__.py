"""Win-rate optimization: the probability of beating anchors, as a judge sees it, is the reward."""

from .anchors import add_anchors
from .win_rate_reward import WinRateReward


__all__ = ["WinRateReward", "add_anchors"]
