"""Win-rate optimization: the probability of beating anchors, as a judge sees it, is the reward."""

from .anchors import add_anchors
from .win_rate_reward import WinRateReward
from .wro_config import WROConfig
from .wro_trainer import WROTrainer


__all__ = ["WROConfig", "WROTrainer", "WinRateReward", "add_anchors"]
