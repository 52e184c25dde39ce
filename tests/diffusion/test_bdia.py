"""
BDIA (arXiv 2307.10829): round trips on tiny pipelines, agreement with DDIM, and the accuracy on a Gaussian whose flow
is known.
"""

import math

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DDIMScheduler

from trl_ext.diffusion import BDIAScheduler, NoisePair, invert, sample_from


PROMPTS = ["a red digit", "bold seven"]
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False)


def latents(dtype=torch.float32, seed=0, count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pipeline(family="sd", dtype=torch.float32):
    pipe = tiny_pipelines.pipeline(family)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


@pytest.mark.parametrize("family", ["sd", "sd_v", "sdxl"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.float64, 1e-11)])
def test_round_trip(family, dtype, bound):
    """Image -> pair -> image is exact to rounding with guidance; from the first latent alone it is not."""
    pipe, image = pipeline(family, dtype), latents(dtype)
    options = dict(guidance_scale=3.0)
    pair = invert(pipe, image, PROMPTS, num_inference_steps=20, **options)
    assert pair.first.dtype == dtype and 0.1 < pair.first.std() < 3
    back = sample_from(pipe, pair, PROMPTS, output_type="latent", **options)
    assert (back - image).abs().max() < bound

    scheduler = BDIAScheduler.from_config(pipe.scheduler.config)
    alone = run(pipe, scheduler, pair.first, 20, guidance_scale=3.0)[-1]
    assert (alone - image).abs().max() > 1e-2
    # Another prompt, or no guidance, leads elsewhere: the network takes part.
    assert (sample_from(pipe, pair, PROMPTS, output_type="latent") - image).abs().max() > 1e-3


def run(pipe, scheduler, noise, steps, guidance_scale=1.0):
    """Latents at every node, by the scheduler alone."""
    from trl_ext.diffusion.families import get_family

    family = get_family(pipe)
    empty, conditioning = (family.encode_prompts(p) for p in ([""] * len(noise), PROMPTS[: len(noise)]))
    sizes = family.image_conditioning(torch.tensor([[16, 16, 0, 0, 16, 16]] * len(noise)))
    scheduler.set_timesteps(steps)
    nodes = [noise]
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = torch.full((len(noise),), int(t))
            output, base = (
                family.predict(pipe.unet, nodes[-1].to(pipe.unet.dtype), times, {**c, **sizes})
                for c in (conditioning, empty)
            )
            output = base + guidance_scale * (output - base)
            nodes.append(scheduler.step(output.to(noise.dtype), t, nodes[-1]).prev_sample)
    return nodes


@pytest.mark.parametrize(("gamma", "bound"), [(1.0, 1e-12), (0.9, 1e-11)])
def test_from_noise_and_back(gamma, bound):
    """`unstep` undoes `step` node by node, from the last two nodes to the first."""
    pipe = pipeline(dtype=torch.float64)
    scheduler = BDIAScheduler.from_config(pipe.scheduler.config, gamma=gamma)
    nodes = run(pipe, scheduler, latents(torch.float64), 20)
    conditioning = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    sample, after = nodes[-2], nodes[-1]
    with torch.no_grad():
        for t in scheduler.timesteps.flip(0)[:-1]:
            output = pipe.unet(sample, t, encoder_hidden_states=conditioning).sample
            sample, after = scheduler.unstep(output, t, sample, after), sample
    assert (sample - nodes[0]).abs().max() < bound and (after - nodes[1]).abs().max() < bound


def test_gamma_zero_is_ddim_bit_for_bit():
    for family in ("sd", "sd_v"):
        pipe = pipeline(family)
        bdia = BDIAScheduler.from_config(pipe.scheduler.config, gamma=0.0)
        nodes = run(pipe, bdia, latents(), 10)
        expected = run(pipe, DDIMScheduler.from_config(pipe.scheduler.config), latents(), 10)
        for node, other in zip(nodes, expected, strict=True):
            assert torch.equal(node, other)
        assert not torch.equal(
            run(pipe, BDIAScheduler.from_config(pipe.scheduler.config), latents(), 10)[-1], nodes[-1]
        )


def test_inside_a_pipeline():
    """A drop-in scheduler: the pipeline's call equals the scheduler's own steps, and two calls share no state."""
    pipe = pipeline()
    expected = run(pipe, BDIAScheduler.from_config(pipe.scheduler.config), latents(), 10, guidance_scale=3.0)[-1]
    pipe.scheduler = BDIAScheduler.from_config(pipe.scheduler.config)
    arguments = dict(
        prompt=PROMPTS, latents=latents(), num_inference_steps=10, guidance_scale=3.0, output_type="latent"
    )
    first, second = (pipe(**arguments).images for _ in range(2))
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)


def test_one_network_call_a_step():
    pipe = pipeline()
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pair = invert(pipe, latents(), PROMPTS, num_inference_steps=7)
    assert len(calls) == 7  # the last timestep once for the choice of the pair
    sample_from(pipe, pair, PROMPTS, output_type="latent")
    assert len(calls) == 7 + 6


