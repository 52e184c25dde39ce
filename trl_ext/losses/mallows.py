"""
Mallows-DPO: DPO with a weight per pair that reflects how much people agree on its prompt.

Source: *Mallows-DPO: Fine-Tune Your LLM with Preference Dispersions*, https://huggingface.co/papers/2405.14953.
"""

import math

import torch
import torch.nn.functional as F

from ._inputs import is_number, prepare_inputs, saturation


LINKS = ("sigmoid", "ipo", "phi")

# Bounds of a pair's dispersion. At 0 the weight would be infinite; from 1 on, where half precision can round an
# entropy to, it would be zero or negative.
DISPERSION_BOUNDS = (1e-4, 1 - 1e-4)


def dispersion_weight(chosen_entropy: torch.Tensor, rejected_entropy: torch.Tensor, *, kappa: float) -> torch.Tensor:
    r"""
    Weight of each pair from the reference's uncertainty, from https://huggingface.co/papers/2405.14953 (Eq. 12):

        w = -kappa log H,    H = (H_w + H_l) / 2 kept within [1e-4, 1 - 1e-4]

    H_w and H_l are the reference's next-token entropies, averaged over a response's tokens and divided by log V, their
    maximum. A confident reference stands for people who agree: H is small and the weight large. The weight is treated
    as a constant: no gradient flows through it.

    It estimates `-2 log phi` of a Mallows model with dispersion phi; `kappa` absorbs the factor 2. The paper's
    equation sums the entropies over the tokens; the released code averages them, which keeps H below 1, and so does
    this function.

    Args:
        chosen_entropy (`torch.Tensor` of shape `(B,)`):
            `H_w`, in [0, 1], dimensionless.
        rejected_entropy (`torch.Tensor` of shape `(B,)`):
            `H_l`, the same of the rejected response. Both responses count equally, whatever their lengths.
        kappa (`float`):
            Scale of the weights, greater than 0. The inverse of the mean of `-log H` over the training set makes
            the weights average 1; 0.29, the released code's constant, fits Llama-3's vocabulary and data.

    Returns:
        `torch.Tensor` of shape `(B,)`: the weights, positive, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, or `kappa` is not a finite number greater
            than 0.

    Example: entropies of 0.1 and 0.3 have the mean 0.2, and at `kappa = 0.5` the weight `-0.5 log 0.2 = 0.8047`.

    ```python
    >>> dispersion_weight(torch.tensor([0.1]), torch.tensor([0.3]), kappa=0.5)
    tensor([0.8047])
    ```
    """
    if not is_number(kappa) or kappa <= 0:
        raise ValueError(f"kappa must be a finite number greater than 0, got {kappa!r}. The released code uses 0.29.")
    chosen, rejected = prepare_inputs(chosen_entropy=chosen_entropy, rejected_entropy=rejected_entropy)
    dispersion = ((chosen + rejected) / 2).clamp(*DISPERSION_BOUNDS)
    return -kappa * dispersion.log().detach()


def mallows_dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    weight: torch.Tensor,
    *,
    beta: float,
    link: str = "sigmoid",
) -> torch.Tensor:
    r"""
    Mallows-DPO loss of each pair, from https://huggingface.co/papers/2405.14953.

    Let m be the log-ratio log(policy / reference) of a response, `s = beta (m_w - m_l)`, and `w = -2 log phi` the
    weight of the pair's prompt, where phi in (0, 1] is the dispersion of its Mallows model (near 0 everybody agrees,
    at 1 nobody does):

        sigmoid   L = -log sigmoid(w s)                            Mallows-theta, d = Spearman's rho
        ipo       L = (w (m_w - m_l) - 1 / (2 beta))^2             Mallows-theta-IPO
        phi       L = -log g(s)                                    Mallows-phi, d = Kendall's tau

    The weight multiplies the argument, not the loss: at weight 1, "sigmoid" is DPO.

    "ipo" is scaled as in IPO's paper and TRL. The released RainbowPO code uses `(beta w (m_w - m_l) - 1/2)^2`, which
    is beta^2 times as large: the same optimum, but an effective learning rate that depends on `beta`.

    **The link "phi".** In Kendall's model an item ranked k >= 1 places above another is preferred with probability

        G(k) = h(k + 1) - h(k),    h(k) = k / (1 - phi^k)

    which the paper continues to `G(s)` for s > 0 and `1 - G(-s)` for s < 0. That jumps at 0, where it is 0/0 and where
    every run starts. Since `h(k) - k = h(-k)`, the function `G0(x) = h(x + 1/2) - h(x - 1/2)` is smooth on the whole
    line with `G0(x) + G0(-x) = 1`, and the paper's is `G0(s + sgn(s) / 2)`: only the continuity correction, half a
    place on either side, jumps. This function replaces the sign by a smooth one,

        g(s) = G0(s + r((1 - log phi) s) / 2),    r(v) = v (15 - 10 v^2 + 3 v^4) / 8 within [-1, 1], sgn(v) outside

    so that g equals the paper's for `|s| >= 1 / (1 - log phi)`, hence the classical probabilities at every gap of one
    place or more (1 / (1 + phi) at 1), is 1/2 at 0, increasing, twice continuously differentiable, and symmetric,
    `g(s) + g(-s) = 1`. As phi tends to 0 it tends to the step from 0 to 1, as phi tends to 1 to 1/2.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            `m_w`, in nats, summed over the tokens of the chosen response, including EOS.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `m_l`, the same of the rejected response.
        weight (`torch.Tensor` of shape `(B,)`):
            `w = -2 log phi`, at least 0, e.g. from [`dispersion_weight`]. No gradient flows through it.
        beta (`float`):
            Strength of the constraint, greater than 0.
        link (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"ipo"` or `"phi"`.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, `beta` is not a finite number greater than 0,
            or `link` not one of the three.

    Example: log-ratios of 1.5 and 0.5 at `beta = 1` are one place apart. With the weight 2, phi is `e^-1`: "sigmoid"
    gives `log(1 + e^-2) = 0.1269`, "ipo" `(2 - 1/2)^2 = 2.25`, "phi" `log(1 + e^-1) = 0.3133`.

    ```python
    >>> values = [torch.tensor([value]) for value in (1.5, 0.5, 2.0)]
    >>> [mallows_dpo_loss(*values, beta=1.0, link=link) for link in ("sigmoid", "ipo", "phi")]
    [tensor([0.1269]), tensor([2.2500]), tensor([0.3133])]
    ```
    """
    check_mallows_parameters(beta=beta, link=link)
    m_w, m_l, weight = prepare_inputs(
        chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios, weight=weight
    )
    margin, weight = m_w - m_l, weight.detach()
    largest = saturation(margin.dtype)
    if link == "sigmoid":
        # In this order the gradient, which is at most the first product, is finite too.
        return -F.logsigmoid(((beta * weight).clamp(max=largest) * margin).clamp(-4 * largest, 4 * largest))
    # Products of two such numbers are finite.
    root = math.sqrt(largest / 8)
    if link == "ipo":
        return (weight.clamp(max=root) * margin.clamp(-root, root) - 1 / (2 * beta)).clamp(-root, root).square()
    return -_log_kendall((beta * margin).clamp(-root, root), weight.clamp(max=root))


