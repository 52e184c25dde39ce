"""
What the paired head does with a tile of logits, apart from its GEMMs: two pure functions, run eagerly or compiled.

Eager, each operation passes over the tile once, and most overwrite it. Compiled, the passes are fused: the forward
reads a tile twice, for its maxima and for everything else, and writes nothing but the probabilities in the dtype of the
GEMM that takes them. Compiled code sums in another order, so the two agree within rounding, not to the bit.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable

import torch


# Set to 1, the tiles of the heads on CUDA are compiled. Off by default: no device has shown yet that it pays, and
# compiled reductions may be tuned anew in each process, so that a resumed run would not repeat an uninterrupted one.
COMPILE_VARIABLE = "TRL_EXT_COMPILED_HEAD"


def is_compiled(device: torch.device, requested: bool | None) -> bool:
    """Whether tiles on `device` are compiled: as requested, or on CUDA as the environment says."""
    if requested is not None:
        return requested
    return device.type == "cuda" and os.environ.get(COMPILE_VARIABLE) == "1"


@functools.cache
def _compile(function: Callable) -> Callable:
    # Batches differ in their number of tokens, and the last tile of a vocabulary in its width.
    return torch.compile(function, dynamic=True)


_failed: set[Callable] = set()


def run_tile(function: Callable, *arguments, compiled: bool):
    """`function(*arguments)`, compiled if it can be. A failure to compile is warned of once; then it runs eagerly."""
    if compiled and function not in _failed:
        try:
            return _compile(function)(*arguments)  # overwrites none of its arguments, so it can be run again
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _failed.add(function)
            warnings.warn(f"The paired head's `{function.__name__}` runs eagerly: {type(error).__name__}: {error}")
    return function(*arguments)


def _overwritten(tensor: torch.Tensor) -> torch.Tensor | None:
    """Where an operation on a tile puts its result: into the tile, or compiled, where its result may never exist."""
    return None if torch.compiler.is_compiling() else tensor


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(a * b).sum(1)` without the product, which a compiler fuses by itself."""
    if torch.compiler.is_compiling():
        return (a * b).sum(1)
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


def _finite_or_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == -math.inf, 0.0, x)


