"""
The interface between the trainers and text-to-image pipelines, with one class for each family of pipelines.

To train a pipeline of another class, subclass [`PipelineFamily`] (or [`FlowFamily`] for a rectified flow), name
its pipeline classes, and decorate it with [`register_family`]. No other code depends on the kind of pipeline.
"""

import inspect
import math
from typing import TYPE_CHECKING, ClassVar

import torch


if TYPE_CHECKING:  # diffusers is optional
    from diffusers import DiffusionPipeline


TIMESTEP_SAMPLING = ("uniform", "logit_normal")

_FAMILIES: dict[str, type["PipelineFamily"]] = {}


def register_family(family: type["PipelineFamily"]) -> type["PipelineFamily"]:
    """Class decorator that registers `family` for the pipeline classes that it names."""
    for name in family.pipeline_classes:
        _FAMILIES[name] = family
    return family


def known_pipelines() -> list[str]:
    """Returns the names of the pipeline classes that can be trained."""
    return sorted(_FAMILIES)


def family_class(pipeline_class: type | str) -> type["PipelineFamily"]:
    """
    Returns the family of a pipeline class or of one of its bases; a class may be given by its name.

    Raises:
        `ValueError`: If there is none.
    """
    if isinstance(pipeline_class, str):
        names = [pipeline_class]
    else:
        names = [cls.__name__ for cls in pipeline_class.__mro__]
    for name in names:
        if name in _FAMILIES:
            return _FAMILIES[name]
    raise ValueError(
        f"`{names[0]}` is not a pipeline that can be trained; known are {', '.join(known_pipelines())}. For another "
        "text-to-image pipeline subclass `trl_ext.diffusion.PipelineFamily` and decorate it with "
        "`trl_ext.diffusion.register_family`."
    )


def _without_autocast(device: torch.device):
    """Switches autocast off, so that the VAE computes in its own dtype. SDXL's overflows to black images in fp16."""
    return torch.autocast(device.type, enabled=False)


def get_family(pipeline: "DiffusionPipeline") -> "PipelineFamily":
    """Returns the family of a pipeline instance, with that pipeline."""
    return family_class(type(pipeline))(pipeline)


