"""Pure loss functions on tensors: no trainer, no model, no I/O. One file a paper."""

from .f_divergence import DIVERGENCES, Divergence, TangentTail, f_dpo_loss, get_divergence
from .simper import simper_loss
from .tdpo import tdpo_loss


__all__ = [
    "DIVERGENCES",
    "Divergence",
    "TangentTail",
    "f_dpo_loss",
    "get_divergence",
    "simper_loss",
    "tdpo_loss",
]
