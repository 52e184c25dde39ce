"""Moment constraints: exponents such that features have given means under the tilted reference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Moments(NamedTuple):
    """
    Solution of [`fit_moments`].

    Args:
        exponents (`list[float]`): One per feature: the rewards' weights, with `beta=1`.
        means (`list[float]`): Means of the features under the tilted samples.
        effective_size (`float`): Effective number of samples under the tilt.
    """

    exponents: list[float]
    means: list[float]
    effective_size: float


def fit_moments(
    features: torch.Tensor, targets: float | Sequence[float] | torch.Tensor, weights: torch.Tensor | None = None
) -> Moments:
    r"""
    Exponents lambda for which `E_p[phi] = targets`, with `p` proportional to `pi_ref exp(lambda . phi)`, from samples
    of the reference: GDC's moment constraints, such as "half of the answers mention X".

    They minimize the convex dual `log E_ref exp(lambda . phi) - lambda . targets`, by Newton's method. Train with the
    features as reward functions, `reward_weights=exponents` and `beta=1`.

    Args:
        features (`torch.Tensor` of shape `(N, d)` or `(N,)`):
            Features of N samples of the reference.
        targets (`float` or `list[float]` of length d):
            Their wanted means.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weights of the samples, not below 0; equal by default.

    Returns:
        [`Moments`]

    Raises:
        `ValueError`: For shapes that do not fit, values that are not finite, or targets that no weighting of the
            samples reaches.

    Example: of a feature that 1 in 5 samples has, half are to have it: the odds go from 1/4 to 1.

    ```python
    >>> found = fit_moments(torch.tensor([1.0, 0, 0, 0, 0]), 0.5)
    >>> round(found.exponents[0], 4)  # log 4
    1.3863

    ```
    """
    features = torch.as_tensor(features, dtype=torch.float64)
    features = features.unsqueeze(1) if features.dim() == 1 else features
    wanted = torch.as_tensor(targets, dtype=torch.float64).reshape(-1)
    if features.dim() != 2 or len(features) == 0 or features.shape[1] != len(wanted):
        raise ValueError(
            f"`features` must have the shape (samples, {len(wanted)}), one column for each of `targets`, got "
            f"{tuple(features.shape)}."
        )
    if not (features.isfinite().all() and wanted.isfinite().all()):
        raise ValueError("`features` and `targets` must be finite numbers.")
    base = torch.ones(len(features), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    if base.shape != (len(features),) or not (base >= 0).all() or not 0 < base.sum() < torch.inf:
        raise ValueError(f"`weights` must hold a number not below 0 for each of {len(features)} samples.")
    log_base = (base / base.sum()).log()
    scale = (features.amax(0) - features.amin(0)).clamp(min=1e-12)
    exponents = torch.zeros_like(wanted)

    def tilt(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = log_base + features @ at
        return scores.softmax(0), scores.logsumexp(0) - at @ wanted

    for _ in range(200):
        shares, value = tilt(exponents)
        means = shares @ features
        if ((means - wanted).abs() / scale).max() < 1e-12:
            break
        centered = features - means
        hessian = (shares.unsqueeze(1) * centered).T @ centered
        direction = torch.linalg.lstsq(hessian, wanted - means, driver="gelsd").solution
        slope, step = (means - wanted) @ direction, 1.0
        while step > 1e-10 and not tilt(exponents + step * direction)[1] <= value + 1e-4 * step * slope:
            step /= 2
        exponents = exponents + step * direction
        if (exponents.abs() * scale).max() > 500:
            break
    shares, _ = tilt(exponents)
    means = shares @ features
    if ((means - wanted).abs() / scale).max() > 1e-8:
        raise ValueError(
            f"`targets={wanted.tolist()}` cannot be reached by weighting the samples, whose features range from "
            f"{features.amin(0).tolist()} to {features.amax(0).tolist()}. Choose targets strictly inside, or give more "
            "samples."
        )
    return Moments(exponents.tolist(), means.tolist(), (1 / shares.square().sum()).item())
