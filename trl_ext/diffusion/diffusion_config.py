"""Configuration that the methods that train on pairs of images share."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from .._checks import NOT_EMPTY, above, at_least, between
from .families import TIMESTEP_SAMPLING
from .image_config import ImageConfig


ERROR_SPACES = ("prediction", "epsilon")


@dataclass
class DiffusionConfig(ImageConfig):
    r"""
    Configuration class for [`DiffusionTrainer`], and the parent of Diffusion-DPO's and DSPO's.

    Only the parameters added to [`~trl_ext.diffusion.ImageConfig`] are listed.

    Parameters:
        beta (`float`, *optional*, defaults to `5000.0`):
            Strength of the constraint, in the convention of `trl_ext.losses`: u = -(beta / 2) m with errors that are
            means over channels, height and width. 2000 to 5000 for Stable Diffusion, 100 to 2000 for flows.
        safeguard_mu (`float`, *optional*):
            Scale the gradient of the rejected error down to where a step cannot raise the chosen one, to first order
            (https://huggingface.co/papers/2511.03317). In [0, 1]; larger is stricter. Off by default.

        > Parameters that control the data

        aspect_buckets (`bool`, *optional*, defaults to `False`):
            Bring each pair to the size nearest to its shape, out of sizes with at most the pixels of `resolution`,
            which is then the side of a square; a batch has one size. Otherwise all pairs are cropped to `resolution`.
        max_aspect_ratio (`float`, *optional*, defaults to `2.0`):
            Largest ratio of the longer to the shorter side of a bucket.
        bucket_group_size (`int`, *optional*):
            Consecutive pairs that share a bucket. What a bucket's last group lacks is filled with others of its pairs.
            Defaults to the pairs of an optimizer step; a smaller one, down to the batch on a device, mixes sizes
            within a step and repeats fewer pairs.
        image_dir (`str`, *optional*):
            Folder in which relative paths of images are looked up, before the working directory: usually the data
            file's folder, which a loaded dataset does not know. `trl-ext` and the recipes set it to that folder.
        verify_images (`bool`, *optional*, defaults to `False`):
            Decode every image before the first step, so that a broken one does not end the run hours later.
        skip_broken_images (`bool`, *optional*, defaults to `False`):
            Decode every image before the first step, and leave out the pairs that cannot be used. They are counted in
            a warning, and listed in `skipped_images.txt` in `output_dir`.
        random_crop (`bool`, *optional*, defaults to `False`):
            Crop at random instead of in the middle; both images of a pair alike.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip half of the pairs left to right; both images of a pair alike.
        prompt_dropout (`float`, *optional*):
            Share of pairs trained with the empty prompt, so that classifier-free guidance stays usable. Defaults to
            0.2, and to 0 for models that are sampled without the empty prompt, as guidance-distilled ones are.
        guidance_scale (`float`, *optional*):
            Guidance scale that a guidance-distilled model (FLUX.1-dev, LCM) is given in training. Defaults to the
            pipeline's own default for sampling.
        cache_latents (`bool`, *optional*, defaults to `False`):
            Compute the images' latents and the prompts' embeddings once, keep them on disk, and free the VAE and the
            text encoders before training.
        cache_dir (`str`, *optional*):
            Folder of that cache, which runs can share. Defaults to `_latent_cache` in `output_dir`, which is not
            pushed.

        > Parameters that control the noise

        timestep_sampling (`str`, *optional*):
            `"uniform"` or `"logit_normal"`. Defaults to `"uniform"` for UNets, `"logit_normal"` for flows.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the normal of `"logit_normal"`; above 0 leans toward noise.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Its standard deviation.
        error_space (`str`, *optional*):
            `"prediction"` for the squared error of what the network predicts, `"epsilon"` for the squared error of the
            noise that it implies. The two differ by a factor that depends on the timestep, unless the network predicts
            the noise. Defaults to `"epsilon"` for UNets, so that beta means the same for v-prediction, and to
            `"prediction"` for flows, whose published settings are in it.
        snr_gamma (`float`, *optional*):
            Weight the errors by min(SNR, gamma) / SNR of their timestep, for a flow too. Off by default, as published.
        num_timestep_buckets (`int`, *optional*, defaults to `4`):
            Equal parts of the schedule by which accuracy and gaps are logged.

    Raises:
        `ValueError`: For an option out of its range, or one that has no effect beside the others.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    """

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("max_aspect_ratio", "aspect_buckets"),
        ("bucket_group_size", "aspect_buckets"),
        ("cache_dir", "cache_latents"),
    )
    _refused_options: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "it smooths class labels. Diffusion-DPO has `label_smoothing`",
    }

    beta: Annotated[float, above(0)] = field(
        default=5000.0,
        metadata={
            "help": "Strength of the constraint: u = -(beta / 2) m, with errors that are means over dimensions."
        },
    )
    safeguard_mu: Annotated[float | None, between(0, 1)] = field(
        default=None,
        metadata={
            "help": "Scale the gradient of the rejected error down to where a step cannot raise the chosen one. In "
            "[0, 1]; larger is stricter. Off by default."
        },
    )

    aspect_buckets: bool = field(
        default=False,
        metadata={
            "help": "Bring each pair to the size nearest to its shape, out of sizes with at most the pixels of "
            "`resolution`; a batch has one size."
        },
    )
    max_aspect_ratio: Annotated[float, at_least(1)] = field(
        default=2.0, metadata={"help": "Largest ratio of the longer to the shorter side of a bucket."}
    )
    bucket_group_size: Annotated[int | None, at_least(1)] = field(
        default=None,
        metadata={
            "help": "Consecutive pairs that share a bucket. Defaults to the pairs of an optimizer step; a smaller one, "
            "down to the batch on a device, mixes sizes within a step and repeats fewer pairs."
        },
    )
    image_dir: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={
            "help": "Folder in which relative paths of images are looked up. On the command line it defaults to the "
            "data file's folder."
        },
    )
    verify_images: bool = field(
        default=False, metadata={"help": "Decode every image before the first step, to find broken ones."}
    )
    skip_broken_images: bool = field(
        default=False,
        metadata={
            "help": "Decode every image before the first step, and leave out and list the pairs that cannot be used."
        },
    )
    random_crop: bool = field(
        default=False, metadata={"help": "Crop at random instead of in the middle; both images of a pair alike."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Flip half of the pairs left to right; both images of a pair alike."}
    )
    prompt_dropout: Annotated[float | None, between(0, 1)] = field(
        default=None,
        metadata={
            "help": "Share of pairs trained with the empty prompt, for classifier-free guidance. Defaults to 0.2, and "
            "to 0 for models that are sampled without the empty prompt."
        },
    )
    guidance_scale: Annotated[float | None, at_least(0)] = field(
        default=None,
        metadata={
            "help": "Guidance scale that a guidance-distilled model is given in training. Defaults to the pipeline's "
            "for sampling."
        },
    )
    cache_latents: bool = field(
        default=False,
        metadata={
            "help": "Compute latents and prompt embeddings once, keep them on disk, and free the VAE and text "
            "encoders."
        },
    )
    cache_dir: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={"help": "Folder of the cache. Defaults to `_latent_cache` in `output_dir`, which is not pushed."},
    )

    timestep_sampling: str | None = field(
        default=None,
        metadata={
            "help": "'uniform' or 'logit_normal'. Defaults to the former for UNets, to the latter for flows.",
            "choices": list(TIMESTEP_SAMPLING),
        },
    )
    logit_mean: float = field(
        default=0.0, metadata={"help": "Mean of the normal of 'logit_normal'; above 0 leans toward noise."}
    )
    logit_std: Annotated[float, above(0)] = field(
        default=1.0, metadata={"help": "Standard deviation of the normal of 'logit_normal'."}
    )
    error_space: str | None = field(
        default=None,
        metadata={
            "help": "'prediction' for the squared error of what the network predicts, 'epsilon' for that of the noise "
            "it implies. Defaults to the latter for UNets, to the former for flows.",
            "choices": list(ERROR_SPACES),
        },
    )
    snr_gamma: Annotated[float | None, above(0)] = field(
        default=None, metadata={"help": "Weight the errors by min(SNR, gamma) / SNR. Off by default, as published."}
    )
    num_timestep_buckets: Annotated[int, at_least(1)] = field(
        default=4, metadata={"help": "Equal parts of the schedule by which accuracy and gaps are logged."}
    )

    def _check_options(self) -> None:
        super()._check_options()
        if self.aspect_buckets and isinstance(self.resolution, (list, tuple)):
            raise ValueError(
                f"`resolution={self.resolution!r}` with `aspect_buckets=True` must be one number: the side of the "
                "square whose pixels no bucket exceeds. Or set `aspect_buckets=False` for images of this size alone."
            )
