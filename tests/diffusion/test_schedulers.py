"""
Schedulers of all kinds under one pipeline: noise, targets, weights and sampling steps are those of its own schedule,
or the scheduler is refused.
"""

import diffusers
import pytest
import reward_harness
import tiny_pipelines
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trl_ext.diffusion import get_family
from trl_ext.diffusion.rollouts import Sampler
from trl_ext.losses import transition


SIZE = (tiny_pipelines.RESOLUTION, tiny_pipelines.RESOLUTION)
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def family_with(scheduler, name: str = "sd"):
    pipeline = tiny_pipelines.pipeline(name)
    pipeline.scheduler = scheduler
    return get_family(pipeline)


def draws():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "betas",
    [
        {},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": torch.linspace(1e-4, 0.02, 50).tolist(), "num_train_timesteps": 50},
        {"num_train_timesteps": 100},
    ],
    ids=["usual", "zero snr", "linear", "cosine", "own betas", "100 steps"],
)
def test_noise_and_target_of_every_table(betas, prediction_type):
    """Against diffusers' training scheduler of the same table, to the last time, where zero SNR leaves noise alone."""
    settings = SD | betas | {"prediction_type": prediction_type}
    family = family_with(DDIMScheduler(**settings, timestep_spacing="trailing"))
    theirs = DDPMScheduler(**{k: v for k, v in settings.items() if k != "steps_offset"})
    last = settings.get("num_train_timesteps", 1000) - 1
    assert len(family.schedule) == last + 1 and family.schedule[-1] == last
    latents, noise = draws()
    timesteps = torch.tensor([0, last // 2, last])
    torch.testing.assert_close(
        family.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )
    expected = noise if prediction_type == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(family.target(latents, noise, timesteps), expected)
    snr = family.snr(family.schedule)
    assert snr.isfinite().all() and (snr.diff() < 0).all() and (snr[-1] == 0) == ("rescale_betas_zero_snr" in betas)
    if "rescale_betas_zero_snr" in betas:
        assert torch.equal(family.add_noise(latents, noise, timesteps)[-1], noise[-1])


VARIANCE_PRESERVING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_training_does_not_depend_on_the_sampler(name, spacing):
    """
    The same table under every scheduler class, spacing and sampling option, even after an image was sampled: the times
    and the noise of training are those of the table.
    """
    options = {key: value for key, value in SD.items() if key != "steps_offset"}
    scheduler = getattr(diffusers, name)(**options, timestep_spacing=spacing)
    scheduler.set_timesteps(4)
    family, plain = family_with(scheduler), family_with(DDPMScheduler(**options))
    latents, noise = draws()
    timesteps = torch.tensor([0, 500, 999])
    assert torch.equal(family.schedule, torch.arange(1000))
    torch.testing.assert_close(family.add_noise(latents, noise, timesteps), plain.add_noise(latents, noise, timesteps))
    torch.testing.assert_close(family.snr(timesteps), plain.snr(timesteps))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: DDIMScheduler(**SD, prediction_type="sample"), "sd", "`prediction_type` is 'sample'"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "sd",
            "`prediction_type` is 'flow_prediction'",
        ),
        (diffusers.EDMEulerScheduler, "sdxl", "has no `alphas_cumprod`"),
        (lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "sd3", "is not a flow-matching one"),
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "sd3", "`invert_sigmas=True`"),
    ],
)
def test_schedules_that_the_losses_are_not_for(make, name, message):
    with pytest.raises(ValueError, match=message):
        family_with(make(), name)


# ---- Sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.6, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"timestep_spacing": "leading", "rescale_betas_zero_snr": True},
        {"set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ],
    ids=["leading", "trailing", "zero snr", "zero snr not sampled", "last alpha"],
)
def test_steps_are_those_of_ddim(settings, eta):
    """
    Every step of a chain, the first one at zero SNR too: from pure noise a prediction of v is minus the image. (Under
    "linspace" diffusers' DDIM steps to other times than those that it then gives the UNet; here they are the same.)
    """
    scheduler = DDIMScheduler(**SD | settings, clip_sample=False)
    sampler = Sampler.of(family_with(scheduler), 5, SIZE, eta)
    scheduler.set_timesteps(5)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert (sampler.levels[0] == 0) == (
        settings.get("timestep_spacing") == "trailing" and "prediction_type" in settings
    )
    generator = torch.Generator().manual_seed(1)
    for step, time in enumerate(scheduler.timesteps):
        latents, prediction, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        last = step == sampler.num_noisy_steps
        expected = scheduler.step(
            prediction, time, latents, eta=0.0 if last else eta, variance_noise=noise
        ).prev_sample
        mean, std = sampler.transition(latents, prediction, step)
        torch.testing.assert_close(mean + std.view(-1, 1, 1, 1) * noise, expected, rtol=1e-3, atol=1e-4)
        if not last:
            kl = sampler.kl(prediction, prediction + 0.01, step)
            moved = sampler.transition(latents, prediction + 0.01, step).mean
            torch.testing.assert_close(kl, ((moved - mean) / std[0]).square().flatten(1).sum(1) / 2, rtol=1e-2, atol=0)


def test_zero_snr_is_the_limit_of_small_snr():
    generator = torch.Generator().manual_seed(0)
    latents, prediction = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    settings = dict(noise_level=0.7, prediction_type="v_prediction")
    at, near = (transition(latents, prediction, level, 0.1, **settings) for level in (0.0, 1e-14))
    torch.testing.assert_close(at.mean, near.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(at.std, near.std)
    # A batch of both.
    mixed = transition(latents, prediction, torch.tensor([0.0, 0.05, 0.0]), 0.1, **settings)
    assert torch.equal(mixed.mean[[0, 2]], at.mean[[0, 2]]) and mixed.mean.isfinite().all()


def test_images_are_sampled_and_rewarded_from_zero_snr(tmp_path):
    """A whole run on a schedule that starts at pure noise; with predictions of the noise it is refused at once."""
    pipeline = tiny_pipelines.pipeline("sd_v")
    changed = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changed)
    run = reward_harness.trainer(pipeline, tmp_path, max_steps=1)
    assert run.sampler.levels[0] == 0
    run.train()
    logged = run.state.log_history[0]
    assert all(torch.tensor(logged[key]).isfinite() for key in ("loss", "grad_norm", "kl")) and logged["grad_norm"] > 0
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changed)
    with pytest.raises(ValueError, match="zero SNR.*`rescale_betas_zero_snr=True`.*`timestep_spacing='leading'`"):
        reward_harness.trainer(pipeline, tmp_path / "epsilon")
