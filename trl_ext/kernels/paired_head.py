r"""
One pass over two LM heads: log-probability of the label under both models, and KL(reference || policy), per position;
or over one head, for its log-probability.

With z, r the logits of policy and reference at one position, p = softmax(z), q = softmax(r) and y the label:

    policy_logp = z_y - lse(z),    ref_logp = r_y - lse(r),    kl = sum_v q_v (log q_v - log p_v)

and for A = dL/dpolicy_logp, C = dL/dkl the gradient is dL/dz = A (e_y - p) + C (p - q), written once.

Cost. Logits exist in tiles of tokens x vocabulary only. In GEMMs of the head's size (N x H x V), forward and backward:

- frozen head: 4. The gradient of the hidden states needs no logit once E_p[w] and E_q[w], the mean rows of the head
  under both models, are known, and those accumulate in the forward, tile by tile, like the output of a blockwise
  attention:

      dL/dh = logit_scale (A (w_y - E_p[w]) + C (E_p[w] - E_q[w]))

  2 for the logits, 1 for E_p[w], 1 for E_q[w] at the positions whose KL has a gradient. Two (N, H) tensors are kept,
  and the backward does not see the head;
- trained head, or soft-capping: 6 and 5. The backward recomputes the tiles (2), then 1 for the hidden states' gradient
  and 1 for the weight's. One less where the gradient does not reach the KL, as its tiles need no reference.

Composing a log-probability head with a divergence head takes 11 and 9. One head alone takes 2 frozen, which is the
product of its logits and that of the mean rows, and 4 trained; TRL's recomputes its logits and takes 3 and 4.

Numerics. `sum q (r - z) - lse(r) + lse(z)` subtracts numbers of the size of the logits and leaves rounding noise of
either sign where the models are close, which is where training starts. With x = r - z - c, for any constant c,

    KL(q || p) = E_q[x] + log E_q[e^-x] = E_q[x] + log(1 + E_q[e^-x - 1]),

whose two terms are of the size of x, and which is exactly zero for identical models. c is the difference of the
running maxima, so that x is small wherever the models are close. Where they are not, E_q[e^-x] may overflow or cancel;
then the KL is large beside the rounding, and the first form is used.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .tiles import fold_tile, is_compiled, logit_gradient, new_sums, run_tile


# Bytes of the tile-sized temporaries that are alive at once (`_LIVE_TILES` of them), and rows of a tile. On a CPU a
# tile should stay in the cache; on an accelerator it should be large enough to fill it.
_SCRATCH_BYTES = {"cpu": 16 << 20}
_SCRATCH_BYTES_ACCELERATOR = 768 << 20
_TOKEN_TILE = {"cpu": 512}
_TOKEN_TILE_ACCELERATOR = 4096
_LIVE_TILES = 4

# Whether cuBLAS can be asked for a single-precision product of half-precision matrices.
_MIXED_GEMM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)

IGNORE_INDEX = -100


class HeadStatistics(NamedTuple):
    """
    Result of [`head_statistics`]; all of shape `(N,)`, zero where the label is `-100`.

    Args:
        logps (`torch.Tensor`): Log-probability of the label, in nats, with gradient.
        entropy (`torch.Tensor`, *optional*): Entropy in nats, without gradient.
        mean_logits (`torch.Tensor`, *optional*): Mean of the logits over the vocabulary, without gradient.
        is_top1 (`torch.Tensor`, *optional*): Whether no token is more likely than the label.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


