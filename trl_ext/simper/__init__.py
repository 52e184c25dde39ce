"""SimPER: preference optimization on inverse perplexity, without a reference and without beta."""

from .simper_config import SimPERConfig
from .simper_trainer import SimPERTrainer


__all__ = ["SimPERConfig", "SimPERTrainer"]
