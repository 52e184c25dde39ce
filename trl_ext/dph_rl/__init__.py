"""DPH-RL (https://huggingface.co/papers/2509.07430): GRPO that rehearses what the initial model already knew."""

from .collection import Rehearsal, collect_rehearsal
from .dph_rl_config import DPHRLConfig
from .dph_rl_trainer import DPHRLTrainer


__all__ = ["DPHRLConfig", "DPHRLTrainer", "Rehearsal", "collect_rehearsal"]
