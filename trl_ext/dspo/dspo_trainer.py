"""DSPO (https://openreview.net/forum?id=xyfb9HHvMe)."""

import textwrap

import torch

from ..diffusion import DenoisedPairs, DiffusionTrainer
from ..losses import dspo_loss
from .dspo_config import DSPOConfig


class DSPOTrainer(DiffusionTrainer):
    r"""
    Trainer for DSPO, introduced in the paper [DSPO: Direct Score Preference Optimization for Diffusion Model
    Alignment](https://openreview.net/forum?id=xyfb9HHvMe), in both forms of the released code.

    The logged `rewards/*` are those of Diffusion-DPO, -(beta / 2) (E - Eref).

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_ext import DSPOConfig, DSPOTrainer

    >>> trainer = DSPOTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     args=DSPOConfig("sd15-DSPO"),
    ...     train_dataset=load_dataset("kashif/pickascore", split="validation"),
    ...     peft_config=LoraConfig(r=16, lora_alpha=16),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl_ext.diffusion.DiffusionTrainer`].
    """

    config_class = DSPOConfig

    _tag_names = ["trl", "trl-ext", "dspo"]
    _name = "DSPO"
    _paper = {
        "title": "DSPO: Direct Score Preference Optimization for Diffusion Model Alignment",
        "url": "https://openreview.net/forum?id=xyfb9HHvMe",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zhu2025dspo,
                title        = {{DSPO: Direct Score Preference Optimization for Diffusion Model Alignment}},
                author       = {Huaisheng Zhu and Teng Xiao and Vasant G. Honavar},
                year         = 2025,
                booktitle    = {The Thirteenth International Conference on Learning Representations, ICLR 2025},
                url          = {https://openreview.net/forum?id=xyfb9HHvMe},
            }"""),
    }

    def pair_loss(self, pairs: DenoisedPairs) -> torch.Tensor:
        return dspo_loss(
            *pairs.predictions,
            beta=self.args.beta,
            score_weight=self.args.score_weight,
            variant=self.args.variant,
            weight=pairs.weight,
            safeguard_mu=self.args.safeguard_mu,
        )