class PairedHeadStatistics(NamedTuple):
    """
    Result of [`paired_head_details`]; all of shape `(N,)`, zero where the label is `-100`.

    Args:
        policy_logps (`torch.Tensor`): Log-probability of the label under the policy, in nats, with gradient.
        ref_logps (`torch.Tensor`): The same under the reference, without gradient; `None` without one.
        kl (`torch.Tensor`): KL(reference || policy) in nats, with gradient to the policy; `None` without a reference.
        entropy (`torch.Tensor`, *optional*): Entropy of the policy in nats, without gradient.
        mean_logits (`torch.Tensor`, *optional*): Mean of the policy's logits over the vocabulary, without gradient.
        is_top1 (`torch.Tensor`, *optional*): Whether no token is more likely than the label under the policy.
        ref_entropy (`torch.Tensor`, *optional*): Entropy of the reference in nats, without gradient.
    """

    policy_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    kl: torch.Tensor | None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    ref_entropy: torch.Tensor | None = None


def paired_head_statistics(
    policy_hidden: torch.Tensor,
    policy_weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    policy_bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compiled: bool | None = None,
    _tiles: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Policy log-probability, reference log-probability and KL(reference || policy) of every position, in one pass over
    tiles of both models' logits, which are never materialized in full.

    The logits are `softcap * tanh(z / softcap)`, `z = logit_scale * (hidden @ weight.T + bias)`, for both models.

    Args:
        policy_hidden (`torch.Tensor` of shape `(N, H)`):
            The policy's last hidden states, each at the position that predicts the label.
        policy_weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the policy's LM head. A gradient is computed only if it requires one.
        ref_hidden (`torch.Tensor` of shape `(N, H')`):
            The same of the reference. No gradient flows to the reference.
        ref_weight (`torch.Tensor` of shape `(V, H')`):
            Weight of the reference's LM head. If it is the policy's tensor (LoRA), each tile is read and cast to the
            compute dtype once for both models.
        labels (`torch.Tensor` of shape `(N,)`):
            Token ids; at `-100` the results are 0 and have no gradient.
        policy_bias, ref_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Biases of the heads. An entry of `-inf` takes a token out of the distribution, as padded vocabularies do; a
            token that only the policy lacks makes the KL `inf`.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor of the logits (Cohere, Granite).
        softcap (`float`, *optional*):
            Soft-capping of the logits (Gemma).
        compiled (`bool`, *optional*):
            Whether to fuse what is not a GEMM with `torch.compile`. By default on CUDA if the environment variable
            `TRL_EXT_COMPILED_HEAD` is 1. Results then agree with the eager ones within rounding.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(N,)`: policy log-probability, reference log-probability, KL, in
        nats, in float32, or float64 if a hidden state is. GEMMs run in the dtype of the hidden states, or of autocast,
        and accumulate in that of the result.

    Raises:
        `ValueError`: If shapes, vocabularies, devices or labels do not match.

    Example:

    ```python
    >>> hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    >>> paired_head_statistics(hidden, weight, 0 * hidden, weight, torch.tensor([1]))  # p = (1/4, 3/4), q = (1/2, 1/2)
    (tensor([-0.2877]), tensor([-0.6931]), tensor([0.1438]))
    ```
    """
    statistics = paired_head_details(
        policy_hidden,
        policy_weight,
        ref_hidden,
        ref_weight,
        labels,
        policy_bias=policy_bias,
        ref_bias=ref_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        compiled=compiled,
        _tiles=_tiles,
    )
    return tuple(statistics[:3])


def head_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    details: bool = False,
    gather: Callable | None = None,
    compiled: bool | None = None,
    _tiles: tuple[int, int] | None = None,
) -> HeadStatistics:
    """
    Log-probability of every position's label under one model, in tiles of logits; the arguments are the policy's of
    [`paired_head_details`].

    Where the head is frozen (`weight` and `bias` require no gradient, no soft-capping), forward and backward take two
    GEMMs of its size together: the gradient of the hidden states is accumulated in the forward.

    Returns:
        [`HeadStatistics`], all of shape `(N,)`, in float32, or float64 if `hidden` is; all but `logps` are `None`
        without `details`.

    Raises:
        `ValueError`: If shapes or labels do not match, or a setting is out of its range.

    Example:

    ```python
    >>> head_statistics(torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1])).logps.exp()
    tensor([0.7500])
    ```
    """
    found = paired_head_details(
        hidden,
        weight,
        None,
        None,
        labels,
        policy_bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        details=details,
        gather=gather,
        compiled=compiled,
        _tiles=_tiles,
    )
    return HeadStatistics(found.policy_logps, found.entropy, found.mean_logits, found.is_top1)


def paired_head_details(
    policy_hidden: torch.Tensor,
    policy_weight: torch.Tensor,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    policy_bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    details: bool = False,
    ref_entropy: bool = False,
    gather: Callable | None = None,
    kl_gradient: torch.Tensor | bool = True,
    compiled: bool | None = None,
    _tiles: tuple[int, int] | None = None,
) -> PairedHeadStatistics:
    """
    [`paired_head_statistics`], and the statistics that training logs.

    Args:
        policy_hidden, ref_hidden (`torch.Tensor` of shape `(N, H)` and `(N, H')`):
            Last hidden states of the two models, each at the position that predicts the label. No gradient flows to
            the reference. Without a reference (`None`), [`head_statistics`] is what this computes.
        policy_weight, ref_weight (`torch.Tensor` of shape `(V, H)` and `(V, H')`):
            Weights of the LM heads; one tensor for both, if they share it.
        labels (`torch.Tensor` of shape `(N,)`):
            Token ids; at `-100` the results are 0 and have no gradient.
        policy_bias, ref_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Biases of the heads; an entry of `-inf` takes a token out of the distribution.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor of the logits.
        softcap (`float`, *optional*):
            Soft-capping of the logits.
        details (`bool`, *optional*, defaults to `False`):
            Also compute `entropy`, `mean_logits` and `is_top1` of the policy, from the same tiles.
        ref_entropy (`bool`, *optional*, defaults to `False`):
            Also compute the entropy of the reference, from the same tiles.
        gather (`Callable`, *optional*):
            `gather(*weights_and_biases)` returns a context in which sharded parameters are whole (DeepSpeed ZeRO-3).
            It is entered once in the forward and, where the tiles are recomputed, once in the backward.
        kl_gradient (`bool` or `torch.Tensor` of shape `(N,)`, *optional*, defaults to `True`):
            At which positions the KL has a gradient. Elsewhere it is detached, which saves a GEMM.
        compiled (`bool`, *optional*):
            Whether to fuse what is not a GEMM with `torch.compile`; see [`paired_head_statistics`].

    Returns:
        [`PairedHeadStatistics`], all of shape `(N,)`, in float32, or float64 if a hidden state is; fields that were
        not requested are `None`.

    Raises:
        `ValueError`: If shapes, vocabularies, devices or labels do not match, or a setting is out of its range.
    """
    states = [policy_hidden] if ref_hidden is None else [policy_hidden, ref_hidden]
    if any(hidden.dim() != 2 for hidden in states) or labels.dim() != 1:
        raise ValueError(
            "Hidden states must be of shape (N, H) and `labels` of shape (N,), got "
            f"{', '.join(str(tuple(hidden.shape)) for hidden in states)} and {tuple(labels.shape)}. Flatten batch and "
            "positions first."
        )
    if any(len(hidden) != len(labels) for hidden in states):
        raise ValueError(
            "Hidden states and `labels` must have as many positions, got "
            f"{', '.join(str(len(hidden)) for hidden in states)} and {len(labels)}. Take the same positions of all."
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"`softcap` must be a positive, finite number or None (no capping), got {softcap!r}.")
    if not math.isfinite(logit_scale):
        raise ValueError(f"`logit_scale` must be finite, got {logit_scale!r}. 1.0 leaves the logits as they are.")

    mask = labels != IGNORE_INDEX
    if isinstance(kl_gradient, bool):
        kl_gradient = None if kl_gradient else torch.zeros_like(mask)
    elif kl_gradient.shape != mask.shape or kl_gradient.dtype != torch.bool:
        raise ValueError(
            f"`kl_gradient` must be a bool, or a boolean tensor of shape {tuple(mask.shape)}, that of `labels`, got "
            f"one of shape {tuple(kl_gradient.shape)} and {kl_gradient.dtype}."
        )
    ignored, smallest, largest = 0, 0, 0
    if len(labels) > 0:
        scored = labels.masked_fill(~mask, 0)
        ignored, smallest, largest = torch.stack([(~mask).sum(), scored.min(), scored.max()]).tolist()  # one sync
    if smallest < 0:
        raise ValueError(f"`labels` holds {smallest}, which is neither a token id nor {IGNORE_INDEX} (ignored).")
    if ignored:
        policy_hidden, labels = policy_hidden[mask], labels[mask]
        ref_hidden = None if ref_hidden is None else ref_hidden[mask]
        kl_gradient = None if kl_gradient is None else kl_gradient[mask]
    settings = _Settings(
        float(logit_scale),
        softcap,
        details,
        ref_entropy,
        gather or _no_gather,
        _tiles,
        largest,
        kl_gradient,
        compiled,
    )
    values = _PairedHead.apply(
        policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, settings
    )
    if ref_hidden is not None and kl_gradient is not None:
        values = (*values[:2], torch.where(kl_gradient, values[2], values[2].detach()), *values[3:])
    if ignored:
        # `masked_scatter` keeps an all-ignored batch connected to the model, with a gradient of zero.
        values = [None if v is None else v.new_zeros(mask.shape).masked_scatter(mask, v) for v in values]
    return PairedHeadStatistics(*values)


def _no_gather(*parameters):
    return contextlib.nullcontext()


class _Settings(NamedTuple):
    logit_scale: float
    softcap: float | None
    details: bool
    ref_entropy: bool
    gather: object
    tiles: tuple[int, int] | None
    largest_label: int
    kl_rows: torch.Tensor | None  # positions whose KL has a gradient; all, if None
    compiled: bool | None


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply these hidden states."""
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _tile_sizes(num_tokens: int, vocab: int, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_BYTES_ACCELERATOR)
    rows = max(1, min(num_tokens, _TOKEN_TILE.get(device.type, _TOKEN_TILE_ACCELERATOR)))
    columns = budget // (_LIVE_TILES * rows * dtype.itemsize)
    return rows, max(1, min(vocab, max(128, columns // 128 * 128)))


class _Heads:
    """The heads of both models, or the policy's alone, which yield their logits tile by tile."""

    def __init__(self, policy, reference, dtypes, settings: _Settings):
        (self.policy_hidden, self.policy_weight, self.policy_bias) = policy
        (self.ref_hidden, self.ref_weight, self.ref_bias) = reference
        self.policy_dtype, self.ref_dtype = dtypes
        self.settings = settings
        self.is_paired = self.ref_hidden is not None
        double = torch.float64 in (self.policy_hidden.dtype, self.ref_dtype)
        self.dtype = torch.float64 if double else torch.float32  # of logits, statistics and accumulators
        self.num_tokens, self.vocab = len(self.policy_hidden), len(self.policy_weight)
        self.compiled = is_compiled(self.policy_hidden.device, settings.compiled)
        self.shared = (
            self.is_paired
            and self.policy_dtype == self.ref_dtype
            and _same_tensor(self.policy_weight, self.ref_weight)
            and _same_tensor(self.policy_bias, self.ref_bias)
        )
        rows, columns = settings.tiles or _tile_sizes(
            self.num_tokens, self.vocab, self.policy_hidden.device, self.dtype
        )
        self.tile_rows = rows
        self.rows = self.tiles_of(0, self.num_tokens)
        self.columns = [slice(i, min(i + columns, self.vocab)) for i in range(0, self.vocab, columns)]

    def tiles_of(self, start: int, end: int) -> list[slice]:
        return [slice(i, min(i + self.tile_rows, end)) for i in range(start, end, self.tile_rows)]

    def check(self) -> None:
        for name, hidden, weight, bias in (
            ("policy", self.policy_hidden, self.policy_weight, self.policy_bias),
            ("ref", self.ref_hidden, self.ref_weight, self.ref_bias),
        ):
            if hidden is None:
                continue
            if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.is_floating_point():
                raise ValueError(
                    f"`{name}_weight` must be a floating-point tensor of shape (V, {hidden.shape[1]}), that of "
                    f"`{name}_hidden` being {tuple(hidden.shape)}, got {tuple(weight.shape)} of {weight.dtype}. A "
                    "sharded weight must be gathered, a quantized one dequantized."
                )
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"`{name}_bias` must be of shape ({len(weight)},), got {tuple(bias.shape)}, for `{name}_weight` "
                    f"of shape {tuple(weight.shape)}."
                )
        if self.is_paired and len(self.ref_weight) != self.vocab:
            raise ValueError(
                f"`policy_weight` has {self.vocab} vocabulary rows and `ref_weight` {len(self.ref_weight)}: the KL "
                "divergence between distributions over different vocabularies is undefined. Use a reference with the "
                "policy's vocabulary."
            )
        if self.settings.largest_label >= self.vocab:
            raise ValueError(
                f"`labels` holds {self.settings.largest_label}, but the heads have {self.vocab} vocabulary rows."
            )

    def operand(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`tensor` rounded to the compute dtype, in the dtype that the GEMM takes."""
        tensor = tensor.to(dtype)
        # Only cuBLAS multiplies half precision into single; elsewhere the product would be rounded to half.
        return tensor if self._mixed(tensor) else tensor.to(self.dtype)

    def _mixed(self, tensor: torch.Tensor) -> bool:
        half = tensor.device.type == "cuda" and tensor.dtype.itemsize == 2
        return _MIXED_GEMM and half and self.dtype == torch.float32

    def mm(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`a @ b` in the accumulators' dtype."""
        return torch.mm(a, b, out_dtype=self.dtype) if self._mixed(a) else torch.mm(a, b)

    def mm_add(self, accumulator: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """`accumulator += a @ b`."""
        if self._mixed(a):
            torch.addmm(accumulator, a, b, out_dtype=self.dtype, out=accumulator)
        else:
            accumulator.addmm_(a, b)

    def read(self, columns: slice, reference: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One vocabulary tile of both weights in the dtype of the GEMM; the same tensor twice if they are shared."""
        policy = self.operand(self.policy_weight[columns], self.policy_dtype)
        reference = reference and self.is_paired
        if self.shared or not reference:
            return policy, policy if reference else None
        return policy, self.operand(self.ref_weight[columns], self.ref_dtype)

    def logits(self, rows: slice, columns: slice, weights) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One tile of both models' logits; `None` for the reference if its weight was not read."""
        policy_weight, ref_weight = weights
        hidden = self.operand(self.policy_hidden[rows], self.policy_dtype)
        if ref_weight is None:
            return self._transform(self.mm(hidden, policy_weight.t()), self.policy_bias, columns), None
        ref_hidden = self.operand(self.ref_hidden[rows], self.ref_dtype)
        # One GEMM per model, even with a shared weight: a GEMM of twice the rows sums some of them in another order,
        # but equal hidden states must give bitwise equal logits. The weight's tile has been read and cast already, and
        # is in the cache.
        return (
            self._transform(self.mm(hidden, policy_weight.t()), self.policy_bias, columns),
            self._transform(self.mm(ref_hidden, ref_weight.t()), self.ref_bias, columns),
        )

    def _transform(self, z: torch.Tensor, bias: torch.Tensor | None, columns: slice) -> torch.Tensor:
        if bias is not None:
            z.add_(bias[columns].to(z.dtype))
        if self.settings.logit_scale != 1.0:
            z.mul_(self.settings.logit_scale)
        if self.settings.softcap is not None:
            z.div_(self.settings.softcap).tanh_().mul_(self.settings.softcap)
        return z


def _same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.numel() > 0
    return a is b or (same_memory and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device)


class _Running:
    """Statistics of the vocabulary tiles seen so far, for some rows."""

    def __init__(self, heads: "_Heads", rows: slice, may_be_masked: bool, means: "_MeanRows | None"):
        self.heads, self.means, self.may_be_masked = heads, means, may_be_masked
        self.sums = new_sums(
            rows.stop - rows.start,
            is_paired=heads.is_paired,
            details=heads.settings.details,
            ref_entropy=heads.settings.ref_entropy,
            may_be_masked=may_be_masked,
            device=heads.policy_hidden.device,
            dtype=heads.dtype,
        )

    def fold(self, zp: torch.Tensor, zq: torch.Tensor | None, labels: torch.Tensor, start: int, weights) -> None:
        """Accumulates one tile of policy logits `zp` and reference logits `zq`, overwriting both."""
        dtypes = (None, None)
        if self.means is not None:
            dtypes = weights[0].dtype, None if self.means.reference is None else weights[0].dtype
        self.sums, policy_scale, ref_scale, p, q = run_tile(
            fold_tile, self.sums, zp, zq, labels - start, dtypes, self.may_be_masked, compiled=self.heads.compiled
        )
        if self.means is not None:
            self.means.rescale(policy_scale, ref_scale)
            self.means.add(p, q, weights[0])

    def finish(self) -> dict[str, torch.Tensor]:
        sums = self.sums
        policy_lse = sums["policy_max"] + sums["policy_sum"].log()
        values = {"policy_logps": sums["policy_label"] - policy_lse, "policy_lse": policy_lse}
        if self.heads.is_paired:
            ref_lse = sums["ref_max"] + sums["ref_sum"].log()
            values |= {"ref_logps": sums["ref_label"] - ref_lse, "ref_lse": ref_lse, "kl": self._kl()}
        if self.heads.settings.details:
            values["entropy"] = sums["policy_sum"].log() - sums["policy_entropy_sum"] / sums["policy_sum"]
            values["mean_logits"] = sums["logit_sum"] / self.heads.vocab
            values["is_top1"] = sums["policy_label"] >= sums["policy_max"]
        if self.heads.settings.ref_entropy:
            values["ref_entropy"] = sums["ref_sum"].log() - sums["ref_entropy_sum"] / sums["ref_sum"]
        if self.means is not None:
            self.means.finish(sums["policy_sum"], sums.get("ref_sum"))
        return values

    def _kl(self) -> torch.Tensor:
        sums = self.sums
        ratio = sums["ratio_sum"] / sums["ref_sum"]
        # False for NaN, of 0 * inf, too.
        close = (ratio > -0.9) & (ratio < 1e4)
        if "only_policy" in sums:
            close &= ~sums["only_policy"]  # which is in the policy's normalizer and not under E_q
        log_ratio = torch.where(close, ratio.log1p(), (sums["policy_sum"] / sums["ref_sum"]).log())
        kl = (sums["x_sum"] / sums["ref_sum"] + log_ratio).clamp(min=0.0)
        return kl.masked_fill(sums["only_reference"], math.inf) if "only_reference" in sums else kl


class _MeanRows:
    """
    E_p[w] and E_q[w] of some positions, (rows, H): the mean rows of the policy's head under both models, without logit
    scale. E_q[w] only where the KL has a gradient.
    """

    def __init__(self, heads: "_Heads", policy: torch.Tensor, reference: torch.Tensor | None):
        self.heads, self.policy, self.reference = heads, policy, reference

    def rescale(self, policy_scale: torch.Tensor, ref_scale: torch.Tensor | None) -> None:
        for total, scale in ((self.policy, policy_scale), (self.reference, ref_scale)):
            # On an accelerator the check would cost more than the multiplication.
            if total is not None and scale is not None and (scale.device.type != "cpu" or (scale != 1).any()):
                total *= scale[:, None]

    def add(self, p: torch.Tensor, q: torch.Tensor | None, weight: torch.Tensor) -> None:
        self.heads.mm_add(self.policy, p, weight)
        if self.reference is not None:
            self.heads.mm_add(self.reference, q, weight)

    def finish(self, policy_sum: torch.Tensor, ref_sum: torch.Tensor | None) -> None:
        self.policy /= policy_sum[:, None]
        if self.reference is not None and ref_sum is not None:
            self.reference /= ref_sum[:, None]


class _PairedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, settings):
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        is_paired = ref_hidden is not None
        ctx.dtypes = _compute_dtype(policy_hidden), _compute_dtype(ref_hidden if is_paired else policy_hidden)
        policy, reference = (policy_hidden, policy_weight, policy_bias), (ref_hidden, ref_weight, ref_bias)
        device = policy_hidden.device
        # The dtypes of the GEMMs are chosen here, because autocast would round their results.
        with (
            settings.gather(policy_weight, policy_bias, ref_weight, ref_bias),
            torch.autocast(device.type, enabled=False),
        ):
            heads = _Heads(policy, reference, ctx.dtypes, settings)
            heads.check()
            # Only a bias of -inf can take a token out of the vocabulary, and soft-capping makes it finite again.
            masked = (policy_bias is not None or ref_bias is not None) and settings.softcap is None
            # With a frozen head the gradient accumulates in the forward. Soft-capping would need the slope of each
            # logit.
            needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
            ctx.accumulated = needs_hidden and not needs_weight and not needs_bias and settings.softcap is None
            policy_rows = ref_rows = None
            if ctx.accumulated:
                policy_rows = torch.zeros(policy_hidden.shape, device=device, dtype=heads.dtype)
                if is_paired and (settings.kl_rows is None or settings.kl_rows.any()):
                    ref_rows = torch.zeros_like(policy_rows)
            running = []
            for rows in heads.rows:
                means = None
                if policy_rows is not None:
                    reached = None
                    if ref_rows is not None and (settings.kl_rows is None or settings.kl_rows[rows].any()):
                        reached = ref_rows[rows]
                    means = _MeanRows(heads, policy_rows[rows], reached)
                running.append(_Running(heads, rows, masked, means))
            # The outer loop is over the vocabulary, so that each tile of the weights is read and cast once.
            for columns in heads.columns:
                weights = heads.read(columns)
                for rows, state in zip(heads.rows, running, strict=True):
                    state.fold(*heads.logits(rows, columns, weights), labels[rows], columns.start, weights)
            parts = [state.finish() for state in running]
            if ctx.accumulated:
                logp_grad, kl_grad = _hidden_gradients(heads, labels, policy_rows, ref_rows)
        names = ["policy_logps", "policy_lse"] + (["ref_logps", "ref_lse", "kl"] if is_paired else [])
        names += ["entropy", "mean_logits", "is_top1"] if settings.details else []
        names += ["ref_entropy"] if settings.ref_entropy else []
        values = {
            name: torch.cat([part[name] for part in parts])
            if parts
            else policy_hidden.new_zeros((0,), dtype=heads.dtype)
            for name in names
        }
        if ctx.accumulated:
            ctx.save_for_backward(logp_grad, kl_grad)
            ctx.hidden_dtype = policy_hidden.dtype
        else:
            ctx.save_for_backward(*policy, *reference, labels, values["policy_lse"], values.get("ref_lse"))
        constants = [values.get(name) for name in ("ref_logps", "entropy", "mean_logits", "is_top1", "ref_entropy")]
        ctx.mark_non_differentiable(*(value for value in constants if value is not None))
        return values["policy_logps"], constants[0], values.get("kl"), *constants[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _, grad_kl, *__):
        if ctx.accumulated:
            grad = None
            for factor, direction in zip((grad_logps, grad_kl), ctx.saved_tensors, strict=True):
                if factor is not None and direction is not None:
                    term = factor.to(direction.dtype)[:, None] * direction
                    grad = term if grad is None else grad.add_(term)
            return None if grad is None else grad.to(ctx.hidden_dtype), *(None,) * 7
        *tensors, labels, policy_lse, ref_lse = ctx.saved_tensors
        policy, reference = tensors[:3], tensors[3:]
        policy_hidden, policy_weight, policy_bias = policy
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_bias = needs_bias and policy_bias is not None
        if (grad_logps is None and grad_kl is None) or not (needs_hidden or needs_weight or needs_bias):
            return (None,) * 8
        settings = ctx.settings
        device = policy_hidden.device
        with settings.gather(policy_weight, policy_bias, *reference[1:]), torch.autocast(device.type, enabled=False):
            heads = _Heads(policy, reference, ctx.dtypes, settings)
            new = {"device": device, "dtype": heads.dtype}
            grad_hidden = torch.zeros(policy_hidden.shape, **new) if needs_hidden else None
            # In the dtype of the weight, because only one tile of it is accumulated at a time.
            grad_weight = torch.zeros_like(policy_weight) if needs_weight else None
            grad_bias = torch.zeros(policy_bias.shape, **new) if needs_bias else None
            # Rows whose KL has no gradient need no reference. With TDPO2 that is the chosen half, which comes first.
            first = last = 0
            if grad_kl is not None:
                reached = grad_kl.nonzero()
                if len(reached) > 0:
                    first, last = reached[[0, -1], 0].tolist()
                    last += 1
            tiles = [(rows, False) for rows in heads.tiles_of(0, first) + heads.tiles_of(last, heads.num_tokens)]
            tiles += [(rows, True) for rows in heads.tiles_of(first, last)]
            for columns in heads.columns if tiles else ():
                weights = heads.read(columns, reference=last > first)
                tile_grad_weight = None
                for rows, reaches_kl in tiles:
                    used = weights if reaches_kl else (weights[0], None)
                    zp, zq = heads.logits(rows, columns, used)
                    grad = run_tile(
                        logit_gradient,
                        zp,
                        zq,
                        labels[rows] - columns.start,
                        policy_lse[rows],
                        ref_lse[rows] if reaches_kl else None,
                        None if grad_logps is None else grad_logps[rows],
                        grad_kl[rows] if reaches_kl else None,
                        settings.softcap,
                        settings.logit_scale,
                        compiled=heads.compiled,
                    )
                    if grad_bias is not None:
                        grad_bias[columns] += grad.sum(0)
                    grad = heads.operand(grad, heads.policy_dtype) if heads._mixed(weights[0]) else grad
                    if grad_hidden is not None:
                        heads.mm_add(grad_hidden[rows], grad, weights[0])
                    if grad_weight is not None:
                        hidden = heads.operand(policy_hidden[rows], heads.policy_dtype)
                        if tile_grad_weight is None:
                            tile_grad_weight = heads.mm(grad.t(), hidden)
                        else:
                            heads.mm_add(tile_grad_weight, grad.t(), hidden)
                if grad_weight is not None and tile_grad_weight is not None:
                    grad_weight[columns] = tile_grad_weight.to(grad_weight.dtype)
        return (
            None if grad_hidden is None else grad_hidden.to(policy_hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(policy_bias.dtype),
            *(None,) * 5,
        )


def _hidden_gradients(heads, labels, policy_rows, ref_rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Gradients of log-probability and KL to the policy's hidden states, (N, H), overwriting the mean rows of the head.
    """
    scale = heads.settings.logit_scale
    kl_grad = None
    if ref_rows is not None:
        kl_grad = torch.sub(policy_rows, ref_rows, out=ref_rows).mul_(scale)
    label_rows = heads.policy_weight[labels].to(heads.policy_dtype)
    return torch.sub(label_rows, policy_rows, out=policy_rows).mul_(scale), kl_grad
