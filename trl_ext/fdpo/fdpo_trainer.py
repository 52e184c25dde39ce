"""f-DPO (https://huggingface.co/papers/2309.16240)."""

import textwrap
from collections.abc import Callable

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..losses import Divergence, TangentTail, f_dpo_loss
from ..preference import Method, PairLoss, PreferenceTrainer, ResponseScores
from .fdpo_config import FDPOConfig


class FDPO(Method):
    """
    f-DPO's loss; the parameters are those of [`FDPOConfig`]. `divergence` is one of your own, a
    [`~trl_ext.losses.Divergence`], in place of the one that `args` names.
    """

    name = "f-DPO"
    config_class = FDPOConfig

    def __init__(self, args: FDPOConfig, divergence: Divergence | None = None):
        super().__init__(args)
        self._given_divergence = divergence
        divergence = args.get_divergence(divergence)
        self._curvature = divergence.curvature if args.normalize_curvature else 1.0
        self.divergence = divergence
        if args.max_log_weight is not None:
            self.divergence = TangentTail(divergence, max_log_weight=args.max_log_weight)

    @property
    def f_beta(self) -> float:
        """The factor of f'(u)."""
        # At the reference the gradient is beta f''(1) / 2 on each side: this makes it DPO's, beta / 2.
        return self.args.beta / self._curvature

    def resolved_hyperparameters(self):
        return {"divergence": repr(self._given_divergence)} if self._given_divergence is not None else {}

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        losses = f_dpo_loss(chosen.logratios, rejected.logratios, beta=self.f_beta, divergence=self.divergence)
        logratios = {"chosen": chosen.logratios.detach(), "rejected": rejected.logratios.detach()}
        rewards = [self.f_beta * self.divergence.score(side) for side in logratios.values()]
        tails = {f"tail/{name}": self.divergence.in_tail(side) for name, side in logratios.items()}
        return PairLoss(losses, rewards[0], rewards[1], tails)


class FDPOTrainer(PreferenceTrainer):
    r"""
    Trainer for f-DPO, introduced in the paper [Beyond Reverse KL: Generalizing Direct Preference Optimization with
    Diverse Divergence Constraints](https://huggingface.co/papers/2309.16240). f-DPO is DPO with the f-divergence of
    your choice as the constraint. With the default, the reverse KL, it is [`~trl.DPOTrainer`].

    The logged `rewards/*` are the method's implicit rewards, beta f'(u), with u the ratio of policy to reference and f
    shifted so that f'(1) = 0. The log ratios themselves are logged as `logratios/*`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import FDPOConfig, FDPOTrainer

    >>> trainer = FDPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=FDPOConfig("Qwen2.5-0.5B-FDPO", divergence="js"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`], and:

    Args:
        divergence ([`~trl_ext.losses.Divergence`], *optional*):
            A divergence of your own, in place of the one that `args` names.
    """

    method_class = FDPO
    config_class = FDPOConfig
    method: FDPO

    _tag_names = ["trl", "trl-ext", "f-dpo"]
    _name = "f-DPO"
    _paper = {
        "title": "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        "id": "2309.16240",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wang2024beyond,
                title        = {{Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints}},
                author       = {Chaoqi Wang and Yibo Jiang and Chenghao Yang and Han Liu and Yuxin Chen},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations, ICLR 2024},
                url          = {https://huggingface.co/papers/2309.16240},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        args: FDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        *,
        divergence: Divergence | None = None,
    ):
        self._given_divergence = divergence
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    def _make_method(self, args: FDPOConfig) -> FDPO:
        return FDPO(args, divergence=self._given_divergence)

    @property
    def divergence(self) -> Divergence:
        """The divergence that is trained with, its tail included."""
        return self.method.divergence

    @property
    def f_beta(self) -> float:
        """The factor of f'(u); see [`FDPO`]."""
        return self.method.f_beta
