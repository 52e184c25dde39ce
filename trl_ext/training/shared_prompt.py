"""
A micro-batch as one row: every prompt that two sequences share once, and no padding.

Everything that a decoder computes token by token (embedding, projections, MLP, norms, adapters, router, LM head) runs
on the row. Inside the attention function alone, queries, keys and values take the places that they have in the padded
batch, and the model's own attention runs with the model's own mask, so log-probabilities are those of the padded
batch, to the bit on a CPU.

[`pack`] builds the row; [`packed_forward`] is the context of a forward on it; [`unshareable`] says which models must
not be given one. A model that does anything unforeseen with its mask raises.
"""

import contextlib
import contextvars
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

from .._patches import mask_functions_replaced, wrap_attention_functions


# Entries of `layer_types` of a configuration whose layers mix tokens by attention under a mask, and by nothing else.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class NotShareable(RuntimeError):
    """A model whose forward cannot run on a packed row. The message says why."""


# ---- The row -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PackedRows:
    """
    A padded batch of `R` rows of `T` tokens as one row of `L`, and the way back.

    Each sequence of the second half keeps a copy of its prompt's last token, from which its first response token is
    predicted, so the LM head and the labels need no change.

    Args:
        input_ids (`torch.Tensor` of shape `(1, L)`):
            The first half's sequences whole, then of each sequence of the second half what follows the prefix that it
            shares with its partner.
        position_ids (`torch.Tensor` of shape `(1, L)`):
            Each token's place in its padded row.
        labels (`torch.Tensor` of shape `(1, L)`):
            The token where it belongs to a response, else -100; -100 too where a sequence begins.
        copies (`torch.Tensor` of shape `(1, L)`):
            How often the token stands in the padded batch: 2 in a shared prompt, else 1. Given as attention mask:
            masks read it as "no padding", the auxiliary loss of a mixture of experts as weights.
        mask (`torch.Tensor` of shape `(R, T-1)`):
            Predictions of response tokens in the padded batch. In this order the head scores them in either layout.
        expand (`torch.Tensor` of shape `(R, T)`):
            Where each position of the padded batch stands in the row; for padding, anywhere.
        kept (`torch.Tensor` of shape `(L,)`):
            Where each token of the row stands in the flattened padded batch.
        shared (`torch.Tensor` of shape `(S,)`):
            Places in the row of tokens that stand for two.
        omitted (`torch.Tensor` of shape `(S,)`):
            Places in the flattened padded batch of those that they stand for.
        real (`torch.Tensor` of shape `(R, T)`):
            What is not padding.
        begin (`torch.Tensor` of shape `(R,)`):
            Length of the prefix that a sequence takes from its partner.
        by_segments (`bool`):
            Whether causal attention may run segment by segment where that is cheaper.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    copies: torch.Tensor
    mask: torch.Tensor
    expand: torch.Tensor
    kept: torch.Tensor
    shared: torch.Tensor
    omitted: torch.Tensor
    real: torch.Tensor
    begin: torch.Tensor
    by_segments: bool = False

    @property
    def last(self) -> torch.Tensor:
        """Where each sequence's last token stands in the row, `(R,)`."""
        return self.expand.gather(1, self.real.sum(dim=1, keepdim=True) - 1)[:, 0]

    @cached_property
    def segments(self) -> list["Segment"]:
        """What each sequence has in the row, in the row's order."""
        lengths, begins = torch.stack([self.real.sum(dim=1), self.begin]).tolist()
        found: list[Segment] = []
        start = 0
        second = len(lengths) - len(lengths) // 2
        for i, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
            found.append(Segment(start, length - begin, found[i - second].start if begin else 0, begin))
            start += length - begin
        return found

    @cached_property
    def is_cheaper_by_segments(self) -> bool:
        """
        By what attention costs in scores: causal attention computes half of a square, a masked one all of it; a token
        that is gathered, and a call, cost as much as some scores more.
        """
        rows, length = self.expand.shape
        scores = sum(s.length * (s.length / 2 if s.prefix == 0 else s.prefix + s.length) for s in self.segments)
        by_segments = scores + _TOKEN * self.input_ids.size(1) + _CALL * rows
        return by_segments < _SEGMENTS_PAY * (length / 2 + _TOKEN) * rows * length

    @cached_property
    def arranged_as_batch(self) -> "_Arrangement":
        """The row's tokens where the padded batch has them, `(R, T)`."""
        return _Arrangement(self.expand.flatten(), tuple(self.expand.shape), self.kept, self.shared, self.omitted)

    @cached_property
    def arranged_as_keys(self) -> "_Arrangement":
        """All sequences whole, one after the other, without padding, `(1, K)`."""
        place = self.real.flatten().cumsum(dim=0) - 1
        index = self.expand[self.real]
        return _Arrangement(index, (1, len(index)), place[self.kept], self.shared, place[self.omitted])

    @cached_property
    def flash_arguments(self) -> dict:
        """Lengths of queries and keys of each sequence, for one call of flash attention with variable lengths."""
        keys = torch.tensor([0] + [s.prefix + s.length for s in self.segments], device=self.kept.device)
        queries = torch.tensor([0] + [s.length for s in self.segments], device=self.kept.device)
        return {
            "cu_seq_lens_q": queries.cumsum(dim=0, dtype=torch.int32),
            "cu_seq_lens_k": keys.cumsum(dim=0, dtype=torch.int32),
            "max_length_q": max(s.length for s in self.segments),
            "max_length_k": max(s.prefix + s.length for s in self.segments),
        }


