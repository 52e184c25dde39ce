"""Configuration that all trainers of text-to-image pipelines share."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from .._checks import NOT_EMPTY, at_least, between
from .._trl import BaseConfig
from ..training.config import CheckedConfig, HubOptions
from .export import EXPORT_FORMATS


@dataclass
class ImageConfig(CheckedConfig, HubOptions, BaseConfig):
    r"""
    Configuration class for [`~trl_ext.diffusion.image_trainer.ImageTrainer`], and the parent of those of all image
    methods.

    Only the parameters added to [`~transformers.TrainingArguments`] are listed.

    Parameters:
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the pipeline's `from_pretrained`, when `model` is a string: `revision`, `variant`,
            `dtype`. Without a `dtype`, full fine-tuning loads float32; with an adapter the frozen denoiser and the
            text encoders are in the dtype of the mixed precision (`bf16`, `fp16`). The VAE is in float32 in any case:
            the one of SDXL overflows in fp16.
        resolution (`int` or `list[int]`, *optional*):
            Side of a square in pixels, or height and width, to which images are resized and cropped. Defaults to what
            the pipeline samples.

        > Parameters that control the average of the weights

        use_ema (`bool`, *optional*, defaults to `False`):
            Keep an exponential moving average of the trained parameters. It is what is evaluated, validated and saved
            at the end; checkpoints hold both.
        ema_decay (`float`, *optional*, defaults to `0.999`):
            Its decay at most; it starts at 2/11 and grows as (1 + step) / (10 + step).

        > Parameters that control what is saved

        export_format (`str`, *optional*, defaults to `"diffusers"`):
            `"kohya"` to also write a LoRA as `kohya_lora_weights.safetensors`, with alpha tensors, which ComfyUI,
            A1111 and Forge apply at the strength it was trained at. Of UNets and FLUX.1.

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

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("ema_decay", "use_ema"),
        ("validation_steps", "validation_prompts"),
        ("validation_seed", "validation_prompts"),
        ("validation_inference_steps", "validation_prompts"),
        ("validation_guidance_scale", "validation_prompts"),
    )
    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    _inherited_annotations: ClassVar[dict[str, Any]] = {
        "train_sampling_strategy": Literal["random", "sequential"],  # images of one size have no lengths
    }
    _refused_options: ClassVar[dict[str, str]] = {
        "neftune_noise_alpha": "it adds noise to token embeddings",
        "use_liger_kernel": "its kernels are for language models",
        "liger_kernel_config": "its kernels are for language models",
        "include_num_input_tokens_seen": "there are no tokens to count",
        "use_cache": "it keeps the keys and values of a language model",
        "length_column_name": "images have no lengths",
        "label_names": "an evaluation has metrics alone, and no labels to hand over",
        "include_for_metrics": "an evaluation has metrics alone, and no predictions to compute metrics from",
        "batch_eval_metrics": "an evaluation has metrics alone, and no predictions to compute metrics from",
        "eval_accumulation_steps": "an evaluation has metrics alone, and no predictions to accumulate",
        "prediction_loss_only": "an evaluation has metrics alone, and no predictions to return",
        "eval_do_concat_batches": "an evaluation has metrics alone, and no predictions to put together",
        "eval_use_gather_object": "an evaluation has metrics alone, and no predictions to gather",
        "bf16_full_eval": "it rounds the trained weights for good. Mixed precision (`bf16`) is used in evaluations, "
        "too",
        "fp16_full_eval": "it rounds the trained weights for good. Mixed precision (`fp16`) is used in evaluations, "
        "too",
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

    # A list for argument parsers, which take `--resolution 512` and `--resolution 768 512`; a number is taken, too.
    resolution: list[int] | None = field(
        default=None,
        metadata={
            "help": "Side of a square in pixels, or height and width, of the images. Defaults to what the pipeline "
            "samples."
        },
    )
    use_ema: bool = field(
        default=False,
        metadata={
            "help": "Keep an exponential moving average of the trained parameters, to evaluate, validate and save at "
            "the end."
        },
    )
    ema_decay: Annotated[float, between(0, 1, "[)")] = field(
        default=0.999, metadata={"help": "Decay of the average at most."}
    )

    export_format: str = field(
        default="diffusers",
        metadata={
            "help": "'kohya' to also write a LoRA with alpha tensors, for ComfyUI, A1111 and Forge.",
            "choices": list(EXPORT_FORMATS),
        },
    )

    validation_prompts: Annotated[list[str] | None, NOT_EMPTY] = field(
        default=None, metadata={"help": "Prompts of the image grid, the policy's images beside the reference's."}
    )
    validation_steps: Annotated[int | None, at_least(1)] = field(
        default=None, metadata={"help": "Steps between two grids. Without it there is one, at the end of training."}
    )
    validation_seed: int = field(
        default=0, metadata={"help": "Seed of the first prompt's noise; the next prompt has the next."}
    )
    validation_inference_steps: Annotated[int, at_least(1)] = field(
        default=30, metadata={"help": "Sampling steps of a validation image."}
    )
    validation_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of validation images. Defaults to the pipeline's."}
    )

    @classmethod
    def _all_inherited_annotations(cls) -> dict[str, Any]:
        return {**super()._all_inherited_annotations(), "resolution": int | list[int] | None}

    def _check_options(self) -> None:
        super()._check_options()
        for option in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            given = getattr(self, option, None)  # older releases of Transformers have the second alone
            if isinstance(given, dict) and any(item != ("use_reentrant", False) for item in given.items()):
                raise ValueError(
                    f"`{option}={given!r}` cannot be honored by a diffusers model, which checkpoints every block "
                    "without reentry. Leave it out."
                )
        if isinstance(self.resolution, (list, tuple)) and len(self.resolution) == 1:
            self.resolution = self.resolution[0]  # type: ignore[assignment]  # the field's type is for parsers
        sides = [self.resolution] if isinstance(self.resolution, int) else self.resolution
        if sides is not None and (len(sides) not in (1, 2) or min(sides) < 1):
            raise ValueError(
                f"`resolution` must be a positive number of pixels, or height and width, got {self.resolution!r}. The "
                "default is None, what the pipeline samples."
            )
