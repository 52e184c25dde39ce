"""The term of a rehearsed token."""

import torch

from ..losses import Divergence


def rehearsal_term(logratios: torch.Tensor, divergence: Divergence, max_logratio: float | None = 3.0) -> torch.Tensor:
    r"""
    f(e^l) of each token, along its tangent beyond `max_logratio`. Its mean over answers of the start estimates the sum
    over positions of the next-token divergences (at one sample a position).

    A clamp would set the gradient to zero exactly where a token has drifted furthest. The tangent keeps it.

    Args:
        logratios (`torch.Tensor` of any shape):
            Log ratios l of policy to start.
        divergence ([`~trl_ext.losses.Divergence`]):
            The divergence.
        max_logratio (`float`, *optional*, defaults to `3.0`):
            Where the tangent begins; `None` for nowhere.

    Returns:
        `torch.Tensor` of the same shape.

    Example, the forward KL, f(e^l) = e^l - 1 - l, whose slope at 1 is e - 1:

    ```python
    >>> import torch
    >>> from trl_ext.losses import get_divergence

    >>> rehearsal_term(torch.tensor([1.0, 3.0]), get_divergence("forward_kl"), max_logratio=1.0)
    tensor([0.7183, 4.1548])
    ```
    """
    if max_logratio is None:
        return divergence.value(logratios)
    bound = torch.tensor(float(max_logratio), dtype=logratios.dtype, device=logratios.device)
    tangent = divergence.slope(bound) * torch.relu(logratios - bound)
    return divergence.value(torch.minimum(logratios, bound)) + tangent


def where_bounded(logratios: torch.Tensor, max_logratio: float | None) -> torch.Tensor:
    """Whether a token is beyond `max_logratio`, of the shape of `logratios`."""
    if max_logratio is None:
        return torch.zeros_like(logratios, dtype=torch.bool)
    return logratios > max_logratio
