r"""
BDIA: a sampler that can be run backward, to find the noise that an image comes from.

Source: *Exact Diffusion Inversion via Bidirectional Integration Approximation*,
https://huggingface.co/papers/2307.10829.

Nodes are numbered i = 0 (most noise) ... K (image). With `Phi(i -> j)` the DDIM move from node i to node j by the
prediction at node i, and one call of the network per step,

    z_1 = Phi(0 -> 1),    z_{i+1} = gamma [z_{i-1} - Phi(i -> i-1)] + Phi(i -> i+1)

which is solved for `z_{i-1}` with the same prediction at `z_i`:

    z_{i-1} = [z_{i+1} - Phi(i -> i+1)] / gamma + Phi(i -> i-1)

**The state is a pair.** Two neighboring nodes determine all the others; one latent does not. A pipeline call takes one
(`latents=`) and starts with a DDIM step, so it samples with [`BDIAScheduler`] but does not return to an inverted
image: [`invert`] and [`sample_from`] carry the pair.

**Inversion divides by gamma at every step**, rounding errors and the mismatch of the chosen start included: they grow
by `gamma^-K`. With `gamma = 1`, the default, they do not grow. As a sampler of 10 to 40 steps 0.5 is more accurate,
and cannot be inverted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from PIL import Image

from .._checks import at_least, between, check_value
from ..training.modes import evaluation_mode
from .families import UNetFamily, get_family


# Inversion is refused where it would multiply errors by more than 1 / _LEAST_SHRINKAGE.
_LEAST_SHRINKAGE = 1e-3

_Init = TypeVar("_Init", bound=Callable)


def _registered(init: _Init) -> _Init:
    """`register_to_config`, whose own signature would hide the arguments from type checkers."""
    return register_to_config(init)


class BDIAScheduler(DDIMScheduler):
    """
    BDIA-DDIM, a drop-in for `diffusers.DDIMScheduler` in any pipeline:
    `pipeline.scheduler = BDIAScheduler.from_config(pipeline.scheduler.config)`. At `gamma=0` it is DDIM.

    Args:
        gamma (`float`, *optional*, defaults to `1.0`):
            Weight of the previous sample, in [0, 1].
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, clip_sample, set_alpha_to_one,
        steps_offset, prediction_type, thresholding, dynamic_thresholding_ratio, clip_sample_range, sample_max_value,
        timestep_spacing, rescale_betas_zero_snr (*optional*):
            As for `diffusers.DDIMScheduler`, except that `clip_sample` defaults to `False`.

    Raises:
        `ValueError`: If `gamma` is not in [0, 1], or for `clip_sample`, `thresholding` and `rescale_betas_zero_snr`:
            the first two change the prediction in a way that the inverse does not know, the last has a level with no
            signal, from which there is no DDIM move.
    """

    @_registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        gamma: float = 1.0,
    ):
        check_value("gamma", gamma, Annotated[float, between(0, 1)])
        refused = dict(
            clip_sample=clip_sample, thresholding=thresholding, rescale_betas_zero_snr=rescale_betas_zero_snr
        )
        for name, value in refused.items():
            if value:
                raise ValueError(
                    f"BDIA does not work with `{name}={value}`. Set it to False: "
                    f"`BDIAScheduler.from_config(config, {name}=False)`."
                )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._node: int | None = None  # of the next step, once there has been one
        self._previous: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Sets the timesteps and forgets what was sampled before. Pipelines call it first.

        Args:
            num_inference_steps (`int`):
                Sampling steps.
            device (`str` or `torch.device`, *optional*):
                Device of the timesteps.
        """
        super().set_timesteps(num_inference_steps, device=device)
        timesteps = self.timesteps.tolist()
        self._nodes = {timestep: node for node, timestep in enumerate(timesteps)}
        last = timesteps[-1] - self.config.num_train_timesteps // num_inference_steps
        end = self.alphas_cumprod[last] if last >= 0 else self.final_alpha_cumprod
        self._levels = [*(self.alphas_cumprod[timestep] for timestep in timesteps), end]
        self._node = self._previous = None

    def begin(self, first: torch.Tensor) -> None:
        """
        Makes the second node the next one to step from, as if `first` had been stepped from.

        Args:
            first (`torch.Tensor` of shape `(B, C, h, w)`):
                Latents at the first node.
        """
        self._node, self._previous = 1, _at_least_float32(first)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """
        One step, in at least float32. The first one after `set_timesteps` is a DDIM step, from whichever timestep it
        is.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, h, w)`):
                The denoiser's output at `sample`.
            timestep (`int`):
                One of `timesteps`; after the first step, the one that follows.
            sample (`torch.Tensor` of shape `(B, C, h, w)`):
                What the last step returned.
            eta (`float`, *optional*, defaults to `0.0`):
                Only 0: noise cannot be inverted.
            use_clipped_model_output, generator, variance_noise:
                As in DDIM, where they have no effect without clipping and noise.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a `DDIMSchedulerOutput` or a tuple.

        Returns:
            `DDIMSchedulerOutput` or `tuple`: `prev_sample`, in the dtype of `sample`, and `pred_original_sample`.

        Raises:
            `ValueError`: If `eta` is not 0, `set_timesteps` was not called, or the timestep is out of order.
        """
        if eta != 0:
            raise ValueError(f"`eta` must be 0 with BDIA, got {eta!r}: a step with noise cannot be inverted.")
        node = self._node_of(timestep)
        if self._node is not None and node != self._node:
            raise ValueError(
                f"`step` expects timestep {self._timestep(self._node)} next, got {int(timestep)}. A step of BDIA "
                "needs the sample before the last one: step through `timesteps` in order, and call `set_timesteps` to "
                "start afresh."
            )
        exact = _at_least_float32(sample)
        clean, noise = self._predictions(_at_least_float32(model_output), exact, node)
        moved = self._move(clean, noise, node + 1)
        if self._previous is not None and self.config.gamma != 0:
            moved = moved + self.config.gamma * (self._previous - self._move(clean, noise, node - 1))
        self._node, self._previous = node + 1, exact
        moved, clean = moved.to(sample.dtype), clean.to(sample.dtype)
        if not return_dict:
            return moved, clean
        return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=clean)

    def unstep(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, next_sample: torch.Tensor
    ) -> torch.Tensor:
        """
        The sample before `sample`: the inverse of [`step`](Self.step), which keeps no state.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, h, w)`):
                The denoiser's output at `sample`, the same as on the way to the image.
            timestep (`int`):
                Timestep of `sample`; any but the first.
            sample (`torch.Tensor` of shape `(B, C, h, w)`):
                Latents at this node.
            next_sample (`torch.Tensor` of shape `(B, C, h, w)`):
                Latents at the next (less noisy) node.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: latents at the node before, in at least float32.

        Raises:
            `ValueError`: For the first timestep, which nothing comes before, a timestep that is not in `timesteps`, or
                `gamma=0`, which is DDIM and has no inverse.
        """
        node = self._node_of(timestep)
        if node == 0:
            raise ValueError(f"`unstep` cannot go back from the first timestep, {int(timestep)}.")
        if self.config.gamma == 0:
            raise ValueError("`unstep` needs a `gamma` above 0, got 0: that is DDIM, which has no inverse.")
        sample = _at_least_float32(sample)
        clean, noise = self._predictions(_at_least_float32(model_output), sample, node)
        ahead = _at_least_float32(next_sample) - self._move(clean, noise, node + 1)
        return ahead / self.config.gamma + self._move(clean, noise, node - 1)

    def from_image(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """
        Latents at the last timestep for an image, by a DDIM inversion step. Any choice can be inverted exactly; this
        one is close to what sampling passes through.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, h, w)`):
                The denoiser's output at the image's latents and the last timestep.
            sample (`torch.Tensor` of shape `(B, C, h, w)`):
                The image's latents.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`, in at least float32.
        """
        last, sample = len(self._nodes) - 1, _at_least_float32(sample)
        _, noise = self._predictions(_at_least_float32(model_output), sample, last)
        end = self._levels[-1]
        return self._move((sample - (1 - end) ** 0.5 * noise) / end**0.5, noise, last)

    def _node_of(self, timestep) -> int:
        if self.num_inference_steps is None:
            raise ValueError("`set_timesteps` must be called before the first step.")
        node = self._nodes.get(int(timestep))
        if node is None:
            raise ValueError(
                f"Timestep {int(timestep)} is not one of the {len(self._nodes)} that `set_timesteps` set: "
                f"{self._timestep(0)} ... {self._timestep(len(self._nodes) - 1)}."
            )
        return node

    def _timestep(self, node: int) -> int | str:
        return next((timestep for timestep, other in self._nodes.items() if other == node), "none (all are done)")

    def _predictions(self, output: torch.Tensor, sample: torch.Tensor, node: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean sample and noise, in DDIM's own arithmetic: at `gamma=0` the two agree bit for bit."""
        signal, noise = self._levels[node] ** 0.5, (1 - self._levels[node]) ** 0.5
        if self.config.prediction_type == "epsilon":
            return (sample - noise * output) / signal, output
        if self.config.prediction_type == "v_prediction":
            return signal * sample - noise * output, signal * output + noise * sample
        if self.config.prediction_type == "sample":
            return output, (sample - signal * output) / noise
        raise ValueError(
            f"`prediction_type` must be 'epsilon', 'v_prediction' or 'sample', got {self.config.prediction_type!r}."
        )

    def _move(self, clean: torch.Tensor, noise: torch.Tensor, node: int) -> torch.Tensor:
        level = self._levels[node]
        return level**0.5 * clean + (1 - level) ** 0.5 * noise


@dataclasses.dataclass(frozen=True)
class NoisePair:
    """
    What an image was inverted to: latents at the two noisiest nodes, and how they were found.

    Args:
        first (`torch.Tensor` of shape `(B, C, h, w)`):
            Latents at the first node. At `gamma=1` their spread is about that of noise.
        second (`torch.Tensor` of shape `(B, C, h, w)`):
            Latents at the second node.
        num_inference_steps (`int`):
            Steps between noise and image.
        gamma (`float`):
            The scheduler's `gamma`.
    """

    first: torch.Tensor
    second: torch.Tensor
    num_inference_steps: int
    gamma: float = 1.0


def invert(
    pipeline: DiffusionPipeline,
    images: Sequence[Image.Image] | torch.Tensor,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 50,
    gamma: float = 1.0,
    guidance_scale: float = 1.0,
) -> NoisePair:
    """
    The noise that images come from, by running [`BDIAScheduler`] backward. [`sample_from`] with the same prompts and
    guidance returns the images' latents to rounding; with other prompts it edits them.

    The round trip is exact for one network in one numerical setting: the same batch size, attention kernels and dtype
    in both directions. Latents are kept in float32 whatever the network computes in; a half-precision network leaves
    an error of a few thousandths.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            A pipeline with a UNet (Stable Diffusion 1.x and 2.x, SDXL). Its scheduler is only read.
        images (`list[PIL.Image.Image]` or `torch.Tensor`):
            Images of one size, which the VAE's factor divides: PIL images, pixels of shape `(B, 3, H, W)` in [-1, 1],
            or latents of shape `(B, C, h, w)` with the VAE's number of channels, as the denoiser sees them.
        prompts (`list[str]`):
            One prompt an image.
        num_inference_steps (`int`, *optional*, defaults to `50`):
            Steps, at least 2.
        gamma (`float`, *optional*, defaults to `1.0`):
            In (0, 1], and refused where `gamma^num_inference_steps` is below 1e-3.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Classifier-free guidance against the empty prompt; 1 is none, in one forward a step instead of two.

    Returns:
        [`NoisePair`].

    Raises:
        `ValueError`: For a pipeline without a UNet family, images and prompts that do not match, or a setting out of
            its range.
    """
    family = _unet_family(pipeline)
    check_value("num_inference_steps", num_inference_steps, Annotated[int, at_least(2)])
    check_value("gamma", gamma, Annotated[float, between(0, 1)])
    shrinkage = gamma**num_inference_steps
    if shrinkage < _LEAST_SHRINKAGE:
        growth = "without bound" if shrinkage == 0 else f"by {1 / shrinkage:.1e}"
        raise ValueError(
            f"`gamma={gamma}` cannot be inverted over num_inference_steps={num_inference_steps}: every error, "
            f"rounding included, grows {growth}. Use gamma=1.0, or fewer steps: gamma^steps must be at least "
            f"{_LEAST_SHRINKAGE}."
        )
    latents = _as_latents(family, images)
    _check_prompts(prompts, len(latents))
    scheduler, predict = _sampler(family, prompts, latents, num_inference_steps, gamma, guidance_scale)

    timesteps = scheduler.timesteps.tolist()
    with torch.no_grad(), evaluation_mode(family.denoiser):
        sample, after = scheduler.from_image(predict(latents, timesteps[-1]), latents), latents
        for timestep in reversed(timesteps[1:]):
            sample, after = scheduler.unstep(predict(sample, timestep), timestep, sample, after), sample
    return NoisePair(sample, after, num_inference_steps, gamma)


def sample_from(
    pipeline: DiffusionPipeline,
    pair: NoisePair,
    prompts: Sequence[str],
    *,
    guidance_scale: float = 1.0,
    output_type: str = "pil",
) -> list[Image.Image] | torch.Tensor:
    """
    Images from a [`NoisePair`], by [`BDIAScheduler`] with the pair's own settings.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            As for [`invert`].
        pair ([`NoisePair`]):
            What [`invert`] returned.
        prompts (`list[str]`):
            One prompt an image: the same ones to get the images back, others to edit them.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            As for [`invert`].
        output_type (`str`, *optional*, defaults to `"pil"`):
            `"pil"` or `"latent"`.

    Returns:
        `list[PIL.Image.Image]`, or `torch.Tensor` of shape `(B, C, h, w)`.

    Raises:
        `ValueError`: For a pipeline without a UNet family, another number of prompts, or an unknown `output_type`.
    """
    family = _unet_family(pipeline)
    if output_type not in ("pil", "latent"):
        raise ValueError(f"`output_type` must be 'pil' or 'latent', got {output_type!r}.")
    _check_prompts(prompts, len(pair.first))
    scheduler, predict = _sampler(family, prompts, pair.first, pair.num_inference_steps, pair.gamma, guidance_scale)
    scheduler.begin(pair.first)
    sample = pair.second
    with torch.no_grad(), evaluation_mode(family.denoiser):
        for timestep in scheduler.timesteps.tolist()[1:]:
            sample = scheduler.step(predict(sample, timestep), timestep, sample).prev_sample
    if output_type == "latent":
        return sample
    pixels = ((family.decode_latents(sample).clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def _sampler(family, prompts, latents, num_inference_steps, gamma, guidance_scale):
    """The scheduler, and the guided prediction of the denoiser at a sample and a timestep."""
    scheduler = BDIAScheduler.from_config(family.pipeline.scheduler.config, gamma=gamma)
    scheduler.set_timesteps(num_inference_steps)
    guided = guidance_scale != 1
    conditioning = family.encode_prompts([*([""] * len(prompts) if guided else []), *prompts])
    height, width = (side * family.vae_scale_factor for side in latents.shape[-2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(next(iter(conditioning.values()))))
    denoiser = family.denoiser
    conditioning = {
        name: tensor.to(denoiser.device)
        for name, tensor in {**conditioning, **family.image_conditioning(sizes)}.items()
    }

    def predict(sample: torch.Tensor, timestep: int) -> torch.Tensor:
        noisy = sample.to(device=denoiser.device, dtype=denoiser.dtype)
        noisy = torch.cat([noisy, noisy]) if guided else noisy
        times = torch.full((len(noisy),), timestep, device=denoiser.device)
        output = family.predict(denoiser, noisy, times, conditioning).to(device=sample.device, dtype=sample.dtype)
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return scheduler, predict


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _as_latents(family: UNetFamily, images) -> torch.Tensor:
    if not isinstance(images, torch.Tensor):
        images = [np.asarray(image.convert("RGB")) for image in images]
        if len({image.shape for image in images}) != 1:
            raise ValueError(
                f"`images` must be one or more of one size, got {sorted({image.shape[:2] for image in images})}."
            )
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if images.dim() != 4 or images.shape[1] not in (3, family.latent_channels) or not images.is_floating_point():
        raise ValueError(
            f"`images` must be pixels of shape (B, 3, H, W) or latents of shape (B, {family.latent_channels}, h, w), "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    images = images.contiguous()
    if images.shape[1] == family.latent_channels:
        return _at_least_float32(images)
    if any(side % family.resolution_multiple for side in images.shape[-2:]):
        raise ValueError(
            f"`images` have {tuple(images.shape[-2:])} pixels, which must be divisible by "
            f"{family.resolution_multiple}. Resize them."
        )
    return family.encode_images(images)


def _unet_family(pipeline) -> UNetFamily:
    family = get_family(pipeline)
    if not isinstance(family, UNetFamily):
        raise ValueError(
            f"`{type(pipeline).__name__}` is a flow, whose sampler is not DDIM. BDIA is there for pipelines with a "
            "UNet: Stable Diffusion 1.x and 2.x, SDXL."
        )
    return family


def _check_prompts(prompts: Sequence[str], count: int) -> None:
    if isinstance(prompts, str) or len(prompts) != count:
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} of them"
        raise ValueError(f"`prompts` must be a list of {count} prompts, one an image, got {got}.")
