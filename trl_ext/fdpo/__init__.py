"""f-DPO: DPO under a general f-divergence."""

from .fdpo_config import FDPOConfig
from .fdpo_trainer import FDPOTrainer


__all__ = ["FDPOConfig", "FDPOTrainer"]