class Segment(NamedTuple):
    """
    A sequence's own part of the row, `start` to `start + length`, behind `prefix` tokens that begin at `prefix_start`.
    """

    start: int
    length: int
    prefix_start: int
    prefix: int


class _Arrangement(NamedTuple):
    """Another order of the row's tokens, some of them twice or at padding's place, and the way back."""

    index: torch.Tensor  # of the row, flat
    shape: tuple[int, int]
    kept: torch.Tensor  # where each token of the row stands in it
    shared: torch.Tensor  # places in the row of tokens that stand in it twice
    omitted: torch.Tensor  # where they stand the second time

    def to(self, device: torch.device) -> "_Arrangement":
        return self._replace(**{n: v.to(device) for n, v in self._asdict().items() if isinstance(v, torch.Tensor)})


# Attention by segments is chosen where it costs at most this share of attention on padded places.
_SEGMENTS_PAY = 1.0
# What a token and a sequence cost beside their scores, in scores. Measured on a CPU, forward and backward, with rows of
# 24 to 448 tokens in 9 heads of 64.
_TOKEN, _CALL = 40, 1100


def pack(inputs: dict, by_segments: bool = False) -> PackedRows | None:
    """
    Lays a padded batch out as one row.

    Rows `i` and `R - R // 2 + i` share the longest prefix that both prompts have in common, whatever it is. Of an odd
    number, the row in the middle shares nothing.

    Args:
        inputs (`dict`):
            `input_ids`, `attention_mask` and `completion_mask`, each `(R, T)`.
        by_segments (`bool`, *optional*, defaults to `False`):
            Let causal attention run segment by segment where that is cheaper. It computes the same up to rounding, and
            not to the bit.

    Returns:
        [`PackedRows`], or `None` if padding does not stand on the right, or if nothing would be saved.
    """
    ids, completion = inputs["input_ids"], inputs["completion_mask"].bool()
    real = inputs["attention_mask"].bool()
    rows, length = ids.shape
    half = rows // 2
    at = torch.arange(length, device=ids.device)
    prompt = real & ~completion
    same = (ids[:half] == ids[rows - half :]) & prompt[:half] & prompt[rows - half :]
    # Less one: each side predicts its first response token from its own copy of the prompt's last.
    trunk = (same.long().cumprod(dim=1).sum(dim=1) - 1).clamp(min=0)
    begin = torch.cat([trunk.new_zeros(rows - half), trunk])
    keep = real & (at >= begin[:, None])
    has_holes = (real[:, 1:] > real[:, :-1]).any() | ~real[:, 0].all()
    count, is_unusual = torch.stack([keep.sum(), has_holes]).tolist()  # one of two synchronizations
    if is_unusual or count == rows * length:
        return None
    kept = keep.flatten().nonzero()[:, 0]
    expand = (keep.flatten().cumsum(dim=0) - 1).view(rows, length)
    omitted = real & ~keep  # of the second half only
    expand[rows - half :] = torch.where(omitted[rows - half :], expand[:half], expand[rows - half :])
    omitted = omitted.flatten().nonzero()[:, 0]
    shared = expand.flatten()[omitted]
    labels = ids.masked_fill(~completion | (at == begin[:, None]), -100)
    copies = torch.ones_like(kept).index_fill_(0, shared, 2)

    def in_row(values: torch.Tensor) -> torch.Tensor:
        return values.flatten()[kept][None]

    return PackedRows(
        input_ids=in_row(ids),
        position_ids=in_row(at.expand(rows, length)),
        labels=in_row(labels),
        copies=copies[None],
        mask=completion[:, 1:],
        expand=expand,
        kept=kept,
        shared=shared,
        omitted=omitted,
        real=real,
        begin=begin,
        by_segments=by_segments,
    )


