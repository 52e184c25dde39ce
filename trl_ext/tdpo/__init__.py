"""TDPO: DPO with a KL divergence from the reference at every token."""

from .tdpo_config import TDPOConfig
from .tdpo_trainer import TDPOTrainer


__all__ = ["TDPOConfig", "TDPOTrainer"]
