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
    zq: torch.Tensor | None,
    labels: torch.Tensor,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    may_be_masked: bool,
) -> tuple:
    """
    Adds one tile of logits to the running statistics of its rows.

    Args:
        sums (`dict[str, torch.Tensor]`): Statistics so far, `(rows,)`; see [`new_sums`].
        zp (`torch.Tensor` of shape `(rows, columns)`): Logits of the policy; run eagerly, overwritten.
        zq (`torch.Tensor`, *optional*): The same of the reference, if `sums` has statistics of one.
        labels (`torch.Tensor` of shape `(rows,)`): Labels, counted from the tile's first column.
        dtypes (`tuple`): In which to return the unnormalized probabilities of either model; `None` for not at all.
        may_be_masked (`bool`): Whether logits may be -inf, which costs a few passes.

    Returns:
        `tuple`: The new statistics, and of each model the factor to which the older ones were scaled, and the
        probabilities; `None` without a reference.
    """
    old, sums = sums, dict(sums)
    inside = (labels >= 0) & (labels < zp.shape[1])
    labels = labels.clamp(0, zp.shape[1] - 1)[:, None]
    logits = {"policy": zp} if zq is None else {"policy": zp, "ref": zq}
    growths = {}
    for name, z in logits.items():
        sums[f"{name}_label"] = torch.where(inside, z.gather(1, labels)[:, 0], old[f"{name}_label"])
        maximum = sums[f"{name}_max"] = torch.maximum(old[f"{name}_max"], z.amax(1))
        # Logarithm of the factor to the new scale; 0 before the first finite logit.
        growths[name] = torch.where(old[f"{name}_max"] == -math.inf, 0.0, old[f"{name}_max"] - maximum)
    if "logit_sum" in sums:
        sums["logit_sum"] = old["logit_sum"] + zp.sum(1)
    scales = {name: growth.exp() for name, growth in growths.items()}
    if zq is not None:
        # x = (r - ref_max) - (z - policy_max) has moved by `shift`.
        shift, scale, total = growths["ref"] - growths["policy"], scales["ref"], old["ref_sum"]
        sums["x_sum"] = scale * (old["x_sum"] + shift * total)
        sums["ratio_sum"] = scale * (shift.neg().exp() * old["ratio_sum"] + shift.neg().expm1() * total)
    for name, scale in scales.items():
        if f"{name}_entropy_sum" in sums:
            sums[f"{name}_entropy_sum"] = scale * (old[f"{name}_entropy_sum"] + growths[name] * old[f"{name}_sum"])
        sums[f"{name}_sum"] = scale * old[f"{name}_sum"]

    missing = {name: z == -math.inf for name, z in logits.items()} if may_be_masked else {}
    for name, z in logits.items():
        maximum = _finite_or_zero(sums[f"{name}_max"]) if may_be_masked else sums[f"{name}_max"]
        logits[name] = torch.sub(z, maximum[:, None], out=_overwritten(z))
    x = None
    if zq is not None:
        x = logits["policy"] - logits["ref"]  # -x of `paired_head`'s docstring, the argument of the exponential
        if may_be_masked:
            no_policy, no_ref = missing["policy"], missing["ref"]
            x.masked_fill_(no_policy | no_ref, 0.0)
            sums["only_policy"] = old["only_policy"] | (no_ref & ~no_policy).any(1)
            sums["only_reference"] = old["only_reference"] | (no_policy & ~no_ref).any(1)
    probs = {}
    for name, z in logits.items():
        if f"{name}_entropy_sum" in sums:
            probs[name] = z.exp()
            z = z.masked_fill_(missing[name], 0.0) if may_be_masked else z
            sums[f"{name}_entropy_sum"] = sums[f"{name}_entropy_sum"] + _row_dot(probs[name], z)
        else:
            probs[name] = z.exp_()
        sums[f"{name}_sum"] = sums[f"{name}_sum"] + probs[name].sum(1)
    if x is not None:
        sums["x_sum"] = sums["x_sum"] - _row_dot(probs["ref"], x)
        sums["ratio_sum"] = sums["ratio_sum"] + _row_dot(probs["ref"], x.expm1_())
        del x  # before room is made for the probabilities
    p, q = (
        None if dtype is None else probs[name].to(dtype) for name, dtype in zip(("policy", "ref"), dtypes, strict=True)
    )
    return sums, scales["policy"], scales.get("ref"), p, q


def new_sums(
    rows: int,
    *,
    is_paired: bool,
    details: bool,
    ref_entropy: bool,
    may_be_masked: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """
    Statistics of no tile: sums relative to the running maxima of the policy's logits and, if `is_paired`, of the
    reference's.
    """
    models = ("policy", "ref") if is_paired else ("policy",)
    names = [f"{model}_{what}" for model in models for what in ("sum", "label")]  # the sum of e^(z - max)
    names += ["x_sum", "ratio_sum"] if is_paired else []  # of q x and q (e^-x - 1), q = e^(r - ref_max)
    names += ["policy_entropy_sum", "logit_sum"] if details else []  # of p (z - max), of z
    names += ["ref_entropy_sum"] if ref_entropy else []  # of q (r - ref_max)
    sums = {name: torch.zeros(rows, device=device, dtype=dtype) for name in names}
    sums |= {f"{model}_max": torch.full((rows,), -math.inf, device=device, dtype=dtype) for model in models}
    if may_be_masked and is_paired:
        # Rows with tokens that only one of the models can generate.
        sums |= {name: sums["policy_sum"].bool() for name in ("only_policy", "only_reference")}
    return sums


def logit_gradient(
    zp: torch.Tensor,
    zq: torch.Tensor | None,
    labels: torch.Tensor,
    policy_lse: torch.Tensor,
    ref_lse: torch.Tensor | None,
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
        assert zq is not None and ref_lse is not None
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
