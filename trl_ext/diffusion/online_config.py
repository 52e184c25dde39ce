"""Configuration that the methods that learn from rewards of their own images share."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from .._checks import NOT_EMPTY, above, at_least, between
from .image_config import ImageConfig


_WHOLE_GROUPS = "a window consists of whole groups, so its batches must not change"


@dataclass
class OnlineDiffusionConfig(ImageConfig):
    r"""
    Configuration class for [`OnlineDiffusionTrainer`], and the parent of Score as Action's.

    An optimizer step trains on a window of `per_device_train_batch_size` times `gradient_accumulation_steps` images on
    each process, which must be whole groups of `num_generations`. Only the parameters added to
    [`~trl_ext.diffusion.ImageConfig`] are listed.

    Parameters:
        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions; 1 each by default.

        > Parameters that control the sampling

        num_generations (`int`, *optional*, defaults to `8`):
            Images of a prompt, which are each other's baseline.
        num_inference_steps (`int`, *optional*, defaults to `12`):
            Steps of the stochastic sampler. More cost more, and let the policy come closer to the optimum.
        noise_level (`float`, *optional*):
            Noise of a step. Defaults to 1 (DDPM's) for UNets and to 0.7 for flows. With less, an image depends on its
            first noise, and the optimum is biased toward the reference.
        guidance_scale (`float`, *optional*):
            Guidance of the images and of both models' predictions in training: classifier-free guidance, which doubles
            the cost, or the input of a guidance-distilled model. Defaults to 1 (none), and for a distilled model to
            the pipeline's.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps on the same images. In the first of them the ratio of policies is 1 by construction.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the sampler's steps that an optimizer step trains on, evenly spread, from a random start; weighted
            so that the gradient is the same on average.

        > Parameters that control the evaluation

        num_generations_eval (`int`, *optional*, defaults to `1`):
            Images of an evaluation prompt.
        eval_inference_steps (`int`, *optional*, defaults to `30`):
            Steps of an evaluation's images, with the pipeline's own sampler, which users will have.
        eval_guidance_scale (`float`, *optional*):
            Guidance scale of an evaluation's images. Defaults to the pipeline's.

    Raises:
        `ValueError`: For an option out of its range, or one that has no effect beside the others; if the images of a
        process are no whole groups.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-4` instead of `5e-5`.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    > - `metric_for_best_model`: Defaults to `"reward"` instead of `"loss"`.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "auto_find_batch_size": _WHOLE_GROUPS,
        "dataloader_drop_last": _WHOLE_GROUPS,
        "ignore_data_skip": "a resumed run continues with the prompts that are next",
        "remove_unused_columns": "every reward function gets the columns that it names",
    }
    _inherited_annotations: ClassVar[dict[str, Any]] = {}

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of the optimizer."})

    reward_weights: Annotated[list[float] | None, NOT_EMPTY] = field(
        default=None, metadata={"help": "Weights of the reward functions; 1 each by default."}
    )

    num_generations: Annotated[int, at_least(2)] = field(
        default=8, metadata={"help": "Images of a prompt, which are each other's baseline."}
    )
    num_inference_steps: Annotated[int, at_least(2)] = field(
        default=12, metadata={"help": "Steps of the stochastic sampler."}
    )
    noise_level: Annotated[float | None, above(0)] = field(
        default=None, metadata={"help": "Noise of a step. Defaults to 1 for UNets and to 0.7 for flows."}
    )
    guidance_scale: Annotated[float | None, at_least(0)] = field(
        default=None,
        metadata={
            "help": "Guidance of the images and of both models' predictions in training. Defaults to 1 (none), and to "
            "the pipeline's for a guidance-distilled model."
        },
    )
    num_iterations: Annotated[int, at_least(1)] = field(
        default=1, metadata={"help": "Optimizer steps on the same images."}
    )
    timestep_fraction: Annotated[float, between(0, 1, "(]")] = field(
        default=1.0, metadata={"help": "Share of the sampler's steps that an optimizer step trains on."}
    )

    num_generations_eval: Annotated[int, at_least(1)] = field(
        default=1, metadata={"help": "Images of an evaluation prompt."}
    )
    eval_inference_steps: Annotated[int, at_least(1)] = field(
        default=30, metadata={"help": "Steps of an evaluation's images, with the pipeline's own sampler."}
    )
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of an evaluation's images. Defaults to the pipeline's."}
    )

    def _check_options(self) -> None:
        super()._check_options()
        images = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if images % self.num_generations:
            raise ValueError(
                f"`num_generations={self.num_generations}` does not divide the {images} images that each process "
                f"samples for a step (`per_device_train_batch_size={self.per_device_train_batch_size}` times "
                f"`gradient_accumulation_steps={self.gradient_accumulation_steps}`). Choose these such that their "
                f"product is a multiple of {self.num_generations}: a group is rewarded as a whole."
            )
        needs_metric = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        metric: str | None = getattr(self, "metric_for_best_model")  # noqa: B009 - whose type mypy cannot tell
        if needs_metric and metric is None:
            self.metric_for_best_model = "reward"
        if str(metric).removeprefix("eval_") == "loss":
            raise ValueError(
                f"`metric_for_best_model={metric!r}`: an evaluation measures rewards, and has no "
                "loss. Leave it out for 'reward', or name another metric of the log."
            )
        given = self.accelerator_config
        for option in ("split_batches", "dispatch_batches"):
            if given.get(option) if isinstance(given, dict) else getattr(given, option, None):
                raise ValueError(
                    f"`accelerator_config` has `{option}=True`, which deals images to processes in another order: "
                    f"groups would be split. Leave `{option}` out."
                )
