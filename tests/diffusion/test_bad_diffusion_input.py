"""
Every bad input of the diffusion trainers is answered in the constructor, by name, with the value and the way out.
"""

import subprocess
import sys

import diffusion_harness as harness
import pytest
import tiny_pipelines
import torch
from diffusion_harness import dataset, lora, trainer
from peft import IA3Config, LoraConfig
from transformers import BitsAndBytesConfig
from trl import DPOConfig

from trl_ext import DiffusionDPOConfig, DSPOConfig, DSPOTrainer


def config(config_class=DiffusionDPOConfig, **given):
    return config_class("out", use_cpu=True, bf16=False, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(beta=0), "`beta` must be a positive, finite number, got 0"),
        (dict(beta=-5000.0), "`beta` must be a positive, finite number, got -5000.0"),
        (dict(loss_type="cpo"), "`loss_type` must be one of 'sigmoid', 'hinge', 'ipo', 'dmpo', got 'cpo'"),
        (dict(loss_type="dmpo"), "needs a label_smoothing greater than 0"),
        (dict(safeguard_mu=1.5), r"`safeguard_mu` must be a number in \[0, 1\] or None, got 1.5"),
        (dict(resolution=-16), "`resolution` must be a positive number of pixels, or height and width, got -16"),
        (dict(prompt_dropout=1.5), r"`prompt_dropout` must be a number in \[0, 1\] or None, got 1.5"),
        (dict(timestep_sampling="cosine"), "`timestep_sampling` must be one of 'uniform', 'logit_normal'"),
        (dict(error_space="eps"), "`error_space` must be one of 'prediction', 'epsilon' or None, got 'eps'"),
        (dict(snr_gamma=0), "`snr_gamma` must be a positive, finite number or None, got 0"),
        (dict(logit_std=0.0), "`logit_std` must be a positive, finite number, got 0.0"),
        (dict(num_timestep_buckets=0), "`num_timestep_buckets` must be an integer of at least 1, got 0"),
        (dict(use_ema=True, ema_decay=1.0), r"`ema_decay` must be a number in \[0, 1\), got 1.0"),
        (dict(label_smoothing_factor=0.1), "`label_smoothing_factor=0.1` is not supported.*has `label_smoothing`"),
        (dict(neftune_noise_alpha=5.0), "`neftune_noise_alpha=5.0` is not supported"),
        (dict(ema_decay=0.9), "`ema_decay=0.9` has no effect unless `use_ema=True`"),
        (dict(validation_steps=10), "`validation_steps=10` has no effect unless `validation_prompts`"),
        (dict(validation_prompts="a cat"), "`validation_prompts` must be a list of strings or None, got 'a cat'"),
        (dict(cache_dir="x"), "`cache_dir='x'` has no effect unless `cache_latents=True`"),
    ],
)
def test_configuration(given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(beta=5000.0), "beta must be greater than 0 and less than 2 with variant='score'.*Give score_weight"),
        (dict(score_weight=3.0), r"`score_weight` must be a number in \(0, 2\) or None, got 3.0"),
        (dict(variant="squared", score_weight=0.5), "score_weight=0.5 has no effect with variant='squared'"),
        (dict(variant="brier"), "`variant` must be one of 'score', 'squared', got 'brier'"),
        (dict(beta=0.0), "`beta` must be a positive, finite number or None, got 0.0"),
    ],
)
def test_dspo_configuration(given, message):
    with pytest.raises(ValueError, match=message):
        config(DSPOConfig, **given)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(peft_config=LoraConfig(target_modules=["q_proj"])), ValueError, r"\['q_proj'\].*matches no layer.*to_q"),
        (dict(peft_config=LoraConfig(modules_to_save=["conv_in"])), ValueError, "`modules_to_save="),
        (dict(peft_config=IA3Config(target_modules=["to_q"], feedforward_modules=[])), TypeError, "a `IA3Config`"),
        (dict(resolution=17), ValueError, "`resolution=17` is not divisible by 2.*Use 16 or 18"),
        (dict(processing_class=object()), ValueError, "`processing_class` is not used"),
        (dict(compute_metrics=print), ValueError, "`compute_metrics` is not supported"),
        (dict(logit_mean=0.5), ValueError, "`logit_mean=0.5` has no effect with `timestep_sampling='uniform'`"),
        (dict(model_init_kwargs={"dtype": "bfloat16"}), ValueError, "`model_init_kwargs` has no effect on a pipeline"),
        (dict(ref_model=torch.nn.Linear(1, 1)), TypeError, "`ref_model` must be a `UNet2DConditionModel`"),
        (dict(cache_latents=True, random_crop=True), ValueError, "`random_crop=True` cannot be used with cached"),
        (
            dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True), peft_config=None),
            ValueError,
            "`quantization_config` was given without `peft_config`: quantized weights cannot be trained",
        ),
        (
            dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
            ValueError,
            "`quantization_config` has no effect on a pipeline that is already loaded",
        ),
        (
            dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, train=True),
            ValueError,
            "`gradient_checkpointing_kwargs=.*use_reentrant.* cannot be honored",
        ),
    ],
)
def test_arguments(given, error, message, tmp_path):
    train = given.pop("train", False)
    with pytest.raises(error, match=message):
        run = trainer("sd", tmp_path, **given)
        if train:
            run.train()