def fold_tile(
    sums: dict[str, torch.Tensor],
    zp: torch.Tensor,
    zq: torch.Tensor,
    labels: torch.Tensor,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple:
    """
    Adds one tile of logits to the running statistics of its rows.

    Args:
        sums (`dict[str, torch.Tensor]`): Statistics so far, `(rows,)`; see [`new_sums`].
        zp, zq (`torch.Tensor` of shape `(rows, columns)`): Logits of policy and reference; run eagerly, overwritten.
        labels (`torch.Tensor` of shape `(rows,)`): Labels, counted from the tile's first column.
        dtypes (`tuple`): In which to return the unnormalized probabilities of either model; `None` for not at all.

    Returns:
        `tuple`: The new statistics, the factors to which the older ones were scaled, and the probabilities.
    """
    old, sums = sums, dict(sums)
    inside = (labels >= 0) & (labels < zp.shape[1])
    labels = labels.clamp(0, zp.shape[1] - 1)[:, None]
    sums["policy_label"] = torch.where(inside, zp.gather(1, labels)[:, 0], old["policy_label"])
    sums["ref_label"] = torch.where(inside, zq.gather(1, labels)[:, 0], old["ref_label"])
    if "logit_sum" in sums:
        sums["logit_sum"] = old["logit_sum"] + zp.sum(1)
    policy_scale, ref_scale = _raise_maxima(sums, zp.amax(1), zq.amax(1))
    policy_max, ref_max = sums["policy_max"], sums["ref_max"]
    may_be_masked = "only_policy" in sums
    if may_be_masked:
        no_policy, no_ref = zp == -math.inf, zq == -math.inf
        policy_max, ref_max = _finite_or_zero(policy_max), _finite_or_zero(ref_max)

    zp = torch.sub(zp, policy_max[:, None], out=_overwritten(zp))
    zq = torch.sub(zq, ref_max[:, None], out=_overwritten(zq))
    x = zp - zq  # -x of `paired_head`'s docstring, the argument of the exponential
    if may_be_masked:
        x.masked_fill_(no_policy | no_ref, 0.0)
        sums["only_policy"] = old["only_policy"] | (no_ref & ~no_policy).any(1)
        sums["only_reference"] = old["only_reference"] | (no_policy & ~no_ref).any(1)
    if "entropy_sum" in sums:
        p = zp.exp()
        zp = zp.masked_fill_(no_policy, 0.0) if may_be_masked else zp
        sums["entropy_sum"] = sums["entropy_sum"] + _row_dot(p, zp)
    else:
        p = zp.exp_()
    sums["policy_sum"] = sums["policy_sum"] + p.sum(1)
    if "ref_entropy_sum" in sums:
        q = zq.exp()
        zq = zq.masked_fill_(no_ref, 0.0) if may_be_masked else zq
        sums["ref_entropy_sum"] = sums["ref_entropy_sum"] + _row_dot(q, zq)
    else:
        q = zq.exp_()
    sums["ref_sum"] = sums["ref_sum"] + q.sum(1)
    sums["x_sum"] = sums["x_sum"] - _row_dot(q, x)
    sums["ratio_sum"] = sums["ratio_sum"] + _row_dot(q, x.expm1_())
    del x  # before room is made for the probabilities
    p, q = (None if dtype is None else probs.to(dtype) for probs, dtype in zip((p, q), dtypes, strict=True))
    return sums, policy_scale, ref_scale, p, q


def new_sums(
    rows: int, *, details: bool, ref_entropy: bool, may_be_masked: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """
    Statistics of no tile: sums relative to the running maxima of both models' logits.

    `may_be_masked` says whether logits may be -inf, which costs a few passes.
    """
    names = ["policy_sum", "ref_sum"]  # of e^(z - max)
    names += ["x_sum", "ratio_sum"]  # of q x and q (e^-x - 1), q = e^(r - ref_max)
    names += ["policy_label", "ref_label"]
    names += ["entropy_sum", "logit_sum"] if details else []  # of p (z - max), of z
    names += ["ref_entropy_sum"] if ref_entropy else []  # of q (r - ref_max)
    sums = {name: torch.zeros(rows, device=device, dtype=dtype) for name in names}
    sums |= {name: torch.full((rows,), -math.inf, device=device, dtype=dtype) for name in ("policy_max", "ref_max")}
    if may_be_masked:
        # Rows with tokens that only one of the models can generate.
        sums |= {name: sums["policy_sum"].bool() for name in ("only_policy", "only_reference")}
    return sums


def _raise_maxima(sums: dict[str, torch.Tensor], policy_max: torch.Tensor, ref_max: torch.Tensor) -> tuple:
    """Scales `sums` to the maxima of both, and returns the factors."""
    policy_max, ref_max = torch.maximum(sums["policy_max"], policy_max), torch.maximum(sums["ref_max"], ref_max)

    def growth(old, new):
        """Logarithm of the factor to the new scale; 0 before the first finite logit."""
        return torch.where(old == -math.inf, 0.0, old - new)

    policy_growth, ref_growth = growth(sums["policy_max"], policy_max), growth(sums["ref_max"], ref_max)
    sums["policy_max"], sums["ref_max"] = policy_max, ref_max
    policy_scale, ref_scale = policy_growth.exp(), ref_growth.exp()
    if "entropy_sum" in sums:
        sums["entropy_sum"] = policy_scale * (sums["entropy_sum"] + policy_growth * sums["policy_sum"])
    if "ref_entropy_sum" in sums:
        sums["ref_entropy_sum"] = ref_scale * (sums["ref_entropy_sum"] + ref_growth * sums["ref_sum"])
    # x = (r - ref_max) - (z - policy_max) has moved by `shift`.
    shift = ref_growth - policy_growth
    sums["x_sum"] = ref_scale * (sums["x_sum"] + shift * sums["ref_sum"])
    sums["ratio_sum"] = ref_scale * (shift.neg().exp() * sums["ratio_sum"] + shift.neg().expm1() * sums["ref_sum"])
    sums["policy_sum"], sums["ref_sum"] = policy_scale * sums["policy_sum"], ref_scale * sums["ref_sum"]
    return policy_scale, ref_scale


def logit_gradient(
    zp: torch.Tensor,
    zq: torch.Tensor | None,
    labels: torch.Tensor,
    policy_lse: torch.Tensor,
    ref_lse: torch.Tensor,
    grad_logps: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """`A (e_y - p) + C (p - q)`, through soft-capping and scale; run eagerly, it overwrites the logits."""
    slope = None
    if softcap is not None:
        slope = (zp / softcap).square_().neg_().add_(1.0)
    p = torch.sub(zp, policy_lse[:, None], out=_overwritten(zp)).exp_()
    grad = None
    if grad_kl is not None:
        assert zq is not None
        q = torch.sub(zq, ref_lse[:, None], out=_overwritten(zq)).exp_()
        # The difference first: for identical models it is zero, and stays so.
        grad = torch.sub(p, q, out=_overwritten(q)).mul_(grad_kl.to(q.dtype)[:, None])
    if grad_logps is not None:
        grad_logps = grad_logps.to(p.dtype)
        p.mul_(-grad_logps[:, None])
        grad = p if grad is None else grad.add_(p)
        if torch.compiler.is_compiling():  # part of the same pass, where scattering is one of its own
            is_label = torch.arange(grad.shape[1], device=grad.device) == labels[:, None]
            grad = grad + torch.where(is_label, grad_logps[:, None], 0.0)
        else:
            inside = (labels >= 0) & (labels < grad.shape[1])
            local = labels.clamp(0, grad.shape[1] - 1)[:, None]
            grad.scatter_add_(1, local, torch.where(inside, grad_logps, 0.0)[:, None])
    if grad is None:
        return p.zero_()
    if slope is not None:
        grad.mul_(slope)
    if logit_scale != 1.0:
        grad.mul_(logit_scale)
    return grad
