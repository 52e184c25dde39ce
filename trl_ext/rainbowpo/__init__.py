"""RainbowPO: length normalization, reference mixing and contextual scaling in one preference loss."""

from .rainbowpo_config import RainbowPOConfig
from .rainbowpo_trainer import RainbowPOTrainer


__all__ = ["RainbowPOConfig", "RainbowPOTrainer"]
