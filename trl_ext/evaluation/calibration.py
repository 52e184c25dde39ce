r"""
Calibration: whether predictions with a confidence of 0.8 are right 8 times in 10.

Sources: *On Calibration of Modern Neural Networks*, https://huggingface.co/papers/1706.04599, for the expected
calibration error; *Verified Uncertainty Calibration*, https://huggingface.co/papers/1909.10155, for its finite-sample
bias; f-DPO, https://huggingface.co/papers/2309.16240, for calibration of preference models.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from . import intervals
from ._arrays import Groups, as_vectors, check_comparable, check_count, check_positive, group_codes


BINNINGS = ("uniform", "adaptive")


def preference_confidence(
    chosen_logratios: ArrayLike, rejected_logratios: ArrayLike, *, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Confidence of the implicit preference model, and whether it is right.

    The Bradley-Terry probability that the chosen response is preferred is `p = sigmoid(beta (l_w - l_l))`. In
    preference data the outcome is always "chosen", so the calibration of `p` itself cannot be measured. That of the
    model's *prediction* can: the model predicts the side that it finds more likely, with confidence `max(p, 1 - p)` in
    `[1/2, 1]`. The prediction is right if that side is the chosen one, and half right if `p = 1/2`.

    Args:
        chosen_logratios, rejected_logratios (arrays of shape `(N,)`):
            Log ratios log(policy / reference) in nats. The confidence is 1 if one of the two is infinite.
        beta (`float`):
            Beta of the implicit reward, as in training.

    Returns:
        `(confidence, correct)`: arrays of shape `(N,)`.

    Raises:
        `ValueError`: For arrays of different length, NaN, a pair whose two log ratios are the same infinity, or a
            `beta` that is not positive.
    """
    chosen, rejected = as_vectors(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_comparable(chosen_logratios=chosen, rejected_logratios=rejected)
    margin = check_positive("beta", beta) * (chosen - rejected)
    return 1 / (1 + np.exp(-np.abs(margin))), (1 + np.sign(margin)) / 2


@dataclasses.dataclass(frozen=True)
class Bin:
    """
    One bin of a reliability diagram: confidences in `[low, high)`, the last one's `high` included.

    Args:
        low, high (`float`):
            Its edges.
        count (`int`):
            Number of samples in the bin.
        confidence (`float`, *optional*):
            Mean confidence of the samples; `None` if there are none.
        accuracy (`Estimate`, *optional*):
            Share of the samples that are right, with Wilson's interval; `None` if there are none.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: intervals.Estimate | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """
    Expected calibration error, with what a perfectly calibrated model would score on as many samples.

    Args:
        ece (`float`):
            `sum_b (n_b / N) |accuracy_b - confidence_b|`.
        floor (`float`):
            Expected ECE of a perfectly calibrated model. It is 0.058 for 300 uniform confidences in 10 bins: an ECE
            below that is no evidence of miscalibration.
        floor_95 (`float`):
            95th percentile of the ECE of a perfectly calibrated model.
        p_value (`float`):
            Probability that a perfectly calibrated model scores at least `ece`.
        bins (`list[Bin]`):
            The reliability diagram.
        n (`int`):
            Number of samples.
    """

    ece: float
    floor: float
    floor_95: float
    p_value: float
    bins: list[Bin]
    n: int

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def _bin_edges(confidence: np.ndarray, num_bins: int, binning: str, limits: tuple[float, float]) -> np.ndarray:
    if binning == "uniform":
        return np.linspace(*limits, num_bins + 1)
    # Bins of equal mass. Equal confidences cannot be split, so there may be fewer bins.
    inner = np.quantile(confidence, np.linspace(0, 1, num_bins + 1)[1:-1])
    return np.unique(np.concatenate([[limits[0]], inner, [limits[1]]]))


def expected_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    num_bins: int = 10,
    binning: str = "uniform",
    limits: tuple[float, float] = (0.0, 1.0),
    num_simulations: int = 2000,
    seed: int = 0,
    groups: Groups = None,
) -> Calibration:
    r"""
    Expected calibration error `ECE = sum_b (n_b / N) |accuracy_b - confidence_b|`, its floor, and the reliability
    diagram.

    ECE is biased upwards: in every bin, accuracy differs from confidence by chance alone. The floor estimates this
    bias from outcomes drawn from the confidences themselves, each independently. With several pairs of a prompt the
    outcomes vary more than that, so the floor is too low and the p-value too small. Where these matter, measure one
    pair of each prompt.

    Args:
        confidence (array of shape `(N,)`):
            Stated probability of being right, within `limits`.
        correct (array of shape `(N,)`):
            1 where right, 0 where wrong; 1/2 for a tie.
        num_bins (`int`, *optional*, defaults to `10`):
            Number of bins.
        binning (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` makes bins of equal width over `limits`, `"adaptive"` bins of equal counts, so that no bin is
            nearly empty.
        limits (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Range of confidences: `(0.5, 1.0)` for [`preference_confidence`]. The upper end belongs to the last bin.
        num_simulations (`int`, *optional*, defaults to `2000`):
            Number of simulated data sets from which the floor is estimated.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the simulation, which has its own random state.
        groups (sequence of `N` hashable labels, *optional*):
            The prompt of each sample, if some prompts have several. The intervals of the bins use it, see
            [`proportion`].

    Returns:
        [`Calibration`].

    Raises:
        `ValueError`: For arrays of different length, no samples, NaN, a confidence outside `limits`, a `correct`
            outside `[0, 1]`, another number of labels, or a setting out of its range.
    """
    confidence, correct = as_vectors(confidence=confidence, correct=correct)
    codes = group_codes(groups, len(confidence))
    try:
        low, high = limits
        in_order = 0 <= low < high <= 1
    except (TypeError, ValueError):
        in_order = False
    if not in_order:
        raise ValueError(f"`limits` must be two numbers with 0 <= low < high <= 1, got {limits!r}.")
    if confidence.min() < low or confidence.max() > high:
        raise ValueError(
            f"`confidence` must lie in `limits={limits}`, got values from {confidence.min()} to {confidence.max()}."
        )
    if correct.min() < 0 or correct.max() > 1:
        raise ValueError(f"`correct` must lie in [0, 1], got values from {correct.min()} to {correct.max()}.")
    num_bins, seed = check_count("num_bins", num_bins, 1), check_count("seed", seed, 0)
    num_simulations = check_count("num_simulations", num_simulations, 1)
    if binning not in BINNINGS:
        raise ValueError(f"`binning` must be one of {', '.join(BINNINGS)}, got {binning!r}.")

    edges = _bin_edges(confidence, num_bins, binning, limits)
    # The inner edges only, so that a confidence of exactly `high` falls into the last bin.
    index = np.digitize(confidence, edges[1:-1])
    n, size = len(confidence), len(edges) - 1

    def error(outcomes):  # (..., N) to (...)
        deviation = np.stack([(outcomes - confidence)[..., index == b].sum(-1) for b in range(size)])
        return np.abs(deviation).sum(0) / n

    ece = float(error(correct))
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, num_simulations, rows := max(1, 2**22 // n)):
        draws = generator.random((min(rows, num_simulations - start), n)) < confidence
        parts.append(error(draws.astype(np.float64)))
    simulated = np.concatenate(parts)

    bins = []
    for b in range(size):
        inside = index == b
        count = int(inside.sum())
        bins.append(
            Bin(
                low=float(edges[b]),
                high=float(edges[b + 1]),
                count=count,
                confidence=float(confidence[inside].mean()) if count else None,
                accuracy=(
                    intervals.proportion(correct[inside], groups=None if codes is None else codes[inside])
                    if count
                    else None
                ),
            )
        )
    return Calibration(
        ece=ece,
        floor=float(simulated.mean()),
        floor_95=float(np.quantile(simulated, 0.95)),
        # One is added to both, so that a simulation never claims a probability of 0.
        p_value=float((1 + (simulated >= ece - 1e-12).sum()) / (1 + len(simulated))),
        bins=bins,
        n=n,
    )
