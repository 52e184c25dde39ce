"""IPO (https://huggingface.co/papers/2310.12036)."""

import math

import torch


def ipo_loss(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    r"""
    Loss of IPO, Eq. 17 of [A General Theoretical Paradigm to Understand Learning from Human
    Preferences](https://huggingface.co/papers/2310.12036): the squared distance between the margin and 1 / (2 beta).

    The log-ratios are summed over the tokens of a response, as in the paper; `trl.DPOTrainer(loss_type="ipo")`
    averages them.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            Log-ratio of policy to reference of the chosen responses, in nats.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            The same for the rejected responses.
        beta (`float`):
            The paper's tau, above 0: the strength of the constraint to the reference.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, nonnegative, in float32, or float64 if an input is.

    Raises:
        ValueError: if `beta` is not a finite number greater than 0.

    Example: log-ratios 2 and -1 at beta 0.25 have a margin of 3, which is 1 more than 1 / (2 beta).

    ```python
    >>> ipo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.25)
    tensor([1.])
    ```
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number greater than 0, got {beta!r}.")
    dtype = torch.promote_types(torch.promote_types(chosen_logratios.dtype, rejected_logratios.dtype), torch.float32)
    margin = chosen_logratios.to(dtype) - rejected_logratios.to(dtype)
    return (margin - 1 / (2 * beta)).square()
