"""D2PO: online preference optimization with few gold labels and a discriminator that learns from them."""

from .d2po_config import D2POConfig
from .d2po_trainer import D2POTrainer
from .labellers import (
    CallableLabeller,
    Gold,
    JudgeLabeller,
    Labeller,
    LabellerError,
    RewardFunctionLabeller,
    RewardModelLabeller,
    TerminalLabeller,
)
from .ledger import Ledger, ledger_to_dataset


__all__ = [
    "CallableLabeller",
    "D2POConfig",
    "D2POTrainer",
    "Gold",
    "JudgeLabeller",
    "Labeller",
    "LabellerError",
    "Ledger",
    "RewardFunctionLabeller",
    "RewardModelLabeller",
    "TerminalLabeller",
    "ledger_to_dataset",
]
