"""The shared paired step of every language-model method."""

from .method import Method
from .preference_config import PreferenceConfig
from .preference_trainer import PreferenceTrainer
from .scoring import PairLoss, ResponseScores, TokenStatistics


__all__ = ["Method", "PairLoss", "PreferenceConfig", "PreferenceTrainer", "ResponseScores", "TokenStatistics"]
