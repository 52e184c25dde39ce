"""
One head for every score: statistics of next-token predictions under one model, or under a policy and its reference,
without logits.

[`add_scoring_head`] adds the argument `scoring`, a [`ScoringRequest`], to a model's forward. The head runs inside the
forward, so that DDP, FSDP, DeepSpeed and autocast treat it like any other forward. On every device it runs only on
positions whose label counts.
"""

import contextlib
import functools
import types
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import ModelOutput

from .._trl import (
    CHUNKED_LOGPROB_CHUNK_SIZE,
    ChunkedLogProbFunction,
    HeadSettings,
    fused_head_settings,
    maybe_gather_lm_head_ctx,
)
from ..kernels import head_statistics, paired_head_details
from .sharding import whole


# What `ScoringRequest.outputs` may name beside the log-probability of the label, which is always computed.
OUTPUTS = ("entropy", "mean_logits", "is_top1")


@dataclass
class ScoredTokens(ModelOutput):
    """
    Statistics of every next-token prediction, `(rows, T-1)`, 0 where the label is -100; `None` if not requested.

    The attributes are those of [`~trl_ext.preference.TokenStatistics`]. The model returns nothing else.
    """

    log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    token_kl: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    ref_entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class HeadStates(NamedTuple):
    """
    Hidden states and LM head from which a model's next-token distributions at `N` positions are computed.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Last hidden states, each at the position that predicts the label.
        weight (`torch.Tensor` of shape `(V, H)`):
            The LM head's weight, adapters included; possibly sharded.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Its bias.
        settings ([`HeadSettings`]):
            Scale and soft-capping of the logits.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    settings: HeadSettings

    def logits(self, positions: slice = slice(None)) -> torch.Tensor:
        """fp32 logits of some positions, `(n, V)`; the product has the precision of the hidden states."""
        hidden = self.hidden[positions].to(self.weight.dtype)
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float() * self.settings.logit_scale
        softcap = self.settings.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class ScoringRequest:
    """
    The statistics that a forward should compute. It is neither a tensor nor a container of tensors, so wrappers of a
    forward (DDP, FSDP, autocast) pass it through unchanged.

    Args:
        outputs (`tuple[str, ...]`, *optional*, defaults to `("entropy", "mean_logits", "is_top1")`):
            Statistics of the model to compute beside the log-probability of each label. With a `reference` all are
            computed.
        reference ([`HeadStates`], *optional*):
            The reference at the same positions: also compute `ref_log_probs` and `token_kl`, KL(reference || policy),
            in the same pass over tiles of both models' logits.
        kl_gradient (`tuple[bool, bool]`, *optional*, defaults to `(True, True)`):
            Whether the KL of the first half of the rows (chosen), and that of the second (rejected), has a gradient.
        mask (`torch.Tensor` of shape `(rows, T-1)`, *optional*):
            Where the forward runs on a packed row ([`~trl_ext.training.shared_prompt.PackedRows`]): which positions of
            the padded batch the scored ones are, in the same order. The statistics then have this shape, and its first
            half of rows is chosen.
        ref_entropy (`bool`, *optional*, defaults to `False`):
            With a `reference`, also compute its entropy.
        keep_states (`bool`, *optional*, defaults to `False`):
            Run the backbone only, and leave its hidden states and the head in `states`; the forward returns nothing.
        backbone_only (`bool`, *optional*, defaults to `False`):
            Run the backbone only and return its output, for a head of one's own. Called by itself, the backbone would
            miss what FSDP2 does at the start and the end of the whole model's forward.
    """

    states: HeadStates | None = None

    def __init__(
        self,
        outputs: tuple[str, ...] = OUTPUTS,
        *,
        reference: HeadStates | None = None,
        kl_gradient: tuple[bool, bool] = (True, True),
        ref_entropy: bool = False,
        keep_states: bool = False,
        backbone_only: bool = False,
        mask: torch.Tensor | None = None,
    ):
        self.outputs, self.reference, self.keep_states = outputs, reference, keep_states
        self.backbone_only = backbone_only
        self.kl_gradient, self.ref_entropy, self.mask = kl_gradient, ref_entropy, mask


def require_linear_head(model) -> None:
    """
    Raises `ValueError` if the logits of `model` are not its LM head's product with its backbone's last hidden states.

    A head of several layers (BERT's dense layer, activation and norm before the projection) has parameters that are
    neither the backbone's nor the projection's. TRL's fused head silently skips these layers, and an adapter on the
    head as well.
    """
    backbone, head = getattr(model, fused_head_settings(model).backbone), model.get_output_embeddings()
    head_parameters(head)
    known = {id(parameter) for module in (backbone, head) for parameter in module.parameters()}
    between = sorted({name for name, parameter in model.named_parameters() if id(parameter) not in known})
    if backbone is model or between:
        which = f"has the layers {', '.join(between[:3])} between" if between else "does not separate"
        raise ValueError(
            f"`model` is a `{type(model).__name__}`, which {which} its backbone and its LM head, so log-probabilities "
            "cannot be computed from hidden states without full logits. Use a decoder whose head is one linear layer."
        )


def add_scoring_head(model, **ignored) -> None:
    """
    Adds the argument `scoring` ([`ScoringRequest`]) to the forward of `model`; without it the forward is unchanged.

    Does nothing if an earlier trainer has added it. Keyword arguments are those of
    [`~trl.trainer.utils.add_fused_lm_head`]; `DPOTrainer` calls this function instead.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch; of a [`~peft.PeftModel`] the base model.

    Raises:
        `ValueError`: If the model's head is not one linear layer ([`require_linear_head`]).
    """
    if hasattr(model, "_scoring_head"):
        return
    require_linear_head(model)
    settings = model._scoring_head = fused_head_settings(model)
    own = vars(model).get("forward")  # hooks of Accelerate, for one

    @functools.wraps(type(model).forward)  # `generate` and the trainer read its signature
    def forward(self, *args, scoring: ScoringRequest | None = None, labels=None, **kwargs):
        if scoring is None:
            if labels is not None:
                kwargs["labels"] = labels
            # Looked up on `self`: in a deep copy this closure is shared, and the model that it was made for is another
            # one.
            return type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        # Backbone and head are looked up at each call: FSDP and PEFT replace them later.
        outputs = getattr(self, settings.backbone)(*args, **{**kwargs, "use_cache": False})
        if scoring.backbone_only:
            return outputs
        weight, bias = head_parameters(self.get_output_embeddings())
        labels = labels[:, 1:].to(weight.device)  # with a `device_map` the backbone may end on another device
        mask = labels != -100
        hidden = outputs.last_hidden_state[:, :-1].to(weight.device)[mask]
        if scoring.keep_states:
            if isinstance(self, FSDPModule):
                # A reference that FSDP2 shards as one group: its whole parameters are freed when this forward ends.
                weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
            scoring.states = HeadStates(hidden.detach(), weight, bias, settings)
            return ModelOutput()
        of_label = labels[mask]
        if scoring.mask is not None:
            mask = scoring.mask.to(weight.device)
        if scoring.reference is None:
            statistics = _score(hidden, weight, bias, of_label, scoring, settings)
        else:
            # The first half of the batch is chosen, the second rejected.
            kl_gradient = torch.tensor(scoring.kl_gradient, device=weight.device)
            kl_gradient = kl_gradient.repeat_interleave(len(mask) // 2)[:, None].expand_as(mask)[mask]
            statistics = _score_both(hidden, weight, bias, of_label, kl_gradient, scoring, settings)
        # `masked_scatter` keeps a batch without a label connected to the model.
        per_token = {
            name: value.new_zeros(mask.shape).masked_scatter(mask, value)
            for name, value in statistics.items()
            if value is not None
        }
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(self, outputs.router_logits, kwargs.get("attention_mask"))
        return ScoredTokens(**per_token, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def scoring_head(model):
    """Applies [`add_scoring_head`] temporarily: on exit `model` has its original forward again."""
    if hasattr(model, "_scoring_head"):
        yield
        return
    own = model.__dict__.get("forward")
    add_scoring_head(model)
    try:
        yield
    finally:
        del model._scoring_head, model.forward
        if own is not None:
            model.forward = own


def head_parameters(head) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Weight and bias that an LM head multiplies with now: those of the active adapter's copy (`modules_to_save`), with
    the rows that the active adapter trains (`trainable_token_indices`), or without any where adapters are switched
    off.

    Raises:
        `ValueError`: For a head whose adapter is not a matrix of its own (LoRA).
    """
    if isinstance(head, ModulesToSaveWrapper):
        name = next(iter(head.active_adapters), None)
        if head.disable_adapters or name not in head.modules_to_save:
            return head_parameters(head.original_module)
        return head_parameters(head.modules_to_save[name])
    if isinstance(head, TrainableTokensWrapper):
        head = head.token_adapter
    if isinstance(head, BaseTunerLayer):
        base = head.get_base_layer()
        if head.disable_adapters or head.merged or not head.active_adapters:
            return head_parameters(base)
        if not isinstance(head, TrainableTokensLayer):
            raise ValueError(
                f"An adapter on the LM head is not supported, got a `{type(head).__name__}`: log-probabilities are "
                "computed from the head's weight and would miss it. Take the head out of `target_modules`; "
                "`modules_to_save` trains it whole. A `ref_model` with such an adapter can be merged into its base "
                "(`merge_and_unload`)."
            )
        weight = whole(base.weight)
        for name in head.active_adapters:
            rows = torch.tensor(head.token_indices[name], device=weight.device)
            weight = weight.index_copy(0, rows, whole(head.trainable_tokens_delta[name]).to(weight))
        return weight, getattr(base, "bias", None)
    return head.weight, getattr(head, "bias", None)


def _score(hidden, weight, bias, labels, request: ScoringRequest, settings: HeadSettings) -> dict:
    weight, bias = whole(weight), whole(bias)
    if hidden.device.type == "cpu":
        # TRL's kernel recomputes the logits in the backward, also of a head that is not trained. On CUDA it runs in
        # Triton, and which is faster there is not measured.
        statistics = head_statistics(
            hidden,
            weight,
            labels,
            bias=bias,
            logit_scale=settings.logit_scale,
            softcap=settings.softcap,
            details=bool(request.outputs),
            gather=maybe_gather_lm_head_ctx,
        )
        return {
            "log_probs": statistics.logps,
            **{name: getattr(statistics, name) for name in OUTPUTS if name in request.outputs},
        }
    with maybe_gather_lm_head_ctx(weight, bias):
        log_probs, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
            hidden,
            weight,
            bias,
            labels,
            1.0,
            CHUNKED_LOGPROB_CHUNK_SIZE,
            settings.softcap,
            settings.logit_scale,
            ("log_probs", *request.outputs),
        )
    return {"log_probs": log_probs, "entropy": entropy, "mean_logits": mean_logits, "is_top1": is_top1}