class PipelineFamily:
    """
    A pipeline as the trainers use it: it encodes prompts and images, samples a time, adds noise, predicts, and returns
    the target of the prediction.

    Conditioning is a `dict[str, torch.Tensor]` whose tensors have one row for each prompt, so that other code can
    store, index, concatenate and batch it without knowing its contents.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            The pipeline. Its scheduler is only read, as sampling an image changes a scheduler's timesteps.

    Class attributes:
        pipeline_classes (`tuple[str, ...]`):
            Names of the pipeline classes of this family.
        denoiser_name (`str`):
            Component that is trained: `"unet"` or `"transformer"`.
        text_encoder_names (`tuple[str, ...]`):
            Components that only `encode_prompts` uses.
        lora_target_modules (`list[str]`):
            Default of the `target_modules` of a LoRA.
        quantization_skip_modules (`list[str]`):
            Linear layers that are not quantized: the few that carry time and pooled conditioning to every block, and
            those at the ends.
        timestep_sampling, error_space (`str`):
            Defaults of the options of these names.
        channels_per_latent (`int`, *optional*):
            Input channels of the denoiser for each channel of the latents, `None` to leave them unchecked.
        max_sequence_length (`int`, *optional*):
            Tokens of a prompt that text encoders other than CLIP's read.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    denoiser_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_target_modules: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]
    quantization_skip_modules: ClassVar[list[str]] = []
    timestep_sampling: ClassVar[str] = "uniform"
    error_space: ClassVar[str] = "epsilon"
    channels_per_latent: ClassVar[int | None] = None
    max_sequence_length: ClassVar[int | None] = None

    def __init__(self, pipeline: "DiffusionPipeline"):
        self.pipeline = pipeline
        # Read here, as the VAE may be freed later.
        self.vae_scale_factor, self.latent_channels = self._latent_geometry()
        self._check_channels()
        # Guidance scale that guidance-distilled models get as an input in training. It defaults to that of the
        # pipeline's call, with which the model will be sampled.
        call = inspect.signature(type(pipeline).__call__).parameters
        self.guidance_scale = call["guidance_scale"].default if "guidance_scale" in call else None

    def _latent_geometry(self) -> tuple[int, int]:
        """Pixels to a side of a latent, and channels of the latents."""
        config = self.pipeline.vae.config
        return 2 ** (len(config.block_out_channels) - 1), config.latent_channels

    def _check_channels(self) -> None:
        if self.channels_per_latent is None:
            return
        wanted = self.channels_per_latent * self.latent_channels
        for option in ("in_channels", "out_channels"):
            found = self.denoiser.config.get(option)
            if found not in (None, wanted):
                kind = "inpainting, editing and depth models take an image beside the noisy one"
                if option == "out_channels":
                    kind = "models that also predict a variance are not supported"
                raise ValueError(
                    f"The `{type(self.denoiser).__name__}` has {option}={found}, but the VAE's {self.latent_channels} "
                    f"latent channels make {wanted}: it is no text-to-image denoiser ({kind}). Give a "
                    "text-to-image pipeline."
                )

    # ---- Components ------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> torch.nn.Module:
        """The component that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The text encoders that the pipeline has; SD3 can be loaded without its T5."""
        encoders = [getattr(self.pipeline, name, None) for name in self.text_encoder_names]
        return [encoder for encoder in encoders if encoder is not None]

    def freeze_unused(self) -> None:
        """
        Freezes parameters of the denoiser that its output does not depend on: they have no gradient, for which DDP
        would wait.
        """

    def free(self, names: list[str]) -> None:
        """Sets components of the pipeline to `None`, so that their memory can be freed."""
        self.pipeline.register_modules(**dict.fromkeys(names))

    @property
    def resolution_multiple(self) -> int:
        """Divisor of an image's height and width in pixels."""
        return self.vae_scale_factor

    @property
    def default_resolution(self) -> int:
        """Height and width in pixels that the pipeline samples by default."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: `"epsilon"`, `"v_prediction"` or `"flow"`."""
        raise NotImplementedError

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input."""
        return False

    @property
    def uses_empty_prompt(self) -> bool:
        """Whether the pipeline samples with the empty prompt beside the given one (classifier-free guidance)."""
        return not self.is_guidance_distilled

    @property
    def num_train_timesteps(self) -> int:
        """End of the range of `timesteps`, which starts at 0 (no noise)."""
        return self.pipeline.scheduler.config.num_train_timesteps

    def prompt_limits(self) -> dict[str, int]:
        """Number of a prompt's tokens that each tokenizer of the pipeline, given by its name, keeps."""
        limits = {}
        for name in self.text_encoder_names:
            name = name.replace("text_encoder", "tokenizer")
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is not None:
                # CLIP's position embeddings end there. T5 has none; the pipeline's own limit cuts its prompts.
                is_clip = "CLIP" in type(tokenizer).__name__
                limits[name] = tokenizer.model_max_length if is_clip else self.max_sequence_length
        return {name: limit for name, limit in limits.items() if limit is not None}

    def count_tokens(self, name: str, prompts: list[str]) -> list[int]:
        """Number of tokens of each prompt before it is cut, with those that the tokenizer `name` adds."""
        tokenizer = getattr(self.pipeline, name)
        ids = tokenizer(prompts, truncation=False, padding=False, verbose=False)["input_ids"]
        return [len(tokens) for tokens in ids]

    # ---- Encoding --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        Returns the conditioning of `prompts`, one row for each, without gradient, in the text encoders' dtype and on
        their device.

        The conditioning of `""` is the unconditional one of the pipeline's guidance.
        """
        raise NotImplementedError

    def image_conditioning(self, size_conditioning: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Returns the conditioning on how the images were resized and cropped, to be merged with that of the prompts.
        Empty for most families.

        Args:
            size_conditioning (`torch.Tensor` of shape `(B, 6)`):
                Original height and width, top and left of the crop in the resized image, and height and width of the
                training image, all in pixels.
        """
        return {}

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Returns latents in the denoiser's scale, without gradient: the mode of the VAE's posterior, so that the same
        image always has the same latents.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, C, H / f, W / f)`, float32, with `f` the VAE's factor.
        """
        vae = self.pipeline.vae
        with torch.no_grad(), _without_autocast(vae.device):
            latents = self._encode(pixels.to(device=vae.device, dtype=vae.dtype)).float()
        shift, scale = self._latent_shift_and_scale(latents.device)
        # A VAE may return channels-last memory. The denoiser would round differently on it than on cached latents.
        return ((latents - shift) * scale).contiguous()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mode of the VAE's posterior, in the shape of the latents and before their scale."""
        return self.pipeline.vae.encode(pixels).latent_dist.mode()

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverts `encode_images`: returns pixels of shape `(B, 3, H, W)`, approximately in [-1, 1], in float32."""
        vae = self.pipeline.vae
        shift, scale = self._latent_shift_and_scale(latents.device)
        with torch.no_grad(), _without_autocast(vae.device):
            return self._decode((latents.float() / scale + shift).to(device=vae.device, dtype=vae.dtype)).float()

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of latents as `_encode` returns them."""
        return self.pipeline.vae.decode(latents).sample

    def _latent_shift_and_scale(self, device) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        config = self.pipeline.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
            return mean, config.scaling_factor / std
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def sampling_conditioning(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Returns keyword arguments of the pipeline's call in place of `prompts`, so that it needs no text encoder."""
        conditioning = self.encode_prompts(prompts)
        empty = self.encode_prompts([""])
        negative = {f"negative_{name}": tensor.expand_as(conditioning[name]) for name, tensor in empty.items()}
        return {**conditioning, **negative}

    def call_arguments(
        self, conditioning: dict[str, torch.Tensor], size: tuple[int, int], guidance_scale: float | None = None
    ) -> dict:
        """
        Returns keyword arguments of the pipeline's call that samples an image for each row of the conditioning.

        Args:
            conditioning (`dict[str, torch.Tensor]`):
                Rows of `sampling_conditioning`.
            size (`tuple[int, int]`):
                Height and width in pixels.
            guidance_scale (`float`, *optional*):
                Guidance scale. Defaults to the pipeline's.
        """
        arguments = {**conditioning, "height": size[0], "width": size[1]}
        return arguments if guidance_scale is None else {**arguments, "guidance_scale": guidance_scale}

    def sampled_latents(self, output: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """
        Converts the pipeline's output under `output_type="latent"`, for images of `size` pixels, to `(B, C, h, w)`.
        """
        return output

    # ---- Noise -----------------------------------------------------------------------------------------------------

    def sample_timesteps(
        self,
        count: int,
        *,
        sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Draws times from the schedule that the pipeline was trained on.

        Args:
            count (`int`):
                Number of times.
            sampling (`str`, *optional*, defaults to `"uniform"`):
                `"uniform"`, or `"logit_normal"` (https://huggingface.co/papers/2403.03206): the position in the
                schedule is the sigmoid of a normal variable with `logit_mean` and `logit_std`. A positive mean favors
                high noise.
            generator (`torch.Generator`, *optional*):
                Generator on the CPU.

        Returns:
            `torch.Tensor` of shape `(count,)`, on the CPU, in the pipeline's own units, growing with the noise: int64
            in [0, 999] for UNets, float32 in (0, 1000] for flows.
        """
        if sampling == "uniform":
            fraction = torch.rand(count, generator=generator)
        elif sampling == "logit_normal":
            fraction = torch.sigmoid(torch.randn(count, generator=generator) * logit_std + logit_mean)
        else:
            raise ValueError(
                f"`timestep_sampling` must be one of {', '.join(map(repr, TIMESTEP_SAMPLING))}, got {sampling!r}."
            )
        schedule = self.schedule
        # A fraction may round to 1.
        return schedule[(fraction * len(schedule)).long().clamp(max=len(schedule) - 1)]

    @property
    def schedule(self) -> torch.Tensor:
        """The times that training draws from, growing with the noise, of shape `(T,)`."""
        raise NotImplementedError

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Returns `latents` noised to `timesteps`, in float32; latents and noise are `(B, C, h, w)`, timesteps `(B,)`.
        """
        raise NotImplementedError

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the target of the prediction, in float32, of the latents' shape."""
        raise NotImplementedError

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """
        Returns the prediction of `denoiser`: the policy, the reference, or a copy, and not always the pipeline's own.

        Args:
            denoiser (`torch.nn.Module`):
                A model of the family's denoiser class.
            noisy (`torch.Tensor` of shape `(B, C, h, w)`):
                Noisy latents, in the dtype that the denoiser computes in.
            timesteps (`torch.Tensor` of shape `(B,)`):
                As `sample_timesteps` returns them.
            conditioning (`dict[str, torch.Tensor]`):
                Of `encode_prompts` and `image_conditioning`, B rows.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`.
        """
        raise NotImplementedError

    def epsilon_error_weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Returns the factor, of shape `(B,)`, between the squared error of the prediction and that of the noise that it
        implies.
        """
        raise NotImplementedError

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the signal-to-noise ratio at `timesteps`, of shape `(B,)`, in float32."""
        raise NotImplementedError

    def sampling_schedule(self, num_steps: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the nodes of a sampler with `num_steps` steps, the noisiest first: the timesteps, of shape
        `(num_steps,)`, as the denoiser takes them, and the levels of [`~trl_ext.losses.transition`], of shape
        `(num_steps + 1,)` in float64, whose last is that of the image.

        Args:
            num_steps (`int`):
                Steps of the sampler.
            size (`tuple[int, int]`):
                Height and width of the image in pixels; the schedule of FLUX depends on it.

        Raises:
            `ValueError`: If the schedule has fewer than `num_steps` nodes of different noise.
        """
        raise NotImplementedError


