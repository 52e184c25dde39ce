"""Configuration that every language-model method shares."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from trl import DPOConfig

from .._checks import NOT_EMPTY, above, at_least, between
from ..training.config import CheckedConfig, HubOptions


@dataclass
class PreferenceConfig(CheckedConfig, HubOptions, DPOConfig):
    r"""
    Configuration class for [`PreferenceTrainer`], and the parent of every method's configuration.

    No option of [`~trl.DPOConfig`] is silently ignored: one that a method cannot honor is refused here, by name, with
    the reason and the remedy (see [`~trl_ext.training.config.CheckedConfig`]). Only the parameters added to
    `DPOConfig` are listed.

    Parameters:
        drop_empty_completions (`bool`, *optional*, defaults to `False`):
            Drop pairs with an empty response and report how many, instead of refusing the dataset.
        log_token_kl (`bool`, *optional*, defaults to `False`):
            Log the exact sequential KL(reference || policy), summed over each response's tokens, as
            `forward_kl/chosen`, `forward_kl/rejected` and `forward_kl/margin`. Costs a few passes over tiles of logits
            and no GEMM. Methods whose loss reads the KL log it in any case.
        reference_cache_dir (`str`, *optional*):
            Folder of the cache that `precompute_ref_log_probs=True` reads from and adds to; `trl_ext/reference_cache`
            in the `datasets` cache (`HF_DATASETS_CACHE`) by default. Runs share it: what one has computed for a
            reference and a pair, all others find. Nothing in it is needed to resume or to use a trained model.
        hub_base_model_id (`str`, *optional*):
            Hub id of the model that training starts from, where it is loaded from a local path. The model card and
            `adapter_config.json` name it in place of the path. An adapter is pushed only if its base is on the Hub.
        share_prompts (`bool`, *optional*):
            Compute each pair's prompt once and no padding, with the same log-probabilities: a micro-batch is one row
            on which everything runs but attention. By default (`None`) wherever that is known to be exact, which a
            comparison on the first batch confirms; elsewhere one line says why not. `True` refuses what `None` leaves
            out; `False` computes TRL's padded rows. TRL's `padding_free=True`, which TRL 1.16 ignores, means `True`.
        attention_by_segments (`bool`, *optional*, defaults to `False`):
            With shared prompts and sdpa attention, let full causal layers attend sequence by sequence in batches where
            that computes clearly fewer scores, such as those with one long pair. Log-probabilities are then equal to
            about 1e-5 instead of to the bit. Refused for mixtures of experts, whose router may choose otherwise.

    Raises:
        `ValueError`: If an option has a value of a wrong type or out of its range, or one that the method cannot
        honor.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "loss_type": "the method has one loss of its own. Use `trl.DPOTrainer` for TRL's loss types",
        "loss_weights": "the method has one loss of its own, so there is nothing to weigh it against",
        "ld_alpha": "length desensitization replaces the log ratio that the method's derivation needs",
        "use_weighting": "WPO weights belong to `trl.DPOTrainer`'s losses",
        "label_smoothing": "TRL reads it in its `robust` and `exo_pair` losses only",
        "discopop_tau": "TRL reads it in its `discopop` loss only",
        "f_divergence_type": "use `FDPOTrainer` with `FDPOConfig(divergence=...)`",
        "f_alpha_divergence_coef": "use `FDPOTrainer` with `FDPOConfig(divergence='alpha', alpha=...)`; note that the "
        "paper's alpha is 1 minus TRL's",
        "length_column_name": "lengths are those of the tokenized pairs",
        "label_names": "batches have no labels beside the tokens",
    }

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("ref_model_mixup_alpha", "sync_ref_model"),
        ("ref_model_sync_steps", "sync_ref_model"),
        ("precompute_ref_batch_size", "precompute_ref_log_probs"),
        ("reference_cache_dir", "precompute_ref_log_probs"),
    )
    _inherited_annotations: ClassVar[dict[str, Any]] = {
        "loss_type": str | list[str],
        "max_length": Annotated[int | None, at_least(1)],
        "truncation_mode": Literal["keep_start", "keep_end"],
        "pad_to_multiple_of": Annotated[int | str | None, at_least(1)],
        "dataset_num_proc": Annotated[int | None, at_least(1)],
        "router_aux_loss_coef": Annotated[float | None, at_least(0)],
        "precompute_ref_batch_size": Annotated[int | None, at_least(1)],
        "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
        "ref_model_mixup_alpha": Annotated[float, between(0, 1)],
        "ref_model_sync_steps": Annotated[int, at_least(1)],
    }

    beta: Annotated[float, above(0)] = field(
        default=0.1,
        metadata={"help": "Strength of the constraint to the reference: a higher beta keeps the policy closer to it."},
    )
    drop_empty_completions: bool = field(
        default=False,
        metadata={"help": "Drop pairs with an empty response and report how many, instead of refusing the dataset."},
    )

    log_token_kl: bool = field(
        default=False,
        metadata={
            "help": "Log the exact sequential KL(reference || policy), summed over each response's tokens, as "
            "`forward_kl/*`."
        },
    )

    reference_cache_dir: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={
            "help": "Folder of the cache that `precompute_ref_log_probs=True` reads from and adds to. Default: "
            "`trl_ext/reference_cache` in the `datasets` cache (`HF_DATASETS_CACHE`)."
        },
    )

    share_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "Compute each pair's prompt once and no padding, with the same log-probabilities. Default: "
            "wherever that is exact. True: refuse to train elsewhere. False: TRL's padded rows."
        },
    )

    attention_by_segments: bool = field(
        default=False,
        metadata={
            "help": "With shared prompts, let full causal layers attend sequence by sequence where that computes "
            "fewer scores. Exact to about 1e-5 instead of to the bit."
        },
    )

    def _check_options(self) -> None:
        padding_free: bool = vars(self)["padding_free"]
        if padding_free and self.share_prompts is False:
            raise ValueError(
                "`padding_free=True` contradicts `share_prompts=False`: without padding, prompts are shared too. Leave "
                "one of them out."
            )
        if self.attention_by_segments and self.share_prompts is False:
            raise ValueError(
                "`attention_by_segments=True` has no effect with `share_prompts=False`, which computes padded rows. "
                "Leave one of them out."
            )
        if padding_free:
            # TRL warns that it ignores its own option; from here on it has one name.
            self.share_prompts, self.padding_free = True, False
        if self.log_token_kl and self.precompute_ref_log_probs:
            raise ValueError(
                "`log_token_kl=True` cannot be combined with `precompute_ref_log_probs=True`: the KL needs the "
                "reference's whole next-token distributions, of which precomputing keeps one number a response. Leave "
                "one of them out."
            )
        if self.activation_offloading and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError(
                "`activation_offloading=True` moves activations from the accelerator to the host, and this run has no "
                "accelerator. Set `activation_offloading=False`."
            )
        multiple = self.pad_to_multiple_of
        if isinstance(multiple, str) and multiple.lower() not in ("auto", "none", "null"):
            if not multiple.isdecimal() or int(multiple) < 1:  # as it comes from the command line
                raise ValueError(
                    f"`pad_to_multiple_of` must be an integer of at least 1, 'auto' or None, got {multiple!r}. The "
                    "default is 'auto'."
                )
