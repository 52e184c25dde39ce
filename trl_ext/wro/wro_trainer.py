"""Win-rate optimization: RLOO whose reward is a judge's win rate over anchors."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import RLOOTrainer

from .._trl import get_config_model_id
from ..judges import Judge
from ..rollout import RolloutTrainer
from ..training.arguments import resolve_args
from .anchors import with_anchors
from .evaluated_wins import EvaluatedWins, warn_of_one_judge
from .win_rate_reward import WinRateReward
from .wro_config import WROConfig


class WROTrainer(RolloutTrainer, RLOOTrainer):
    r"""
    Trainer of win-rate optimization: maximizes `E h(p(y beats y0)) - beta KL(pi || pi_ref)` over anchors y0.

    It is [`~trl.RLOOTrainer`] with a [`WinRateReward`]. Before training it samples the anchors from the reference and
    keeps them on disk, for the evaluation sets too.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or its id or folder.
        reward_funcs (`Callable` or `list`):
            Further rewards, added to the win rate; `[]` for none. `reward_weights` weighs the win rate first.
        args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.RLOOTrainer`], with a [`WROConfig`] as `args`.
        judge ([`~trl_ext.judges.Judge`] or `Callable`):
            Compares two completions; see [`trl_ext.judges`]. Evaluate with another one.

    Raises:
        `ValueError`: As [`~trl_ext.rollout.RolloutTrainer`], and for data without the column of the anchors.
    """

    config_class = WROConfig

    train_dataset: Any
    eval_dataset: Any

    _tag_names = ["trl", "trl-ext", "wro"]
    _name = "WRO"
    _paper = {
        "title": "Preference learning made easy: Everything should be understood through win rate",
        "id": "2502.10505",
        # docstyle-ignore
        "citation": """@inproceedings{zhang2025preference,
    title        = {{Preference learning made easy: Everything should be understood through win rate}},
    author       = {Lily H. Zhang and Rajesh Ranganath},
    year         = 2025,
    booktitle    = {Proceedings of the 42nd International Conference on Machine Learning},
    publisher    = {PMLR},
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | str | PreTrainedModel | list,
        args: WROConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        *,
        judge: Judge | Callable | None = None,
    ):
        args = resolve_args(self, model if isinstance(model, str) else get_config_model_id(model.config), args)
        if judge is None:
            raise ValueError("`judge` is required: a judge of `trl_ext.judges`, or a function on pairs.")
        reward = WinRateReward(
            judge,
            anchors=args.anchors,
            column=args.anchor_column,
            h=args.h,
            both_orders=args.both_orders,
            clip=args.h_clip,
            num_generations=args.num_generations,
        )
        further = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        rewards = [reward, *(function for function in further if function is not None)]
        self._eval_wins = EvaluatedWins()
        super().__init__(
            model=model,
            reward_funcs=rewards,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.win_rate = reward
        self.train_dataset = self._with_anchors(self.train_dataset)
        self.eval_dataset = self._with_anchors(self.eval_dataset)

    def _with_anchors(self, dataset):
        reference = self.model if self.ref_model is None else self.ref_model
        return with_anchors(dataset, self.accelerator.unwrap_model(reference), self.processing_class, self.args)

    def begin_run(self, checkpoint: str | None) -> None:
        super().begin_run(checkpoint)
        warn_of_one_judge(self.win_rate.judge, self.callback_handler.callbacks)

    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(self._with_anchors(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(self._with_anchors(test_dataset))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        training = self.model.training
        self.win_rate.num_generations = self.num_generations if training else self.num_generations_eval
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not training and self.args.anchors != "self":  # against itself every policy wins half of the time
            self._eval_wins.add(self.win_rate.last, rewards.device, self._rows_of_last_batch())
        return rewards

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = super()._pop_metrics(mode)
        if mode == "eval":
            metrics |= self._eval_wins.metrics(self.win_rate.metric, self.num_generations_eval)
        return metrics

    def _clear_metrics(self, mode: str) -> None:
        super()._clear_metrics(mode)
        if mode == "eval":
            self._eval_wins.clear()

    def resolved_hyperparameters(self) -> dict[str, Any]:
        where = {"reference": "samples of the reference", "self": "the other completions of the group"}
        anchors = where.get(self.args.anchors, f"the data's column {self.args.anchor_column!r}, not the reference")
        return {**super().resolved_hyperparameters(), "judge": self.win_rate.judge.name, "anchors": anchors}
