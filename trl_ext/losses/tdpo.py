"""
TDPO: DPO with a KL divergence from the reference at every token.

Source: *Token-level Direct Preference Optimization*, https://huggingface.co/papers/2404.11999. Equation numbers are
its.
"""

import torch
import torch.nn.functional as F

from ._inputs import is_number, prepare_inputs, saturation


VARIANTS = ("tdpo2", "tdpo1")


def tdpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    beta: float,
    alpha: float = 0.5,
    variant: str = "tdpo2",
) -> torch.Tensor:
    r"""
    TDPO loss of each pair, from https://huggingface.co/papers/2404.11999.

    Let m be the log-ratio log(policy / reference) of a response and K its sequential KL divergence, the sum of
    KL(reference || policy) over the response's tokens (Eq. 10):

        TDPO1 (Eq. 15):  L = -log sigmoid( beta [ (m_w - m_l) - (K_l - K_w) ] )
        TDPO2 (Eq. 18):  L = -log sigmoid( beta [ (m_w - m_l) - alpha (K_l - sg(K_w)) ] )

    sg stops the gradient. Descent on TDPO1 raises `K_w`, which moves the policy away from the reference on the
    preferred text itself; TDPO2 keeps the value of `K_w` and drops its gradient. `K_l` has a gradient in both. `beta`
    multiplies the whole bracket, so the weight of the KL is `beta` in TDPO1 and `alpha beta` in TDPO2.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            `m_w`, in nats, summed over the tokens of the chosen response, including EOS.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `m_l`, the same of the rejected response.
        chosen_kl (`torch.Tensor` of shape `(B,)`):
            `K_w`, in nats, SUMMED over the same tokens as `m_w`. The direction is KL(reference || policy).
        rejected_kl (`torch.Tensor` of shape `(B,)`):
            `K_l`, the same of the rejected response.
        beta (`float`):
            Strength of the constraint, greater than 0.
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of TDPO2's KL term, at least 0; 0 gives DPO's loss. TDPO1 ignores it.
        variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo2"` or `"tdpo1"`. The released code has defaulted to TDPO1 since July 2024.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, `beta` is not a finite number greater than 0,
            `alpha` not a finite number of at least 0, or `variant` not one of the two.

    Example: `m_w = 1`, `m_l = 0.7`, `K_w = 0.1`, `K_l = 0.5`, `beta = 1`. DPO's argument is 0.3. TDPO1's is
    `0.3 - 0.4 = -0.1` with the loss `log(1 + e^{0.1}) = 0.7444`; TDPO2's is `0.3 - 0.5 * 0.4 = 0.1` with the loss
    `log(1 + e^{-0.1}) = 0.6444`.

    ```python
    >>> values = [torch.tensor([value]) for value in (1.0, 0.7, 0.1, 0.5)]
    >>> tdpo_loss(*values, beta=1.0, variant="tdpo1"), tdpo_loss(*values, beta=1.0)
    (tensor([0.7444]), tensor([0.6444]))
    ```
    """
    m_w, m_l, k_w, k_l = prepare_inputs(
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
    )
    check_tdpo_parameters(beta=beta, alpha=alpha, variant=variant)
    if variant == "tdpo1":
        bracket = (m_w - m_l) - (k_l - k_w)
    else:
        bracket = (m_w - m_l) - alpha * (k_l - k_w.detach())
    largest = 4 * saturation(bracket.dtype)
    return -F.logsigmoid((beta * bracket).clamp(-largest, largest))


def check_tdpo_parameters(*, beta: float, alpha: float, variant: str) -> None:
    """Raises `ValueError` for hyperparameters that are invalid for TDPO."""
    if not is_number(beta) or beta <= 0:
        raise ValueError(f"beta must be a finite number greater than 0, got {beta!r}. The paper uses 0.1.")
    if not is_number(alpha) or alpha < 0:
        raise ValueError(
            f"alpha must be a finite number of at least 0, got {alpha!r}. The paper uses 0.5; at 0 the loss is DPO's."
        )
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}.")
