"""DPH-RL (https://huggingface.co/papers/2509.07430)."""

import textwrap
from collections.abc import Callable
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import GRPOTrainer

from ..losses import Divergence
from ..rollout import RolloutTrainer
from .dph_rl_config import DPHRLConfig
from .rehearser import Rehearser


class DPHRLTrainer(RolloutTrainer, GRPOTrainer):
    r"""
    Trainer for DPH-RL, introduced in the paper [The Choice of Divergence: A Neglected Key to Mitigating Diversity
    Collapse in Reinforcement Learning with Verifiable Reward](https://huggingface.co/papers/2509.07430): GRPO on the
    prompts that still teach, and beside it an f-divergence on saved answers of the initial model to prompts that it
    masters, so that what it knew is not forgotten:

    L = L_GRPO + eta * mean over tokens of f(pi / pi_0)

    The answers come from [`collect_rehearsal`], which also splits the prompts. Their log-probabilities are computed
    before the first step, by the forward that trains, and kept in `output_dir`.

    Example:

    ```python
    >>> from trl_ext import DPHRLConfig, DPHRLTrainer, collect_rehearsal

    >>> exploration, _, rehearsal, rates = collect_rehearsal(
    ...     model, tokenizer, dataset, reward_func, reward_threshold=1.0, cache_dir="answers"
    ... )
    >>> trainer = DPHRLTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=reward_func,
    ...     args=DPHRLConfig("Qwen2.5-0.5B-DPH-RL", rehearsal_coef=0.1),
    ...     train_dataset=exploration,
    ...     rehearsal_dataset=rehearsal,
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.GRPOTrainer`], and:

    Args:
        rehearsal_dataset ([`~datasets.Dataset`], *optional*):
            Answers to rehearse: `prompt_ids` and `completion_ids`, or `prompt` and `completion`. Required unless
            `rehearsal_coef=0`.
        divergence ([`~trl_ext.losses.Divergence`], *optional*):
            A divergence of your own, in place of the one that `args` names.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            With `rehearsal_estimator="exact"` and without an adapter: a second copy of the model that training starts
            from.
    """

    config_class: ClassVar[type] = DPHRLConfig
    args: DPHRLConfig

    _tag_names = ["trl", "trl-ext", "dph-rl", "grpo"]
    _name = "DPH-RL"
    _paper = {
        "title": "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning "
        "with Verifiable Reward",
        "id": "2509.07430",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2025choice,
                title        = {{The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning with Verifiable Reward}},
                author       = {Long Li and Jiaran Hao and Jason Klein Liu and Zhijian Zhou and Yanting Miao and Wei Pang and Xiaoyu Tan and Wei Chu and Zhe Wang and Shirui Pan and Chao Qu and Yuan Qi},
                year         = 2025,
                eprint       = {arXiv:2509.07430},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | str | PreTrainedModel | list | None = None,
        args: DPHRLConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        *,
        rehearsal_dataset: Dataset | None = None,
        divergence: Divergence | None = None,
        ref_model: PreTrainedModel | None = None,
    ):
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.rehearser = Rehearser.of(self, rehearsal_dataset, divergence, ref_model)

    def _needs_reference(self, args) -> bool:
        return args.beta != 0 or (args.rehearsal_coef != 0 and args.rehearsal_estimator == "exact")

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.rehearser is None or not self.model.training:
            return loss
        return loss + self.args.rehearsal_coef * self.rehearser.loss(model)

    def begin_run(self, checkpoint: str | None) -> None:
        if self.rehearser is not None:
            self.rehearser.start_run(checkpoint)

    def resolved_hyperparameters(self) -> dict[str, Any]:
        own = {"divergence": None, "rehearsal_batch_size": None} if self.rehearser is None else self.rehearser.facts()
        return {**super().resolved_hyperparameters(), **own}
