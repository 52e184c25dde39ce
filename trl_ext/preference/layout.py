"""Whether a trainer's batches are scored on TRL's padded rows or on one packed row that holds every prompt once."""

from collections.abc import Callable
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model

from ..training.modes import evaluation_mode
from ..training.scoring_head import HeadStates, ScoringRequest
from ..training.shared_prompt import PackedRows, SharedPrompts, unshareable
from .preference_config import PreferenceConfig
from .scoring import NON_MODEL_KEYS, TokenStatistics, score_tokens


logger = get_logger(__name__)


class Layout:
    """
    Scores batches on packed rows where the numbers are those of padded rows, and on padded rows elsewhere; see
    [`~trl_ext.training.shared_prompt`].

    Args:
        args ([`PreferenceConfig`]):
            Configuration; `share_prompts=True` makes every fallback an error.
        policy (`torch.nn.Module`):
            The policy.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the processes, which decide together.
        has_images (`bool`, *optional*, defaults to `False`):
            Whether the training data have images.

    Raises:
        `ValueError`: If `share_prompts=True` cannot be honored, or `attention_by_segments=True` with a mixture of
            experts.
    """

    def __init__(
        self, args: PreferenceConfig, policy: torch.nn.Module, accelerator: Accelerator, has_images: bool = False
    ):
        self._accelerator = accelerator
        is_off = args.share_prompts is False
        if args.attention_by_segments and _has_router(self._base(policy)):
            raise ValueError(
                f"`attention_by_segments=True` is not supported with `{type(self._base(policy)).__name__}`, a mixture "
                "of experts: rounding may have its router choose other experts, which is no rounding any more. Leave "
                "it at False."
            )
        self._reason = "`share_prompts=False`" if is_off else self._refusal(args, policy, has_images)
        self._prompts = SharedPrompts(
            self._reason,
            is_required=bool(args.share_prompts),
            agree=_agree,
            report=logger.info if is_off else logger.warning,
            by_segments=args.attention_by_segments,
        )
        if args.share_prompts and not any(p.is_meta or p.numel() == 0 for p in policy.parameters()):  # ZeRO-3's
            base, inputs = self._base(policy), _made_up_batch(next(policy.parameters()).device)
            with torch.no_grad(), evaluation_mode(policy):
                self._prompts.require(base, inputs, _log_probs_of(policy, inputs))

    def _refusal(self, args: PreferenceConfig, policy: torch.nn.Module, has_images: bool) -> str | None:
        """Why no batch of this run can be packed."""
        parallelism = getattr(self._accelerator, "parallelism_config", None)
        if args.torch_compile:
            return "`torch_compile=True` was not tested with them"
        if getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False):
            return "context and sequence parallelism split rows by position"
        if args.n_gpu > 1:
            return "`torch.nn.DataParallel` splits batches by rows (launch one process a device instead)"
        if has_images:
            return "the training data have images, which a vision-language model ties to rows"
        if is_peft_model(policy) and policy.active_peft_config.is_prompt_learning:
            return "the adapter learns a prompt, which it puts in front of every row"
        return unshareable(self._base(policy))

    def _base(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself, without wrappers and adapters."""
        model = self._accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def check(self, model: torch.nn.Module, inputs: dict) -> None:
        """
        Compares both layouts on `inputs`, without gradient and random numbers, the first time it is called for a
        model. Until then the model runs on padded rows. Every process must call it.
        """
        base = self._base(model)
        if self._prompts.is_decided(base):
            return

        further = _further_arguments(inputs)
        refusal = f"batches have the further model arguments {', '.join(further)}" if further else None
        with torch.no_grad(), evaluation_mode(model):
            self._prompts.check(base, inputs, _log_probs_of(model, inputs), refusal)

    def for_other_models(self) -> SharedPrompts:
        """
        What decides for models beside policy and reference, which score sequences of the same prompts. They run on
        packed rows where that is exact and the run's own models may, and never fail for it.
        """
        report = logger.warning if self._reason is None else logger.debug  # the run's own models have said it
        return SharedPrompts(self._reason, agree=_agree, report=report)

    def score(
        self,
        model: torch.nn.Module,
        inputs: dict,
        request: ScoringRequest | None = None,
        output_router_logits: bool = False,
    ) -> TokenStatistics | HeadStates:
        """[`score_tokens`], in the layout that is right for this model and batch."""
        rows = None if _further_arguments(inputs) else self._prompts.rows(self._base(model), inputs)
        return score_tokens(model, inputs, request, output_router_logits, rows)


def _agree(reason: str | None) -> str | None:
    """The first reason of any process, on all of them; the log is the main process's, whichever has the reason."""
    return next((found for found in gather_object([reason]) if found is not None), None)


def _log_probs_of(model: torch.nn.Module, inputs: dict) -> Callable[[PackedRows | None], torch.Tensor]:
    """What [`SharedPrompts.check`] runs."""

    def log_probs(rows: PackedRows | None) -> torch.Tensor:
        scored = cast(TokenStatistics, score_tokens(model, inputs, ScoringRequest(()), rows=rows))
        return scored.log_probs[scored.mask]

    return log_probs


def _made_up_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Two pairs of different lengths, of tokens that every vocabulary has."""
    lengths = ((5, 3, 4), (2, 6, 1))  # prompt, chosen and rejected response
    shape = (2 * len(lengths), max(prompt + max(responses) for prompt, *responses in lengths))
    inputs = {
        name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (side, pair) in enumerate((side, pair) for side in (1, 2) for pair in range(len(lengths))):
        prompt, end = lengths[pair][0], lengths[pair][0] + lengths[pair][side]
        inputs["input_ids"][row, :prompt] = torch.arange(prompt) + pair + 3
        inputs["input_ids"][row, prompt:end] = torch.arange(end - prompt) + 3 * side
        inputs["attention_mask"][row, :end] = 1
        inputs["completion_mask"][row, prompt:end] = 1
    return {name: value.to(device) for name, value in inputs.items()}


def _further_arguments(inputs: dict) -> list[str]:
    """Arguments of the model beside tokens and their mask: images, token types."""
    return sorted(set(inputs) - NON_MODEL_KEYS - {"input_ids", "attention_mask"})


def _has_router(model: torch.nn.Module) -> bool:
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 1) > 1 for name in names)
