r"""
Divergences between a policy and its reference: estimates from samples of the policy, and exact ones per token.

Sources: J. Schulman, *Approximating KL Divergence* (2020), for k1, k2 and k3; f-DPO,
https://huggingface.co/papers/2309.16240, for the divergences beyond KL; TDPO,
https://huggingface.co/papers/2404.11999, for the sequential KL.

Notation: `l = log pi(y) - log pi_ref(y)`, the log ratio of a response (or of one token, given the tokens before it)
that was drawn from the policy. The distributions must be the sampled ones: at another temperature, or top-p, the
log-probabilities belong to another policy.

"KL" differs between papers, and the numbers cannot be compared: TDPO reports KL(pi_ref || pi) summed over positions of
*dataset* responses, f-DPO sums over samples with raw gpt2-large as the reference, TRL's online trainers report k1.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..losses import Divergence, get_divergence
from ..losses.f_divergence import ForwardKL, ReverseKL
from ._arrays import as_array, check_count, check_log_probs


KL_ESTIMATORS = ("k1", "k2", "k3")


def _logratios(logratios) -> np.ndarray:
    logratios = as_array("logratios", logratios)
    if np.isneginf(logratios).any():
        raise ValueError(
            f"`logratios` has {int(np.isneginf(logratios).sum())} values of -inf: responses that the policy cannot "
            "have sampled. Pass log pi - log pi_ref of samples of the policy."
        )
    return logratios


def kl_estimates(logratios: ArrayLike, estimator: str = "k1") -> np.ndarray:
    r"""
    Estimates KL(pi || pi_ref) from samples of the policy, one number per sample; their mean is the estimate.

    | estimator | value of one sample | |
    |---|---|---|
    | `k1` | `l` | unbiased, of either sign, high variance |
    | `k2` | `l^2 / 2` | biased: by +25% for unit Gaussians one standard deviation apart |
    | `k3` | `e^{-l} - 1 + l` | unbiased, never negative, heavy tail where the two are far apart |

    Differentiated on fixed samples, only k2 is an unbiased estimator of the *gradient* of the KL.

    Args:
        logratios (array of any shape):
            `log pi - log pi_ref` of each sample, in nats. A sample is a whole response or a token. k3 of a long
            response explodes (`e^{-l}` of a sum), so sum it over tokens instead ([`sequence_kl`]). `+inf`, a sample
            that the reference cannot generate, makes every estimate infinite; k3 is also infinite beyond the range of
            float64.
        estimator (`str`, *optional*, defaults to `"k1"`):
            `"k1"`, `"k2"` or `"k3"`.

    Returns:
        Array of the same shape.

    Raises:
        `ValueError`: For NaN, `-inf` (a sample that the policy cannot generate), or an unknown estimator.
    """
    logratios = _logratios(logratios)
    if estimator == "k1":
        return logratios.copy()
    if estimator == "k2":
        return logratios**2 / 2
    if estimator == "k3":
        with np.errstate(over="ignore"):  # beyond the range of float64, e^{-l} is infinite, as documented
            return np.expm1(-logratios) + logratios
    raise ValueError(f"`estimator` must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}.")


def sequence_kl(
    token_logps: ArrayLike, ref_token_logps: ArrayLike, mask: ArrayLike, estimator: str = "k1"
) -> np.ndarray:
    r"""
    Estimates KL(pi || pi_ref) of whole responses from one sample each: sums the estimator of every token, given the
    tokens before it, over the response. The sum is unbiased for k1 and k3, as the prefixes are the policy's own.

    The unit is nats per response. For nats per token divide by the number of tokens, and say so.

    Args:
        token_logps, ref_token_logps (arrays of shape `(B, T)`):
            Log-probability of each token under the policy that sampled it and under the reference. Outside the mask
            any value but NaN is allowed. `-inf` of the reference makes the estimate infinite.
        mask (array of shape `(B, T)`):
            Non-zero on the tokens of the response, its EOS included; zero on prompt and padding.
        estimator (`str`, *optional*, defaults to `"k1"`):
            As for [`kl_estimates`].

    Returns:
        Array of shape `(B,)`; 0 for a response whose mask is empty.

    Raises:
        `ValueError`: For arrays of different shapes, NaN, `+inf` on the tokens of the response, `-inf` of the policy
            there, or an unknown estimator.
    """
    token_logps = as_array("token_logps", token_logps, 2)
    ref_token_logps = as_array("ref_token_logps", ref_token_logps, 2)
    inside: np.ndarray = as_array("mask", mask, 2) != 0
    if not token_logps.shape == ref_token_logps.shape == inside.shape:
        raise ValueError(
            f"`token_logps`, `ref_token_logps` and `mask` must have the same shape, got {token_logps.shape}, "
            f"{ref_token_logps.shape} and {inside.shape}."
        )
    check_log_probs("token_logps", token_logps[inside], possible=True)
    check_log_probs("ref_token_logps", ref_token_logps[inside])
    # `where` before the estimator: values outside the mask may be infinite.
    logratios = np.where(inside, token_logps, 0.0) - np.where(inside, ref_token_logps, 0.0)
    return kl_estimates(logratios, estimator).sum(axis=1)


def sampled_divergence(logratios: ArrayLike, divergence: str | Divergence = "reverse_kl", **params: Any) -> np.ndarray:
    r"""
    Estimates `D_f(pi || pi_ref) = E_{pi_ref}[f(u)] = E_pi[f(u) / u]`, `u = e^l`, from samples of the policy, one
    number per sample.

    The estimates are unbiased and never negative for every divergence of the project. With `"reverse_kl"` they are k3.
    The others weigh a sample by `1 / u` too, so their tails are even heavier: use them on tokens, or for two models
    that are close.

    Args:
        logratios (array of any shape):
            `log pi - log pi_ref` of each sample, in nats; `+inf` is a sample that the reference cannot generate.
        divergence (`str` or [`~trl_ext.losses.Divergence`], *optional*, defaults to `"reverse_kl"`):
            A name that [`~trl_ext.losses.get_divergence`] knows, or an instance.
        **params:
            Parameters of the divergence.

    Returns:
        Array of the same shape, without NaN. A value is infinite if the divergence is, or if it is beyond the range of
        float64.

    Raises:
        `ValueError`: For NaN, `-inf` (a sample that the policy cannot generate), or a divergence or parameter that
            [`~trl_ext.losses.get_divergence`] refuses.
    """
    import torch

    values = torch.from_numpy(_logratios(logratios))
    # `scaled_value` is f(u) / max(u, 1). Where u < 1 it still has to be divided by u, which may underflow to 0.
    return (get_divergence(divergence, **params).scaled_value(values) * (-values).clamp(min=0).exp()).numpy()


def token_divergences(
    logits: ArrayLike, ref_logits: ArrayLike, divergence: str | Divergence = "reverse_kl", **params: Any
) -> np.ndarray:
    r"""
    Exact divergence of each next-token distribution, `D_f(pi_t || pi_ref,t)`, in nats: `sum_v pi_ref f(pi / pi_ref)`.

    `"reverse_kl"` is KL(pi || pi_ref), `"forward_kl"` is KL(pi_ref || pi). Summed over the tokens of a response that
    the policy sampled, the former estimates the KL of whole responses with less variance than k1 or k3
    (Rao-Blackwell); summed over the tokens of a dataset response, the latter is TDPO's sequential KL. The value is
    infinite where the divergence is: reverse KL if the policy generates what the reference cannot, forward KL in the
    opposite case, Jeffreys in both.

    Args:
        logits, ref_logits (arrays of shape `(..., V)`):
            Logits, or log-probabilities, of the two models at the same positions. Divide both by the sampling
            temperature first. `-inf` is a token of probability 0.
        divergence (`str` or [`~trl_ext.losses.Divergence`], *optional*, defaults to `"reverse_kl"`):
            A name that [`~trl_ext.losses.get_divergence`] knows, or an instance.
        **params:
            Parameters of the divergence.

    Returns:
        Array of shape `(...)`.

    Raises:
        `ValueError`: For different shapes, no logits, NaN, `+inf`, a position where every token has `-inf`, or a
            divergence or parameter that [`~trl_ext.losses.get_divergence`] refuses.
    """
    import torch

    tensors = [
        value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        for value in (logits, ref_logits)
    ]
    if tensors[0].shape != tensors[1].shape:
        raise ValueError(
            f"`logits` and `ref_logits` must have the same shape, got {tuple(tensors[0].shape)} and "
            f"{tuple(tensors[1].shape)}."
        )
    for name, value in zip(("logits", "ref_logits"), tensors, strict=True):
        if value.dim() == 0 or value.numel() == 0:
            raise ValueError(f"`{name}` has the shape {tuple(value.shape)}: there is nothing to measure.")
        largest = value.amax(-1)  # NaN where any is
        if not largest.isfinite().all():
            raise ValueError(
                f"`{name}` has NaN, +inf, or a position with nothing but -inf, which is no distribution. Check what "
                "was scored, or drop these positions from both."
            )
    divergence = get_divergence(divergence, **params)
    log_probs, ref_log_probs = (value.detach().double().log_softmax(-1) for value in tensors)
    return divergence_of_log_probs(log_probs, ref_log_probs, divergence).cpu().numpy()


def divergence_of_log_probs(log_probs, ref_log_probs, divergence: Divergence):
    """
    `D_f` over the last dimension of two tensors of log-probabilities.

    Args:
        log_probs, ref_log_probs (`torch.Tensor` of shape `(..., V)`):
            Normalized log-probabilities of policy and reference on one device, without NaN; `-inf` is a token of
            probability 0.
        divergence ([`~trl_ext.losses.Divergence`]):
            The divergence.

    Returns:
        `torch.Tensor` of shape `(...)`, in nats: at least 0, and infinite where the divergence is.
    """
    import torch

    # A token that neither model can generate contributes nothing; -inf - (-inf) would be NaN.
    neither = torch.isneginf(log_probs) & torch.isneginf(ref_log_probs)
    logratio = (log_probs - ref_log_probs).masked_fill(neither, 0.0)
    # The two KL divergences need no ratio, which may overflow where the reference is nearly certain.
    if type(divergence) is ReverseKL:
        terms = log_probs.exp() * logratio
        terms = terms.masked_fill(torch.isneginf(log_probs), 0.0)
    elif type(divergence) is ForwardKL:
        terms = -ref_log_probs.exp() * logratio
        terms = terms.masked_fill(torch.isneginf(ref_log_probs), 0.0)
    else:
        # pi_ref f(u) = pi f(u) / u: the larger of the two probabilities does not underflow. Computed in logarithms, as
        # a vanishing probability times an infinite f would be NaN.
        larger = torch.maximum(log_probs, ref_log_probs).double()
        terms = (larger + divergence.scaled_value(logratio.double()).clamp(min=0.0).log()).exp()
    # Rounding of sums that cancel must not make a divergence negative.
    return terms.sum(-1).clamp(min=0.0)


def best_of_n(n: int) -> tuple[float, float]:
    r"""
    KL and win rate of the best of `n` samples of the reference, a point of the frontier to compare with.

    Args:
        n (`int`):
            Number of samples, of which the judge's best is kept. The judge has no ties.

    Returns:
        `(float, float)`: its KL to the reference, `log n - (n - 1) / n` nats (an upper bound, reached if no two
        responses are the same), and its win rate over one sample of the reference, `n / (n + 1)`.

    Raises:
        `ValueError`: For an `n` that is no integer of at least 1.
    """
    n = check_count("n", n, 1)
    return math.log(n) - (n - 1) / n, n / (n + 1)
