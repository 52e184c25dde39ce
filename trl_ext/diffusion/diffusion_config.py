"""Configuration that the diffusion methods share."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .._trl import BaseConfig
from .families import TIMESTEP_SAMPLING


ERROR_SPACES = ("prediction", "epsilon")


@dataclass
class DiffusionConfig(BaseConfig):
    r"""
    Configuration class for [`DiffusionTrainer`], and the parent of Diffusion-DPO's and DSPO's.

    Only the parameters added to [`~transformers.TrainingArguments`] are listed.

    Parameters:
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the pipeline's `from_pretrained`, when `model` is a string: `revision`, `variant`,
            `dtype`. Without a `dtype`, full fine-tuning loads float32; with an adapter the frozen denoiser and the text
            encoders are in the dtype of the mixed precision (`bf16`, `fp16`). The VAE is in float32 in any case: the one
            of SDXL overflows in fp16.

        beta (`float`, *optional*, defaults to `5000.0`):
            Strength of the constraint, in the convention of `trl_ext.losses`: u = -(beta / 2) m with errors that are means
            over channels, height and width. 2000 to 5000 for Stable Diffusion, 100 to 2000 for flows.
        safeguard_mu (`float`, *optional*):
            Scale the gradient of the rejected error down to where a step cannot raise the chosen one, to first order
            (https://huggingface.co/papers/2511.03317). In [0, 1]; larger is stricter. Off by default.

        > Parameters that control the data

        resolution (`int`, *optional*):
            Height and width in pixels to which images are resized and cropped. Defaults to what the pipeline samples.
        random_crop (`bool`, *optional*, defaults to `False`):
            Crop at random instead of in the middle; both images of a pair alike.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip half of the pairs left to right; both images of a pair alike.
        prompt_dropout (`float`, *optional*, defaults to `0.2`):
            Share of pairs trained with the empty prompt, so that classifier-free guidance stays usable.
        cache_latents (`bool`, *optional*, defaults to `False`):
            Compute the images' latents and the prompts' embeddings once, keep them on disk, and free the VAE and the text
            encoders before training.
        cache_dir (`str`, *optional*):
            Folder of that cache, which runs can share. Defaults to `_latent_cache` in `output_dir`, which is not pushed.

        > Parameters that control the noise

        timestep_sampling (`str`, *optional*):
            `"uniform"` or `"logit_normal"`. Defaults to `"uniform"` for UNets, `"logit_normal"` for flows.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the normal of `"logit_normal"`; above 0 leans towards noise.
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

        > Parameters that control the average of the weights

        use_ema (`bool`, *optional*, defaults to `False`):
            Keep an exponential moving average of the trained parameters. It is what is evaluated, validated and saved at
            the end; checkpoints hold both.
        ema_decay (`float`, *optional*, defaults to `0.999`):
            Its decay at most; it starts at 2/11 and grows as (1 + step) / (10 + step).

        > Parameters that control the validation images

        validation_prompts (`list[str]`, *optional*):
            Prompts of the image grid: the policy's images beside the reference's from the same noise.
        validation_steps (`int`, *optional*):
            Steps between two grids. Without it there is one, at the end of training.
        validation_seed (`int`, *optional*, defaults to `0`):
            Seed of the first prompt's noise; the next prompt has the next.
        validation_inference_steps (`int`, *optional*, defaults to `30`):
            Sampling steps of an image.
        validation_guidance_scale (`float`, *optional*):
            Guidance scale. Defaults to the pipeline's.

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

    # An option that only means something beside another one: (option, the one it needs).
    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("cache_dir", "cache_latents"),
        ("ema_decay", "use_ema"),
        ("validation_steps", "validation_prompts"),
        ("validation_seed", "validation_prompts"),
        ("validation_inference_steps", "validation_prompts"),
        ("validation_guidance_scale", "validation_prompts"),
    )
    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Option of `TrainingArguments` that would be ignored -> why.
    _refused_options: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "it smooths class labels. Diffusion-DPO has `label_smoothing`",
        "neftune_noise_alpha": "it adds noise to token embeddings",
        "use_liger_kernel": "its kernels are for language models",
        "include_num_input_tokens_seen": "there are no tokens to count",
    }

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate of the optimizer."})
    # Every trained parameter takes part in every step.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DistributedDataParallel looks for parameters without a gradient."}
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of the pipeline's `from_pretrained`, when `model` is a string."},
    )

    beta: float = field(
        default=5000.0,
        metadata={
            "help": "Strength of the constraint: u = -(beta / 2) m, with errors that are means over dimensions."
        },
    )
    safeguard_mu: float | None = field(
        default=None,
        metadata={
            "help": "Scale the gradient of the rejected error down to where a step cannot raise the chosen one. In "
            "[0, 1]; larger is stricter. Off by default."
        },
    )

    resolution: int | None = field(
        default=None,
        metadata={"help": "Height and width in pixels of the images. Defaults to what the pipeline samples."},
    )
    random_crop: bool = field(
        default=False, metadata={"help": "Crop at random instead of in the middle; both images of a pair alike."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Flip half of the pairs left to right; both images of a pair alike."}
    )
    prompt_dropout: float = field(
        default=0.2, metadata={"help": "Share of pairs trained with the empty prompt, for classifier-free guidance."}
    )
    cache_latents: bool = field(
        default=False,
        metadata={
            "help": "Compute latents and prompt embeddings once, keep them on disk, and free the VAE and text encoders."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the cache. Defaults to `_latent_cache` in `output_dir`, which is not pushed."},
    )

    timestep_sampling: str | None = field(
        default=None,
        metadata={"help": "'uniform' or 'logit_normal'. Defaults to the former for UNets, to the latter for flows."},
    )
    logit_mean: float = field(
        default=0.0, metadata={"help": "Mean of the normal of 'logit_normal'; above 0 leans towards noise."}
    )
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the normal of 'logit_normal'."})
    error_space: str | None = field(
        default=None,
        metadata={
            "help": "'prediction' for the squared error of what the network predicts, 'epsilon' for that of the noise it "
            "implies. Defaults to the latter for UNets, to the former for flows."
        },
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Weight the errors by min(SNR, gamma) / SNR. Off by default, as published."}
    )
    num_timestep_buckets: int = field(
        default=4, metadata={"help": "Equal parts of the schedule by which accuracy and gaps are logged."}
    )

    use_ema: bool = field(
        default=False,
        metadata={
            "help": "Keep an exponential moving average of the trained parameters, to evaluate, validate and save at the "
            "end."
        },
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the average at most."})

    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the image grid, the policy's images beside the reference's."}
    )
    validation_steps: int | None = field(
        default=None, metadata={"help": "Steps between two grids. Without it there is one, at the end of training."}
    )
    validation_seed: int = field(
        default=0, metadata={"help": "Seed of the first prompt's noise; the next prompt has the next."}
    )
    validation_inference_steps: int = field(default=30, metadata={"help": "Sampling steps of a validation image."})
    validation_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of validation images. Defaults to the pipeline's."}
    )

    @classmethod
    def refused_options(cls) -> dict[str, str]:
        """The options that must be left at their defaults, each with the reason."""
        return dict(cls._refused_options)

    def __post_init__(self):
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for option, reason in self.refused_options().items():
            if getattr(self, option) not in (defaults[option], None, False):
                raise ValueError(
                    f"`{option}={getattr(self, option)!r}` is not supported by `{type(self).__name__}`: {reason}. Leave "
                    f"`{option}` at its default ({defaults[option]!r})."
                )
        for option, needed in self._dependent_options:
            if getattr(self, option) != defaults[option] and not getattr(self, needed):
                raise ValueError(
                    f"`{option}={getattr(self, option)!r}` has no effect without `{needed}`. Set `{needed}`, or leave "
                    f"`{option}` at its default ({defaults[option]!r})."
                )
        self._check_number("beta", lambda value: value > 0, "a finite number greater than 0")
        if self.safeguard_mu is not None:
            self._check_number("safeguard_mu", lambda value: 0 <= value <= 1, "in [0, 1], or `None` for no safeguard")
        if self.resolution is not None:
            self._check_number(
                "resolution", lambda value: value > 0 and value == int(value), "a positive whole number"
            )
        self._check_number("prompt_dropout", lambda value: 0 <= value <= 1, "between 0 and 1")
        self._check_choice("timestep_sampling", TIMESTEP_SAMPLING)
        self._check_number("logit_std", lambda value: value > 0, "greater than 0")
        self._check_number("logit_mean", lambda value: True, "a finite number")
        self._check_choice("error_space", ERROR_SPACES)
        if self.snr_gamma is not None:
            self._check_number("snr_gamma", lambda value: value > 0, "greater than 0, or `None` for no weighting")
        self._check_number("num_timestep_buckets", lambda value: value >= 1, "at least 1")
        self._check_number("ema_decay", lambda value: 0 <= value < 1, "at least 0 and less than 1")
        if isinstance(self.validation_prompts, str):
            raise ValueError(
                f"`validation_prompts` must be a list of prompts, got the string {self.validation_prompts!r}. Put it "
                "into a list."
            )
        for option in ("validation_steps", "validation_inference_steps"):
            if getattr(self, option) is not None:
                self._check_number(option, lambda value: value >= 1, "at least 1")
        super().__post_init__()

    def __getstate__(self) -> dict:
        # Transformers pickles the arguments into `training_args.bin`, which goes up with every push: not the token.
        return {**self.__dict__, "hub_token": None}

    def _check_number(self, option: str, holds, wanted: str) -> None:
        value = getattr(self, option)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not holds(value):
            default = next(f.default for f in dataclasses.fields(self) if f.name == option)
            raise ValueError(f"`{option}` must be {wanted}, got {value!r}. The default is {default}.")

    def _check_choice(self, option: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, option)
        if value is not None and value not in choices:
            raise ValueError(f"`{option}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