def check_mallows_parameters(*, beta: float, link: str) -> None:
    """Raises `ValueError` for hyperparameters that are invalid for Mallows-DPO."""
    if not is_number(beta) or beta <= 0:
        raise ValueError(f"beta must be a finite number greater than 0, got {beta!r}. DPO's usual value is 0.1.")
    if link not in LINKS:
        raise ValueError(f"link must be one of {', '.join(map(repr, LINKS))}, got {link!r}.")


def _log_kendall(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """log g(s) of the link "phi", with phi = exp(-weight / 2)."""
    dtype = s.dtype
    if s.device.type != "mps":  # which has no float64
        s, weight = s.double(), weight.double()
    # As the weight tends to 0, g tends to 1/2 + rate x / 6; at smaller rates the differences below would be pure
    # rounding.
    rate = (weight / 2).clamp(min=1e-6 if s.dtype == torch.float64 else 1e-3)
    v = ((1 + rate) * s).clamp(-1, 1)
    x = s + v * (15 - 10 * v**2 + 3 * v**4) / 16
    # The two responses' probabilities sum to 1. The smaller one is computed without cancellation, the other from it.
    lost = x <= 0
    log_smaller = _log_kendall_tail(torch.where(lost, -x, x), rate)
    log_larger = torch.log1p(-log_smaller.exp())
    return torch.where(lost, log_smaller, log_larger).to(dtype)


def _log_kendall_tail(u: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    r"""
    log G0(-u) for u >= 0 and rate = -log phi.

    With B(y) = y / (e^y - 1), which is rate h(-y / rate), G0(-u) = [B(y - rate / 2) - B(y + rate / 2)] / rate at y =
    rate u. log B(y) = -y / 2 - log(sinh(y / 2) / (y / 2)) is smooth at 0 and does not overflow, and the difference of
    two Bs comes from the difference of their logarithms, at least rate / 2.
    """
    low, high = rate * (u - 0.5), rate * (u + 0.5)
    # For two large arguments the logarithms nearly cancel, so their common part is removed analytically.
    far = low > 1
    near_low, near_high = (torch.where(far, torch.ones_like(y), y) for y in (low, high))
    near_difference = rate / 2 + _log_sinhc(near_high / 2) - _log_sinhc(near_low / 2)
    far_low, far_high = (torch.where(far, y, torch.ones_like(y)) for y in (low, high))
    far_difference = (
        rate - torch.log1p(rate / far_low) + torch.log(torch.special.expm1(-far_high) / torch.special.expm1(-far_low))
    )
    difference = torch.where(far, far_difference, near_difference)
    return -low / 2 - _log_sinhc(low / 2) + torch.log(-torch.expm1(-difference)) - rate.log()


def _log_sinhc(z: torch.Tensor) -> torch.Tensor:
    """log(sinh(z) / z), accurate near 0 and finite everywhere."""
    small = z.abs() < 1
    near, far = torch.where(small, z, torch.zeros_like(z)).square(), torch.where(small, torch.ones_like(z), z).abs()
    series = torch.zeros_like(near)
    for n in range(
        9, 0, -1
    ):  # sinh(z) / z - 1 = z^2 / (2 3) (1 + z^2 / (4 5) (1 + ...)); the tenth term is below 1e-17
        series = near / (2 * n * (2 * n + 1)) * (1 + series)
    return torch.where(small, torch.log1p(series), far + torch.log(-torch.expm1(-2 * far)) - torch.log(2 * far))
