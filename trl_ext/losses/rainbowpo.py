"""
RainbowPO: length normalization, reference mixing and contextual scaling in one preference loss.

Source: *RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization*,
https://huggingface.co/papers/2410.04203.
"""

import math

import torch
import torch.nn.functional as F

from ._inputs import is_number, prepare_inputs, saturation


LINKS = ("sigmoid", "hinge", "ipo", "squared_hinge", "cauchy")


def rainbow_po_loss(
    policy_margin: torch.Tensor,
    reference_margin: torch.Tensor | None,
    weight: torch.Tensor | None,
    *,
    beta: float,
    gamma: float,
    mixing_alpha: float,
    link: str = "sigmoid",
) -> torch.Tensor:
    r"""
    RainbowPO loss of each pair, from https://huggingface.co/papers/2410.04203.

    Let D be the difference between the log-probabilities of the chosen and the rejected response, under the policy and
    under the reference, both per token or both summed, and w the weight of the pair's prompt:

        x = D_policy - alpha D_reference - (1 - alpha) gamma,    z = beta w x

        sigmoid         L = -log sigmoid(z)
        hinge           L = relu(1 - z)
        ipo             L = (w x - 1 / (2 beta))^2
        squared_hinge   L = relu(1 / (2 beta) - w x)^2
        cauchy          L = -log(arctan(z) / pi + 1/2)

    The mixed reference is the geometric mean of the reference, with exponent alpha, and of a policy that prefers the
    chosen response by gamma, with exponent 1 - alpha. beta and w multiply gamma: SimPO's margin is `beta gamma`. At
    `mixing_alpha=1` and w = 1 the loss is DPO's (length-normalized DPO's with margins per token); at 0 it is SimPO's.

    "ipo" is scaled as in IPO's paper and TRL. The released code uses `(z - 1/2)^2`, which is beta^2 times as large:
    the same optimum, but an effective learning rate that depends on `beta`. The same holds for its
    `mallows_ipo_modified`, here "squared_hinge", which equals "ipo" up to the optimum and is 0 beyond.

    Args:
        policy_margin (`torch.Tensor` of shape `(B,)`):
            `D_policy`, in nats, per token or summed.
        reference_margin (`torch.Tensor` of shape `(B,)`, *optional*):
            `D_reference`, per token or summed like the policy's. `None` is allowed with `mixing_alpha=0`, which
            ignores it.
        weight (`torch.Tensor` of shape `(B,)`, *optional*):
            `w`, at least 0, e.g. from [`dispersion_weight`]. No gradient flows through it. `None` means 1.
        beta (`float`):
            Scale of the argument, greater than 0. Margins per token are about a hundred times smaller than summed
            ones, and `beta` is about a hundred times larger.
        gamma (`float`):
            Home advantage: the margin of the chosen response in the second component of the mixed reference.
        mixing_alpha (`float`):
            Share of the reference in the mixed reference, in [0, 1].
        link (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`, `"ipo"`, `"squared_hinge"` or `"cauchy"`.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, `reference_margin` is missing, or a
            hyperparameter is out of its range.

    Example: margins of 0.8 (policy) and 0.4 (reference) at alpha 0.25, gamma 0.1 and beta 10:
    `x = 0.8 - 0.1 - 0.075 = 0.625`, with the weight 0.8 `z = 5` and the loss `log(1 + e^-5) = 0.0067`.

    ```python
    >>> margins = torch.tensor([0.8]), torch.tensor([0.4])
    >>> rainbow_po_loss(*margins, torch.tensor([0.8]), beta=10.0, gamma=0.1, mixing_alpha=0.25)
    tensor([0.0067])
    ```
    """
    check_rainbow_parameters(beta=beta, gamma=gamma, mixing_alpha=mixing_alpha, link=link)
    named = {"policy_margin": policy_margin, "reference_margin": reference_margin, "weight": weight}
    if reference_margin is None and mixing_alpha != 0:
        raise ValueError(
            f"reference_margin is None, but mixing_alpha={mixing_alpha!r} reads it. Give it, or set mixing_alpha=0."
        )
    given = [name for name, value in named.items() if value is not None]
    inputs = dict(zip(given, prepare_inputs(**{name: named[name] for name in given}), strict=True))
    x = inputs["policy_margin"] - (1 - mixing_alpha) * gamma
    if mixing_alpha != 0:
        x = x - mixing_alpha * inputs["reference_margin"]
    weight = inputs["weight"].detach() if weight is not None else torch.ones_like(x)

    largest = saturation(x.dtype)
    if link in ("sigmoid", "hinge"):
        # In this order the gradient, which is at most the first product, is finite too.
        z = ((beta * weight).clamp(max=largest) * x).clamp(-4 * largest, 4 * largest)
        return -F.logsigmoid(z) if link == "sigmoid" else F.relu(1 - z)
    # Products of two such numbers are finite.
    root = math.sqrt(largest / 8)
    if link == "cauchy":
        z = ((beta * weight).clamp(max=root) * x.clamp(-root, root)).clamp(-root, root)
        # arctan(z) / pi + 1/2 is the angle of (-z, 1), which does not cancel. Compute the smaller of it and its
        # complement.
        lost = z <= 0
        smaller = torch.atan2(torch.ones_like(z), torch.where(lost, -z, z)) / math.pi
        return -torch.where(lost, smaller.log(), torch.log1p(-smaller))
    gap = (1 / (2 * beta) - weight.clamp(max=root) * x.clamp(-root, root)).clamp(-root, root)
    return gap.square() if link == "ipo" else F.relu(gap).square()


def check_rainbow_parameters(*, beta: float, gamma: float, mixing_alpha: float, link: str) -> None:
    """Raises `ValueError` for hyperparameters that are invalid for RainbowPO."""
    if not is_number(beta) or beta <= 0:
        raise ValueError(
            f"beta must be a finite number greater than 0, got {beta!r}. The released code uses 10 with length "
            "normalization."
        )
    if not is_number(gamma):
        raise ValueError(f"gamma must be a finite number, got {gamma!r}. The released code uses 0.1.")
    if not is_number(mixing_alpha) or not 0 <= mixing_alpha <= 1:
        raise ValueError(
            f"mixing_alpha must be a number in [0, 1], got {mixing_alpha!r}. At 1 the reference is DPO's; at 0 the "
            "margin takes its place, as in SimPO."
        )
    if link not in LINKS:
        raise ValueError(f"link must be one of {', '.join(map(repr, LINKS))}, got {link!r}.")