# ---- Attention -----------------------------------------------------------------------------------------------------


class _Arrange(torch.autograd.Function):
    """
    `(1, H, L, D)` of the row to `(R, H, T, D)` of an [`_Arrangement`].

    Its backward adds a shared token's two gradients in a fixed order. That of `index_select` adds atomically on CUDA,
    and resumed runs would no longer be bit-identical.
    """

    @staticmethod
    def forward(ctx, states, arrangement: _Arrangement):
        ctx.arrangement = arrangement
        by_token = states[0].transpose(0, 1).index_select(0, arrangement.index)
        return by_token.view(*arrangement.shape, *by_token.shape[1:]).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        _, _, kept, shared, omitted = ctx.arrangement
        by_token = gradient.transpose(1, 2).flatten(0, 1)
        row = by_token.index_select(0, kept)
        row.index_copy_(0, shared, row.index_select(0, shared) + by_token.index_select(0, omitted))
        return row.transpose(0, 1)[None], None


class _Collect(torch.autograd.Function):
    """`(R, T, H, D)` of the padded batch to `(1, L, H, D)` of the row."""

    @staticmethod
    def forward(ctx, output, kept):
        ctx.save_for_backward(kept)
        ctx.shape = output.shape
        return output.flatten(0, 1).index_select(0, kept)[None]

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        by_token = gradient.new_zeros(ctx.shape).flatten(0, 1)
        return by_token.index_copy_(0, kept, gradient[0]).view(ctx.shape), None


class PackedMask:
    """
    What the layers of a model are given as attention mask in a forward on a packed row.

    It says all that an attention function needs, so that gradient checkpointing can run a layer again when the forward
    is over. It is not a tensor: code that calculates with the mask fails instead of computing something else.

    Args:
        rows ([`PackedRows`]):
            The row.
        padded (`torch.Tensor`, *optional*):
            The model's mask of the padded batch without padding, which stands on the right, where a causal mask hides
            it.
        kernel (`Callable`):
            How to attend: [`_attend_padded`], [`_attend_by_segments`] or [`_attend_varlen`].
    """

    __slots__ = ("rows", "padded", "kernel")
    __hash__ = object.__hash__

    def __init__(self, rows: PackedRows, padded: torch.Tensor | None = None, kernel: Callable | None = None):
        self.rows, self.padded, self.kernel = rows, padded, kernel or _attend_padded

    def _refuse(self, *args):
        raise TypeError("This model calculates with its attention mask, which a packed row does not have.")

    __eq__ = __ne__ = __bool__ = __len__ = __iter__ = __getitem__ = _refuse


def _attend_padded(attend: Callable, packed: PackedMask, query, key, value):
    """On the padded batch, with the model's own mask: to the bit what the padded batch gives."""
    arrangement = packed.rows.arranged_as_batch.to(query.device)
    query, key, value = (_Arrange.apply(states, arrangement) for states in (query, key, value))
    padded = None if packed.padded is None else packed.padded.to(query.device)
    output, weights = attend(query, key, value, padded)
    if output.shape[:2] != arrangement.shape:
        raise NotShareable(f"its attention returns the shape {tuple(output.shape)}")
    return _Collect.apply(output, arrangement.kept), weights


