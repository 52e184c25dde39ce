"""
The border to TRL: the only module that imports names which `trl` does not export at its top level.

Everything here is private to TRL or young, so each name has a contract test (`tests/test_contract.py`) that fails with
a sentence when TRL moves, before a user's run does.
"""

import contextlib
import functools
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


@contextlib.contextmanager
@functools.wraps(_trl_utils.use_adapter)
def use_adapter(model, adapter_name):
    """TRL's context of another adapter, or of none, which leaves behind what it found: PEFT unfreezes what it switches to."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with _trl_utils.use_adapter(model, adapter_name):
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


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


class HeadSettings(NamedTuple):
    """How a model's logits come from its hidden states, as TRL's fused head reads it from the configuration."""

    backbone: str  # attribute of the model that holds its backbone
    logit_scale: float
    softcap: float | None


def fused_head_settings(model) -> HeadSettings:
    """
    What [`~trl.trainer.add_fused_lm_head`] knows of a model's head: a dozen spellings of a logit scale, soft-capping, and
    where the backbone is. It is asked, rather than copied, so that an architecture that TRL learns is known here.
    """

    class Probe:  # takes the patch in the model's place
        config = model.config

        def forward(self):
            pass

    probe = Probe()
    add_fused_lm_head(probe)
    known = inspect.getclosurevars(probe.forward.__func__).nonlocals
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
    "tokenize",
    "unwrap_model_for_generation",
    "use_adapter",
]
