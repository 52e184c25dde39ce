"""
Pass@k: how often one of k samples is right.

Source: *Evaluating Large Language Models Trained on Code*, https://huggingface.co/papers/2107.03374.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import Groups, check_count
from .intervals import Estimate, proportion


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> float | np.ndarray:
    """
    Probability that at least one of k samples of a prompt is right, estimated without bias from `n >= k` samples of
    which c are right: `1 - C(n - c, k) / C(n, k)`.

    `1 - (1 - c/n)^k` is biased: too low where some samples are right. Use at least as many samples as the largest k;
    twice as many and more reduce the variance.

    Args:
        num_samples (`int` or array of integers):
            n, samples of each prompt.
        num_correct (`int` or array of integers):
            c, the right ones among them.
        k (`int`):
            Samples that are allowed, from 1 to the least `num_samples`.

    Returns:
        `float`, or an array of the shape that `num_samples` and `num_correct` broadcast to. [`mean_pass_at_k`] is its
        mean over prompts with an interval.

    Raises:
        `ValueError`: For numbers that are no integers, a `k` that is not from 1 to `num_samples`, a `num_correct` that
            is not from 0 to `num_samples`, or shapes that do not broadcast.

    Example: with 2 of 4 samples right, one of the 6 pairs of samples has none that is.

    ```python
    >>> round(pass_at_k(4, 2, 2), 4)
    0.8333
    ```
    """
    k = check_count("k", k, 1)
    n, c = (_integers(name, x) for name, x in (("num_samples", num_samples), ("num_correct", num_correct)))
    try:
        n, c = np.broadcast_arrays(n, c)
    except ValueError:
        raise ValueError(
            f"`num_samples` and `num_correct` must have shapes that broadcast, got {n.shape} and {c.shape}."
        ) from None
    if n.size and n.min() < k:
        raise ValueError(
            f"`k` must not exceed `num_samples`, got k={k} with {n.min()} samples. Draw more, or lower k."
        )
    if ((c < 0) | (c > n)).any():
        wrong = c[(c < 0) | (c > n)].flat[0]
        raise ValueError(f"`num_correct` must be from 0 to `num_samples`, got {wrong} among its values.")
    # log of C(n - c, k) / C(n, k) = prod_j (1 - c / (n - j)); a factor of 0 says that k samples cannot all be wrong.
    log_all_wrong = np.zeros(n.shape)
    with np.errstate(divide="ignore"):
        for j in range(k):
            log_all_wrong += np.log1p(-np.minimum(c / (n - j), 1.0))
    values = -np.expm1(log_all_wrong)
    return float(values) if values.ndim == 0 else values


def mean_pass_at_k(
    num_samples: ArrayLike, num_correct: ArrayLike, k: int, *, groups: Groups = None, confidence: float = 0.95
) -> Estimate:
    """
    Mean of [`pass_at_k`] over prompts, with the interval of [`proportion`]: prompts are the independent units, not
    samples.

    Args:
        num_samples (`int` or array of shape `(N,)`):
            Samples of each prompt.
        num_correct (array of shape `(N,)`):
            The right ones among them.
        k (`int`):
            Samples that are allowed.
        groups (sequence of `N` hashable labels, *optional*):
            What prompts belong together, as in [`proportion`]. By default each is on its own.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval.

    Returns:
        [`Estimate`], in `[0, 1]`.

    Raises:
        `ValueError`: As [`pass_at_k`] and [`proportion`].
    """
    return proportion(np.atleast_1d(pass_at_k(num_samples, num_correct, k)), groups=groups, confidence=confidence)


def _integers(name: str, values) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise ValueError(f"`{name}` must be an integer or an array of integers, got {values!r}.")
    return array.astype(np.int64)
