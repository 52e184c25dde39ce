"""
The reference is what training starts from: what would make it something else is refused, or handled so that nothing
differs.
"""

import copy
import logging
import math

import diffusion_harness as harness
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusion_harness import lora, pixels, trainer
from peft import IA3Config, LoHaConfig, LoKrConfig, OFTConfig

from trl_ext.diffusion import DenoisedPairs
from trl_ext.diffusion.diffusion_trainer import PredictionCheck


LOG_2 = math.log(2)


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained_lora(folder) -> str:
    run = trainer("sd", folder, max_steps=4, learning_rate=3e-3)
    run.train()
    run.save_model()
    return str(folder)


@pytest.fixture(scope="module")
def saved_lora(tmp_path_factory) -> str:
    return trained_lora(tmp_path_factory.mktemp("lora"))


def with_lora(folder):
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    return pipeline


# ---- A new LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", False),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("trainable_token_indices", [0, 1]),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_lora_that_moves_the_reference_is_refused(option, value, tmp_path):
    """And leaves the pipeline as it was: it is the user's."""
    pipeline = tiny_pipelines.pipeline("sd")
    before = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
    with pytest.raises(ValueError, match=rf"`{option}={value!r}`".replace("[", r"\[")):
        trainer(pipeline, tmp_path, peft_config=lora(**{option: value}))
    after = dict(pipeline.unet.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="orthogonal"),
        dict(use_dora=True),
        dict(use_rslora=True),
        dict(lora_dropout=0.5),
    ],
    ids=str,
)
def test_lora_that_keeps_the_reference_starts_at_log_2(given, tmp_path):
    run = trainer("sd", tmp_path, max_steps=1, peft_config=lora(**given))
    run.train()
    assert losses(run)[0] == pytest.approx(LOG_2, abs=2e-4 if {"use_dora", "init_lora_weights"} & set(given) else 1e-5)


@pytest.mark.parametrize(
    "given",
    [
        dict(lora_bias=True),
        dict(use_dora=True),
        dict(target_modules=["conv1", "to_q"]),
        dict(rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 16}, use_rslora=True),
    ],
    ids=["bias", "dora", "convolutions", "patterns"],
)
def test_every_lora_comes_back(given, tmp_path):
    """Loaded into a new pipeline it computes what was trained, and is the reference of the next run."""
    run = trainer("sd", tmp_path / "first", max_steps=2, learning_rate=2e-2, peft_config=lora(**given))
    run.train()
    run.save_model()
    assert losses(run)[0] == pytest.approx(LOG_2, abs=2e-4)
    pipeline = tiny_pipelines.pipeline("sd")
    before = predicted(pipeline.unet)
    pipeline.load_lora_weights(str(tmp_path / "first"), weight_name="pytorch_lora_weights.safetensors")
    loaded, trained = predicted(pipeline.unet), predicted(run.family.denoiser)
    assert (loaded - before).abs().max() > 1e-2 and torch.equal(loaded, trained)
    again = trainer(pipeline, tmp_path / "second", peft_config=None, max_steps=1)
    again.train()
    assert losses(again)[0] == pytest.approx(LOG_2, abs=2e-4)


@torch.no_grad()
def predicted(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size, channels = unet.config.sample_size, unet.config.in_channels
    latents = torch.randn(2, channels, size, size, generator=generator)
    states = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    return unet.eval()(latents, torch.tensor([3, 500]), states).sample


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["to_q"]),
        LoKrConfig(r=2, target_modules=["to_q"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
        IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    ],
    ids=["loha", "lokr", "oft", "ia3"],
)
def test_other_kinds_of_adapters_are_refused(config, tmp_path):
    with pytest.raises(TypeError, match=f"`peft_config`.*`{type(config).__name__}`"):
        trainer("sd", tmp_path, peft_config=config)


def test_first_batch_is_checked(tmp_path):
    """
    What no list of options knows is noticed before the first step: weights changed in between, noise in the forward.
    """
    run = trainer("sd", tmp_path)
    with torch.no_grad():
        for name, parameter in run.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with pytest.raises(ValueError, match="policy and reference differ by"):
        run.train()
    run = trainer("sd", tmp_path)
    run.family.denoiser.conv_in.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    with pytest.raises(ValueError, match="policy and reference differ by"):
        run.train()
    # A reference that is given may be any other model.
    other = tiny_pipelines.pipeline("sd", seed=1).unet
    trainer("sd", tmp_path, ref_model=other, max_steps=1).train()


def test_first_batch_check_changes_nothing(tmp_path, monkeypatch):
    """The same losses with and without it: no random number is drawn, no mode is left behind."""
    kwargs = dict(peft_config=lora(lora_dropout=0.3))
    run = trainer("sd", tmp_path, **kwargs)
    run.train()
    other = trainer("sd", tmp_path, **kwargs)
    other._start_is_unchecked = False
    other.train()
    assert losses(run) == losses(other)


# ---- A LoRA that the pipeline comes with ----------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0, {"unet": {"down": 0.5, "up": 0.25}}], ids=str)
def test_starting_lora_at_a_weight(weight, saved_lora, tmp_path):
    """At learning rate 0 every loss is log 2, and what is saved is what the pipeline was."""
    pipeline = with_lora(saved_lora)
    pipeline.set_adapters(["mine"], [weight])
    before = pixels(pipeline)
    run = trainer(pipeline, tmp_path, peft_config=None, max_steps=2, learning_rate=0.0)
    run.train()
    run.save_model()
    assert losses(run) == pytest.approx([LOG_2] * 2, abs=1e-6)
    fresh = tiny_pipelines.pipeline("sd")
    fresh.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(pixels(fresh) - before).max() <= 1


