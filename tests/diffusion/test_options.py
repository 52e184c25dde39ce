"""Options of the image trainers: what each is resolved to, what it does, and what refuses it."""

import logging

import diffusion_harness as harness
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from diffusers import DDIMScheduler
from diffusion_harness import trainer

from trl_ext import DiffusionDPOConfig, DSPOConfig
from trl_ext.diffusion import get_family


def distilled(name: str = "sd"):
    """A pipeline whose UNet takes the guidance scale as an input, as LCM's does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = tiny_pipelines.pipeline(name)
        kwargs = (
            {}
            if name == "sd"
            else {k: pipeline.unet.config[k] for k in ("cross_attention_dim", "addition_embed_type")}
        )
        if name == "sdxl":
            kwargs.update(
                {
                    k: pipeline.unet.config[k]
                    for k in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
                }
            )
        pipeline.register_modules(unet=tiny_pipelines.unet(time_cond_proj_dim=8, **kwargs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- Guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, default", [("sd", 7.5), ("sdxl", 5.0)])
def test_guidance_distilled_unet_is_given_what_the_pipeline_gives(name, default):
    """In training the same guidance input, and the same prediction, as in sampling at that scale."""
    pipeline = distilled(name)
    family = get_family(pipeline)
    assert family.is_guidance_distilled and not family.uses_empty_prompt and family.guidance_scale == default
    seen = []

    def hook(module, args, kwargs, output):
        seen.append((args, kwargs, output[0]))

    for scale in (default, 1.5):
        family.guidance_scale = scale
        handle = pipeline.unet.register_forward_hook(hook, with_kwargs=True)
        pipeline(
            "a bold seven", height=16, width=16, num_inference_steps=1, output_type="latent", guidance_scale=scale
        )
        handle.remove()
        args, kwargs, output = seen.pop()
        conditioning = {
            **family.encode_prompts(["a bold seven"]),
            **family.image_conditioning(torch.tensor([[16, 16, 0, 0, 16, 16]])),
        }
        with torch.no_grad():
            got = family.predict(pipeline.unet, args[0], args[1].reshape(1), conditioning)
        assert torch.equal(got, output)


def test_guidance_scale_is_an_option_of_distilled_models(tmp_path):
    losses = []
    for given in ({}, {"guidance_scale": 3.5}, {"guidance_scale": 1.0}):
        run = trainer("flux", tmp_path, **given)
        run.policy.train()
        with torch.no_grad():
            for name, parameter in run.policy.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
        losses.append(run.compute_loss(run.model, harness.batch(run)).item())
    assert losses[0] == losses[1] != losses[2]
    assert run.resolved_hyperparameters()["guidance_scale"] == 1.0
    with pytest.raises(ValueError, match="`guidance_scale=3.5` has no effect.*UNet2DConditionModel"):
        trainer("sd", tmp_path, guidance_scale=3.5)


@pytest.mark.parametrize("name, expected", [("sd", 0.2), ("sdxl", 0.2), ("sd3", 0.2), ("flux", 0.0), ("lcm", 0.0)])
def test_prompt_dropout_is_for_models_that_use_the_empty_prompt(name, expected, tmp_path):
    def made(dropout):
        return trainer(distilled() if name == "lcm" else name, tmp_path, prompt_dropout=dropout)

    run = made(None)
    assert run.train_dataset.prompt_dropout == expected == run.resolved_hyperparameters()["prompt_dropout"]
    assert made(0.5).train_dataset.prompt_dropout == 0.5


# ---- Weights of the errors ------------------------------------------------------------------------------------------


def test_min_snr_where_the_snr_is_zero(tmp_path):
    """
    min(SNR, gamma) / SNR is 1 for every SNR up to gamma, 0 included: at the last time of a flow or of a rescaled
    schedule.
    """
    for model, given, expected in (
        ("rescaled", {}, 0.0),  # of the noise: alpha is 0
        ("rescaled", dict(error_space="prediction"), 1.0),
        ("sd3", {}, 1.0),
        ("flux", {}, 1.0),
        ("sd3", dict(error_space="epsilon"), 0.0),
    ):
        if model == "rescaled":
            model = tiny_pipelines.pipeline("sd_v")
            model.scheduler = DDIMScheduler.from_config(model.scheduler.config, rescale_betas_zero_snr=True)
        run = trainer(model, tmp_path, snr_gamma=5.0, **given)
        weight = run._error_weight(run.family.schedule)
        assert weight.isfinite().all() and weight[-1].item() == expected
        snr, raw = run.family.snr(run.family.schedule[:-1]), run._error_weight(run.family.schedule)[:-1]
        scale = run.family.epsilon_error_weight(run.family.schedule[:-1]) if run._error_space == "epsilon" else 1.0
        torch.testing.assert_close(raw, scale * snr.clamp(max=5.0) / snr)


# ---- Validation images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_vae_computes_in_its_own_type(dtype):
    """
    Under autocast in half precision a VAE with large activations would overflow to a black image, and lose latents.
    """
    family = get_family(tiny_pipelines.pipeline("sdxl"))
    vae = family.pipeline.vae
    with torch.no_grad():  # undone by the last normalization
        for module in (vae.decoder.conv_in, vae.encoder.conv_in):
            module.weight.mul_(1e6), module.bias.mul_(1e6)
    pixels, latents = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    expected = family.encode_images(pixels), family.decode_latents(latents)
    with torch.autocast("cpu", dtype=dtype):
        got = family.encode_images(pixels), family.decode_latents(latents)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and got[1].std() > 0


# ---- Denoisers of other kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("sd", dict(in_channels=9), "in_channels=9.*4 latent channels make 4"),
        ("sd", dict(in_channels=8), "in_channels=8"),
        ("sd", dict(out_channels=8), "out_channels=8"),
    ],
)
def test_denoisers_of_another_task_are_refused(name, config, message):
    pipeline = tiny_pipelines.pipeline(name)
    pipeline.register_modules(unet=tiny_pipelines.unet(**config))
    with pytest.raises(ValueError, match=message):
        get_family(pipeline)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(guidance_embeds=True), "`guidance_embeds=True` of a `QwenImageTransformer2DModel` is not supported"),
        (dict(in_channels=32), "`QwenImageTransformer2DModel` has in_channels=32 and out_channels=4, .*16 and 4"),
        (dict(out_channels=8), "in_channels=16 and out_channels=8"),
    ],
)
def test_denoisers_that_qwen_image_has_not_are_refused(given, message):
    """An edit pipeline's channels, and a guidance input, with which diffusers' own forward fails."""
    from diffusers import QwenImageTransformer2DModel

    pipeline = tiny_pipelines.pipeline("qwen")
    config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    pipeline.register_modules(transformer=QwenImageTransformer2DModel(**{**config, **given}))
    with pytest.raises(ValueError, match=message):
        get_family(pipeline)


# ---- Prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("cached", [False, True])
def test_cut_prompts_are_counted_once(name, cached, tmp_path, caplog):
    rows = harness.dataset(4).to_list()
    rows[0]["prompt"] = rows[1]["prompt"] = "a very long prompt of many letters " * 4
    rows[2]["prompt"] = "another long prompt, but of other letters, again " * 4
    dataset = Dataset.from_list(rows, features=harness.dataset(1).features)
    with caplog.at_level(logging.WARNING):
        run = trainer(name, tmp_path, train_dataset=dataset, max_steps=4, cache_latents=cached)
        run.train()
    assert caplog.text.count("2 of the 3 different prompts of the train dataset are longer than the 16 tokens") >= 1
    assert caplog.text.count("of `tokenizer` reads") == 1
    assert "input was truncated" not in caplog.text


def test_prompt_limits():
    limits = {name: get_family(tiny_pipelines.pipeline(name)).prompt_limits() for name in tiny_pipelines.FAMILIES}
    assert limits["sd"] == {"tokenizer": 16} and limits["sdxl"] == {"tokenizer": 16, "tokenizer_2": 16}
    assert limits["sd3"] == {"tokenizer": 16, "tokenizer_2": 16, "tokenizer_3": 256}
    assert limits["flux"] == limits["kontext"] == {"tokenizer": 16, "tokenizer_2": 512}
    # Of Qwen-Image's 512 five end the template; FLUX.2 counts the template's tokens with those of the prompt.
    assert limits["qwen"] == {"tokenizer": 507} and limits["flux2"] == limits["klein"] == {"tokenizer": 512}


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_resolution_takes_a_side_or_two():
    def of(value):
        return DiffusionDPOConfig("x", use_cpu=True, bf16=False, resolution=value).resolution

    assert of(None) is None and of(16) == 16 and of([16]) == 16 and of([16, 24]) == [16, 24]
    for value in (0, -16, [16, 0], [16, 16, 16], "16x16", 16.5, [16.5, 16], []):
        with pytest.raises(ValueError, match="`resolution`"):
            of(value)


def test_resolution_on_the_command_line():
    from trl import TrlParser

    parser = TrlParser(DiffusionDPOConfig)
    common = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false"]
    for arguments, expected in ((["512"], 512), (["768", "512"], [768, 512])):
        (args,) = parser.parse_args_and_config([*common, "--resolution", *arguments])
        assert args.resolution == expected


@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
@pytest.mark.parametrize("cached", [False, True])
def test_images_that_are_not_square(name, cached, tmp_path):
    """
    Height 24, width 16: trained, validated and logged in that shape, which no square could tell from its transpose.
    """
    given = dict(validation_prompts=["a bold seven"], validation_inference_steps=1, max_steps=1)
    run = trainer(name, tmp_path, resolution=[24, 16], cache_latents=cached, **given)
    run.train()
    latents, _ = run._encode(run._prepare_inputs(harness.batch(run)))
    factor = run.family.vae_scale_factor
    assert (
        latents.shape[2:] == (24 // factor, 16 // factor) and run.resolved_hyperparameters()["resolution"] == "16 x 24"
    )
    assert run._validation._sample(run.policy)[0].size == (16, 24)
    with pytest.raises(ValueError, match="resolution"):
        trainer(name, tmp_path, resolution=[24, 17])


# ---- Broken images and relative paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_skipped_images_are_listed_in_a_file(cached, tmp_path):
    rows = harness.dataset(6).to_list()
    for row in rows:
        row["chosen"], row["rejected"] = row["chosen"]["bytes"], row["rejected"]["bytes"]
    rows[2]["rejected"] = rows[2]["rejected"][:200]
    dataset = Dataset.from_list(rows)
    run = trainer(
        "sd",
        tmp_path,
        train_dataset=dataset,
        eval_dataset=dataset.select([1, 2, 3]),
        skip_broken_images=True,
        cache_latents=cached,
    )
    run.train()
    assert len(run.train_dataset) == 5 and len(run.eval_dataset) == 2
    listed = (tmp_path / "skipped_images.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == ["Row 2 of the train dataset", "Row 1 of the eval dataset"]
    with pytest.raises(
        ValueError, match=r"(?s)Row 2 of the train dataset, column `rejected`.*`skip_broken_images=True`"
    ):
        trainer("sd", tmp_path, train_dataset=dataset, verify_images=True)


def test_cache_of_pairs_that_the_run_will_not_see_is_pointed_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer("sd", tmp_path, cache_latents=True, max_steps=2)
    assert "sees at most 4 of the 8 pairs" in caplog.text and "range(4)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer("sd", tmp_path, cache_latents=True, max_steps=4)
    assert "sees at most" not in caplog.text


# ---- Quantization ---------------------------------------------------------------------------------------------------


def test_quantization_of_a_pipeline_is_refused_by_name(tmp_path):
    from diffusers import PipelineQuantizationConfig

    tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "sd")
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True}, components_to_quantize=["unet"]
    )
    with pytest.raises(ValueError, match="is a `PipelineQuantizationConfig`.*BitsAndBytesConfig"):
        trainer(str(tmp_path / "sd"), tmp_path, quantization_config=config)
    with pytest.raises(
        ValueError, match=r"`model_init_kwargs\['quantization_config'\]` is a `PipelineQuantizationConfig`"
    ):
        trainer(str(tmp_path / "sd"), tmp_path, model_init_kwargs={"quantization_config": config})


# ---- Options that could do nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("train_sampling_strategy", "group_by_length"),
        ("length_column_name", "lengths"),
        ("label_names", ["label"]),
        ("include_for_metrics", ["inputs"]),
        ("batch_eval_metrics", True),
        ("eval_accumulation_steps", 2),
        ("eval_use_gather_object", True),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("use_cache", True),
        ("use_liger_kernel", True),
        ("liger_kernel_config", {"rope": True}),
        ("label_smoothing_factor", 0.1),
        ("average_tokens_across_devices", False),
        ("logging_nan_inf_filter", False),
        ("prediction_loss_only", True),
        ("eval_do_concat_batches", False),
        ("neftune_noise_alpha", 5.0),
        ("include_num_input_tokens_seen", "all"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}),
        ("activation_checkpointing_kwargs", {"preserve_rng_state": False}),
    ],
)
@pytest.mark.parametrize("config_class", [DiffusionDPOConfig, DSPOConfig])
def test_options_of_other_models_are_refused_by_name(option, value, config_class):
    with pytest.raises(ValueError, match=f"`{option}"):
        config_class("x", use_cpu=True, bf16=False, **{option: value})


def test_optimizer_that_trains_nothing_is_refused(tmp_path):
    pipeline = tiny_pipelines.pipeline("sd")
    optimizer = torch.optim.SGD(pipeline.unet.parameters(), lr=1e-3)  # the LoRA does not exist yet
    with pytest.raises(ValueError, match="`optimizers` has a `SGD` that holds none"):
        trainer(pipeline, tmp_path, optimizers=(optimizer, None))
    pipeline = tiny_pipelines.pipeline("sd")
    optimizer = torch.optim.SGD(pipeline.unet.parameters(), lr=1e-4)
    run = trainer(pipeline, tmp_path, optimizers=(optimizer, None), peft_config=None, max_steps=1)
    before = run.policy.denoiser.conv_in.weight.clone()
    run.train()
    assert not torch.equal(run.policy.denoiser.conv_in.weight, before)


# ---- Several evaluation sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["eval_a_errors/chosen", "eval_b_rewards/margins", "eval_b_gaps/chosen"])
def test_every_evaluation_set_logs_under_its_own_name(metric, tmp_path):
    """Metrics of each set can choose the best checkpoint, and are what an evaluation of that set alone gives."""
    sets = {"a": harness.dataset(3), "b": harness.dataset(4, start=8)}
    given = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2)
    run = trainer(
        "sd", tmp_path, eval_dataset=sets, load_best_model_at_end=True, metric_for_best_model=metric, **given
    )
    run.train()
    logged = [entry for entry in run.state.log_history if metric in entry]
    assert len(logged) == 2 and run.state.best_metric in [entry[metric] for entry in logged]
    assert not any(key.startswith("eval_rewards/") for entry in run.state.log_history for key in entry)
    alone = run.evaluate(sets[metric.split("_")[1]])
    assert alone["eval_" + metric.split("_", 2)[2]] == pytest.approx(run.state.best_metric, rel=1e-4, abs=1e-6)