def _attend_by_segments(attend: Callable, packed: PackedMask, query, key, value):
    """
    For causal attention: each sequence's own queries against its prefix and itself. No score is computed twice, and
    none of padding.
    """
    outputs = []
    for segment in packed.rows.segments:
        own = slice(segment.start, segment.start + segment.length)
        keys, values, mask = key[:, :, own], value[:, :, own], None
        if segment.prefix:
            prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix)
            keys = torch.cat([key[:, :, prefix], keys], dim=2)
            values = torch.cat([value[:, :, prefix], values], dim=2)
            shape = (1, 1, segment.length, segment.prefix + segment.length)
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(segment.prefix)
        outputs.append(attend(query[:, :, own], keys, values, mask)[0])
    return torch.cat(outputs, dim=1), None


def _attend_varlen(attend: Callable, packed: PackedMask, query, key, value):
    """
    One call of flash attention: queries stay in the row, each sequence's keys are its prefix and itself. Where there
    are fewer queries than keys, flash attention's causal mask is aligned at the lower right, as it has to be; so are
    its windows.
    """
    arrangement = packed.rows.arranged_as_keys.to(query.device)
    key, value = (_Arrange.apply(states, arrangement) for states in (key, value))
    lengths = packed.rows.flash_arguments
    lengths = {name: v.to(query.device) if isinstance(v, torch.Tensor) else v for name, v in lengths.items()}
    return attend(query, key, value, None, **lengths)


def _attend(attention: Callable, packed: PackedMask, module, query, key, value, args, kwargs):
    kwargs.pop("position_ids", None)  # those of the row; only flash attention reads them, to find packed sequences
    for name, argument in kwargs.items():
        if isinstance(argument, torch.Tensor) and argument.dim() > 1:
            raise NotShareable(f"its attention takes the tensor `{name}`, which may belong to tokens")

    def attend(query, key, value, mask, **more):
        return attention(module, query, key, value, mask, *args, **{**kwargs, **more})

    return packed.kernel(attend, packed, query, key, value)


# Attention function -> the one that also takes a `PackedMask`; kept, so that a function stays the same object.
_WRAPPED: dict[Callable, Callable] = {}


def _with_rows(attention: Callable) -> Callable:
    """An attention function that also takes a [`PackedMask`]; with any other mask it is what it was."""
    if torch.compiler.is_compiling():
        return attention  # compiled models are not given packed rows
    if attention not in _WRAPPED:
        _WRAPPED[attention] = _wrap(attention)
    return _WRAPPED[attention]


def _wrap(attention: Callable) -> Callable:

    @functools.wraps(attention)
    def attend(module, query, key, value, attention_mask, *args, **kwargs):
        if isinstance(attention_mask, PackedMask):
            return _attend(attention, attention_mask, module, query, key, value, args, kwargs)
        if _CURRENT.get() is not None:
            raise NotShareable("it has attention without the model's mask")
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


# ---- The forward ---------------------------------------------------------------------------------------------------


@dataclass
class _Forward:
    """A forward on a packed row that is under way."""

    rows: PackedRows
    made_mask: bool = False


_CURRENT: contextvars.ContextVar[_Forward | None] = contextvars.ContextVar("trl_ext_packed_forward", default=None)


def _is_the_same_for_every_row(mask_function: Callable) -> bool:
    """Whether a mask function is the causal one, perhaps with a window or chunks."""
    causal = masking_utils.causal_mask_function
    if mask_function is causal:
        return True
    if not _is_made_by(mask_function, masking_utils.and_masks):
        return False
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    overlays = (masking_utils.sliding_window_overlay, masking_utils.chunked_overlay)
    return causal in parts and all(
        part is causal or any(_is_made_by(part, overlay) for overlay in overlays) for part in parts
    )


def _is_made_by(function: Callable, maker: Callable) -> bool:
    return function.__module__ == maker.__module__ and function.__qualname__.startswith(f"{maker.__qualname__}.")


def _with_packed_mask(make: Callable) -> Callable:
    """A mask function of a registry that makes a [`PackedMask`]."""

    def make_packed(*args, **kwargs):
        forward = _CURRENT.get()
        if forward is None:  # another thread's
            return make(*args, **kwargs)
        rows = forward.rows
        shape = kwargs.get("batch_size"), kwargs.get("q_length"), kwargs.get("kv_length")
        if args or shape != (1, *rows.input_ids.shape[1:] * 2):
            raise NotShareable(f"it makes a mask of another shape, {shape}")
        if kwargs.get("use_vmap") or not _is_the_same_for_every_row(kwargs["mask_function"]):
            raise NotShareable("it adds to the causal mask")
        length = rows.expand.size(1)
        padded = make(**{**kwargs, "q_length": length, "kv_length": length, "attention_mask": None})
        forward.made_mask = True
        return PackedMask(rows, padded, _kernel(make, kwargs, rows, padded))

    return make_packed