def test_models(tmp_path):
    """What is no pipeline, an unknown pipeline, and a pipeline whose adapters cannot be told apart or saved."""
    with pytest.raises(
        TypeError, match="`model` must be the id or folder of a pipeline.*got a `UNet2DConditionModel`"
    ):
        trainer(tiny_pipelines.unet(), tmp_path)
    with pytest.raises(ValueError, match="`DiffusionPipeline` is not a pipeline that can be trained; known are"):
        from diffusers import DiffusionPipeline

        trainer(DiffusionPipeline(), tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WuerstchenPipeline"}')
    with pytest.raises(ValueError, match="`WuerstchenPipeline` is not a pipeline that can be trained"):
        trainer(str(tmp_path), tmp_path)
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.unet.add_adapter(lora(target_modules=["to_q"]), adapter_name="first")
    with pytest.raises(ValueError, match=r"comes with the adapter\(s\) first. Leave `peft_config` out"):
        trainer(pipeline, tmp_path)
    pipeline.unet.add_adapter(lora(target_modules=["to_q"]), adapter_name="second")
    with pytest.raises(ValueError, match="comes with 2 adapters, first, second"):
        trainer(pipeline, tmp_path, peft_config=None)
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="text_encoder has an adapter, which is not trained here"):
        trainer(pipeline, tmp_path)
    pipeline = tiny_pipelines.pipeline("sd")
    with pytest.raises(ValueError, match="`ref_model` is the very model that is trained"):
        trainer(pipeline, tmp_path, ref_model=pipeline, peft_config=None)


def test_arguments_of_another_class(tmp_path):
    with pytest.raises(TypeError, match=r"Replace `DPOConfig\(...\)` with `DSPOConfig\(...\)`"):
        DSPOTrainer("x", args=DPOConfig("out", use_cpu=True, bf16=False), train_dataset=dataset(2))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DSPOTrainer("x", args=config(DSPOConfig))


def test_data(tmp_path):
    """What the data module finds ends the constructor, for the evaluation's data as for the training's."""
    with pytest.raises(ValueError, match="The train dataset has no column `chosen`"):
        trainer("sd", tmp_path, train_dataset=dataset().remove_columns("chosen"))
    with pytest.raises(ValueError, match="The eval dataset has no column `prompt`"):
        trainer("sd", tmp_path, eval_dataset=dataset(2).remove_columns("prompt"))
    wide = harness.picture(0, True).resize((32, 16))
    rows = dataset(2).to_list()
    rows[1]["chosen"] = wide
    from datasets import Dataset

    with pytest.raises(ValueError, match="differ too much in shape"):
        trainer("sd", tmp_path, train_dataset=Dataset.from_list([{**row} for row in rows]))


def test_without_diffusers():
    """The names import without diffusers; a trainer says what to install."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer\n"
        "args = DiffusionDPOConfig('x', use_cpu=True, bf16=False)\n"
        "DiffusionDPOTrainer('x', args=args, train_dataset=[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (
        'ImportError: The diffusion trainers need diffusers. Install it with `pip install "trl-ext[diffusion]"`'
        in (done.stderr)
    )
