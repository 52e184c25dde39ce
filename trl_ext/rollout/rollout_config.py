"""What the configurations of all methods that sample share."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from .._checks import above, at_least, between
from ..training.config import CheckedConfig, HubOptions


if TYPE_CHECKING:  # one of the two parents, which have what is used here in common
    from trl import GRPOConfig as _Parent
else:
    _Parent = object


class RolloutConfig(CheckedConfig, HubOptions, _Parent):
    r"""
    Mixin before [`~trl.GRPOConfig`] or [`~trl.RLOOConfig`]: options are checked, and none is silently ignored.

    ```python
    @dataclass
    class MyConfig(RolloutConfig, GRPOConfig):
        my_option: Annotated[float, above(0)] = field(default=1.0, metadata={"help": "..."})
    ```

    A method lists what it cannot honor in `_refused_options`, as [`~trl_ext.training.config.CheckedConfig`] describes,
    and checks combinations of options in `_check_options`.

    Raises:
        `ValueError`: For an option of a wrong type or out of its range; for one that is refused or without effect; if
            `generation_batch_size` and `steps_per_generation` contradict each other; if the `num_generations`
            completions of a prompt would be split over several processes.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "it smooths the labels of a classifier, and completions have none",
        "label_names": "batches are completions, which have no labels",
        "length_column_name": "lengths are those of the sampled completions",
        "train_sampling_strategy": "`shuffle_dataset` decides the order of the prompts",
        "include_num_input_tokens_seen": "TRL counts the tokens of prompts and completions itself, as `num_tokens`",
        "include_for_metrics": "there is no `compute_metrics` that would receive them",
        "batch_eval_metrics": "there is no `compute_metrics` that would receive them",
        "auto_find_batch_size": "a generation batch consists of whole groups, so its size must not change",
        "ignore_data_skip": "a resumed run continues in the middle of a generation batch",
        "prediction_loss_only": "an evaluation gives losses and rewards, and no predictions",
        "eval_do_concat_batches": "an evaluation gives losses and rewards, and no predictions",
    }
    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        *(
            (f"vllm_{name}", "use_vllm")
            for name in (
                "mode",
                "model_impl",
                "enable_sleep_mode",
                "structured_outputs_regex",
                "server_base_url",
                "server_host",
                "server_port",
                "server_timeout",
                "group_port",
                "gpu_memory_utilization",
                "max_model_length",
                "tensor_parallel_size",
            )
        ),
        ("transformers_continuous_batching_config", "use_transformers_continuous_batching"),
        ("sync_ref_model", "beta"),
        ("ref_model_mixup_alpha", "sync_ref_model"),
        ("ref_model_sync_steps", "sync_ref_model"),
        ("num_completions_to_print", "log_completions"),
        ("log_unique_prompts", "log_completions"),
    )
    _inherited_annotations: ClassVar[dict[str, Any]] = {
        "num_generations": Annotated[int, at_least(2)],
        "num_generations_eval": Annotated[int | None, at_least(1)],
        "max_completion_length": Annotated[int, at_least(1)],
        "generation_batch_size": Annotated[int | None, at_least(1)],
        "steps_per_generation": Annotated[int | None, at_least(1)],
        "pad_to_multiple_of": Annotated[int | str | None, at_least(1)],
        "temperature": Annotated[float, above(0)],
        "top_p": Annotated[float, between(0, 1, "(]")],
        "top_k": Annotated[int, at_least(0)],
        "min_p": Annotated[float | None, between(0, 1)],
        "repetition_penalty": Annotated[float, above(0)],
        "beta": Annotated[float, at_least(0)],
        "num_iterations": Annotated[int, at_least(1)],
        "epsilon": Annotated[float, at_least(0)],
        "epsilon_high": Annotated[float | None, at_least(0)],
        "router_aux_loss_coef": Annotated[float | None, at_least(0)],
        "ref_model_mixup_alpha": Annotated[float, between(0, 1)],
        "ref_model_sync_steps": Annotated[int, at_least(1)],
        "num_completions_to_print": Annotated[int | None, at_least(1)],
        "vllm_mode": Literal["server", "colocate"],
        "vllm_gpu_memory_utilization": Annotated[float, between(0, 1, "(]")],
        "vllm_tensor_parallel_size": Annotated[int, at_least(1)],
    }

    def __post_init__(self):
        super().__post_init__()
        if self._given_batch_size not in (None, self.generation_batch_size):
            raise ValueError(
                f"`generation_batch_size={self._given_batch_size}` contradicts `steps_per_generation="
                f"{self.steps_per_generation}`, with which {self.generation_batch_size} completions are generated at "
                "once. Give only one of them."
            )
        self.check_groups(self.per_device_train_batch_size * self.steps_per_generation, self.num_generations, "train")

    def _check_options(self) -> None:
        # TRL sets both in its own `__post_init__`, and refuses both: a copy of a configuration has both.
        given: int | None = getattr(self, "generation_batch_size")  # noqa: B009 - whose type mypy cannot tell
        self._given_batch_size = None
        if given is not None and self.steps_per_generation is not None:
            self._given_batch_size = given
            self.generation_batch_size = None

    def check_groups(self, rows: int, group: int, mode: str) -> None:
        """
        Raises `ValueError` if a process would hold a part of a group.

        TRL deals completions to the processes without regard to groups, so a reward function that compares the
        completions of a prompt would silently see a part of them.

        Args:
            rows (`int`):
                Completions that a process generates at once.
            group (`int`):
                Completions of a prompt.
            mode (`str`):
                `"train"` or `"eval"`.
        """
        if rows % group == 0:
            return
        if mode == "train":
            raise ValueError(
                f"`num_generations={group}` does not divide the {rows} completions that each process generates at "
                f"once (`per_device_train_batch_size={self.per_device_train_batch_size}` times `steps_per_generation="
                f"{self.steps_per_generation}`), so a prompt's completions would be split over processes. Choose "
                f"`steps_per_generation` or `per_device_train_batch_size` such that their product is a multiple of "
                f"{group}."
            )
        raise ValueError(
            f"`per_device_eval_batch_size={rows}` must be a multiple of the {group} completions that each prompt has "
            "in evaluation. Change it, or `num_generations_eval`."
        )
