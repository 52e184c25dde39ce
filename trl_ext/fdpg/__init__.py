"""f-DPG: a policy that approaches an explicit target, under any f-divergence."""

from .fdpg_config import FDPGConfig
from .fdpg_trainer import FDPGTrainer
from .moments import Moments, fit_moments


__all__ = ["FDPGConfig", "FDPGTrainer", "Moments", "fit_moments"]
