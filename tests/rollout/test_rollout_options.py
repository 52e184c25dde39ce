"""Options of TRL's trainers that would do nothing, or something else than they say, in a run that samples."""

import pytest
import sampling
import torch
from peft import AdaLoraConfig, LoraConfig
from sampling import BY_ID


DPH_RL, FDPG = BY_ID["dph_rl"], BY_ID["fdpg"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("vllm_importance_sampling_correction", False),
        ("vllm_importance_sampling_mode", "token_truncate"),
        ("vllm_importance_sampling_clip_max", 2.0),
        ("vllm_importance_sampling_clip_min", 0.5),
        ("use_bias_correction_kl", False),
    ],
)
def test_options_that_need_another(name, value, tmp_path):
    needed = "beta" if name == "use_bias_correction_kl" else "use_vllm=True"
    with pytest.raises(ValueError, match=f"`{name}={value!r}` has no effect unless `{needed}`"):
        DPH_RL.config(**sampling.options_of(DPH_RL, tmp_path, **{name: value}))


@pytest.mark.parametrize("name, value", [("prediction_loss_only", True), ("eval_do_concat_batches", False)])
@pytest.mark.parametrize("method", [DPH_RL, FDPG], ids=lambda method: method.id)
def test_options_of_predictions_are_refused(name, value, method, tmp_path):
    """Of an option that is on by default, `False` is the value that asks for something."""
    with pytest.raises(ValueError, match=f"`{name}={value!r}` is not supported"):
        method.config(**sampling.options_of(method, tmp_path, **{name: value}))


def test_tool_calls_need_tools(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="`max_tool_calling_iterations=2` has no effect without tools"):
        sampling.trainer(DPH_RL, tiny_folder, tmp_path, max_tool_calling_iterations=2)


@pytest.mark.parametrize("method", [DPH_RL, FDPG], ids=lambda method: method.id)
def test_continuous_batching_does_not_round_the_weights(method, tiny_folder, tmp_path):
    """TRL casts the model that is trained to the type of the autocast before it generates, and leaves it so."""
    options = dict(use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match=r"`use_transformers_continuous_batching=True` casts .*float32.* to bfloat16"):
        sampling.trainer(method, tiny_folder, tmp_path, bf16=True, **options)
    trainer = sampling.trainer(method, tiny_folder, tmp_path, **options)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", [DPH_RL, FDPG], ids=lambda method: method.id)
def test_adapters_that_need_more_than_a_step_are_refused(method, tiny_folder, tmp_path):
    for config, named in (
        (AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"), "AdaLoraConfig.*allocate"),
        (
            LoraConfig(alora_invocation_tokens=[5], target_modules=["q_proj"]),
            "alora_invocation_tokens.*not be trained",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            sampling.trainer(method, tiny_folder, tmp_path, peft_config=config)