def test_pixels_and_pil_images():
    """PIL images and pixels are the same images; what comes back is what the VAE makes of their latents."""
    pipe = pipeline()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    from PIL import Image

    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    pair = invert(pipe, images, PROMPTS, num_inference_steps=5)
    other = invert(pipe, pixels.float() / 127.5 - 1, PROMPTS, num_inference_steps=5)
    assert torch.equal(pair.first, other.first) and torch.equal(pair.second, other.second)
    from trl_ext.diffusion.families import get_family

    family = get_family(pipe)
    encoded = family.encode_images(pixels.float() / 127.5 - 1)
    decoded = ((family.decode_latents(encoded).clamp(-1, 1) + 1) * 127.5).round()
    for image, expected in zip(sample_from(pipe, pair, PROMPTS), decoded, strict=True):
        found = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
        assert image.size == (16, 16) and (found - expected).abs().max() <= 1


def test_nothing_is_left_changed():
    """The pipeline's scheduler, its modes and the global random state."""
    pipe = pipeline()
    pipe.unet.train()
    before, state = dict(pipe.scheduler.config), torch.get_rng_state()
    pair = invert(pipe, latents(), PROMPTS, num_inference_steps=4)
    sample_from(pipe, pair, PROMPTS)
    assert type(pipe.scheduler) is DDIMScheduler and dict(pipe.scheduler.config) == before
    assert pipe.scheduler.num_inference_steps is None and pipe.unet.training
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_network_keeps_latents_in_float32():
    pipe, image = pipeline(dtype=torch.bfloat16), latents()
    pair = invert(pipe, image, PROMPTS, num_inference_steps=20)
    back = sample_from(pipe, pair, PROMPTS, output_type="latent")
    assert pair.first.dtype == back.dtype == torch.float32
    assert (back - image).abs().max() < 0.05
    scheduler = BDIAScheduler.from_config(pipe.scheduler.config)
    assert run(pipe, scheduler, latents(torch.bfloat16), 4)[-1].dtype == torch.bfloat16


def gaussian_error(steps, gamma, start=0.7, mean=1.2, variance=0.35**2):
    """Error at the image of one latent dimension whose data are N(mean, variance), where the exact flow is known."""
    scheduler = BDIAScheduler(**SD, gamma=gamma)
    scheduler.set_timesteps(steps)
    sample = torch.full((1,), start, dtype=torch.float64)
    alphas = scheduler.alphas_cumprod.double()
    for t in scheduler.timesteps.tolist():
        a = alphas[t]
        output = (1 - a).sqrt() * (sample - a.sqrt() * mean) / (a * variance + 1 - a)
        sample = scheduler.step(output, t, sample).prev_sample
    first, last = alphas[scheduler.timesteps[0]], alphas[0]
    quantile = (start - first.sqrt() * mean) / (first * variance + 1 - first).sqrt()
    exact = last.sqrt() * mean + quantile * (last * variance + 1 - last).sqrt()
    return (sample - exact).item()


def test_accuracy_as_a_sampler():
    """
    On N(1.2, 0.35^2) with SD's schedule: DDIM's error halves as the steps double, gamma 1 is of second order, and
    gamma 0.5 is the best at few steps. The figures are of an independent computation in numpy.
    """
    figures = {
        (0.0, 10): -0.050,
        (0.0, 40): -0.017,
        (0.5, 10): 0.005,
        (0.5, 40): -0.002,
        (1.0, 10): 0.053,
        (1.0, 40): 0.010,
    }
    for (gamma, steps), expected in figures.items():
        assert gaussian_error(steps, gamma) == pytest.approx(expected, abs=6e-4), (gamma, steps)
    for gamma, steps in figures:  # and the same figures recomputed
        assert gaussian_error(steps, gamma) == pytest.approx(closed_recursion(steps, gamma), abs=1e-5)
    assert gaussian_error(100, 1.0) / gaussian_error(200, 1.0) > 3
    assert gaussian_error(100, 0.0) / gaussian_error(200, 0.0) == pytest.approx(1.9, abs=0.05)


