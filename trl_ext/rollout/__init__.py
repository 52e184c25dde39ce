"""What methods share that learn from rewards of their own samples, over TRL's GRPO and RLOO trainers."""

from .pass_rates import AnswerOptions, PassRates, filter_by_pass_rate, measure_pass_rates
from .rollout_config import RolloutConfig
from .rollout_trainer import RolloutTrainer


__all__ = [
    "AnswerOptions",
    "PassRates",
    "RolloutConfig",
    "RolloutTrainer",
    "filter_by_pass_rate",
    "measure_pass_rates",
]