def _score_both(hidden, weight, bias, labels, kl_gradient, request: ScoringRequest, settings: HeadSettings) -> dict:
    reference = request.reference
    assert reference is not None
    shares_head = weight is reference.weight and bias is reference.bias
    weight, bias = whole(weight), whole(bias)
    ref_weight, ref_bias = (weight, bias) if shares_head else (whole(reference.weight), whole(reference.bias))
    statistics = paired_head_details(
        hidden,
        weight,
        reference.hidden.to(hidden.device),
        ref_weight.to(hidden.device),
        labels,
        policy_bias=bias,
        ref_bias=None if ref_bias is None else ref_bias.to(hidden.device),
        logit_scale=settings.logit_scale,
        softcap=settings.softcap,
        details=True,
        kl_gradient=kl_gradient,
        ref_entropy=request.ref_entropy,
        gather=maybe_gather_lm_head_ctx,  # DeepSpeed ZeRO-3; entered again in a backward that recomputes the tiles
    )
    names = {"policy_logps": "log_probs", "ref_logps": "ref_log_probs", "kl": "token_kl"}
    return {names.get(name, name): value for name, value in statistics._asdict().items()}


def _load_balancing_loss(model, router_logits, attention_mask) -> torch.Tensor:
    """The auxiliary loss of a mixture of experts, as the model's own forward computes it."""
    # The one that every family takes over; imported here, as it brings a whole model along.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or model.num_experts
    return load_balancing_loss_func(router_logits, num_experts, config.num_experts_per_tok, attention_mask)