def closed_recursion(steps, gamma, start=0.7, mean=1.2, variance=0.35**2):
    """The recursion of the paper for a prediction that is affine in the sample."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    times = (np.arange(steps) * (1000 // steps) + 1)[::-1]
    a = np.append(alphas[times], alphas[0])

    def move(i, j, z):
        noise = math.sqrt(1 - a[i]) * (z - math.sqrt(a[i]) * mean) / (a[i] * variance + 1 - a[i])
        ratio = math.sqrt(a[j] / a[i])
        return ratio * z + (math.sqrt(1 - a[j]) - ratio * math.sqrt(1 - a[i])) * noise

    nodes = [start, move(0, 1, start)]
    for i in range(1, steps):
        nodes.append(gamma * (nodes[-2] - move(i, i - 1, nodes[-1])) + move(i, i + 1, nodes[-1]))
    quantile = (start - math.sqrt(a[0]) * mean) / math.sqrt(a[0] * variance + 1 - a[0])
    return nodes[-1] - math.sqrt(a[-1]) * mean - quantile * math.sqrt(a[-1] * variance + 1 - a[-1])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_every_spacing_inverts(spacing, set_alpha_to_one):
    """
    With a made-up prediction that is not linear: what `step` does, `unstep` undoes, the end at no noise included.
    """
    scheduler = BDIAScheduler(**SD | dict(timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one))
    scheduler.set_timesteps(15)
    nodes = [latents(torch.float64)]
    for t in scheduler.timesteps:
        nodes.append(scheduler.step(torch.tanh(2 * nodes[-1]), t, nodes[-1]).prev_sample)
    sample, after = nodes[-2], nodes[-1]
    for t in scheduler.timesteps.flip(0)[:-1]:
        sample, after = scheduler.unstep(torch.tanh(2 * sample), t, sample, after), sample
    assert (sample - nodes[0]).abs().max() < 1e-12


def test_config_is_saved_and_loaded(tmp_path):
    scheduler = BDIAScheduler(**SD, gamma=0.5, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    loaded = BDIAScheduler.from_pretrained(tmp_path)
    assert loaded.config.gamma == 0.5 and loaded.config.prediction_type == "v_prediction"
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert DDIMScheduler.from_config(scheduler.config).config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gamma=1.5), "gamma.*1.5"),
        (dict(gamma=-0.1), "gamma.*-0.1"),
        (dict(clip_sample=True), "`clip_sample=True`"),
        (dict(thresholding=True), "`thresholding=True`"),
        (dict(rescale_betas_zero_snr=True), "`rescale_betas_zero_snr=True`"),
    ],
)
def test_refused_schedulers(options, message):
    with pytest.raises(ValueError, match=message):
        BDIAScheduler(**SD | options)


def test_refused_steps():
    scheduler = BDIAScheduler(**SD)
    sample = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(sample, 1, sample)
    scheduler.set_timesteps(4)  # 751, 501, 251, 1
    with pytest.raises(ValueError, match="`eta` must be 0.*0.5"):
        scheduler.step(sample, 751, sample, eta=0.5)
    with pytest.raises(ValueError, match="Timestep 750 is not one of the 4"):
        scheduler.step(sample, 750, sample)
    scheduler.step(sample, 751, sample)
    with pytest.raises(ValueError, match="expects timestep 501 next, got 251"):
        scheduler.step(sample, 251, sample)
    for t in (501, 251, 1):
        scheduler.step(sample, t, sample)
    with pytest.raises(ValueError, match="all are done"):
        scheduler.step(sample, 751, sample)
    with pytest.raises(ValueError, match="first timestep, 751"):
        scheduler.unstep(sample, 751, sample, sample)
    scheduler = BDIAScheduler(**SD, gamma=0.0)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`gamma` above 0, got 0"):
        scheduler.unstep(sample, 501, sample, sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gamma=0.5), r"gamma=0.5.*num_inference_steps=10.*by 1.0e\+03.*gamma=1.0"),
        (dict(gamma=0.0), "gamma=0.0.*without bound"),
        (dict(gamma=2.0), "gamma.*2.0"),
        (dict(num_inference_steps=1), "num_inference_steps.*1"),
        (dict(prompts=["a"]), "list of 2 prompts, one an image, got 1 of them"),
        (dict(prompts="a red digit"), "list of 2 prompts.*got one string"),
        (dict(images=torch.zeros(2, 5, 8, 8)), r"latents of shape \(B, 4, h, w\), got.*\(2, 5, 8, 8\)"),
        (dict(images=torch.zeros(2, 3, 15, 16)), r"\(15, 16\) pixels.*divisible by 2"),
        (dict(images=[]), "one or more of one size"),
    ],
)
def test_refused_inversions(options, message):
    arguments = dict(images=latents(), prompts=PROMPTS, num_inference_steps=10) | options
    with pytest.raises(ValueError, match=message):
        invert(pipeline(), **arguments)


def test_longest_inversion_that_gamma_allows():
    """0.5^9 is 2e-3 and allowed, 0.5^10 is 1e-3 less a little and refused."""
    pair = invert(pipeline(), latents(), PROMPTS, num_inference_steps=9, gamma=0.5)
    assert (pair.gamma, pair.num_inference_steps) == (0.5, 9)


def test_refused_pipelines_and_outputs():
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline.*is a flow"):
        invert(pipeline("sd3"), latents(), PROMPTS)
    pair = NoisePair(latents(), latents(), 4)
    with pytest.raises(ValueError, match="`output_type` must be .* got 'np'"):
        sample_from(pipeline(), pair, PROMPTS, output_type="np")
    with pytest.raises(ValueError, match="list of 2 prompts"):
        sample_from(pipeline(), pair, PROMPTS[:1])
