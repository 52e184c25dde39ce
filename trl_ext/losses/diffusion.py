r"""
Preference losses on the predictions of a diffusion model, and the squared errors that they share.

Sources: *Diffusion Model Alignment Using Direct Preference Optimization*, https://huggingface.co/papers/2311.12908;
*DSPO: Direct Score Preference Optimization for Diffusion Model Alignment*, https://openreview.net/forum?id=xyfb9HHvMe;
*Diffusion-SDPO*, https://huggingface.co/papers/2511.03317; *DMPO*, https://huggingface.co/papers/2507.07510.

One convention throughout. Let E be the squared error of a prediction, averaged (not summed) over channels, height and
width, one number per sample. Then

    m = (E_w - Eref_w) - (E_l - Eref_l),    u = -(beta / 2) m

u is the argument of the sigmoid in Eq. 14 of Diffusion-DPO, with T and omega folded into beta, as in the released code
and in diffusers' SDXL script. diffusers' SD 1.5 script omits the factor 1/2, so its 2500 is 5000 here. With a sum
instead of the mean, the same beta would have to be divided by the number of dimensions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


LOSS_TYPES = ("sigmoid", "hinge", "ipo", "dmpo")
DSPO_VARIANTS = ("score", "squared")


class PairErrors(NamedTuple):
    """Squared errors of each pair, of shape `(B,)`, averaged over all dimensions but the first."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor

    @property
    def chosen_gap(self) -> torch.Tensor:
        """E_w - Eref_w: negative where the policy predicts the preferred image better than the reference does."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_gap(self) -> torch.Tensor:
        """E_l - Eref_l, the same for the rejected image."""
        return self.rejected - self.ref_rejected

    def argument(self, beta: float) -> torch.Tensor:
        """u = -(beta / 2) m, the argument of the sigmoid: positive where the policy orders the pair correctly."""
        u = -0.5 * beta * (self.chosen_gap - self.rejected_gap)
        limit = torch.finfo(u.dtype).max / 8
        return u.clamp(-limit, limit)


def pair_errors(
    chosen_pred: torch.Tensor,
    rejected_pred: torch.Tensor,
    chosen_ref_pred: torch.Tensor,
    rejected_ref_pred: torch.Tensor,
    chosen_target: torch.Tensor,
    rejected_target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    safeguard_mu: float | None = None,
) -> PairErrors:
    """
    Squared errors of policy and reference, as every loss in this file uses them.

    They are computed in float32 (float64 if an input is), whatever the dtype of the predictions: at beta 5000, errors
    reduced in bfloat16 can move u by 16 for a policy that equals its reference.

    Args:
        chosen_pred, rejected_pred (`torch.Tensor` of shape `(B, C, H, W)`):
            Predictions of the policy for the preferred and the other image, with the same timestep and noise for both
            images of a pair.
        chosen_ref_pred, rejected_ref_pred (`torch.Tensor` of shape `(B, C, H, W)`):
            Predictions of the reference. No gradient goes to them.
        chosen_target, rejected_target (`torch.Tensor` of shape `(B, C, H, W)`):
            Regression target: the noise, v, or noise - image.
        weight (`torch.Tensor` of shape `(B,)`, *optional*):
            Factor for the errors of each pair, e.g. a timestep weight.
        safeguard_mu (`float`, *optional*):
            Scale the gradient of the rejected error by [`safeguard_scale`]; the values do not change.

    Returns:
        [`PairErrors`]: four tensors of shape `(B,)`, in float32, or float64 if an input is; those of the reference
        without gradient.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, or `safeguard_mu` is not in [0, 1].
    """
    tensors = _prepare(
        chosen_pred=chosen_pred,
        rejected_pred=rejected_pred,
        chosen_ref_pred=chosen_ref_pred,
        rejected_ref_pred=rejected_ref_pred,
        chosen_target=chosen_target,
        rejected_target=rejected_target,
    )
    return _pair_errors(*tensors, weight=weight, safeguard_mu=safeguard_mu)


def safeguard_scale(
    chosen_residual: torch.Tensor, rejected_residual: torch.Tensor, *, mu: float, per_pair: bool = False
) -> torch.Tensor:
    r"""
    Scale in [0, 1] for the rejected branch's gradient such that a step cannot raise the chosen error, to first order.
    From *Diffusion-SDPO*, https://huggingface.co/papers/2511.03317.

    Let gA and gB be the gradients of the two errors with respect to the predictions, which share their noise. A step
    against gA - lambda gB lowers the chosen error by at least the fraction `mu` of what gA alone would, if

        lambda = min(1, (1 - mu) |a_w|^2 / <a_w, a_l>),    a = prediction - target,

    and lambda = 1 where <a_w, a_l> <= 0. Computed in float32: in float16 both sums underflow, and the scale is 1.

    Args:
        chosen_residual, rejected_residual (`torch.Tensor` of shape `(B, C, H, W)`):
            Prediction minus target of each image.
        mu (`float`):
            In [0, 1]. At 1 the rejected branch gets no gradient.
        per_pair (`bool`, *optional*, defaults to `False`):
            Compute one scale per pair. The published code computes one per batch on a device.

    Returns:
        `torch.Tensor` of shape `()`, or `(B,)` with `per_pair`, without gradient.

    Raises:
        ValueError: if `mu` is not a number in [0, 1], or the shapes differ.
    """
    _check_share("mu", mu)
    if chosen_residual.shape != rejected_residual.shape:
        raise ValueError(
            f"chosen_residual and rejected_residual must have the same shape, got {tuple(chosen_residual.shape)} and "
            f"{tuple(rejected_residual.shape)}."
        )
    dtype = torch.promote_types(torch.float32, chosen_residual.dtype)
    with torch.no_grad():
        a_w, a_l = (residual.to(dtype).flatten(1) for residual in (chosen_residual, rejected_residual))
        # Scaled by the largest residual, which leaves the ratio unchanged: the squares neither overflow nor underflow.
        largest = torch.maximum(a_w.abs().amax(1), a_l.abs().amax(1))
        if not per_pair:
            largest = largest.max()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest)).reshape(-1, 1)
        a_w, a_l = a_w / largest, a_l / largest
        squared, product = a_w.square().sum(1), (a_w * a_l).sum(1)
        if not per_pair:
            squared, product = squared.sum(), product.sum()
        positive = product > 0
        scale = (1 - mu) * squared / torch.where(positive, product, torch.ones_like(product))
        return torch.where(positive, scale.clamp(max=1.0), torch.ones_like(scale))


def diffusion_dpo_loss(
    chosen_pred: torch.Tensor,
    rejected_pred: torch.Tensor,
    chosen_ref_pred: torch.Tensor,
    rejected_ref_pred: torch.Tensor,
    chosen_target: torch.Tensor,
    rejected_target: torch.Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    weight: torch.Tensor | None = None,
    safeguard_mu: float | None = None,
) -> torch.Tensor:
    r"""
    Diffusion-DPO loss of each pair, from https://huggingface.co/papers/2311.12908 (Eq. 14).

    With m and u = -(beta / 2) m as defined at the top of this file:

        "sigmoid":  L = -(1 - s) log sigmoid(u) - s log sigmoid(-u),    s = label_smoothing
        "hinge":    L = max(0, 1 - u)
        "ipo":      L = (-m - 1 / (2 beta))^2
        "dmpo":     L = p (log p - log(1 - s)) + (1 - p) (log(1 - p) - log s),    p = sigmoid(u)

    "dmpo" is the reverse KL divergence of p from the smoothed label: TRL's `exo_pair`.

    Args:
        chosen_pred, rejected_pred (`torch.Tensor` of shape `(B, C, H, W)`):
            Predictions of the policy for the preferred and the other image, with the same timestep and noise for both
            images of a pair.
        chosen_ref_pred, rejected_ref_pred (`torch.Tensor` of shape `(B, C, H, W)`):
            Predictions of the reference. No gradient goes to them.
        chosen_target, rejected_target (`torch.Tensor` of shape `(B, C, H, W)`):
            Regression target: the noise, v, or noise - image.
        beta (`float`):
            Strength of the constraint, greater than 0: 2000 to 5000 in the paper.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            One of the four above.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Assumed share of wrong labels, in [0, 0.5). "sigmoid" and "dmpo" use it; "dmpo" requires it to be positive
            (the paper's alpha; 0.01).
        weight (`torch.Tensor` of shape `(B,)`, *optional*):
            Factor for the errors of each pair: omega(lambda_t) in the equation.
        safeguard_mu (`float`, *optional*):
            Scale the gradient of the rejected error by [`safeguard_scale`]; the loss keeps its value.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, or a hyperparameter is out of its range.

    Example: targets 0, policy predictions 1 and 2 (errors 1 and 4), reference predictions 1.1 and 1.9 (errors 1.21 and
    3.61). m = (1 - 1.21) - (4 - 3.61) = -0.6; at beta 1, u = 0.3 and the loss is log(1 + e^{-0.3}) = 0.5544.

    ```python
    >>> w, l, ref_w, ref_l, target = (torch.full((1, 4, 8, 8), value) for value in (1.0, 2.0, 1.1, 1.9, 0.0))
    >>> diffusion_dpo_loss(w, l, ref_w, ref_l, target, target, beta=1.0)
    tensor([0.5544])
    ```
    """
    check_diffusion_dpo_parameters(beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
    errors = pair_errors(
        chosen_pred,
        rejected_pred,
        chosen_ref_pred,
        rejected_ref_pred,
        chosen_target,
        rejected_target,
        weight=weight,
        safeguard_mu=safeguard_mu,
    )
    u = errors.argument(beta)
    if loss_type == "sigmoid":
        if label_smoothing == 0:
            return -F.logsigmoid(u)
        return -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)
    if loss_type == "hinge":
        return torch.relu(1 - u)
    if loss_type == "ipo":
        root = math.sqrt(torch.finfo(u.dtype).max) / 8
        return ((errors.rejected_gap - errors.chosen_gap - 1 / (2 * beta)).clamp(-root, root)).square()
    p, q = torch.sigmoid(u), 1 - label_smoothing
    # p log p with log p from logsigmoid: both stay finite where p rounds to 0.
    return p * (F.logsigmoid(u) - math.log(q)) + (1 - p) * (F.logsigmoid(-u) - math.log1p(-q))


def dspo_loss(
    chosen_pred: torch.Tensor,
    rejected_pred: torch.Tensor,
    chosen_ref_pred: torch.Tensor,
    rejected_ref_pred: torch.Tensor,
    chosen_target: torch.Tensor,
    rejected_target: torch.Tensor,
    *,
    beta: float,
    score_weight: float | None = None,
    variant: str = "score",
    weight: torch.Tensor | None = None,
    safeguard_mu: float | None = None,
) -> torch.Tensor:
    r"""
    DSPO loss of each pair, from https://openreview.net/forum?id=xyfb9HHvMe, in the two forms of the released code.

    With u as defined at the top of this file, a = chosen_pred - chosen_target and b = chosen_pred - chosen_ref_pred:

        "score":    L = mean of (a - k b)^2,    k = score_weight (1 - sigmoid(u))
        "squared":  L = (1 - sigmoid(u))^2

    "score" (the released SD 1.5 branch) matches the score of the preferred images, tilted toward being preferred. The
    gradient runs through sigmoid(u) as well, which is the only way in which the rejected image enters. With k held
    fixed, the minimum is at target + k / (1 - k) (target - ref_pred): away from the reference, as long as k < 1. At
    the start k is score_weight / 2, so the step is 1 - score_weight / 2 of supervised fine-tuning's: at the published
    0.001, where `beta` is as small, it is supervised fine-tuning on the preferred image to within 5e-4.

    "squared" is what the released SDXL branch computes unless the model is broken (mean b^2 of 0.1 or more, about as
    large as the error itself): DPO with another link. `beta` is 1000 and up.

    Args:
        chosen_pred, rejected_pred (`torch.Tensor` of shape `(B, C, H, W)`):
            Predictions of the policy for the preferred and the other image, with the same timestep and noise for both
            images of a pair.
        chosen_ref_pred, rejected_ref_pred (`torch.Tensor` of shape `(B, C, H, W)`):
            Predictions of the reference. No gradient goes to them.
        chosen_target, rejected_target (`torch.Tensor` of shape `(B, C, H, W)`):
            Regression target: the noise, v, or noise - image.
        beta (`float`):
            Temperature in u, greater than 0, on the scale of Diffusion-DPO.
        score_weight (`float`, *optional*):
            Weight of the preference's score, for "score" only: greater than 0, and less than 2, beyond which the
            initial gradient would change its sign. Defaults to `beta`, as published.
        variant (`str`, *optional*, defaults to `"score"`):
            `"score"` or `"squared"`.
        weight (`torch.Tensor` of shape `(B,)`, *optional*):
            Factor for the squared errors of each pair, including (a - k b)^2.
        safeguard_mu (`float`, *optional*):
            Scale the gradient of the rejected error by [`safeguard_scale`]; the loss keeps its value.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, or a hyperparameter is out of its range.

    Example: targets 0, policy predictions 1 and 2, reference predictions 1.1 and 1.9. As for Diffusion-DPO, u = 0.3 at
    beta 1, and 1 - sigmoid(u) = 0.4256. With a = 1, b = -0.1 and score_weight 1, the loss is (1 + 0.04256)^2 = 1.0869;
    squared, it is 0.4256^2 = 0.1811.

    ```python
    >>> w, l, ref_w, ref_l, target = (torch.full((1, 4, 8, 8), value) for value in (1.0, 2.0, 1.1, 1.9, 0.0))
    >>> dspo_loss(w, l, ref_w, ref_l, target, target, beta=1.0)
    tensor([1.0869])
    >>> dspo_loss(w, l, ref_w, ref_l, target, target, beta=1.0, variant="squared")
    tensor([0.1811])
    ```
    """
    check_dspo_parameters(beta=beta, score_weight=score_weight, variant=variant)
    tensors = _prepare(
        chosen_pred=chosen_pred,
        rejected_pred=rejected_pred,
        chosen_ref_pred=chosen_ref_pred,
        rejected_ref_pred=rejected_ref_pred,
        chosen_target=chosen_target,
        rejected_target=rejected_target,
    )
    u = _pair_errors(*tensors, weight=weight, safeguard_mu=safeguard_mu).argument(beta)
    one_minus_sigmoid = torch.sigmoid(-u)
    if variant == "squared":
        return one_minus_sigmoid.square()
    k = (beta if score_weight is None else score_weight) * one_minus_sigmoid
    chosen, _, ref_chosen, _, target, _ = tensors
    k = k.view(-1, *[1] * (chosen.dim() - 1))
    return _mean_square((chosen - target) - k * (chosen - ref_chosen), weight)


def check_diffusion_dpo_parameters(*, beta: float, loss_type: str, label_smoothing: float) -> None:
    """Raises `ValueError` for hyperparameters that are invalid for Diffusion-DPO."""
    if not _is_number(beta) or beta <= 0:
        raise ValueError(
            f"beta must be a finite number greater than 0, got {beta!r}. The paper uses 2000 for SD 1.5 and 5000 for "
            "SDXL."
        )
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, LOSS_TYPES))}, got {loss_type!r}.")
    if not _is_number(label_smoothing) or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}.")
    if loss_type == "dmpo" and label_smoothing == 0:
        raise ValueError(
            "loss_type='dmpo' needs a label_smoothing greater than 0, got 0: without it the divergence is infinite. "
            "Use 0.01."
        )
    if loss_type in ("hinge", "ipo") and label_smoothing != 0:
        raise ValueError(
            f"label_smoothing={label_smoothing!r} has no effect on loss_type={loss_type!r}. Leave it at 0, or use "
            "'sigmoid' or 'dmpo'."
        )


def check_dspo_parameters(*, beta: float, score_weight: float | None, variant: str) -> None:
    """Raises `ValueError` for hyperparameters that are invalid for DSPO."""
    if not _is_number(beta) or beta <= 0:
        raise ValueError(
            f"beta must be a finite number greater than 0, got {beta!r}. The released code uses 0.001 for the score "
            "form, and 5000 for the squared one."
        )
    if variant not in DSPO_VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, DSPO_VARIANTS))}, got {variant!r}.")
    if variant == "squared":
        if score_weight is not None:
            raise ValueError(
                f"score_weight={score_weight!r} has no effect with variant='squared', which has no score term. Leave "
                "it out."
            )
        return
    name, value = ("beta", beta) if score_weight is None else ("score_weight", score_weight)
    if not _is_number(value) or not 0 < value < 2:
        advice = " Give score_weight, which is beta by default, a number of its own." if score_weight is None else ""
        raise ValueError(
            f"{name} must be greater than 0 and less than 2 with variant='score', got {value!r}: from 2 on, the "
            f"initial gradient points away from the preferred image. The released code uses 0.001.{advice}"
        )


def _prepare(**tensors: torch.Tensor) -> list[torch.Tensor]:
    """Checks the tensors and converts them to one dtype, at least float32; detaches the reference and the targets."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"The inputs must have the same shape, got {shapes}.")
    dtype = torch.float32
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}.")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have a batch dimension and others, got shape {tuple(tensor.shape)}.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    # Clamped far beyond any prediction, so that squares of finite inputs stay finite.
    bound = math.sqrt(torch.finfo(dtype).max) / 16
    tensors = {name: tensor.to(dtype).clamp(-bound, bound) for name, tensor in tensors.items()}
    return [
        tensor if name in ("chosen_pred", "rejected_pred") else tensor.detach() for name, tensor in tensors.items()
    ]


def _pair_errors(chosen, rejected, ref_chosen, ref_rejected, target, rejected_target, *, weight, safeguard_mu):
    chosen_residual, rejected_residual = chosen - target, rejected - rejected_target
    rejected_error = _mean_square(rejected_residual, weight)
    if safeguard_mu is not None:
        _check_share("safeguard_mu", safeguard_mu)
        factor = 1.0 if weight is None else weight.view(-1, *[1] * (chosen.dim() - 1))
        scale = safeguard_scale(chosen_residual * factor, rejected_residual * factor, mu=safeguard_mu)
        # Keeps the value of the error and multiplies its gradient by `scale`.
        held = rejected_error.detach()
        rejected_error = held + scale * (rejected_error - held)
    return PairErrors(
        _mean_square(chosen_residual, weight),
        rejected_error,
        _mean_square(ref_chosen - target, weight),
        _mean_square(ref_rejected - rejected_target, weight),
    )


def _mean_square(residual: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    error = residual.square().flatten(1).mean(1)
    return error if weight is None else error * weight.to(error.dtype)


def _check_share(name: str, mu: float) -> None:
    if not _is_number(mu) or not 0 <= mu <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {mu!r}. The paper's for DPO on SD 1.5 is 0.9.")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