def _kernel(make: Callable, kwargs: dict, rows: PackedRows, padded: torch.Tensor | None) -> Callable:
    """How the layers that get this mask attend."""
    implementation = kwargs["config"]._attn_implementation
    if make is masking_utils.flash_attention_mask and "4" not in implementation:
        if flash_attn_supports_top_left_mask():
            raise NotShareable("this flash attention aligns its causal mask at the upper left")
        return _attend_varlen
    is_causal = make is masking_utils.sdpa_mask and padded is None
    if rows.by_segments and is_causal and rows.is_cheaper_by_segments:
        return _attend_by_segments
    return _attend_padded


@contextlib.contextmanager
def packed_forward(rows: PackedRows) -> Iterator[None]:
    """
    Context of one forward with the `input_ids`, `position_ids` and `copies`, as attention mask, of `rows`. Its
    backward may run outside.

    Raises:
        [`NotShareable`]: If the model's mask is not a causal one, or if it makes none.
    """
    wrap_attention_functions(_with_rows)
    forward = _Forward(rows)
    token = _CURRENT.set(forward)
    try:
        with mask_functions_replaced(_with_packed_mask):
            yield
        if not forward.made_mask:
            raise NotShareable("it makes no attention mask")
    finally:
        _CURRENT.reset(token)


# ---- Which models --------------------------------------------------------------------------------------------------


