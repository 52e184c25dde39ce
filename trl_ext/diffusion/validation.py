"""Samples validation images from policy and reference, with the same prompts and noise at every step."""

import contextlib
import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback

from ..training.seeds import forked_random_state
from ..training.sharding import whole_weights
from .paired_denoiser import PairedDenoiser


logger = logging.getLogger(__name__)

_MARGIN = 6


def sample_pixels(
    policy: PairedDenoiser,
    conditioning: dict[str, torch.Tensor],
    size: tuple[int, int],
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    reference: bool = False,
    batch_size: int = 1,
) -> torch.Tensor:
    """
    Samples one image for each prompt, from the policy or from the reference. Neither the global random state nor the
    pipeline's scheduler, whose timesteps sampling would change, is touched.

    Args:
        policy ([`PairedDenoiser`]):
            Policy and reference.
        conditioning (`dict[str, torch.Tensor]`):
            Output of [`PipelineFamily.sampling_conditioning`].
        size (`tuple[int, int]`):
            Height and width in pixels.
        seeds (`Sequence[int]`):
            Seed of each image's noise.
        num_inference_steps (`int`):
            Sampling steps.
        guidance_scale (`float`, *optional*):
            Defaults to the pipeline's.
        reference (`bool`, *optional*, defaults to `False`):
            Whether to sample from the reference.
        batch_size (`int`, *optional*, defaults to `1`):
            Images at once.

    Returns:
        `torch.Tensor` of shape `(N, 3, H, W)`, approximately in [-1, 1], in float32.
    """
    family = policy.family
    # A shallow copy shares the components, but not what is set on it.
    pipeline = copy.copy(family.pipeline)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    adapter_off: contextlib.AbstractContextManager = contextlib.nullcontext()
    if reference and policy.reference is not None:
        setattr(pipeline, family.denoiser_name, policy.reference)
    elif reference:
        adapter_off = policy.reference_adapter()
    was_training = policy.training
    policy.eval()
    pixels = []
    try:
        with torch.no_grad(), forked_random_state(policy.device), adapter_off:
            for i in range(0, len(seeds), batch_size):
                rows = {
                    name: tensor[i : i + batch_size].to(policy.device, policy.input_dtype)
                    for name, tensor in conditioning.items()
                }
                output = pipeline(
                    **family.call_arguments(rows, size, guidance_scale),
                    num_inference_steps=num_inference_steps,
                    # One for each image: it then does not depend on the others of its batch.
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch_size]],
                    output_type="latent",
                ).images
                pixels.append(family.decode_latents(family.sampled_latents(output, size)))
    finally:
        policy.train(was_training)
    return torch.cat(pixels)


