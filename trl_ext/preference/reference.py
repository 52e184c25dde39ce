"""
The reference of a paired method: what it is, how it is scored, and the checks that it is what training starts from.
"""

import contextlib
import gc
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._patches import keep_quantized_weights
from .._trl import (
    disable_gradient_checkpointing,
    fused_head_settings,
    get_config_model_id,
    prepare_deepspeed,
)
from ..training.adapters import reference_adapter, use_reference_adapter
from ..training.fingerprints import reference_fingerprint, reference_state
from ..training.modes import evaluation_mode
from ..training.scoring_head import HeadStates, ScoringRequest
from .layout import Layout
from .method import Method
from .model_checks import follow_memory, usable_reference
from .preference_config import PreferenceConfig
from .scoring import ResponseScores, TokenStatistics, score_tokens


logger = get_logger(__name__)

# Given to `DPOTrainer` in place of a reference model by the methods that need none, so that it builds none.
_NO_REFERENCE = object()

# Largest error of a token's log-probability at the reference, in units of the precision, and its lower bound.
_TOKEN_ERROR, _LEAST_TOKEN_ERROR = 16.0, 5e-4


class Reference:
    """
    The reference of a trainer's policy. It is one of:

    - `"none"`: the method reads nothing of a reference;
    - `"given"`: the model that was passed as `ref_model`;
    - `"loaded"`: a second model, loaded from where the policy came from, with the policy's weights in memory;
    - `"adapter off"`: the policy without its adapter;
    - `"frozen adapter"`: the policy with `ref`, a frozen copy of the adapter that training starts from;
    - `"policy"`: the policy before its first step, whose statistics are precomputed.

    All but `"none"` and `"given"` are what training starts from, so that the log ratios of the first step are zero.
    Whatever would make them something else is refused or handled, and [`~Reference.check_start`] checks it on the
    first batch.

    The reference is always scored in evaluation mode, without gradient.

    A trainer makes its reference before it loads the policy and makes its accelerator, and both may be replaced while
    it prepares them. They are therefore given as functions, like the step.

    Args:
        ref_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Separate reference model.
        method ([`Method`]):
            Says what is read of the reference.
        args ([`PreferenceConfig`]):
            Configuration.
        policy (`Callable`):
            Returns the policy.
        accelerator (`Callable`):
            Returns the [`~accelerate.Accelerator`].
        step (`Callable`, *optional*):
            Returns the number of optimizer steps that the policy has taken. By default it has taken none.
        is_in_memory (`bool`, *optional*, defaults to `True`):
            Whether the policy was given as a model rather than as a name.
        layout (`Callable`, *optional*):
            Returns the [`Layout`] that batches are scored in; padded rows by default.
    """

    def __init__(
        self,
        ref_model: PreTrainedModel | PeftModel | None,
        *,
        method: Method,
        args: PreferenceConfig,
        policy: Callable[[], nn.Module],
        accelerator: Callable[[], Accelerator],
        step: Callable[[], int] = lambda: 0,
        is_in_memory: bool = True,
        layout: Callable[[], Layout | None] = lambda: None,
    ):
        self._get_layout = layout
        self._is_precomputing = False
        self._method = method
        self._args = args
        self._get_policy, self._get_accelerator, self._step = policy, accelerator, step
        self._is_needed, self._is_given, self._is_in_memory = (
            method.needs_reference,
            ref_model is not None,
            is_in_memory,
        )
        # The cache tells references with different adapters apart, so it hashes the model with its adapter.
        self._with_adapter = ref_model if isinstance(ref_model, PeftModel) else None
        self._fingerprint: str | None = None
        self._is_freed = False
        self._start_is_checked = False
        self._engine = None
        self.model = None
        self.config = None
        self._argument = usable_reference(ref_model) if self._is_needed else _NO_REFERENCE

    def take_argument(self):
        """
        Returns what `DPOTrainer` receives as `ref_model`, and drops the attribute so that it does not stay in memory.
        """
        argument, self._argument = self._argument, None
        return argument

    # ---- What it is ------------------------------------------------------------------------------------------------

    @property
    def _policy(self):
        return self._get_policy()

    @property
    def _unwrapped_policy(self):
        return self._accelerator.unwrap_model(self._policy)

    @property
    def _accelerator(self) -> Accelerator:
        return self._get_accelerator()

    @property
    def kind(self) -> str:
        """Which of the references above this one is."""
        if not self._is_needed:
            return "none"
        if self.model is not None or self._is_freed:
            return "given" if self._is_given else "loaded"
        if is_peft_model(self._policy):
            return "adapter off" if self.adapter is None else "frozen adapter"
        return "policy"

    @property
    def adapter(self) -> str | None:
        """The policy's frozen copy `ref` of the adapter that training starts from, if there is one."""
        return reference_adapter(self._unwrapped_policy)

    def attach(self, model) -> None:
        """
        Takes a separate reference model, which `DPOTrainer` assigns when it has loaded it and again when it has
        prepared it for several processes; or `None`, where the reference is the policy's own model.

        Raises:
            `ValueError`: If the vocabularies differ; if the token KL is needed and the logits are scaled otherwise.
        """
        if model is not None and model is self.model:
            return  # prepared in place
        self.model = None if model is _NO_REFERENCE else model
        base = self.model
        if base is not None and is_peft_model(base):
            base = base.get_base_model()
        if not isinstance(base, PreTrainedModel):
            return  # none, or the engine that DeepSpeed makes of it
        self.config = base.config
        self._check_comparable(base)
        if not self._is_given and self._is_in_memory:
            follow_memory(self._policy, base)
        if self._args.precompute_ref_log_probs:
            # Before it is sharded.
            self._fingerprint = self._compute_fingerprint(self._with_adapter or self.model)
        self._with_adapter = None

    def _check_comparable(self, model: PreTrainedModel) -> None:
        policy = self._policy
        policy_size, ref_size = (m.config.get_text_config().vocab_size for m in (policy, model))
        if policy_size != ref_size:
            which, fix = "`ref_model`", "Use a reference with the policy's tokenizer and vocabulary"
            if not self._is_given:
                which = f"the reference, `{get_config_model_id(policy.config)}` as it is on disk,"
                fix = "The policy was resized since: pass `ref_model=copy.deepcopy(model)`"
            raise ValueError(
                f"The vocabulary of {which} has {ref_size} entries, that of the policy {policy_size}: their token "
                f"probabilities cannot be compared. {fix}."
            )
        if self._method.needs_token_kl or self._args.log_token_kl:
            settings, ref_settings = (fused_head_settings(m)[1:] for m in (policy, model))
            if settings != ref_settings:
                raise ValueError(
                    f"The logits of `ref_model` are scaled and soft-capped by {ref_settings}, those of the policy by "
                    f"{settings}: the token KL takes both from one head. Use a reference of the policy's architecture."
                )

    # ---- Scoring ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def context(self):
        """If the policy is its own reference, switches to it: the adapter off, or replaced by its frozen copy."""
        with contextlib.ExitStack() as stack:
            if self.model is None and is_peft_model(self._policy):
                stack.enter_context(use_reference_adapter(self._unwrapped_policy))
            # Modes last: switching adapters does not change them.
            stack.enter_context(evaluation_mode(self._policy if self.model is None else self.model))
            yield

    def score(self, inputs: dict, keep_states: bool = False) -> TokenStatistics | HeadStates:
        """
        Per-token statistics of a batch under the reference.

        Args:
            inputs (`dict`):
                The batch.
            keep_states (`bool`, *optional*, defaults to `False`):
                Return the hidden states and the head instead, for a pass that scores both models.
        """
        model, layout = self._scored_model, self._get_layout()
        outputs = tuple(name for name in self._method.reference_statistics if name == "entropy")
        # Reentrant checkpointing would warn about inputs that need no gradient.
        without_checkpointing = disable_gradient_checkpointing(self._policy, self._args.gradient_checkpointing_kwargs)
        request = ScoringRequest(outputs, keep_states=keep_states)
        with torch.no_grad(), without_checkpointing, self.context():
            if layout is None:
                return score_tokens(model, inputs, request)
            if self._is_precomputing:
                layout.check(model, inputs)
            return layout.score(model, inputs, request)

    @property
    def _scored_model(self):
        return self.model if self.model is not None else self._engine or self._policy

    def check_layout(self, inputs: dict) -> None:
        """[`Layout.check`] of a separate reference; where the policy is its own, the policy's is enough."""
        layout = self._get_layout()
        if layout is not None and self.model is not None:
            layout.check(self.model, inputs)

    @contextlib.contextmanager
    def before_training(self):
        """
        Prepares the reference for scoring before training begins, including under DeepSpeed, which holds the weights.
        """
        if self.model is None and getattr(self._accelerator.state, "deepspeed_plugin", None) is not None:
            self._engine = prepare_deepspeed(self._policy, self._accelerator)
        keep_quantized_weights(self._policy if self.model is None else self.model)
        self._is_precomputing = True
        try:
            yield
        finally:
            self._engine, self._is_precomputing = None, False

    # ---- Precomputed statistics ------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hash of everything about the reference that its statistics depend on; see [`reference_cache`]."""
        if self._fingerprint is None:
            self._fingerprint = self._compute_fingerprint(self._unwrapped_policy)
        return self._fingerprint

    def _compute_fingerprint(self, model) -> str:
        adapter = None
        if is_peft_model(model):
            adapter = self.adapter if model is self._policy else model.active_adapter
        precision = (self._accelerator.mixed_precision, bool(self._args.tf32))
        return reference_fingerprint(model, adapter, precision, self._accelerator)

    def require(self, name: str, count: int) -> None:
        """
        Raises `ValueError` if the reference is no longer there to score `count` pairs of the dataset called `name`.
        """
        step = self._step()
        # The policy that was trained is not the reference, and the cache would keep its values as if it were.
        if self._is_freed or (self.kind == "policy" and step > 0):
            when = "after training has started" if step > 0 else "once the trainer is built"
            raise ValueError(
                f"Reference statistics of the {name} dataset cannot be computed {when}: with "
                f"`precompute_ref_log_probs=True` the reference is not kept, and {count} of its pairs are not in the "
                "cache. Give the dataset as `eval_dataset` to the constructor, or set "
                "`precompute_ref_log_probs=False`."
            )

    def free(self) -> None:
        """Frees a separate reference whose statistics are all precomputed."""
        if self.model is not None:
            models, self.model, self._is_freed = [self.model], None, True
            release(models, self._accelerator)

    def release_memory(self) -> None:
        """
        Releases the last references to a freed reference, once the caller of the trainer's constructor holds none.
        """
        if self._is_freed:
            release([], self._accelerator)

    # ---- What training starts from ---------------------------------------------------------------------------------

    def check_frozen(self) -> None:
        """
        Raises `ValueError` if training would change the reference: if the policy is its own reference and parameters
        outside its adapter are trained.
        """
        if self.kind not in ("adapter off", "frozen adapter"):
            return
        policy = self._unwrapped_policy
        state = reference_state(policy, self.adapter)
        trained = [name for name, parameter in state if getattr(parameter, "requires_grad", False)]
        if not trained:
            return
        bias = getattr(policy.peft_config["default"], "bias", "none")
        if bias != "none":
            which, fix = f"`bias={bias!r}` in the `peft_config`", "Set `bias='none'`"
        else:
            which, fix = "Parameters outside the adapter that require a gradient", "Freeze them"
        raise ValueError(
            f"{which} would change the reference in training: the reference is the policy without its adapter, and "
            "these parameters stay when it is switched off: "
            f"{', '.join(trained[:3])}{', ...' if len(trained) > 3 else ''} ({len(trained)} in all). {fix}, or pass a "
            "separate `ref_model`."
        )

    def check_start(
        self,
        chosen: ResponseScores,
        rejected: ResponseScores,
        score_again: Callable[[], tuple[ResponseScores, ResponseScores]],
    ) -> None:
        """
        Raises `ValueError` on the first batch of a run if its log ratios are not zero, although the reference is what
        training starts from. If they are zero in evaluation mode only, the policy's training forward has noise: that
        is a warning, unless the noise was asked for.

        Every process must call it with every batch of the training.

        Args:
            chosen ([`ResponseScores`]):
                Scores of the batch's preferred responses.
            rejected ([`ResponseScores`]):
                Scores of its other responses.
            score_again (`Callable`):
                Scores the batch again. It is called with the policy in evaluation mode.
        """
        if self._start_is_checked:
            return
        self._start_is_checked = True
        if self.kind in ("none", "given") or self._step() > 0 or chosen.ref_logps is None:
            return
        if is_peft_model(self._policy) and self._policy.active_peft_config.is_prompt_learning:
            # a prompt that is to be learned is random at first, and its reference is the model without a prompt
            return
        if self._excess(chosen, rejected) <= 1:
            return
        with torch.no_grad(), evaluation_mode(self._policy):
            quiet = score_again()
        ratios = torch.cat([side.logratios.detach() for side in quiet]).abs()
        if self._excess(*quiet) <= 1:
            if self._args.disable_dropout and not self._args.neftune_noise_alpha:
                logger.warning(
                    "The policy's forward is noisy in training mode although `disable_dropout=True`: the log ratios "
                    "of the first batch are up to "
                    f"{max(side.logratios.abs().max() for side in (chosen, rejected)):.3g} nats, and zero in "
                    "evaluation mode. Look for dropout, layer drop or router noise in the model's configuration."
                )
            return
        raise ValueError(
            f"Training does not start at its reference ({self._describe()}): the log ratios of the first batch should "
            f"be zero and are up to {ratios.max():.3g} nats. Likely causes: an adapter that is not zero at first or "
            "whose initialization rewrites the base (`init_lora_weights`, `init_weights`); weights that were changed, "
            "merged or resized after the model was loaded or the trainer was built; a model whose forward depends on "
            "more than its weights; statistics of the reference in the batch that another model has computed. If "
            "training should start elsewhere than at the reference, pass the reference as `ref_model`."
        )

    def _excess(self, chosen: ResponseScores, rejected: ResponseScores) -> float:
        """The largest log ratio of all processes, in units of what rounding explains."""
        error = max(_TOKEN_ERROR * self._precision(), _LEAST_TOKEN_ERROR)
        excess = [
            side.logratios.detach().abs() / (error * side.num_tokens.clamp(min=1).sqrt())
            for side in (chosen, rejected)
        ]
        worst = torch.nan_to_num(
            torch.cat(excess).max(), nan=0.0, posinf=0.0
        )  # not finite: another check stops the run
        return self._accelerator.gather(worst.reshape(1)).max().item()

    def _precision(self) -> float:
        """Relative rounding error of the coarsest arithmetic of the two forwards."""
        dtypes = {p.dtype for p in self._policy.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
        dtypes |= {"fp16": {torch.float16}, "bf16": {torch.bfloat16}}.get(self._accelerator.mixed_precision, set())
        return max([torch.finfo(dtype).eps for dtype in dtypes] + [2.0**-10 if self._args.tf32 else 0.0])

    def _describe(self) -> str:
        return {
            "loaded": f"a second model, loaded like the policy from `{get_config_model_id(self._policy.config)}`",
            "adapter off": "the policy without its adapter",
            "frozen adapter": "the policy with a frozen copy of the adapter that training starts from",
            "policy": "the policy itself, before its first step",
        }[self.kind]


def release(models: list, accelerator) -> None:
    """
    Frees prepared models: removes them from the accelerator, breaks reference cycles through patched forwards, and
    empties the CUDA cache. Also empties the list, so that the caller's variable does not keep them alive.
    """
    accelerator._models = [held for held in accelerator._models if not any(held is model for model in models)]
    models.clear()
    gc.collect()
    clear_device_cache()