def unshareable(model: PreTrainedModel) -> str | None:
    """
    Why `model` must not be given packed rows, or `None` if nothing is known against it.

    State-space, linear-attention, convolutional and recurrent layers mix tokens by other means than attention under a
    mask, and would silently compute something else. Either of the two checks misses some of them.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._is_stateful:
            return f"`{type(module).__name__}` carries a state from token to token"
    for config in _configs(model.config):
        other = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
        if other:
            return f"it has layers of the types {', '.join(other)}"
        if getattr(config, "alibi", False):
            return "ALiBi reads distances from the attention mask"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"the forward of `{type(model).__name__}` takes no `position_ids`"
    return None


def _configs(config) -> Iterator:
    yield config
    for name in getattr(config, "sub_configs", {}):
        nested = getattr(config, name, None)
        if nested is not None and "vision" not in name and "audio" not in name:
            yield from _configs(nested)


# Largest mean difference between the layouts, in nats a token, that rounding explains: fp32, and half precision.
_LIMIT, _LIMIT_OF_HALF = 1e-4, 5e-2

# What is compared, and its unit.
_LOG_PROBS = ("log-probabilities", "nats a token")


class SharedPrompts:
    """
    Decides, model by model, whether batches run as packed rows.

    A model is given packed rows only once both layouts have given the same log-probabilities on a batch of the run
    ([`~SharedPrompts.check`]); until then, and where they have not, it runs on padded rows, with the same result.

    Args:
        refusal (`str`, *optional*):
            Why prompts must not be shared at all.
        is_required (`bool`, *optional*, defaults to `False`):
            Raise instead of falling back.
        agree (`Callable`, *optional*):
            Of what every process gives, a reason or `None`, returns a reason on all of them if any has one.
        report (`Callable`, *optional*):
            Called with one sentence where prompts are not shared.
        by_segments (`bool`, *optional*, defaults to `False`):
            As for [`pack`].

    Raises:
        `ValueError`: If sharing is required and refused.
    """

    def __init__(
        self,
        refusal: str | None = None,
        *,
        is_required: bool = False,
        agree: Callable[[str | None], str | None] = lambda reason: reason,
        report: Callable[[str], object] = lambda message: None,
        by_segments: bool = False,
    ):
        self._by_segments = by_segments
        self._is_required, self._agree, self._report = is_required, agree, report
        self._is_refused = refusal is not None
        self._shares: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
        if refusal is not None:
            self._refuse(refusal)

    def _refuse(self, reason: str) -> None:
        if self._is_required:
            raise ValueError(
                f"`share_prompts=True` cannot be honored: {reason}. Leave `share_prompts` at None, and every prompt "
                "is computed once a response, as in TRL."
            )
        self._report(f"Prompts are not shared between the responses of a pair: {reason}.")

    def rows(self, model: torch.nn.Module, inputs: dict) -> PackedRows | None:
        """
        The batch as one row for `model`, the base model itself; `None` if it runs on padded rows.
        """
        return pack(inputs, self._by_segments) if self._shares.get(model, False) else None

    def require(self, model: torch.nn.Module, inputs: dict, run: Callable[[PackedRows | None], torch.Tensor]) -> None:
        """
        Where sharing is required, raises `ValueError` at once if `model` cannot. The first batch of the run is compared
        all the same. The arguments are those of [`~SharedPrompts.check`].
        """
        if self._is_required:
            reason = self._reason(model, inputs, run, None, _LOG_PROBS)
            if reason is not None:
                self._refuse(reason)

    def is_decided(self, model: torch.nn.Module) -> bool:
        """Whether `model` needs no check any more."""
        return self._is_refused or model in self._shares

    def check(
        self,
        model: torch.nn.Module,
        inputs: dict,
        run: Callable[[PackedRows | None], torch.Tensor],
        refusal: str | None = None,
        compared: tuple[str, str] = _LOG_PROBS,
    ) -> None:
        """
        Compares both layouts on a batch, the first time it is called for `model`. Every process must call it.

        Args:
            model (`torch.nn.Module`):
                The base model itself, without what wraps it.
            inputs (`dict`):
                The batch.
            run (`Callable`):
                Runs the model, in evaluation mode and without gradient, on the packed rows it is given or else on
                `inputs`, and returns what is compared: the log-probabilities of the responses' tokens, or other
                numbers of that size.
            refusal (`str`, *optional*):
                Why this model must not be given packed rows, if the caller knows.
            compared (`tuple[str, str]`, *optional*):
                What `run` returns, and its unit, for the report.
        """
        if self.is_decided(model):
            return
        reason = self._reason(model, inputs, run, refusal, compared)
        self._shares[model] = reason is None
        if reason is not None:
            self._refuse(reason)

    def _reason(self, model, inputs, run, refusal, compared) -> str | None:
        """
        Why `model` runs on padded rows. All processes run it twice, or none does: what wraps it communicates in every
        forward (DDP its buffers, FSDP its weights), and a process that skips one would leave the others waiting.
        """
        rows = pack(inputs, self._by_segments)
        if refusal is None and rows is None and not _is_padded_right(inputs):
            refusal = "padding does not stand on the right"
        with _errors_of(model) as failed:
            refusal = refusal or unshareable(model)
        refusal = self._agree(refusal or failed.reason)
        if refusal is not None:
            return refusal
        with _errors_of(model) as failed:
            packed = run(rows)
        if failed.reason is None:
            failed.reason = self._difference(model, run(None), packed, compared)
        else:
            with _errors_of(model):
                run(None)
        return self._agree(failed.reason)

    @staticmethod
    def _difference(model, padded: torch.Tensor, packed: torch.Tensor, compared: tuple[str, str]) -> str | None:
        difference = torch.where(padded.isnan() & packed.isnan(), 0, (padded - packed).abs())
        mean = difference.sum().item() / max(1, difference.numel())
        is_half = torch.is_autocast_enabled(padded.device.type) or any(
            parameter.element_size() < 4 for parameter in model.parameters()
        )
        if mean <= (_LIMIT_OF_HALF if is_half else _LIMIT):
            return None
        return (
            f"on the first batch the {compared[0]} of `{type(model).__name__}` differ from those of padded rows by "
            f"{mean:.3g} {compared[1]}"
        )


@dataclass
class _Failure:
    reason: str | None = None


@contextlib.contextmanager
def _errors_of(model) -> Iterator[_Failure]:
    """Takes whatever an architecture, or another transformers, raises over packed rows for a reason against them."""
    failure = _Failure()
    try:
        yield failure
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure.reason = f"`{type(model).__name__}` cannot run on packed rows ({type(error).__name__}: {error})"


def _is_padded_right(inputs: dict) -> bool:
    mask = inputs["attention_mask"].bool()
    return not bool((mask[:, 1:] > mask[:, :-1]).any())
