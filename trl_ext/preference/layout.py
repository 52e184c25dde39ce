"""Whether a trainer's batches are scored on TRL's padded rows or on one packed row that holds every prompt once."""

from typing import cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

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
        self._prompts = SharedPrompts(
            "`share_prompts=False`" if is_off else self._refusal(args, policy, has_images),
            is_required=bool(args.share_prompts),
            any_process=self._any_process,
            report=logger.info if is_off else logger.warning,
            by_segments=args.attention_by_segments,
        )

    def _refusal(self, args: PreferenceConfig, policy: torch.nn.Module, has_images: bool) -> str | None:
        """Why no batch of this run can be packed."""
        parallelism = getattr(self._accelerator, "parallelism_config", None)
        if args.torch_compile:
            return "`torch_compile=True` was not tested with them"
        if getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False):
            return "context and sequence parallelism split rows by position"
        if has_images:
            return "the training data have images, which a vision-language model ties to rows"
        if is_peft_model(policy) and policy.active_peft_config.is_prompt_learning:
            return "the adapter learns a prompt, which it puts in front of every row"
        return unshareable(self._base(policy))

    def _base(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model itself, without wrappers and adapters."""
        model = self._accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _any_process(self, holds: bool) -> bool:
        flag = torch.tensor([holds], device=self._accelerator.device)
        return bool(self._accelerator.gather(flag).any())

    def check(self, model: torch.nn.Module, inputs: dict) -> None:
        """
        Compares both layouts on `inputs`, without gradient and random numbers, the first time it is called for a
        model. Until then the model runs on padded rows. Every process must call it.
        """
        base = self._base(model)
        if self._prompts.is_decided(base):
            return

        def log_probs(rows: PackedRows | None) -> torch.Tensor:
            return cast(TokenStatistics, score_tokens(model, inputs, ScoringRequest(()), rows=rows)).log_probs

        further = _further_arguments(inputs)
        refusal = f"batches have the further model arguments {', '.join(further)}" if further else None
        with torch.no_grad(), evaluation_mode(model):
            self._prompts.check(base, inputs, log_probs, refusal)

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


def _further_arguments(inputs: dict) -> list[str]:
    """Arguments of the model beside tokens and their mask: images, token types."""
    return sorted(set(inputs) - NON_MODEL_KEYS - {"input_ids", "attention_mask"})


def _has_router(model: torch.nn.Module) -> bool:
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 1) > 1 for name in names)
