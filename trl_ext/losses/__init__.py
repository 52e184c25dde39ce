"""Pure loss functions on tensors: no trainer, no model, no I/O. One file a paper."""

from .diffusion import PairErrors, diffusion_dpo_loss, dspo_loss, pair_errors, safeguard_scale
from .f_distill import density_ratio_weight, f_distill_loss
from .f_divergence import DIVERGENCES, INADMISSIBLE_DIVERGENCES, Divergence, TangentTail, f_dpo_loss, get_divergence
from .ipo import ipo_loss
from .mallows import dispersion_weight, mallows_dpo_loss
from .rainbowpo import rainbow_po_loss
from .score_as_action import (
    Transition,
    reward_advantages,
    reward_normalizer,
    step_kl,
    surrogate_reward,
    transition,
)
from .simper import simper_loss
from .tdpo import tdpo_loss


__all__ = [
    "DIVERGENCES",
    "Divergence",
    "INADMISSIBLE_DIVERGENCES",
    "PairErrors",
    "TangentTail",
    "Transition",
    "density_ratio_weight",
    "diffusion_dpo_loss",
    "dispersion_weight",
    "dspo_loss",
    "f_distill_loss",
    "f_dpo_loss",
    "get_divergence",
    "ipo_loss",
    "mallows_dpo_loss",
    "pair_errors",
    "rainbow_po_loss",
    "reward_advantages",
    "reward_normalizer",
    "safeguard_scale",
    "simper_loss",
    "step_kl",
    "surrogate_reward",
    "tdpo_loss",
    "transition",
]
