"""What the trainers of all methods that sample share."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback

from .._patches import keep_quantized_weights
from .._trl import get_config_model_id
from ..training.adapters import check_starts_at_base
from ..training.arguments import check_optimizer, resolve_args
from ..training.metrics import StepMetrics
from ..training.processes import check_is_split
from ..training.progress import PreferenceProgress
from ..training.resume import ResumableRun
from ..training.seeds import seeded
from ..training.text_card import DocumentedTextRun, base_of, names_of_fields
from ..training.vllm import check_vllm
from ..training.window_file import load_window, save_window
from .window import EpochSampler


if TYPE_CHECKING:  # one of the two parents, which have what is used here in common
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object

# Per-token KL between policy and reference on the first batch, above which they are not the same model.
_START_KL = 1e-2


class RolloutTrainer(DocumentedTextRun, ResumableRun, _Parent):
    r"""
    Mixin before [`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]: runs that resume bit-identically, whole groups, checked
    data, metrics that are means over samples, and the model card.

    ```python
    class MyTrainer(RolloutTrainer, GRPOTrainer):
        config_class = MyConfig
        _name = "My method"

        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) + ...
    ```

    A method overrides methods of TRL's trainers by calling `super()` and never copies one:

    - `_compute_loss(model, inputs)` to add to the loss;
    - `_calculate_rewards(inputs, prompts, completions, completion_ids_list)` to change the rewards: it returns those
      of all processes, of shape (samples, reward functions), NaN where a function gave none;
    - `_generate_and_score_completions(inputs)` to change the returned `"advantages"`, which are this process's rows
      (see [`~RolloutTrainer.local_rows`]);
    - [`~RolloutTrainer.state_dict`] and [`~RolloutTrainer.load_state_dict`] for what it carries through checkpoints.

    Its metrics go to [`~RolloutTrainer.record_means`].

    Class attributes:
        config_class (`type`):
            The method's configuration, a subclass of [`RolloutConfig`].

    Raises:
        `TypeError`: If `args` is not an instance of the method's configuration class.
        `ValueError`: For datasets without prompts or with too few; for a reference that is not what training starts
            from; for checkpoints of other settings.
    """

    config_class: ClassVar[type]

    card_task = "rewards of its own completions"
    card_unit = "completions"

    _tag_names = ["trl", "trl-ext"]
    _name = "Rollout"
    _paper = {}

    # Read by the model card; nothing is precomputed, and the reference is a copy of the start.
    precompute_ref_logps = False
    reference_config = None

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        *,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        **trainer_arguments: Any,
    ):
        args = resolve_args(self, model if isinstance(model, str) else get_config_model_id(model.config), args)
        check_is_split(train_dataset)
        splits = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        for name, dataset in {"train": train_dataset, **splits}.items():
            if dataset is not None:
                _check_prompts(dataset, name)
        if isinstance(train_dataset, Dataset):
            _check_number_of_prompts(train_dataset, args)
        if eval_dataset is not None:
            args.check_groups(
                args.per_device_eval_batch_size, args.num_generations_eval or args.num_generations, "eval"
            )
        if args.use_vllm:
            check_vllm(args.vllm_mode)
        if self._needs_reference(args):
            _check_reference(model, peft_config, is_loaded=args.beta != 0)
        is_in_memory = not isinstance(model, str)
        is_adapter = peft_config is not None or (is_in_memory and is_peft_model(model))
        self.state_base(args, base_of(model, args), is_adapter)
        self._init_metrics()
        self._eval_rewards: list[torch.Tensor] = []
        self._eval_samples = 0
        self._has_begun = False
        self._given_optimizers = tuple(given is not None for given in optimizers)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            optimizers=optimizers,
            peft_config=peft_config,
            **trainer_arguments,
        )
        for each in (self.model, self.ref_model):
            if each is not None:
                keep_quantized_weights(each)
        if self.ref_model is not None and is_in_memory:
            self._copy_start_to_reference()
        check_optimizer(
            self.model,
            optimizers[0],
            "The trainer makes an adapter of `peft_config` anew: make it first (`get_peft_model`) and the optimizer "
            "from its parameters, or leave `optimizers` out and set `optim` and `learning_rate`.",
        )
        self._checkpoint: str | None = None
        self.add_callback(PreferenceProgress())
        self.add_callback(_RunBoundary(self))

    # ---- The reference ---------------------------------------------------------------------------------------------

    def _needs_reference(self, args) -> bool:
        """Whether the method reads a reference under this configuration. Called before the trainer is built."""
        return args.beta != 0

    @property
    def needs_reference(self) -> bool:
        return self._needs_reference(self.args)

    def _copy_start_to_reference(self) -> None:
        """TRL loads the reference by the model's name, and a model in memory may have changed since it was loaded."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return  # both are sharded by now; a difference shows on the first batch
        start = self.accelerator.unwrap_model(self.model).state_dict()
        self.accelerator.unwrap_model(self.ref_model).load_state_dict(start)

    def _check_start(self) -> None:
        """Raises `ValueError` if the first batch shows that the reference is not what training starts from."""
        kl = self._metrics["train"].get("kl")
        if not kl or not abs(kl[0]) > _START_KL or _is_noisy(self.model, self.args):
            return
        raise ValueError(
            f"The KL between the policy and its reference is {kl[0]:.3g} per token on the first batch, before any "
            "step: the reference is not the model that training starts from. Save the model with `save_pretrained` "
            "and pass the folder as `model`."
        )

    # ---- Samples ---------------------------------------------------------------------------------------------------

    def local_rows(self, values: torch.Tensor) -> torch.Tensor:
        """
        This process's rows of a tensor over the samples of all processes, such as `_calculate_rewards` returns.
        """
        count = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * count :][:count]

    def record_means(self, **values: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """
        Logs means over the samples of all processes, or over their tokens.

        Args:
            values:
                Name -> this process's values, the samples in the first dimension, or `(values, where)` with a mask of
                the same shape. `__` in a name stands for `/`.
        """
        pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in values.items()}
        first = next(iter(pairs.values()))[0]
        metrics = StepMetrics(first.device, len(first))
        for name, (value, where) in pairs.items():
            metrics.mean(name.replace("__", "/"), value, None if where is None else where.bool())
        self._window[self._mode].append(*metrics.reduce(self.accelerator))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.model.training:
            # In several processes Accelerate fills the last batch with rows of the first.
            self._eval_rewards.append(rewards[: self._rows_of_last_batch()].float().cpu())
        return rewards

    # ---- Metrics ---------------------------------------------------------------------------------------------------

    def _rows_of_last_batch(self) -> int | None:
        if not self.accelerator.gradient_state.end_of_dataloader:
            return None
        return self._eval_samples % (self.args.eval_batch_size * self.accelerator.num_processes) or None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = self._rows_of_last_batch() or len(inputs) * self.accelerator.num_processes
        self._take_appended("eval", rows)  # the last batch may be smaller
        return output

    def _take_appended(self, mode: str, weight: float = 1.0) -> None:
        for name, values in self._metrics[mode].items():
            # TRL's count of tokens is no mean, and a metric is NaN in a batch where no reward function applies.
            for value in () if name == "num_tokens" else values:
                if value == value:
                    self._window[mode].add(name, value * weight, weight)
        self._metrics[mode].clear()

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = super()._pop_metrics(mode)
        if mode == "train" and metrics:
            metrics["num_tokens"] = self.state.num_input_tokens_seen
        if mode == "eval" and self._eval_rewards:
            metrics.update(self._reward_statistics(torch.cat(self._eval_rewards)))
            self._eval_rewards.clear()
        return metrics

    def _clear_metrics(self, mode: str) -> None:
        super()._clear_metrics(mode)
        if mode == "eval":
            self._eval_rewards.clear()

    def _reward_statistics(self, rewards: torch.Tensor) -> dict[str, float]:
        """TRL's statistics of rewards, of shape (samples, functions), over all of them at once."""
        total = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        columns = {f"rewards/{name}": rewards[:, i] for i, name in enumerate(self.reward_func_names)}
        statistics = {"reward": _mean(total), "reward_std": _deviation(total)}
        for name, column in columns.items():
            statistics |= {f"{name}/mean": _mean(column), f"{name}/std": _deviation(column)}
        return {name: value for name, value in statistics.items() if value is not None}

    # ---- The order of the prompts, and the generation window --------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        args = self.args
        return EpochSampler(
            super()._get_train_sampler(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            # What has been trained says which epoch begins, in a resumed run too.
            epoch=lambda: int(self.state.epoch or 0),
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        # Each prompt is repeated by TRL's sampler, so the dataset has fewer rows than there are samples.
        dataset = dataloader.dataset
        self._eval_samples = len(dataset) * self.num_generations_eval if hasattr(dataset, "__len__") else 0
        # Every evaluation draws the same random numbers, and none changes what training samples next.
        with seeded(self.accelerator.device, self.args.seed, "evaluation", self.accelerator.process_index):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Like [`~transformers.Trainer.train`]; with `resume_from_checkpoint=True` it continues from the last checkpoint
        that was written to its end.
        """
        # TRL counts micro-steps and keeps completions from one `train()` of a trainer to the next.
        self._step, self._buffered_inputs, self._checkpoint = 0, None, None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin_run(self, checkpoint: str | None) -> None:
        """
        Called in every process once the model is prepared, and before anything is trained or evaluated. A method that
        computes something from what training starts from overrides it.

        Args:
            checkpoint (`str`, *optional*):
                The checkpoint that the run resumes from.
        """

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not self._has_begun:
            self._has_begun = True
            if self._step == 1 and self.needs_reference:
                self._check_start()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """
        What the method itself carries through checkpoints, of this process: tensors, numbers, strings, and lists and
        dictionaries of them. A method that has a state overrides it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of [`~RolloutTrainer.state_dict`]."""

    @property
    def _window_settings(self) -> dict[str, int]:
        """Options that give the micro-steps of a window their meaning."""
        names = ("per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations")
        return {name: getattr(self.args, name) for name in names}

    @property
    def _is_inside_window(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0

    def _save_rng_state(self, output_dir):
        # Beside the random state, which a resumed run needs as much; before the file that marks a checkpoint complete.
        state = {
            "step": self._step,
            "settings": self._window_settings,
            "window": self._buffered_inputs if self._is_inside_window else None,
            "method": self.state_dict(),
        }
        save_window(Path(output_dir), self.accelerator.process_index, self.accelerator.num_processes, state)
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._checkpoint = checkpoint
        accelerator = self.accelerator
        state = load_window(
            Path(checkpoint), accelerator.process_index, accelerator.num_processes, device=accelerator.device
        )
        for name, value in self._window_settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"`{name}={value}`, and the run that wrote `{checkpoint}` had {state['settings'].get(name)}. "
                    "Resume with the settings of the run."
                )
        self._step, self._buffered_inputs = state["step"], state["window"]
        self.load_state_dict(state["method"])

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    def resolved_hyperparameters(self) -> dict[str, Any]:
        """
        Hyperparameters for the model card that are missing from `args` or were resolved later. `None` leaves a row
        out.
        """
        return {"reward functions": ", ".join(self.reward_func_names)}

    def own_option_names(self) -> list[str]:
        parent = next(cls for cls in type(self.args).__mro__ if cls.__module__.startswith("trl."))
        common = ["beta", "num_generations", "max_completion_length", "temperature", "num_iterations"]
        return [*common, *names_of_fields(type(self.args), beside=parent)]


class _RunBoundary(TrainerCallback):
    def __init__(self, trainer: RolloutTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_run(self.trainer._checkpoint)


def _mean(values: torch.Tensor) -> float | None:
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def _deviation(values: torch.Tensor) -> float | None:
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else 0.0 if len(known) else None


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _check_prompts(dataset, name: str) -> None:
    """Raises `TypeError` or `ValueError` for a dataset whose rows have no prompts."""
    if not hasattr(dataset, "column_names"):
        raise TypeError(
            f"The {name} dataset must be a `datasets.Dataset` or `IterableDataset`, got a `{type(dataset).__name__}`."
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} dataset is empty. Give a dataset with at least one row.")
    if "prompt" not in row:
        raise ValueError(
            f"The {name} dataset has no column `prompt`, only {sorted(row)}. Rename the column that holds the prompts "
            "(text or messages)."
        )
    prompt = row["prompt"]
    is_messages = isinstance(prompt, list) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)
    if not isinstance(prompt, str) and not is_messages:
        raise ValueError(
            f"`prompt` of the {name} dataset's first row is {prompt!r}. A prompt is a string or a list of messages "
            "(`{'role': ..., 'content': ...}`)."
        )


def _check_number_of_prompts(dataset: Dataset, args) -> None:
    """Raises `ValueError` if there are fewer prompts than one generation needs: TRL's sampler would yield nothing."""
    prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < prompts:
        raise ValueError(
            f"The train dataset has {len(dataset)} prompts, and {prompts} are generated for at once "
            f"(`generation_batch_size={args.generation_batch_size}` divided by `num_generations="
            f"{args.num_generations}`). Give more prompts, or lower `steps_per_generation` or "
            "`per_device_train_batch_size`."
        )


def _check_reference(model, peft_config, is_loaded: bool) -> None:
    """Raises `ValueError` if the reference would not be what training starts from."""
    if peft_config is not None:
        check_starts_at_base(peft_config, is_fresh=True)
    elif not isinstance(model, str) and is_peft_model(model):
        check_starts_at_base(model.active_peft_config, is_fresh=False)
    elif is_loaded and not isinstance(model, str) and not get_config_model_id(model.config):
        raise ValueError(
            f"`model` is a `{type(model).__name__}` that was built in memory, and its reference is loaded by name. "
            "Save it with `save_pretrained` and pass the folder as `model`."
        )


def _is_noisy(model: nn.Module, args) -> bool:
    """Whether two forwards of one model in training mode differ."""
    config = getattr(model, "config", None)
    functional = any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop", "resid_pdrop"))
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return bool(functional or modules or args.neftune_noise_alpha)