def sample_images(
    policy: PairedDenoiser,
    conditioning: dict[str, torch.Tensor],
    size: tuple[int, int],
    *,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    reference: bool = False,
) -> list[Image.Image]:
    """
    As [`sample_pixels`], one at a time, as images; the seed increases by one for each of them.
    """
    pixels = sample_pixels(
        policy,
        conditioning,
        size,
        seeds=[seed + i for i in range(len(next(iter(conditioning.values()))))],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        reference=reference,
    )
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def make_grid(columns: dict[str, list[Image.Image]], captions: list[str], scale: int | None = None) -> Image.Image:
    """
    Makes a grid with a titled column for each model and a captioned row for each prompt.

    Args:
        columns (`dict[str, list[Image.Image]]`):
            Images by title, all of one size.
        captions (`list[str]`):
            Text of each row.
        scale (`int`, *optional*):
            Enlargement of the images. By default they become at least 128 pixels wide.
    """
    first = next(iter(columns.values()))[0]
    scale = scale or max(1, -(-128 // first.width))
    width, height = first.width * scale, first.height * scale
    font = ImageFont.load_default(size=max(12, min(28, height // 10)))
    line = font.getbbox("Ag")[3] + _MARGIN
    canvas = Image.new(
        "RGB",
        (_MARGIN + len(columns) * (width + _MARGIN), line + _MARGIN + len(captions) * (height + line + _MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for x, (title, images) in enumerate(columns.items()):
        left = _MARGIN + x * (width + _MARGIN)
        draw.text((left + width / 2, _MARGIN), title, fill="black", font=font, anchor="ma")
        for y, image in enumerate(images):
            top = line + _MARGIN + y * (height + line + _MARGIN)
            canvas.paste(image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else None), (left, top))
    for y, caption in enumerate(captions):
        top = line + _MARGIN + y * (height + line + _MARGIN) + height + 2
        draw.text((_MARGIN, top), _fit(caption or "(empty prompt)", font, canvas.width - 2 * _MARGIN), "black", font)
    return canvas


def _fit(text: str, font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


class ValidationCallback(TrainerCallback):
    """
    Samples the validation prompts every `validation_steps`, and once at the end of training; writes the grid to
    `validation/step-N.png` in the output folder, and sends it to the trackers.

    Args:
        trainer ([`ImageTrainer`]):
            The trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.conditioning: Any = None  # of the prompts, once they are encoded
        self.reference_images = None
        self.last_step = None

    @property
    def last_grid(self) -> Path | None:
        """File of the last grid, if there is one."""
        return None if self.last_step is None else self._path(self.last_step)

    def _path(self, step: int) -> Path:
        return Path(self.trainer.args.output_dir) / "validation" / f"step-{step}.png"

    def prepare(self) -> None:
        """Encodes the prompts before the text encoders are freed."""
        encoded = self.trainer.family.sampling_conditioning(list(self.trainer.args.validation_prompts))
        self.conditioning = {name: tensor.cpu() for name, tensor in encoded.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        self.last_step = None

    def on_step_end(self, args, state, control, **kwargs):
        if args.validation_steps and state.global_step % args.validation_steps == 0:
            self.run(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.last_step != state.global_step:
            self.run(state.global_step)

    def run(self, step: int) -> None:
        """Makes the grid of the current weights. The main process samples; the others wait."""
        trainer = self.trainer
        with whole_weights(trainer.policy, trainer.policy.reference):
            if trainer.is_world_process_zero():
                self._make_grid(step)
        self.last_step = step
        trainer.accelerator.wait_for_everyone()

    def _make_grid(self, step: int) -> None:
        trainer = self.trainer
        policy = trainer.policy
        with trainer.accelerator.autocast():
            if self.reference_images is None:
                self.reference_images = self._sample(policy, reference=True)
            with trainer.averaged_weights():
                images = self._sample(policy)
        grid = make_grid(
            {"reference": self.reference_images, f"policy, step {step}": images}, trainer.args.validation_prompts
        )
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        send_to_trackers(trainer.callback_handler.callbacks, "validation", path, step)

    def _sample(self, policy: PairedDenoiser, reference: bool = False) -> list[Image.Image]:
        args = self.trainer.args
        return sample_images(
            policy,
            self.conditioning,
            self.trainer.image_size,
            seed=args.validation_seed,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            reference=reference,
        )


def send_to_trackers(callbacks: list, name: str, path: Path, step: int) -> None:
    """
    Sends an image file to the trackers among a trainer's callbacks, each through its own API. A tracker that fails
    causes a warning and does not end the run.
    """
    for callback in callbacks:
        send = _TRACKERS.get(type(callback).__name__)
        if send is None:
            continue
        try:
            send(callback, name, path, step)
        except Exception as error:
            logger.warning(f"The image {path} could not be sent to {type(callback).__name__}: {error!r}")


def _to_tensorboard(callback, name, path, step):
    if callback.tb_writer is not None:
        callback.tb_writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")


def _to_wandb(callback, name, path, step):
    if callback._wandb is not None and callback._wandb.run is not None:
        callback._wandb.log({name: callback._wandb.Image(str(path)), "train/global_step": step})


def _to_trackio(callback, name, path, step):
    if callback._trackio is not None:
        callback._trackio.log({name: callback._trackio.Image(str(path)), "train/global_step": step})


def _to_comet(callback, name, path, step):
    if callback._experiment is not None:
        callback._experiment.log_image(str(path), name=name, step=step)


def _to_mlflow(callback, name, path, step):
    if callback._ml_flow is not None and callback._ml_flow.active_run() is not None:
        callback._ml_flow.log_artifact(str(path), name)


_TRACKERS = {
    "TensorBoardCallback": _to_tensorboard,
    "WandbCallback": _to_wandb,
    "TrackioCallback": _to_trackio,
    "CometCallback": _to_comet,
    "MLflowCallback": _to_mlflow,
}
