"""DSPO: score matching toward the preferred images."""

from .dspo_config import DSPOConfig
from .dspo_trainer import DSPOTrainer


__all__ = ["DSPOConfig", "DSPOTrainer"]
