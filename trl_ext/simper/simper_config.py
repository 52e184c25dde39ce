"""Configuration of SimPER."""

from dataclasses import dataclass
from typing import ClassVar

from ..preference import PreferenceConfig


_NO_REFERENCE = "SimPER uses no reference model"


@dataclass
class SimPERConfig(PreferenceConfig):
    r"""
    Configuration class for [`SimPERTrainer`].

    SimPER has no hyperparameter of its own; what is left to choose is the learning rate (the paper uses 3e-7 to 1e-6
    for full fine-tuning of 7B and 8B models with 128 pairs a step). The options of [`~trl.DPOConfig`] that concern the
    reference model or `beta` are refused.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "beta": "SimPER has no beta: the loss is a difference of two inverse perplexities",
        "precompute_ref_log_probs": f"{_NO_REFERENCE}, so there is nothing to precompute",
        "precompute_ref_batch_size": f"{_NO_REFERENCE}, so there is nothing to precompute",
        "reference_cache_dir": f"{_NO_REFERENCE}, so there is nothing to precompute",
        "log_token_kl": f"{_NO_REFERENCE}, so there is nothing to diverge from",
        "sync_ref_model": f"{_NO_REFERENCE}, so there is nothing to synchronize",
        "ref_model_mixup_alpha": f"{_NO_REFERENCE}, so there is nothing to synchronize",
        "ref_model_sync_steps": f"{_NO_REFERENCE}, so there is nothing to synchronize",
    }
