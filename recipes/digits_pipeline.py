"""
A small text-to-image pipeline that writes digits, trained from nothing in minutes on two CPU cores.

It is a real `StableDiffusionPipeline` (an `AutoencoderKL` with a factor of 4, a `CLIPTextModel` with a BPE tokenizer
of its own, a `UNet2DConditionModel` with cross-attention), only narrow: 4 million parameters. What works on it works
on Stable Diffusion 1.5 with the same code.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digits import NAMES, SIZE, WORDINGS, Digits, caption


MAX_TOKENS = 12  # the longest caption has 8, with the two special tokens
EMPTY = len(WORDINGS) * len(NAMES)  # index of the empty caption, which guidance subtracts
PENS = (-1.3, 0.8)  # pixels by which the outlines of the training images are moved: from hairlines to bold


@dataclass
class PretrainingConfig:
    """Length and size of the training; the folder of the pipeline is named after all of it."""

    vae_steps: int = 400
    vae_batch_size: int = 32
    unet_steps: int = 1200
    unet_batch_size: int = 32
    unet_channels: tuple[int, int] = (64, 128)
    drawings: int = 5  # of each digit, with pens of different widths
    seed: int = 0


def progress(steps: int, description: str):
    """A one-line progress bar that disappears at the end; none if the output is not a terminal."""
    from tqdm import tqdm

    return tqdm(range(steps), desc=f"      {description}", leave=False, disable=None, ncols=100)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Images of shape `(N, H, W)` in [0, 1] as the VAE takes them: `(N, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(images * 2 - 1)[:, None].repeat(1, 3, 1, 1)


def make_tokenizer():
    """CLIP's tokenizer with a vocabulary learned from the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    captions = [caption(digit, wording) for wording in range(len(WORDINGS)) for digit in range(len(NAMES))]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def optimize(parameters, lr: float, steps: int):
    """AdamW with a one-cycle schedule, as a function that takes a loss and makes a step."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return step


@torch.no_grad()
def standardize(vae, latents: torch.Tensor) -> None:
    """
    Changes an autoencoder so that its latents have mean 0 and standard deviation 1 in each channel, as the noise
    schedule expects, and its reconstructions stay what they are. Stable Diffusion has one `scaling_factor` for all
    channels instead; here the two 1x1 convolutions around the latents take it up.

    Args:
        vae (`AutoencoderKL`):
            Autoencoder.
        latents (`torch.Tensor` of shape `(N, C, h, w)`):
            Latents to take means and standard deviations from.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    size = len(mean)
    # The first half of the outputs are the means of the latents, the second the logarithms of their variances.
    vae.quant_conv.weight[:size] /= std[:, None, None, None]
    vae.quant_conv.bias[:size] = (vae.quant_conv.bias[:size] - mean) / std
    vae.quant_conv.bias[size:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[:, None, None]


def train_vae(digits: Digits, config: PretrainingConfig, rng: np.random.Generator):
    """An autoencoder of 32 x 32 images with latents of shape `(4, 8, 8)`, standardized per channel."""
    from diffusers import AutoencoderKL

    channels = (16, 32, 32)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
    )

    def batch(size: int) -> torch.Tensor:
        return to_pixels(digits.draw(rng.choice(digits.train, size), rng.uniform(*PENS, size)))

    step = optimize(vae.parameters(), 3e-3, config.vae_steps)
    for _ in progress(config.vae_steps, "autoencoder"):
        pixels = batch(config.vae_batch_size)
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        step(F.mse_loss(reconstruction, pixels) + 1e-3 * posterior.kl().mean() / pixels[0].numel())

    vae.eval().requires_grad_(False)
    with torch.no_grad():
        standardize(vae, vae.encode(batch(512)).latent_dist.mean)
    return vae


def train_denoiser(digits: Digits, vae, tokenizer, config: PretrainingConfig, rng: np.random.Generator):
    """The UNet and, trained with it, the text encoder: prediction of the noise, one caption in ten left empty."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(text_config)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=config.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    noise_schedule = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )

    # Every drawing is encoded once.
    indices = np.tile(digits.train, config.drawings)
    images = digits.draw(indices, rng.uniform(*PENS, len(indices)))
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_pixels(part)).latent_dist.mean for part in np.array_split(images, 30)])
    captions = [caption(digit, wording) for wording in range(len(WORDINGS)) for digit in range(len(NAMES))] + [""]
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    step = optimize([*unet.parameters(), *text_encoder.parameters()], 1.5e-3, config.unet_steps)
    for _ in progress(config.unet_steps, "denoiser"):
        rows = rng.integers(0, len(indices), config.unet_batch_size)
        chosen = rng.integers(0, len(WORDINGS), len(rows)) * len(NAMES) + digits.labels[indices[rows]]
        chosen[rng.random(len(rows)) < 0.1] = EMPTY
        hidden = text_encoder(tokens[torch.from_numpy(chosen)])[0]
        clean = latents[torch.from_numpy(rows)]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, noise_schedule.config.num_train_timesteps, (len(rows),))
        prediction = unet(noise_schedule.add_noise(clean, noise, timesteps), timesteps, hidden).sample
        step(F.mse_loss(prediction, noise))
    return unet.eval(), text_encoder.eval(), noise_schedule


def train_pipeline(digits: Digits, config: PretrainingConfig):
    """Trains the whole pipeline; the same configuration gives the same weights on the same machine."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    tokenizer = make_tokenizer()
    vae = train_vae(digits, config, rng)
    unet, text_encoder, noise_schedule = train_denoiser(digits, vae, tokenizer, config, rng)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler.from_config(noise_schedule.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pipeline_folder(cache_dir: Path, config: PretrainingConfig) -> Path:
    """The folder in `cache_dir` of the pipeline that `config` gives; another one for each configuration."""
    key = json.dumps(asdict(config), sort_keys=True).encode()
    # The code is part of the key: what an older version of it trained is another pipeline.
    key += b"".join((Path(__file__).parent / name).read_bytes() for name in ("digits.py", "digits_pipeline.py"))
    return cache_dir / f"digits-pipeline-{hashlib.sha256(key).hexdigest()[:12]}"


def make_pipeline(folder: Path, digits: Digits, config: PretrainingConfig) -> None:
    """
    Trains the pipeline and saves it in `folder`, unless it is there. The folder appears whole or not at all, also if
    the training is interrupted or two processes train at once.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        train_pipeline(digits, config).save_pretrained(work / "pipeline", safe_serialization=True)
        os.replace(work / "pipeline", folder)
    except OSError:
        if not folder.exists():  # otherwise another process was faster; its folder is as good
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
