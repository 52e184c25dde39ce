"""What f-DPG logs of its responses."""

import torch

from ..losses import Divergence
from .pseudo_rewards import PseudoRewards, effective_share


def statistics(
    found: PseudoRewards,
    log_weights: torch.Tensor,
    log_z: torch.Tensor,
    divergence: Divergence,
    group_size: int,
    rows: int | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Values of each response and a mask of those that count, by the metric's name with `__` for `/`.

    Args:
        found ([`PseudoRewards`]):
            Pseudo-rewards of the responses of all processes.
        log_weights, log_z (`torch.Tensor` of shape `(N,)`):
            As for [`pseudo_rewards`].
        divergence ([`~trl_ext.losses.Divergence`]):
            The divergence.
        group_size (`int`):
            Responses of a group.
        rows (`int`, *optional*):
            Number of the first responses that count. All of them by default.
    """
    counts, ratio = ~log_weights.isnan(), found.log_target_ratio
    if rows is not None:
        counts &= torch.arange(len(counts), device=counts.device) < rows
    # D_f = E_pi[f(u) / u], u = e^t.
    scaled = divergence.scaled_value(ratio.nan_to_num(nan=0.0, posinf=torch.inf)) * (-ratio).clamp(min=0).exp()
    values = {
        "fdpg__divergence": (scaled, counts & scaled.isfinite()),
        "fdpg__kl_policy_target": (ratio, counts & ratio.isfinite()),
        "fdpg__log_z": (log_z, counts & log_z.isfinite()),
        "fdpg__ess": (effective_share(log_weights, group_size), counts),
        "fdpg__pseudo_reward": (found.values, counts),
        "fdpg__clipped": (found.clipped.double(), counts),
        "fdpg__forbidden": (torch.isneginf(log_weights).double(), counts),
    }
    return {name: (value.masked_fill(~where, 0.0), where) for name, (value, where) in values.items()}
