"""
The border to TRL: the only module that imports names which `trl` does not export at its top level.

Everything here is private to TRL or young, so each name has a contract test (`tests/test_contract.py`) that fails with
a sentence when TRL moves, before a user's run does. The supported range is what passes them
(`python tests/versions.py trl-1.15`):

| TRL | contract tests |
| --- | --- |
| 1.16 | pass |
| 1.15 | 15 of 156 fail: no `gradient_checkpointing_kwargs` in `unwrap_model_for_generation`; no kernels without Triton |
"""

import inspect
from typing import NamedTuple

import trl
from packaging.specifiers import SpecifierSet


SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17", prereleases=True)


def check_trl_version(version: str) -> None:
    """
    Raises `ImportError` unless `version` of TRL is one that trl_ext was tested with.

    TRL rewrites parts of its DPO trainer in most minors (10 of the last 17 changed `DPOTrainer._compute_loss`), and an
    override that is no longer called fails silently. Refusing is the safe answer.
    """
    if version not in SUPPORTED_TRL:
        raise ImportError(
            f"trl_ext supports trl{SUPPORTED_TRL}, but trl {version} is installed. Install a supported version with "
            f'`pip install "trl{SUPPORTED_TRL}"`, or a newer trl_ext.'
        )


check_trl_version(trl.__version__)

from trl.data_utils import _tokenize as tokenize  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: E402
from trl.models.utils import (  # noqa: E402
    disable_gradient_checkpointing,
    prepare_deepspeed,
    prepare_fsdp,
    unwrap_model_for_generation,
)
from trl.trainer import utils as _trl_utils  # noqa: E402
from trl.trainer.base_config import _BaseConfig as BaseConfig  # noqa: E402
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    add_fused_lm_head,
    get_comet_experiment_url,
    get_config_model_id,
    get_trackio_space_url,
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
    pad,
)


common_prefix_length = trl.data_utils.common_prefix_length
# Width of a tile of the vocabulary in `ChunkedLogProbFunction`.
CHUNKED_LOGPROB_CHUNK_SIZE = _trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE


def load_vllm_generation() -> type:
    """
    TRL's `VLLMGeneration`, imported where it is needed, as it imports vLLM.

    Raises:
        `ImportError`: If vLLM is not installed.
    """
    from trl.generation import vllm_generation

    if not vllm_generation.is_vllm_available():
        raise ImportError('`use_vllm=True` needs vLLM: `pip install "trl[vllm]"`. Or leave `use_vllm` at False.')
    return vllm_generation.VLLMGeneration


# Private methods and attributes of TRL's and Transformers' trainers that trl_ext overrides or reads, and what for. The
# contract tests hold this list to the code, and each name to the trainers.
TRAINER_INTERNALS = {
    "_buffered_inputs": "the generation window in checkpoints",
    "_calculate_rewards": "rewards of an evaluation over all of its samples",
    "_compute_loss": "DPH-RL adds its term to GRPO's loss",
    "_finish_current_push": "a checkpoint is not written over while it is uploaded",
    "_generate_and_score_completions": "f-DPG replaces the advantages of what it returns",
    "_get_dataloader": "D2PO's loader hands out whole windows",
    "_get_eval_sampler": "evaluation rows keep their order and are counted once; images: batches of one bucket",
    "_get_output_dir": "where a checkpoint is about to be written",
    "_get_per_token_logps_and_entropies": "rehearsed answers are scored as TRL scores samples; f-DPG reads what RLOO computes",
    "_get_train_sampler": "D2PO draws windows of prompts; rollouts draw their epoch's order, in a resumed run too; images: "
    "batches of one bucket",
    "_globalstep_last_logged": "half-filled logging windows in checkpoints",
    "_is_vision_dataset": "rows that are collated with their images, and not prepared before",
    "_load_best_model": "images: the adapter or denoiser of the best checkpoint",
    "_load_optimizer_and_scheduler": "the generation window of a checkpoint",
    "_load_from_checkpoint": "every adapter of a checkpoint; images: the adapter or denoiser",
    "_metrics": "values that TRL's `log` averages",
    "_name": "name of the method on cards and in messages",
    "_paper": "citation of the method on cards",
    "_precompute_ref_logps": "the reference cache takes its place",
    "_prepare_dataset": "checks of rows before and after TRL's tokenization; D2PO's prompts",
    "_prepare_inputs": "batches to the device; D2PO fills a window here",
    "_push_from_checkpoint": "images: what a push of a checkpoint holds",
    "_remove_unused_columns": "the labeler's columns stay; what the collator is given",
    "_run_epoch": "a resumed run whose last checkpoint is complete ends at once",
    "_save": "images: weights as diffusers reads them",
    "_save_checkpoint": "the run's own state in checkpoints",
    "_save_rng_state": "the run's own state in checkpoints, before the file that marks them complete",
    "_set_signature_columns_if_needed": "columns that methods read",
    "_signature_columns": "columns that methods read",
    "_step": "micro-steps, which say where in its generation window a run is",
    "_tag_names": "tags on cards",
    "_tokenizer": "the tokenizer of a tokenizer or processor",
    "_total_loss_scalar": "half-filled logging windows in checkpoints",
    "_tp_size": "tokens are counted once a tensor-parallel group",
    "_tr_loss": "half-filled logging windows in checkpoints",
    "_train_batch_size": "batch size on cards",
}


class HeadSettings(NamedTuple):
    """How a model's logits come from its hidden states, as TRL's fused head reads it from the configuration."""

    backbone: str  # attribute of the model that holds its backbone
    logit_scale: float
    softcap: float | None


def fused_head_settings(model) -> HeadSettings:
    """
    What [`~trl.trainer.add_fused_lm_head`] knows of a model's head: a dozen spellings of a logit scale, soft-capping,
    and where the backbone is. It is asked, rather than copied, so that an architecture that TRL learns is known here.
    """

    class Probe:  # takes the patch in the model's place
        config = model.config

        def forward(self):
            pass

    probe = Probe()
    add_fused_lm_head(probe)
    known = inspect.getclosurevars(vars(probe)["forward"].__func__).nonlocals
    try:
        return HeadSettings(known["backbone_attr"], known["logit_scale"], known["final_logit_softcapping"])
    except KeyError as error:
        raise ImportError(
            f"The fused head of trl {trl.__version__} no longer has {error}, which trl_ext reads. Install a supported "
            f'version with `pip install "trl{SUPPORTED_TRL}"`, or a newer trl_ext.'
        ) from error


__all__ = [
    "SUPPORTED_TRL",
    "CHUNKED_LOGPROB_CHUNK_SIZE",
    "BaseConfig",
    "BaseTrainer",
    "ChunkedDivergenceFunction",
    "ChunkedLogProbFunction",
    "DataCollatorForPreference",
    "TRAINER_INTERNALS",
    "HeadSettings",
    "add_fused_lm_head",
    "check_trl_version",
    "common_prefix_length",
    "disable_gradient_checkpointing",
    "fused_head_settings",
    "get_comet_experiment_url",
    "get_config_model_id",
    "get_trackio_space_url",
    "global_then_local_main_first",
    "load_vllm_generation",
    "maybe_gather_lm_head_ctx",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp",
    "tokenize",
    "unwrap_model_for_generation",
]