def test_starting_lora_with_dropout(saved_lora, tmp_path):
    """The frozen copy has no dropout: evaluated twice, the reference is the same."""
    pipeline = with_lora(saved_lora)
    for module in pipeline.unet.modules():
        if "mine" in getattr(module, "lora_A", {}):
            module.lora_dropout["mine"] = torch.nn.Dropout(0.5)
    run = trainer(pipeline, tmp_path, peft_config=None)
    inputs = harness.batch(run)
    noisy, _, timesteps, conditioning = run._noisy_batch(inputs)
    run.policy.train()
    with torch.no_grad():
        first, second = (run.policy(noisy, timesteps, conditioning)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_two_starting_loras_are_refused(saved_lora, tmp_path):
    pipeline = with_lora(saved_lora)
    pipeline.load_lora_weights(saved_lora, weight_name="pytorch_lora_weights.safetensors", adapter_name="other")
    pipeline.set_adapters(["mine", "other"], [0.7, 0.3])
    with pytest.raises(ValueError, match="2 adapters, mine, other; train one at a time"):
        trainer(pipeline, tmp_path, peft_config=None)


def test_a_lora_that_was_fused_is_part_of_the_reference(saved_lora, tmp_path):
    pipeline = with_lora(saved_lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    run = trainer(pipeline, tmp_path, max_steps=1)
    run.train()
    assert losses(run)[0] == pytest.approx(LOG_2, abs=1e-5)


def test_starting_lora_that_is_not_in_use_is_refused(saved_lora, tmp_path):
    pipeline = with_lora(saved_lora)
    pipeline.disable_lora()
    with pytest.raises(ValueError, match=r"'mine' is switched off.*enable_lora"):
        trainer(pipeline, tmp_path, peft_config=None)
    pipeline.enable_lora()
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match=r"'mine' is fused.*unload_lora_weights"):
        trainer(pipeline, tmp_path, peft_config=None)
    pipeline = with_lora(saved_lora)
    pipeline.unet.peft_config["mine"].bias = "all"
    with pytest.raises(ValueError, match="`bias='all'`"):
        trainer(pipeline, tmp_path, peft_config=None)


# ---- A reference that is given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16, beta", [(False, 5000.0), (True, 10.0)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peft_config", [None, "lora"], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_reference_in_half_precision(name, peft_config, dtype, bf16, beta, tmp_path):
    """Beside a policy in float32 it computes in float32; with mixed precision both round alike."""
    pipeline = tiny_pipelines.pipeline(name)
    reference = getattr(pipeline, "unet" if name == "sd" else "transformer").to(dtype)
    run = trainer(name, tmp_path, peft_config=peft_config, ref_model=reference, max_steps=1, beta=beta, bf16=bf16)
    run.train()
    assert losses(run)[0] == pytest.approx(LOG_2, abs=0.02)
    assert run.ref_model.dtype == (dtype if bf16 and dtype == torch.bfloat16 else torch.float32)


def test_reference_that_shares_weights_is_refused(tmp_path):
    pipeline = tiny_pipelines.pipeline("sd")
    other = copy.copy(pipeline.unet)
    with pytest.raises(ValueError, match="`ref_model` shares .* tensors"):
        trainer(pipeline, tmp_path, ref_model=other, peft_config=None)
    other = copy.deepcopy(pipeline.unet)
    other.mid_block = pipeline.unet.mid_block
    with pytest.raises(ValueError, match=r"`ref_model` shares .*mid_block"):
        trainer(pipeline, tmp_path, ref_model=other, peft_config=None)


def test_reference_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`ref_model` has cross_attention_dim=32, the policy 16"):
        trainer("sd", tmp_path, ref_model=tiny_pipelines.unet(cross_attention_dim=32), peft_config=None)


# ---- What the reference's own error tells ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truth, declared", [("v_prediction", "epsilon"), ("epsilon", "v_prediction"), (None, "epsilon")]
)
def test_wrong_prediction_type_is_noticed(truth, declared, caplog):
    """A perfect predictor of v taken for one of the noise, the reverse, and either taken for what it is."""
    truth = truth or declared
    pipelines = {name: tiny_pipelines.pipeline("sd_v") for name in ("v_prediction", "epsilon")}
    for name, pipeline in pipelines.items():
        pipeline.scheduler.register_to_config(prediction_type=name)
    from trl_ext.diffusion import get_family

    families = {name: get_family(pipeline) for name, pipeline in pipelines.items()}
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(160, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.randint(0, 1000, (160,), generator=generator)
    prediction = families[truth].target(latents, noise, timesteps)
    target = families[declared].target(latents, noise, timesteps)
    check = PredictionCheck()
    with caplog.at_level(logging.WARNING):
        for part in range(0, 160, 4):
            p, t = prediction[part : part + 4], target[part : part + 4]
            check.add(DenoisedPairs(p, p, p, p, t, t, timesteps[part : part + 4]), families[declared])
    assert caplog.text.count(f"`prediction_type` ({declared!r})") == (truth != declared)
