"""What the trainers of all methods that sample share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._patches import keep_quantized_weights
from .._trl import get_config_model_id
from ..training.adapters import complete_reference_adapter
from ..training.arguments import check_optimizers, resolve_args
from ..training.messages import check_template
from ..training.progress import PreferenceProgress
from ..training.text_card import DocumentedTextRun, base_of, names_of_fields
from .checks import check_arguments, check_generation_keeps_weights, check_start
from .metrics import SampleMetrics
from .resuming import ResumableWindows, RunBoundary
from .start import CheckedStart


if TYPE_CHECKING:  # one of the two parents, which have what is used here in common
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object


class RolloutTrainer(CheckedStart, DocumentedTextRun, SampleMetrics, ResumableWindows, _Parent):
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
        check_arguments(args, train_dataset, eval_dataset, trainer_arguments)
        check_start(model, peft_config, args, needs_reference=self._needs_reference(args))
        is_in_memory = not isinstance(model, str)
        is_adapter = peft_config is not None or (is_in_memory and is_peft_model(model))
        self.state_base(args, base_of(model, args), is_adapter)
        self._init_metrics()
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
        complete_reference_adapter(self.model)
        prompt = next(iter(self.train_dataset))["prompt"]
        if not isinstance(prompt, str):
            check_template(prompt, self._tokenizer)
        check_generation_keeps_weights(self.model, args)
        for each in (self.model, self.ref_model):
            if each is not None:
                keep_quantized_weights(each)
        if self.ref_model is not None and is_in_memory:
            self._copy_start_to_reference()
        check_optimizers(
            self.model,
            optimizers,
            "The trainer makes an adapter of `peft_config` anew: make it first (`get_peft_model`) and the optimizer "
            "from its parameters, or leave `optimizers` out and set `optim` and `learning_rate`.",
        )
        self._checkpoint = None
        self.add_callback(PreferenceProgress())
        self.add_callback(RunBoundary(self))

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
