"""
Pipeline families: that each predicts what its pipeline does, its noise, its targets, and what converts between errors.
"""

import inspect

import diffusion_harness
import pytest
import tiny_pipelines
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

from trl_ext.diffusion import PipelineFamily, family_class, get_family, known_pipelines, register_family
from trl_ext.diffusion.families import unpack
from trl_ext.diffusion.loading import prepare_policy
from trl_ext.diffusion.paired_denoiser import PairedDenoiser
from trl_ext.diffusion.validation import sample_images


every_family = pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
PACKED = ("flux", "kontext", "flux2", "klein", "qwen")  # whose transformers take tokens, and a time in [0, 1]
SIZE = (tiny_pipelines.RESOLUTION, tiny_pipelines.RESOLUTION)


def latents_of(family, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = tiny_pipelines.RESOLUTION // family.vae_scale_factor
    shape = (count, family.latent_channels, side, side)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@every_family
def test_predicts_what_the_pipeline_predicts(name):
    """
    In the pipeline's own sampling call the denoiser gets latents, time and conditioning in some form; from the same
    latents, time and prompt the family's `predict` has the same output, bit for bit. So packing, position ids,
    guidance inputs, time ids and pooled embeddings are the pipeline's.
    """
    pipeline = tiny_pipelines.pipeline(name)
    family = get_family(pipeline)
    seen = []

    def hook(module, args, kwargs, output):
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        seen.append((bound, output[0]))

    handle = family.denoiser.register_forward_hook(hook, with_kwargs=True)
    # Without classifier-free guidance, except where the scale is an input.
    call = dict(height=16, width=16) | {
        "kontext": dict(guidance_scale=3.5, max_area=16 * 16),
        "flux": dict(guidance_scale=3.5),
        "flux2": dict(guidance_scale=4.0),
        "qwen": {},
    }.get(name, dict(guidance_scale=1.0))
    pipeline(prompt="a bold seven", num_inference_steps=2, output_type="latent", **call)
    handle.remove()
    assert len(seen) == 2
    conditioning = {
        **family.encode_prompts(["a bold seven"]),
        **family.image_conditioning(torch.tensor([[16, 16, 0, 0, 16, 16]])),
    }
    for arguments, output in seen:
        noisy = arguments.get("sample", arguments.get("hidden_states"))
        time = arguments["timestep"].reshape(1)
        if name in ("flux", "kontext", "qwen"):
            noisy, output = (unpack(tensor, 8, 8) for tensor in (noisy, output))
        elif name in ("flux2", "klein"):
            noisy, output = (tensor.transpose(1, 2).reshape(1, -1, 4, 4) for tensor in (noisy, output))
        if name in PACKED:
            time = time * 1000
        with torch.no_grad():
            got = family.predict(family.denoiser, noisy, time, conditioning)
        assert torch.equal(got, output)


@every_family
def test_samples_what_the_pipeline_samples(name):
    """
    Validation images are the pipeline's own, pixel for pixel, though no text encoder is used and the VAE is called
    here.
    """
    pipeline = tiny_pipelines.pipeline(name)
    policy = PairedDenoiser(get_family(pipeline), reference=torch.nn.Module())
    prompts = ["a bold seven", "a red digit", "a thin one"]
    conditioning = policy.family.sampling_conditioning(prompts)
    scheduler, state = pipeline.scheduler, torch.get_rng_state()
    timesteps = scheduler.timesteps.clone()
    got = sample_images(policy, conditioning, SIZE, seed=5, num_inference_steps=2)
    assert pipeline.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert torch.equal(torch.get_rng_state(), state)
    for i, image in enumerate(got):
        expected = diffusion_harness.pixels(pipeline, prompts[i], seed=5 + i)
        assert (expected == image).all()


@every_family
def test_noise_and_target_are_the_schedulers(name):
    """x_t and the target of diffusers' training schedulers; the flow's ends are the image and the noise."""
    family = get_family(tiny_pipelines.pipeline(name))
    latents, noise = latents_of(family)
    if family.prediction_type == "flow":
        scheduler = type(family.pipeline.scheduler).from_config(family.pipeline.scheduler.config)
        timesteps = scheduler.timesteps[[3, 500, 999]]
        expected = scheduler.scale_noise(latents, timesteps, noise)
        torch.testing.assert_close(family.add_noise(latents, noise, timesteps), expected)
        torch.testing.assert_close(family.target(latents, noise, timesteps), noise - latents)
        ends = family.add_noise(latents, noise, torch.tensor([0.0, 1000.0, 500.0]))
        assert torch.equal(ends[0], latents[0]) and torch.equal(ends[1], noise[1])
        return
    scheduler = DDPMScheduler.from_config(family.pipeline.scheduler.config)
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        family.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    expected = noise if family.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(family.target(latents, noise, timesteps), expected)


@every_family
def test_error_of_the_implied_noise(name):
    """
    Whatever the network predicts, `epsilon_error_weight` times its squared error is the squared error of the noise
    that it implies: alpha for v (noise = sqrt(a) v + sqrt(1 - a) x_t), (1 - s)^2 for a flow (noise = x_s + (1 - s) v).
    """
    family = get_family(tiny_pipelines.pipeline(name))
    latents, noise = latents_of(family)
    timesteps = torch.tensor([50, 500, 900])
    noisy, target = (f(latents, noise, timesteps) for f in (family.add_noise, family.target))
    prediction = target + latents_of(family, seed=1)[0]
    if family.prediction_type == "flow":
        implied = noisy + (1 - timesteps.view(-1, 1, 1, 1) / 1000) * prediction
    elif family.prediction_type == "epsilon":
        implied = prediction
    else:
        alphas = family.pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        implied = alphas.sqrt() * prediction + (1 - alphas).sqrt() * noisy
    expected = (implied - noise).square().mean((1, 2, 3))
    got = family.epsilon_error_weight(timesteps) * (prediction - target).square().mean((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@every_family
def test_timesteps(name):
    """
    Uniform draws cover the schedule evenly; a positive logit mean leans toward noise; a generator decides them; the
    range and its direction are the documented ones, even for a pipeline that has sampled before.
    """
    pipeline = tiny_pipelines.pipeline(name)
    diffusion_harness.pixels(pipeline)  # leaves the scheduler with two timesteps
    family = get_family(pipeline)
    assert len(family.schedule) == 1000 and (family.schedule.diff() > 0).all()
    generator = torch.Generator().manual_seed(0)
    uniform = family.sample_timesteps(4000, generator=generator)
    ranks = torch.searchsorted(family.schedule, uniform)
    assert torch.histc(ranks.float(), 4, 0, 1000).sub(1000).abs().max() < 120
    again = family.sample_timesteps(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform, again)
    # More noise is less signal: noise grows along the schedule.
    assert (family.snr(family.schedule[10:]).diff() < 0).all()
    means = [
        family.sample_timesteps(2000, sampling="logit_normal", logit_mean=mean, generator=generator).float().mean()
        for mean in (-1.0, 0.0, 1.0)
    ]
    assert means[0] < means[1] < means[2]
    narrow = family.sample_timesteps(500, sampling="logit_normal", logit_std=0.01, generator=generator)
    assert torch.searchsorted(family.schedule, narrow).sub(500).abs().max() < 20
    with pytest.raises(ValueError, match="must be one of 'uniform', 'logit_normal', got 'cosine'"):
        family.sample_timesteps(1, sampling="cosine")


def test_shift_of_the_schedule():
    """SD3's static shift of 3 is part of the times that training draws: half way is 3 * 0.5 / (1 + 2 * 0.5) = 0.75."""
    family = get_family(tiny_pipelines.pipeline("sd3"))
    assert family.schedule[499].item() == pytest.approx(750.0)
    assert get_family(tiny_pipelines.pipeline("flux")).schedule[499].item() == pytest.approx(500.0)


@every_family
def test_encoding(name):
    """
    One row a prompt, whatever is beside it; the mode of the posterior, so no draw; decoding is the inverse scaling.
    """
    family = get_family(tiny_pipelines.pipeline(name))
    prompts = ["a bold seven", "", "a thin one"]
    together = family.encode_prompts(prompts)
    for i, prompt in enumerate(prompts):
        for key, alone in family.encode_prompts([prompt]).items():
            torch.testing.assert_close(together[key][i : i + 1], alone)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state = torch.get_rng_state()
    latents = family.encode_images(images)
    assert latents.dtype == torch.float32 and latents.shape == latents_of(family)[0].shape
    assert torch.equal(torch.get_rng_state(), state)
    assert not latents.requires_grad
    vae = family.pipeline.vae
    with torch.no_grad():
        given = images[:, :, None] if name == "qwen" else images  # one frame of a video
        expected = vae.decode(vae.encode(given).latent_dist.mode()).sample.view(images.shape)
    torch.testing.assert_close(family.decode_latents(latents), expected, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("targets", [None, "add_q_proj", "all"])
def test_every_trained_parameter_has_a_gradient(name, targets):
    """With a LoRA of any targets and under full fine-tuning: what the output does not depend on is frozen."""
    family = get_family(tiny_pipelines.pipeline(name))
    if targets == "add_q_proj" and not hasattr(family.denoiser, "transformer_blocks"):
        return
    config = LoraConfig(r=2, target_modules=None if targets is None else [targets], init_lora_weights=True)
    prepare_policy(family, None if targets == "all" else config)
    latents, _ = latents_of(family, count=2)
    conditioning = family.encode_prompts(["a bold seven", "a thin one"])
    conditioning |= family.image_conditioning(torch.tensor([[16, 16, 0, 0, 16, 16]] * 2))
    family.predict(family.denoiser, latents, family.sample_timesteps(2), conditioning).sum().backward()
    trained = {n: p for n, p in family.denoiser.named_parameters() if p.requires_grad}
    assert len(trained) > 1 and [n for n, p in trained.items() if p.grad is None] == []


def test_empty_prompt_of_sdxl():
    """SDXL is guided away from zeros, so a dropped prompt is zeros; unless the pipeline says otherwise."""
    pipeline = tiny_pipelines.pipeline("sdxl")
    family = get_family(pipeline)
    empty = family.encode_prompts(["a bold seven", ""])
    assert all(tensor[0].abs().max() > 0 and tensor[1].abs().max() == 0 for tensor in empty.values())
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert all(tensor.abs().max() > 0 for tensor in family.encode_prompts([""]).values())


def test_sizes():
    """What a resolution must be divisible by: the VAE's factor, times the transformer's patches."""
    multiples = {
        name: get_family(tiny_pipelines.pipeline(name)).resolution_multiple for name in tiny_pipelines.FAMILIES
    }
    unets = {"sd": 2, "sd_v": 2, "sdxl": 2}
    assert multiples == {**unets, "sd3": 4, "flux": 4, "kontext": 4, "flux2": 4, "klein": 4, "qwen": 4}
    assert get_family(tiny_pipelines.pipeline("sd")).default_resolution == 16


# ---- Unknown pipelines and schedulers -------------------------------------------------------------------------------


def test_unknown_pipeline():
    """Refused with the list of known ones and the way to add another; a registered family is known."""
    assert {"FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"} <= set(
        known_pipelines()
    )
    with pytest.raises(ValueError, match="`OwnPipeline` is not a pipeline.*FluxPipeline, .*register_family"):
        family_class("OwnPipeline")

    @register_family
    class OwnFamily(PipelineFamily):
        pipeline_classes = ("OwnPipeline",)

    assert family_class("OwnPipeline") is OwnFamily
    derived = type("Derived", (tiny_pipelines.StableDiffusionPipeline,), {})
    assert family_class(derived).__name__ == "StableDiffusionFamily"


def test_unknown_schedulers():
    """A prediction type, or a schedule, that the losses are not derived for is refused."""
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="`prediction_type` is 'sample'; known are 'epsilon' and 'v_prediction'"):
        get_family(pipeline)
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="`EDMEulerScheduler`, has no `alphas_cumprod`"):
        get_family(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="has no `alphas_cumprod`"):
        get_family(pipeline)
    pipeline = tiny_pipelines.pipeline("sd3")
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="`DDPMScheduler`, is not a flow-matching one"):
        get_family(pipeline)
