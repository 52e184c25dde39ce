r"""
Ranking accuracy: how often a model assigns the chosen response a higher probability than the rejected one.

Source: *Preference Learning Algorithms Do Not Learn Preference Rankings*, https://huggingface.co/papers/2405.19534.

Log-probabilities are in nats, summed over the tokens of the response (its EOS included, the prompt not), in float32 or
better: two responses of 200 tokens may differ by less than the rounding of a bfloat16 sum. One of a pair may be
`-inf`, a response that the model cannot generate; not both, which have no order.

Several pairs of one prompt, as of four ranked responses, are not independent: give their prompts as `groups`, or the
intervals are too narrow.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from . import intervals
from ._arrays import (
    Groups,
    as_array,
    as_vectors,
    check_between,
    check_comparable,
    check_log_probs,
    check_positive,
    group_codes,
)
from .intervals import Estimate


def _normalized(chosen, rejected, chosen_lengths=None, rejected_lengths=None, *, prefix: str = ""):
    """The two log-probabilities, divided by the lengths where these are given; `prefix` is that of their names."""
    names = [f"{prefix}{side}_logps" for side in ("chosen", "rejected")]
    lengths = dict(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    chosen, rejected, chosen_lengths, rejected_lengths = as_vectors(
        **dict(zip(names, (chosen, rejected), strict=True)), **lengths
    )
    for name, logps in zip(names, (chosen, rejected), strict=True):
        check_log_probs(name, logps)
    check_comparable(**dict(zip(names, (chosen, rejected), strict=True)))
    if (chosen_lengths is None) != (rejected_lengths is None):
        missing = "chosen_lengths" if chosen_lengths is None else "rejected_lengths"
        raise ValueError(f"`{missing}` is missing. Give both `chosen_lengths` and `rejected_lengths`, or neither.")
    if chosen_lengths is None:
        return chosen, rejected
    for name, values in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if values.min() < 1 or np.isinf(values).any():
            wrong = values[(values < 1) | np.isinf(values)][0]
            raise ValueError(
                f"`{name}` must be 1 or more and finite, got {wrong:g}. Lengths are in tokens, EOS included."
            )
    return chosen / chosen_lengths, rejected / rejected_lengths


def ranked_correctly(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
) -> np.ndarray:
    r"""
    Whether each pair is ranked correctly (Definition 2.3): `pi(y_w|x) >= pi(y_l|x)`, so a tie counts as correct.

    Args:
        chosen_logps, rejected_logps (arrays of shape `(N,)`):
            Log-probabilities of the responses under one model (the policy's, or the reference's).
        chosen_lengths, rejected_lengths (arrays of shape `(N,)`, *optional*):
            Their lengths in tokens. With them the comparison is length-normalized, `pi(y|x)^{1/|y|}` (Remark 2.4).

    Returns:
        Boolean array of shape `(N,)`.

    Raises:
        `ValueError`: For arrays of different length, NaN, `+inf`, a pair whose two log-probabilities are both `-inf`,
            lengths of one side only, or a length below 1.
    """
    chosen, rejected = _normalized(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    return chosen >= rejected


def ranking_accuracy(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    *,
    groups: Groups = None,
    confidence: float = 0.95,
) -> Estimate:
    r"""
    Share of pairs that are ranked correctly, `R = E 1[pi(y_w|x) >= pi(y_l|x)]` (Definition 2.3, Equation 1).

    Not TRL's `rewards/accuracies`, which compares log ratios to the reference: see [`reward_accuracy`]. For the
    difference of two models on the same pairs, give both models' [`ranked_correctly`] to [`accuracy_difference`].

    Args:
        chosen_logps, rejected_logps, chosen_lengths, rejected_lengths:
            As for [`ranked_correctly`].
        groups (sequence of `N` hashable labels, *optional*):
            What each pair's prompt is, if some have several pairs; see [`proportion`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval (Wilson).

    Returns:
        [`Estimate`], whose `n` counts the prompts if `groups` are given, else the pairs.

    Raises:
        `ValueError`: As [`ranked_correctly`], and for another number of labels or a `confidence` outside `(0, 1)`.
    """
    correct = ranked_correctly(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    return intervals.proportion(correct, groups=groups, confidence=confidence)


def reward_accuracy(
    chosen_logratios: ArrayLike, rejected_logratios: ArrayLike, *, groups: Groups = None, confidence: float = 0.95
) -> Estimate:
    """
    Share of pairs whose implicit reward is greater for the chosen response: TRL's `rewards/accuracies` for DPO.

    Args:
        chosen_logratios, rejected_logratios (arrays of shape `(N,)`):
            Log ratios log(policy / reference). Equal ones, as at the start of training, count as wrong. Infinite ones
            compare as such: `-inf` where only the reference can say the response, `+inf` where only the policy can.
        groups (sequence of `N` hashable labels, *optional*):
            What each pair's prompt is, if some have several pairs; see [`proportion`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval (Wilson).

    Returns:
        [`Estimate`], whose `n` counts the prompts if `groups` are given, else the pairs.

    Raises:
        `ValueError`: For arrays of different length, NaN, a pair whose two log ratios are the same infinity, another
            number of labels, or a `confidence` outside `(0, 1)`.
    """
    chosen, rejected = as_vectors(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_comparable(chosen_logratios=chosen, rejected_logratios=rejected)
    return intervals.proportion(chosen > rejected, groups=groups, confidence=confidence)


def idealized_ranked_correctly(
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    *,
    beta: float,
    agreement: ArrayLike | None = None,
    epsilon: float = 1e-3,
) -> np.ndarray:
    r"""
    Whether the exact optimum of DPO's objective would rank each pair correctly (Theorem 3.1, Equation 2):
    `pi_ref(y_w) / pi_ref(y_l) * (alpha / (1 - alpha))^{1/beta} > 1`, strictly. In logarithms:
    `Delta_ref + logit(alpha) / beta > 0`.

    Args:
        ref_chosen_logps, ref_rejected_logps (arrays of shape `(N,)`):
            Log-probabilities under the reference.
        chosen_lengths, rejected_lengths (arrays of shape `(N,)`, *optional*):
            Lengths in tokens, to length-normalize the reference's probabilities as in the paper's second variant.
        beta (`float`):
            DPO's beta, greater than 0.
        agreement (`float` or array of shape `(N,)`, *optional*, defaults to 1):
            alpha, the share of raters who prefer the chosen response. 1 is what a single rating says.
        epsilon (`float`, *optional*, defaults to `1e-3`):
            alpha is held in `[epsilon, 1 - epsilon]`: unanimity has its optimum at infinity (Remark 3.2). 1e-3 is the
            paper's (Appendix C.4). With single ratings it adds `logit(1 - epsilon) / beta` to every pair, 69 nats at
            `beta = 0.1` and 0.69 at `beta = 10`, so the outcome is then mostly a matter of epsilon and beta: quote
            both.

    Returns:
        Boolean array of shape `(N,)`.

    Raises:
        `ValueError`: As [`ranked_correctly`], and for a `beta` that is not positive, an `epsilon` outside `(0, 1/2)`,
            or an `agreement` outside `[0, 1]` or of another shape.
    """
    beta, epsilon = check_positive("beta", beta), check_between("epsilon", epsilon, 0, 0.5)
    chosen, rejected = _normalized(
        ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, prefix="ref_"
    )
    alpha = as_array("agreement", 1.0 if agreement is None else agreement, (0, 1))
    if alpha.ndim and len(alpha) != len(chosen):
        raise ValueError(
            f"`agreement` has {len(alpha)} values for {len(chosen)} pairs. Give one a pair, or one for all."
        )
    if alpha.min() < 0 or alpha.max() > 1:
        raise ValueError(f"`agreement` must lie in [0, 1], got values from {alpha.min()} to {alpha.max()}.")
    alpha = alpha.clip(epsilon, 1 - epsilon)
    return chosen - rejected + (np.log(alpha) - np.log1p(-alpha)) / beta > 0


def idealized_ranking_accuracy(
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    *,
    beta: float,
    agreement: ArrayLike | None = None,
    epsilon: float = 1e-3,
    groups: Groups = None,
    confidence: float = 0.95,
) -> Estimate:
    r"""
    Ranking accuracy of the exact optimum of DPO's objective, `R*` (Corollary 3.3, Equation 3): what perfect
    optimization would reach. Always quote beta and epsilon with it.

    The paper's released code takes the quotient of two log-probabilities where Equation 3 has the ratio of two
    probabilities; this is Equation 3.

    Args:
        ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, beta, agreement, epsilon:
            As for [`idealized_ranked_correctly`].
        groups (sequence of `N` hashable labels, *optional*):
            What each pair's prompt is, if some have several pairs; see [`proportion`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval (Wilson).

    Returns:
        [`Estimate`], whose `n` counts the prompts if `groups` are given, else the pairs.

    Raises:
        `ValueError`: As [`idealized_ranked_correctly`], and for another number of labels or a `confidence` outside
        `(0, 1)`.
    """
    correct = idealized_ranked_correctly(
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        beta=beta,
        agreement=agreement,
        epsilon=epsilon,
    )
    return intervals.proportion(correct, groups=groups, confidence=confidence)


@dataclasses.dataclass(frozen=True)
class AlignmentGap:
    """
    How far a policy's ranking accuracy is from what DPO's exact optimum would reach.

    Args:
        gap (`float`):
            Median idealized ranking accuracy over `betas`, minus the policy's. 0.19 to 0.59 in the paper.
        accuracy (`Estimate`):
            The policy's ranking accuracy.
        idealized (`dict[float, float]`):
            Idealized ranking accuracy at each beta.
        epsilon (`float`):
            A single rating was counted as an agreement of 1 - epsilon. Report it with the gap.
    """

    gap: float
    accuracy: Estimate
    idealized: dict[float, float]
    epsilon: float


def alignment_gap(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    *,
    betas: Sequence[float] = (0.01, 0.1, 1.0, 5.0, 10.0),
    agreement: ArrayLike | None = None,
    epsilon: float = 1e-3,
    groups: Groups = None,
) -> AlignmentGap:
    """
    The alignment gap (Section 3.2): median over `betas` of the idealized ranking accuracy, minus the policy's.

    Args:
        chosen_logps, rejected_logps (arrays of shape `(N,)`):
            Log-probabilities under the policy.
        ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, agreement, epsilon:
            As for [`idealized_ranked_correctly`].
        betas (`Sequence[float]`, *optional*, defaults to the paper's grid):
            Betas of the idealized accuracy.
        groups (sequence of `N` hashable labels, *optional*):
            What each pair's prompt is, if some have several pairs; for the interval of `accuracy`.

    Returns:
        [`AlignmentGap`].

    Raises:
        `ValueError`: As [`ranking_accuracy`] and [`idealized_ranked_correctly`], for a reference of another number of
            pairs, and for no `betas`.
    """
    betas = list(betas)
    if not betas:
        raise ValueError("`betas` is empty: give at least one beta of the idealized accuracy.")
    lengths = (chosen_lengths, rejected_lengths)
    accuracy = ranking_accuracy(chosen_logps, rejected_logps, *lengths, groups=groups)
    _reference_correct(as_array("chosen_logps", chosen_logps), ref_chosen_logps, ref_rejected_logps)
    idealized = {
        float(beta): idealized_ranking_accuracy(
            ref_chosen_logps, ref_rejected_logps, *lengths, beta=beta, agreement=agreement, epsilon=epsilon
        ).value
        for beta in betas
    }
    return AlignmentGap(float(np.median(list(idealized.values()))) - accuracy.value, accuracy, idealized, epsilon)


def _reference_correct(policy: np.ndarray, ref_chosen_logps, ref_rejected_logps) -> np.ndarray:
    """Whether the reference ranks each pair correctly, if it has as many pairs as the policy."""
    chosen, rejected = _normalized(ref_chosen_logps, ref_rejected_logps, prefix="ref_")
    if len(chosen) != len(policy):
        raise ValueError(
            f"The policy has {len(policy)} pairs and the reference (`ref_chosen_logps`) {len(chosen)}. Score the same "
            "pairs under both."
        )
    return chosen >= rejected


def pair_difficulty(ref_chosen_logps: ArrayLike, ref_rejected_logps: ArrayLike) -> np.ndarray:
    r"""
    Difficulty of each pair for DPO, `c = log(pi_ref(y_l|x) / pi_ref(y_w|x))` in nats (Theorem 4.1): how much more
    likely the rejected response is under the reference. Positive where the reference is wrong.

    Args:
        ref_chosen_logps, ref_rejected_logps (arrays of shape `(N,)`):
            Log-probabilities under the reference.

    Returns:
        Array of shape `(N,)`; infinite where one of the two is impossible under the reference.

    Raises:
        `ValueError`: For arrays of different length, NaN, `+inf`, or a pair whose two log-probabilities are both
            `-inf`: one that is impossible under the reference has no difficulty.
    """
    chosen, rejected = _normalized(ref_chosen_logps, ref_rejected_logps, prefix="ref_")
    return rejected - chosen


def flip_loss(difficulty: ArrayLike, *, beta: float) -> np.ndarray:
    r"""
    DPO loss at and below which a pair is ranked correctly, `-log sigmoid(beta c)` (Theorem 4.1, exactly).

    `log 2` for a pair that the reference finds equal, 4.5e-5 at `beta c = 10`: a mean loss far below `log 2` can leave
    every hard pair unflipped.

    Args:
        difficulty (array of shape `(N,)`):
            What [`pair_difficulty`] gives, in nats.
        beta (`float`):
            DPO's beta.

    Returns:
        Array of shape `(N,)`: 0 where the difficulty is infinite, infinite where it is `-inf`.

    Raises:
        `ValueError`: For NaN, or a `beta` that is not positive.
    """
    (difficulty,) = as_vectors(difficulty=difficulty)
    return np.logaddexp(0.0, -check_positive("beta", beta) * difficulty)


def _changed(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, groups, confidence, *, gained: bool):
    """
    Share of the pairs whose order the policy changed, among those that the reference has wrong (`gained`) or right.
    """
    after = ranked_correctly(chosen_logps, rejected_logps)
    before = _reference_correct(after, ref_chosen_logps, ref_rejected_logps)
    codes = group_codes(groups, len(after))
    concerned = before != gained
    if not concerned.any():
        return None
    groups = None if codes is None else codes[concerned]
    return intervals.proportion((after == gained)[concerned], groups=groups, confidence=confidence)


def flipped(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    groups: Groups = None,
    confidence: float = 0.95,
) -> Estimate | None:
    """
    Share of the pairs that the reference ranks wrongly and the policy correctly, among those that the reference ranks
    wrongly (Section 4.1: less than 0.1 at the best validation loss in the paper's runs).

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps (arrays of shape `(N,)`):
            Log-probabilities under the policy and the reference.
        groups (sequence of `N` hashable labels, *optional*):
            What each pair's prompt is, if some have several pairs; see [`proportion`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval (Wilson).

    Returns:
        [`Estimate`], or `None` where the reference ranks every pair correctly.

    Raises:
        `ValueError`: As [`ranking_accuracy`], and for a reference of another number of pairs.
    """
    arrays = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _changed(*arrays, groups, confidence, gained=True)


def unflipped(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    groups: Groups = None,
    confidence: float = 0.95,
) -> Estimate | None:
    """
    The other way round: share of the pairs that the policy ranks wrongly among those that the reference ranks
    correctly.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps (arrays of shape `(N,)`):
            Log-probabilities under the policy and the reference.
        groups, confidence (*optional*):
            As for [`flipped`].

    Returns:
        [`Estimate`], or `None` where the reference ranks every pair wrongly.

    Raises:
        `ValueError`: As [`flipped`].
    """
    arrays = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _changed(*arrays, groups, confidence, gained=False)
