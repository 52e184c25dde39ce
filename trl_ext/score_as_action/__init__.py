"""Score as Action: online rewards for text-to-image models, by the policy gradient of their sampler."""

from .score_as_action_config import ScoreAsActionConfig
from .score_as_action_trainer import ScoreAsActionTrainer


__all__ = ["ScoreAsActionConfig", "ScoreAsActionTrainer"]