def _check_steps(num_steps: int, limit: int) -> None:
    if not 1 <= num_steps <= limit:
        raise ValueError(f"`num_inference_steps={num_steps}` must be at least 1 and at most {limit}, the schedule's.")


def _checked_schedule(timesteps: torch.Tensor, levels: torch.Tensor, is_growing: bool):
    change = levels.diff() if is_growing else -levels.diff()
    if not (change > 0).all():
        raise ValueError(
            f"The scheduler's {len(timesteps)} sampling steps are not each less noisy than the one before: levels "
            f"{levels.tolist()}. Use fewer steps, or another `timestep_spacing` of the scheduler."
        )
    return timesteps, levels


class UNetFamily(PipelineFamily):
    """
    A variance-preserving diffusion with a table of alphas, as in DDPM: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    The UNet predicts the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0.
    """

    quantization_skip_modules = ["time_embedding", "add_embedding", "time_emb_proj"]
    channels_per_latent = 1

    def __init__(self, pipeline: "DiffusionPipeline"):
        super().__init__(pipeline)
        scheduler = pipeline.scheduler
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise ValueError(
                f"The pipeline's scheduler, a `{type(scheduler).__name__}`, has no `alphas_cumprod`, so it has no "
                "DDPM schedule, for which the losses are derived. Load the pipeline with the scheduler that it was "
                "trained with."
            )
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The scheduler's `prediction_type` is {self.prediction_type!r}; known are 'epsilon' and "
                "'v_prediction'. If the UNet predicts one of these, set it: "
                "`pipeline.scheduler.register_to_config(prediction_type='epsilon')`."
            )
        self._alphas_cumprod = alphas.detach().float().cpu().clone()

    @property
    def prediction_type(self):
        return self.pipeline.scheduler.config.get("prediction_type", "epsilon")

    @property
    def is_guidance_distilled(self):
        return self.denoiser.config.get("time_cond_proj_dim") is not None

    def _guidance_input(self, denoiser, noisy: torch.Tensor) -> torch.Tensor | None:
        """The embedded guidance scale that LCM-like UNets take, as the pipeline embeds it."""
        size = denoiser.config.get("time_cond_proj_dim")
        if size is None:
            return None
        assert self.guidance_scale is not None  # a pipeline whose denoiser takes a scale has one
        scales = torch.full((len(noisy),), self.guidance_scale - 1.0)
        return self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=size).to(noisy.device, noisy.dtype)

    @property
    def schedule(self):
        return torch.arange(len(self._alphas_cumprod))

    def _alphas(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self._alphas_cumprod.device != timesteps.device:
            self._alphas_cumprod = self._alphas_cumprod.to(timesteps.device)
        return self._alphas_cumprod[timesteps]

    def _signal_and_noise(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self._alphas(timesteps).view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents, noise, timesteps):
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * latents.float() + sigma * noise.float()

    def target(self, latents, noise, timesteps):
        if self.prediction_type == "epsilon":
            return noise.float()
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * noise.float() - sigma * latents.float()

    def epsilon_error_weight(self, timesteps):
        # noise = sqrt(a) v + sqrt(1 - a) x_t, and x_t is given.
        alphas = self._alphas(timesteps)
        return torch.ones_like(alphas) if self.prediction_type == "epsilon" else alphas

    def snr(self, timesteps):
        alphas = self._alphas(timesteps)
        return alphas / (1 - alphas)

    def sampling_schedule(self, num_steps, size):
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        _check_steps(num_steps, len(self._alphas_cumprod))
        scheduler.set_timesteps(num_steps)
        alphas = scheduler.alphas_cumprod.double()
        levels = torch.cat(
            [alphas[scheduler.timesteps], torch.as_tensor(scheduler.final_alpha_cumprod)[None].double()]
        )
        if self.prediction_type == "epsilon" and levels[0] == 0:
            raise ValueError(
                "The scheduler's first sampling step is at zero SNR (`rescale_betas_zero_snr=True`), where a "
                "prediction of the noise ('epsilon') determines no image. Such schedules need a UNet that predicts v "
                "(`prediction_type='v_prediction'`); with `timestep_spacing='leading'` the step is not sampled."
            )
        return _checked_schedule(scheduler.timesteps, levels, is_growing=True)


@register_family
class StableDiffusionFamily(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    pipeline_classes = ("StableDiffusionPipeline",)

    def encode_prompts(self, prompts):
        pipeline = self.pipeline
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(
                prompts, pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": embeds}

    def predict(self, denoiser, noisy, timesteps, conditioning):
        embeds = conditioning["prompt_embeds"].to(noisy.dtype)
        guidance = self._guidance_input(denoiser, noisy)
        return denoiser(noisy, timesteps, timestep_cond=guidance, encoder_hidden_states=embeds, return_dict=False)[0]


@register_family
class StableDiffusionXLFamily(UNetFamily):
    """Stable Diffusion XL: two text encoders, and conditioning on the image's original size and crop."""

    pipeline_classes = ("StableDiffusionXLPipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2")

    def encode_prompts(self, prompts):
        pipeline = self.pipeline
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompts, device=self.text_encoders[0].device, do_classifier_free_guidance=False
            )
        if pipeline.config.force_zeros_for_empty_prompt:
            # Most SDXL pipelines guide away from zeros and not from the embedding of "".
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds = embeds.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def image_conditioning(self, size_conditioning):
        return {"time_ids": size_conditioning.float()}

    def predict(self, denoiser, noisy, timesteps, conditioning):
        added = {
            "text_embeds": conditioning["pooled_prompt_embeds"].to(noisy.dtype),
            "time_ids": conditioning["time_ids"].to(noisy.dtype),
        }
        return denoiser(
            noisy,
            timesteps,
            timestep_cond=self._guidance_input(denoiser, noisy),
            encoder_hidden_states=conditioning["prompt_embeds"].to(noisy.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class FlowFamily(PipelineFamily):
    """
    A rectified flow: x_s = (1 - s) x_0 + s noise, with s = timestep / 1000; the transformer predicts noise - x_0.

    The schedule is that of the pipeline's scheduler as constructed, its static shift included.
    """

    denoiser_name = "transformer"
    timestep_sampling = "logit_normal"
    # A constant beta on the velocity's error works better than beta (1 - s)^2, the exact counterpart of DDPM's
    # schedule, which led to reward hacking (https://huggingface.co/papers/2501.13918).
    error_space = "prediction"

    def __init__(self, pipeline: "DiffusionPipeline"):
        super().__init__(pipeline)
        # A new scheduler: sampling an image leaves only the few sampled timesteps in the pipeline's.
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None or "FlowMatch" not in type(scheduler).__name__:
            raise ValueError(
                f"The pipeline's scheduler, a `{type(scheduler).__name__}`, is not a flow-matching one, for which "
                "the losses of this pipeline are derived. Load the pipeline with the scheduler that it was trained "
                "with."
            )
        if scheduler.config.get("invert_sigmas"):
            raise ValueError(
                "The pipeline's scheduler has `invert_sigmas=True`: its times grow with the image and not with the "
                "noise, for which the losses are not derived. Load a pipeline whose scheduler does not invert them."
            )
        self._schedule = scheduler.timesteps.detach().float().cpu().flip(0).clone()

    @property
    def prediction_type(self):
        return "flow"

    @property
    def schedule(self):
        return self._schedule

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float() / self.num_train_timesteps

    def add_noise(self, latents, noise, timesteps):
        sigmas = self._sigmas(timesteps).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents.float() + sigmas * noise.float()

    def target(self, latents, noise, timesteps):
        return noise.float() - latents.float()

    def epsilon_error_weight(self, timesteps):
        # noise = x_s + (1 - s) v, and x_s is given.
        return (1 - self._sigmas(timesteps)).square()

    def snr(self, timesteps):
        sigmas = self._sigmas(timesteps)
        return ((1 - sigmas) / sigmas).square()

    def sampling_schedule(self, num_steps, size):
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        _check_steps(num_steps, self.num_train_timesteps)
        if scheduler.config.get("use_dynamic_shifting"):
            tokens = math.prod(side // self.resolution_multiple for side in size)
            sigmas = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
            scheduler.set_timesteps(sigmas=sigmas, mu=self._dynamic_shift(scheduler, tokens, num_steps))
        else:
            scheduler.set_timesteps(num_steps)
        return _checked_schedule(scheduler.timesteps, scheduler.sigmas.double(), is_growing=False)

    def _dynamic_shift(self, scheduler, tokens: int, num_steps: int) -> float:
        """The shift of a sampler's schedule, as the pipeline makes it: FLUX's grows with the number of tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(tokens, *(scheduler.config[name] for name in names))


@register_family
class StableDiffusion3Family(FlowFamily):
    """Stable Diffusion 3 and 3.5."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    channels_per_latent = 1
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_target_modules = [
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ]
    quantization_skip_modules = ["time_text_embed", "context_embedder", "norm_out", "proj_out"]

    max_sequence_length = 256

    @property
    def resolution_multiple(self):
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def encode_prompts(self, prompts):
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                prompt_3=None,
                device=self.text_encoders[0].device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser, noisy, timesteps, conditioning):
        return denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(noisy.dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(noisy.dtype),
            return_dict=False,
        )[0]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Packs latents of shape `(B, C, h, w)` 2 x 2 into a sequence of tokens of shape `(B, h w / 4, 4 C)`."""
    batch, channels, height, width = latents.shape
    packed = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return packed.reshape(batch, -1, channels * 4)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverts [`pack`]."""
    batch, _, size = tokens.shape
    unpacked = tokens.view(batch, height // 2, width // 2, size // 4, 2, 2)
    return unpacked.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // 4, height, width)


class PackedFamily(FlowFamily):
    """A flow whose transformer takes latents packed 2 x 2 into a sequence, as its pipeline returns them, too."""

    channels_per_latent = 4

    @property
    def resolution_multiple(self):
        return self.vae_scale_factor * 2

    @property
    def default_resolution(self):
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def sampled_latents(self, output, size):
        height, width = (side // self.vae_scale_factor for side in size)
        return unpack(output, height, width)


@register_family
class FluxFamily(PackedFamily):
    """FLUX.1: latents packed 2x2 into a sequence, and for the guidance-distilled models a guidance scale as input."""

    pipeline_classes = ("FluxPipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2")
    lora_target_modules = StableDiffusion3Family.lora_target_modules
    quantization_skip_modules = ["time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out"]

    max_sequence_length = 512

    @property
    def is_guidance_distilled(self):
        return self.denoiser.config.guidance_embeds

    @property
    def uses_empty_prompt(self):
        return False  # FLUX.1-schnell neither: it is distilled into few steps without guidance

    def encode_prompts(self, prompts):
        with torch.no_grad():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                device=self.text_encoders[0].device,
                max_sequence_length=self.max_sequence_length,
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def sampling_conditioning(self, prompts):
        # Distilled models are guided by an input, and take no negative prompt.
        return self.encode_prompts(prompts)

    def predict(self, denoiser, noisy, timesteps, conditioning):
        batch, _, height, width = noisy.shape
        embeds = conditioning["prompt_embeds"].to(noisy.dtype)
        image_ids = torch.zeros(height // 2, width // 2, 3, device=noisy.device, dtype=noisy.dtype)
        image_ids[..., 1] = torch.arange(height // 2, device=noisy.device)[:, None]
        image_ids[..., 2] = torch.arange(width // 2, device=noisy.device)[None, :]
        arguments = dict(
            hidden_states=pack(noisy),
            timestep=timesteps.to(noisy.dtype) / self.num_train_timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(noisy.dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=image_ids.view(-1, 3),
            return_dict=False,
        )
        if denoiser.config.guidance_embeds:
            arguments["guidance"] = torch.full((batch,), self.guidance_scale, device=noisy.device)
        return unpack(denoiser(**arguments)[0], height, width)
