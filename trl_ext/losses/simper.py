"""
SimPER: preference alignment by inverse perplexity, without a reference and without hyperparameters.

Source: *SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters*,
https://huggingface.co/papers/2502.00883.
"""

import math

import torch


def simper_loss(chosen_mean_logps: torch.Tensor, rejected_mean_logps: torch.Tensor) -> torch.Tensor:
    r"""
    SimPER loss of each pair, `L = -exp(s_w) + exp(s_l)`, from https://huggingface.co/papers/2502.00883.

    `exp(s)` is the inverse perplexity of a response, the geometric mean of its tokens' probabilities. It lies in
    (0, 1], so the loss lies in (-1, 1), and a negative loss is expected. The gradient is
    `dL/ds_w = -exp(s_w)` and `dL/ds_l = exp(s_l)`: each side is weighted by its own inverse perplexity, independently
    of the other, and its gradient fades as the response becomes unlikely.

    Args:
        chosen_mean_logps (`torch.Tensor` of shape `(B,)`):
            `s_w`, the log-probability (nats) of the chosen response, AVERAGED over its tokens. With a summed
            log-probability the exponential, and with it the gradient, would underflow.
        rejected_mean_logps (`torch.Tensor` of shape `(B,)`):
            `s_l`, the same of the rejected response.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is. Inputs above 0 are
        not log-probabilities; beyond the largest exponent of the dtype (88.7 in float32) the exponential saturates.

    Raises:
        ValueError: if the shapes differ or an input is not floating-point.

    Example: a chosen response of two tokens with the probabilities 0.9 and 0.4 has the inverse perplexity
    `sqrt(0.36) = 0.6`, a rejected one of a single token with probability 0.25 has 0.25, so the loss is
    `-0.6 + 0.25 = -0.35`.

    ```python
    >>> chosen = torch.tensor([0.9, 0.4]).log().mean(0, keepdim=True)
    >>> rejected = torch.tensor([0.25]).log()
    >>> simper_loss(chosen, rejected)
    tensor([-0.3500])
    ```
    """
    if chosen_mean_logps.shape != rejected_mean_logps.shape:
        raise ValueError(
            f"chosen_mean_logps and rejected_mean_logps must have the same shape, got "
            f"{tuple(chosen_mean_logps.shape)} and {tuple(rejected_mean_logps.shape)}."
        )
    if not (chosen_mean_logps.is_floating_point() and rejected_mean_logps.is_floating_point()):
        raise ValueError(
            f"chosen_mean_logps and rejected_mean_logps must be floating-point tensors, got {chosen_mean_logps.dtype} "
            f"and {rejected_mean_logps.dtype}."
        )
    return -_inverse_perplexity(chosen_mean_logps) + _inverse_perplexity(rejected_mean_logps)


def _inverse_perplexity(mean_logps: torch.Tensor) -> torch.Tensor:
    # Half precision would round the average by a tenth of a percent before it is exponentiated.
    mean_logps = mean_logps.to(torch.promote_types(mean_logps.dtype, torch.float32))
    # Half of the largest number, so that the difference of two saturated sides is finite as well.
    largest = math.log(torch.finfo(mean_logps.dtype).max / 2)
    return mean_logps.clamp(max=largest).exp()
