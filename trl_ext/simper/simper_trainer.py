"""SimPER (https://huggingface.co/papers/2502.00883)."""

import textwrap

from ..losses import simper_loss
from ..preference import Method, PairLoss, PreferenceTrainer, ResponseScores
from .simper_config import SimPERConfig


class SimPER(Method):
    """SimPER's loss, which has no parameters."""

    name = "SimPER"
    config_class = SimPERConfig
    reference_statistics = ()

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        losses = simper_loss(chosen.mean_logps, rejected.mean_logps)
        return PairLoss(losses, chosen.mean_logps.detach(), rejected.mean_logps.detach())


class SimPERTrainer(PreferenceTrainer):
    """
    Trainer for SimPER, introduced in the paper [SimPER: A Minimalist Approach to Preference Alignment without
    Hyperparameters](https://huggingface.co/papers/2502.00883). SimPER maximizes the inverse perplexity of the chosen
    responses and minimizes that of the rejected ones. It has no beta and loads no reference model.

    The logged `rewards/*` are the average log-probabilities per token, in nats. The loss of a pair lies in (-1, 1) and
    becomes negative as training succeeds.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import SimPERConfig, SimPERTrainer

    >>> trainer = SimPERTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=SimPERConfig("Qwen2.5-0.5B-SimPER"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`]; `ref_model` is refused.
    """

    method_class = SimPER
    config_class = SimPERConfig

    _tag_names = ["trl", "trl-ext", "simper"]
    _name = "SimPER"
    _paper = {
        "title": "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
        "id": "2502.00883",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{xiao2025simper,
                title        = {{SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters}},
                author       = {Teng Xiao and Yige Yuan and Zhengyu Chen and Mingxiao Li and Shangsong Liang and Zhaochun Ren and Vasant G. Honavar},
                year         = 2025,
                booktitle    = {The Thirteenth International Conference on Learning Representations, ICLR 2025},
                url          = {https://huggingface.co/papers/2502.00883},
            }"""),
    }
