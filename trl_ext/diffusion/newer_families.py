"""Families of FLUX.1 Kontext, FLUX.2 and Qwen-Image, each as a text-to-image pipeline."""

import math

import torch

from .families import FlowFamily, FluxFamily, PackedFamily, StableDiffusion3Family, pack, register_family, unpack


@register_family
class FluxKontextFamily(FluxFamily):
    """FLUX.1 Kontext without a given image, in which case its transformer sees what FLUX.1's does."""

    pipeline_classes = ("FluxKontextPipeline",)

    def call_arguments(self, conditioning, size, guidance_scale=None):
        # Otherwise the pipeline scales height and width to a megapixel.
        return {**super().call_arguments(conditioning, size, guidance_scale), "max_area": math.prod(size)}


@register_family
class Flux2Family(FlowFamily):
    """
    FLUX.2: the VAE's latents are put together 2 x 2 and normalized by its batch norm, and so they are noised; one
    vision-language model encodes the prompt; the guidance scale is an input.
    """

    pipeline_classes = ("Flux2Pipeline",)
    channels_per_latent = 1
    # Attention of the blocks with two streams, and the input projection of those with one, which is most of them.
    lora_target_modules = [*StableDiffusion3Family.lora_target_modules, "attn.to_qkv_mlp_proj"]
    quantization_skip_modules = [
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "context_embedder",
        "x_embedder",
        "norm_out",
        "proj_out",
    ]
    max_sequence_length = 512

    def _latent_geometry(self):
        factor, channels = super()._latent_geometry()
        return 2 * factor, 4 * channels

    @property
    def is_guidance_distilled(self):
        return self.denoiser.config.guidance_embeds

    @property
    def uses_empty_prompt(self):
        return False

    @property
    def default_resolution(self):
        return self.pipeline.default_sample_size * self.vae_scale_factor // 2

    def encode_prompts(self, prompts):
        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(
                prompts, device=self.text_encoders[0].device, max_sequence_length=self.max_sequence_length
            )
        return {"prompt_embeds": embeds}

    def _conversation(self, prompt: str) -> list[dict]:
        """What the text encoder reads of a prompt."""
        return [
            {"role": "system", "content": [{"type": "text", "text": self.pipeline.system_message}]},
            {"role": "user", "content": [{"type": "text", "text": prompt}]},
        ]

    def count_tokens(self, name, prompts):
        tokenizer = getattr(self.pipeline, name)
        ids = [tokenizer.apply_chat_template(self._conversation(prompt), tokenize=True) for prompt in prompts]
        return [len(each["input_ids"] if hasattr(each, "keys") else each) for each in ids]

    def sampling_conditioning(self, prompts):
        return self.encode_prompts(prompts)

    def sampled_latents(self, output, size):
        height, width = (side // self.vae_scale_factor for side in size)
        return output.transpose(1, 2).reshape(len(output), -1, height, width)

    @staticmethod
    def _patchify(latents: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = latents.shape
        patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return patches.reshape(batch, channels * 4, height // 2, width // 2)

    def _encode(self, pixels):
        return self._patchify(super()._encode(pixels))

    def _decode(self, latents):
        batch, channels, height, width = latents.shape
        patches = latents.view(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return super()._decode(patches.reshape(batch, channels // 4, 2 * height, 2 * width))

    def _latent_shift_and_scale(self, device):
        vae = self.pipeline.vae
        mean, variance = (t.float().view(1, -1, 1, 1).to(device) for t in (vae.bn.running_mean, vae.bn.running_var))
        return mean, 1 / torch.sqrt(variance + vae.config.batch_norm_eps)

    def _dynamic_shift(self, scheduler, tokens, num_steps):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps)

    def predict(self, denoiser, noisy, timesteps, conditioning):
        batch, _, height, width = noisy.shape
        embeds = conditioning["prompt_embeds"].to(noisy.dtype)
        # Coordinates of a token: time, row, column, place in the text.
        rows, columns = torch.arange(height, device=noisy.device), torch.arange(width, device=noisy.device)
        image_ids = torch.zeros(height, width, 4, device=noisy.device, dtype=torch.int64)
        image_ids[..., 1], image_ids[..., 2] = rows[:, None], columns[None, :]
        text_ids = torch.zeros(embeds.shape[1], 4, device=noisy.device, dtype=torch.int64)
        text_ids[:, 3] = torch.arange(embeds.shape[1], device=noisy.device)
        guidance = None
        if denoiser.config.guidance_embeds:
            guidance = torch.full((batch,), self.guidance_scale, device=noisy.device)
        tokens = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=timesteps.to(noisy.dtype) / self.num_train_timesteps,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids.view(-1, 4),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(noisy.shape)


@register_family
class Flux2KleinFamily(Flux2Family):
    """FLUX.2 [klein]: a language model encodes the prompt; guided by the empty prompt unless distilled into steps."""

    pipeline_classes = ("Flux2KleinPipeline",)

    @property
    def is_guidance_distilled(self):
        return False

    @property
    def uses_empty_prompt(self):
        return not self.pipeline.config.is_distilled

    def _conversation(self, prompt):
        return [{"role": "user", "content": prompt}]

    def count_tokens(self, name, prompts):
        tokenizer = getattr(self.pipeline, name)
        counts = []
        for prompt in prompts:
            text = tokenizer.apply_chat_template(
                self._conversation(prompt), tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            counts.append(len(tokenizer(text, truncation=False, verbose=False)["input_ids"]))
        return counts

    def sampled_latents(self, output, size):
        # Of this pipeline they are what the VAE decodes.
        shift, scale = self._latent_shift_and_scale(output.device)
        return (self._patchify(output.float()) - shift) * scale

    def sampling_conditioning(self, prompts):
        conditioning = self.encode_prompts(prompts)
        if not self.uses_empty_prompt:
            return conditioning
        empty = self.encode_prompts([""])["prompt_embeds"]
        return {**conditioning, "negative_prompt_embeds": empty.expand_as(conditioning["prompt_embeds"])}


@register_family
class QwenImageFamily(PackedFamily):
    """
    Qwen-Image: a vision-language model encodes the prompt, whose padding is masked; the VAE, made for videos, sees an
    image as one frame; guidance compares with the prompt " ", as its authors' examples do.
    """

    pipeline_classes = ("QwenImagePipeline",)
    # Without the text's queries and output, which lead to nothing in the last block.
    lora_target_modules = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")]
    quantization_skip_modules = ["time_text_embed", "img_in", "txt_in", "norm_out", "proj_out"]
    max_sequence_length = 512

    def _latent_geometry(self):
        config = self.pipeline.vae.config
        return 2 ** len(config.temperal_downsample), config.z_dim

    def _check_channels(self):
        # The transformer's `out_channels` are those of the latents, its `in_channels` those of a token.
        config, channels = self.denoiser.config, self.latent_channels
        if (config.in_channels, config.out_channels) != (4 * channels, channels):
            raise ValueError(
                f"The `{type(self.denoiser).__name__}` has in_channels={config.in_channels} and "
                f"out_channels={config.out_channels}, but the VAE's {channels} latent channels make {4 * channels} "
                f"and {channels}: it is no text-to-image denoiser. Give a text-to-image pipeline."
            )
        if config.guidance_embeds:
            raise ValueError(
                "`guidance_embeds=True` of a `QwenImageTransformer2DModel` is not supported, by diffusers neither: "
                "its forward fails. Give a pipeline whose transformer has it at False."
            )

    def freeze_unused(self):
        # Of the last block the image's stream alone goes on.
        last = self.denoiser.transformer_blocks[-1]
        for module in (last.attn.add_q_proj, last.attn.norm_added_q, last.attn.to_add_out, last.txt_mlp):
            module.requires_grad_(False)

    def _encode(self, pixels):
        return super()._encode(pixels[:, :, None])[:, :, 0]

    def _decode(self, latents):
        return super()._decode(latents[:, :, None])[:, :, 0]

    def _latent_shift_and_scale(self, device):
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return mean, 1 / std

    def encode_prompts(self, prompts):
        texts = [prompt or " " for prompt in prompts]
        with torch.no_grad():
            embeds, mask = self.pipeline.encode_prompt(
                texts, device=self.text_encoders[0].device, max_sequence_length=self.max_sequence_length
            )
        if mask is None:  # as the pipeline says that nothing is padding
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
        # To one length, so that prompts can be stored and put together; what is padding is cut off again.
        padding = self.max_sequence_length - embeds.shape[1]
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, padding))
        return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.nn.functional.pad(mask, (0, padding))}

    @staticmethod
    def _without_padding(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings up to the longest prompt, and their mask, `None` if nothing is left to mask."""
        mask = mask.bool()
        length = int(mask.sum(1).max())
        embeds, mask = embeds[:, :length], mask[:, :length]
        return embeds, None if mask.all() else mask

    def prompt_limits(self):
        tokenizer, template = self.pipeline.tokenizer, self.pipeline.prompt_template_encode
        suffix = tokenizer(template.partition("{}")[2], add_special_tokens=False)["input_ids"]
        return {"tokenizer": self.max_sequence_length - len(suffix)}

    def call_arguments(self, conditioning, size, guidance_scale=None):
        arguments: dict[str, torch.Tensor | None] = {}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds, mask = self._without_padding(conditioning[name], conditioning[f"{name}_mask"])
            arguments |= {name: embeds, f"{name}_mask": mask}
        # Its `guidance_scale` is an input of models that are distilled.
        scale = {} if guidance_scale is None else {"true_cfg_scale": guidance_scale}
        return {**arguments, **scale, "height": size[0], "width": size[1]}

    def predict(self, denoiser, noisy, timesteps, conditioning):
        batch, _, height, width = noisy.shape
        embeds, mask = self._without_padding(conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"])
        tokens = denoiser(
            hidden_states=pack(noisy),
            timestep=timesteps.to(noisy.dtype) / self.num_train_timesteps,
            encoder_hidden_states=embeds.to(noisy.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)
