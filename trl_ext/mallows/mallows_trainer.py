"""Mallows-DPO (https://huggingface.co/papers/2405.14953)."""

import textwrap

from ..losses import mallows_dpo_loss
from ..preference import PairLoss, ResponseScores
from ..preference.dispersion import DispersionMethod, DispersionTrainer
from .mallows_config import MallowsDPOConfig


class MallowsDPO(DispersionMethod):
    """Mallows-DPO's loss; the parameters are those of [`MallowsDPOConfig`]."""

    name = "Mallows-DPO"
    config_class = MallowsDPOConfig

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        weight, metrics = self.pair_weights(chosen, rejected)
        losses = mallows_dpo_loss(
            chosen.logratios, rejected.logratios, weight, beta=self.args.beta, link=self.args.link
        )
        chosen_rewards, rejected_rewards = (self.args.beta * side.logratios.detach() for side in (chosen, rejected))
        return PairLoss(losses, chosen_rewards, rejected_rewards, metrics)


class MallowsDPOTrainer(DispersionTrainer):
    r"""
    Trainer for Mallows-DPO, introduced in the paper [Mallows-DPO: Fine-Tune Your LLM with Preference
    Dispersions](https://huggingface.co/papers/2405.14953). Mallows-DPO is DPO with a weight on each pair's `beta`: the
    more people agree on the prompt, the larger the weight. The agreement comes from the entropy of the reference, or
    from a column of the dataset.

    The logged `rewards/*` are beta times the log ratio, without the weight. The mean weight is logged as
    `dispersion/weight`, the mean dispersion as `dispersion/index`, and the share of pairs whose dispersion was clamped
    as `dispersion/clamped`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import MallowsDPOConfig, MallowsDPOTrainer

    >>> trainer = MallowsDPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=MallowsDPOConfig("Qwen2.5-0.5B-MallowsDPO"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`].
    """

    method_class = MallowsDPO
    config_class = MallowsDPOConfig

    _tag_names = ["trl", "trl-ext", "mallows-dpo"]
    _name = "Mallows-DPO"
    _paper = {
        "title": "Mallows-DPO: Fine-Tune Your LLM with Preference Dispersions",
        "id": "2405.14953",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{chen2025mallowsdpo,
                title        = {{Mallows-DPO: Fine-Tune Your LLM with Preference Dispersions}},
                author       = {Haoxian Chen and Hanyang Zhao and Henry Lam and David Yao and Wenpin Tang},
                year         = 2025,
                booktitle    = {The Thirteenth International Conference on Learning Representations, ICLR 2025},
                url          = {https://huggingface.co/papers/2405.14953},
            }"""),
    }
